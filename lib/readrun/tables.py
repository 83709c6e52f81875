"""Tables of the book: small HTML that reads without a style sheet, dressed by `book/_static/readrun.css`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from readrun import paths

Row = Mapping[str, Any]
OVERVIEW = ("reproduced", "weaker", "contradicted", "inconclusive", "void", "not run", "reported")


def html(template: str, **context: Any) -> Any:
    """Fill `template/<template>.html`; values are escaped; `number`, `measured` can be called."""
    from IPython.display import HTML
    from jinja2 import Environment, FileSystemLoader

    filler = Environment(loader=FileSystemLoader(paths.library() / "template"), autoescape=True)
    context |= {"number": number, "measured": measured}
    return HTML(filler.get_template(f"{template}.html").render(context))


def number(value: Any) -> str:
    """Write a number with four significant digits, other things as they are, None as a dash."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    whole = isinstance(value, int) or 1e4 <= abs(value) < 1e15
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")


def measured(found: Row, form: str = "") -> str:
    """Write an effect with its interval: "−42.1 [−50.3, −33.9] over 5 seeds"; a ratio gets a "×"."""
    if found.get("effect") is None:
        return "–"
    low, high, over = found.get("low"), found.get("high"), str(found.get("over") or "exact")
    interval = "" if None in (low, high) or low == high else f" [{number(low)}, {number(high)}]"
    tail = "" if over == "exact" else f" over {found.get('n')} {over.removeprefix('cluster:')}s"
    return number(found["effect"]) + "×" * (form == "ratio") + interval + tail


def verdicts(results: Any) -> Any:
    """Table of the chapter's claims with the verdicts of `results`; what has none is `not_run`."""
    from readrun import claims, records

    return _claims(records.claim_rows(claims.load(results.slug), results))


def _claims(rows: Sequence[Row]) -> Any:
    return html("verdicts", rows=rows)


def provenance(results: Any) -> Any:
    """Where, when and with what `results` were measured."""
    peak = {"memory": results.peak_ram_gib, "GPU memory": results.peak_gpu_gib}
    facts = {"profile": results.profile, "device": results.device, "recorded": results.recorded,
             "commit": (results.commit or "–")[:12], "computing": f"{number(round(results.seconds or 0))} s",
             **{key: f"{number(value)} GiB" for key, value in peak.items() if value},
             "versions": ", ".join(f"{name} {v}" for name, v in (results.versions or {}).items()) or "–",
             }  # fmt: skip
    return html("provenance", facts=facts, stale=bool(results.stale))


def grid(rows: Sequence[Row], caption: str = "") -> Any:
    """Any small table: one mapping per row, the first column names the row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return html("grid", keys=keys, caption=caption, rows=[{k: row.get(k) for k in keys} for row in rows])


bench = grid  # rows of readrun.bench: what, milliseconds, achieved, limit, peer, ratio


def compare_runs(book: Any, here: Any) -> Any:
    """The recorded verdicts (`book` may be None) beside those of another run; one run is shown once."""
    from readrun import records

    return grid(records.compare(book, here))


def chapters(rows: Sequence[Row]) -> Any:
    """The list on the front page: every planned chapter, linked where it is there, with its verdicts."""
    import yaml

    parts = yaml.safe_load((paths.data() / "chapters.yml").read_text(encoding="utf-8"))["parts"]
    there, listed = paths.chapters(), {one["slug"] for part in parts for one in part["chapters"]}
    more = [{"slug": slug, "short": slug, "idea": ""} for slug in there if slug not in listed]
    parts += [{"title": "More", "chapters": more}] if more else []
    for one in (one for part in parts for one in part["chapters"]):
        found = Counter(r["verdict"] for r in rows if r["slug"] == one["slug"] and r["verdict"] != "not_run")
        one["verdicts"] = ", ".join(f"{n} {word}" for word, n in found.most_common())
        one["there"] = one["slug"] in there
    return html("chapters", parts=parts, there=len(there))


def rubric(graded: Any, caption: str = "") -> Any:
    """A graded rubric as a tree that opens and closes, each node with its weight and score."""
    return html("rubric", root=graded, caption=caption)


def scores(graded: Sequence[Row]) -> Any:
    """One row per chapter: its rubric score and what its leaves of each category earned, in percent."""
    from readrun.rubric import CATEGORIES

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    def told(row: Row) -> dict[str, Any]:
        note = " unreadable" if row["error"] else " (stale)" if row["stale"] else ""
        invalid = f", {row['invalid']} leaves invalid" if row["invalid"] else ""
        failed = row["failed"] if row["recorded"] else "not run"
        shares = {c: percent(row[c]) for c in CATEGORIES}
        return {"chapter": row["slug"], "rubric score": percent(row["score"]) + note + invalid, **shares,
                "claims failed": failed}  # fmt: skip

    return grid([told(row) for row in graded])


def scoreboard(rows: Sequence[Row]) -> Any:
    """Every claim of the book by chapter, from `records.scoreboard_rows`, and every rubric, graded."""
    from readrun import grading, records

    pages, overview = [], []
    book = {row["slug"]: row for row in grading.grade_book(list(dict.fromkeys(r["slug"] for r in rows)))}
    for slug, group in groupby(rows, key=lambda row: row["slug"]):
        own = list(group)
        minutes = number(round((own[0].get("seconds") or 0) / 60, 1))
        kept = [row for row in own if "id" in row]
        count = Counter(row["verdict"].replace("_", " ") for row in own)
        overview.append({"chapter": slug, **{w: count[w] for w in OVERVIEW}, "minutes": minutes})
        tree = rubric(book[slug]["graded"]).data if book[slug]["graded"] else ""
        pages.append({**own[0], "slug": slug, "minutes": minutes, "table": _claims(kept), "rubric": tree})
    return html(
        "scoreboard",
        chapters=pages,
        overview=grid(overview),
        scores=scores(list(book.values())),
        summary=records.scoreboard_summary([dict(r) for r in rows]),
    )


def statuses(found: Sequence[Row]) -> Any:
    """What each execution of this machine cost."""
    return grid([{"chapter": s["slug"], "state": s["state"], "seconds": round(s.get("seconds") or 0, 1),
                  "memory (GiB)": round(s.get("peak_ram_gib") or 0, 2)} for s in found] or
                [{"chapter": "none: these pages show the committed outputs"}])  # fmt: skip


def sandbox() -> Any:
    """What became of each attack on the sandbox, and what a job costs: the committed measurement."""
    import json

    found = json.loads((paths.data() / "results/sandbox.json").read_text(encoding="utf-8"))
    told = f"Measured on {found['recorded']}, Linux {found['kernel']}, {len(found['attacks'])} attacks."
    rows = [
        {key.replace("namespaces", "own namespaces"): row[key] for key in row} for row in found["attacks"]
    ]
    return grid(rows, told).data + grid(found["timings"], "Cost of a job that does nothing.").data
