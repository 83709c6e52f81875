"""data/assets/lsnet/photographs: the photographs inside the scikit-image and scikit-learn wheels, made small.

    pip install scikit-image==0.26.0 scikit-learn
    python data/sources/lsnet_photographs.py

The shorter side becomes 192 pixels, the centre square is kept. `train` and `test` are the chapter's split.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from PIL import Image
from readrun import paths

SPLIT = {
    "train": ["astronaut.png", "brick.png", "camera.png", "chelsea.png", "china.jpg", "coffee.png",
              "grass.png", "hubble_deep_field.jpg", "motorcycle_left.png"],
    "test": ["coins.png", "flower.jpg", "gravel.png", "moon.png", "rocket.jpg"],
}  # fmt: skip
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def find(name: str, folders: list[Path]) -> Path:
    """The file `name` in one of the folders. Raises ValueError if no installed package has it."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{name}: not in {', '.join(map(str, folders))}; install scikit-image and scikit-learn")


def main() -> None:
    folders = [Path(p) for p in sys.argv[1:]]
    for package, inside in FOLDERS.items():
        spec = importlib.util.find_spec(package)
        folders += [Path(spec.origin).parent / inside] if spec and spec.origin else []
    for split, names in SPLIT.items():
        for name in names:
            with Image.open(find(name, folders)) as opened:
                image = opened.convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((192, 192), Image.Resampling.LANCZOS)
            file = paths.assets("lsnet") / "photographs" / split / f"{Path(name).stem}.webp"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, "WEBP", quality=85, method=6)
    paths.write_manifest(
        "lsnet",
        "scikit-image 0.26.0 wheel (skimage/data) and scikit-learn 1.9.1 wheel (sklearn/datasets/images)",
        "CC0, public domain or no known copyright restrictions (scikit-image's documentation of each image); "
        "china: CC BY 2.0 danielbuechele, flower: CC BY 2.0 vultilion, both cropped and made smaller",
        "data/sources/lsnet_photographs.py: centre square, 192 pixels, WebP quality 85",
    )


if __name__ == "__main__":
    main()
