"""Every published page in a real browser that can reach no other host."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from site_book import SLUG, Site, site

ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-gpu"]
CONTRAST = Path(__file__).with_name("contrast.js").read_text()


def chromium() -> str | None:
    named = os.environ.get("READRUN_CHROMIUM")
    return named or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Reader:
    """A browser on the site; `heard` collects requests to other hosts, failed ones, console messages."""

    def __init__(self, browser: Any, root: Path, address: str) -> None:
        self.browser, self.address, self.heard = browser, address, []
        self.pages = sorted(
            p.relative_to(root).as_posix() for p in root.rglob("*.html") if "_static" not in p.parts
        )

    def open(self, page: str = "", theme: str = "", **context: Any) -> Any:
        made = self.browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
        if theme:
            made.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
        made.route("**/*", self._route)
        tab = made.new_page()
        tab.on("console", lambda m: m.type in ("error", "warning") and self.heard.append(f"{page}: {m.text}"))
        tab.on("pageerror", lambda e: self.heard.append(f"{page}: {e}"))
        tab.on("requestfailed", lambda r: self._failed(page, r, context.get("java_script_enabled", True)))
        tab.on("response", lambda r: r.status >= 400 and self.heard.append(f"{page}: {r.status} {r.url}"))
        tab.goto(self.address + page, wait_until="load")
        return tab

    def _failed(self, page: str, request: Any, scripts: bool) -> None:
        aborted = "ABORTED" in (request.failure or "")  # the test closed the page before it came
        if not aborted and (scripts or request.resource_type != "script"):
            self.heard.append(f"{page}: failed {request.url} {request.failure}")

    def _route(self, route: Any) -> None:
        if route.request.url.startswith((self.address, "data:", "blob:")):
            return route.continue_()
        self.heard.append(f"other host: {route.request.url}")
        return route.abort()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    if not chromium():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "no Chromium: the pages were not looked at"
        )
    made = site(tmp_path_factory)
    code, output = list(made.log.values())[-1]
    assert code == 0, output[-4000:]
    return made


@pytest.fixture(scope="module")
def reader(made: Site) -> Iterator[Reader]:
    from playwright.sync_api import sync_playwright

    handler = functools.partial(Quiet, directory=str(made.html))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield Reader(browser, made.html, f"http://127.0.0.1:{server.server_port}/")
        browser.close()
    server.shutdown()


@pytest.fixture(autouse=True)
def nothing_wrong(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test also fails on what the pages said or asked for while it ran."""
    reader = request.getfixturevalue("reader")
    reader.heard.clear()
    yield
    for context in reader.browser.contexts:
        context.close()
    assert not reader.heard, "\n".join(map(str, reader.heard))


TYPESET = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const all = (s) => document.querySelectorAll(s).length;
  return [all('.bd-article span.math, .bd-article div.math'), all('mjx-container svg'),
          [...document.querySelectorAll('[data-mjx-error], mjx-merror')].map(e => e.textContent)];
}"""
BROKEN = """async () => {
  const wrong = [];
  for (const image of document.querySelectorAll('img')) {
    image.loading = 'eager';
    try { await image.decode(); } catch { wrong.push(image.src + ' not loaded'); }
    if (!image.alt.trim()) wrong.push(image.src + ' without alt text');
  }
  for (const media of document.querySelectorAll('video, audio'))
    if (!media.ariaLabel) wrong.push(media.src + ' without a label');
  return wrong;
}"""
ELSEWHERE = """[...document.querySelectorAll('script[src], link[href], img, iframe, source')]
  .map(e => e.src || e.href).filter(u => u && !u.startsWith(location.origin) && !/^(data|blob):/.test(u))"""
TALL = """[...document.querySelectorAll('div.cell_input pre')].filter(p => p.offsetHeight > 900)
  .map(p => p.textContent.slice(0, 60))"""
WIDE = """[document.documentElement.scrollWidth, [...document.querySelectorAll('.bd-main *')]
  .filter(e => e.getBoundingClientRect().right > 391).slice(0, 5).map(e => e.outerHTML.slice(0, 120))]"""
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
AT_ONCE = "*, *::before, *::after { transition: none !important; animation: none !important }"
PHONE = {"width": 390, "height": 844}


def look_at(reader: Reader, page: str) -> dict[str, Any]:
    """What there is to see on one page; loading a chapter takes longer than all of the looking."""
    tab, seen = reader.open(page, "light"), {}
    seen["math"] = tab.evaluate(TYPESET)
    seen["broken"], seen["elsewhere"] = tab.evaluate(BROKEN), tab.evaluate(ELSEWHERE)
    seen["pictures"] = tab.locator(".bd-article img").count()
    if page.startswith("chapters/"):
        button = tab.locator("a.btn-download-source-button, a.btn-download-notebook-button").first
        seen["notebook"], seen["copy"] = button.get_attribute("href"), tab.locator("button.copybtn").count()
        seen["tall"] = tab.evaluate(TALL)
    tab.evaluate(OPEN_ALL)
    tab.add_style_tag(content=AT_ONCE)
    for theme in ("light", "dark"):
        tab.evaluate(
            f"document.documentElement.dataset.theme = document.documentElement.dataset.mode = '{theme}'"
        )
        seen[theme] = tab.evaluate(CONTRAST)
    tab.set_viewport_size(PHONE)
    seen["phone"] = tab.evaluate(WIDE)
    tab.context.close()
    return seen | {"heard": list(reader.heard)}


@pytest.fixture(scope="module")
def pages(reader: Reader) -> dict[str, dict[str, Any]]:
    """{page: what was seen there}: every page is opened once, for all tests."""
    found = {}
    for page in reader.pages:
        reader.heard.clear()
        found[page] = look_at(reader, page)
    return found


def test_pages_are_complete_math_is_typeset_and_pictures_are_there(pages: dict) -> None:
    assert {"index.html", "scoreboard.html", f"chapters/{SLUG}.html"} <= set(pages)
    for page, seen in pages.items():
        wanted, got, bad = seen["math"]
        assert got >= wanted and not bad, (page, wanted, got, bad)
        assert not seen["broken"] and not seen["elsewhere"], (page, seen["broken"], seen["elsewhere"])
    assert not [line for seen in pages.values() for line in seen["heard"]]
    assert sum(seen["math"][1] for seen in pages.values()) >= 10
    assert sum(seen["pictures"] for seen in pages.values()) >= 7


def test_a_page_opened_from_the_disk_has_its_math(made: Site, reader: Reader) -> None:
    tab = reader.browser.new_context().new_page()
    tab.goto((made.html / "notation.html").as_uri())
    tab.wait_for_selector("mjx-container svg", timeout=20_000)


def words(notebook: Path) -> Counter:
    cells = json.loads(notebook.read_text())["cells"]
    prose = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return Counter(
        w.lower()
        for w in re.findall(r"(?<![\w{`$\\/-])[A-Za-z]{7,}(?![\w`(}])", re.sub(r"\$[^$]*\$", "", prose))
    )


def test_search_finds_a_word_of_each_chapter(made: Site, reader: Reader) -> None:
    found = {n.stem: words(n) for n in (made.root / "build" / "book" / "chapters").glob("*.ipynb")}
    assert SLUG in found
    tab = reader.open("search.html")
    for slug, own in found.items():
        others = set().union(*(f for s, f in found.items() if s != slug))
        word = max((w for w in own if w not in others), key=lambda w: own[w])
        tab.goto(f"{reader.address}search.html?q={word}")
        tab.wait_for_selector(f'#search-results a[href*="chapters/{slug}.html"]', timeout=20_000)


def test_picker_is_worked_by_keyboard(reader: Reader) -> None:
    tab = reader.open(f"chapters/{SLUG}.html")
    picker = tab.locator(".rr-picker").first

    def shown() -> list[str]:
        return picker.locator(".rr-state:not([hidden])").evaluate_all("all => all.map(s => s.dataset.state)")

    assert shown() == ["0-0"]
    picker.locator("input").first.focus()
    tab.keyboard.press("ArrowRight")
    assert shown() == ["1-0"]
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert shown() == ["1-2"]
    assert "bowl" in picker.locator(".rr-live").text_content()
    assert (
        picker.locator(".rr-state:visible img").evaluate(
            "async i => { await i.decode(); return i.naturalWidth }"
        )
        > 300
    )


def test_without_scripts_the_picker_is_a_list(reader: Reader) -> None:
    tab = reader.open(f"chapters/{SLUG}.html", java_script_enabled=False)
    assert (
        tab.locator(".rr-picker .rr-state").count()
        == tab.locator(".rr-picker .rr-state:visible").count()
        == 6
    )
    assert tab.locator(".rr-controls:visible").count() == 0


def test_chapters_offer_their_notebook_and_fold_long_code(made: Site, pages: dict) -> None:
    for page, seen in pages.items():
        if page.startswith("chapters/"):
            link = seen["notebook"]
            assert link.endswith(".ipynb") and (made.html / "chapters" / link).resolve().is_file()
            assert seen["copy"] > 0
            assert not seen["tall"], (page, "fold these cells with the tag hide-input", seen["tall"])


def test_no_sideways_scroll_on_a_phone(pages: dict, reader: Reader) -> None:
    for page, seen in pages.items():
        width, wide = seen["phone"]
        assert width <= 390, (page, width, wide)
    for page in (
        "index.html",
        f"chapters/{SLUG}.html",
    ):  # loaded at this size, with a finger instead of a mouse
        tab = reader.open(page, viewport=PHONE, has_touch=True, is_mobile=True)
        assert tab.evaluate(WIDE)[0] <= 390


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable(pages: dict, reader: Reader, theme: str) -> None:
    """WCAG 2 AA: 4.5 to 1, large text 3 to 1."""
    faint = {page: seen[theme][0][:8] for page, seen in pages.items() if seen[theme][0]}
    assert not faint, json.dumps(faint, indent=1, ensure_ascii=False)
    assert sum(seen[theme][1] for seen in pages.values()) > 500
    tab = reader.open("index.html", theme)
    assert tab.evaluate("document.documentElement.dataset.theme") == theme, "a reader's choice is kept"
    tab.evaluate(OPEN_ALL)
    assert tab.evaluate(CONTRAST) == pages["index.html"][theme], (
        "switching on the page gives the same colours"
    )


def test_the_contrast_check_sees_faint_text(reader: Reader) -> None:
    tab = reader.open("index.html")
    tab.evaluate("document.querySelector('.bd-article p').style.color = '#999'")
    assert tab.evaluate(CONTRAST)[0]
