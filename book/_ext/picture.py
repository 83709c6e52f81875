"""The picture of the README: the front page and the scoreboard of the built book, side by side, as they are.

Run `make book EDITION=recorded`, then `python book/_ext/picture.py`.
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

TOP = Path(__file__).resolve().parents[2]
SIZE = (1100, 900)


def main() -> None:
    shots = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page, scheme in (("index", "light"), ("scoreboard", "dark")):
            view = {"width": SIZE[0], "height": SIZE[1]}
            context = browser.new_context(viewport=view, device_scale_factor=1.5)
            context.add_init_script(f"localStorage.mode = localStorage.theme = '{scheme}'")
            tab = context.new_page()
            tab.goto((TOP / f"book/_build/html/{page}.html").as_uri(), wait_until="load")
            tab.wait_for_timeout(1000)
            shots.append(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))
    both = Image.new("RGB", (2 * shots[0].width, shots[0].height))
    for number, shot in enumerate(shots):
        both.paste(shot, (number * shot.width, 0))
    both = both.resize((1800, round(1800 * both.height / both.width)), Image.Resampling.LANCZOS)
    target = TOP / "book/_static/picture.webp"
    both.save(target, quality=82, method=6)
    assert target.stat().st_size < 150_000, target.stat().st_size


if __name__ == "__main__":
    main()
