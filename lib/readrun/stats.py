"""From measured numbers to verdicts. Every verdict reads one 95 % interval that the reader can check by eye.

seed            Student's t over paired seeds (on logs for ratios); seeds that one arm lacks are left out and named
item, cluster   paired bootstrap (BCa, 9,999 resamples, fixed generator) of items or whole clusters; below 30 of them
                Student's t on the linearised contributions, because a bootstrap of few is too narrow; yes/no items
                with few events: Clopper-Pearson (one arm) or Agresti-Min (paired), which stay honest at 0 and 1
exact           no sampling: the number itself, or the range if there are several (then all must keep the rule)
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from readrun.claims import Claim, Paper, Part, Rule

LEVEL, RESAMPLES, FEW = 0.95, 9_999, 30


@dataclass(frozen=True)
class Verdict:
    """A verdict, the effect with its interval (in the metric's unit, or a ratio), and how it came about.

    `n` counts what the interval is over. `p` is the two-sided p-value that belongs to the interval: `reproduced`
    means p <= 0.05 against the rule's own threshold. None: exact, not measured, or one value without an interval.
    """

    verdict: str
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    over: str = ""
    method: str = ""
    note: str = ""
    p: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdicts(paper: Paper, metrics: dict, arrays: dict | None = None) -> dict[str, Verdict]:
    """{claim id: verdict} of every claim, in the file's order; guards and gates are applied."""
    done: dict[str, Verdict] = {}
    for claim in paper.ordered():
        done[claim.id] = verdict(claim, metrics, done, arrays)
    return {c.id: done[c.id] for c in paper.claims}


def verdict(claim: Claim, metrics: dict, others: dict[str, Verdict], arrays: dict | None = None) -> Verdict:
    """The verdict of one claim. `others` holds those of the claims it requires or is gated by.

    A gate that is not reproduced makes it void. A guard that is not reproduced turns reproduced into weaker: the
    effect is there, but not with everything the paper says of it. Raises ValueError where the numbers cannot be
    compared (items that do not pair, a ratio of values that are not positive, cluster labels missing).
    """
    results = [_part(part, metrics, arrays or {}) for part in claim.parts()]
    own = _count(claim, results) if claim.rule.form == "count" else results[0]
    if own.verdict == "not_run":
        return own
    failed = [f"{i} ({others[i].verdict})" for i in claim.gates if others[i].verdict != "reproduced"]
    missed = [f"{i} ({others[i].verdict})" for i in claim.requires if others[i].verdict != "reproduced"]
    word, notes = own.verdict, [own.note] if own.note else []
    if missed:
        word = "weaker" if word == "reproduced" else word
        notes.append(f"not met: {', '.join(missed)}")
    if failed:
        word = "void"
        notes.append(f"gate failed: {', '.join(failed)}")
    with_guards = [p for p in (own.p, *(others[i].p for i in claim.requires)) if p is not None]
    p = max(with_guards) if own.p is not None else None
    return Verdict(**asdict(own) | {"verdict": word, "note": "; ".join(notes), "p": p})


def needs(rule: Rule) -> list[tuple[int, float]]:
    """What a rule asks of the effect, as (sign, threshold): sign * (effect - threshold) >= 0. Ratios: of its log."""
    log = rule.form == "ratio" or rule.scale == "ratio"
    sign, margin = (
        (-1 if rule.direction == "lower" else 1),
        float(log) if rule.margin is None else rule.margin,
    )
    margin = math.log(margin) if log else margin
    if rule.form in ("equal", "equivalence"):
        centre, width = (rule.value, rule.tolerance) if rule.form == "equal" else (0.0, margin)
        return [(1, centre - width), (-1, centre + width)]
    at = {"difference": sign * margin, "ratio": margin, "bound": rule.bound, "not_worse": -sign * margin}
    return [(sign, at[rule.form])] if rule.form in at else []


def decide(rule: Rule, low: float, high: float) -> str:
    """The verdict of an interval (logs for ratios): beyond, short of, or on the other side of the threshold."""
    asked, worst, best = needs(rule), {1: low, -1: high}, {1: high, -1: low}
    kept = all(sign * (worst[sign] - at) >= 0 for sign, at in asked)
    if rule.form in ("difference", "ratio"):
        sign = asked[0][0]
        if sign * worst[sign] > 0:
            return "reproduced" if kept else "weaker"
        return "contradicted" if sign * best[sign] < 0 else "inconclusive"
    missed = rule.form == "equal" or any(sign * (best[sign] - at) < 0 for sign, at in asked)
    return "reproduced" if kept else "contradicted" if missed else "inconclusive"


def _part(part: Part, metrics: dict, arrays: dict) -> Verdict:
    rule, log = part.rule, part.rule.form == "ratio" or part.rule.scale == "ratio"
    x, y, labels, note = paired(part, metrics, arrays)
    if x is None:
        return Verdict("not_run", over=part.over, note=note)
    if log and (y is None or min(x.min(), y.min()) < 0 or min(x.mean(), y.mean()) <= 0):
        raise ValueError(f"{part.metric}: a ratio needs positive values")
    effect, low, high, n, method = estimate(x, y, part.over, log, labels)
    if low is None and part.over != "exact":
        word, note = "inconclusive", f"one {part.over} has no interval"
    else:
        word = decide(rule, *((effect, effect) if low is None else (low, high)))
    if low is not None and low == high and part.over != "exact":
        note = f"{note}; nothing varies over {part.over}".lstrip("; ")
    p = None
    if low is not None and part.over != "exact" and rule.form != "reported":
        tail = stats.t(n - 1) if "Student" in method else stats.norm
        for sign, at in needs(rule):
            room, half = sign * (effect - at), abs(effect - (low if sign > 0 else high))
            one = tail.sf(tail.ppf((1 + LEVEL) / 2) * room / half) if half else float(room < 0)
            p = max(p or 0.0, min(1.0, 2 * float(one)))
    word = "reported" if rule.form == "reported" else word
    back = [None if v is None else math.exp(v) if log else float(v) for v in (effect, low, high)]
    return Verdict(word, *back, n, part.over, method, note, p)


def _count(claim: Claim, results: list[Verdict]) -> Verdict:
    """k of n: effect is how many sub-rules are reproduced, the interval ends at how many are not ruled out."""
    k, n = claim.rule.k, len(results)
    held, open_ = (
        sum(r.verdict in words for r in results) for words in (("reproduced",), ("weaker", "inconclusive"))
    )
    weak = sum(r.verdict == "weaker" for r in results)
    missing = sum(r.verdict == "not_run" for r in results)
    word = "reproduced" if held >= k else "not_run" if held + open_ + missing >= k and missing else (
        "weaker" if held + weak >= k else "inconclusive" if held + open_ >= k else "contradicted"
    )  # fmt: skip
    ps = sorted(r.p for r in results if r.p is not None)
    p = (
        min(1.0, (n - k + 1) * ps[k - 1]) if len(ps) == n else None
    )  # at least k of n hold (partial conjunction)
    words = "; ".join(f"{part.metric}: {r.verdict}" for part, r in zip(claim.parts(), results, strict=True))
    return Verdict(word, held, held, held + open_, n, claim.over, f"{k} of {n} sub-rules", words, p)


def paired(part: Part, metrics: dict, arrays: dict) -> tuple[Any, Any, Any, str]:
    """Values of `ours` and `baseline` (or None) side by side, their cluster labels, and a note on what was left out.

    Arms with identifiers (arrays "seeds/<metric>/<arm>") pair by these; lists pair by position.
    """
    names = [part.arms.ours] + ([part.arms.baseline] if part.arms.baseline else [])
    columns = [np.asarray(metrics.get(part.metric, {}).get(name, []), float) for name in names]
    if absent := [name for name, c in zip(names, columns, strict=True) if not len(c)]:
        return None, None, None, f"{part.metric} not measured for {', '.join(absent)}"
    ids = [arrays.get(f"seeds/{part.metric}/{name}") for name in names]
    rows, note = [np.arange(len(c)) for c in columns], ""
    if len(names) == 2 and all(i is not None for i in ids):
        common, *rows = np.intersect1d(*ids, return_indices=True)
        if lost := sorted(set(ids[0].tolist()) ^ set(ids[1].tolist())):
            note = f"left out, because one arm lacks them: {', '.join(map(str, lost))}"
        if not len(common):
            return None, None, None, f"{' and '.join(names)} have no {part.over} in common"
    elif len(names) == 2 and len(columns[0]) != len(columns[1]):
        if part.over != "seed":
            raise ValueError(
                f"{part.metric}: {' and '.join(names)} have {len(columns[0])} and {len(columns[1])} values"
            )
        rows, note = (
            [np.arange(min(map(len, columns)))] * 2,
            "left out: seeds beyond those of the shorter arm",
        )
    labels = None
    if part.over.startswith("cluster:"):
        name = "cluster/" + part.over.removeprefix("cluster:")
        labels = arrays.get(f"{name}/{part.metric}", arrays.get(name))
        if labels is None or len(labels) != len(columns[0]):
            raise ValueError(f"{part.metric}: needs an array {name!r} with one label per value of {names[0]}")
        labels = np.asarray(labels)[rows[0]]
    x, y = ([c[r] for c, r in zip(columns, rows, strict=True)] + [None])[:2]
    return x, y, labels, note


def estimate(x: np.ndarray, y: np.ndarray | None, over: str, log: bool, labels: Any = None) -> tuple:
    """(effect, low, high, n, method): mean of x (minus y, or log of the ratio) with its 95 % interval.

    low and high are None where one value allows no interval, and for a single exact number.
    """
    if over in ("seed", "exact"):
        d = np.log(x) - np.log(y) if log else x if y is None else x - y
        n, centre = len(d), float(d.mean())
        if over == "exact":
            return centre, *((None, None) if n == 1 else (d.min(), d.max())), n, "exact"
        if n == 1:
            return centre, None, None, n, "one seed"
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * d.std(ddof=1) / math.sqrt(n))
        return centre, centre - half, centre + half, n, "Student's t over seeds" + " (logs)" * log
    _, which = np.unique(np.arange(len(x)) if labels is None else labels, return_inverse=True)
    size = np.bincount(which).astype(float)
    top, base = np.bincount(which, x), np.bincount(which, np.zeros_like(x) if y is None else y)
    n, unit = len(size), "items" if over == "item" else over.removeprefix("cluster:") + " clusters"

    def effect_of(rows: np.ndarray, axis: int = -1) -> Any:
        a, b = top[rows].sum(axis), base[rows].sum(axis)
        return np.log(a / b) if log else (a - b) / size[rows].sum(axis)

    centre = float(effect_of(np.arange(n)))
    if n == 1:
        return centre, None, None, n, f"one of {unit}"
    if over == "item" and not log and all(np.isin(v, (0, 1)).all() for v in (top, base)):
        up, down = float(((top - base) > 0).sum()), float(((top - base) < 0).sum())
        if y is None and min(up, n - up) < 10:
            low, high = stats.binomtest(int(up), n).proportion_ci(LEVEL, "exact")
            return centre, float(low), float(high), n, "Clopper-Pearson over items"
        if y is not None and up + down < 10:
            a, b, m = up + 0.5, down + 0.5, n + 2
            half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(a + b - (a - b) ** 2 / m) / m
            return (
                centre,
                min(centre, (a - b) / m - half),
                max(centre, (a - b) / m + half),
                n,
                "Agresti-Min over items",
            )
    share = top / top.mean() - base / base.mean() if log else (top - base - centre * size) / size.mean()
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * share.std(ddof=1) / math.sqrt(n))
    if n < FEW or half < 1e-12 * max(1.0, abs(centre)):
        return centre, centre - half, centre + half, n, f"Student's t over {unit}"
    method = "BCa" if n <= 3_000 else "percentile"  # the correction is of order 1/n and its cost of order n²
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (np.arange(n),), effect_of, n_resamples=RESAMPLES, batch=max(1, 2_000_000 // n), vectorized=True,
            confidence_level=LEVEL, method=method, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return centre, centre - half, centre + half, n, f"Student's t over {unit}"
    return centre, float(found.low), float(found.high), n, f"paired bootstrap ({method}) over {unit}"


def holm(ps: list[float | None], alpha: float = 0.05) -> list[bool]:
    """Which p-values survive Holm's correction for all of them; None never does and does not count."""
    from statsmodels.stats.multitest import multipletests

    given = [p for p in ps if p is not None]
    kept = iter(multipletests(given, alpha, "holm")[0].tolist() if given else [])
    return [p is not None and next(kept) for p in ps]
