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

from readrun import claims, content, paths, stats, tables, units

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
                where = f"metric {metric!r}, arm {arm!r}"
                raise ValueError(f"{where}: value {value!r} of {key!r} is no finite number")
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
        size = f"{buffer.tell():,} bytes, at most {NPZ_BYTES:,}"
        raise ValueError(f"{npz.name}: {size}; largest: {', '.join(large)}")
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


def write(slug: str, folder: Path) -> Results:
    """Make the results in `folder` the chapter's record; the one it replaces stays in git's history.

    Raises RecordError, and leaves the old record, if the new one is not of the gpu profile, has fewer values
    of a metric and arm than the old one, or if the old one is broken. Where that is meant, remove it first.
    """
    new, old = from_folder(folder), load(slug)
    if (new.slug, new.profile) != (slug, "gpu"):
        made = f"results of {new.slug} in profile {new.profile}"
        raise RecordError(f"{made}; a record of {slug} is made in gpu")
    had, has = Counter[str](), Counter[str]()
    for count, results in ((had, old), (has, new)):
        for metric, arms in results.metrics.items() if results else ():
            count.update({f"{metric} of {arm}": len(values) for arm, values in arms.items()})
    if lost := ", ".join(f"{what} ({has[what]} instead of {had[what]})" for what in had - has):
        raise RecordError(f"{slug}: the record has more: {lost}. Bring all units in, or remove the record")
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
        keys = ("verdict", "effect", "low", "high", "n", "over")
        if not all(_same(a.get(k), b.get(k), slack) for k in keys):
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
    word = claim["verdict"].replace("_", " ")
    return word if claim.get("effect") is None else f"{word} {tables.measured(claim)}"


def newest(slug: str) -> Path:
    """Folder of a chapter's last run on this machine that has results. Raises RecordError: there is none."""
    runs = sorted((paths.build() / slug).glob("*/*/results.json"), key=lambda f: f.stat().st_mtime)
    if not runs:
        raise RecordError(f"{slug}: no run under {paths.build() / slug}: run the chapter first")
    return runs[-1].parent


def compare(book: Results | None, here: Results) -> list[dict[str, str]]:
    """Rows that set a run beside the record (None: not there), one per claim; one and the same run once.

    `intervals overlap`: yes or no, where both have one.
    """
    runs = {"book": book} if book is here else {"book": book, f"here ({here.profile})": here}
    by_run = {name: run.claims for name, run in runs.items() if run}
    rows = []
    for i in dict.fromkeys(i for found in by_run.values() for i in found):
        both = {name: found.get(i) or {"verdict": "not_run"} for name, found in by_run.items()}
        rows.append({"claim": i} | {name: brief(claim) for name, claim in both.items()})
        ends = [(c["low"], c["high"]) for c in both.values() if c.get("low") is not None]
        if len(both) == 2:
            overlap = len(ends) == 2 and max(low for low, _ in ends) <= min(high for _, high in ends)
            rows[-1]["intervals overlap"] = "yes" if overlap else "no" if len(ends) == 2 else ""
    return rows


def claim_rows(paper: claims.Paper, results: Results | None) -> list[dict[str, Any]]:
    """A paper's claims with their verdicts; what has none is `not_run`."""
    rows = []
    for c in paper.claims:
        about = {k: getattr(c, k) for k in ("id", "kind", "headline", "evidence", "statement")}
        about |= {"badge": c.caution, "form": c.rule.form, "paper": c.paper.value, "where": c.paper.where}
        about["amended"] = [a.model_dump(mode="json") for a in paper.amendments if a.claim == c.id]
        found = results.claims.get(c.id) if results else None
        rows.append(vars(stats.Verdict("not_run")) | about | (found or {}))
    return rows


def scoreboard_rows() -> list[dict[str, Any]]:
    """One row per claim of every chapter; where a file is broken, `error` says so and nothing counts as run.

    `survives`: reproduced, and still so after Holm's correction for all claims of the book.
    """
    rows: list[dict[str, Any]] = []
    for slug in paths.chapters():
        row = {"slug": slug, "title": slug, "part": "", "error": "", **vars(stats.Verdict("not_run"))}
        try:
            paper, results = claims.load(slug), None
            row |= {"title": paper.title, "part": paper.part}
            results = load(slug)
        except claims.ClaimsError as fault:
            rows.append(row | {"error": str(fault)})
            continue
        except RecordError as fault:
            row["error"] = str(fault)
        row |= {k: getattr(results, k, None) for k in ("seconds", "device", "recorded", "stale")}
        rows += [row | found for found in claim_rows(paper, results)]
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
    return dict(verdicts=count, tested=tested, by_chance=chance, survive=kept, text=text)
