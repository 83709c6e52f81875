"""Results of a run and the committed record: written whole or not at all, checked whenever they are read.

A record is <slug>.gpu.json with <slug>.gpu.npz beside it; a run's results.json and results.npz are alike.
The JSON names the npz by checksum and is renamed into place before it: that rename is the moment of change.
Before it the old pair counts, after it the new one, even while the npz still has its temporary name.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's has what pydantic needs from Python 3.12 on

from readrun import claims, content, paths, stats, units

NPZ_BYTES = 500_000
Claims = dict[str, dict[str, Any]]


class RecordError(ValueError):
    """A record or a run's results that cannot be trusted: broken, incomplete, or not what its rules give."""


@with_config(ConfigDict(extra="forbid"))
class Record(TypedDict):
    schema: Literal[1]
    slug: str
    profile: Literal["smoke", "cpu", "gpu"]
    parameters: dict[str, Any]
    metrics: dict[str, dict[str, list[FiniteFloat]]]
    claims: Claims
    seconds: FiniteFloat
    render_seconds: FiniteFloat
    peak_ram_gib: FiniteFloat | None
    peak_gpu_gib: FiniteFloat | None
    device: str
    versions: dict[str, str]
    commit: str | None
    code_sha256: str
    claims_sha256: str
    arrays_sha256: str
    nonce: str
    recorded: str


SCHEMA = TypeAdapter(Record)


class Results:
    """Metrics, arrays and verdicts of one run; every key of `Record` is an attribute."""

    def __init__(self, record: Record, arrays: dict[str, np.ndarray]) -> None:
        self.record, self.arrays = record, arrays

    def __getattr__(self, name: str) -> Any:
        if name in Record.__annotations__:
            return self.record[name]  # type: ignore[literal-required]
        raise AttributeError(name)

    @cached_property
    def stale(self) -> bool:
        """Whether other code than today's made these numbers."""
        try:
            return content.content_key(self.slug, self.parameters) != self.code_sha256
        except (OSError, SyntaxError):
            return True


def save_results(run: Any, metrics: Mapping, arrays: Mapping | None = None) -> Results:
    """Save what a notebook measured as <run.folder>/results.json and .npz, with every claim's verdict.

    metrics: {metric: {arm: values}} or {metric: {arm: {seed or item: value}}}; arrays: what numpy can hold.
    Raises ValueError for a value that is no finite number (naming metric and arm) and for more than 500 KB.
    """
    values, kept = normalised(metrics, arrays or {})
    verdicts, rules = judge(run.slug, values, kept)
    meta = sorted((u.meta for u in run.units if u.done), key=lambda m: m["recorded"])
    last = meta[-1] if meta else units.provenance(run.device)
    ram, gpu = (max((m[f"peak_{k}_gib"] or 0 for m in meta), default=0) or None for k in ("ram", "gpu"))
    record: Record = {
        "schema": 1, "slug": run.slug, "profile": run.profile,
        "parameters": {k: v for k, v in run.parameters.items() if k not in ("only", "out", "device")},
        "metrics": values, "claims": verdicts, "seconds": round(sum(m["seconds"] for m in meta), 3),
        "render_seconds": round(run.render_seconds, 3), "peak_ram_gib": ram, "peak_gpu_gib": gpu,
        "device": " + ".join(sorted({m["device"] for m in meta or [last]})),
        "versions": {k: v for m in [*meta, last] for k, v in m["versions"].items()}, "commit": last["commit"],
        "code_sha256": run.code_sha256, "claims_sha256": rules, "arrays_sha256": "",
        "nonce": secrets.token_hex(16), "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    results = Results(record, kept)
    _save(results, run.folder / "results.json", run.folder / "results.npz")
    return results


def normalised(metrics: Mapping, arrays: Mapping) -> tuple[dict, dict[str, np.ndarray]]:
    """Metrics as lists of finite floats; named seeds or items become arrays "seeds/<metric>/<arm>"."""
    out: dict[str, dict[str, list[float]]] = {}
    kept = {k: np.asarray(v.detach().cpu() if hasattr(v, "detach") else v) for k, v in arrays.items()}
    for metric, arm, values in [(m, a, v) for m, arms in metrics.items() for a, v in arms.items()]:
        rows = dict(values.items() if isinstance(values, Mapping) else enumerate(values))
        for key, value in rows.items():
            try:
                rows[key] = float(value)
            except (TypeError, ValueError):
                rows[key] = np.nan
            if not np.isfinite(rows[key]):
                raise ValueError(
                    f"metric {metric!r}, arm {arm!r}: value {value!r} of {key!r} is no finite number"
                )
        out.setdefault(metric, {})[arm] = list(rows.values())
        if isinstance(values, Mapping):
            kept[f"seeds/{metric}/{arm}"] = np.asarray(list(rows))
    if strange := [k for k, v in kept.items() if v.dtype.hasobject]:
        raise ValueError(f"array {', '.join(strange)}: neither numbers nor text")
    return out, kept


def judge(slug: str, metrics: dict, arrays: dict) -> tuple[Claims, str]:
    """({claim: verdict}, claims_sha256) by today's rules; adds the metrics that the chapter derives."""
    paper = claims.load(slug)
    for metric, name in paper.derived.items():
        from readrun.chapter import chapter

        try:
            metrics |= normalised({metric: getattr(chapter(slug), name)(metrics, arrays)}, {})[0]
        except KeyError as missing:  # its inputs were not run
            warnings.warn(f"{slug}: derived metric {metric} lacks {missing}", stacklevel=2)
    return {i: dict(vars(v)) for i, v in stats.verdicts(paper, metrics, arrays).items()}, paper.claims_sha256


def _save(results: Results, file: Path, npz: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **results.arrays)  # type: ignore[arg-type]
    if buffer.tell() > NPZ_BYTES:
        large = sorted(results.arrays, key=lambda k: -results.arrays[k].nbytes)[:3]
        raise ValueError(
            f"{npz.name}: {buffer.tell():,} bytes, at most {NPZ_BYTES:,}; largest: {', '.join(large)}"
        )
    results.record["arrays_sha256"] = sha256(buffer.getvalue()).hexdigest()
    text = json.dumps(SCHEMA.validate_python(results.record), indent=1, allow_nan=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two at once: one pair, then the other, never a mixture
        paths.write_atomic(_waiting(npz), buffer.getvalue())
        paths.write_atomic(file, text)
        os.replace(_waiting(npz), npz)
    finally:
        os.close(folder)


def _waiting(npz: Path) -> Path:
    return npz.with_name(f".{npz.name}.new")


def _read(file: Path, npz: Path) -> Results:
    try:
        record = SCHEMA.validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, ValidationError) as error:
        raise RecordError(f"{file.name} is broken: {error}") from error
    for part in (npz, _waiting(npz)):  # the second after a kill between the two renames
        data = part.read_bytes() if part.is_file() else b""
        if sha256(data).hexdigest() == record["arrays_sha256"]:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                return Results(record, dict(stored))
    raise RecordError(f"{file.name} is broken: {npz.name} is missing or differs from its checksum")


def load(slug: str) -> Results | None:
    """The committed record of a chapter, None where there is none. Raises RecordError if it is broken."""
    file, npz = paths.results(slug), paths.results(slug, "npz")
    return _read(file, npz) if file.exists() else None


def from_folder(folder: Path) -> Results:
    """The results that a run left in `folder`. Raises RecordError where there are none or they are broken."""
    return _read(folder / "results.json", folder / "results.npz")


def write(slug: str, folder: Path, force: bool = False) -> Results:
    """Make the results in `folder` the chapter's record; the one it replaces stays in git's history.

    Raises RecordError, and leaves the old record, if the new one is not of the gpu profile, has fewer values
    of a metric and arm than the old one, or if the old one is broken; `force` is for when that is meant.
    """
    new, old = from_folder(folder), None if force else load(slug)
    if (new.slug, new.profile) != (slug, "gpu"):
        raise RecordError(
            f"results of {new.slug} in profile {new.profile}; a record of {slug} is made in gpu"
        )
    had, has = (
        Counter(
            {f"{m} of {a}": len(v) for m, arms in r.metrics.items() for a, v in arms.items()} if r else {}
        )
        for r in (old, new)
    )
    if less := had - has:
        lost = ", ".join(f"{what} ({has[what]} instead of {had[what]})" for what in less)
        raise RecordError(
            f"{slug}: the record has more: {lost}. Bring all units in, or force the replacement"
        )
    if (status := folder / "status.json").is_file():  # the whole rendering, not only up to the results
        new.record["render_seconds"] = json.loads(status.read_text(encoding="utf-8"))["seconds"]
    _save(new, paths.results(slug), paths.results(slug, "npz"))
    return new


def validate(slug: str) -> Results | None:
    """Check a committed record: schema, checksums, rules, every verdict computed again. None: no record.

    Raises RecordError with all that is wrong.
    """
    if (results := load(slug)) is None:
        return None
    metrics = dict(results.metrics)
    today, rules = judge(slug, metrics, results.arrays)
    wrong = [] if (results.slug, results.profile) == (slug, "gpu") else ["not this chapter's gpu record"]
    wrong += [] if rules == results.claims_sha256 else ["judged by other rules than today's: merge again"]
    differ = [m for m in metrics if not _same(metrics[m], results.metrics.get(m))]
    wrong += [f"metric {m} is not what the chapter derives" for m in differ]
    for i in sorted(today.keys() | results.claims.keys()):
        a, b = (found.get(i, {"verdict": "absent"}) for found in (results.claims, today))
        # another scipy may draw other resamples: 5 % of the interval's width
        slack = 0.05 * (b["high"] - b["low"]) if "bootstrap" in b.get("method", "") else 0.0
        if not all(
            _same(a.get(k), b.get(k), slack) for k in ("verdict", "effect", "low", "high", "n", "over")
        ):
            wrong.append(f"{i}: recorded {brief(a)}, computed again {brief(b)}")
    if wrong:
        raise RecordError(f"{slug}: " + "; ".join(wrong))
    return results


def _same(a: Any, b: Any, slack: float = 0.0) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= slack + 1e-9 * max(abs(a), abs(b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def brief(claim: Mapping) -> str:
    """A verdict with its effect and interval in one short text."""
    numbers = {k: "" if claim.get(k) is None else f"{claim[k]:.4g}" for k in ("effect", "low", "high")}
    interval = f"[{numbers['low']}, {numbers['high']}]" if numbers["low"] else ""
    return " ".join(filter(None, (claim["verdict"].replace("_", " "), numbers["effect"], interval)))


def compare(slug: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Rows that set a run (in `folder`, else the chapter's newest) beside the record: claim, both, agreement.

    `agree` says whether the two intervals overlap. Raises RecordError where there is no run to compare.
    """
    runs = sorted((paths.build() / slug).glob("*/*/results.json"), key=lambda f: f.stat().st_mtime)
    if folder is None and not runs:
        raise RecordError(f"{slug}: no run under {paths.build() / slug}: run the chapter first")
    here, book = from_folder(folder or runs[-1].parent), load(slug)
    rows = []
    for claim in claims.load(slug).claims:
        a, b = ((r.claims if r else {}).get(claim.id, {"verdict": "not_run"}) for r in (book, here))
        known = None not in (a.get("low"), b.get("low"))
        agree = known and max(a["low"], b["low"]) <= min(a["high"], b["high"])
        words = {True: "yes", False: "no"}[agree] if known else ""
        rows.append({"claim": claim.id, "book": brief(a), f"here ({here.profile})": brief(b), "agree": words})
    return rows


def scoreboard_rows() -> list[dict[str, Any]]:
    """One row per claim of every chapter; where a file is broken, `error` says so and nothing counts as run.

    `survives`: reproduced, and still so after Holm's correction for all claims of the book.
    """
    rows: list[dict[str, Any]] = []
    for slug in paths.chapters():
        results, row = (
            None,
            {"slug": slug, "title": slug, "part": "", "error": "", **vars(stats.Verdict("not_run"))},
        )
        try:
            paper = claims.load(slug)
            results = load(slug)
        except claims.ClaimsError as fault:
            rows.append(row | {"error": str(fault)})
            continue
        except RecordError as fault:
            row["error"] = str(fault)
        row |= {"title": paper.title, "part": paper.part}
        row |= {k: getattr(results, k, None) for k in ("seconds", "device", "recorded", "stale")}
        for c in paper.claims:
            about = {k: getattr(c, k) for k in ("id", "kind", "headline", "evidence", "statement")}
            about |= {"badge": c.caution, "form": c.rule.form, "paper": c.paper.value, "where": c.paper.where}
            about["amended"] = [f"{a.date}: {a.what} ({a.why})" for a in paper.amendments if a.claim == c.id]
            rows.append(row | about | (results.claims.get(c.id, {}) if results else {}))
    for row, kept in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["survives"] = kept and row["verdict"] == "reproduced"
    return rows


def scoreboard_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Number of verdicts of each kind, and of those that chance alone would give; `text` says it."""
    count = Counter(row["verdict"] for row in rows)
    tested, kept = sum(row["p"] is not None for row in rows), sum(row["survives"] for row in rows)
    chance = tested * (1 - stats.LEVEL) / 2
    text = (
        f"{count['reproduced']} of {len(rows)} claims are reproduced. An interval decides {tested} of them."
        f" If no effect were real, about {chance:.1f} would still look reproduced or weaker by chance and"
        f" as many contradicted. After Holm's correction for all {tested}, {kept} remain reproduced."
    )
    return {
        "verdicts": count,
        "tested": tested,
        "by_chance": chance,
        "survive": kept,
        "text": text,
    }
