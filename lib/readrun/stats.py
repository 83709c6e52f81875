"""From measured numbers to verdicts. Every verdict reads one 95 % interval that the reader can check by eye.

seed           Student's t over paired seeds (ratios: on logs); seeds that one arm lacks are left out, named
item, cluster  paired bootstrap of items or whole clusters (BCa, 9,999 resamples, fixed generator); of fewer
               than 30, Student's t on linearised contributions (a bootstrap of few is too narrow); yes/no
               items with few events: Clopper-Pearson (one arm), Agresti-Min (paired), honest near 0 and 1
exact          no sampling: the number itself, or the range of several (all of them must keep the rule)
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
from scipy.special import stdtr, stdtrit

from readrun.claims import Claim, Paper, Rule

LEVEL, RESAMPLES, FEW = 0.95, 9_999, 30


@dataclass(frozen=True)
class Verdict:
    """A verdict, its effect with interval (in the metric's unit, or a ratio) over n things, and the method.

    `p` is the two-sided p-value of the rule's own threshold that belongs to the interval: reproduced means
    p <= 0.05. None where nothing was sampled or one value allows no interval.
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


def verdicts(paper: Paper, metrics: dict, arrays: dict | None = None) -> dict[str, Verdict]:
    """{claim id: verdict} of every claim, in the file's order."""
    done: dict[str, Verdict] = {}
    for claim in paper.ordered():
        done[claim.id] = verdict(claim, metrics, done, arrays)
    return {c.id: done[c.id] for c in paper.claims}


def verdict(claim: Claim, metrics: dict, others: dict[str, Verdict], arrays: dict | None = None) -> Verdict:
    """The verdict of one claim; `others` holds those of the claims it requires or is gated by.

    A gate that is not reproduced makes it void. A guard that is not reproduced turns reproduced into weaker:
    the effect is there, but not with everything the paper says of it. Raises ValueError where numbers cannot
    be compared: items that do not pair, a ratio of values that are not positive, cluster labels missing.
    """
    results = [_simple(rule, metrics, arrays or {}) for rule in claim.parts()]
    own = _count(claim, results) if claim.rule.form == "count" else results[0]
    if own.verdict == "not_run":
        return own
    bad = {i: f"{i} is {v.verdict.replace('_', ' ')}" for i, v in others.items() if v.verdict != "reproduced"}
    missed, failed = ([bad[i] for i in ids if i in bad] for ids in (claim.requires, claim.gates))
    word = "void" if failed else "weaker" if missed and own.verdict == "reproduced" else own.verdict
    notes = [own.note, *(f"not met: {m}" for m in missed), *(f"gate failed: {f}" for f in failed)]
    p = None  # of void: it tests nothing; with guards: that of the weakest part of the conjunction
    if own.p is not None and not failed:
        p = max([own.p, *(others[i].p or 0.0 for i in claim.requires)])
    return replace(own, verdict=word, note="; ".join(filter(None, notes)), p=p)


def needs(rule: Rule) -> list[tuple[int, float]]:
    """What a rule asks of the effect (ratios: of its log): all (sign, at) with sign * (effect - at) >= 0."""
    sign, margin = (-1 if rule.direction == "lower" else 1), rule.margin or 0.0
    if rule.log:
        margin = abs(math.log(1.0 if rule.margin is None else rule.margin))
    if rule.form in ("equal", "equivalence"):
        centre, width = (rule.value or 0.0, rule.tolerance) if rule.form == "equal" else (0.0, margin)
        return [(1, centre - width), (-1, centre + width)]
    if rule.form == "reported":
        return []
    at = {"bound": rule.bound or 0.0, "not_worse": -sign * margin}.get(rule.form, sign * margin)
    return [(sign, at)]


def decide(rule: Rule, low: float, high: float) -> str:
    """The verdict of an interval (ratios: of logs): beyond, short of, or on the other side of a threshold."""
    asked, worst, best = needs(rule), {1: low, -1: high}, {1: high, -1: low}
    kept = all(sign * (worst[sign] - at) >= 0 for sign, at in asked)
    if rule.form in ("difference", "ratio"):
        sign = asked[0][0]
        if sign * worst[sign] > 0:
            return "reproduced" if kept else "weaker"
        return "contradicted" if sign * best[sign] < 0 else "inconclusive"
    missed = rule.form == "equal" or any(sign * (best[sign] - at) < 0 for sign, at in asked)
    return "reproduced" if kept else "contradicted" if missed else "inconclusive"


def _simple(rule: Rule, metrics: dict, arrays: dict) -> Verdict:
    over = str(rule.over)
    x, y, labels, note = paired(rule, metrics, arrays)
    if x is None:
        return Verdict("not_run", over=over, note=note)
    least = np.min if over in ("seed", "exact") else np.mean  # single items may be 0, their mean may not
    if rule.log and (min(x.min(), y.min()) < 0 or min(least(x), least(y)) <= 0):
        raise ValueError(f"{rule.metric}: a ratio needs positive values")
    effect, low, high, n, method = estimate(x, y, over, rule.log, labels)
    sampled, p = low is not None and over != "exact", None
    if over != "exact" and not sampled:
        word, note = "inconclusive", f"{note}; one {over} has no interval".lstrip("; ")
    else:
        word = decide(rule, *((effect, effect) if low is None else (low, high)))
    if sampled:
        note = f"{note}; nothing varies over {over}".lstrip("; ") if low == high else note
        freedom = n - 1 if "Student" in method else math.inf
        for sign, at in needs(rule):
            room, half = sign * (effect - at), abs(effect - (low if sign > 0 else high))
            one = stdtr(freedom, -stdtrit(freedom, (1 + LEVEL) / 2) * room / half) if half else room < 0
            p = max(p or 0.0, min(1.0, 2 * float(one)))
    word = "reported" if rule.form == "reported" else word
    e, lo, hi = (v if v is None else math.exp(v) if rule.log else float(v) for v in (effect, low, high))
    return Verdict(word, e, lo, hi, n, over, method, note, p)


def _count(claim: Claim, results: list[Verdict]) -> Verdict:
    """k of n: the effect is how many sub-rules are reproduced, the interval ends where none is ruled out."""
    k, n, words = claim.rule.k or 0, len(results), [r.verdict for r in results]
    held, weak, lost = (words.count(w) for w in ("reproduced", "weaker", "not_run"))
    possible = n - words.count("contradicted")
    word = "contradicted" if possible < k else "not_run" if lost else "inconclusive"
    word = "reproduced" if held >= k else word
    word = "weaker" if word == "inconclusive" and held + weak >= k else word
    ps = sorted(r.p for r in results if r.p is not None)
    # that fewer than k hold (partial conjunction)
    p = min(1.0, (n - k + 1) * ps[k - 1]) if len(ps) == n else None
    told = zip(claim.parts(), words, strict=True)
    note = "; ".join(f"{rule.metric}: {word.replace('_', ' ')}" for rule, word in told)
    return Verdict(word, held, held, possible, n, claim.over, f"{k} of {n} sub-rules", note, p)


def paired(rule: Rule, metrics: dict, arrays: dict) -> tuple[Any, Any, Any, str]:
    """Values of `ours` and of `baseline` (or None) side by side, their cluster labels, and what was left out.

    Arms with identifiers (arrays "seeds/<metric>/<arm>") pair by these; lists pair by position.
    """
    assert rule.arms and rule.over
    names = [name for name in (rule.arms.ours, rule.arms.baseline) if name]
    columns = [np.asarray(metrics.get(rule.metric, {}).get(name, []), float) for name in names]
    if absent := [name for name, c in zip(names, columns, strict=True) if not len(c)]:
        return None, None, None, f"{rule.metric} not measured for {', '.join(absent)}"
    ids = [arrays.get(f"seeds/{rule.metric}/{name}") for name in names]
    rows, note = [np.arange(len(c)) for c in columns], ""
    if len(names) == 2 and all(i is not None for i in ids):
        mine, other = (np.asarray(i) for i in ids)
        common, *rows = np.intersect1d(mine, other, return_indices=True)
        if lost := sorted(set(mine.tolist()) ^ set(other.tolist())):
            note = f"left out, because one arm lacks them: {rule.over} {', '.join(map(str, lost))}"
        if not len(common):
            return None, None, None, f"{' and '.join(names)} have no {rule.over} in common"
    elif len({len(c) for c in columns}) == 2:
        if rule.over != "seed":
            raise ValueError(f"{rule.metric}: {' and '.join(names)} differ in length and cannot be paired")
        rows, note = [np.arange(min(map(len, columns)))] * 2, "left out: seeds beyond the shorter arm's"
    labels = None
    if rule.over.startswith("cluster:"):
        name = rule.over.replace(":", "/")
        labels = arrays.get(f"{name}/{rule.metric}", arrays.get(name))
        if labels is None or len(labels) != len(columns[0]):
            raise ValueError(f"{rule.metric}: needs an array {name!r} with a label per value of {names[0]}")
        labels = np.asarray(labels)[rows[0]]
    x, y = [*(c[r] for c, r in zip(columns, rows, strict=True)), None][:2]
    return x, y, labels, note


def estimate(x: np.ndarray, y: Any, over: str, log: bool, labels: Any = None) -> tuple:
    """(effect, low, high, n, method): mean of x (minus y, or log of the ratio) with its 95 % interval.

    low and high are None where one value allows no interval, and for a single exact number.
    """
    two_sided = (1 + LEVEL) / 2
    if over in ("seed", "exact"):
        d = np.log(x) - np.log(y) if log else x if y is None else x - y
        n, centre = len(d), float(d.mean())
        if n == 1 or over == "exact":
            return centre, *((None, None) if n == 1 else (d.min(), d.max())), n, over
        half = float(stdtrit(n - 1, two_sided) * d.std(ddof=1) / math.sqrt(n))
        return centre, centre - half, centre + half, n, "Student's t over paired seeds" + ", logs" * log
    _, which = np.unique(np.arange(len(x)) if labels is None else labels, return_inverse=True)
    size = np.bincount(which).astype(float)
    top, base = np.bincount(which, x), np.bincount(which, np.zeros_like(x) if y is None else y)
    n, unit = len(size), "items" if over == "item" else over.removeprefix("cluster:") + " clusters"

    def effect_of(rows: np.ndarray, axis: int = -1) -> Any:
        a, b = top[rows].sum(axis), base[rows].sum(axis)
        return np.log(a / b) if log else (a - b) / size[rows].sum(axis)

    centre = float(effect_of(np.arange(n)))
    if n == 1:
        return centre, None, None, n, over
    up, down = int((top > base).sum()), int((top < base).sum())
    if over == "item" and not log and np.isin([top, base], (0, 1)).all():
        if y is None and min(up, n - up) < 10:
            low, high = scipy.stats.binomtest(up, n).proportion_ci(LEVEL, "exact")
            return centre, float(low), float(high), n, "Clopper-Pearson over items"
        if y is not None and up + down < 10:
            middle, spread = (up - down) / (n + 2), up + down + 1 - (up - down) ** 2 / (n + 2)
            half = float(stdtrit(math.inf, two_sided)) * math.sqrt(spread) / (n + 2)
            ends = min(centre, middle - half), max(centre, middle + half)
            return centre, *ends, n, "Agresti-Min over paired items"
    share = top / top.mean() - base / base.mean() if log else (top - base - centre * size) / size.mean()
    half = float(stdtrit(n - 1, two_sided) * share.std(ddof=1) / math.sqrt(n))
    low, high, method = centre - half, centre + half, f"Student's t over {unit}"
    if n >= FEW and half > 1e-12 * max(1.0, abs(centre)):
        # BCa's correction is of order 1/n, its cost of order n²
        kind, draws = ("BCa", RESAMPLES) if n <= 3_000 else ("percentile", RESAMPLES // 5)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = scipy.stats.bootstrap(
                (np.arange(n),), effect_of, n_resamples=draws, batch=max(1, 2_000_000 // n), method=kind,
                confidence_level=LEVEL, vectorized=True, rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
        if np.isfinite([found.low, found.high]).all():
            low, high, method = float(found.low), float(found.high), f"paired bootstrap ({kind}) over {unit}"
    return centre, low, high, n, method


def holm(ps: list[float | None], alpha: float = 1 - LEVEL) -> list[bool]:
    """Which p-values survive Holm's correction for all that are given; None never does and does not count."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    kept = list(itertools.takewhile(lambda r: r[1][0] <= alpha / (len(order) - r[0]), enumerate(order)))
    return [i in {row for _, (_, row) in kept} for i in range(len(ps))]
