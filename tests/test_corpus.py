"""The frozen text: checksums, splits, cleanliness; its builder on tiny packages; keys that count it."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shutil
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import readrun
from hypothesis import given
from hypothesis import strategies as st
from readrun import content, corpus, lm, paths, units

SOURCE = Path(__file__).resolve().parents[1] / "data" / "sources" / "corpus.py"


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("source_corpus", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_splits_are_disjoint_and_complete() -> None:
    parts = {split: corpus.documents(split) for split in corpus.SPLITS}
    ids = [d.id for part in parts.values() for d in part]
    assert len(ids) == len(set(ids)) == len(corpus.documents())
    size = {split: sum(len(d.text) for d in part) for split, part in parts.items()}
    assert 0.85 < size["train"] / sum(size.values()) < 0.95 and size["validation"] > 4e5 < size["test"]
    for kind in corpus.KINDS:
        assert all(corpus.documents(split, kind) for split in corpus.SPLITS)
    assert sum(size.values()) == len(corpus.text()) - 3 * (len(ids) - 1)


def test_no_paragraph_stands_in_two_splits() -> None:
    prose = [k for k in corpus.KINDS if k != "code"]
    seen: dict[str, set[str]] = {
        split: {" ".join(re.findall("[a-z]+", p.lower())) for p in corpus.text(split, prose).split("\n\n")}
        for split in corpus.SPLITS
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_text_is_plain_ascii_prose() -> None:
    assert re.fullmatch(r"[ -~\n]+", corpus.text())  # 96 signs: a character-level vocabulary
    for d in corpus.documents(kinds=("novel", "guide", "docstring")):
        for paragraph in d.text.split("\n\n"):
            assert "\n" not in paragraph and paragraph == paragraph.strip() and len(paragraph.split()) >= 6
    for d in corpus.documents(kinds="code"):
        ast.parse(d.text)


def test_documents_know_where_they_are_from() -> None:
    by_id = {d.id: d for d in corpus.documents()}
    assert by_id["austen/emma/02"].text.startswith("Emma Woodhouse, handsome, clever, and rich,")
    assert by_id["python3.11/textwrap.py"].kind == "code"
    assert by_id["scipy/optimize/_minimize.py"].kind == "docstring"
    assert any(name.startswith("python3.11-doc/reference/") for name in by_id)


def test_bpe_of_the_corpus_packs_it() -> None:
    prose = [d.text for d in corpus.documents("validation", ("novel", "guide"))]
    tokenizer = lm.bpe_tokenizer(prose, 1024)
    sample = corpus.documents("test", "novel")[0].text
    assert len(tokenizer) == 1024 and tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert len(tokenizer(sample).input_ids) < 0.45 * len(sample)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split='dev'"):
        corpus.documents("dev")
    with pytest.raises(ValueError, match="kinds: 'poem'"):
        corpus.text("train", ("novel", "poem"))


@given(st.text(max_size=30))
def test_a_split_depends_on_the_name_alone(name: str) -> None:
    assert corpus.split_of(name) == corpus.Document(name, "code", "").split in corpus.SPLITS


def test_size() -> None:
    assert sum(p.stat().st_size for p in paths.asset_files(paths.assets("shared") / "corpus")) <= 4e6


# ---------------------------------------------------------------- builder


SENTENCE = "The quick brown fox jumps over the lazy dog in the garden behind the old stone house."
HTML = f"""<html><body><p>Outside of the body there is a sentence that nobody wants to read here.</p>
<div class="body" role="main"><h1>Title<a class="headerlink">x</a></h1><p>{SENTENCE}</p>
<p>It isn\u2019t \u201cshort\u201d, it has <code>some_code</code> in it and a
link<a class="headerlink">x</a>.</p>
<pre>print("this is code which is not prose and must not be kept in there.")</pre>
<p>A formula of order <span class="math">n^2</span> makes a sentence that lacks something.</p>
<p>The method that is described in <a class="citation-reference">[1]</a> lacks a name in its sentence.</p>
<p>The method is fast enough <a class="footnote-reference">[1]</a>, so this sentence is whole .</p>
<table><tr><td><p>A cell of a table that is long enough to be a sentence of prose.</p></td></tr></table>
<dl><dt>signature(a, b) of a function that is long enough to be prose.</dt>
<dd><p>Return the sum of all the values that were given<br>to it before.</p></dd></dl></div></body>"""


def test_paragraphs_of_a_page(builder: ModuleType) -> None:
    found = [p for p in map(builder.ascii_text, builder.Page(HTML).paragraphs) if builder.is_prose(p)]
    assert found == [
        SENTENCE,
        'It isn\'t "short", it has some_code in it and a link.',
        "Return the sum of all the values that were given to it before.",
    ]


def test_paragraphs_of_a_docstring(builder: ModuleType) -> None:
    text = """Solve a problem with the method of the *best* friend [1]_.

    This uses :func:`scipy.solve <x>` and ``numpy.dot`` to find :ref:`what` we need here.

    It has the order :math:`n^2` which is not a thing that we keep in here.

    >>> print("no listing of any kind is kept in the prose of this book.")

    Parameters
    ----------
    x : array
        The description of a parameter is not kept since it is not prose.

    Notes
    -----
    As shown in [1]_ a sentence without its subject is not a good one at all.
    But the one after it in the
    notes is good.

    Examples
    --------
    Here is a sentence in the examples that we do not want to see at all.
    """
    kept = [p for p in builder.docstring_paragraphs(text) if builder.is_prose(p)]
    assert kept == [
        "Solve a problem with the method of the best friend.",
        "This uses scipy.solve and numpy.dot to find what we need here.",
    ]


def test_repeated_paragraphs_are_dropped(builder: ModuleType) -> None:
    seen = builder.Seen()
    assert seen.is_new(SENTENCE) and not seen.is_new(SENTENCE)
    assert not seen.is_new(SENTENCE.upper().replace("HOUSE", "home"))
    assert seen.is_new("Two words.") and not seen.is_new("Two words!")
    assert seen.is_new(SENTENCE[:40] + " and then it goes on in a way that was not seen before in the text.")


def chapter_lines() -> bytes:
    """A vector of lines as R stores it: each string has four bytes of flags and four of length."""
    lines = ["EMMA", "", "CHAPTER I", "", SENTENCE[:39], SENTENCE[40:], "", "CHAPTER II", "", "Short."]
    strings = b"".join(b"\x00\x04\x00\x09" + len(x).to_bytes(4, "big") + x.encode() for x in lines)
    return b"X\n\x00\x00\x00\x03" + b"\x00\x00\x00\x10" + len(lines).to_bytes(4, "big") + strings


def test_builder_on_tiny_packages(builder: ModuleType, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    raw = chapter_lines()
    files = {
        "r-cran-janeaustenr/data/Rdata.rdb": len(raw).to_bytes(4, "big") + zlib.compress(raw),
        "python3.11-doc/doc/html/library/fox.html": HTML.replace("quick", "slow").encode(),
        "python3.11-doc/doc/html/whatsnew/3.11.html": HTML.encode(),
        "libpython3.11-stdlib/usr/lib/python3.11/fox.py": b"x = 1  # a line\n" * 300,
        "libpython3.11-stdlib/usr/lib/python3.11/short.py": b"x = 1\n",
        "libpython3.11-stdlib/usr/lib/python3.11/accents.py": "x = 'é'  # a line\n".encode() * 300,
    }
    for name, data in files.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_bytes(data)
    novels = list(builder.novels(packages / "r-cran-janeaustenr"))
    assert novels == [("austen/emma/00", []), ("austen/emma/01", [SENTENCE]), ("austen/emma/02", ["Short."])]
    seen = builder.Seen()
    found = list(builder.clean("novel", novels, seen, least=20))
    found += builder.clean("guide", builder.guides(packages / "python3.11-doc"), seen, least=20)
    assert [(d.id, d.kind) for d in found] == [
        ("austen/emma/01", "novel"), ("python3.11-doc/library/fox", "guide")
    ]  # fmt: skip
    assert SENTENCE not in found[1].text and "Return the sum" in found[1].text
    assert list(builder.clean("guide", builder.guides(packages / "python3.11-doc"), seen, least=20)) == []
    assert [name for name, _ in builder.modules(packages / "libpython3.11-stdlib")] == ["python3.11/fox.py"]


def test_docstrings_of_an_installed_package(builder: ModuleType) -> None:
    found = dict(itertools.islice(builder.docstrings("networkx"), 40))
    assert any("dominating set" in p for p in found["networkx/algorithms/approximation/dominating_set.py"])
    assert not any("/tests/" in name for name in found)
    with pytest.raises(ValueError, match="nosuchpackage"):
        next(builder.docstrings("nosuchpackage"))


# ---------------------------------------------------------------- checksum, keys


def count_words() -> dict:
    return {"n": len(corpus.text("test").split())}


def test_what_reads_it_depends_on_it_and_a_damaged_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "data/assets/shared"
    shutil.copytree(paths.assets("shared") / "corpus", shared / "corpus")
    shutil.copy(paths.assets("shared") / "MANIFEST.json", shared)
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    trees = ast.parse("from readrun import corpus").body
    before = content.assets_reached(trees, content.modules_reached(trees), "toy")
    assert list(before) == ["shared/corpus"]
    run = readrun.start("toy", profile="smoke", device="cpu")
    key = units.unit_key(count_words, {}, run)
    (shared / corpus.FILE).write_bytes(b"damaged")
    assert content.assets_reached(trees, content.modules_reached(trees), "toy") != before
    assert units.unit_key(count_words, {}, run) != key
    corpus._all.cache_clear()
    with pytest.raises(ValueError, match="differs from its checksum"):
        corpus.text()
    corpus._all.cache_clear()
