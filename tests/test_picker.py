"""The state picker: every state is drawn, nothing is hidden from a reader without scripts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from readrun import media, picker

GRID = {"arm": ["ours", "base & co"], "size": [1, 2, 4, 8, 16, 32]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setenv("READRUN_HEADLESS", "1")
    return SimpleNamespace(slug="some", media=tmp_path)


def grey(arm: str, size: int) -> np.ndarray:
    return np.full((8, 8, 3), size / 32 if arm == "ours" else 0.0)


def test_every_state_is_drawn_once_and_saved(run: SimpleNamespace) -> None:
    drawn = []
    html = picker.picker(
        run, "g", lambda **s: drawn.append(s) or grey(**s), GRID, alt=lambda arm, size: f"{arm}!"
    ).data
    assert drawn == [{"arm": a, "size": s} for a in GRID["arm"] for s in GRID["size"]]
    assert len(list((run.media / "g").glob("*.webp"))) == 12
    states = re.findall(
        r'data-state="([\d-]+)".*?src="readrun-media:some/g/([\d-]+)\.webp" alt="([^"]+)"', html
    )
    assert len(states) == 12 and all(state == file for state, file, _ in states)
    assert states[7] == ("1-1", "1-1", "base &amp; co!")
    assert "<figcaption>arm = base &amp; co, size = 2</figcaption>" in html


def test_controls_are_native_and_hidden_until_the_script_works(run: SimpleNamespace) -> None:
    html = picker.picker(run, "g", grey, GRID, alt="Grey", caption="Cap").data
    assert html.count('type="radio"') == 2 and html.count("checked") == 1
    assert html.count('type="range"') == 1 and 'max="5"' in html and html.count("<option") == 6
    assert re.search(r'class="rr-controls" hidden', html) and 'class="rr-state" hidden' not in html
    assert html.count("<legend>") == 2 and "<script" not in html
    assert html.count('type="radio"') == picker.picker(run, "h", grey, GRID, alt="Grey").data.count(
        'name="h-arm"'
    )


def test_a_broken_state_fails_the_cell(run: SimpleNamespace) -> None:
    def draw(size: int) -> np.ndarray:
        return np.ones((2, 2, 3)) / {1: 1.0}[size]

    with pytest.raises(KeyError):
        picker.picker(run, "g", draw, {"size": [1, 2]}, alt="x")


@pytest.mark.parametrize("grid, count", [({}, 0), ({"a": []}, 0), ({"a": range(13), "b": range(5)}, 65)])
def test_grids_are_small_and_not_empty(run: SimpleNamespace, grid: dict, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} states"):
        picker.picker(run, "g", lambda **s: np.zeros((2, 2, 3)), grid, alt="x")


def test_alt_text_is_required(run: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="alt"):
        picker.picker(run, "g", grey, GRID, alt=lambda **s: "")


def test_live_notebook_gets_pictures_script_and_widgets(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import IPython.display

    shown: list = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    picker.live(grey, GRID)
    assert not shown, "nobody is there to move the controls"
    monkeypatch.setattr(media, "headless", lambda: False)
    html = picker.picker(run, "g", grey, {"arm": ["ours"], "size": [1]}, alt="Grey").data
    assert "data:image/webp;base64," in html and "<script>" in html and "rr-picker" in html
    picker.live(grey, GRID)
    assert [type(w).__name__ for w in shown[-1].children] == ["SelectionSlider", "SelectionSlider", "Output"]
