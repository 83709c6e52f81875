"""Rubric trees and book grading: against path products, fractions, brute force and a second scorer."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from fractions import Fraction

import networkx as nx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import claims, grading, paths, rubric
from readrun.rubric import CATEGORIES, FINE, GradedNode, RubricError, RubricNode, grade

texts = st.text(max_size=6)
weights = st.one_of(st.integers(0, 5), st.sampled_from([0.5, 2.25]))


def leaf(**other) -> dict:
    own = {"id": "a", "requirements": "do it", "weight": 1, "sub_tasks": [], "task_category": CATEGORIES[0]}
    return own | other


def node(*tasks, **other) -> dict:
    own = {"id": "a", "requirements": "all", "weight": 1, "sub_tasks": list(tasks), "task_category": None}
    return own | other


leaves = st.builds(
    lambda i, w, c, f: leaf(id=i, weight=w, task_category=c, finegrained_task_category=f),
    texts, weights, st.sampled_from(CATEGORIES), st.sampled_from([None, *FINE]),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda t, w: node(*t, weight=w), st.lists(inner, min_size=1, max_size=4), weights
    ),
    max_leaves=25,
)


def grades(tree: RubricNode, bits: list[bool]) -> GradedNode:
    given_ = {path: bits[i % len(bits)] for i, (path, _) in enumerate(tree.leaves())}
    return grade(tree, lambda path, _: (float(given_[path]), True, ""))


bits_ = st.lists(st.booleans(), min_size=1, max_size=7)


@given(trees)
@settings(deadline=None)
def test_round_trip(data) -> None:
    again = RubricNode.from_dict(json.loads(json.dumps(data))).to_dict()
    assert json.dumps(again) == json.dumps(data)


def test_round_trip_keeps_keys_their_order_and_what_is_absent() -> None:
    """Old official files have a key `result` and lack the fine-grained category."""
    data = {"weight": 2, "id": "root", "sub_tasks": [leaf(result="Pass")], "requirements": "é\n"}
    assert json.dumps(RubricNode.from_dict(data).to_dict()) == json.dumps(data)


@given(trees, bits_)
@settings(deadline=None)
def test_root_score_is_the_path_product(data, bits) -> None:
    tree = RubricNode.from_dict(data)
    graded = grades(tree, bits)
    graph, exact = nx.DiGraph(), Fraction(0)
    graph.add_node(())
    for path, n in tree.walk():
        total = sum(Fraction(t.weight) for t in n.sub_tasks)
        for i, t in enumerate(n.sub_tasks):
            graph.add_edge(path, (*path, i), w=Fraction(t.weight) / total if total else Fraction(0))
    for path, found in graded.leaves():
        way, product = nx.shortest_path(graph, (), path), Fraction(1)
        for a, b in zip(way, way[1:], strict=False):
            product *= graph.edges[a, b]["w"]
        exact += product * Fraction(found.score)
        assert tree.path_weights()[path] == pytest.approx(float(product), abs=1e-12)
    assert graded.score == pytest.approx(float(exact), abs=1e-12)
    assert rubric.propagate(graded) == graded and rubric.root_score(graded) == graded.score
    assert rubric.disqualify(graded).score == 0.0


@given(trees, bits_, st.integers(0, 30))
@settings(deadline=None)
def test_a_point_more_never_lowers_the_root(data, bits, which) -> None:
    tree = RubricNode.from_dict(data)
    paths_ = [p for p, _ in tree.leaves()]
    given_ = {p: bits[i % len(bits)] for i, p in enumerate(paths_)}
    before = grade(tree, lambda p, _: (float(given_[p]), True, "")).score
    given_[paths_[which % len(paths_)]] = True
    assert grade(tree, lambda p, _: (float(given_[p]), True, "")).score >= before - 1e-15


def brute_code_only(data: dict) -> dict | None:
    if not data["sub_tasks"]:
        return data if data["task_category"] == CATEGORIES[0] else None
    kept = [t for t in map(brute_code_only, data["sub_tasks"]) if t]
    return data | {"sub_tasks": kept} if kept else None


@given(trees, st.integers(0, 6), bits_)
@settings(deadline=None)
def test_code_only_and_prune_against_brute_force(data, depth, bits) -> None:
    tree = RubricNode.from_dict(data)
    code, expected = tree.code_only(), brute_code_only(data)
    assert (code.to_dict() if code else None) == expected
    assert code is None or code.code_only() == code
    graded = grades(tree, bits)
    kept = {id(n): graded.leaves()[i][1].score for i, (_, n) in enumerate(tree.leaves())}
    if code:
        by_path = iter([kept[id(n)] for _, n in tree.leaves() if n.task_category == CATEGORIES[0]])
        assert rubric.code_dev(graded) == pytest.approx(
            grade(code, lambda *_: (next(by_path), True, "")).score, abs=1e-12
        )
    else:
        assert rubric.code_dev(graded) is None
    assert tree.prune(99) == tree
    cut = tree.prune(depth)
    assert cut.depth() == min(depth, tree.depth())
    expected_leaves = {p[:depth] for p, _ in tree.leaves()}
    assert [p for p, _ in cut.leaves()] == sorted(expected_leaves)
    for path, n in cut.leaves():
        assert (n.task_category == rubric.SUBTREE) == bool(tree.at(path).sub_tasks)


def test_resources_provided() -> None:
    tree = RubricNode.from_dict(node(leaf(finegrained_task_category=FINE[1], weight=3), leaf()))
    assert [n.weight for _, n in tree.without_acquisition().leaves()] == [0, 1]
    assert [n.weight for _, n in tree.leaves()] == [3, 1]


def test_preceding_nodes_are_ancestors_and_earlier_siblings() -> None:
    def name(*tasks, **other):
        return node(*tasks, **other) if tasks else leaf(**other)

    data = name(
        name(leaf(id="a1"), leaf(id="a2"), id="a"), name(leaf(id="b1"), leaf(id="b2"), id="b"), id="root"
    )
    tree = RubricNode.from_dict(data)
    assert [n.id for n in tree.preceding((1, 1))] == ["root", "a", "b", "b1"]
    assert [n.id for n in tree.preceding((0, 0))] == ["root", "a"]
    assert tree.preceding(()) == ()
    with pytest.raises(RubricError, match="/2"):
        tree.preceding((2,))


def test_every_fault_is_listed() -> None:
    bad = node(
        leaf(weight=-1), leaf(weight=True), leaf(weight=float("nan")), leaf(weight="2"),
        leaf(task_category=None), leaf(task_category="Execution"), leaf(finegrained_task_category="x"),
        node(leaf(), task_category=CATEGORIES[0]), {"id": "a"}, [], leaf(id=3), leaf(sub_tasks=None),
    )  # fmt: skip
    with pytest.raises(RubricError) as error:
        RubricNode.from_dict(bad)
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == [f"/{i}" for i in range(12)]
    words = "-1|True|nan|'2'|None|Execution|fine|on a node|requirements|object|id|list".split("|")
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_circles_depth_and_size_are_refused() -> None:
    circle = node(leaf())
    circle["sub_tasks"].append(circle)
    with pytest.raises(RubricError, match="contains itself"):
        RubricNode.from_dict(circle)
    deep = leaf()
    for _ in range(200):
        deep = node(deep)
    assert RubricNode.from_dict(deep).depth() == 200
    with pytest.raises(RubricError, match="deeper than 200"):
        RubricNode.from_dict(node(deep))
    with pytest.raises(RubricError, match="more than 100,000"):
        RubricNode.from_dict(node(*[leaf()] * 100_001))


def test_duplicate_ids_are_graded_separately() -> None:
    tree = RubricNode.from_dict(node(leaf(), leaf(), leaf()))
    graded = grade(tree, lambda path, _: (float(path == (1,)), True, ""))
    assert [n.score for _, n in graded.leaves()] == [0, 1, 0]
    assert graded.score == pytest.approx(1 / 3)


def test_weights_of_zero() -> None:
    tree = RubricNode.from_dict(node(node(leaf(weight=0), leaf(weight=0)), leaf(weight=3), leaf(weight=0)))
    assert grade(tree, lambda path, _: (float(path != (1,)), True, "")).score == 0
    assert tree.path_weights() == {(0, 0): 0, (0, 1): 0, (1,): 0.75, (2,): 0}


def test_a_judge_that_crashes_makes_one_leaf_invalid() -> None:
    def judge(path, _):
        if path == (1,):
            raise RuntimeError("no answer")
        return 1.0, True, ""

    graded = grade(RubricNode.from_dict(node(leaf(), leaf())), judge)
    assert graded.valid_score and graded.score == 0.5
    assert [n.valid_score for _, n in graded.leaves()] == [True, False]
    assert "no answer" in graded.leaves()[1][1].explanation
    lost = grade(RubricNode.from_dict(node(leaf(), leaf())), lambda *_: 1 / 0)
    assert not lost.valid_score and lost.score == 0


@given(trees, bits_)
@settings(deadline=None, max_examples=25)
def test_graded_round_trip(data, bits) -> None:
    graded = grades(RubricNode.from_dict(data), bits)
    assert GradedNode.from_dict(json.loads(json.dumps(graded.to_dict()))) == graded


def test_average_replication_score() -> None:
    runs = [
        {"a": 0.2, "b": 0.4},
        {"a": 0.4, "b": 0.6},
        {"a": 0.6, "b": 0.8},
        {"a": 1.0, "b": None},
        {"a": 1.0},
    ]
    mean, error, n = rubric.average_replication_score(runs)
    assert (mean, error, n) == (pytest.approx(0.5), pytest.approx(0.2 / 3**0.5), 3)
    assert rubric.average_replication_score(runs[:1]) == (pytest.approx(0.3), None, 1)
    assert rubric.average_replication_score([]) == (None, None, 0)


# ---------------------------------------------------------------- the book


NAMED = {"tests/test_x.py::test_a": "passed", "tests/test_x.py::test_b": "passed"}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one chapter with evidence and a record that earn everything; returns `edit(part, change)`."""
    source = paths.root() / "tests" / "fixture_book"
    shutil.copytree(source / "notebooks", tmp_path / "notebooks")
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    for name in ("beta", "gamma"):
        (tmp_path / "notebooks" / f"{name}.py").unlink()
    (tmp_path / "data/papers").mkdir(parents=True)
    paper = yaml.safe_load((source / "data/papers/alpha.yml").read_text())
    claim = paper["claims"][0]["id"]
    second = copy.deepcopy(paper["claims"][0]) | {"id": "c9-second", "headline": False}
    paper["claims"].append(second)
    paper["rubric"] = {"requirements": "all", "sub_tasks": [
        {"requirements": "code", "weight": 4, "kind": "code", "tests": list(NAMED)},
        {"requirements": "runs", "weight": 3, "kind": "execution", "checks": [
            {"file": "smoke", "pointer": "/seconds", "op": "<=", "value": 20},
            {"file": "record", "pointer": "/metrics/m/ours", "op": "len>=", "value": 2}]},
        {"requirements": "holds", "weight": 2, "kind": "result", "claims": [claim]},
        {"requirements": "holds too", "weight": 1, "kind": "result", "claims": [claim, "c9-second"]},
    ]}  # fmt: skip
    (tmp_path / "data/papers/alpha.yml").write_text(yaml.safe_dump(paper))
    state = {
        "evidence": {"sources_sha256": grading.sources_sha256("alpha"), "tests": dict(NAMED),
                     "runs": {"smoke": {"state": "ok", "seconds": 9}}},
        "record": {"claims": {claim: {"verdict": "reproduced"}, "c9-second": {"verdict": "reproduced"}},
                   "metrics": {"m": {"ours": [1.0, 2.0]}}},
    }  # fmt: skip

    class Loaded:
        def __init__(self, record) -> None:
            self.record, self.claims = record, record["claims"]

    load = lambda slug: Loaded(state["record"]) if state["record"] else None  # noqa: E731
    monkeypatch.setattr(grading.records, "load", load)
    monkeypatch.setattr(grading, "load_evidence", lambda slug: state["evidence"])
    return state | {"state": state, "claim": claim}


def score() -> float:
    return grading.grade_chapter("alpha").score


def test_failed_claim_lowers_the_score(book) -> None:
    """Whatever the verdict is called: only `reproduced` earns the leaf."""
    assert score() == 1.0
    for word in set(claims.VERDICTS) - {"reproduced"}:
        book["record"]["claims"]["c9-second"]["verdict"] = word
        assert score() == pytest.approx(0.9), word
    book["record"]["claims"]["c9-second"]["verdict"] = "weaker"
    book["record"]["claims"][book["claim"]]["verdict"] = "contradicted"
    assert score() == pytest.approx(0.7)
    (row,) = grading.grade_book(["alpha"])
    assert (row["failed"], row["score"], row["stale"]) == (2, pytest.approx(0.7), False)
    book["state"]["record"] = None
    row = grading.grade_book(["alpha"])[0]
    assert row["score"] == pytest.approx(0.4) and not row["recorded"]
    assert "record: not run" in row["graded"].sub_tasks[1].explanation


@pytest.mark.parametrize("word", ["failed", "skipped", "missing", "no result"])
def test_a_code_leaf_needs_all_its_tests(book, word) -> None:
    if word == "no result":
        del book["evidence"]["tests"]["tests/test_x.py::test_b"]
    else:
        book["evidence"]["tests"]["tests/test_x.py::test_b"] = word
    graded = grading.grade_chapter("alpha")
    assert graded.score == pytest.approx(0.6) and rubric.code_dev(graded) == 0
    assert graded.sub_tasks[0].explanation == f"test_b: {word}"


def test_an_execution_leaf_needs_its_record(book) -> None:
    book["evidence"]["runs"]["smoke"]["seconds"] = 20.1
    assert score() == pytest.approx(0.7)
    book["evidence"]["runs"] = {}
    assert "smoke: not run" in grading.grade_chapter("alpha").sub_tasks[1].explanation


def test_a_check_of_the_wrong_type_is_invalid_and_counted(book) -> None:
    book["evidence"]["runs"]["smoke"]["seconds"] = "fast"
    (row,) = grading.grade_book(["alpha"])
    assert row["invalid"] == 1 and row["score"] == pytest.approx(0.7)


def test_a_broken_record_is_invalid_not_zero_in_silence(book, monkeypatch) -> None:
    def broken(slug):
        raise grading.records.RecordError("record is broken")

    monkeypatch.setattr(grading.records, "load", broken)
    (row,) = grading.grade_book(["alpha"])
    assert row["invalid"] == 3 and row["error"] == "record is broken"


def test_evidence_of_other_sources_is_stale(book) -> None:
    assert not grading.evidence_is_stale("alpha")
    script = paths.notebook("alpha")
    script.write_text(script.read_text() + "\n# %%\nmore = 1\n")
    assert grading.evidence_is_stale("alpha")


@pytest.mark.parametrize(
    ("found", "op", "value", "holds"),
    [(1, "<=", 1, True), (1, "<", 1, False), (2, ">=", 1, True), (1, "==", 1.0, True),
     ("ok", "==", "ok", True), (float("nan"), "==", float("nan"), False), (float("inf"), ">=", 1, False),
     (True, "==", 1, False), ([1, 2], "len>=", 2, True), (3, "len>=", 2, False), (0, "exists", None, True),
     (None, "exists", None, False)],
)  # fmt: skip
def test_comparisons(found, op, value, holds) -> None:
    assert grading.compare(found, op, value) == holds


def test_json_pointers() -> None:
    document = {"a/b": {"~": [1, {"c": 2}]}}
    assert grading.lookup(document, "/a~1b/~0/1/c") == 2
    assert grading.lookup(document, "/a~1b/~0/7") is None and grading.lookup(document, "/x/y") is None


def independent(task: dict, documents: dict) -> tuple[Fraction, Fraction]:
    """A second scorer, from the YAML itself: (score, weight) of a node. No code of `readrun.grading` here."""
    if "sub_tasks" in task:
        parts = [independent(t, documents) for t in task["sub_tasks"]]
        total = sum(w for _, w in parts)
        return sum(s * w for s, w in parts) / total, Fraction(task.get("weight", 1))
    good = [documents["tests"].get(t) == "passed" for t in task.get("tests", [])]
    good += [documents["claims"].get(c, {}).get("verdict") == "reproduced" for c in task.get("claims", [])]
    for check in task.get("checks", []):
        value = documents[check["file"]]
        for key in check["pointer"].split("/")[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        if check["op"] == "==":
            good.append(value == check["value"])
        elif check["op"] == "exists":
            good.append(value is not None)
        elif value is None:
            good.append(False)
        else:
            size = len(value) if check["op"] == "len>=" else value
            less = check["op"] in ("<", "<=")
            good.append(size <= check["value"] if less else size >= check["value"])
    return Fraction(bool(good) and all(good)), Fraction(task.get("weight", 1))


@pytest.mark.parametrize("slug", paths.chapters())
def test_book_by_an_independent_scorer(slug) -> None:
    """This book's chapters, the one about grading among them, graded by code that grades nothing else."""
    evidence, record = (paths.data() / "results" / f"{slug}.{end}" for end in ("evidence.json", "gpu.json"))
    found = json.loads(evidence.read_text()) if evidence.exists() else {}
    made = json.loads(record.read_text()) if record.exists() else {}
    documents = {"tests": found.get("tests", {}), "claims": made.get("claims", {}), "record": made}
    documents |= {p: found.get("runs", {}).get(p) or {} for p in ("smoke", "cpu")}
    paper = yaml.safe_load(paths.papers(slug).read_text())
    graded = grading.grade_chapter(slug)
    assert graded.score == pytest.approx(float(independent(paper["rubric"], documents)[0]), abs=1e-12)
    assert grading.grade_chapter(slug) == graded, "grading again gives the same tree"
    assert RubricNode.from_dict(grading.of_paper(claims.load(slug))[0].to_dict())


def test_named_tests_are_run_and_their_worst_outcome_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 0\n\n"
        "@pytest.mark.parametrize('i', [0, 1])\ndef test_half(i): assert i\n\n"
        "@pytest.mark.skip\ndef test_later(): pass\n\ndef test_other(): pass\n"
        "@pytest.mark.parametrize('i', [0, 1])\ndef test_some(i):\n    if i: pytest.skip()\n"
    )
    names = ("good", "bad", "half", "later", "absent", "some")
    found = grading.run_tests([f"tests/test_x.py::test_{n}" for n in names])
    words = dict(zip(names, found.values(), strict=True))
    assert list(words.values()) == ["passed", "failed", "failed", "skipped", "missing", "passed"]


def test_one_command_grades_the_book() -> None:
    done = subprocess.run([sys.executable, "-m", "readrun", "grade"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == paths.chapters()
