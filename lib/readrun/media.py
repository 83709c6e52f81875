"""Pictures, clips and sound as files of a run; how they stand in a notebook and on the published page."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import mimetypes
import os
import wave
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

DRAFT_DPI = 50
LIGHTLY = {"compress_level": 1}  # what is read again at once


def headless() -> bool:
    """Is nobody watching (papermill, nbval, a script)? Then files are referred to, not embedded."""
    from IPython.core.getipython import get_ipython

    return bool(os.environ.get("READRUN_HEADLESS")) or not hasattr(get_ipython(), "kernel")


def for_a_page() -> bool:
    """Does a kernel run this from top to bottom, to be published? (Live, a cell may be run again.)"""
    from IPython.core.getipython import get_ipython

    return bool(os.environ.get("READRUN_HEADLESS")) and hasattr(get_ipython(), "kernel")


def draft() -> bool:
    """Is this the smoke profile, whose pictures nobody reads? Then they are drawn small and packed fast."""
    return os.environ.get("READRUN_PROFILE") == "smoke"


def figure(run: Any, file: str, tag: str, alt: str, caption: str) -> Any:
    """HTML of a file of `run.media`; a live notebook gets the data itself, publishing fills in addresses."""
    from IPython.display import HTML

    if not alt.strip():
        raise ValueError(f"{file}: alt text is required")
    source = f"readrun-media:{run.slug}/{file}"
    data = (run.media / file).read_bytes()  # also: the file must be there
    if not headless():
        kind = mimetypes.guess_type(file)[0] or "image/webp"
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    body = tag.format(src=source, alt=escape(alt))
    return HTML(f'<figure class="rr-figure">{body}<figcaption>{escape(caption)}</figcaption></figure>')


def pixels(image: Any, dpi: int = 130) -> Any:
    """Make an RGB PIL image of a figure, of another, or of an array (height, width[, 3]), floats in 0..1."""
    from PIL import Image

    if hasattr(image, "savefig"):
        import matplotlib.pyplot as plt

        buffer = io.BytesIO()
        image.savefig(buffer, dpi=DRAFT_DPI if draft() else dpi, facecolor="white", pil_kwargs=LIGHTLY)
        plt.close(image)
        image = Image.open(buffer)
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        scale = 255 if array.dtype.kind == "f" else 1
        image = Image.fromarray((array * scale).round().clip(0, 255).astype("u1"))
    return image.convert("RGB")


def _path(run: Any, file: str) -> Path:
    (run.media / file).parent.mkdir(parents=True, exist_ok=True)
    return Path(run.media / file)


def picture(run: Any, file: str, image: Any = None, *, alt: str, caption: str = "") -> Any:
    """Show `file` (.webp) of the run's media, saving `image` there first: whatever `pixels` takes."""
    if image is not None:
        pixels(image).save(_path(run, file), "WEBP", quality=80, method=0 if draft() else 6)
    return figure(run, file, '<img src="{src}" alt="{alt}" loading="lazy">', alt, caption)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what C code writes to the process's standard error meanwhile."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def clip(run: Any, file: str, frames: Any = None, fps: float = 8, *, alt: str, caption: str = "") -> Any:
    """Show `file` (.webm) looping and muted, saving `frames` (time, height, width, 3) there first, as VP8."""
    if frames is not None:
        import cv2

        images = [np.asarray(pixels(frame)) for frame in frames]
        size, codec = images[0].shape[1::-1], cv2.VideoWriter.fourcc(*"VP80")
        with _no_stderr():  # OpenCV 5 remarks on the codec's tag and writes the file all the same
            writer = cv2.VideoWriter(str(_path(run, file)), codec, fps, size)
        for image in images:
            writer.write(np.ascontiguousarray(image[..., ::-1]))
        writer.release()
    tag = '<video src="{src}" aria-label="{alt}" autoplay loop muted playsinline controls></video>'
    return figure(run, file, tag, alt, caption)


def audio(run: Any, file: str, samples: Any = None, rate: int = 16000, *, alt: str, caption: str = "") -> Any:
    """Show a player for `file` (.wav), saving mono `samples` (time,) in -1..1 there first, as 16 bit."""
    if samples is not None:
        with wave.open(str(_path(run, file)), "wb") as out:
            out.setparams((1, 2, rate, 0, "NONE", ""))
            out.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    tag = '<audio src="{src}" aria-label="{alt}" controls preload="none"></audio>'
    return figure(run, file, tag, alt, caption)


def stage(notebook: dict[str, Any], folder: Path, where: str, media: str) -> None:
    """Prepare a page's outputs in place: pictures of `plots.show` become files, media get their addresses.

    `folder` receives the pictures and is at `where` seen from the page; `<slug>/<file>` is below `media`.
    """
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        data, meta = output.get("data", {}), output.get("metadata", {}).get("image/png", {})
        if "image/png" in data and meta.get("alt"):
            png = base64.b64decode("".join(data.pop("image/png")))
            name = hashlib.sha256(png).hexdigest()[:20] + ".png"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png)
            alt, words = escape(meta["alt"]), escape(meta["caption"])
            image = f'<img src="{where}/{name}" alt="{alt}" width="{meta["width"]}" loading="lazy">'
            data["text/html"] = f'<figure class="rr-figure">{image}<figcaption>{words}</figcaption></figure>'
        elif "text/html" in data:
            data["text/html"] = "".join(data["text/html"]).replace("readrun-media:", media.rstrip("/") + "/")
