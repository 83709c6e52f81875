"""Interaction without a kernel: every state of a small grid is drawn once, the page picks one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from readrun import media, paths, tables

Grid = Mapping[str, Sequence[Any]]
STATES = 64  # more is neither small nor explorable


def picker(run: Any, name: str, draw: Callable[..., Any], grid: Grid, *, alt: Any, caption: str = "") -> Any:
    """Draw every state of `grid`, save the pictures in the run's media, show native controls that pick one.

    Args:
        draw: called with one value per key of `grid`; returns what `media.pixels` takes. Its error in any
            state fails the cell.
        alt: text, or a function of the state that gives it.
    """
    codes = list(itertools.product(*(range(len(choices)) for choices in grid.values())))
    if not grid or not 1 <= len(codes) <= STATES:
        raise ValueError(f"the grid has {len(codes) if grid else 0} states; 1 to {STATES} are accepted")
    states = {}
    for code in codes:
        state = {key: choices[i] for (key, choices), i in zip(grid.items(), code, strict=True)}
        words = alt(**state) if callable(alt) else alt
        text = ", ".join(f"{key} = {value}" for key, value in state.items())
        key = "-".join(map(str, code))
        states[key] = media.picture(run, f"{name}/{key}.webp", draw(**state), alt=words, caption=text).data
    script = paths.root() / "book/_static/picker.js"
    live_script = "" if media.headless() or not script.is_file() else script.read_text()
    return tables.html("picker", name=name, grid=grid, states=states, caption=caption, script=live_script)


def live(draw: Callable[..., Any], grid: Grid) -> None:
    """Show the same grid as `ipywidgets` controls; does nothing where nobody can move them."""
    if media.headless():
        return
    import ipywidgets
    from IPython.display import display

    controls = {key: ipywidgets.SelectionSlider(options=list(choices)) for key, choices in grid.items()}
    output = ipywidgets.interactive_output(lambda **state: display(media.pixels(draw(**state))), controls)
    display(ipywidgets.VBox([*controls.values(), output]))
