"""What a paper claims and what would count as reproduced: the schema of `data/papers/<slug>.yml`.

The file is written and committed before any number is seen. Unknown keys are refused, so that a rule which is
misspelt is an error and never a rule that silently does not apply.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

VERDICTS = ("reproduced", "weaker", "contradicted", "inconclusive", "void", "not_run", "reported")
Direction = Literal["lower", "higher"]
Scale = Literal["difference", "ratio"]
Over = Annotated[str, Field(pattern=r"^(seed|item|exact|cluster:[a-z0-9_-]+)$")]
NUMBERED = r"c\d+[a-z]?(-[a-z0-9]+)+"  # c2-wrong-length, c5b-near-ood


TAGS = {
    "difference",
    "ratio",
    "bound",
    "equal",
    "equivalence",
    "not_worse",
    "count",
    "reported",
    "node",
    "leaf",
}


class ClaimsError(ValueError):
    """A paper file that does not keep the schema; the message lists every fault with its place in the file."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Difference(Strict):
    """ours - baseline beyond `margin` in `direction`. Without a baseline `ours` is a difference already."""

    form: Literal["difference"]
    direction: Direction
    margin: float = Field(0.0, ge=0)


class Ratio(Strict):
    """ours / baseline, on the log scale: >= margin (higher, margin >= 1) or <= margin (lower, margin <= 1)."""

    form: Literal["ratio"]
    direction: Direction
    margin: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _side(self) -> Ratio:
        if (self.direction == "higher") != (self.margin >= 1) and self.margin != 1:
            raise ValueError(
                "margin of a ratio is >= 1 for direction higher (1.5: at least 1.5x), <= 1 for lower"
            )
        return self


class Bound(Strict):
    """The metric of `ours` on the stated side of a number: higher means >= bound, lower means <= bound."""

    form: Literal["bound"]
    direction: Direction
    bound: float


class Equal(Strict):
    """Every value of `ours` is `value` (counts, algebra); `tolerance` is for floating-point rounding only."""

    form: Literal["equal"]
    value: float
    tolerance: float = Field(0.0, ge=0)


class Equivalence(Strict):
    """ours - baseline inside ±margin (scale ratio: the ratio inside 1/margin … margin): two one-sided tests."""

    form: Literal["equivalence"]
    margin: float = Field(gt=0)
    scale: Scale = "difference"


class NotWorse(Strict):
    """ours worse than baseline by less than `margin` (scale ratio: by a factor below it); `direction` is good."""

    form: Literal["not_worse"]
    direction: Direction
    margin: float = Field(ge=0)
    scale: Scale = "difference"


class Count(Strict):
    """At least k of the n sub-rules are reproduced; a sub-rule inherits metric, arms and over from its claim."""

    form: Literal["count"]
    k: int = Field(ge=1)
    rules: list[Part] = Field(min_length=1)

    @model_validator(mode="after")
    def _k_of_n(self) -> Count:
        if self.k > len(self.rules):
            raise ValueError(f"k = {self.k} of only {len(self.rules)} sub-rules")
        return self


class Reported(Strict):
    """The paper gives no rule: the number is shown, nobody wins."""

    form: Literal["reported"]


Simple = Difference | Ratio | Bound | Equal | Equivalence | NotWorse
Rule = Annotated[Simple | Count | Reported, Field(discriminator="form")]


class Arms(Strict):
    ours: str
    baseline: str | None = None


class Part(Strict):
    """One sub-rule of a count."""

    rule: Annotated[Simple, Field(discriminator="form")]
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
    badge: str | None = None  # None: chosen here; "": none

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        pattern = NUMBERED if self.kind != "sanity" else r"[a-z]+\d*[a-z]?(-[a-z0-9]+)+"
        if not re.fullmatch(pattern, self.id):
            raise ValueError(
                f"id {self.id!r} must begin with the claim's number, as in c2-wrong-length or c5a-far"
            )
        if self.headline and self.kind == "sanity":
            raise ValueError("a sanity claim is decided by construction and is never a headline")
        if self.headline and self.rule.form == "reported":
            raise ValueError("a headline needs a rule; reported decides nothing")
        for part in parts(self):
            needs = part.rule.form in ("ratio", "not_worse") or getattr(part.rule, "scale", "") == "ratio"
            if needs and part.arms.baseline is None:
                raise ValueError(f"a rule of form {part.rule.form} needs arms.baseline")
            if part.rule.form in ("bound", "equal") and part.arms.baseline is not None:
                raise ValueError(
                    f"a rule of form {part.rule.form} takes no arms.baseline: it compares with a number"
                )
            if part.rule.form == "equal" and part.over != "exact":
                raise ValueError("a rule of form equal is over: exact")
        return self

    @property
    def caution(self) -> str:
        """Badge beside the evidence: items of one trained model say nothing about another training."""
        one = self.over == "item" and self.evidence == "toy" and self.kind in ("quality", "ablation")
        return self.badge if self.badge is not None else "one training" if one else ""


def parts(claim: Claim) -> list[Part]:
    """The rule(s) of a claim with metric, arms and over filled in: one, or those of a count."""
    own = [Part.model_construct(rule=claim.rule, metric=None, arms=None, over=None)]
    return [
        Part.model_construct(
            rule=p.rule, metric=p.metric or claim.metric, arms=p.arms or claim.arms, over=p.over or claim.over
        )
        for p in (claim.rule.rules if isinstance(claim.rule, Count) else own)
    ]


class Leaf(Strict):
    """One thing that is there or not. A result leaf is earned only by the verdicts of its claims."""

    requirements: str
    weight: int = Field(gt=0)
    kind: Literal["code", "execution", "result"]
    claims: list[str] = []
    id: str | None = None

    @model_validator(mode="after")
    def _earned(self) -> Leaf:
        if bool(self.claims) != (self.kind == "result"):
            raise ValueError("a result leaf names the claims that earn it, and no other leaf does")
        return self


def _is_node(task: Any) -> str:
    return "node" if isinstance(task, Node) or isinstance(task, dict) and "sub_tasks" in task else "leaf"


Task = Annotated[Annotated["Node", Tag("node")] | Annotated[Leaf, Tag("leaf")], Discriminator(_is_node)]


class Node(Strict):
    requirements: str
    weight: int = Field(1, gt=0)
    sub_tasks: list[Task] = Field(min_length=1)
    id: str | None = None

    def leaves(self) -> list[Leaf]:
        return [x for t in self.sub_tasks for x in (t.leaves() if isinstance(t, Node) else [t])]


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
    rubric: Node
    derived: dict[str, str] = {}
    amendments: list[Amendment] = []

    @model_validator(mode="after")
    def _tree(self) -> Paper:
        ids = [c.id for c in self.claims]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"claim ids are not unique: {', '.join(twice)}")
        by_id, waiting = dict(zip(ids, self.claims, strict=True)), list(self.claims)
        for c in self.claims:
            for key, name in [("requires", r) for r in c.requires] + [("gates", g) for g in c.gates]:
                if name not in by_id:
                    raise ValueError(f"{c.id}: {key} names {name!r}, which is no claim of this file")
                if by_id[name].rule.form == "reported":
                    raise ValueError(
                        f"{c.id}: {key} names {name!r}, whose rule is reported and decides nothing"
                    )
        while waiting:  # peel off claims whose guards are decided; what cannot be peeled is a cycle
            left = {c.id for c in waiting}
            rest = [c for c in waiting if left & {*c.requires, *c.gates}]
            if len(rest) == len(waiting):
                raise ValueError(f"requires and gates go in a circle: {', '.join(sorted(left))}")
            waiting = rest
        for leaf in self.rubric.leaves():
            if unknown := sorted(set(leaf.claims) - set(ids)):
                raise ValueError(
                    f"rubric leaf {leaf.requirements!r} names unknown claims: {', '.join(unknown)}"
                )
        return self

    def rules(self) -> dict[str, dict[str, Any]]:
        """What decides each verdict: everything but the wording and the paper's own number."""
        wording = {"statement", "paper", "badge"}
        out = {}
        for c in self.claims:
            derived = {p.metric: self.derived[p.metric] for p in parts(c) if p.metric in self.derived}
            out[c.id] = {**c.model_dump(mode="json", exclude=wording), "derived": derived}
        return out

    @property
    def claims_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.rules(), sort_keys=True).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice (PyYAML would keep the last and say nothing)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.MarkedYAMLError(
                problem=f"key given twice: {', '.join(twice)}", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def parse(text: str, where: str) -> Paper:
    """A paper from YAML. Raises ClaimsError with one line per fault, each with its place and, for a claim, its id."""
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
        return Paper.model_validate(data)
    except yaml.YAMLError as error:
        raise ClaimsError(f"{where}: not readable as YAML: {error}") from error
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            place = [x for i, x in enumerate(fault["loc"]) if not (i and x in TAGS)]
            if place[:1] == ["claims"] and len(place) > 1:
                claim = data["claims"][place[1]]
                place[1] = claim.get("id", place[1]) if isinstance(claim, dict) else place[1]
            lines.append(f"  {'.'.join(map(str, place)) or 'file'}: {fault['msg']}")
        raise ClaimsError(f"{where}: {len(lines)} fault(s)\n" + "\n".join(lines)) from error


def load(slug: str, file: Path | None = None) -> Paper:
    """The paper file of a chapter. Raises ClaimsError when it is missing, broken or another chapter's."""
    from readrun import paths

    file = file or paths.papers(slug)
    if not file.is_file():
        raise ClaimsError(f"chapter {slug!r} has no paper file {file.name} (expected at {file})")
    paper = parse(file.read_text(encoding="utf-8"), file.name)
    if paper.slug != slug:
        raise ClaimsError(f"{file.name}: slug is {paper.slug!r}, expected {slug!r}")
    return paper
