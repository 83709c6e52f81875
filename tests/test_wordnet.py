"""The WordNet extract against WordNet's own statistics and networkx; its builder; keys that count it."""

from __future__ import annotations

import ast
import importlib.util
import json
import lzma
import shutil
import sys
from pathlib import Path
from types import ModuleType

import networkx as nx
import pytest
import readrun
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import content, paths, units, wordnet

SOURCES = Path(__file__).resolve().parents[1] / "data" / "sources"


def source(name: str) -> ModuleType:
    """A script of data/sources as a module."""
    spec = importlib.util.spec_from_file_location(f"source_{name}", SOURCES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    """Edges from each synset to its hypernyms, from the file, not from the reader."""
    text = lzma.open(paths.assets("shared") / wordnet.FILE, "rt", encoding="utf-8").read()
    lines = text.split("\n")[:-1]
    n = len(lines) // len(wordnet.COLUMNS)
    up = lines[wordnet.COLUMNS.index("hypernyms") * n :][:n]
    found = nx.DiGraph()
    found.add_nodes_from(range(n))
    found.add_edges_from((i, int(j)) for i, row in enumerate(up) for j in row.replace("|", " ").split())
    return found


def test_counts_are_those_of_wordnet() -> None:
    # wnstats(7WN): unique strings, synsets, word-sense pairs
    for pos, strings, number, senses in (("n", 117_798, 82_115, 146_312), ("a", 21_479, 18_156, 30_002)):
        index = {key: found for key, found in wordnet._tables().index.items() if key[0] == pos}
        found = list(wordnet.all_synsets({"n": "noun", "a": "adj"}[pos]))
        assert (len(index), len(found), sum(map(len, index.values()))) == (strings, number, senses)


def test_a_synset_by_hand() -> None:
    penguin = wordnet.synset("penguin.n.01")
    assert penguin.lemmas == ("penguin",) and penguin.lexname == "noun.animal" and not penguin.is_instance
    assert penguin.definition.startswith("short-legged flightless birds of cold southern")
    assert [s.name for s in penguin.hypernyms] == ["sphenisciform_seabird.n.01"]
    assert penguin.ancestors[wordnet.synset("vertebrate.n.01")] == 5
    assert "king penguin" in {word for s in penguin.descendants for word in s.lemmas}
    assert [s.name for s in wordnet.synsets("organ", "n")][:2] == ["organ.n.01", "organ.n.02"]
    assert wordnet.synset("organ.n.05").lemmas == ("organ", "pipe organ")
    assert wordnet.synsets("pipe organ")[0] == wordnet.synsets("Pipe_Organ")[0]
    assert wordnet.synset("rome.n.01").is_instance and wordnet.synset("canis familiaris.n.01").count > 0
    assert wordnet.synset("heart.n.01").examples[0].startswith("in your heart you know")
    assert {s.pos for s in wordnet.synsets("cold")} == {"n", "a"}


def test_every_name_and_every_lemma_leads_back() -> None:
    for s in list(wordnet.all_synsets())[::97]:
        assert wordnet.synset(s.name) is s
        assert all(s in wordnet.synsets(lemma, s.pos) for lemma in s.lemmas)
        assert all(s in above.hyponyms for above in s.hypernyms)


@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 82_114))
def test_closures_and_depth_are_those_of_networkx(graph: nx.DiGraph, number: int) -> None:
    s = wordnet._synset(number)
    above = nx.single_source_shortest_path_length(graph, number)
    below = nx.single_source_shortest_path_length(graph.reverse(copy=False), number)
    assert {t.number: n for t, n in s.ancestors.items()} | {number: 0} == above
    assert {t.number: n for t, n in s.descendants.items()} | {number: 0} == below
    assert s.depth == min(n for t, n in above.items() if graph.out_degree(t) == 0)


def test_nouns_form_one_hierarchy_without_cycles(graph: nx.DiGraph) -> None:
    assert nx.is_directed_acyclic_graph(graph)
    roots = [s for s in wordnet.all_synsets("noun") if not s.hypernyms]
    assert [s.name for s in roots] == ["entity.n.01"]
    assert roots[0].depth == 0 and not roots[0].ancestors and len(roots[0].descendants) == 82_114


def test_what_the_chapters_read_is_there() -> None:
    for lexname in ("noun.animal", "noun.plant", "noun.food", "noun.artifact"):  # verifiagent
        found = list(wordnet.all_synsets(lexname))
        assert len(found) > 2000 and all(t.definition for s in found for t in (s, *s.hypernyms))
    words = wordnet.lexicon()  # cma: lemmas by lexicographer file
    assert {"noun.animal", "noun.plant", "adj.all", "adj.ppl"} <= set(words) and len(words) == 29
    assert "Adelie penguin" in words["noun.animal"] or "king penguin" in words["noun.animal"]
    assert all(list(w) == sorted(set(w)) and not any("_" in x or "~" in x or "(" in x for x in w) for w in
               words.values())  # fmt: skip


def test_the_list_of_polysemous_nouns_is_what_its_script_makes() -> None:
    listed = json.loads(readrun.asset("meddistract/polysemous_nouns.json").read_text())["words"]
    assert listed == source("polysemous_nouns").polysemous_nouns()
    by_word = {entry["word"]: entry for entry in listed}
    assert "figurative" not in by_word and len(listed) > 600
    assert any(e for s in by_word["congestion"]["other"] for e in s["examples"] if "traffic" in e)
    assert by_word["heart"]["medical"][0]["lexname"] == "noun.body"
    assert all(s["definition"] for entry in listed for s in entry["medical"] + entry["other"])


@pytest.mark.parametrize("name", ["dog", "dog.n", "dog.n.1x", "dog.n.99", "dog.v.01", "nonesuch.n.02", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="synset"):
        wordnet.synset(name)
    assert wordnet.synsets("nosuchword") == []
    with pytest.raises(ValueError, match="pos='v'"):
        wordnet.synsets("dog", "v")


# ---------------------------------------------------------------- builder


def line(offset: int, lexfile: int, words: str, pointers: str, gloss: str, kind: str = "n") -> str:
    listed = " ".join(f"{w} 0" for w in words.split())
    found = pointers.split()
    links = " ".join(f"{p[:-1]} {p[-1]:0>8} n 0000" for p in found)
    count = f"{len(words.split()):02x}"
    return f"{offset:08} {lexfile:02} {kind} {count} {listed} {len(found):03} {links} | {gloss}  \n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A WordNet of six synsets: thing > animal > Dog, dog; an instance; an adjective."""
    nouns = [line(1, 9, "thing", "~2 ~5", "what there is"), line(2, 5, "animal beast", "@1 ~3", "it lives"),
             line(3, 5, "Dog", "@2", 'barks; "the dog  barked"'), line(4, 13, "dog frank", "@1", "sausage"),
             line(5, 18, "Rex", "@i3", "a king")]  # fmt: skip
    (tmp_path / "data.noun").write_text("  1 A licence.  \n  2   \n" + "".join(nouns), encoding="latin-1")
    adjectives = line(1, 0, "tame(p) good", "", "not wild", "s")
    (tmp_path / "data.adj").write_text("  1 A licence.  \n" + adjectives, encoding="latin-1")
    index = "thing n 1 1 ~ 1 0 00000001\nanimal n 1 2 @ ~ 1 1 00000002\nbeast n 1 1 @ 1 0 00000002\n"
    index += "dog n 2 1 @ 2 1 00000004 00000003\nfrank n 1 1 @ 1 0 00000004\nrex n 1 1 @i 1 0 00000005\n"
    (tmp_path / "index.noun").write_text(index)
    (tmp_path / "index.adj").write_text("tame a 1 0 1 0 00000001\ngood a 1 0 1 0 00000001\n")
    (tmp_path / "cntlist.rev").write_text(
        "animal%1:05:00:: 1 7\nbeast%1:05:00:: 1 2\ntame%5:00:00:x:00 1 4\n"
    )
    return tmp_path


def test_builder_on_a_tiny_wordnet(tiny: Path) -> None:
    assert source("wordnet").extract(tiny) == {
        "pos": ["n"] * 5 + ["a"],
        "lexfile": ["9", "5", "5", "13", "18", "0"],
        "lemmas": ["thing", "animal beast", "Dog~2", "dog frank", "Rex", "tame good"],
        "hypernyms": ["", "0", "1", "0", "|2", ""],
        "count": ["", "9", "", "", "", "4"],
        "gloss": ["what there is", "it lives", 'barks; "the dog barked"', "sausage", "", ""],
    }


def test_built_file_reads_back(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path / "book"))
    wordnet._tables.cache_clear()
    wordnet._synset.cache_clear()
    try:
        source("wordnet").main(tiny)
        dog = wordnet.synset("dog.n.02")
        assert dog.lemmas == ("Dog",) and dog.examples == ("the dog barked",) and dog.depth == 2
        assert [s.name for s in dog.hyponyms] == ["rex.n.01"] and dog.hyponyms[0].is_instance
        assert [s.name for s in wordnet.synsets("dog")] == ["dog.n.01", "dog.n.02"]
        folder = paths.assets("shared")
        assert (folder / "wordnet/LICENSE.txt").read_text() == "A licence.\n\n"
        (folder / wordnet.FILE).write_bytes(lzma.compress(b"n\n0\ndog\n\n\nx\n"))
        wordnet._tables.cache_clear()
        with pytest.raises(ValueError, match="differs from its checksum"):
            wordnet.synsets("dog")
    finally:
        wordnet._tables.cache_clear()
        wordnet._synset.cache_clear()


# ---------------------------------------------------------------- keys, sizes


def test_a_chapter_that_imports_the_reader_depends_on_the_extract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(paths.assets("shared") / "wordnet", tmp_path / "data/assets/shared/wordnet")
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    trees = ast.parse("from readrun import wordnet").body
    modules = content.modules_reached(trees)
    assert list(modules) == ["wordnet"]
    before = content.assets_reached(trees, modules, "toy")
    assert list(before) == ["shared/wordnet"]
    (tmp_path / "data/assets/shared" / wordnet.FILE).write_bytes(b"changed")
    assert content.assets_reached(trees, modules, "toy") != before
    assert content.assets_reached(ast.parse("from readrun import rl").body, ["rl"], "toy") == {}


def test_size() -> None:
    assert sum(p.stat().st_size for p in paths.asset_files(paths.assets("shared") / "wordnet")) <= 1.5e6


def count_animals() -> dict:
    return {"n": len(list(wordnet.all_synsets("noun.animal")))}


def test_units_that_read_it_depend_on_the_extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(paths.assets("shared") / "wordnet", tmp_path / "data/assets/shared/wordnet")
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    run = readrun.start("toy", profile="smoke", device="cpu")
    functions = {"of a file": (count_animals, {}), "of the library": (wordnet.synsets, {"lemma": "dog"})}
    before = {name: units.unit_key(*call, run) for name, call in functions.items()}
    (tmp_path / "data/assets/shared" / wordnet.FILE).write_bytes(b"changed")
    for name, call in functions.items():
        assert units.unit_key(*call, run) != before[name], name
