"""What a paper claims and what would count as reproduced: the schema of `data/papers/<slug>.yml`.

It is committed before any number is seen. Unknown keys are refused: a misspelt rule must never be ignored.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

VERDICTS = ("reproduced", "weaker", "contradicted", "inconclusive", "void", "not_run", "reported")
# What each rule form must have and may have
FORMS: dict[str, tuple[set[str], set[str]]] = {
    "difference": ({"direction"}, {"margin"}),  # ours - baseline (without a baseline: ours is a difference)
    "ratio": ({"direction"}, {"margin"}),  # ours / baseline; margin 1.5: at least 1.5x; 0.67 with lower
    "bound": ({"direction", "bound"}, set()),  # higher: ours >= bound
    "equal": ({"value"}, {"tolerance"}),  # every value; the tolerance is for floating-point rounding
    "equivalence": ({"margin"}, {"scale"}),  # two one-sided tests; scale ratio: within 1/margin … margin
    "not_worse": ({"direction", "margin"}, {"scale"}),  # direction is the good one
    "count": ({"k", "rules"}, set()),  # at least k of the sub-rules
    "reported": (set(), set()),  # the paper gives no rule
}
Over = Annotated[str, Field(pattern=r"^(seed|item|exact|cluster:[a-z0-9_-]+)$")]


class ClaimsError(ValueError):
    """A paper file that does not keep the schema; the message lists every fault with its place."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse(faults: dict[str, Any]) -> None:
    for message, wrong in faults.items():
        if wrong:
            raise ValueError(message)


class Arms(Strict):
    ours: str
    baseline: str | None = None


class Rule(Strict):
    """When a claim counts as reproduced; a sub-rule of a count may have metric, arms and over of its own."""

    form: str
    direction: Literal["lower", "higher"] | None = None
    margin: float | None = Field(None, ge=0)
    bound: float | None = None
    value: float | None = None
    tolerance: float = Field(0.0, ge=0)
    scale: Literal["difference", "ratio"] = "difference"
    k: int | None = Field(None, ge=1)
    rules: list[Rule] = []
    metric: str | None = None
    arms: Arms | None = None
    over: Over | None = None

    @model_validator(mode="after")
    def _keys(self) -> Rule:
        _refuse({f"form {self.form!r} is none of {', '.join(FORMS)}": self.form not in FORMS})
        (must, may), given = FORMS[self.form], self.model_fields_set - {"form", "metric", "arms", "over"}
        factor = 1.0 if self.margin is None else self.margin
        side = factor < 1 if self.direction == "higher" else not 0 < factor <= 1
        strange = {r.form for r in self.rules} & {"count", "reported"}
        _refuse({
            f"form {self.form} needs {', '.join(sorted(must - given))}": must - given,
            f"form {self.form} takes no {', '.join(sorted(given - must - may))}": given - must - may,
            "margin of a ratio: >= 1 for higher, 0 … 1 for lower": self.form == "ratio" and side,
            "margin with scale ratio is a factor, as 1.03 for 3 %": self.scale == "ratio" and factor < 1,
            "margin of an equivalence must be > 0": self.form == "equivalence" and factor == 0,
            "k is more than there are rules": self.form == "count" and (self.k or 0) > len(self.rules),
            "a sub-rule is neither a count nor reported": strange,
        })  # fmt: skip
        return self

    @property
    def log(self) -> bool:
        return self.form == "ratio" or self.scale == "ratio"


class PaperNumber(Strict):
    value: str | float | None = None
    where: str | None = None


class Claim(Strict):
    id: str
    kind: Literal["quality", "cost", "ablation", "sanity"]
    headline: bool = False
    evidence: Literal["exact", "real-shapes", "toy"]
    statement: str = Field(min_length=10)
    paper: PaperNumber = PaperNumber()
    metric: str
    arms: Arms
    rule: Rule
    over: Over
    requires: list[str] = []
    gates: list[str] = []
    badge: str | None = None  # None: chosen by `caution`; "": none

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        numbered = self.kind == "sanity" or re.fullmatch(r"c\d+[a-z]?(-[a-z0-9]+)+", self.id)
        empty = self.headline and (self.kind == "sanity" or self.rule.form == "reported")
        inside = self.rule.model_fields_set & {"metric", "arms", "over"}
        _refuse({
            "id must begin with the claim's number, as in c5a-far-ood": not numbered,
            "what is decided by construction (sanity) or not at all (reported) is no headline": empty,
            "metric, arms and over stand beside the rule": inside,
        })  # fmt: skip
        for rule in self.parts():
            alone, form = not (rule.arms and rule.arms.baseline), rule.form
            _refuse({
                f"form {form} needs arms.baseline": alone and (rule.log or form == "not_worse"),
                f"form {form} has a number and no arms.baseline": not alone and form in ("bound", "equal"),
                "form equal is over: exact": form == "equal" and rule.over != "exact",
            })  # fmt: skip
        return self

    def parts(self) -> list[Rule]:
        """The rule, or the sub-rules of a count, with metric, arms and over filled in."""
        own, rules = ("metric", "arms", "over"), self.rule.rules or [self.rule]
        return [r.model_copy(update={k: getattr(r, k) or getattr(self, k) for k in own}) for r in rules]

    @property
    def caution(self) -> str:
        """Badge beside the evidence: items of one trained model say nothing about another training."""
        one = self.over == "item" and self.evidence == "toy" and self.kind in ("quality", "ablation")
        return self.badge if self.badge is not None else "one training" if one else ""


class Check(Strict):
    """A condition on a machine-made file: the committed `record`, or the last `smoke` or `cpu` execution.

    pointer: JSON pointer into it; of an execution: /state, /seconds, /peak_ram_gib, /effects/<claim id>.
    `len>=` counts a list's entries; `exists` takes no value.
    """

    file: Literal["record", "smoke", "cpu"]
    pointer: str = Field(pattern=r"^(/[^/]+)+$")
    op: Literal["<=", "<", ">=", ">", "==", "len>=", "exists"]
    value: bool | float | str | None = None

    @model_validator(mode="after")
    def _value(self) -> Check:
        wants, text = self.op != "exists", isinstance(self.value, str)
        _refuse({
            f"op {self.op} {'needs a value' if wants else 'takes no value'}": wants == (self.value is None),
            f"op {self.op} compares numbers": text and self.op not in ("==", "exists"),
        })  # fmt: skip
        return self


class Task(Strict):
    """A node of the rubric (weights relative to its siblings, as in PaperBench) or, with `kind`, a leaf.

    A code leaf is earned by named tests, an execution leaf by checks of records (or tests that execute), a
    result leaf by verdicts: all of them must hold. `readrun.grading` grades; one that names nothing earns 0.
    """

    requirements: str
    weight: int = Field(1, gt=0)
    sub_tasks: list[Task] = []
    kind: Literal["code", "execution", "result"] | None = None
    claims: list[str] = []  # whose verdicts alone earn a result leaf
    tests: list[Annotated[str, Field(pattern=r"^tests/test_\w+\.py::test_\w+$")]] = []
    checks: list[Check] = []
    id: str | None = None

    @model_validator(mode="after")
    def _node_or_leaf(self) -> Task:
        both = bool(self.sub_tasks) == bool(self.kind)
        tested = self.kind in ("code", "execution")
        _refuse({
            "a task has either sub_tasks or, as a leaf, a kind (code, execution, result)": both,
            "tests earn code and execution leaves": self.tests and not tested,
            "checks earn execution leaves": self.checks and self.kind != "execution",
            "a result leaf, and nothing else, names its claims": bool(self.claims) != (self.kind == "result"),
        })  # fmt: skip
        return self

    def leaves(self) -> list[Task]:
        return [leaf for t in self.sub_tasks for leaf in t.leaves()] if self.sub_tasks else [self]


class Amendment(Strict):
    """A change of a rule after numbers were seen: shown on the page, never silent."""

    date: datetime.date
    claim: str
    what: str = Field(min_length=10)
    why: str = Field(min_length=10)


class Paper(Strict):
    slug: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    authors: str
    arxiv: str | None
    official_code: str | None
    part: str
    claims: list[Claim] = Field(min_length=1)
    rubric: Task
    derived: dict[str, str] = {}  # metric: name of the chapter's function(metrics, arrays) -> {arm: values}
    amendments: list[Amendment] = []

    @model_validator(mode="after")
    def _references(self) -> Paper:
        known = Counter(c.id for c in self.claims)
        ruled = {c.id for c in self.claims if c.rule.form != "reported"}
        named = [(f"{c.id}: requires or gates name", i) for c in self.claims for i in {*c.requires, *c.gates}]
        lost = {f"{who} {i!r}" for who, i in named if i not in ruled}
        named = [(f"rubric: {t.requirements!r} names", i) for t in self.rubric.leaves() for i in t.claims]
        named += [(f"the amendment of {a.date} names", a.claim) for a in self.amendments]
        lost |= {f"{who} {i!r}" for who, i in named if i not in known}
        _refuse({f"claim id given twice: {i}": n > 1 for i, n in known.items()})
        _refuse({f"{'; '.join(sorted(lost))}: no claim here with a rule": lost})
        self.ordered()
        return self

    def ordered(self) -> list[Claim]:
        """The claims, guards and gates before those they guard. Raises ValueError if that is a circle."""
        by_id = {c.id: c for c in self.claims}
        try:
            order = TopologicalSorter({c.id: [*c.requires, *c.gates] for c in self.claims}).static_order()
            return [by_id[i] for i in order]
        except CycleError as error:
            raise ValueError(f"requires and gates go in a circle: {' <- '.join(error.args[1])}") from None

    def rules(self) -> dict[str, dict[str, Any]]:
        """{claim id: what decides its verdict}: everything but the wording and the paper's own number."""
        out, wording = {}, {"statement", "paper", "badge"}
        for c in self.claims:
            out[c.id] = c.model_dump(mode="json", exclude=wording, exclude_defaults=True)
            out[c.id]["derived"] = sorted(f"{r.metric}: {self.derived.get(str(r.metric))}" for r in c.parts())
        return out

    @property
    def claims_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.rules(), sort_keys=True).encode()).hexdigest()


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's: 8 times faster
    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Refuse a key given twice; PyYAML would keep the last and say nothing."""
        for key, n in Counter(self.construct_object(k, deep=True) for k, _ in node.value).items():
            if n > 1:
                raise yaml.MarkedYAMLError(problem=f"key given twice: {key}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def parse(text: str, where: str) -> Paper:
    """A paper from YAML. Raises ClaimsError with one line per fault: its place (claims by id) and reason."""
    try:
        data = yaml.load(text, _Loader)
        return Paper.model_validate(data)
    except yaml.YAMLError as error:
        raise ClaimsError(f"{where}: not readable as YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{where}:"]
        for fault in error.errors():
            place = list(fault["loc"]) or ["file"]
            if place[0] == "claims" and len(place) > 1 and isinstance(data["claims"][place[1]], dict):
                place[1] = data["claims"][place[1]].get("id", place[1])
            lines.append(f"  {'.'.join(map(str, place))}: {fault['msg'].removeprefix('Value error, ')}")
        raise ClaimsError("\n".join(lines)) from error


def load(slug: str, file: Path | None = None) -> Paper:
    """The paper file of a chapter. Raises ClaimsError when it is missing, broken or another chapter's."""
    from readrun import paths

    file = file or paths.papers(slug)
    if not file.is_file():
        raise ClaimsError(f"chapter {slug!r} has no paper file: {file}")
    paper = parse(file.read_text(encoding="utf-8"), file.name)
    if paper.slug != slug:
        raise ClaimsError(f"{file.name}: slug is {paper.slug!r}, expected {slug!r}")
    return paper
