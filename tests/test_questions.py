"""Questions with exact answers: programs run, labels by another truth table, answers by a graph's closure."""

from __future__ import annotations

import itertools
import math

import networkx
import pytest
from readrun import questions
from readrun.questions import KINDS, make_items, taxonomy


def test_math_programs_give_the_gold_answer() -> None:
    for item in make_items("math", 60, 0) + make_items("math", 20, 0, test=False):
        scope: dict = {"math": math}
        exec(item.program, scope)
        assert str(scope["ans"]) == item.answer
        for line in item.steps:
            left, right = line.split(" = ")
            name, *words = left.split()
            known = name in ("gcd", "lcm")
            assert (getattr(math, name)(*map(int, words)) if known else eval(left)) == int(right)


def test_logic_labels_against_another_truth_table() -> None:
    """Premises as Python expressions; the gold lines are a chain of rules that hold in every world."""
    told = {"fact": "({0}) == {1}", "all": "({0}) != {1} or ({2}) == {3}", "xor": "{0} != {2}"}
    for item in make_items("logic", 60, 0):
        premises, atom = item.extra
        codes = [told[kind].format(*itertools.chain(*literals)) for kind, *literals in premises]
        atoms = sorted({a for _, *literals in premises for a, _ in literals} | {atom})
        worlds = [
            dict(zip(atoms, w, strict=True)) for w in itertools.product([False, True], repeat=len(atoms))
        ]
        worlds = [world for world in worlds if all(eval(code, {}, world) for code in codes)]
        seen = {world[atom] for world in worlds}
        assert item.answer == ("Uncertain" if len(seen) == 2 else str(seen.pop()))
        for line in item.steps if item.answer != "Uncertain" else ():
            p, q = line.split(" gives ")
            assert all(eval(f"not ({p}) or ({q})", {}, world) for world in worlds)
    contradiction = [("fact", ("kind", True)), ("fact", ("kind", False))]
    assert questions.logic_label(contradiction, "calm") is None


def test_commonsense_answers_against_the_transitive_closure() -> None:
    graph = networkx.DiGraph(taxonomy().up.items())
    for item in make_items("commonsense", 100, 0):
        chain, target = item.extra
        assert item.answer == str(target in graph and networkx.has_path(graph, chain[0], target))
        assert len(item.searches) <= 3


def test_hybrid_answers_follow_from_the_fact() -> None:
    for item in make_items("hybrid", 40, 0):
        (start, *_), target, (a, b, c, d) = item.extra
        assert int(item.answer) == (a if target in taxonomy().above[start] else b) * c + d


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_test_share_nothing(kind) -> None:
    mine = {i.question for i in make_items(kind, 100, 0, test=True)}
    assert not mine & {i.question for i in make_items(kind, 100, 0, test=False)}
    assert not mine & {i.question for i in make_items(kind, 100, 0, test=True, ood=True)}


def test_halves_of_the_split() -> None:
    """Few numbers are drawn: that none is shared must not be luck."""
    for test in (True, False):
        for item in make_items("math", 60, 3, test=test):
            assert (questions.stable(f"{item.objective}{item.extra[1]}") == 0) is test
    names, cut = taxonomy().names, taxonomy().cut
    assert not set(names[False]) & set(names[True])
    for item in make_items("commonsense", 50, 3) + make_items("hybrid", 50, 3):
        assert all(cut[name] is True for name in (*item.extra[0], item.extra[1]))
    assert not [name for name in taxonomy().up if questions.UNWANTED.search(name)]
