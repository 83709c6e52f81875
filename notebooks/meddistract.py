# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MedDistractQA: one harmless sentence
#
# Krithik Vishwanath, Anton Alyakin, Daniel A. Alber and colleagues (senior author Eric K. Oermann), *Medical
# large language models are easily distracted* (2025), [arXiv 2504.01201](https://arxiv.org/abs/2504.01201).
# Official code: [nyuolab/MedDistractQA](https://github.com/nyuolab/MedDistractQA).
#
# :::{admonition} No medical advice
# :class: warning
# Every condition, patient and finding in this chapter is invented. Nothing in it is medical advice, and
# nothing in it is a statement about the safety of any real model.
# :::
#
# :::{admonition} The idea in three sentences
# :class: tip
# A system that listens in a consulting room writes down everything that is said, also what has nothing to do
# with the patient. So take an exam question, insert one sentence that cannot change the answer ("the
# patient's zodiac sign is Cancer", "her neighbour's dog has diabetes"), and ask again. The difference is
# measured on the *same* items, so it is cheap to see: the paper finds losses of up to 17.9 points.
#
# **You need to know** what a {term}`language model`'s log-likelihood is, and how to read an {term}`interval`
# over {term}`seed`s. Symbols are in [Notation](../notation.md).
#
# **You will run** an invented clinic whose right answers are known by construction, language models trained
# on it from scratch, five kinds of inserted sentence (one of them the control that the paper lacks), and the
# statistics of paired answers.
#
# **It costs** seconds in `smoke`, under two minutes on one core in `cpu`; the recorded `gpu` run is described
# below.
# :::

# %% tags=["parameters", "hide-input"]
profile = ""  # smoke | cpu | gpu; "" means $READRUN_PROFILE, else cpu
seed = 0  # first seed
seeds = 0  # how many seeds; 0: the profile's own number
device = "auto"  # auto | cpu | cuda
checkpoint = ""  # hub id or folder of a causal language model of your own
only = ""  # patterns of units to compute; "": all; "none": draw from saved units
out = ""  # folder for this run's files; "": build/meddistract/<profile>/live
dataset = ""  # MedQA file (JSON lines) for your own model; "": invented items
distractors = ""  # MedDistractQA file that belongs to it (JSON list); "": none

# %% tags=["hide-input"]
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import readrun
import scipy.stats
import torch
from readrun import bench, lm, picker, plots, tables, train
from readrun.llm import LLM, Reply, Usage
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

run = readrun.start(
    "meddistract", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only,
    out=out, dataset=dataset, distractors=distractors,
)  # fmt: skip
plots.style()
disable_progress_bar()

# %% [markdown]
# ## The idea in a picture
#
# A patient, a question, and one sentence about somebody else's dog. A reader that asks *who* has the finding
# ignores it. A reader that only collects clinical words counts it for the option it belongs to.

# %% tags=["figure", "hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.7), width_ratios=[1.5, 1])
story_lines = [("A 52-year-old woman reports fever.", "black"), ("Examination shows no rash.", "black"),
               ("Her neighbour's dog has tremor.", plots.PALETTE[1]),
               ("Which condition is most likely?", "black")]  # fmt: skip
for i, (line, colour) in enumerate(story_lines):
    axes[0].text(
        0.02, 0.85 - 0.24 * i, line, color=colour, fontsize=12, weight="bold" if i == 2 else "normal"
    )
axes[0].set(xticks=[], yticks=[])
axes[0].grid(False)
plots.label(axes[0], "the inserted sentence is orange", "stem")
for k, (name, scores) in enumerate({"who has it?": [2, 0], "bag of findings": [2, 3]}.items()):
    axes[1].barh(np.arange(2) + (k - 0.5) * 0.38, scores, 0.36, label=name, color=plots.PALETTE[k])
axes[1].set_yticks([0, 1], ["brona (fever +2)", "zelia (tremor +3)"])
axes[1].invert_yaxis()
axes[1].set_xlim(0, 5.5)
axes[1].legend(fontsize=9, loc="center right")
plots.label(axes[1], "score (1)", "option")
plots.show(
    figure,
    alt="Left: a short case with one inserted sentence about a neighbour's dog that has tremor. Right: "
    "scores of two options. A reader that asks who has a finding gives 2 to the right option and 0 to the "
    "other; a bag of findings gives 2 and 3, so that the inserted word decides.",
    caption="One sentence about somebody else changes the answer of a reader that only counts words.",
)

# %% [markdown]
# ## Set-up
#
# One code path, three sizes; the active profile is in bold. `cpu` shows directions, `gpu` is the recorded
# experiment. All numbers that a claim depends on, and the rules that decide it, were written into
# `data/papers/meddistract.yml` before the first experiment.

# %% tags=["hide-input"]
S = run.settings(
    smoke=dict(
        seeds=1, world=dict(seed=0, n_conditions=24, n_findings=36, families=6),
        sizes={"16x1": [16, 1, 1, 3e-3], "32x1": [32, 1, 1, 3e-3]}, main="16x1", keep=["16x1"],
        base=dict(facts=[8, 8], pool=200, steps=12, batch=16, story=0.25, letters=True, moments=[0.5, 1.0]),
        more=dict(medical=4, augmented=4, context=4, lr_factor=0.5, pool=100),
        test=dict(n=48), rag=dict(ranks=[1, 5], fillers=20, items=16), attribution=4,
        coverage=dict(n=200, draws=200), generate=4,
        score=dict(batch=2, prompt=24, option=3, repeats=3, items=1, shape=[64, 2, 4, 2, 128, 500]),
    ),
    cpu=dict(
        seeds=3, world=dict(seed=0, n_conditions=24, n_findings=36, families=6),
        sizes={"32x2": [32, 2, 2, 6e-3]}, main="32x2", keep=["32x2"],
        base=dict(
            facts=[500, 48], pool=8000, steps=600, batch=24, story=0.25, letters=False, moments=[0.5, 1.0],
        ),
        more=dict(medical=0, augmented=0, context=0, lr_factor=0.5, pool=4000),
        test=dict(n=320), rag=dict(ranks=[1, 5, 20, 100], fillers=100, items=160), attribution=16,
        coverage=dict(n=1273, draws=4000), generate=0,
        score=dict(batch=4, prompt=96, option=4, repeats=5, items=2, shape=[128, 2, 4, 2, 384, 2000]),
    ),
    gpu=dict(
        seeds=5, world=dict(seed=0, n_conditions=96, n_findings=120, families=24),
        sizes={
            "32x1": [32, 1, 1, 3e-3], "64x2": [64, 2, 2, 3e-3], "128x4": [128, 4, 4, 2e-3],
            "256x6": [256, 6, 4, 1e-3], "512x8": [512, 8, 8, 6e-4],
        },
        main="128x4", keep=["32x1", "64x2", "128x4"],
        base=dict(
            facts=[400, 512], pool=40000, steps=500, batch=256, story=0.25, letters=True,
            moments=[0.3, 0.6, 1.0],
        ),
        more=dict(medical=1200, augmented=200, context=200, lr_factor=0.5, pool=15000),
        test=dict(n=1273), rag=dict(ranks=[1, 2, 5, 10, 20, 50, 100, 200], fillers=400, items=1273),
        attribution=64, coverage=dict(n=1273, draws=4000), generate=128,
        score=dict(batch=64, prompt=300, option=8, repeats=10, items=4,
                   shape=[4096, 32, 32, 8, 14336, 128256]),
    ),
)  # fmt: skip
S

# %% [markdown]
# ## The algorithm
#
# ### Step 1: a clinic whose answers are known
#
# With real exam questions nobody can prove that an inserted sentence leaves the answer alone; one has to
# trust whoever wrote it. Here it can be proved, because the answer is computed. A world has conditions $D$
# and findings $f$, a weight $W_{Df}\in\{-2,\dots,3\}$ for every pair, and a patient has the findings
# $x_f\in\{+1,0,-1\}$ (present, not mentioned, absent). The answer among the options is
#
# $$
# \arg\max_{D}\ \sum_f W_{Df}\,x_f ,
# $$
#
# and its *margin* is the distance to the second best. Conditions come in families of four which share three
# findings; each has three of its own, and up to two that speak against it (findings of its relatives).
#
# The names of the conditions are invented syllables. The findings are clinical words, and most of them have
# an everyday meaning too: a *cataract* is also a waterfall, a *rash* also a series of events. Which words are
# of that kind is read off WordNet: nouns with one sense below *ill health*, *symptom*, *injury* and the like,
# and another sense elsewhere. The list and the script that derives it are committed
# (`data/sources/polysemous_nouns.py`). From it the chapter takes words that can be said of a patient without
# an article; the rest of the findings have one meaning only. Three groups of everyday senses decide in which
# kind of sentence a word may stand. Words are split 70/30: the everyday sense of a *test* word occurs in no
# training text.

# %% tags=["hide-input"]
NOUNS = {
    row["word"]: row["other"][0]
    for row in json.loads(readrun.asset("meddistract/polysemous_nouns.json").read_text("utf-8"))["words"]
}
POLYSEMOUS = (
    "abrasion adhesion amputation angina atrophy aura bite boil bump burn burning carbuncle cataract chafe "
    "chill cold collapse congestion constipation consumption contusion corn cramp cut "
    "dandruff deformity dislocation distress eruption fever fibrillation flare floater flush flux fracture "
    "gash giddiness graze growth hardening headache infection inflammation irregularity itch jaundice kink "
    "laceration lameness looseness lump murmur nausea numbness pain palpitation pang pinch polyp prostration "
    "puffiness rash rawness redness reflux rupture scald scar scorch scrape scratch shock slough soreness "
    "spasm stasis sting stitch strain stricture stuffiness sunburn swelling tenderness throb trauma twist "
    "ulceration vegetation wart welt whiplash wound wrench"
).split()
SINGLE = (
    "backache bloating cough diarrhea dizziness drowsiness earache edema fatigue heartburn hiccups hives "
    "hoarseness indigestion insomnia lethargy nosebleed pallor paralysis sleeplessness sneezing snoring "
    "sprain stammering stiffness sweating thirst toothache tremor vertigo vomiting weakness wheezing "
    "cyanosis hypothermia sniffles"
).split()
GROUPS = {
    "event": "act event process phenomenon state time".split(),
    "idea": "feeling attribute cognition communication".split(),
}


def sense_group(noun: str) -> str:
    """thing, event or idea: what the everyday sense of a polysemous noun is. Raises KeyError for others."""
    return next((group for group, kinds in GROUPS.items() if NOUNS[noun]["lexname"][5:] in kinds), "thing")


def split_words(words: Sequence[str], share: float = 0.3, seed: int = 0) -> tuple[list[str], list[str]]:
    """(training words, test words), disjoint; every group of senses gives its share."""
    parts = [sorted(w for w in words if sense_group(w) == g) for g in ("thing", *GROUPS)]
    rng = random.Random(seed)
    test = {w for part in parts for w in rng.sample(part, round(share * len(part)))}
    return sorted(set(words) - test), sorted(test)


TRAIN_WORDS, TEST_WORDS = split_words(POLYSEMOUS)


# %%
@dataclass(frozen=True, eq=False)
class World:
    """Invented conditions, findings and the weights W (n_conditions, n_findings) of the decision rule."""

    conditions: list[str]
    findings: list[str]
    weights: np.ndarray
    family: np.ndarray  # (n_conditions,)

    def scores(self, findings: Mapping[str, int], options: Sequence[str]) -> list[int]:
        """sum_f W[D, f] x_f for each option D. Raises ValueError for an unknown name or x not in -1, 0, 1."""
        unknown = [d for d in options if d not in self.table]
        unknown += [f for f, x in findings.items() if f not in self.known or x not in (-1, 0, 1)]
        if unknown:
            raise ValueError(f"findings, options: {unknown} unknown in this world, or not -1, 0 or 1")
        return [sum(self.table[d].get(f, 0) * x for f, x in findings.items()) for d in options]

    def decide(self, findings: Mapping[str, int], options: Sequence[str]) -> tuple[str, int]:
        """(best option, its lead over the second best); the first of equals with lead 0."""
        scores = self.scores(findings, options)
        best = int(np.argmax(scores))
        return options[best], scores[best] - max(s for i, s in enumerate(scores) if i != best)

    def weight(self, condition: str, finding: str) -> int:
        """W of one pair."""
        return self.table[condition].get(finding, 0)

    def typical(self, condition: str) -> list[str]:
        """The findings that speak for a condition."""
        return [f for f, w in self.table[condition].items() if w > 0]

    @functools.cached_property
    def table(self) -> dict[str, dict[str, int]]:
        """{condition: {finding: weight}} of the weights that are not 0."""
        rows = zip(self.conditions, self.weights.tolist(), strict=True)
        return {d: {f: w for f, w in zip(self.findings, row, strict=True) if w} for d, row in rows}

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The findings as a set."""
        return frozenset(self.findings)


# %%
ONSETS = "b br d dr f fl g gr h k kl l m n p pr s st t tr v z".split()
VOWELS = "a e i o u au ei".split()
ENDINGS = "nia lia xia rosis metis phara tria dola vyra kosis".split()


def make_world(seed: int, n_conditions: int = 96, n_findings: int = 120, families: int = 24) -> World:
    """A world with known weights: 3 findings shared by a family, 3 own ones, up to 2 that exclude.

    Three quarters of the findings are polysemous, test and training words in their proportion; each condition
    owns one test word, so that all of them can be inserted. Raises ValueError unless the families are equally
    large (2 or more) and there are enough findings.
    """
    size = n_conditions // max(families, 1)
    if families < 1 or size * families != n_conditions or size < 2:
        raise ValueError(
            f"families: {families} does not divide n_conditions {n_conditions} into groups of 2 or more"
        )
    most = len(POLYSEMOUS) + len(SINGLE)
    if not 5 * size <= n_findings <= most:
        raise ValueError(f"n_findings: {n_findings}; accepted: {5 * size} to {most}")
    rng, many = random.Random(seed), min(len(POLYSEMOUS), round(0.75 * n_findings))
    test = round(many * len(TEST_WORDS) / len(POLYSEMOUS))
    findings = [*rng.sample(TEST_WORDS, test), *rng.sample(TRAIN_WORDS, many - test)]
    findings = sorted(findings + rng.sample(SINGLE, n_findings - many))
    names: dict[str, None] = {}
    while len(names) < n_conditions:
        first, second = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(2))
        names[f"{first}{second}{rng.choice(ENDINGS)}"] = None
    weights = np.zeros((n_conditions, n_findings), dtype=int)
    unseen = [i for i, f in enumerate(findings) if f in TEST_WORDS]
    others = [i for i, f in enumerate(findings) if f not in TEST_WORDS]
    for i in range(families):
        members = range(i * size, (i + 1) * size)
        marks, drawn = rng.sample(unseen, size), rng.sample(others, 3 + 2 * size)
        own = {d: [marks[k], *drawn[3 + 2 * k : 5 + 2 * k]] for k, d in enumerate(members)}
        for f in drawn[:3]:
            weights[members, f] = rng.randint(1, 2)
        for d in members:
            weights[d, own[d]] = [rng.randint(2, 3) for _ in range(3)]
            foreign = [f for e in members if e != d for f in own[e]]
            for f in rng.sample(foreign, rng.randint(0, 2)):
                weights[d, f] = -rng.randint(1, 2)
    return World(list(names), findings, weights, np.arange(n_conditions) // size)


# %% [markdown]
# A hand-sized world: two conditions, three findings.

# %%
# NBVAL_CHECK_OUTPUT
tiny = World(["brona", "zelia"], ["fever", "rash", "cough"], np.array([[1, 3, 0], [1, -1, 2]]), np.zeros(2))
print(
    tiny.scores({"fever": 1, "rash": -1}, tiny.conditions),
    tiny.decide({"fever": 1, "rash": -1}, tiny.conditions),
)

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Fever is present and counts 1 for both. Rash is absent: $3\cdot(-1)=-3$ for the first, $(-1)(-1)=+1$ for the
# second. Sums: $1-3=-2$ and $1+1=2$; the second leads by $4$.
# :::
#
# ### Step 2: items with exactly one best answer
#
# A stem reads like an exam vignette: who comes, a chart of three to six findings in random order, some vital
# signs, and the question as its last sentence. The options are the four conditions of one family (hard) or
# drawn from different ones (easy). The generator draws a target first and then charts until the rule picks
# that target with a margin of at least 2, so that all conditions are equally often right and the options
# alone say nothing.

# %% tags=["hide-input"]
PRESENT = [
    "{She} reports {f}.", "{She} complains of {f}.", "{She} presents with {f}.", "Examination shows {f}.",
    "There is {f} on examination.", "{Her} chart lists {f}.", "The patient describes {f}.",
    "{She} has had {f} for {n} days.", "{She} came in because of {f}.",
]  # fmt: skip
ABSENT = [
    "{She} denies {f}.", "{She} reports no {f}.", "Examination shows no {f}.", "There is no {f}.",
    "{Her} chart lists no {f}.", "The patient has never had {f}.", "No {f} is found on examination.",
    "{She} is free of {f}.",
]  # fmt: skip
VITALS = [
    "{Her} pulse is {p} per minute.", "{Her} temperature is 3{t}.{n} degrees.",
    "{Her} blood pressure is 1{p} over {p}.",
]  # fmt: skip
OPENING = "A {age}-year-old {woman} comes to the {place}."
QUESTIONS = [
    "Which condition is most likely?", "What is the most likely diagnosis?",
    "Which of the following explains these findings best?",
]  # fmt: skip
PLACES = ["clinic", "practice", "hospital", "ward"]
SEXES = {"woman": ("She", "Her"), "man": ("He", "His")}


def fill(template: str, sex: str, rng: random.Random, **values: str) -> str:
    """A template with its pronouns, numbers and `values` filled in."""
    she, her = SEXES[sex]
    numbers = dict(n=rng.randint(2, 9), p=rng.choice((60, 68, 76, 84, 92)), t=rng.randint(6, 8))
    return template.format(
        She=she, she=she.lower(), Her=her, her={"Her": "her", "His": "his"}[her], **(numbers | values)
    )


# %%
def template_pattern(template: str) -> re.Pattern[str]:
    """A chart template as a pattern whose group f is the finding."""
    text = re.escape(template).replace(r"\{f\}", "(?P<f>[a-z]+)")
    return re.compile("^" + re.sub(r"\\\{\w+\\\}", r"\\w+", text) + "$")


CHART = {+1: [template_pattern(t) for t in PRESENT], -1: [template_pattern(t) for t in ABSENT]}


# %%
@dataclass(frozen=True)
class Item:
    """A four-option question. findings: what is true of the patient; meta: margin, sex, what was inserted."""

    id: str
    stem: str
    options: tuple[str, ...]
    answer: str
    findings: Mapping[str, int] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


def check_item(item: Item) -> None:
    """Raises ValueError naming the item: not four different options, answer not among them, empty stem."""
    if len(item.options) != 4 or len(set(item.options)) != 4:
        raise ValueError(f"item {item.id}: needs four different options, got {list(item.options)}")
    if item.answer not in item.options:
        raise ValueError(f"item {item.id}: answer {item.answer!r} is not among its options")
    if not item.stem.strip():
        raise ValueError(f"item {item.id}: empty stem")


def draw_chart(world: World, rng: random.Random, options: Sequence[str]) -> dict[str, int]:
    """Findings of a patient who probably has options[0]: some of its own, a shared one, red herrings."""
    target, others = options[0], options[1:]
    typical = world.typical(target)
    own = [f for f in typical if world.weight(target, f) > max(0, *(world.weight(o, f) for o in others))]
    shared = [f for f in typical if f not in own]
    x = dict.fromkeys(rng.sample(own, max(0, min(len(own) - 1, rng.choice((1, 1, 2))))), 1)
    x |= dict.fromkeys(rng.sample(shared, min(len(shared), rng.choice((0, 1)))), 1)
    foreign = [f for o in others for f in world.typical(o) if world.weight(target, f) <= 0 and f not in x]
    rng.shuffle(foreign)
    for value, count in ((1, rng.choice((0, 1))), (-1, rng.choice((1, 2, 2)))):
        x |= {foreign.pop(): value for _ in range(min(count, len(foreign)))}
    return x


# %%
def make_item(
    world: World, rng: random.Random, difficulty: str = "hard", name: str = "item", answer: str = ""
) -> Item:
    """An item whose answer leads by 2 or more; difficulty: "hard" (one family) or "easy" (four families).

    answer: the condition that is right (drawn where none is given).

    No finding is named twice, and the answer keeps a finding of its own that the chart does not name.
    Raises ValueError for another difficulty.
    """
    if difficulty not in ("hard", "easy"):
        raise ValueError(f"difficulty: {difficulty!r}; accepted: hard, easy")
    while True:
        target = world.conditions.index(answer or rng.choice(world.conditions))
        near = world.family == world.family[target]
        pool = [int(d) for d in np.flatnonzero(near if difficulty == "hard" else ~near) if d != target]
        options = [world.conditions[d] for d in (target, *rng.sample(pool, 3))]
        for _ in range(8):
            x = draw_chart(world, rng, options)
            best, margin = world.decide(x, options)
            if 3 <= len(x) <= 6 and best == options[0] and margin >= 2:
                return write_item(world, rng, options, x, name, margin)


def write_item(world: World, rng: random.Random, options: list[str], x: dict, name: str, margin: int) -> Item:
    """The vignette of a chart, with its options shuffled."""
    sex, answer = rng.choice(list(SEXES)), options[0]
    body = [fill(rng.choice(PRESENT if v > 0 else ABSENT), sex, rng, f=f) for f, v in x.items()]
    body += [fill(t, sex, rng) for t in rng.sample(VITALS, rng.choice((1, 1, 2)))]
    rng.shuffle(body)
    opening = fill(OPENING, sex, rng, age=str(rng.randint(20, 79)), woman=sex, place=rng.choice(PLACES))
    options = rng.sample(options, 4)
    stem = " ".join([opening, *body, rng.choice(QUESTIONS)])
    item = Item(name, stem, tuple(options), answer, x, {"margin": margin, "sex": sex})
    named = [word for word in re.findall(r"[a-z]+", stem) if word in world.known]
    if sorted(named) != sorted(x):
        twice = sorted(set(named) - set(x)) or sorted({f for f in named if named.count(f) > 1})
        raise ValueError(f"item {name}: {twice} are named twice, or by a template")
    return item


# %% tags=["hide-input"]
clinic = make_world(**S.world)
an_item = make_item(clinic, random.Random(1))
print(textwrap.fill(an_item.stem, 84))
print(f"options: {', '.join(an_item.options)}; right: {an_item.answer}, margin {an_item.meta['margin']}")
print(an_item.findings)

# %% [markdown]
# ### Step 3: the inserted sentence
#
# The paper lets a large language model write the sentence around a clinical term that is taken from a *wrong*
# option. Here templates write it, so that it is known what it says. Five kinds:
#
# | kind | the sentence | the term in it |
# |---|---|---|
# | `neutral` | of the same forms and length as the next two | no finding at all (the control) |
# | `nonliteral` | a clinical word in its everyday sense | a finding of a wrong option |
# | `bystander` | somebody else, or an animal, has the finding | a finding of a wrong option |
# | `bystander_congruent` | the same | a finding of the *right* option |
# | `echo` | the same | a finding that the patient has anyway |
#
# None of them says anything about the patient, so $x$ and the answer stay. Without `neutral`, "it was
# distracted" and "the text got longer and stranger" could not be told apart; the paper has no such control.
#
# Each control is the twin of another sentence of the same item: every nonliteral frame also takes a neutral
# noun, and bystander frames come in pairs, one with a finding and one without. In the test, half of the items
# have the twin of their nonliteral sentence as control, the other half that of their bystander sentence: same
# frame, same people, same length, another word. The frames, the bystanders and the neutral nouns of the test
# occur in no training text.


# %% tags=["hide-input"]
@dataclass(frozen=True)
class Templates:
    """Frames and words of one split. A bystander frame is a pair: with a finding {f}, with a neutral {w}."""

    nonliteral: Mapping[str, Sequence[str]]
    bystander: Sequence[tuple[str, str]]
    people: Sequence[str]
    animals: Sequence[str]
    neutral: Sequence[str]
    words: Sequence[str]  # the polysemous words of nonliteral and bystander sentences
    barred: Sequence[str] = ()  # words that no sentence of the split may name


TRAIN = Templates(
    nonliteral={
        "thing": ["{She} once drew a picture of a {w}.", "The museum in town shows a famous {w}.",
                  "{She} bought a book about the history of the {w}."],
        "event": ["The evening programme mentioned the {w} of the old market.",
                  "{She} wrote a school essay about {w} in the economy.",
                  "A famous film is called The Great {w}."],
        "idea": ["The critic praised the {w} in the second act of the play.",
                 "{She} sings a ballad about the {w} of the sea.",
                 "The poem on the wall speaks of the {w} of winter."],
    },
    bystander=[("{Her} {person} suffered from {f} in the past.",
                "{Her} {person} worked with {w} in the past."),
               ("A {animal} that belongs to {her} {person} shows signs of {f}.",
                "A {animal} that belongs to {her} {person} lives close to some {w}."),
               ("{Her} {person} says that the {animal} developed {f}.",
                "{Her} {person} says that the {animal} likes {w}."),
               ("The {animal} of the {person} once had {f}.", "The {animal} of the {person} once ate {w}.")],
    people="brother mother father uncle cousin teacher landlord barber lawyer baker".split(),
    animals="dog cat horse cow rabbit pony sheep canary".split(),
    neutral="bread paper leather marble cotton honey timber coffee silver butter cheese wool".split(),
    words=TRAIN_WORDS,
    barred=TEST_WORDS,
)  # fmt: skip

# %% tags=["hide-input"]
TEST = Templates(
    nonliteral={
        "thing": ["{Her} favourite photograph from abroad displays a large {w}.",
                  "Next to the village hall stands a sculpture of a {w}.",
                  "{She} collects postcards with a {w}."],
        "event": ["{Her} newspaper writes about {w} among the political parties.",
                  "{She} watches documentaries about {w} inside distant galaxies.",
                  "Tonight the theatre plays a comedy entitled Beautiful {w}."],
        "idea": ["{She} likes novels dealing with the {w} of young painters.",
                 "An opera on television celebrates {w} and hope.",
                 "{Her} horoscope promises plenty of {w} to every Capricorn."],
    },
    bystander=[("Last spring {her} {person} underwent treatment against {f}.",
                "Last spring {her} {person} attended lessons about {w}."),
               ("According to {her} {person}, some {animal} nearby caught {f}.",
                "According to {her} {person}, some {animal} nearby stole {w}."),
               ("{Her} {person} now nurses a {animal} through {f}.",
                "{Her} {person} now lures a {animal} through {w}."),
               ("Meanwhile {her} {person} phoned and mourned a {animal} lost to {f}.",
                "Meanwhile {her} {person} phoned and praised a {animal} used to {w}.")],
    people="neighbour aunt roommate colleague grandson pharmacist plumber nephew".split(),
    animals="parrot goldfish hamster tortoise donkey goose ferret gecko".split(),
    neutral="velvet granite amber jazz pottery lavender bamboo porcelain linen cinnamon".split(),
    words=TEST_WORDS,
)  # fmt: skip

# %%
KINDS = ("neutral", "nonliteral", "bystander", "bystander_congruent", "echo")


def owner(world: World, item: Item, term: str) -> str | None:
    """The one option that a finding speaks for (of the options, only it has a positive weight), or None."""
    owners = [d for d in item.options if world.weight(d, term) > 0]
    return owners[0] if len(owners) == 1 else None


def terms_for(item: Item, world: World, kind: str, templates: Templates = TEST) -> list[str]:
    """Findings that a distractor of this kind may name; for neutral the neutral nouns.

    Nonliteral and bystander sentences use the same terms: polysemous words of the split, of a wrong option.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}; accepted: {', '.join(KINDS)}")
    if kind == "neutral":
        return list(templates.neutral)
    if kind == "echo":
        return [f for f, x in item.findings.items() if x > 0 and f not in templates.barred]
    right = kind == "bystander_congruent"
    free = [f for f in world.findings if f not in item.findings and f not in templates.barred]
    free = [f for f in free if right or f in templates.words]
    return [f for f in free if (d := owner(world, item, f)) and (d == item.answer) is right]


# %%
def make_distractor(
    item: Item, world: World, kind: str, rng: random.Random, templates: Templates = TEST, term: str = "",
    like: str = "",
) -> str:  # fmt: skip
    """One sentence about something else than the patient's findings; `term` is drawn where none is given.

    like: for neutral, the clinical word whose nonliteral sentence it controls, "bystander" for the frame of
    a bystander sentence, "" for either; with an equal rng it then has the same frame and the same people.
    Raises ValueError for an unknown kind, where no term is possible, where the sentence would name a finding
    of the chart (except for echo, which names one that the patient has) or have the patient as its subject.
    """
    possible = terms_for(item, world, kind, templates)
    if not term and not possible:
        raise ValueError(f"item {item.id}: no term for a {kind} sentence")
    term = term or rng.choice(possible)
    if kind != "neutral" and (term in item.findings) is not (kind == "echo"):
        raise ValueError(
            f"item {item.id}: {term!r} cannot be the term of a {kind} sentence: see its findings"
        )
    who = dict(person=rng.choice(templates.people), animal=rng.choice(templates.animals))
    word = term if kind == "nonliteral" else like if kind == "neutral" else "bystander"
    word = word or rng.choice(["bystander", rng.choice(list(templates.words))])
    if word == "bystander":
        frame = rng.choice(templates.bystander)[kind == "neutral"]
    else:
        frame = rng.choice(list(templates.nonliteral[sense_group(word)]))
    sentence = fill(frame, item.meta.get("sex", "woman"), rng, w=term, f=term, **who)
    if any(p.match(sentence) for patterns in CHART.values() for p in patterns):
        raise ValueError(f"item {item.id}: {sentence!r} says something of the patient")
    named = world.known.intersection(re.findall(r"[a-z]+", sentence))
    if named != ({term} if kind != "neutral" else set()):
        raise ValueError(f"item {item.id}: {sentence!r} names {sorted(named)}")
    return sentence


# %% [markdown]
# **Where it goes.** The official code splits the stem at the whitespace after `.`, `!` or `?` and puts the
# sentence before the last piece, which is the question. A stem of one sentence gets it in front.


# %%
def sentences(stem: str) -> list[str]:
    """The stem split at whitespace after ., ! or ? (the released rule: "Dr. Who" is split too)."""
    return re.split(r"(?<=[.!?])\s+", stem.strip())


def insert_before_question(stem: str, sentence: str) -> str:
    """`sentence` before the last sentence of the stem, joined by single blanks.

    Quotation marks around the sentence are stripped. Raises ValueError if it or the stem is empty.
    """
    sentence = sentence.strip().strip("\"'“”").strip()
    if not sentence or not stem.strip():
        raise ValueError("sentence, stem: must not be empty")
    parts = sentences(stem)
    return " ".join([*parts[:-1], sentence, parts[-1]])


def remove_sentence(stem: str, sentence: str) -> str:
    """The inverse: `stem` without `sentence` before its last one. Raises ValueError if it is not there."""
    sentence = sentence.strip().strip("\"'“”").strip()
    question = sentences(stem)[-1]
    head = stem[: len(stem) - len(question)].rstrip()
    if not sentence or not head.endswith(sentence):
        raise ValueError(f"sentence: {sentence!r} does not stand before the last sentence")
    return " ".join(filter(None, [head[: len(head) - len(sentence)].rstrip(), question]))


# %%
# NBVAL_CHECK_OUTPUT
example = insert_before_question(
    "A man took 3.5 mg. He has a rash! What is it?", '"His zodiac sign is Cancer."'
)
print(example)
print(remove_sentence(example, "His zodiac sign is Cancer."))
print(insert_before_question("What is it?", "It rains."))

# %% [markdown]
# :::{dropdown} Where these lines come from
# "3.5" has no blank after its point, so the stem has three sentences; the third is the question. The
# quotation marks go. Taking the sentence out again gives the stem back. A stem of one sentence is all
# question. :::


# %%
def with_sentence(item: Item, sentence: str, **meta: Any) -> Item:
    """The item with a sentence inserted; options, answer and findings are untouched."""
    stem = insert_before_question(item.stem, sentence)
    return dataclasses.replace(item, stem=stem, meta={**item.meta, "sentence": sentence, **meta})


VARIANTS = {
    "clean": "", "neutral": "neutral", "nonliteral": "nonliteral", "bystander": "bystander",
    "congruent": "bystander_congruent", "echo": "echo",
}  # fmt: skip


def make_variants(world: World, n: int, seed: int, templates: Templates = TEST) -> dict[str, list[Item]]:
    """{variant: n items}: the same items clean and with each kind of sentence.

    All conditions are right equally often. Items and sentences have random streams of their own. Nonliteral
    and bystander sentences of an item name the same term; an item without such a term is not used. The
    neutral sentence is the twin of one of them (meta["twin"]), by turns for two items each.
    """
    items_rng, rng = random.Random(f"items {seed}"), random.Random(f"sentences {seed}")
    found: dict[str, list[Item]] = {name: [] for name in VARIANTS}
    turns: list[str] = []
    while len(found["clean"]) < n:
        at = len(found["clean"])
        if at % len(world.conditions) == 0:
            turns = items_rng.sample(world.conditions, len(world.conditions))
        item = make_item(world, items_rng, name=f"{seed}-{at}", answer=turns[at % len(turns)])
        if not terms_for(item, world, "bystander", templates):
            continue
        common = rng.choice(terms_for(item, world, "bystander", templates))
        found["clean"].append(item)
        twin = ("nonliteral", "bystander")[at // 2 % 2]
        for name, kind in list(VARIANTS.items())[1:]:
            shared = name in ("nonliteral", "bystander")
            term = common if shared else rng.choice(terms_for(item, world, kind, templates))
            own = random.Random(f"{seed} {at} {twin if name == 'neutral' else name}")  # twins draw the same
            like = common if twin == "nonliteral" else twin
            sentence = make_distractor(item, world, kind, own, templates, term, like)
            whose = owner(world, item, term) if kind != "neutral" else None
            more = {"twin": twin} if kind == "neutral" else {}
            found[name].append(with_sentence(item, sentence, term=term, owner=whose, kind=kind, **more))
    return found


# %% tags=["hide-input"]
shown_variants = make_variants(clinic, 1, 7)
print(textwrap.fill(shown_variants["clean"][0].stem, 84), "\n")
for name, (one,) in shown_variants.items():
    print(f"{name:>10}: {one.meta.get('sentence', '')}")

# %% [markdown]
# ### Step 4: the prompt, and reading the answer
#
# The paper's prompt has the sections below and asks for reasoning that closes with "Therefore, the final
# answer is [X]." The chapter's own models read a short form of it; their answer names the option before its
# letter, because copying a name is easy to learn and picking a letter is not.


# %%
ANSWER = "Therefore, the final answer is"


def item_prompt(item: Item, style: str = "short") -> str:
    """The question as one text; style: "short" (the chapter's models) or "paper". meta["context"] is shown.

    Raises ValueError for another style.
    """
    context = str(item.meta.get("context", ""))
    choices = [f"[{letter}] {o}" for letter, o in zip("ABCD", item.options, strict=True)]
    if style == "short":
        return " ".join([f"Context: {context}"] * bool(context) + ["Question:", item.stem, *choices])
    if style != "paper":
        raise ValueError(f"style: {style!r}; accepted: short, paper")
    lines = "\n".join(f"[{letter}] : {o}" for letter, o in zip("ABCD", item.options, strict=True))
    how = f'Think step by step. Close with "{ANSWER} [X]." where X is the letter of your choice.'
    parts = {"Question": item.stem, "Choices": lines, "Context": context, "Instructions": how}
    return "\n\n".join(f"## {name}\n{text}".rstrip() for name, text in parts.items())


# %% [markdown]
# **Reading the answer is a part of the measurement.** The official code tries about sixteen patterns in
# order and takes the first that hits. One of them, "is" followed by a capital letter from A to D without a
# word boundary, comes before the pattern of the answer that was asked for: "The patient **is C**aucasian …
# the final answer is [B]" is read as C. The strict parser takes the requested phrase only, the last one if
# there are several, and no other letter; what it cannot read is *invalid*, counted and never dropped.


# %%
def parse_answer(text: str, n_options: int = 4) -> str | None:
    """Letter of the last "final answer is … [X]"; None if the requested form does not occur.

    A name may stand before the bracket, and bold or math marks around it; a letter beyond the options is
    no answer. Raises ValueError unless 2 <= n_options <= 26.
    """
    if not 2 <= n_options <= 26:
        raise ValueError(f"n_options: {n_options}; accepted: 2 to 26")
    last = chr(64 + n_options)
    found = re.findall(rf"(?i:final\s+answer\s+is)\b[^.\[\]]{{0,80}}\[([A-{last}])\]", text)
    return found[-1] if found else None


LENIENT = [
    r"\\boxed\{\\text\{([A-D])\}\}", r"\\boxed\{([A-D])\}", r"answer is:? \(([A-D])\)", r"is ([A-D])",
    r"\*\*([A-D])\*\*", r"final answer is:? \[([A-D])\]", r"answer:? \[([A-D])\]", r"[Aa]nswer:? ?([A-D])",
    r"\[([A-D])\]", r"\(([A-D])\)", r"\b([A-D])\)", r"[Oo]ption ([A-D])", r"[Cc]hoice ([A-D])",
    r"^([A-D])\b", r"\b([A-D])\.?$", r"\b([A-D])\b",
]  # fmt: skip


def parse_answer_lenient(text: str) -> str | None:
    """First hit of an ordered list of patterns, in the order whose trap the audit shows; own patterns."""
    hits = (re.search(pattern, text, re.M) for pattern in LENIENT)
    return next((hit[1] for hit in hits if hit), None)


# %%
# NBVAL_CHECK_OUTPUT
for text in ("The patient is Caucasian. Therefore, the final answer is [B].",
             "Therefore, the final answer is **[D]**.",
             "the final answer is [A]. No: the final answer is [C].", "It is probably B."):  # fmt: skip
    print(f"strict {parse_answer(text)!s:>4}   lenient {parse_answer_lenient(text)}")

# %% [markdown]
# :::{dropdown} Where these answers come from
# First line: "is C" of "is Caucasian" hits before anything else. Second: asterisks around the bracket are
# allowed, and the lenient list finds bold only without a bracket, then any bracket. Third: strict takes the
# last, lenient the first. Fourth: nothing was answered in the requested form.
# :::
#
# ### Step 5: log-likelihoods of four options, one pass
#
# The small models are scored by $\log p(\text{option}\mid\text{prompt})$. Four full passes would read the
# same prompt four times. Instead the four options are packed behind one prompt: every option token may look
# at the prompt and at the earlier tokens of its own option, and its position number continues the prompt's,
# as if the other three were not there. Logits are computed only where one is needed: at the end of the prompt
# and on the options.


# %%
def pack_options(prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]], pad_id: int):
    """One row per prompt: left padding, prompt, then the options without their last tokens.

    Returns (ids (B, L), position_ids (B, L), allowed (B, L, L) bool, prompt width). Raises ValueError for an
    empty prompt or option.
    """
    if not all(map(len, prompts)) or not all(len(o) for row in options for o in row):
        raise ValueError("prompts, options: none may be empty")
    width = max(map(len, prompts))
    tail = max(sum(len(o) - 1 for o in row) for row in options)
    length = width + -(-tail // 8) * 8  # attention kernels like multiples of 8
    ids, positions, segment = (np.full((len(prompts), length), fill) for fill in (pad_id, 0, -1))
    for r, (prompt, row) in enumerate(zip(prompts, options, strict=True)):
        start, at = width - len(prompt), width
        ids[r, start:width], segment[r, start:width] = prompt, 0
        positions[r, start:width] = np.arange(len(prompt))
        for k, option in enumerate(row):
            end = at + len(option) - 1
            ids[r, at:end], segment[r, at:end] = option[:-1], k + 1
            positions[r, at:end] = len(prompt) + np.arange(end - at)
            at = end
    segment = torch.from_numpy(segment)
    query, key = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(length, length).tril().bool()
    allowed = causal & (key >= 0) & ((key == 0) | (key == query))
    allowed |= torch.eye(length).bool()  # padding sees itself: a row of nothing would be NaN
    return torch.from_numpy(ids), torch.from_numpy(positions), allowed, width


# %%
@torch.no_grad()
def score_options(model, prompts, options, pad_id: int = 0) -> list[list[float]]:
    """log p(option | prompt), summed over tokens, for each option of each prompt: token ids in, nats out."""
    device = model.device
    ids, positions, allowed, width = (
        t.to(device) if isinstance(t, torch.Tensor) else t for t in pack_options(prompts, options, pad_id)
    )
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=device)
    mask = mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)[:, None]
    keep = torch.arange(width - 1, ids.shape[1], device=device)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
    ).logits.float()
    total = logits.logsumexp(-1)
    rows, at, target, which = [], [], [], []
    for r, row in enumerate(options):
        start = 1
        for k, option in enumerate(row):
            slots = [0, *range(start, start + len(option) - 1)]
            start += len(option) - 1
            rows += [r] * len(option)
            at, target, which = at + slots, target + list(option), which + [(r, k)] * len(option)
    picked = (logits[rows, at, target] - total[rows, at]).tolist()
    out = [[0.0] * len(row) for row in options]
    for (r, k), value in zip(which, picked, strict=True):
        out[r][k] += value
    return out


# %%
def padding_share(encoded: Sequence[tuple], batch_size: int) -> float:
    """Share of prompt slots that are padding when prompts are sorted by length."""
    lengths = sorted(len(prompt) for prompt, _ in encoded)
    rows = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(row) * len(row) for row in rows)


def score_encoded(model, encoded: Sequence[tuple], pad_id: int, batch_size: int) -> list[list[float]]:
    """`score_options` of many (prompt ids, option ids), in batches of similar length."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))  # so that padding is rare
    out: list[list[float]] = [[] for _ in encoded]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores = score_options(model, [encoded[i][0] for i in part], [encoded[i][1] for i in part], pad_id)
        for i, row in zip(part, scores, strict=True):
            out[i] = row
    return out


# %% [markdown]
# The peer, four independent passes with left padding, is also the oracle:


# %%
@torch.no_grad()
def score_options_four_passes(model, prompts, options, pad_id: int = 0) -> list[list[float]]:
    """The same numbers from one padded pass per option."""
    out: list[list[float]] = [[] for _ in prompts]
    for k in range(len(options[0])):
        rows = [[*p, *row[k]] for p, row in zip(prompts, options, strict=True)]
        length, longest = max(map(len, rows)), max(len(row[k]) for row in options)
        ids = torch.tensor([[pad_id] * (length - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=model.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1,
            use_cache=False,
        ).logits  # fmt: skip
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0]
        for r, row in enumerate(options):
            out[r].append(logp[r, longest - len(row[k]) :].sum().item())
    return out


# %% [markdown]
# ### Step 6: any model behind one interface
#
# `readrun.llm` has the backends that a real measurement needs: `TransformersLLM`, `OpenAILLM` for any
# OpenAI-compatible server, `ScriptedLLM` for tests. The chapter adds three. `SharedPrefixLLM` scores options
# as above. `RuleLLM` is the perfect reader: it knows the weights and reads only sentences about the patient.
# `BagOfFindings` knows the same weights and ignores who has what: every clinical word counts.


# %%
def as_text(tokenizer, messages) -> str:
    """A conversation under the chat template (none: joined by blanks); a begun answer stays open."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not tokenizer.chat_template:
        return " ".join(m["content"] for m in messages)
    begun = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )


# %%
class SharedPrefixLLM(LLM):
    """A `transformers` causal LM whose `loglik` reads each prompt once for all its continuations."""

    can_loglik = True

    def __init__(self, model, tokenizer, batch_size: int = 64, name: str = "shared prefix") -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.name = model.eval(), tokenizer, batch_size, name
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def encode(self, messages, continuations: Sequence[str] = ()) -> tuple[list[int], list[list[int]]]:
        """Token ids of a conversation and of its continuations.

        Raises ValueError for an unknown token, or if they do not fit into the model's context: nothing is
        ever cut off.
        """
        text = as_text(self.tokenizer, messages)
        prompt = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template).input_ids
        # a word-level tokenizer drops blanks; others carry them in the token
        options = [self.tokenizer(" " + c.strip(), add_special_tokens=False).input_ids for c in continuations]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and any(unknown in ids for ids in [prompt, *options]):
            raise ValueError("a token that the tokenizer does not have")
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if len(prompt) + max(map(len, options), default=1) > room:
            raise ValueError(f"{len(prompt)} tokens do not fit into the context of {room}")
        return prompt, options

    def _loglik(self, prompts, continuations):
        encoded = [self.encode(p, c) for p, c in zip(prompts, continuations, strict=True)]
        return score_encoded(self.model, encoded, self.pad_id, self.batch_size)

    def _generate(self, requests):
        return [continuations(self, request) for request in requests]


# %%
@torch.no_grad()
def continuations(llm: SharedPrefixLLM, request) -> list[Reply]:
    """The replies to one request, written by `model.generate`."""
    ids = torch.tensor([llm.encode(request.messages)[0]], device=llm.model.device)
    hot = {"temperature": request.temperature} if request.temperature > 0 else {}
    made = llm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_tokens, pad_token_id=llm.pad_id,
        num_return_sequences=request.n, do_sample=bool(hot), **hot,
    )[:, ids.shape[1] :]  # fmt: skip
    out = []
    for i, text in enumerate(llm.tokenizer.batch_decode(made, skip_special_tokens=True)):
        end = min((text.find(s) for s in request.stop if s in text), default=len(text))
        out.append(Reply(text[:end], usage=Usage(0 if i else ids.shape[1], made.shape[1])))
    return out


# %%
def read_question(messages) -> tuple[str, list[str]]:
    """(stem, options) of a prompt of this chapter, either style. Raises ValueError for any other text."""
    text = " ".join(m["content"] for m in messages)
    stem = re.search(r"Question:?\s+(.*?)\s+(?:## Choices|\[A\])", text, re.S)
    options = re.findall(r"\[[A-D]\](?: :)? (\w+)", text)
    if not stem or len(options) < 4:
        raise ValueError(f"prompt: not a question of this chapter: {text!r:.100}")
    return stem[1], options[:4]


class RuleLLM(LLM):
    """The perfect reader of a world's items: it reads chart sentences, applies W, and ignores the rest."""

    name, can_loglik = "perfect reader", True

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def findings(self, stem: str) -> dict[str, int]:
        """x_f of a stem."""
        found: dict[str, int] = {}
        for sentence in sentences(stem):
            for value in (-1, 1):  # "reports no rash" is no report of "no"
                hit = next((m for p in CHART[value] if (m := p.match(sentence))), None)
                if hit and hit["f"] in self.world.findings:
                    found[hit["f"]] = value
        return found

    def _loglik(self, prompts, continuations):
        out = []
        for messages, texts in zip(prompts, continuations, strict=True):
            x = self.findings(read_question(messages)[0])
            out.append([float(s) for s in self.world.scores(x, [t.strip() for t in texts])])
        return out

    def _generate(self, requests):
        out = []
        for request in requests:
            stem, options = read_question(request.messages)
            best, _ = self.world.decide(self.findings(stem), options)
            text = f"{ANSWER} {best} [{'ABCD'[options.index(best)]}]."
            out.append([Reply(text) for _ in range(request.n)])
        return out


# %%
class BagOfFindings(RuleLLM):
    """Blind to attribution: each clinical word of the stem counts, negated where its sentence negates."""

    name = "bag of findings"

    def findings(self, stem: str) -> dict[str, int]:
        """x_f as the sum of mentions, cut to -1, 0, 1."""
        x = dict.fromkeys(self.world.findings, 0)
        for sentence in sentences(stem):
            words = re.findall(r"[A-Za-z]+", sentence)
            sign = -1 if {"no", "No", "denies", "never", "free"} & set(words) else 1
            for word in words:
                if word in x:
                    x[word] += sign
        return {f: max(-1, min(1, v)) for f, v in x.items() if v}


# %% [markdown]
# ### Step 7: the harness


# %%
@dataclass(frozen=True, eq=False)
class Results:
    """Per item, in the order given: right, invalid (generate mode), index of the pick (-1: invalid)."""

    correct: np.ndarray  # (n,) bool
    invalid: np.ndarray  # (n,) bool
    picks: np.ndarray  # (n,) int
    logliks: np.ndarray | None = None  # (n, 4), loglik mode
    texts: list[str] | None = None  # generate mode

    @property
    def accuracy(self) -> float:
        """True accuracy: an invalid answer is wrong."""
        return float(self.correct.mean())

    @property
    def effective_accuracy(self) -> float:
        """Accuracy among the valid answers; NaN where there is none."""
        valid = ~self.invalid
        return float(self.correct[valid].mean()) if valid.any() else math.nan


def conversation(item: Item, style: str, mode: str) -> list[dict[str, str]]:
    """The messages of an item; in loglik mode (and in the short style) the assistant has begun its answer."""
    begun = [{"role": "assistant", "content": ANSWER}] if mode == "loglik" or style == "short" else []
    return [{"role": "user", "content": item_prompt(item, style)}, *begun]


# %%
def encode_items(
    llm: SharedPrefixLLM, items: Sequence[Item], style: str = "short", mode: str = "loglik"
) -> list:
    """[(prompt ids, option ids)] of items. Raises ValueError naming the item that cannot be read."""
    out = []
    for item in items:
        try:
            out.append(llm.encode(conversation(item, style, mode), item.options))
        except ValueError as error:
            raise ValueError(f"item {item.id}: {error}") from error
    return out


def evaluate(
    llm: LLM, items: Sequence[Item], mode: str = "loglik", style: str = "short", max_tokens: int = 8
):
    """Answers of a model: by the log-likelihood of the option texts, or by what it writes (greedily).

    Raises ValueError for an unknown mode, and naming the item: bad options, a text that does not fit or has
    unknown tokens, a log-likelihood that is not a number.
    """
    if mode not in ("loglik", "generate"):
        raise ValueError(f"mode: {mode!r}; accepted: loglik, generate")
    for item in items:
        check_item(item)
    if isinstance(llm, SharedPrefixLLM):
        encode_items(llm, items, style, mode)  # names the item that cannot be read
    talks = [conversation(item, style, mode) for item in items]
    right = np.array([item.options.index(item.answer) for item in items])
    if mode == "loglik":
        scores = np.array(llm.loglik_batch(talks, [list(item.options) for item in items]), float)
        for item, row in zip(items, scores, strict=True):
            if np.isnan(row).any():
                raise ValueError(f"item {item.id}: a log-likelihood is not a number: {row.tolist()}")
        picks = scores.argmax(1)
        return Results(picks == right, np.zeros(len(items), bool), picks, logliks=scores)
    texts = [replies[0].text for replies in llm.generate_batch(talks, max_tokens=max_tokens)]
    begun = ANSWER + " " if style == "short" else ""
    letters = [parse_answer(begun + text) for text in texts]
    picks = np.array(["ABCD".index(letter) if letter else -1 for letter in letters])
    return Results(picks == right, picks < 0, picks, texts=texts)


# %% [markdown]
# The perfect reader is right on every variant. The blind one loses where the inserted word belongs to a
# wrong option, and gains where it belongs to the right one: exactly the pattern that misattribution predicts.

# %%
# NBVAL_CHECK_OUTPUT
hand = make_variants(make_world(0, 24, 36, 6), 100, seed=1)
table = [" " * 16 + "".join(f"{name:>11}" for name in hand)]
for llm in (RuleLLM(make_world(0, 24, 36, 6)), BagOfFindings(make_world(0, 24, 36, 6))):
    table += [
        f"{llm.name:>16}" + "".join(f"{evaluate(llm, items).accuracy:11.2f}" for items in hand.values())
    ]
print("\n".join(table))

# %% [markdown]
# :::{dropdown} Where these numbers come from
# 1.00 everywhere in the first line: the sentences add nothing to $x$. In the second, *clean* is 1.00 because
# a chart alone has no other person in it; *neutral* is 1.00 because the sentence names no finding; *echo*
# repeats a finding and is cut to 1. A wrong option's finding adds 2 or 3 points to it, and a lead of 2 or 3
# is then gone (a tie goes to the option printed first).
# :::

# %% [markdown]
# ### Step 8: paired statistics
#
# The same $n$ items are answered twice. Let $b$ be the items that only the clean version got right, $c$ those
# that only the distracted version got right. The loss is $\Delta=(b-c)/n$, and two standard errors are on
# offer:
#
# $$
# \begin{aligned}
# SE_{\text{unpaired}}&=\sqrt{\frac{\hat p_b(1-\hat p_b)+\hat p_d(1-\hat p_d)}{n}},\\
# SE_{\text{paired}}&=\frac1n\sqrt{b+c-\frac{(b-c)^2}{n}} .
# \end{aligned}
# $$
#
# The first (the paper's, as far as its form is described) pretends that two different exams were taken. A
# hard item is hard both times, so the errors agree and the first is too wide.


# %%
def paired_stats(base: np.ndarray, dist: np.ndarray) -> dict[str, Any]:
    """Loss base - dist of two (n,) arrays of right/wrong on the same items.

    Returns delta, se_unpaired, se_paired, the exact McNemar p (statsmodels) and ci, 1.96 paired errors to
    either side. Raises ValueError unless both have the same positive length.
    """
    base, dist = np.asarray(base, bool), np.asarray(dist, bool)
    if base.shape != dist.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"base, dist: need equal lengths above 0, got {base.shape} and {dist.shape}")
    n, b, c = len(base), int((base & ~dist).sum()), int((~base & dist).sum())
    p, q, delta = base.mean(), dist.mean(), (b - c) / n
    paired = math.sqrt(b + c - (b - c) ** 2 / n) / n
    table = [[int((base & dist).sum()), b], [c, int((~base & ~dist).sum())]]
    return {
        "delta": delta, "se_unpaired": math.sqrt((p * (1 - p) + q * (1 - q)) / n), "se_paired": paired,
        "mcnemar_p": float(mcnemar(table, exact=True).pvalue),
        "ci": (delta - 1.96 * paired, delta + 1.96 * paired),
    }  # fmt: skip


def group_welch(drops_a: Sequence[float], drops_b: Sequence[float]) -> dict[str, float]:
    """Welch's t test between the losses of two groups of models: difference of means, t, p."""
    found = scipy.stats.ttest_ind(drops_a, drops_b, equal_var=False)
    difference = float(np.mean(drops_a) - np.mean(drops_b))
    return {"difference": difference, "t": float(found.statistic), "p": float(found.pvalue)}


# %%
# NBVAL_CHECK_OUTPUT
clean_right = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], bool)
after = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1], bool)
found = paired_stats(clean_right, after)
print(f"loss {found['delta']:.2f}, unpaired {found['se_unpaired']:.4f}, paired {found['se_paired']:.4f}, "
      f"McNemar p {found['mcnemar_p']:.3f}")  # fmt: skip

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Three items are lost ($b=3$), one is gained ($c=1$): $\Delta=2/10$. Unpaired:
# $\sqrt{(0.8\cdot0.2+0.6\cdot0.4)/10}=\sqrt{0.04}=0.2$. Paired: $\sqrt{4-4/10}/10=0.1897$. McNemar asks
# whether 3 of 4 changes in one direction are surprising for a fair coin: two-sided
# $p=2\cdot(4+1)/16=0.625$.
# :::
#
# **Better baseline, more robust?** The paper correlates the loss with the baseline accuracy over models. Two
# things are wrong with the obvious way. $\Delta$ contains the baseline's own noise, so a lucky baseline also
# looks like a large loss; and a model at chance has nothing to lose. So the items are split: the baseline
# comes from half A, the loss from half B; the loss is taken relative to what lies above chance; models below
# a floor are left out. Models of one training run are not independent, so whole runs are resampled.


# %%
FLOOR = 0.35  # clean accuracy below which a model is left out: it has hardly anything to lose


def half_split(base: np.ndarray, dist: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(baseline on half A, relative loss on half B, kept) of (models, items) arrays; halves by parity."""
    a, b = base[:, ::2].mean(1), base[:, 1::2].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = (b - dist[:, 1::2].mean(1)) / (b - 0.25)
    return a, relative, (a >= floor) & (b > 0.25)


# %%
def robustness_vs_baseline(base, dist, runs, floor: float = FLOOR, draws: int = 2000, seed: int = 0) -> dict:
    """Spearman's rho between baseline (half A) and relative loss (half B) over models.

    base, dist: (models, items) right/wrong, dist may be a mean over kinds; runs: (models,) cluster labels.
    Returns rho, low, high (95 %, cluster bootstrap over runs), naive (absolute loss, same items, no floor),
    n, and pseudo: jackknife pseudo-values {run: value} whose mean estimates rho, of the runs that have a
    model above the floor (the others change nothing and would only narrow the interval). NaN below 3 models.
    Raises ValueError for shapes that do not fit.
    """
    base, dist, runs = np.asarray(base, float), np.asarray(dist, float), np.asarray(runs)
    if base.shape != dist.shape or base.ndim != 2 or len(runs) != len(base):
        raise ValueError(f"base, dist, runs: shapes {base.shape}, {dist.shape}, {runs.shape} do not fit")
    a, relative, kept = half_split(base, dist, floor)

    def rho(rows: np.ndarray) -> float:
        rows = rows[kept[rows]]
        if len(rows) < 3 or len(set(a[rows])) < 2 or len(set(relative[rows])) < 2:
            return math.nan
        return float(scipy.stats.spearmanr(a[rows], relative[rows]).statistic)

    names, everything = np.unique(runs), np.arange(len(runs))
    whole, rng = rho(everything), np.random.default_rng(seed)
    of = {name: np.flatnonzero(runs == name) for name in names}
    boot = [rho(np.concatenate([of[n] for n in rng.choice(names, len(names))])) for _ in range(draws)]
    counted = [n for n in names if kept[of[n]].any()]
    k = len(counted)
    pseudo = {n: k * whole - (k - 1) * rho(np.flatnonzero(runs != n)) for n in counted} if k > 2 else {}
    low, high = np.nanpercentile(boot, [2.5, 97.5]) if np.isfinite(boot).any() else (math.nan, math.nan)
    drops = base.mean(1) - dist.mean(1)
    naive = scipy.stats.spearmanr(base.mean(1), drops).statistic if len(names) > 2 else math.nan
    return {"rho": whole, "low": float(low), "high": float(high), "naive": float(naive),
            "n": int(kept.sum()), "pseudo": {str(n): v for n, v in pseudo.items()}}  # fmt: skip


# %%
def size_at_matched_baseline(
    base, dist, sizes, floor: float = FLOOR, within: float = 0.03
) -> tuple[float, int]:
    """Mean relative loss of the smaller minus the larger model over pairs whose half-A baselines are close.

    sizes: (models,) parameters. Returns (difference, pairs); NaN and 0 where no pair is close.
    """
    a, relative, kept = half_split(np.asarray(base, float), np.asarray(dist, float), floor)
    pairs = [(i, j) for i in np.flatnonzero(kept) for j in np.flatnonzero(kept)
             if sizes[i] < sizes[j] and abs(a[i] - a[j]) <= within]  # fmt: skip
    return (float(np.mean([relative[i] - relative[j] for i, j in pairs])) if pairs else math.nan), len(pairs)


def coverage(table: Sequence[float], n: int, draws: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Does the 95 % interval cover the true loss? One (draws,) bool array per form of the standard error.

    table: true probabilities of (both right, only clean right, only distracted right, both wrong). Raises
    ValueError unless they are four that sum to 1.
    """
    table = np.asarray(table, float)
    if table.shape != (4,) or table.min() < 0 or not math.isclose(table.sum(), 1, abs_tol=1e-9):
        raise ValueError(f"table: {table.tolist()}; accepted: four probabilities that sum to 1")
    both, b, c, _ = np.random.default_rng(seed).multinomial(n, table, draws).T
    p, q, delta, true = (both + b) / n, (both + c) / n, (b - c) / n, table[1] - table[2]
    se = {
        "paired": np.sqrt(b + c - (b - c) ** 2 / n) / n,
        "unpaired": np.sqrt((p * (1 - p) + q * (1 - q)) / n),
    }
    return {name: np.abs(delta - true) <= 1.96 * value for name, value in se.items()}


# %% [markdown]
# ### Step 9: retrieved paragraphs
#
# The third probe puts one textbook paragraph in front of the question. The official code does not only take
# the most similar one: it sweeps the *rank*, from the best to far down the list, where the paragraph is
# irrelevant on purpose. The first and last sentence of a paragraph are dropped. Similarity is the cosine of
# two vectors; the encoder is an argument: here latent semantic analysis of the textbook (offline, from
# scikit-learn), for real data MedCPT through `transformers_encoder`.


# %%
def build_textbook(world: World, fillers: int = 400, seed: int = 0) -> list[str]:
    """One page per condition, then `fillers` paragraphs about other things (frames of the training split)."""
    rng, pages = random.Random(f"textbook {seed}"), []
    for d in world.conditions:
        weights = {f: world.weight(d, f) for f in world.findings}
        strong = [f for f, w in weights.items() if w >= 2]
        against, signs = [f for f, w in weights.items() if w < 0], world.typical(d)
        rng.shuffle(signs)
        lines = [
            f"This page is about {d}.",
            f"Typical of {d} are {', '.join(signs[:-1])} and {signs[-1]}.",
            f"Most often {d} begins with {rng.choice(strong or signs)}.",
            *(f"With {f} it is rarely {d}." for f in against), "See the next page for its relatives.",
        ]  # fmt: skip
        pages.append(" ".join(lines))
    for _ in range(fillers):
        frames = [f for group in TRAIN.nonliteral.values() for f in group] + [p[1] for p in TRAIN.bystander]
        words = rng.sample(TRAIN.neutral, 5)
        who = [dict(person=rng.choice(TRAIN.people), animal=rng.choice(TRAIN.animals)) for _ in words]
        pages.append(" ".join(
            fill(frame, rng.choice(list(SEXES)), rng, w=w, **names)
            for frame, w, names in zip(rng.sample(frames, 5), words, who, strict=True)
        ))  # fmt: skip
    return pages


def trim_edges(paragraph: str) -> str:
    """The paragraph without its first and last sentence. Raises ValueError if fewer than three."""
    parts = sentences(paragraph)
    if len(parts) < 3:
        raise ValueError(f"paragraph: needs three sentences or more: {paragraph!r:.80}")
    return " ".join(parts[1:-1])


def with_context(item: Item, paragraph: str) -> Item:
    """The item with a (trimmed) paragraph in its context section."""
    return dataclasses.replace(item, meta={**item.meta, "context": trim_edges(paragraph)})


# %%
def retrieve(
    encoder: Callable[[list[str]], np.ndarray], queries: list[str], paragraphs: list[str]
) -> np.ndarray:
    """Paragraph indices by falling cosine similarity, (queries, paragraphs); ties keep the paragraphs' order.

    encoder: texts -> (n, dim) vectors. Raises ValueError for no paragraphs or vectors that are not finite.
    """
    if not paragraphs or not queries:
        raise ValueError("queries, paragraphs: must not be empty")
    q, p = (
        torch.as_tensor(np.asarray(encoder(texts)), dtype=torch.float64) for texts in (queries, paragraphs)
    )
    if not torch.isfinite(q).all() or not torch.isfinite(p).all():
        raise ValueError("encoder: gave vectors that are not finite")
    similarity = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(p, dim=1).T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


def lsa_encoder(paragraphs: list[str], dim: int = 64) -> Callable[[list[str]], np.ndarray]:
    """Latent semantic analysis fitted on the paragraphs: tf-idf, then a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    dim = min(dim, len(paragraphs) - 1)
    return (
        make_pipeline(TfidfVectorizer(sublinear_tf=True), TruncatedSVD(dim, random_state=0))
        .fit(paragraphs)
        .transform
    )


# %%
def transformers_encoder(
    path: str, pooling: str = "cls", batch_size: int = 32
) -> Callable[[list[str]], np.ndarray]:
    """An encoder of the hub or a folder: the CLS vector (MedCPT) or the mean over tokens (MiniLM).

    Raises ValueError for another pooling.
    """
    if pooling not in ("cls", "mean"):
        raise ValueError(f"pooling: {pooling!r}; accepted: cls, mean")
    model = AutoModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")  # CLS stays in front

    @torch.no_grad()
    def encode(texts: list[str]) -> np.ndarray:
        rows = []
        for i in range(0, len(texts), batch_size):
            batch = tokenizer(texts[i : i + batch_size], padding=True, truncation=True, max_length=512,
                              return_tensors="pt")  # fmt: skip
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            rows.append(hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(rows).float().numpy()

    return encode


def bm25_ranks(queries: list[str], paragraphs: list[str]) -> np.ndarray | None:
    """Paragraph indices by falling BM25 score (the lexical peer), or None where bm25s is not installed."""
    try:
        import bm25s
    except ImportError:
        return None
    index = bm25s.BM25()
    index.index(bm25s.tokenize(paragraphs, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, return_ids=False, show_progress=False)
    return np.stack([np.argsort(-index.get_scores(row), kind="stable") for row in tokens])


# %% [markdown]
# ## Corrections
#
# What common summaries of the paper leave out or get wrong:
#
# - **Retrieval is a sweep over ranks**, not "the most similar paragraph" (step 9).
# - **Temperature is $10^{-9}$ with sampling on**, not 0, and answers are written reasoning read by patterns
#   whose order can misread them (step 4).
# - **The described standard error treats the two accuracies as independent**; they come from the same items.
#   The coverage of both forms is measured below (claim C7).
# - **"Better baseline, more robust" needs split halves and a floor** (step 8).
# - **The control is missing**: a harmless sentence of the same length without a clinical word (step 3).
# - A hand-written cosine is not needed; normalising and one matrix product are the library's.
#
# ## Experiment
#
# ### Training text and models
#
# A language model knows ordinary language before it sees medicine. The stand-in for that is *world text*:
# stories about named people and animals who have findings, words in their everyday sense, and questions such
# as "Who has fever?". A quarter of the training rows are of that kind; the rest are clean items. The frames
# are again others than those of any inserted sentence. Before that, a short phase of *facts* teaches what is
# typical of which condition and what speaks against it, in lists without prose: without it a small model
# copies one of the four names for hundreds of steps before it reads the chart at all.

# %% tags=["hide-input"]
NAMES = "Tom Anna Paul Mia Leo Ida Max Eva Jan Lea Ben Zoe Karl Nora Finn Clara".split()
STORY_HAVE = ["{x} has {f}.", "{x} got {f} yesterday.", "{x} woke up with {f}.", "Since Monday {x} has {f}."]
STORY_NOT = ["{x} has no {f}.", "{x} never had {f}.", "{x} is free of {f}."]
STORY_USE = {
    "thing": ["{x} painted a {w}.", "{x} found a {w} in a fairy tale."],
    "event": ["{x} talked about the {w} of the empire.", "{x} dreamed of {w} in the factory."],
    "idea": ["{x} admires the {w} of old films.", "{x} teaches the {w} of the stage."],
}


def story(world: World, rng: random.Random) -> tuple[str, str]:
    """(text with a question, answer) of world text: who has a finding, or whether somebody has it."""
    names = rng.sample(NAMES + [f"the {a}" for a in TRAIN.animals], 3)
    words, lines, has = rng.sample(world.findings, 3), [], {}
    for x, f in zip(names, words, strict=True):
        kind = rng.choice(("have", "have", "not", "use"))
        if kind == "use" and f in TRAIN_WORDS:
            lines.append(rng.choice(STORY_USE[sense_group(f)]).format(x=x, w=f))
        else:
            has[f] = x if kind == "have" else None
            lines.append(rng.choice(STORY_HAVE if kind == "have" else STORY_NOT).format(x=x, f=f))
    text = " ".join(line[0].upper() + line[1:] for line in lines)
    owned = [f for f in has if has[f]]
    if owned and rng.random() < 0.5:
        f = rng.choice(owned)
        return f"Story: {text} Who has {f}?", has[f].removeprefix("the ")
    f, x = rng.choice(words), rng.choice(names)
    return f"Story: {text} Does {x} have {f}?", "yes" if has.get(f) == x else "no"


# %%
def facts(world: World, seed: int, n: int) -> list[tuple[str, str]]:
    """n rows without prose: signs of a condition, or a whole chart with or without options; and the name."""
    rng, rows = random.Random(f"facts {seed}"), []
    for _ in range(n):
        kind, choices = rng.choice(("signs", "signs", "chart", "exam", "exam")), ""
        if kind == "signs":
            condition = rng.choice(world.conditions)
            signs = rng.sample(world.typical(condition), rng.choice((1, 2, 2, 3)))
        else:
            item = make_item(world, rng)
            condition, x = item.answer, list(item.findings.items())
            signs = [f"{'no ' * (v < 0)}{f}" for f, v in rng.sample(x, len(x))]
            if kind == "exam":
                choices = " " + " ".join(f"[{a}] {o}" for a, o in zip("ABCD", item.options, strict=True))
        rows.append((f"With {', '.join(signs)}:{choices} {ANSWER}", condition))
    return rows


def answer_text(item: Item, letters: bool = True) -> str:
    """What follows the begun answer: the option's text, then (letters) its letter."""
    letter = f" [{'ABCD'[item.options.index(item.answer)]}]."
    return item.answer + letter * letters


# %%
def training_rows(
    world: World, seed: int, n: int, story_share: float = 0.0, distract: float = 0.0,
    pages: Sequence[str] = (), letters: bool = True,
) -> list[tuple[str, str]]:  # fmt: skip
    """n rows (text, answer): world text, and items of which a share carries a sentence of the TRAIN split.

    pages: a textbook; then 40 % of the items have the right page as context, 60 % a random paragraph.
    """
    rng, rows = random.Random(f"training {seed} {distract} {len(pages)}"), []
    while len(rows) < n:
        if rng.random() < story_share:
            rows.append(story(world, rng))
            continue
        item = make_item(world, rng)
        if rng.random() < distract:
            kind = rng.choice(KINDS)
            if terms_for(item, world, kind, TRAIN):
                item = with_sentence(item, make_distractor(item, world, kind, rng, TRAIN))
        if pages:
            right = world.conditions.index(item.answer)
            item = with_context(item, pages[right if rng.random() < 0.4 else rng.randrange(len(pages))])
        rows.append((f"{item_prompt(item)} {ANSWER}", answer_text(item, letters)))
    return rows


# %%
PIECE = r"\[[A-D]\]|\w+|[^\w\s]"


@functools.lru_cache
def vocabulary() -> tuple[str, ...]:
    """Every word that any template, world or list of the chapter can produce, sorted."""
    texts = [
        *PRESENT, *ABSENT, *VITALS, OPENING, *QUESTIONS, *PLACES, *STORY_HAVE, *STORY_NOT, *NAMES, ANSWER,
    ]  # fmt: skip
    for t in (TRAIN, TEST):
        texts += [*t.people, *t.animals, *t.neutral, *(f for pair in t.bystander for f in pair)]
        texts += [f for group in t.nonliteral.values() for f in group]
    texts += [f for group in STORY_USE.values() for f in group] + [
        *POLYSEMOUS, *SINGLE, *map(str, range(130)),
    ]  # fmt: skip
    texts += ["Question: Context: Story: Who has Does have? yes no She Her He His she her he his woman man"]
    texts += [*build_textbook(make_world(0), 0), "The With . , : ? ! - [A] [B] [C] [D]"]
    texts += ["160 168 176 184 192"]
    words = {w for text in texts for w in re.findall(PIECE, re.sub(r"\{.*?\}", " ", text))}
    return tuple(sorted(words | {w[0].upper() + w[1:] for w in TRAIN.animals}))


# %%
def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the chapter; each condition, finding and bracketed letter is one token."""
    return lm.word_tokenizer(
        [" ".join(vocabulary()), " ".join(world.conditions)], pattern=PIECE, padding_side="left"
    )


def make_model(size: Sequence, tokenizer, seed: int) -> LlamaForCausalLM:
    """An untrained Llama; size: [hidden size, layers, heads, learning rate]."""
    hidden, layers, heads, _ = size
    config = lm.causal_config(
        "llama", tokenizer, width=hidden, depth=layers, heads=heads, context=320,
        intermediate_size=2 * hidden, initializer_range=hidden**-0.5,
    )  # fmt: skip
    return lm.causal_lm(config, seed).to(run.device)


# %%
def encode_rows(tokenizer, rows: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) of rows, right-padded to one length; labels are -100 but on the answers.

    Raises ValueError for a text with a word that the tokenizer does not have.
    """
    texts = tokenizer([text for text, _ in rows], add_special_tokens=False).input_ids
    answers = tokenizer([answer for _, answer in rows], add_special_tokens=False).input_ids
    length = max(len(t) + len(a) for t, a in zip(texts, answers, strict=True)) + 1
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for i, (t, a) in enumerate(zip(texts, answers, strict=True)):
        whole = [*t, *a, tokenizer.eos_token_id]
        if tokenizer.unk_token_id in whole:
            raise ValueError(f"row {i}: an unknown word in {rows[i]!r}")
        ids[i, : len(whole)] = torch.tensor(whole)
        labels[i, len(t) : len(whole)] = ids[i, len(t) : len(whole)]
    return ids, labels


def answer_loss(model, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; logits exist for these tokens only."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted])


def batches(ids: torch.Tensor, labels: torch.Tensor, steps: int, size: int, seed: int) -> Iterable:
    """`steps` batches of `size` rows, in a new order every epoch, on the run's device."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    ids, labels = ids.to(run.device), labels.to(run.device)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        rows, order = order[:size].to(run.device), order[size:]
        longest = int((ids[rows] != 0).sum(1).max()) if run.device == "cpu" else ids.shape[1]
        yield ids[rows, :longest], labels[rows, :longest]


# %% [markdown]
# ### Units: train, measure, save
#
# One unit trains one model, measures it and saves its picks (which option of each item, per variant) and, for
# the sizes that later units need, its weights. World and test items are the same for all seeds; a seed sets
# initial weights, training items and their order.


# %%
@functools.lru_cache(maxsize=4)
def clinic_of(seed: int, n_conditions: int, n_findings: int, families: int) -> tuple[World, Any]:
    """(world, tokenizer), made once per process."""
    made = make_world(seed, n_conditions, n_findings, families)
    return made, make_tokenizer(made)


@functools.lru_cache(maxsize=2)
def rows_of(
    world: tuple, seed: int, n: int, story_share: float, distract: float, fillers: int, letters: bool
):
    """Encoded training rows, made once per process and seed for all sizes."""
    made, tokenizer = clinic_of(*world)
    pages = build_textbook(made, fillers) if fillers else []
    return encode_rows(tokenizer, training_rows(made, seed, n, story_share, distract, pages, letters))


@functools.lru_cache(maxsize=2)
def facts_of(world: tuple, seed: int, n: int):
    """Encoded facts, made once per process and seed for all sizes."""
    made, tokenizer = clinic_of(*world)
    return encode_rows(tokenizer, facts(made, seed, n))


TEST_SEED = 1_000_000  # no training run has it


@functools.lru_cache(maxsize=2)
def exam(world: tuple, n: int) -> dict[str, list[Item]]:
    """The test items, all variants."""
    return make_variants(clinic_of(*world)[0], n, TEST_SEED)


@functools.lru_cache(maxsize=64)
def encoded_exam(world: tuple, n: int, variant: str) -> list:
    """Token ids of one variant, the same for all models."""
    llm = SharedPrefixLLM(make_model([8, 1, 1, 0], clinic_of(*world)[1], 0), clinic_of(*world)[1])
    return encode_items(llm, exam(world, n)[variant])


def picks_of(model, encoded: list, batch_size: int = 256) -> np.ndarray:
    """(n,) index of the likeliest option."""
    model.eval()
    return np.array(score_encoded(model, encoded, 0, batch_size)).argmax(1).astype(np.int8)


# %%
def no_stem(items: Sequence[Item]) -> list[Item]:
    """Calibration: the question alone, with the options in all four rotations."""
    bare = [dataclasses.replace(i, stem=sentences(i.stem)[-1], meta={}) for i in items]
    turned = lambda i, k: dataclasses.replace(i, options=i.options[k:] + i.options[:k])  # noqa: E731
    return [turned(i, k) for i in bare for k in range(4)]


def answers_of(items: Sequence[Item]) -> np.ndarray:
    """(n,) index of the right option."""
    return np.array([i.options.index(i.answer) for i in items])


def train_base(
    name: str, seed: int, size: list, world: dict, base: dict, test: dict, keep: bool
) -> dict[str, Any]:
    """Train a base model. Returns picks (moments, variants, n), no_stem accuracy, losses, its weights."""
    key, n = tuple(world.values()), test["n"]
    tokenizer = clinic_of(*key)[1]
    model, (steps, batch) = make_model(size, tokenizer, seed), base["facts"]
    known = facts_of(key, seed, 60 * batch)
    learn_facts = train.Updater(model, size[3], steps=steps, warmup=max(1, steps // 20))
    train.fit(learn_facts, batches(*known, steps, batch, seed), answer_loss, f"{name} seed {seed}: facts")
    data = rows_of(key, seed, base["pool"], base["story"], 0.0, 0, base["letters"])
    updater = train.Updater(model, size[3], steps=base["steps"], warmup=max(1, base["steps"] // 20))
    stream, losses, picks = iter(batches(*data, base["steps"], base["batch"], seed)), [], []
    for moment in base["moments"]:
        upto = round(moment * base["steps"]) - len(losses)
        losses += train.fit(updater, itertools.islice(stream, upto), answer_loss, f"{name} seed {seed}")
        picks.append([picks_of(model, encoded_exam(key, n, v)) for v in VARIANTS])
    bare = no_stem(exam(key, n)["clean"])
    llm = SharedPrefixLLM(model, tokenizer, 256)
    out = {"picks": np.array(picks), "losses": np.array(losses, np.float32)}
    out |= {"no_stem": evaluate(llm, bare).accuracy, "parameters": model.num_parameters()}
    return out | ({"state": model.state_dict()} if keep else {})


# %%
def restore(parent: Mapping, size: list, world: dict) -> tuple[LlamaForCausalLM, Any]:
    """(model, tokenizer) with the weights of a unit."""
    tokenizer = clinic_of(*world.values())[1]
    model = make_model(size, tokenizer, 0)
    model.load_state_dict(parent["state"])
    return model, tokenizer


def continue_arm(
    arm: str, name: str, seed: int, parent: Mapping, size: list, world: dict, base: dict, more: dict,
    test: dict, fillers: int,
) -> dict[str, Any]:  # fmt: skip
    """Continue a base model as medical, augmented or context: picks (variants, n); weights of context."""
    model, _ = restore(parent, size, world)
    key, distract = tuple(world.values()), 0.5 if arm == "augmented" else 0.0
    pool = round(3 * base["pool"] * (1 - base["story"])) if arm == "medical" else more["pool"]
    data = rows_of(
        key, seed + 500_000, pool, 0.0, distract, fillers if arm == "context" else 0, base["letters"]
    )
    updater = train.Updater(
        model, size[3] * more["lr_factor"], steps=more[arm], warmup=max(1, more[arm] // 20)
    )
    train.fit(updater, batches(*data, more[arm], base["batch"], seed), answer_loss, f"{arm} seed {seed}")
    picks = np.array([picks_of(model, encoded_exam(key, test["n"], v)) for v in VARIANTS])
    return {"picks": picks} | ({"state": model.state_dict()} if arm == "context" else {})


# %% [markdown]
# The sceptic's answer to all this is no training at all: delete every sentence whose subject is not the
# patient. Twenty lines, written without looking at the test frames.


# %%
PATIENT_SUBJECT = re.compile(
    r"^(He|She|The patient|A \d+-year-old \w+|Examination|There|No \w+ is|"
    r"(His|Her) (chart|pulse|temperature|blood))\b"
)


def drop_other_subjects(stem: str) -> str:
    """The stem without sentences whose subject is not the patient; the question stays."""
    *body, question = sentences(stem)
    return " ".join([*(s for s in body if PATIENT_SUBJECT.match(s)), question])


def rule_filter(name: str, seed: int, parent: Mapping, size: list, world: dict, test: dict) -> dict[str, Any]:
    """Picks (variants, n) of a base model that reads filtered stems."""
    model, tokenizer = restore(parent, size, world)
    llm, out = SharedPrefixLLM(model, tokenizer), []
    for items in exam(tuple(world.values()), test["n"]).values():
        filtered = [dataclasses.replace(i, stem=drop_other_subjects(i.stem)) for i in items]
        out.append(picks_of(model, encode_items(llm, filtered)))
    return {"picks": np.array(out)}


# %%
def rag_sweep(
    arm: str, name: str, seed: int, parent: Mapping, size: list, world: dict, test: dict, rag: dict
):
    """Right answers (conditions, n) with one paragraph: none, each rank, the right page, BM25's first."""
    model, tokenizer = restore(parent, size, world)
    key, llm = tuple(world.values()), SharedPrefixLLM(model, tokenizer)
    items, pages = (
        exam(key, test["n"])["clean"][: rag["items"]],
        build_textbook(clinic_of(*key)[0], rag["fillers"]),
    )
    queries = [f"{i.stem} {' '.join(i.options)}" for i in items]
    ranks, lexical = retrieve(lsa_encoder(pages), queries, pages), bm25_ranks(queries, pages)
    right = [clinic_of(*key)[0].conditions.index(i.answer) for i in items]
    chosen = {"clean": None} | {f"rank_{r}": ranks[:, r - 1] for r in rag["ranks"] if r <= len(pages)}
    chosen |= {"oracle": np.array(right)} | ({} if lexical is None else {"bm25": lexical[:, 0]})
    out, answers = {}, answers_of(items)
    for label, which in chosen.items():
        shown = (
            items if which is None else [with_context(i, pages[w]) for i, w in zip(items, which, strict=True)]
        )
        out[f"right__{label}"] = picks_of(model, encode_items(llm, shown)) == answers
    return out | {"hit": float((ranks[:, 0] == right).mean())}


# %%
def attribute(model, tokenizer, items: Sequence[Item]) -> tuple[float, float]:
    """|gradient x embedding| of best wrong minus right logit: at the inserted term, per chart finding.

    Both as a share of the stem's sum, mean over items.
    """
    shares = []
    for item in items:
        llm = SharedPrefixLLM(model, tokenizer)
        prompt, options = llm.encode(conversation(item, "short", "loglik"), item.options)
        embedded = model.get_input_embeddings()(torch.tensor([prompt], device=model.device)).detach()
        embedded.requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
        right = item.options.index(item.answer)
        first = [o[0] for o in options]
        wrong = max(logits[t] for i, t in enumerate(first) if i != right)
        (grad,) = torch.autograd.grad(wrong - logits[first[right]], embedded)
        size = (grad * embedded).sum(-1).abs()[0].detach().cpu().numpy()
        words = tokenizer.convert_ids_to_tokens(prompt)
        at = [i for i, w in enumerate(words) if w == item.meta["term"]]
        chart = [i for i, w in enumerate(words) if w in item.findings]
        whole = size[: words.index("[A]")].sum()  # the option names, which are copied, stand behind the stem
        shares.append((size[at].mean() / whole, size[chart].mean() / whole))
    return tuple(np.mean(shares, 0).tolist())


# %%
PLAY_ITEMS = 4


def look_inside(name: str, parent: Mapping, size: list, world: dict, test: dict, attribution: int):
    """Option probabilities (variants, items, 4) of the first items; attribution (kinds, 2)."""
    model, tokenizer = restore(parent, size, world)
    llm, found = SharedPrefixLLM(model.eval(), tokenizer), exam(tuple(world.values()), test["n"])
    logp = np.array([evaluate(llm, items[:PLAY_ITEMS]).logliks for items in found.values()])
    seen = [attribute(model, tokenizer, found[kind][:attribution]) for kind in ("nonliteral", "bystander")]
    return {"probabilities": scipy.special.softmax(logp, -1), "attribution": np.array(seen)}


def generate_letters(name: str, seed: int, parent: Mapping, size: list, world: dict, test: dict, count: int):
    """Generate mode: accuracy, invalid share, agreement with log-likelihoods and with the lenient parser."""
    model, tokenizer = restore(parent, size, world)
    llm, items = SharedPrefixLLM(model, tokenizer), exam(tuple(world.values()), test["n"])["clean"][:count]
    wrote, scored = evaluate(llm, items, "generate"), evaluate(llm, items)
    lenient = [parse_answer_lenient(f"{ANSWER} {t}") for t in wrote.texts]
    strict = [parse_answer(f"{ANSWER} {t}") for t in wrote.texts]
    named = [
        re.match(r"\s*(\w*)", t)[1] == i.options[p]
        for t, i, p in zip(wrote.texts, items, scored.picks, strict=True)
    ]
    return {
        "accuracy": wrote.accuracy, "invalid": float(wrote.invalid.mean()),
        "loglik_accuracy": scored.accuracy, "same_name": float(np.mean(named)),
        "parsers_differ": float(np.mean([a != b for a, b in zip(strict, lenient, strict=True)])),
        "texts": wrote.texts[:3],
    }  # fmt: skip


# %% [markdown]
# In order of importance: the base arm, largest size first; then the continued arms and the sceptic's rule on
# the main size; then retrieval and the views into models.

# %%
trained: dict[tuple[str, str, int], readrun.Unit] = {}
common = dict(world=S.world, test=S.test)
for s in run.seeds:
    for name in reversed(S.sizes):
        trained["base", name, s] = run.unit(
            train_base, name=name, seed=s, size=S.sizes[name], base=S.base, keep=name in S.keep, **common
        )
main = dict(name=S.main, size=S.sizes[S.main])
for s in run.seeds:
    for arm in ("medical", "augmented", "context"):
        if S.more[arm]:
            trained[arm, S.main, s] = run.unit(
                continue_arm, arm=arm, seed=s, parent=trained["base", S.main, s], base=S.base, more=S.more,
                fillers=S.rag["fillers"], **main, **common,
            )  # fmt: skip
    trained["rule", S.main, s] = run.unit(
        rule_filter, seed=s, parent=trained["base", S.main, s], **main, **common
    )
print(f"{sum(unit.done for unit in trained.values())} of {len(trained)} units are there")

# %%
swept: dict[tuple[str, int], readrun.Unit] = {}
for s in run.seeds[: len(run.seeds) if run.profile == "gpu" else 1]:
    for arm in ("base", "context"):
        if (arm, S.main, s) in trained:
            swept[arm, s] = run.unit(
                rag_sweep, arm=arm, seed=s, parent=trained[arm, S.main, s], rag=S.rag, **main, **common
            )
first = run.seeds[0]
inside = {
    name: run.unit(
        look_inside, name=name, parent=trained["base", name, first], size=S.sizes[name],
        attribution=S.attribution, **common,
    )
    for name in S.keep
}  # fmt: skip
letters = None
if S.generate:  # the models of the cpu profile are not trained to write a letter
    letters = run.unit(
        generate_letters, seed=first, parent=trained["base", S.main, first], count=S.generate, **main,
        **common,
    )  # fmt: skip
    if letters.done:
        print(f"the written name is the likeliest option: {letters['same_name']:.2f}; accuracy by the name's "
              f"log-likelihood\n{letters['loglik_accuracy']:.2f}, by the written letter "
              f"{letters['accuracy']:.2f}, invalid {letters['invalid']:.2f}; one text: "
              f"{letters['texts'][0]!r}")  # fmt: skip

# %% [markdown]
# Where the written name agrees with the likeliest option and the letter does not, the model knows the answer
# and has not learned where it stands in the list. All claims therefore use the log-likelihood of the name.
#
# ### Which interval is right?
#
# The two standard errors are put to the test: from the joint outcome that the main size really showed (both
# right, only clean right, only distracted right, both wrong), thousands of exams of 1,273 items are drawn,
# and the 95 % intervals that contain the true loss are counted.


# %%
def joint_table(clean: np.ndarray, other: np.ndarray) -> list[float]:
    """Shares of (both right, only clean, only other, both wrong)."""
    return [float(np.mean(a)) for a in (clean & other, clean & ~other, ~clean & other, ~clean & ~other)]


def simulate_coverage(table: list[float], n: int, draws: int) -> dict[str, Any]:
    """`coverage` as a unit."""
    return coverage(table, n, draws)


key = tuple(S.world.values())
answers = answers_of(exam(key, S.test["n"])["clean"])
mains = [trained["base", S.main, s] for s in run.seeds if trained["base", S.main, s].done]
covered = None
if mains:
    right = np.array([u["picks"][-1] == answers for u in mains])  # (seeds, variants, n)
    table = joint_table(right[:, 0].ravel(), right[:, list(VARIANTS).index("nonliteral")].ravel())
    covered = run.unit(simulate_coverage, table=table, **S.coverage)
    if covered.done:
        shares = {form: covered[form].mean() for form in ("paired", "unpaired")}
        print("intervals that contain the true loss:", ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))

# %% [markdown]
# ### Cost of scoring
#
# At the real dimensions of Llama-3-8B with random weights (time depends on shapes only): a batch of prompts,
# four options each. A pass costs about $2N$ operations per token for $N$ parameters outside the embedding, so
# what counts is how many tokens are read: $P+4(L-1)$ per item with one shared prompt of $P$ tokens and
# options of $L$ (the last token of an option is only looked up), $4(P+L)$ with four passes. Their ratio is
# the most that sharing can gain.

# %%
one_prompt, one_option = S.score["prompt"], S.score["option"]
packed, four_times = one_prompt + 4 * (one_option - 1), 4 * (one_prompt + one_option)
print(
    f"tokens per item: shared {packed}, four passes {four_times}: a factor {four_times / packed:.2f} at best"
)


# %%
def bench_scoring(
    batch: int, prompt: int, option: int, repeats: int, items: int, shape: list[int]
) -> dict[str, Any]:
    """Seconds per item of the shared pass, of four passes, and of `generate` item by item; share of the peak.

    loglik_error: largest difference of the two in float32 on a small model of the same family.
    """
    hidden, layers, heads, groups, mlp, vocabulary_size = shape
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=mlp, vocab_size=vocabulary_size, max_position_embeddings=8192, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    kind = torch.bfloat16 if run.device == "cuda" else torch.float32
    model, rng = bench.random_model(LlamaForCausalLM, config, kind, run.device), np.random.default_rng(0)
    draw = lambda *size: rng.integers(1, vocabulary_size, size).tolist()  # noqa: E731
    prompts, options = draw(batch, prompt), draw(batch, 4, option)
    arms = {"shared": score_options, "four_passes": score_options_four_passes}
    out: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(repeats + 1):
        for name, call in arms.items():
            start = time.perf_counter()
            call(model, prompts, options)  # returns numbers: the queue is drained
            out[name] += [batch / (time.perf_counter() - start)] if i else []
    start = time.perf_counter()
    for ids in torch.tensor(prompts[:items], device=run.device)[:, None]:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=option, do_sample=False)
    generated = items / (time.perf_counter() - start)
    body = sum(p.numel() for p in model.model.layers.parameters())
    tokens = prompt + 4 * (option - 1)  # the last token of an option is only looked up
    scored = 1 + 4 * (option - 1)  # positions with logits
    flop = (
        2 * body * tokens
        + 2 * hidden * vocabulary_size * scored
        + 2 * layers * hidden * tokens * (prompt + option)
    )
    limit = peak_flops(kind)
    small = make_model([64, 2, 2, 0], clinic_of(*S.world.values())[1], 0)
    few = [(np.array(rows[:4]) % 300 + 3).tolist() for rows in (prompts, options)]
    a, b = (np.array(call(small, *few)) for call in arms.values())
    return {
        "shared": np.array(out["shared"]), "four_passes": np.array(out["four_passes"]), "generate": generated,
        "mfu": np.array(out["shared"]) * flop / limit, "gflop": flop / 1e9, "limit": limit / flop,
        "loglik_error": float(np.abs(a - b).max()),
    }  # fmt: skip


# %%
def peak_flops(kind: torch.dtype) -> float:
    """Dense bf16 peak of an H100 or H200 (989 TFLOP/s); elsewhere what a matrix product reaches here."""
    name = torch.cuda.get_device_name() if run.device == "cuda" else ""
    if any(known in name for known in ("H100", "H200")):
        return 989e12
    return 1e12 * bench.ceilings(run.device, kind)["matmul_tflop_s"]


# %%
scored = run.unit(bench_scoring, **S.score)

# %% [markdown]
# ### Results of this run
#
# All measurements in one place, with the verdicts that follow from them. Derived metrics: the correlation of
# claim C2 and its naive form (one jackknife value per training run), and how much of half a loss is left
# after training with distractors (C6).


# %%
def clean_and_distracted(arrays: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """(models, items) right answers: clean, and the mean over nonliteral and bystander."""
    n = int(arrays["correct/n"][0])
    right = {k: np.unpackbits(arrays[f"correct/{k}"], axis=1)[:, :n].astype(float)
             for k in ("clean", "nonliteral", "bystander")}  # fmt: skip
    return right["clean"], (right["nonliteral"] + right["bystander"]) / 2


def robustness_rho(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """C2: pseudo-values of the split-half correlation, one per training run with a model above the floor."""
    if "correct/clean" not in arrays:
        return {}
    found = robustness_vs_baseline(*clean_and_distracted(arrays), arrays["correct/runs"], draws=1)
    values = list(found["pseudo"].values())
    return {"base": values} if values and np.isfinite(values).all() else {}


def robustness_naive(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """C2b: pseudo-values of the naive correlation, one per training run."""
    runs = np.asarray(arrays.get("correct/runs", []))
    if (k := len(set(runs.tolist()))) < 3:
        return {}
    base, dist = (values.mean(1) for values in clean_and_distracted(arrays))
    rho = lambda rows: scipy.stats.spearmanr(base[rows], (base - dist)[rows]).statistic  # noqa: E731
    whole = rho(runs >= 0)
    values = [float(k * whole - (k - 1) * rho(runs != name)) for name in np.unique(runs)]
    return {"base": values} if np.isfinite(values).all() else {}


def half_drop_left(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """C6: drop(base) / 2 - drop(augmented) by kind, one value per seed that both arms have."""
    out = {}
    for kind in ("nonliteral", "bystander"):
        found = metrics.get(f"drop_{kind}", {})
        if "base" in found and "augmented" in found:
            seeds = {arm: arrays.get(f"seeds/drop_{kind}/{arm}", range(len(found[arm]))) for arm in found}
            by_seed = {arm: dict(zip(map(int, seeds[arm]), found[arm], strict=True)) for arm in found}
            base, augmented = by_seed["base"], by_seed["augmented"]
            out[kind] = [base[s] / 2 - augmented[s] for s in base if s in augmented]
    return {kind: values for kind, values in out.items() if values}


# %% tags=["hide-input"]
def rights(arm: str, name: str) -> np.ndarray:
    """(seeds, variants, n) right answers at the end of training, of the seeds that are there."""
    units = [trained.get((arm, name, s)) for s in run.seeds]
    picks = [
        u["picks"][-1] if u["picks"].ndim == 3 else u["picks"] for u in units if u is not None and u.done
    ]
    return np.array(picks) == answers if picks else np.zeros((0, len(VARIANTS), len(answers)), bool)


def gather_accuracy(metrics: dict, arrays: dict) -> None:
    """Accuracies and drops per seed."""
    at = {v: i for i, v in enumerate(VARIANTS)}
    for name in S.sizes:
        right = rights("base", name).mean(2)
        if len(right):
            arrays[f"accuracy/{name}"] = right
            units = [trained["base", name, s] for s in run.seeds]
            arrays[f"parameters/{name}"] = np.array([next(u["parameters"] for u in units if u.done)])
    largest = list(S.sizes)[-1]
    if len(right := rights("base", largest).mean(2)):
        metrics["accuracy_largest"] = {v: right[:, i].tolist() for v, i in at.items()}
        bare = [trained["base", largest, s] for s in run.seeds]
        metrics["no_stem_excess"] = {"base": [u["no_stem"] - 0.25 for u in bare if u.done]}
    for arm in ("base", "medical", "augmented", "rule"):
        if len(right := rights(arm, S.main).mean(2)):
            arrays[f"arm/{arm}"] = right
            seeds = [s for s in run.seeds if trained[arm, S.main, s].done]
            by_seed = lambda values: dict(zip(seeds, values.tolist(), strict=True))  # noqa: B023, E731
            metrics.setdefault("accuracy_clean", {})[arm] = by_seed(right[:, 0])
            for kind in ("nonliteral", "bystander"):
                metrics.setdefault(f"drop_{kind}", {})[arm] = by_seed(right[:, 0] - right[:, at[kind]])


# %% tags=["hide-input"]
def gather_models(metrics: dict, arrays: dict) -> None:
    """Twins of C1; right answers of every base model at every moment, packed, for C2."""
    at, largest = {v: i for i, v in enumerate(VARIANTS)}, list(S.sizes)[-1]
    twins = np.array([i.meta["twin"] for i in exam(key, S.test["n"])["neutral"]])
    if len(right := rights("base", largest)):
        for kind in ("nonliteral", "bystander"):  # on the items whose control has the frame of this kind
            both = right[:, [at[kind], at["neutral"]]][:, :, twins == kind].mean(2)
            metrics[f"accuracy_twins_{kind}"] = {kind: both[:, 0].tolist(), "neutral": both[:, 1].tolist()}
    packed, runs, sizes = {k: [] for k in ("clean", "neutral", "nonliteral", "bystander")}, [], []
    for i, unit in enumerate(u for k, u in trained.items() if k[0] == "base" and u.done):
        for moment in unit["picks"] == answers:
            runs.append(i)
            sizes.append(unit["parameters"])
            for kind in packed:
                packed[kind].append(np.packbits(moment[at[kind]]))
    if runs:
        arrays |= {f"correct/{kind}": np.array(rows) for kind, rows in packed.items()}
        arrays |= {"correct/n": np.array([len(answers)]), "correct/runs": np.array(runs)}
        arrays["correct/sizes"] = np.array(sizes)
        arrays["cluster/run/robustness_naive"] = np.unique(runs)
        kept = half_split(*clean_and_distracted(arrays), FLOOR)[2]
        arrays["cluster/run/robustness_rho"] = np.unique(np.array(runs)[kept])


# %% tags=["hide-input"]
def gather_mechanism(metrics: dict, arrays: dict) -> None:
    """C5: whose option new errors pick, and wrong answers mended; pooled over sizes, one value per seed.

    owner_share of neutral: the same owners, of a term that the neutral sentence does not name.
    """
    found, at = exam(key, S.test["n"]), {v: i for i, v in enumerate(VARIANTS)}
    for s in run.seeds:
        hits, errors = Counter(), Counter()
        mended = {"congruent": 0, "neutral": 0, "wrong": 0}
        for name in S.sizes:
            if not (unit := trained["base", name, s]).done:
                continue
            picks = unit["picks"][-1]
            right = picks == answers
            owners = np.array([i.options.index(i.meta["owner"]) for i in found["nonliteral"]])
            for kind, arm in (("nonliteral", "base"), ("bystander", "base"), ("neutral", "neutral")):
                new = right[at["clean"]] & ~right[at[kind]]
                errors[arm] += int(new.sum())
                hits[arm] += int((picks[at[kind]] == owners)[new].sum())
            wrong = ~right[at["clean"]]
            mended["wrong"] += wrong.sum()
            for kind in ("congruent", "neutral"):
                mended[kind] += right[at[kind]][wrong].sum()
        for arm, count in errors.items():
            if count:
                metrics.setdefault("owner_share", {}).setdefault(arm, {})[s] = hits[arm] / count
        if mended["wrong"]:
            for kind in ("congruent", "neutral"):
                share = float(mended[kind] / mended["wrong"])
                metrics.setdefault("mended_share", {}).setdefault(kind, []).append(share)


# %% tags=["hide-input"]
def whose_page(ranks: Sequence[int]) -> np.ndarray:
    """(ranks, 4) shares: the right option's page, a wrong option's, another condition's, a filler."""
    made, items = clinic_of(*key)[0], exam(key, S.test["n"])["clean"][: S.rag["items"]]
    pages = build_textbook(made, S.rag["fillers"])
    order = retrieve(lsa_encoder(pages), [f"{i.stem} {' '.join(i.options)}" for i in items], pages)
    of = [*made.conditions, *[""] * S.rag["fillers"]]
    kinds = lambda i, d: [d == i.answer, d != i.answer and d in i.options, d not in i.options and d, not d]  # noqa: E731
    shares = [[kinds(i, of[row[r - 1]]) for i, row in zip(items, order, strict=True)] for r in ranks]
    return np.array([np.array(rank, bool).mean(0) for rank in shares])


def gather_rag(metrics: dict, arrays: dict) -> None:
    """C4: accuracies on half B, per seed; the best rank is chosen on half A."""
    for arm, metric in (("base", "accuracy_rag"), ("context", "accuracy_rag_trained")):
        best = []
        for unit in [u for (a, _), u in swept.items() if a == arm and u.done]:
            right = {k.removeprefix("right__"): unit[k] for k in unit if k.startswith("right__")}
            values = {label: float(v[1::2].mean()) for label, v in right.items()}
            ranks = [label for label in right if label.startswith("rank_")]
            best.append(max(ranks, key=lambda r: right[r][::2].mean()))
            values["best_rank"] = values[best[-1]]
            for label, value in values.items():
                metrics.setdefault(metric, {}).setdefault(label, []).append(value)
        if best:
            arrays[f"rag_best/{arm}"] = np.array([int(label[5:]) for label in best])
            arrays["rag_ranks"] = np.array([int(label[5:]) for label in ranks])
    if "rag_ranks" in arrays:
        arrays["rag_pages"] = whose_page(arrays["rag_ranks"])


# %% tags=["hide-input"]
def gather_rest(metrics: dict, arrays: dict) -> None:
    """The perfect reader, coverage, cost, the views into models."""
    reader, blind = RuleLLM(clinic_of(*key)[0]), BagOfFindings(clinic_of(*key)[0])
    found = exam(key, S.test["n"])
    wrong = [~evaluate(reader, items).correct for items in found.values()]
    metrics["rule_reader_errors"] = {"all_variants": [int(np.sum(wrong))]}
    arrays["reader/blind"] = np.array([evaluate(blind, items).accuracy for items in found.values()])
    if covered is not None and covered.done:
        metrics["coverage"] = {form: covered[form].astype(float).tolist() for form in ("paired", "unpaired")}
        metrics["coverage_error"] = {"paired": (covered["paired"] - 0.95).tolist()}
    if scored.done:
        metrics["items_per_second"] = {arm: scored[arm].tolist() for arm in ("shared", "four_passes")}
        metrics["mfu"] = {"shared": scored["mfu"].tolist()}
        metrics["loglik_error"] = {"shared": [scored["loglik_error"]]}
        arrays["score"] = np.array([scored["generate"], scored["gflop"], scored["limit"]])
        arrays["score_shape"] = np.array(
            [*(S.score[k] for k in ("batch", "prompt", "option")), *S.score["shape"]]
        )
    for name, unit in inside.items():
        if unit.done:
            arrays[f"probabilities/{name}"] = unit["probabilities"].astype(np.float32)
            arrays[f"attribution/{name}"] = unit["attribution"]
    if letters is not None and letters.done:
        arrays["letters"] = np.array(
            [letters[k] for k in ("loglik_accuracy", "accuracy", "invalid", "parsers_differ")]
        )


# %%
metrics: dict[str, dict] = {}
arrays: dict[str, np.ndarray] = {}
for collect in (gather_accuracy, gather_models, gather_mechanism, gather_rag, gather_rest):
    collect(metrics, arrays)
here = run.results(metrics=metrics, arrays=arrays)
book = run.recorded()

# %% [markdown]
# Figures are functions of results, so that the recorded run can be drawn anywhere. Where this page was
# rendered from the recorded units, they are shown here once; elsewhere the recorded ones follow under *GPU
# experiment*. First accuracy by variant, for every size; then the losses with both standard errors.

# %% tags=["figure", "hide-input"]
LABELS = list(VARIANTS)


def wrapped(lines: Iterable[str]) -> str:
    """Lines of text, broken so that a page need not scroll."""
    return "\n".join(textwrap.fill(line, 84, subsequent_indent="    ") for line in lines)


STYLE = plots.arms(["nonliteral", "bystander", "neutral", "congruent", "echo", "clean"])


def sizes_of(results, prefix: str) -> list[str]:
    """Sizes that have an array of this kind, smallest first."""
    names = [k.partition("/")[2] for k in results.arrays if k.startswith(f"{prefix}/")]
    return sorted(names, key=lambda n: float(results.arrays[f"parameters/{n}"][0]))


def half_width(values: np.ndarray, n: int) -> float:
    """Half of the 95 % interval of a mean accuracy: t over three seeds or more, else binomial over items."""
    if len(values) > 2:
        return plots.t_half(values)
    return 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / (n * len(values)))


def draw_variants(results):
    """Accuracy per variant and size, mean over seeds with its 95 % interval."""
    figure, ax = plt.subplots(figsize=(8.2, 3.4))
    sizes = sizes_of(results, "accuracy")
    for i, variant in enumerate(LABELS):
        values = [results.arrays[f"accuracy/{n}"][:, i] for n in sizes]
        at = np.arange(len(sizes)) + (i - 2.5) * 0.13
        half = [half_width(v, int(results.arrays["correct/n"][0])) for v in values]
        ax.bar(at, [v.mean() for v in values], 0.12, yerr=half, color=STYLE[variant]["color"], label=variant,
               error_kw=dict(elinewidth=1))  # fmt: skip
    ax.axhline(0.25, color="#000000", linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_ylim(0, 1)
    ax.legend(ncols=3, fontsize=9, loc="upper left", bbox_to_anchor=(0, 1.28))
    plots.label(ax, "hidden size x layers", "accuracy (1)")
    return figure


# %% tags=["figure", "hide-input"]
VARIANTS_ALT = (
    "Bars of accuracy for each model size and six variants of the same items: clean, neutral, nonliteral, "
    "bystander, congruent, echo. A dotted line marks chance at 0.25."
)
if sizes_of(here, "accuracy"):
    plots.show(
        draw_variants(here), alt=f"This run. {VARIANTS_ALT}",
        caption=f"This run ({here.profile}): the same items with each kind of inserted sentence.",
    )  # fmt: skip


# %% tags=["hide-input"]
def losses(results) -> list[dict]:
    """One row per model and kind: loss against clean, both standard errors, McNemar with Holm."""
    if "correct/clean" not in results.arrays:
        return []
    n, rows, ps = int(results.arrays["correct/n"][0]), [], []
    right = {k.partition("/")[2]: np.unpackbits(v, axis=1)[:, :n].astype(bool)
             for k, v in results.arrays.items() if k.startswith("correct/") and v.ndim == 2}  # fmt: skip
    for model, parameters in enumerate(results.arrays["correct/sizes"].tolist()):
        for kind in ("neutral", "nonliteral", "bystander"):
            found = paired_stats(right["clean"][model], right[kind][model])
            rows.append({
                "model": model, "parameters": parameters, "kind": kind, "loss": found["delta"],
                "SE paired": found["se_paired"], "SE unpaired": found["se_unpaired"],
                "McNemar p": found["mcnemar_p"],
            })  # fmt: skip
            ps.append(found["mcnemar_p"])
    for row, kept in zip(rows, multipletests(ps, method="holm")[0], strict=True):
        row["after Holm"] = "loss" if kept and row["loss"] > 0 else "gain" if kept else "–"
    return rows


shown_losses = losses(here)
both = {
    kind: [r for r in shown_losses if r["kind"] == kind] for kind in ("neutral", "nonliteral", "bystander")
}
for kind, rows in both.items():
    count = sum(r["after Holm"] == "loss" for r in rows)
    print(f"{kind}: {count} of {len(rows)} models lose significantly (McNemar, Holm over all rows)")
small, large = (here.arrays.get(f"accuracy/{n}") for n in (list(S.sizes)[0], list(S.sizes)[-1]))
if small is not None and large is not None and min(len(small), len(large)) > 1 and small is not large:
    drop = [a[:, 0] - a[:, [2, 3]].mean(1) for a in (small, large)]
    welch = group_welch(*drop)
    print(f"Welch's t, loss of the smallest size minus that of the largest: {welch['difference']:+.3f}, "
          f"t {welch['t']:.2f}, p {welch['p']:.3f}")  # fmt: skip
moments = len(S.base["moments"])
ends = [
    r for r in shown_losses if r["model"] // moments < len(S.sizes) and r["model"] % moments == moments - 1
]
tables.grid(
    [{k: v for k, v in row.items() if k != "model"} for row in ends if row["kind"] != "neutral"],
    caption="One trained model of every size: loss against the clean items, and both standard errors.",
)

# %% [markdown]
# Two ways in which these losses could come from something else. The control mixes the frames of both kinds;
# so each kind is also compared on the items whose control is its twin. And an error in favour of the option
# that owns the term proves little by itself: the owner is often the best wrong answer of the chart alone,
# because an option whose findings the chart denies is rarely the owner. The same share is therefore taken of
# the errors under a neutral sentence, which does not name the term.


# %% tags=["hide-input"]
def tell_controls(results) -> str:
    """Twins, and the owner's share with its control."""
    found, lines = results.metrics, []
    mean = lambda metric, arm: float(np.mean(found[metric][arm]))  # noqa: E731
    for kind in ("nonliteral", "bystander"):
        if (metric := f"accuracy_twins_{kind}") in found:
            a, b = mean(metric, kind), mean(metric, "neutral")
            lines.append(f"{kind}, largest size: accuracy {a:.3f}, its neutral twins {b:.3f}: {a - b:+.3f}")
    if {"base", "neutral"} <= found.get("owner_share", {}).keys():
        a, b = mean("owner_share", "base"), mean("owner_share", "neutral")
        lines.append(
            f"new errors that pick the owner: {a:.2f}; under a neutral sentence {b:.2f}; chance 0.33"
        )
    return wrapped(lines) or "not run here"


print(tell_controls(here))

# %% [markdown]
# Does a better baseline go with a smaller loss? Split halves (dots) and, faded, the naive way.


# %% tags=["figure", "hide-input"]
def draw_robustness(results):
    """Relative loss (half B) against baseline (half A), all models; the naive absolute loss behind."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    base, dist = clean_and_distracted(results.arrays)
    a, relative, kept = half_split(base, dist, FLOOR)
    ax.plot(base.mean(1), base.mean(1) - dist.mean(1), "s", color="#bbbbbb", markersize=4,
            label="naive: absolute loss")  # fmt: skip
    ax.plot(a[kept], relative[kept], "o", color=plots.PALETTE[0], markersize=5,
            label="split halves: relative loss")  # fmt: skip
    ax.axvline(FLOOR, color="#555555", linewidth=0.8, linestyle=":")
    ax.axhline(0, color="#555555", linewidth=0.8)
    ax.legend(fontsize=9)
    plots.label(ax, "clean accuracy (1)", "loss (1)")
    return figure


ROBUST_ALT = (
    "Scatter of models: relative loss on one half of the items against clean accuracy on the other half, "
    "with the naive absolute loss in grey behind it. A dotted line marks the floor of 0.35."
)


# %% tags=["hide-input"]
def by_size(results, base: np.ndarray, dist: np.ndarray) -> str:
    """rho without each size in turn, and within each size: whether one size or training time carries it."""
    sizes = results.arrays["correct/sizes"]
    if len(names := np.unique(sizes)) < 3:
        return ""
    a, relative, kept = half_split(base, dist, FLOOR)
    without, within = (
        [scipy.stats.spearmanr(a[kept & w], relative[kept & w]).statistic for w in which]
        for which in ([sizes != n for n in names], [sizes == n for n in names])
    )
    told = " ".join(f"{v:+.2f}" for v in without), " ".join(f"{v:+.2f}" for v in within)
    return f"rho without one size, smallest first: {told[0]}; within one size: {told[1]}"


# %% tags=["hide-input"]
def tell_robustness(results) -> str:
    """The correlation with its cluster bootstrap, the naive one, the effect of size at equal baselines."""
    base, dist = clean_and_distracted(results.arrays)
    found = robustness_vs_baseline(base, dist, results.arrays["correct/runs"], draws=S.coverage["draws"] // 2)
    if found["n"] < 3:
        return f"{found['n']} models above the floor: too few for a correlation"
    gap, pairs = size_at_matched_baseline(base, dist, results.arrays["correct/sizes"])
    matched = f"at equal baselines (within 0.03, {pairs} pairs) the smaller loses {gap:+.3f} more"
    matched = matched if pairs else "no two sizes with equal baselines"
    rho = f"rho {found['rho']:.2f} [{found['low']:.2f}, {found['high']:.2f}] over {found['n']} models"
    return wrapped([f"{rho}, naive {found['naive']:.2f}", matched, by_size(results, base, dist)])


if "correct/clean" in here.arrays:
    plots.show(
        draw_robustness(here), alt=f"This run. {ROBUST_ALT}", caption="Every dot is one model at one moment."
    )
    print(tell_robustness(here))


# %% [markdown]
# One item in full, its inserted sentence in orange, and what the smallest and the largest saved model make
# of it:


# %% tags=["figure", "hide-input"]
def draw_item(results, index: int = 0, kind: str = "nonliteral"):
    """A stem with its inserted sentence, and option probabilities before and after, two sizes."""
    item, sizes = exam(key, S.test["n"])[kind][index], sizes_of(results, "probabilities")
    sizes = [sizes[0], sizes[-1]] if len(sizes) > 1 else sizes
    figure = plt.figure(figsize=(6.4, 5.0))
    grid = figure.add_gridspec(2, len(sizes), height_ratios=[1.2, 1])
    top, lines = figure.add_subplot(grid[0, :]), sentences(item.stem)
    for i, line in enumerate(lines):
        colour = plots.PALETTE[1] if line == item.meta["sentence"] else "#000000"
        top.text(0.01, 0.96 - 0.96 * i / len(lines), line, fontsize=10, va="top", color=colour)
    top.set(xticks=[], yticks=[])
    top.grid(False)
    plots.label(top, f"right: {item.answer}; owner of the term: {item.meta['owner']}", "stem")
    for column, size in enumerate(sizes):
        p, ax = results.arrays[f"probabilities/{size}"], figure.add_subplot(grid[1, column])
        for k, (name, v) in enumerate({"clean": 0, kind: LABELS.index(kind)}.items()):
            ax.barh(np.arange(4) + (k - 0.5) * 0.38, p[v, index], 0.36, color=plots.PALETTE[k], label=name)
        ax.set_yticks(range(4), [""] * 4 if column else item.options)
        ax.set_xlim(0, 1)
        ax.invert_yaxis()
        plots.label(ax, "probability (1)", " " if column else "option", size)
    ax.legend(fontsize=9)
    return figure


if sizes_of(here, "probabilities"):
    plots.show(
        draw_item(here),
        alt="A case in words with its inserted sentence in orange; below it bars of the four options' "
        "probabilities without and with that sentence, for the smallest and the largest saved size.",
        caption="The sentence concerns nobody in the room; the answer of the clinic is the same.",
    )
else:
    print("not measured in this run (look_inside); the same items can be played with below")

# %% [markdown]
# The continued arms and the sceptic's rule, on the main size; a loss is the first column minus another:


# %% tags=["hide-input"]
def arms_table(results) -> list[dict]:
    """Accuracy by variant, mean over seeds, of the arms on the main size."""
    rows = []
    for arm in ("base", "medical", "augmented", "rule"):
        if (right := results.arrays.get(f"arm/{arm}")) is not None:
            name = {"rule": "base + deleting rule"}.get(arm, arm)
            rows.append(
                {"arm": name} | {v: round(float(x), 3) for v, x in zip(LABELS, right.mean(0), strict=True)}
            )
    blind = results.arrays.get("reader/blind")
    if blind is not None:
        rows.append(
            {"arm": "bag of findings"} | {v: round(float(x), 3) for v, x in zip(LABELS, blind, strict=True)}
        )
    return rows


tables.grid(arms_table(here), caption=f"{here.profile}: accuracy by variant, mean over seeds.")


# %% tags=["figure", "hide-input"]
def draw_rag(results):
    """Accuracy against the rank of the paragraph, for models trained without and with paragraphs."""
    figure, ax = plt.subplots(figsize=(6.8, 3.4))
    style = plots.arms(["trained with paragraphs", "never trained with a paragraph"])
    for metric, name in (("accuracy_rag_trained", "trained with paragraphs"),
                         ("accuracy_rag", "never trained with a paragraph")):  # fmt: skip
        found = results.metrics.get(metric, {})
        ranks = sorted(int(k[5:]) for k in found if k.startswith("rank_"))
        if ranks:
            plots.band(ax, ranks, np.array([found[f"rank_{r}"] for r in ranks]).T, name, **style[name])
            for label, mark in (("clean", ":"), ("oracle", "-.")):
                ax.axhline(np.mean(found[label]), color=style[name]["color"], linewidth=1, linestyle=mark)
            if "bm25" in found:
                ax.plot(ranks[0], np.mean(found["bm25"]), "x", color=style[name]["color"])
    ax.set_xscale("log")
    ax.set_ylim(0, 1)
    ax.legend(fontsize=9)
    plots.label(ax, "rank of the paragraph", "accuracy (1)")
    return figure


RAG_ALT = (
    "Accuracy against the similarity rank of the one paragraph in the prompt, for models trained with and "
    "without paragraphs; dotted lines: no paragraph, dash-dotted: the right page, crosses (where the package "
    "bm25s is there): BM25's first."
)
if "accuracy_rag" in here.metrics:
    plots.show(
        draw_rag(here), alt=f"This run. {RAG_ALT}",
        caption="Dotted: no paragraph. Dash-dotted: the right page. Crosses: the first of BM25.",
    )  # fmt: skip

# %% [markdown]
# What moves the decision? The gradient of the log-likelihood of the best wrong option against the right one,
# times the embedding, at the inserted term and at a finding of the chart (share of the whole stem):


# %% tags=["figure", "hide-input"]
def draw_attribution(results):
    """Share of |gradient x embedding| at the inserted term and at a chart finding, by size and kind."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.0), sharey=True)
    sizes = sizes_of(results, "attribution")
    for k, (ax, kind) in enumerate(zip(axes, ("nonliteral", "bystander"), strict=True)):
        for j, (what, style) in enumerate(plots.arms(["inserted term", "chart finding"]).items()):
            values = [results.arrays[f"attribution/{n}"][k, j] for n in sizes]
            ax.bar(np.arange(len(sizes)) + (j - 0.5) * 0.35, values, 0.33, color=style["color"], label=what)
        ax.set_xticks(range(len(sizes)), sizes)
        plots.label(ax, "hidden size x layers", "share of attribution (1)", kind)
    axes[0].legend(fontsize=9)
    return figure


if sizes_of(here, "attribution"):
    plots.show(
        draw_attribution(here),
        alt="Bars by model size: share of the attribution at the inserted term and at a finding of the "
        "chart, for nonliteral and bystander sentences.",
        caption="A model that attributes findings to their owner gives the inserted term no weight.",
    )
else:
    print("not measured in this run (look_inside)")

# %% [markdown]
# ## GPU experiment
#
# The recorded run. Its figures stand above where this page was rendered from it, and here where another
# machine's run stands above.

# %% tags=["hide-input"]
tables.provenance(book) if book else print(
    "The GPU run is not recorded yet; below is what this machine measured."
)

# %% tags=["figure", "hide-input"]
shown = book or here
again = book is not None and run.profile != "gpu"  # else the figures above are the record's
if again:
    plots.show(
        draw_variants(shown), alt=f"Recorded run. {VARIANTS_ALT}",
        caption=f"Profile {shown.profile}; bars: mean over seeds, 95 % interval.",
    )  # fmt: skip
    plots.show(draw_robustness(shown), alt=f"Recorded run. {ROBUST_ALT}", caption=f"Profile {shown.profile}.")
    plots.show(draw_rag(shown), alt=f"Recorded run. {RAG_ALT}", caption="Bands: 95 % over seeds.")
    print(tell_controls(shown), tell_robustness(shown), sep="\n")
tables.grid(arms_table(shown), caption=f"{shown.profile}: accuracy by variant.") if again else None


# %% tags=["hide-input"]
def tell_sizes(results) -> list[str]:
    """What a neutral sentence costs, by size."""
    costs = [results.arrays[f"accuracy/{n}"].mean(0)[:2] for n in sizes_of(results, "accuracy")]
    told = " ".join(f"{clean - neutral:+.3f}" for clean, neutral in costs)
    return [f"cost of a neutral sentence, smallest size first: {told}"] if costs else []


def tell_rag(results) -> list[str]:
    """Retrieval: accuracies, the best rank against no paragraph, and whose pages the ranks are."""
    lines = []
    for metric, arm, name in (("accuracy_rag", "base", "never trained with a paragraph"),
                              ("accuracy_rag_trained", "context", "trained with paragraphs")):  # fmt: skip
        if "oracle" in (rag := results.metrics.get(metric, {})):
            told = ", ".join(f"{k} {np.mean(rag[k]):.3f}" for k in ("clean", "rank_1", "best_rank", "oracle"))
            gain = np.subtract(rag["best_rank"], rag["clean"])
            best = results.arrays.get(f"rag_best/{arm}", [])
            lines += [f"{name}, {len(gain)} seeds: {told}; best - clean {gain.mean():+.3f} ± "
                      f"{plots.t_half(gain):.3f}; best rank by seed: {' '.join(map(str, best))}"]  # fmt: skip
    if "rag_pages" in results.arrays:
        pairs = zip(results.arrays["rag_ranks"], results.arrays["rag_pages"], strict=True)
        told = ", ".join(f"rank {r} {p[0]:.2f} / {p[1]:.2f}" for r, p in pairs if p[:2].sum() > 0.005)
        lines.append(f"paragraph is the page of the right / a wrong option: {told}, later ranks never")
    return lines


print(wrapped([*tell_sizes(shown), *tell_rag(shown)]) or "not run here")

# %% [markdown]
# How to read the record, with the numbers printed above and in the figures:
#
# - **C1.** The loss stays when only one word differs (twins). On the two largest sizes a neutral sentence
#   costs next to nothing; on the smaller ones it costs accuracy too, so their losses against *clean* contain
#   that.
# - **C2.** The interval treats runs as exchangeable, for these sizes. No single size carries the correlation,
#   but it lies between sizes and within the larger ones: within the two smallest a better model is no more
#   robust. The naive correlation does not show the effect, and Welch's test has the smallest size losing
#   *less* in absolute terms: it has less to lose.
# - **C4.** The first two ranks are always pages of the four options, because the query names them, and most
#   often the page of a wrong one: then the paragraph is itself a distractor. The rank that does best is in
#   every seed one of the last three, where paragraphs say nothing about the question. For models that never
#   saw a paragraph, what is still lost there is the price of an unknown form; models trained with
#   paragraphs hardly lose there, and gain nothing either. The right page helps both. So retrieval does not
#   help in either arm, but in the untrained one the form is a part of the reason.
# - **C5.** New errors go to the owner of the term far more often than under a neutral sentence, the same
#   trick with a finding of the right option mends wrong answers, and the inserted term moves the decision
#   about as much as a finding of the chart or more.
# - **C7.** The paired form covers as it should; the unpaired one covers too often, by little, because one
#   sentence moves many answers in one direction and the correlation between the two exams is modest.
#
# ### What is not reproduced, and why


# %% tags=["hide-input"]
def by_seed(results, metric: str, arm: str, peer: str) -> np.ndarray:
    """Differences arm - peer of the seeds that both have."""
    values = [
        dict(zip(map(int, results.arrays[f"seeds/{metric}/{a}"]), results.metrics[metric][a], strict=True))
        for a in (arm, peer)
    ]
    return np.array([values[0][s] - values[1][s] for s in values[0] if s in values[1]])


def seeds_needed(d: np.ndarray, room: float) -> str:
    """How many seeds of this mean and spread would bring the 95 % interval within `room` of the mean."""
    half = lambda n: scipy.stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / math.sqrt(n)  # noqa: E731
    enough = next((n for n in range(2, 1000) if half(n) <= room), None)
    return f"{enough} seeds would decide it" if enough else "no number of seeds would pass it"


def tell_open(results) -> str:
    """The claims on the continued arms: seeds one by one, and how many would be needed."""
    lines, found = [], results.metrics
    for metric, arm, margin in (("drop_nonliteral", "medical", 0.02), ("drop_bystander", "medical", 0.02),
                                ("accuracy_clean", "augmented", 0.01)):  # fmt: skip
        if {arm, "base"} <= found.get(metric, {}).keys() and len(found[metric][arm]) > 2:
            d = by_seed(results, metric, arm, "base")
            room = margin + d.mean() if arm == "medical" else margin - abs(d.mean())
            lines.append(f"{metric}, {arm} - base: {' '.join(f'{v:+.3f}' for v in d)}; {d.mean():+.3f} ± "
                         f"{plots.t_half(d):.3f}, margin {margin}; at this mean and spread "
                         f"{seeds_needed(d, room)}")  # fmt: skip
    arms = {arm: results.arrays.get(f"arm/{arm}") for arm in ("base", "medical", "augmented")}
    for arm, right in ((a, r) for a, r in arms.items() if r is not None):
        clean, neutral, *kinds = right.mean(0)[:4]
        told = ", ".join(f"{v} {neutral - x:.3f}" for v, x in zip(LABELS[2:4], kinds, strict=True))
        lines.append(f"{arm}: a neutral sentence costs {clean - neutral:+.3f}; beyond that: {told}")
    return wrapped(lines) or "the continued arms were not run here"


print(tell_open(shown))

# %% [markdown]
# - **C3 is open.** The paper's finding is an absence, and the seeds disagree in sign: the interval is several
#   times as wide as the margin. The mean is on the side of a *smaller* loss, beyond the margin, so that more
#   seeds with the same mean would contradict the claim rather than save it. Where the gain comes from is seen
#   against the neutral sentence: there base and medical lose the same, and what more clean items cure is the
#   cost of any added sentence. This comparison is no claim; it was made after the numbers.
# - **C6 is weaker, but not for its effect.** Both losses are more than halved, and both intervals exclude
#   zero. The claims also require that clean accuracy stays within a margin in both directions, and the
#   seeds are too few to show that: the mean is within, the upper end of the interval is not. The lean is
#   upwards, so what is open is not a cost. The sceptic's rule is the better answer to bystanders, whom it
#   deletes; for nonliteral sentences, whose subject is often the patient, the interval of the difference
#   contains zero.
# - **C8's second half is contradicted**: sharing pays as it should, but the pass stays below its share of the
#   peak. The next section says where the time goes.
#
# ### Cost against the limit


# %% tags=["hide-input"]
def cost_rows(results) -> list[dict]:
    """Scoring: items per second, the arithmetic limit, the peers; and what written reasoning would cost."""
    if "score_shape" not in results.arrays:
        return []
    generated, gflop, limit = (float(v) for v in results.arrays["score"])
    shared, four = (
        float(np.median(results.metrics["items_per_second"][a])) for a in ("shared", "four_passes")
    )

    def row(name: str, value: float, peer: float) -> dict:
        return bench.row(name, 1e3 / value, "items/s", achieved=value, limit=limit, peer=peer)

    rows = [row("shared prompt, against four passes", shared, four), row("four padded passes", four, four),
            row("shared prompt, against generate", shared, generated)]  # fmt: skip
    new_tokens = 8000
    step = 1e3 / generated / float(results.arrays["score_shape"][2])
    name, ms = f"written reasoning of {new_tokens} tokens, one item (estimate)", step * new_tokens
    return [*rows, bench.row(name, ms, "items/s", achieved=1e3 / ms, peer=shared)]


padding = padding_share(encoded_exam(key, S.test["n"], "clean"), 64)
print(f"padding in batches of 64, sorted by length: {padding:.1%}")
rows = cost_rows(shown)
tables.bench(rows) if rows else print("timings: not measured in this run (bench_scoring)")

# %% [markdown]
# Where does the rest of the pass go? Three accounts can be made from the recorded times and the shapes. *The
# arithmetic*: operations over the peak. *Everything between the products*: norms, rotary positions, SiLU,
# residuals, copies of grouped keys; `transformers` runs them one by one, and each reads and writes whole
# tensors. Their bytes are counted on a model without memory (device `meta`), and divided by the memory
# bandwidth of an H100 (3.35 TB/s) they give a least time. *The host*: rows, positions and mask of a batch are
# made in Python before the pass begins, while the GPU waits.


# %%
class Traffic(torch.overrides.TorchFunctionMode):
    """Counts the bytes that tensor operations read and write; products, attention and views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = args[0] if args and isinstance(args[0], (tuple, list)) else args  # torch.cat takes a list
        given = [a for a in given if isinstance(a, torch.Tensor)]
        products = ("linear", "matmul", "__matmul__", "scaled_dot_product_attention", "__get__")
        if isinstance(out, torch.Tensor) and getattr(func, "__name__", "") not in products:
            if not out._is_view() and all(out is not a for a in given):
                self.bytes += sum(t.nbytes for t in [*given, out])
        return out


def bytes_between_products(batch: int, tokens: int, shape: Sequence[int]) -> int:
    """Bytes moved by a pass through all layers outside of products and attention, in bf16."""
    hidden, layers, heads, groups, mlp, _ = map(int, shape)
    counted = []
    for depth in (1, 2):  # the second layer alone: embedding, last norm and rotary table drop out
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=mlp,
            num_key_value_heads=groups, vocab_size=16, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = bench.random_model(LlamaForCausalLM, config, torch.bfloat16, "meta")
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
        mask = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bfloat16, device="meta")
        with torch.no_grad(), Traffic() as traffic:
            model.model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
        counted.append(traffic.bytes)
    return layers * (counted[1] - counted[0])


# %% tags=["hide-input"]
def tell_limit(results) -> str:
    """One batch in milliseconds: measured, arithmetic at the peak, between the products, on the host."""
    if "score_shape" not in results.arrays:
        return "timings: not measured in this run (bench_scoring)"
    batch, prompt, option, *shape = map(int, results.arrays["score_shape"])
    hidden, layers, heads, groups, mlp, vocabulary_size = shape
    _, gflop, limit = map(float, results.arrays["score"])
    shared, four = (
        1e3 * batch / np.mean(results.metrics["items_per_second"][a]) for a in ("shared", "four_passes")
    )
    peak = limit * gflop * 1e9  # operations per second
    body = layers * hidden * (2 * hidden + 2 * groups * (hidden // heads) + 3 * mlp)
    read = 4 * (prompt + option)
    of_four = 2 * body * read + 8 * hidden * vocabulary_size * (option + 1)
    of_four += 2 * layers * hidden * read * (prompt + option)
    mfu = [1e12 * gflop * batch / shared / peak, 1e3 * of_four * batch / four / peak]
    rng = np.random.default_rng(0)
    prompts, options = (rng.integers(1, 99, size).tolist() for size in ((batch, prompt), (batch, 4, option)))
    made = bench.time(lambda: pack_options(prompts, options, 0), warmup=1, repeat=3, device="cpu")
    packed = prompt + 4 * (option - 1)
    moved = bytes_between_products(batch, packed, shape)
    between, arithmetic = 1e3 * moved / 3.35e12, 1e12 * gflop * batch / peak
    left = shared - between - made.median_ms
    used = batch * packed
    return wrapped([
        f"one batch of {batch}: {shared:.0f} ms; arithmetic at the peak of {peak / 1e12:.0f} TFLOP/s "
        f"{arithmetic:.0f} ms, a share of {mfu[0]:.3f}; at 0.45 it would take {arithmetic / 0.45:.0f} ms",
        f"four passes reach {mfu[1]:.3f}; at their rate this batch would take {arithmetic / mfu[1]:.0f} ms",
        f"between the products: {moved / 1e9:.0f} GB, at least {between:.0f} ms",
        f"on the host, one core of the machine that rendered this page: {made.median_ms:.0f} ms",
        f"left for products and attention: {left:.0f} ms, {arithmetic / left:.2f} of the peak",
        f"every weight read serves {used} tokens; from {peak / 3.35e12:.0f} on, an H100 waits for arithmetic",
    ])  # fmt: skip


print(tell_limit(shown))

# %% [markdown]
# So the pass is bound by arithmetic, and what is left for products and attention runs at little over half
# of the peak; what stands around them pushes the whole below its pass line. Four passes, which need no
# packing and no dense mask, are nearer to the peak per operation; sharing wins because it does so many
# fewer. The time that is missing to the line is of the order of the host's share, and far below what lies
# between the products. What would be tried, in this order, none of it measured yet: make rows and mask of
# the next batch while the GPU works on this one; fuse norms, rotary positions and SiLU (`torch.compile`);
# give attention the block structure of the mask instead of a dense mask.

# %% tags=["hide-input"]
tables.compare_runs(book, here) if again or not book else print("this run is the record: verdicts below")

# %% [markdown]
# ## Verdicts
#
# Computed by rules that were committed before the numbers. Intervals over seeds are paired t intervals, over
# draws and timings a bootstrap; "exact" numbers have none. A claim is *void* where the models have not
# learned the clinic well enough to have something to lose: the `cpu` profile trains three seeds for two
# minutes, which shows directions and need not pass the {term}`competence gate`.

# %% tags=["hide-input"]
tables.verdicts(shown)

# %% [markdown]
# ## Play
#
# One item, the inserted sentence, and what the models make of it. In a live notebook also the term and the
# place of the sentence can be chosen, and the bars are computed anew from the saved weights. The answer of
# the clinic never changes: it is marked by a frame.


# %%
def insert_at(stem: str, sentence: str, place: str) -> str:
    """`sentence` first, in the middle, or before the question."""
    parts = sentences(stem)
    at = {"first": 0, "middle": len(parts) // 2, "before the question": len(parts) - 1}[place]
    return " ".join([*parts[:at], sentence, *parts[at:]])


def probabilities(item: Item, size: str) -> np.ndarray:
    """(4,) option probabilities of the saved base model of a size."""
    model, tokenizer = restore(trained["base", size, run.seeds[0]], S.sizes[size], S.world)
    return scipy.special.softmax(evaluate(SharedPrefixLLM(model, tokenizer), [item]).logliks[0])


# %% tags=["widget", "hide-input"]
PLAYED = list(range(1 if run.profile == "smoke" else PLAY_ITEMS))


@functools.cache
def played(size: str) -> np.ndarray:
    """(variants, items, 4) option probabilities: of the results, else computed from the saved weights."""
    if f"probabilities/{size}" in here.arrays:
        return here.arrays[f"probabilities/{size}"]
    found = exam(key, S.test["n"]).values()
    return np.array([[probabilities(item, size) for item in items[:PLAY_ITEMS]] for items in found])


def draw_options(item: Item, rows: Mapping[str, np.ndarray], title: str):
    """Bars of the four options, one colour per row; the right option has a frame."""
    figure, ax = plt.subplots(figsize=(6.4, 2.9))
    for k, (name, style) in enumerate(plots.arms(list(rows)).items()):
        bars = ax.barh(np.arange(4) + (k - 0.5) * 0.38, rows[name], 0.36, color=style["color"], label=name)
        bars[item.options.index(item.answer)].set(edgecolor="#000000", linewidth=2)
    ax.set_yticks(range(4), item.options)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.legend(fontsize=9, loc="lower right")
    plots.label(ax, "probability (1)", "option", textwrap.fill(title, 58))
    return figure


def draw_played(item: int, variant: str, size: str):
    """Option probabilities before and after, from the results."""
    shown_item = exam(key, S.test["n"])[variant][item]
    p = played(size)
    sentence = shown_item.meta.get("sentence", "nothing inserted")
    rows = {"clean": p[0, item]} | ({variant: p[LABELS.index(variant), item]} if variant != "clean" else {})
    return draw_options(shown_item, rows, f'{size}: "{sentence}"')


def tell_played(item: int, variant: str, size: str) -> str:
    """The picture in words."""
    one = exam(key, S.test["n"])[variant][item]
    p = played(size)
    told = ", ".join(f"{o} {v:.2f}" for o, v in zip(one.options, p[LABELS.index(variant), item], strict=True))
    return f"Inserted: {one.meta.get('sentence', 'nothing.')} Right: {one.answer}. Probabilities: {told}."


# %% tags=["widget", "hide-input"]
def draw_live(item: int, kind: str, term: int, place: str, size: str):
    """The same for any kind, term and place, computed from the saved weights."""
    one, made = exam(key, S.test["n"])["clean"][item], clinic_of(*key)[0]
    possible = terms_for(one, made, kind)
    word = possible[term % len(possible)]
    sentence = make_distractor(one, made, kind, random.Random(item), TEST, word)
    after = dataclasses.replace(one, stem=insert_at(one.stem, sentence, place))
    rows = {"clean": probabilities(one, size), kind: probabilities(after, size)}
    return draw_options(one, rows, f'{size}: "{sentence}"')


playable = [n for n in S.keep[:3] if f"probabilities/{n}" in here.arrays or trained["base", n, first].done]
GRID = {"item": PLAYED, "variant": LABELS[:5], "size": playable}
LIVE = {"item": PLAYED, "kind": list(KINDS), "term": [0, 1, 2], "size": S.keep,
        "place": ["before the question", "middle", "first"]}  # fmt: skip
picker.live(draw_live, LIVE)
if trained["base", S.keep[0], first].done:  # the live view needs saved weights; try one state of it
    draw_live(0, "bystander", 0, "first", S.keep[0])
    plt.close("all")
picker.picker(
    run, "distracted", draw_played, GRID, alt=tell_played,
    caption="Option probabilities before and after one sentence; the frame marks the right answer.",
) if playable else print("no model was trained or measured in this run")  # fmt: skip

# %% [markdown]
# ## Your own model
#
# `checkpoint` names a causal language model on the hub or in a folder: `KrithikV/MedMobile`,
# `meta-llama/Meta-Llama-3-8B-Instruct`, `Qwen/Qwen2.5-7B-Instruct`. `dataset` is a MedQA file as published
# (`GBaker/MedQA-USMLE-4-options`: JSON lines with `question`, `options`, `answer_idx`), `distractors` a
# MedDistractQA file (`KrithikV/MedDistractQA`: a JSON list of objects with `confounder_sentence`, in the
# order of the questions). Without `dataset` the invented items are asked, in the paper's prompt. A server
# will do as well: `evaluate(readrun.llm.OpenAILLM(...), items, "generate", "paper", max_tokens=8000)`.


# %%
def load_medqa(dataset: str, distractors: str = "") -> dict[str, list[Item]]:
    """{"clean": items} of a MedQA file, and {"distracted": …} with the sentences of a MedDistractQA file.

    Raises ValueError naming the file and the line: not JSON, a field is missing, not four different options,
    lists of different length.
    """
    items, path = [], Path(dataset)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"dataset: {dataset}: {error}") from error
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            options = tuple(str(row["options"][letter]) for letter in "ABCD")
            item = Item(
                f"{path.name}:{i + 1}", str(row["question"]), options, str(row["options"][row["answer_idx"]])
            )
            if set(row["options"]) != set("ABCD"):
                raise ValueError(f"options {sorted(row['options'])} are not A to D")
            check_item(item)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"dataset: {path.name}, line {i + 1}: {error!r}") from error
        items.append(item)
    if not items:
        raise ValueError(f"dataset: {path.name} has no lines")
    found = {"clean": items}
    if distractors:
        try:
            given = [
                str(row["confounder_sentence"]) for row in json.loads(Path(distractors).read_text("utf-8"))
            ]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"distractors: {distractors}: {error!r}") from error
        if len(given) != len(items):
            raise ValueError(f"distractors: {len(given)} sentences for {len(items)} questions of {path.name}")
        found["distracted"] = [with_sentence(i, s) for i, s in zip(items, given, strict=True)]
    return found


# %%
def load_checkpoint(path: str):
    """(model, tokenizer) of a causal language model. Raises ValueError naming `checkpoint` if it is none."""
    try:
        kind = torch.bfloat16 if run.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, trust_remote_code=False).to(run.device)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        wanted = "accepted: hub id or folder of a causal language model (config.json, weights, tokenizer)"
        raise ValueError(f"checkpoint: {path}: {str(error)[:300]}; {wanted}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"checkpoint: {path}: its tokenizer has neither a padding nor an end token")
    return model.eval(), tokenizer


# %%
def own_model(
    path: str, dataset: str, distractors: str, world: dict, n: int, max_tokens: int
) -> dict[str, Any]:
    """Accuracy of a checkpoint on clean and distracted items, paired; parsing of what it writes."""
    model, tokenizer = load_checkpoint(path)
    llm = SharedPrefixLLM(model, tokenizer, batch_size=8, name=path)
    chapters = set(make_tokenizer(make_world(**world)).get_vocab()) == set(tokenizer.get_vocab())
    found = load_medqa(dataset, distractors) if dataset else exam(tuple(world.values()), n)
    style = "short" if chapters and not dataset else "paper"
    out: dict[str, Any] = {"style": style}
    right = {}
    for name, items in found.items():
        results = evaluate(llm, items[:n], "loglik", style)
        right[name] = results.correct
        out |= {f"accuracy__{name}": results.accuracy, f"loglik__{name}": float(results.logliks.mean())}
    for name in list(found)[1:]:
        stats = paired_stats(right["clean"], right[name])
        out |= {f"loss__{name}": stats["delta"], f"se__{name}": stats["se_paired"]}
    wrote = evaluate(llm, found["clean"][: min(n, 4)], "generate", style, max_tokens)
    return out | {"invalid": float(wrote.invalid.mean()), "text": wrote.texts[0][:160]}


# %%
if run.checkpoint:
    own = run.unit(
        own_model, path=run.checkpoint, dataset=dataset, distractors=distractors, world=S.world,
        n=1273 if run.profile == "gpu" else 16, max_tokens=8000 if run.profile == "gpu" else 16,
    )  # fmt: skip
    own = dict(own) if own.done else {}
else:
    folder, own = run.folder / "own_model", {}
    if dataset:
        load_medqa(dataset, distractors)  # a wrong file is an error here too
    if trained["base", S.main, first].done:  # the chapter's own model, saved in the published layout
        saved, words = restore(trained["base", S.main, first], S.sizes[S.main], S.world)
        saved.save_pretrained(folder, max_shard_size="300KB")
        words.save_pretrained(folder)
        own = own_model(str(folder), "", "", S.world, 16, 8)
for name in [k.removeprefix("accuracy__") for k in own if k.startswith("accuracy__")]:
    loss = f", loss {own[f'loss__{name}']:+.3f} ± {own[f'se__{name}']:.3f}" if f"loss__{name}" in own else ""
    said = f"accuracy {own['accuracy__' + name]:.3f}, mean log-likelihood {own['loglik__' + name]:.4f}"
    print(f"{name:>10}: {said}{loss}")
if own:
    print(f"generate mode: {own['invalid']:.0%} invalid; first answer: {own['text']!r}")

# %% [markdown]
# ## Limits
#
# - The clinic is invented. It shows that one sentence can cost accuracy, how to measure that the sentence and
#   not the length is to blame, and what misattribution looks like. It shows nothing about real clinical text,
#   about sentences written by GPT-4o, about written reasoning, about proprietary models, or about the safety
#   of any real model.
# - Every wrong answer here is a wrong *attribution*; a real exam also tests knowledge.
# - A test word has one sense in all training text; its everyday sense is new to the model, as are the words
#   of the frame around it. A model of the paper knows both. So a loss is easier to get here than there, and
#   its size says little; what this clinic shows is the control, the mechanism and the statistics.
# - A model that never saw a paragraph meets a new form and later positions as well as its content, so that C4
#   is a weak statement about it; the models trained with paragraphs are the fairer test.
# - C2 is about a few sizes of one family, and its interval is over training runs, not over sizes.
# - The calibration gate compares with a balanced exam: it finds faults of the exam and habits of place or
#   name that the balance does not cancel, not every habit.
# - A log-likelihood of an option text favours short or frequent names. Here all names are one token, and the
#   calibration without stem stands among the gates; with real options compare both modes.
# - The released insertion rule splits after every full stop: "Dr. Smith" counts as two sentences.
# - All seeds share one world and one set of test items; intervals over seeds are about training, not about
#   other clinics.
#
# **Exercise 1.** A colleague reports that a model lost 2 points, with an unpaired standard error of 1.6
# (1,273 items, accuracy about 0.8), and calls it noise. What do you ask for?
#
# :::{dropdown} Solution
# For $b$ and $c$. If 61 items changed and $b-c=25$, the paired error is
# $\sqrt{61-25^2/1273}/1273\approx0.0061$, less than half of the unpaired one, and the loss is three standard
# errors from zero. The unpaired number hides a clear effect.
# :::
#
# **Exercise 2.** Why does the neutral sentence come from the same frames, instead of "The weather was nice"?
#
# :::{dropdown} Solution
# A control must differ in one thing. Another frame differs in length, in rare words, in having a second
# person at all. Between a sentence and its twin only the clinical word is different, so the difference
# between the two losses belongs to that word.
# :::
#
# **Exercise 3.** `BagOfFindings` loses nothing to `echo`. Under which rule of adding up would it?
#
# :::{dropdown} Solution
# If mentions were summed without cutting at 1, the echoed finding would count twice, and a shared finding
# that counts twice can change the order where weights differ. Cutting makes repetition harmless.
# :::
#
# **References.** K. Vishwanath, A. Alyakin, D. A. Alber et al., *Medical large language models are easily
# distracted*, 2025, arXiv 2504.01201. Word senses: WordNet 3.0, Princeton University.
#
# ```bibtex
# @article{vishwanath2025medical,
#   title   = {Medical large language models are easily distracted},
#   author  = {Vishwanath, Krithik and Alyakin, Anton and Alber, Daniel A. and others and Oermann, Eric K.},
#   journal = {arXiv preprint arXiv:2504.01201},
#   year    = {2025}
# }
# ```
