"""Tables of the book: small HTML that reads without a style sheet, styled by `book/_static/readrun.css`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def html(template: str, **context: Any) -> Any:
    """Fill `template/<template>.html`; values are escaped."""
    from IPython.display import HTML
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent / "template")
    return HTML(Environment(loader=folder, autoescape=True).get_template(f"{template}.html").render(context))


def number(value: Any) -> str:
    """Write a number with at most four significant digits; other values as they are, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    whole = isinstance(value, int) or 1e4 <= abs(value) < 1e15 and value == int(value)
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def measured(claim: Mapping[str, Any]) -> str:
    """Write a claim's effect with its interval: "-42.1 [-50.3, -33.9], 5 seeds"."""
    if claim.get("effect") is None:
        return "–"
    low, high = claim.get("low"), claim.get("high")
    interval = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
    over = str(claim.get("over") or "exact").removeprefix("cluster:")
    return f"{number(claim['effect'])}{interval}" + ("" if over == "exact" else f", {claim.get('n')} {over}s")


def verdicts(results: Any) -> Any:
    """Table of the chapter's claims with the verdicts of `results`; what has none is `not_run`."""
    from readrun import claims

    rows = []
    for claim in claims.load(results.slug).claims:
        found = results.claims.get(claim.id) or {"verdict": "not_run"}
        found = found if isinstance(found, Mapping) else vars(found)
        paper = f"{claim.paper.value} ({claim.paper.where})" if claim.paper else "–"
        rows.append({**{key: getattr(claim, key) for key in ("id", "headline", "evidence", "statement")},
                     "verdict": found["verdict"], "measured": measured(found), "paper": paper})  # fmt: skip
    return html("verdicts", rows=rows)


def provenance(results: Any) -> Any:
    """Where, when and with what `results` were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in (results.versions or {}).items())
    facts = {"profile": results.profile, "device": results.device, "recorded": results.recorded,
             "commit": (results.commit or "–")[:12], "compute": f"{number(round(results.seconds or 0))} s",
             "versions": versions or "–"}  # fmt: skip
    return html("provenance", facts=facts, stale=bool(results.stale))


def grid(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Any:
    """Any small table: one mapping per row, the first column names the row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = [{key: number(row.get(key)) for key in keys} for row in rows]
    return html("grid", keys=keys, rows=text, caption=caption)


bench = grid  # rows of readrun.bench: what, milliseconds, achieved, limit, peer, ratio


def compare_runs(book: Any, here: Any) -> Any:
    """The recorded verdicts (`book` may be None) beside those of another run."""
    runs = {name: run.claims for name, run in (("book", book), (f"here ({here.profile})", here)) if run}
    rows = []
    for claim in dict.fromkeys(key for found in runs.values() for key in found):
        row = {"claim": claim}
        for name, found in runs.items():
            one = found.get(claim, {"verdict": "not_run"})
            row |= {name: one["verdict"].replace("_", " "), f"{name}: measured": measured(one)}
        rows.append(row)
    return grid(rows)
