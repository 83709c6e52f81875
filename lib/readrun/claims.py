"""What a paper claims and what would count as reproduced: the schema of `data/papers/<slug>.yml`.

The file is written and committed before any number is seen. Unknown keys are refused, so that a rule which is
misspelt is an error and never a rule that silently does not apply.
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
ID = r"c\d+[a-z]?(-[a-z0-9]+)+"
Over = Annotated[str, Field(pattern=r"^(seed|item|exact|cluster:[a-z0-9_-]+)$")]
# What each rule form needs and may have; what the forms mean is said in readrun.stats, which applies them.
FORMS: dict[str, tuple[set[str], set[str]]] = {
    "difference": ({"direction"}, {"margin"}),  # ours - baseline (without baseline: ours is a difference)
    "ratio": ({"direction"}, {"margin"}),  # ours / baseline; margin 1.5: at least 1.5x; 0.67 with lower
    "bound": ({"direction", "bound"}, set()),  # higher: ours >= bound
    "equal": ({"value"}, {"tolerance"}),  # every value; the tolerance is for floating-point rounding
    "equivalence": ({"margin"}, {"scale"}),  # two one-sided tests; scale ratio: within 1/margin … margin
    "not_worse": ({"direction", "margin"}, {"scale"}),  # direction is the good one
    "count": ({"k", "rules"}, set()),  # at least k of the sub-rules
    "reported": (set(), set()),  # the paper gives no rule
}


class ClaimsError(ValueError):
    """A paper file that does not keep the schema; the message lists every fault with its place."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse(model: Any, *faults: tuple[Any, str]) -> Any:
    for wrong, message in faults:
        if wrong:
            raise ValueError(message)
    return model


class Arms(Strict):
    ours: str
    baseline: str | None = None


class Rule(Strict):
    """When a claim counts as reproduced. Which keys belong to which form: FORMS."""

    form: Literal[tuple(FORMS)]  # type: ignore[valid-type]
    direction: Literal["lower", "higher"] | None = None
    margin: float | None = Field(None, ge=0)
    bound: float | None = None
    value: float | None = None
    tolerance: float = Field(0.0, ge=0)
    scale: Literal["difference", "ratio"] = "difference"
    k: int | None = Field(None, ge=1)
    rules: list[Part] = []

    @model_validator(mode="after")
    def _keys(self) -> Rule:
        (need, may), given = FORMS[self.form], self.model_fields_set - {"form"}
        margin = 1 if self.margin is None else self.margin
        wrong_side = margin < 1 if self.direction == "higher" else not 0 < margin <= 1
        return _refuse(
            self,
            (need - given, f"form {self.form} needs {', '.join(sorted(need - given))}"),
            (given - need - may, f"form {self.form} takes no {', '.join(sorted(given - need - may))}"),
            (self.form == "ratio" and wrong_side, "margin of a ratio: >= 1 for higher, 0 … 1 for lower"),
            (self.scale == "ratio" and margin < 1, "margin with scale ratio is a factor, as in 1.03 for 3 %"),
            (self.form == "equivalence" and margin == 0, "margin of an equivalence must be > 0"),
            (self.form == "count" and (self.k or 0) > len(self.rules), "k is more than there are rules"),
        )


class Part(Strict):
    """One sub-rule of a count; metric, arms and over are the claim's unless given."""

    rule: Rule
    metric: str | None = None
    arms: Arms | None = None
    over: Over | None = None


class PaperNumber(Strict):
    value: str | float | None = None
    where: str | None = None


class Claim(Strict):
    """One row of the verdict table."""

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
        _refuse(
            self,
            (
                not re.fullmatch(ID, self.id) and self.kind != "sanity",
                "id begins with the number: c5a-far-ood",
            ),
            (
                self.headline and self.kind == "sanity",
                "a sanity claim is decided by construction: no headline",
            ),
            (self.headline and self.rule.form == "reported", "a rule of form reported makes no headline"),
        )
        for part in self.parts():
            form, pair = part.rule.form, bool(part.arms.baseline)
            needs = form in ("ratio", "not_worse") or part.rule.scale == "ratio"
            nested = form == "count" or form == "reported" and self.rule.form == "count"
            _refuse(
                self,
                (needs and not pair, f"form {form} needs arms.baseline"),
                (form in ("bound", "equal") and pair, f"form {form} takes no arms.baseline, it has a number"),
                (form == "equal" and part.over != "exact", "form equal is over: exact"),
                (nested, f"a sub-rule of a count cannot be of form {form}"),
            )
        return self

    def parts(self) -> list[Part]:
        """The rule, or the sub-rules of a count, with metric, arms and over filled in."""
        own = {"metric": self.metric, "arms": self.arms, "over": self.over}
        subs = self.rule.rules or [Part.model_construct(rule=self.rule)]
        return [Part.model_construct(**own | {k: v for k, v in p if v is not None}) for p in subs]

    @property
    def caution(self) -> str:
        """Badge beside the evidence: items of one trained model say nothing about another training."""
        one = self.over == "item" and self.evidence == "toy" and self.kind in ("quality", "ablation")
        return self.badge if self.badge is not None else "one training" if one else ""


class Task(Strict):
    """A node of the rubric (weights are relative to its siblings, as in PaperBench) or, with `kind`, a leaf.

    A result leaf is earned only by the verdicts of the claims that it names.
    """

    requirements: str
    weight: int = Field(1, gt=0)
    sub_tasks: list[Task] = []
    kind: Literal["code", "execution", "result"] | None = None
    claims: list[str] = []
    id: str | None = None

    @model_validator(mode="after")
    def _node_or_leaf(self) -> Task:
        either = bool(self.sub_tasks) == bool(self.kind)
        return _refuse(
            self,
            (either, "a task has either sub_tasks or, as a leaf, a kind (code, execution, result)"),
            (bool(self.claims) != (self.kind == "result"), "a result leaf, and no other, names its claims"),
        )

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
        decided = {c.id for c in self.claims if c.rule.form != "reported"}
        twice = [i for i, n in known.items() if n > 1]
        _refuse(self, (twice, f"claim ids given twice: {', '.join(twice)}"))
        for c in self.claims:
            lost = sorted({*c.requires, *c.gates} - decided)
            _refuse(self, (lost, f"{c.id}: requires/gates name {', '.join(lost)}: no claim here with a rule"))
        for leaf in self.rubric.leaves():
            lost = sorted(set(leaf.claims) - set(known))
            _refuse(self, (lost, f"rubric leaf {leaf.requirements!r} names unknown {', '.join(lost)}"))
        self.ordered()
        return self

    def ordered(self) -> list[Claim]:
        """The claims, guards and gates before those they guard. Raises ValueError if that goes in a circle."""
        by_id = {c.id: c for c in self.claims}
        try:
            order = TopologicalSorter({c.id: [*c.requires, *c.gates] for c in self.claims}).static_order()
            return [by_id[i] for i in order]
        except CycleError as error:
            raise ValueError(f"requires and gates go in a circle: {' <- '.join(error.args[1])}") from None

    def rules(self) -> dict[str, dict[str, Any]]:
        """{claim id: what decides its verdict}: everything but the wording and the paper's own number."""
        wording = {"statement", "paper", "badge"}
        names = {c.id: {p.metric for p in c.parts()} & set(self.derived) for c in self.claims}
        return {
            c.id: c.model_dump(mode="json", exclude=wording, exclude_defaults=True)
            | {"derived": {m: self.derived[m] for m in sorted(names[c.id])}}
            for c in self.claims
        }

    @property
    def claims_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.rules(), sort_keys=True).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice (PyYAML would keep the last and say nothing)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = Counter(self.construct_object(k, deep=True) for k, _ in node.value)
        if twice := [str(k) for k, n in keys.items() if n > 1]:
            problem = f"key given twice: {', '.join(twice)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def parse(text: str, where: str) -> Paper:
    """A paper from YAML. Raises ClaimsError with one line per fault: its place (claims by id) and reason."""
    try:
        data = yaml.load(text, _Loader)
        return Paper.model_validate(data)
    except yaml.YAMLError as error:
        raise ClaimsError(f"{where}: not readable as YAML: {error}") from error
    except ValidationError as error:
        lines = [where + ":"]
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
