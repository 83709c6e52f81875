"""Rubric trees in PaperBench's format and how scores flow up them.

The chapter `paperbench` explains every definition here; `readrun.grading` grades the book's chapters by them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

CATEGORIES = ("Code Development", "Code Execution", "Result Analysis")
KINDS = dict(zip(("code", "execution", "result"), CATEGORIES, strict=True))  # names in data/papers/*.yml
FINE = (
    "Environment & Infrastructure Setup", "Dataset and Model Acquisition", "Data Processing & Preparation",
    "Method Implementation", "Experimental Setup", "Evaluation, Metrics & Benchmarking",
    "Logging, Analysis & Presentation",
)  # fmt: skip
SUBTREE = "Subtree"  # what `prune` makes of an internal node: a leaf that is graded from 0 to 1
MUST = ("id", "requirements", "weight", "sub_tasks")
MAY = ("task_category", "finegrained_task_category")
MAX_DEPTH, MAX_NODES = 200, 100_000
Path = tuple[int, ...]  # of a node: which child at every level; ids are not unique


class RubricError(ValueError):
    """A rubric that cannot be graded; the message lists every fault with the path of its node."""


@dataclass(frozen=True)
class RubricNode:
    """A requirement with its weight among its siblings; without sub_tasks a leaf, with a category."""

    id: str
    requirements: str
    weight: float
    sub_tasks: tuple[RubricNode, ...] = ()
    task_category: str | None = None
    finegrained_task_category: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as it was read

    @classmethod
    def from_dict(cls, data: Any) -> RubricNode:
        """Read a rubric in the official JSON format. Raises RubricError listing every fault.

        Keys that the format does not name (old files have some) are kept for `to_dict` and not used.
        """
        faults: list[str] = []
        root = _read(data, (), faults, set(), [0])
        if faults or root is None:
            more = [f"… and {len(faults) - 50} more"] if len(faults) > 50 else []
            raise RubricError("\n".join(["this rubric cannot be graded:", *faults[:50], *more]))
        return root

    def to_dict(self) -> dict[str, Any]:
        """The official format; what was read comes back key for key, in the same order."""
        own = {k: getattr(self, k) for k in (*MUST, *MAY)} | {
            "sub_tasks": [t.to_dict() for t in self.sub_tasks]
        }
        keys = self.source or own
        extra = {k: own[k] for k in MAY if k not in keys and own[k] is not None}
        return {k: own.get(k, keys[k]) for k in keys} | extra

    def walk(self, path: Path = ()) -> Iterator[tuple[Path, RubricNode]]:
        """All nodes with their paths, parents first."""
        yield path, self
        for i, task in enumerate(self.sub_tasks):
            yield from task.walk((*path, i))

    @cached_property
    def _leaves(self) -> tuple[tuple[Path, RubricNode], ...]:
        return tuple((path, node) for path, node in self.walk() if not node.sub_tasks)

    def leaves(self) -> tuple[tuple[Path, RubricNode], ...]:
        """(path, leaf) from left to right; a root without sub_tasks is its own leaf."""
        return self._leaves

    def at(self, path: Path) -> RubricNode:
        """The node at a path. Raises RubricError where there is none."""
        node = self
        for i in path:
            if not 0 <= i < len(node.sub_tasks):
                raise RubricError(f"no node at {where(path)}")
            node = node.sub_tasks[i]
        return node

    def depth(self) -> int:
        """Edges from here to the deepest leaf: 0 for a leaf."""
        return max((len(path) for path, _ in self.leaves()), default=0)

    def path_weights(self) -> dict[Path, float]:
        """{path of a leaf: its share of the root score}; they sum to 1 unless a group weighs 0 (then 0)."""
        shares: dict[Path, float] = {(): 1.0}
        for path, node in self.walk():
            total = math.fsum(t.weight for t in node.sub_tasks)
            for i, task in enumerate(node.sub_tasks):
                shares[*path, i] = shares[path] * task.weight / total if total else 0.0
        return {path: shares[path] for path, _ in self.leaves()}

    def code_only(self) -> RubricNode | None:
        """PaperBench Code-Dev: only Code Development leaves, weights as they are; None if there are none."""
        if not self.sub_tasks:
            return self if self.task_category == CATEGORIES[0] else None
        kept = tuple(t for t in (task.code_only() for task in self.sub_tasks) if t is not None)
        return replace(self, sub_tasks=kept) if kept else None

    def without_acquisition(self) -> RubricNode:
        """Resources are provided: leaves of "Dataset and Model Acquisition" get weight 0."""
        if self.sub_tasks:
            return replace(self, sub_tasks=tuple(t.without_acquisition() for t in self.sub_tasks))
        return replace(self, weight=0) if self.finegrained_task_category == FINE[1] else self

    def prune(self, depth: int) -> RubricNode:
        """Collapse internal nodes at `depth` (0: the root) into leaves of category "Subtree"."""
        if depth < 0:
            raise ValueError(f"depth: {depth}; accepted: 0 or more")
        if self.sub_tasks and depth == 0:
            return replace(self, sub_tasks=(), task_category=SUBTREE)
        return replace(self, sub_tasks=tuple(t.prune(depth - 1) for t in self.sub_tasks))

    def preceding(self, path: Path) -> tuple[RubricNode, ...]:
        """What a judge sees before the node at `path`: its ancestors and their earlier siblings, in order."""
        self.at(path)
        seen: list[RubricNode] = [self] if path else []
        for level in range(len(path)):
            parent = self.at(path[:level])
            seen += parent.sub_tasks[: path[level]] + (
                (parent.sub_tasks[path[level]],) if level < len(path) - 1 else ()
            )
        return tuple(seen)


def where(path: Path) -> str:
    """A path as text: "/" is the root, "/2/0" the first child of its third."""
    return "/" + "/".join(map(str, path))


def _read(data: Any, path: Path, faults: list[str], above: set[int], count: list[int]) -> RubricNode | None:
    say = faults.append
    count[0] += 1
    if not isinstance(data, dict) or id(data) in above or len(path) > MAX_DEPTH or count[0] > MAX_NODES:
        if count[0] <= MAX_NODES + 1:  # said once
            why = "not an object" if not isinstance(data, dict) else "contains itself"
            why = f"deeper than {MAX_DEPTH}" if len(path) > MAX_DEPTH else why
            say(f"{where(path)}: " + (why if count[0] <= MAX_NODES else f"more than {MAX_NODES:,} nodes"))
        return None
    before, tasks = len(faults), data.get("sub_tasks")
    if missing := [k for k in MUST if k not in data]:
        say(f"{where(path)}: lacks {', '.join(missing)}")
        return None
    weight, category, fine = data["weight"], data.get("task_category"), data.get("finegrained_task_category")
    for key in ("id", "requirements"):
        if not isinstance(data[key], str):
            say(f"{where(path)}: {key} is no text: {data[key]!r:.40}")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight < 0:
        say(f"{where(path)}: weight {weight!r:.40} is no finite number >= 0")
    if not isinstance(tasks, list):
        say(f"{where(path)}: sub_tasks is no list")
        return None
    if tasks and category is not None:
        say(f"{where(path)}: task_category {category!r:.40} on a node with sub_tasks")
    if not tasks and category not in CATEGORIES:
        say(f"{where(path)}: task_category {category!r:.40} of a leaf; accepted: {', '.join(CATEGORIES)}")
    if fine is not None and fine not in FINE:
        say(f"{where(path)}: unknown finegrained_task_category {fine!r:.40}")
    above.add(id(data))
    read = [_read(t, (*path, i), faults, above, count) for i, t in enumerate(tasks)]
    above.discard(id(data))
    if len(faults) > before:
        return None
    children = tuple(t for t in read if t is not None)
    return RubricNode(data["id"], data["requirements"], weight, children, category, fine, data)


@dataclass(frozen=True)
class GradedNode:
    """A node with its score from 0 to 1; `valid_score` is false where grading crashed (it then counts 0)."""

    id: str
    requirements: str
    weight: float
    sub_tasks: tuple[GradedNode, ...]
    task_category: str | None
    score: float
    valid_score: bool
    explanation: str
    judge_metadata: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The official format of a graded tree."""
        return vars(self) | {"sub_tasks": [t.to_dict() for t in self.sub_tasks]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GradedNode:
        """Read a graded tree; its scores are taken as they stand (`propagate` computes them again)."""
        try:
            values: dict[str, Any] = {k: data.get(k) for k in cls.__annotations__}
            values["sub_tasks"] = tuple(map(cls.from_dict, data["sub_tasks"]))
            values |= {"score": float(data["score"]), "valid_score": bool(data.get("valid_score", True))}
        except (KeyError, TypeError, ValueError) as error:
            raise RubricError(f"not a graded tree: {error!r}") from error
        return cls(**values)

    def leaves(self, path: Path = ()) -> tuple[tuple[Path, GradedNode], ...]:
        """(path, leaf) from left to right."""
        if not self.sub_tasks:
            return ((path, self),)
        return tuple(leaf for i, t in enumerate(self.sub_tasks) for leaf in t.leaves((*path, i)))


Grade = tuple[float, bool, str]  # score, valid, explanation


def grade(
    root: RubricNode, leaf_grade: Callable[[Path, RubricNode], Grade | GradedNode], path: Path = ()
) -> GradedNode:
    """Grade every leaf by `leaf_grade` and let the scores flow up. An exception makes its leaf invalid."""
    if root.sub_tasks:
        tasks = tuple(grade(t, leaf_grade, (*path, i)) for i, t in enumerate(root.sub_tasks))
        return _combine(
            GradedNode(root.id, root.requirements, root.weight, tasks, root.task_category, 0.0, True, "")
        )
    try:
        given = leaf_grade(path, root)
    except Exception as error:  # whatever a judge does, it costs this leaf alone, and it is counted
        given = (0.0, False, f"grading failed: {error!r:.300}")
    if isinstance(given, GradedNode):
        return given
    score, valid, text = given
    return GradedNode(
        root.id, root.requirements, root.weight, (), root.task_category, float(score), valid, text
    )


def _combine(node: GradedNode) -> GradedNode:
    """s = sum w s / sum w over the children, 0 where all weights are 0."""
    total = math.fsum(t.weight for t in node.sub_tasks)
    score = math.fsum(t.weight * t.score for t in node.sub_tasks) / total if total else 0.0
    return replace(node, score=score, valid_score=any(t.valid_score for t in node.sub_tasks))


def propagate(root: GradedNode) -> GradedNode:
    """Compute every internal score again from the leaves."""
    if not root.sub_tasks:
        return root
    return _combine(replace(root, sub_tasks=tuple(map(propagate, root.sub_tasks))))


def root_score(root: GradedNode) -> float:
    """The replication score: the root's score after `propagate`."""
    return propagate(root).score


def disqualify(root: GradedNode, why: str = "disqualified") -> GradedNode:
    """Every leaf 0 (validly), propagated: the submission broke a rule."""
    if not root.sub_tasks:
        return replace(root, score=0.0, valid_score=True, explanation=why)
    return _combine(replace(root, sub_tasks=tuple(disqualify(t, why) for t in root.sub_tasks)))


def average_replication_score(
    runs: Sequence[Mapping[str, float | None]],
) -> tuple[float | None, float | None, int]:
    """(mean, standard error, n) over complete runs; a run is {paper: root score, None where it failed}.

    The mean over papers is taken per run first. Runs that lack a paper which another has are left out. The
    standard error (ddof 1) needs two runs.
    """
    wanted = {paper for run in runs for paper in run}
    means = [
        math.fsum(v for v in run.values() if v is not None) / len(wanted)
        for run in runs
        if wanted and wanted == run.keys() and None not in run.values()
    ]
    n = len(means)
    mean = math.fsum(means) / n if n else None
    return mean, (statistics.stdev(means) / math.sqrt(n) if n > 1 else None), n


def code_dev(root: GradedNode) -> float | None:
    """Score of the Code-Dev variant: only Code Development leaves count. None if there are none."""
    if not root.sub_tasks:
        return root.score if root.task_category == CATEGORIES[0] else None
    kept = [(t.weight, s) for t in root.sub_tasks if (s := code_dev(t)) is not None]
    total = math.fsum(w for w, _ in kept)
    return (math.fsum(w * s for w, s in kept) / total if total else 0.0) if kept else None


def by_category(root: GradedNode) -> dict[str, float | None]:
    """{category: weighted share of its leaves that were earned}; None where the tree has none of them."""
    shares: dict[str, list[tuple[float, float]]] = {c: [] for c in CATEGORIES}

    def walk(node: GradedNode, share: float) -> None:
        total = math.fsum(t.weight for t in node.sub_tasks)
        for t in node.sub_tasks:
            walk(t, share * t.weight / total if total else 0.0)
        if not node.sub_tasks and node.task_category in shares:
            shares[node.task_category].append((share, node.score))

    walk(root, 1.0)
    sums = {c: math.fsum(w for w, _ in rows) for c, rows in shares.items()}
    return {c: math.fsum(w * s for w, s in rows) / sums[c] if sums[c] else None for c, rows in shares.items()}
