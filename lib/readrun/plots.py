"""One look for every figure: a colour-blind-safe palette, bands with intervals, pictures with alt text."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from readrun import media

# Okabe & Ito (2008) without yellow, which vanishes on white. Order: ours, the paper's baseline, ablations.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), "-"]
LIMIT = 60_000  # bytes of one picture inside a notebook
SIZES = ((200, 256), (200, 64), (140, 48), (100, 24), (70, 12), (50, 12))  # (dpi, colours), sharp first
_shown: dict[bytes, tuple[Any, str]] = {}  # what this page has: picture, its figure and caption


def style() -> None:
    """Set matplotlib's defaults for the book; call once, in the set-up cell."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update({
        "figure.figsize": (7.2, 3.8), "figure.dpi": 110, "figure.facecolor": "white",
        "figure.constrained_layout.use": True, "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.titlelocation": "left",
        "axes.titlesize": "medium", "axes.axisbelow": True, "grid.color": "#e6e6e6", "font.size": 11,
        "font.family": "DejaVu Sans", "legend.frameon": False, "lines.linewidth": 2,
    })  # fmt: skip


def arms(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give each arm a colour and a line style, by position: ours, the baseline, then the others."""
    return {name: {"color": PALETTE[i % 8], "linestyle": LINES[i % 8]} for i, name in enumerate(names)}


def label(ax: Any, x: str, y: str, title: str = "") -> Any:
    """Name both axes, units included ("response length (tokens)"); an empty name is a `ValueError`."""
    if not x or not y:
        raise ValueError("both axes need a label")
    ax.set(xlabel=x, ylabel=y, title=title)
    return ax


def legend(ax: Any, **how: Any) -> None:
    """A legend, where anything has a name: an empty one is a warning, and a run may lack all of its arms."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**{"fontsize": 8} | how)


def t_half(values: Any) -> Any:
    """Half of the 95 % t interval of the mean over the first axis (seeds); 0 for one seed."""
    from scipy.stats import t

    values, n = np.asarray(values, dtype=float), len(values)
    return t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n) if n > 1 else 0 * values.sum(0)


def band(ax: Any, x: Any, ys: Any, label: str, color: str | None = None, linestyle: Any = "-") -> Any:
    """Draw the mean of ys (seeds, points) over x (points,) with its 95 % t band; one seed: a line."""
    values = np.atleast_2d(np.asarray(ys, dtype=float))
    if values.shape[-1] != len(x):
        raise ValueError(f"ys has {values.shape[-1]} points, x has {len(x)}")
    mean, half = values.mean(0), t_half(values)
    (line,) = ax.plot(x, mean, label=label, color=color, linestyle=linestyle)
    if len(values) > 1:
        ax.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def show(fig: Any, alt: str = "", caption: str = "") -> None:
    """Display and close a figure; `alt` (required) is for who cannot see it, `caption` stands below.

    The words travel in the output's metadata; `media.stage` turns them into `<figure><img alt><figcaption>`.
    A page has each picture once: where the run shown is the record, its second picture is a line of text.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("show(fig, alt=...): alt text is required")
    small = media.draft()
    for dpi, colors in SIZES[-1:] if small else SIZES:
        image, png = media.pixels(fig, dpi), io.BytesIO()
        image.quantize(colors, dither=0).save(png, "PNG", optimize=not small)
        if png.tell() <= LIMIT:
            break
    if media.for_a_page() and not small:
        if (first := _shown.setdefault(png.getvalue(), (fig, caption)))[0] is not fig:
            words = f"{caption} The same picture as above" + (f" (“{first[1]}”)." if first[1] else ".")
            plain = {"text/html": f'<p class="rr-same">{escape(words.strip())}</p>', "text/plain": words}
            return display(plain, raw=True, metadata={})
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": f"[figure] {alt}"}
    meta = {"alt": alt, "caption": caption, "width": round(fig.get_figwidth() * 100)}
    display(data, raw=True, metadata={"image/png": meta})
