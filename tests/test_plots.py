"""Figures, tables and media: what reaches the page, and what is refused."""

from __future__ import annotations

import base64
import io
import itertools
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image
from readrun import media, plots, tables


@pytest.fixture(autouse=True)
def as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READRUN_PROFILE", "cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setenv("READRUN_HEADLESS", "1")
    return SimpleNamespace(slug="some", media=tmp_path)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What `display` was given: (data, metadata)."""
    found: list[tuple[dict, dict]] = []
    import IPython.display

    monkeypatch.setattr(
        IPython.display, "display", lambda data, raw, metadata: found.append((data, metadata))
    )
    return found


# Machado, Oliveira & Fernandes (2009), severity 1: linear RGB as protanopes and deuteranopes see it
SEEN = {
    "all": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(color: str, seen: Any) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour through a matrix on linear RGB."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(seen) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (np.asarray(to_xyz) @ linear) / [0.9505, 1.0, 1.089]
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("seen", SEEN)
def test_colours_stay_apart_for_the_colour_blind(seen: str) -> None:
    for a, b in itertools.combinations(plots.PALETTE, 2):
        assert np.linalg.norm(lab(a, SEEN[seen]) - lab(b, SEEN[seen])) > 10, (a, b)


def test_arms_differ_in_colour_and_line() -> None:
    named = plots.arms(["ours", "baseline", "a", "b", "c", "d"])
    assert named["ours"]["color"] == plots.PALETTE[0] and named["baseline"]["color"] == plots.PALETTE[1]
    assert len({str(style) for style in named.values()}) == 6
    assert len({str(style["linestyle"]) for style in named.values()}) == 6


@settings(max_examples=20, deadline=None)
@given(some.integers(2, 8), some.integers(1, 5))
def test_band_is_the_t_interval(seeds: int, points: int) -> None:
    values = np.random.default_rng(seeds * 10 + points).normal(size=(seeds, points))
    figure, ax = plt.subplots()
    line = plots.band(ax, np.arange(points), values, "x")
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    low, high = stats.t.interval(0.95, seeds - 1, loc=values.mean(0), scale=stats.sem(values, axis=0))
    drawn = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert drawn.min() == pytest.approx(low.min()) and drawn.max() == pytest.approx(high.max())
    plt.close(figure)


def test_one_seed_has_no_band_and_shapes_must_fit() -> None:
    figure, ax = plt.subplots()
    plots.band(ax, [0, 1], [3.0, 4.0], "x")
    assert not ax.collections
    with pytest.raises(ValueError, match="3 points, x has 2"):
        plots.band(ax, [0, 1], np.ones((2, 3)), "x")
    with pytest.raises(ValueError, match="label"):
        plots.label(ax, "step (1)", "")
    plt.close(figure)


@pytest.mark.parametrize("styled", [False, True])
def test_show_carries_alt_text_and_stays_small(shown: list, styled: bool) -> None:
    with plt.rc_context(matplotlib.rcParamsDefault):  # other tests of this process may have set a style
        if styled:
            plots.style()
        _show_noise(shown)


def _show_noise(shown: list) -> None:
    figure, ax = plt.subplots(figsize=(8, 5))
    ax.imshow(np.random.default_rng(0).random((400, 640, 3)))  # noise: the worst case for PNG
    plots.show(figure, alt="Noise", caption="A <b> caption")
    data, meta = shown[0]
    png = base64.b64decode(data["image/png"])
    assert len(png) <= plots.LIMIT and Image.open(io.BytesIO(png)).width >= 400
    assert meta["image/png"] == {"alt": "Noise", "caption": "A <b> caption", "width": 800}
    assert not plt.fignum_exists(figure.number)
    with pytest.raises(ValueError, match="alt"):
        plots.show(plt.figure(), alt=" ")


def test_same_figure_gives_the_same_bytes(shown: list) -> None:
    for _ in range(2):
        figure, ax = plt.subplots()
        ax.plot([1, 2])
        plots.show(figure, alt="A line")
    assert shown[0] == shown[1]


def test_smoke_draws_all_but_small(
    shown: list, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pictures are for nobody: the same figure, an eighth of the pixels; other profiles are as ever."""

    def figure() -> Any:
        made, ax = plt.subplots(figsize=(4, 3), dpi=100)
        ax.plot([1, 2])
        return made

    sizes = {}
    for profile in ("smoke", "cpu", "gpu"):
        monkeypatch.setenv("READRUN_PROFILE", profile)
        plots.show(figure(), alt="A line")
        media.picture(run, f"{profile}.webp", figure(), alt="A line")
        png = Image.open(io.BytesIO(base64.b64decode(shown[-1][0]["image/png"])))
        sizes[profile] = png.size, Image.open(run.media / f"{profile}.webp").size
    assert sizes == {"smoke": ((200, 150),) * 2, "cpu": ((800, 600), (520, 390)), "gpu": sizes["cpu"]}
    assert shown[0][1] == shown[1][1], "the words and the width on the page are the same"


def test_a_page_has_each_picture_once(shown: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that is the record: its figure comes once, then a line says so. Live, a cell runs again."""

    def show(top: float, caption: str) -> dict:
        figure, ax = plt.subplots()
        ax.plot([1, top])
        plots.show(figure, alt="A line", caption=caption)
        return shown[-1][0]

    monkeypatch.setattr(plots, "_shown", {})
    assert all("image/png" in show(2, "live") for _ in range(2))
    monkeypatch.setattr(media, "for_a_page", lambda: True)
    assert "image/png" in show(2, "This run <gpu>.") and "image/png" in show(3, "Another.")
    again = show(2, "Recorded.")
    assert "image/png" not in again
    assert "Recorded. The same picture as above (“This run &lt;gpu&gt;.”)." in again["text/html"]
    monkeypatch.setenv("READRUN_PROFILE", "smoke")
    assert all("image/png" in show(2, "small") for _ in range(2))


def test_stage_turns_pictures_into_files_and_fills_in_addresses(shown: list, tmp_path: Path) -> None:
    figure, ax = plt.subplots()
    plots.show(figure, alt='Says "<x>"', caption="Caption")
    data, meta = shown[0]
    plain = {"data": {"image/png": "aGk=", "text/plain": "x"}, "metadata": {}}
    link = {"data": {"text/html": ['<img src="readrun-media:some/', 'a.webp" alt="a">']}, "metadata": {}}
    page = {"cells": [{"outputs": [{"data": data, "metadata": meta}, plain, link]}, {"source": "text"}]}
    media.stage(page, tmp_path / "figures", "../_static/figures", "../_static/media/")
    html = data["text/html"]
    (file,) = (tmp_path / "figures").iterdir()
    assert "image/png" not in data and f'src="../_static/figures/{file.name}"' in html
    assert 'alt="Says &quot;&lt;x&gt;&quot;"' in html and "<figcaption>Caption</figcaption>" in html
    assert plain["data"]["image/png"] == "aGk="
    assert link["data"]["text/html"] == '<img src="../_static/media/some/a.webp" alt="a">'


def test_media_are_files_with_alt_text(run: SimpleNamespace) -> None:
    noise = np.random.default_rng(0).random((24, 32, 3))
    html = media.picture(run, "a/p.webp", noise, alt="Noise & more", caption="C").data
    assert 'src="readrun-media:some/a/p.webp"' in html and 'alt="Noise &amp; more"' in html
    assert Image.open(run.media / "a/p.webp").size == (32, 24)
    sound = np.sin(np.arange(1600) / 5)
    assert "<audio" in media.audio(run, "s.wav", sound, 8000, alt="A tone").data
    with wave.open(str(run.media / "s.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (1, 8000, 1600)
        heard = np.frombuffer(file.readframes(1600), "<i2") / 32767
    np.testing.assert_allclose(heard, sound, atol=1e-4)
    for make, name in ((media.picture, "a/p.webp"), (media.audio, "s.wav")):
        with pytest.raises(ValueError, match="alt"):
            make(run, name, alt="")
    with pytest.raises(FileNotFoundError):
        media.picture(run, "missing.webp", alt="x")


def test_clips_loop_and_have_all_frames(run: SimpleNamespace) -> None:
    cv2 = pytest.importorskip("cv2")
    frames = np.zeros((6, 32, 48, 3))
    frames[..., 0] = np.linspace(0, 1, 6)[:, None, None]  # it gets redder
    html = media.clip(run, "c.webm", frames, fps=4, alt="Red comes up").data
    assert all(
        word in html for word in ("autoplay", "loop", "muted", "playsinline", 'aria-label="Red comes up"')
    )
    reader, red = cv2.VideoCapture(str(run.media / "c.webm")), []
    while (frame := reader.read())[0]:
        red.append(frame[1][..., 2].mean())
    assert len(red) == 6 and red == sorted(red) and red[-1] > 200


def test_a_live_notebook_gets_the_data_itself(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "headless", lambda: False)
    html = media.picture(run, "p.webp", np.zeros((4, 4, 3)), alt="Black").data
    assert "data:image/webp;base64," in html and "readrun-media" not in html


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (True, "True"),
        ("a", "a"),
        (1234567, "1,234,567"),
        (0.00012345, "0.0001234"),
        (-2.5, "−2.5"),
    ],
)
def test_numbers(value: Any, text: str) -> None:
    assert tables.number(value) == text


def test_measured_says_what_the_interval_is_over() -> None:
    found = {"effect": 1.5, "low": 1.25, "high": 1.75, "n": 5, "over": "seed"}
    assert tables.measured(found) == "1.5 [1.25, 1.75] over 5 seeds"
    assert tables.measured(found | {"over": "cluster:topic"}, "ratio") == "1.5× [1.25, 1.75] over 5 topics"
    assert tables.measured({"effect": 3, "low": None, "high": None, "over": "exact"}) == "3"
    assert tables.measured({"verdict": "not_run"}) == "–"


def test_tables_escape_and_keep_every_column() -> None:
    html = tables.grid([{"a": "<i>", "b": 1}, {"a": "x", "c": 2.0}], caption="C & D").data
    assert "&lt;i&gt;" in html and "<i>" not in html and "C &amp; D" in html
    assert html.count('<th scope="col">') == 3 and html.count("<td>") == 4


def test_compare_runs_shows_claims_that_only_one_run_has() -> None:
    claim = {"verdict": "not_run", "effect": None}
    here = SimpleNamespace(
        profile="cpu", claims={"c1-x": claim, "c2-y": claim | {"verdict": "weaker", "effect": 1.0}}
    )
    book = SimpleNamespace(profile="gpu", claims={"c1-x": claim | {"verdict": "reproduced", "effect": 2.0}})
    html = tables.compare_runs(book, here).data
    assert "reproduced" in html and "weaker" in html and "not run" in html and html.count("<tr>") == 3
    assert "book" not in tables.compare_runs(None, here).data
    assert "here" not in tables.compare_runs(book, book).data


def test_scoreboard_and_front_page_from_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.paths, "chapters", lambda: ["dr_grpo", "unlisted"])
    about: dict = {
        "slug": "dr_grpo", "title": "A <title>", "headline": True, "evidence": "toy", "badge": "",
        "error": "", "form": "ratio", "statement": "It holds.", "paper": 2, "where": "Fig. 1", "amended": [],
        "seconds": 90.0, "device": "GPU", "recorded": "2026-01-02T03:04", "stale": True, "p": 0.01,
        "survives": True,
    }  # fmt: skip
    found = {"verdict": "reproduced", "effect": 2.0, "low": 1.9, "high": 2.1, "n": 5, "over": "seed"}
    missing = {"verdict": "not_run", "effect": None, "survives": False, "p": None}
    rows = [{**about, "id": "c1-a", **found}, {**about, "id": "c2-b", **missing}]
    board = tables.scoreboard(rows).data
    for text in (
        "2× [1.9, 2.1] over 5 seeds",
        "2 (Fig. 1)",
        "A &lt;title&gt;",
        "1.5 minutes",
        "stale",
        "Holm",
        "not run",
    ):
        assert text in board, text
    front = tables.chapters(rows).data
    assert (
        'href="chapters/dr_grpo.html"' in front and "1 reproduced" in front and front.count("planned") == 21
    )
    assert 'href="chapters/unlisted.html"' in front


@pytest.mark.parametrize(
    "remote, address",
    [
        ("https://github.com/org/repo.git", "https://github.com/org/repo"),
        ("git@gitlab.com:org/sub/repo.git", "https://gitlab.com/org/sub/repo"),
        ("ssh://git@codeberg.org/org/repo", "https://codeberg.org/org/repo"),
        ("https://user:secret@github.com/org/repo", "https://github.com/org/repo"),
        ("https://git.example.org/org/repo.git", ""),  # nobody else may reach it
        ("/srv/git/repo.git", ""),
        ("", ""),
    ],
)
def test_buttons_lead_to_public_forges_only(remote: str, address: str) -> None:
    import importlib.util

    file = Path(__file__).parents[1] / "book" / "_ext" / "readrun_book.py"
    spec = importlib.util.spec_from_file_location("readrun_book", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.repository(remote) == address


@pytest.mark.filterwarnings("error")
def test_a_legend_only_where_something_has_a_name() -> None:
    figure, axes = plt.subplots(1, 2)
    axes[1].plot([1, 2], label="named")
    for ax in axes:
        plots.legend(ax, ncols=2)
    assert axes[0].get_legend() is None and axes[1].get_legend().get_texts()[0].get_text() == "named"
    plt.close(figure)


def test_half_an_interval_is_the_librarys() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    low, high = stats.t.interval(0.95, 4, values.mean(0), stats.sem(values))
    assert np.allclose(plots.t_half(values), (high - low) / 2)
    assert np.array_equal(plots.t_half(values[:1]), np.zeros(3)) and plots.t_half([0.5]) == 0
