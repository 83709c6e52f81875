"""Outputs stand only under the cell that made them; staging writes what differs and nothing else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FixtureBook
from hypothesis import given
from hypothesis import strategies as st
from readrun import publish


def code(
    source: str, *outputs: dict[str, Any], count: int | None = 1, tags: tuple[str, ...] = ()
) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "source": source,
        "metadata": metadata,
        "outputs": list(outputs),
        "execution_count": count,
    }


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": [text]}


def test_join_is_by_exact_source() -> None:
    executed = {"cells": [code("a = 1", stream("one")), code("b", stream("b!")), code("gone", stream("x"))]}
    today = {"cells": [code("b", count=None), code("a = 1 ", count=None), code("a = 1", count=None)]}
    assert publish.join(today, executed) == 1
    assert [cell["outputs"] for cell in today["cells"]] == [[stream("b!")], [], [stream("one")]]


def test_join_drops_the_injected_cell_widget_views_and_progress_bars() -> None:
    view = {
        "output_type": "display_data",
        "data": {publish.WIDGET: {}, "text/plain": ["HBox()"]},
        "metadata": {},
    }
    bar, warning = stream("\r 10%\r 20%", "stderr"), stream("UserWarning: careful", "stderr")
    injected = code("profile = 1", stream("injected"), tags=("injected-parameters",))
    today = {"cells": [code("profile = 1", count=None), code("x", count=None)]}
    executed = {"cells": [injected, code("x", bar, view, warning, stream("kept"))]}
    assert publish.join(today, executed) == 1
    assert today["cells"][0]["outputs"] == []
    assert today["cells"][1]["outputs"] == [warning, stream("kept")]


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_join_never_moves_an_output_to_another_source(then: list[str], now: list[str]) -> None:
    executed = {"cells": [code(source, stream(f"{source}{i}")) for i, source in enumerate(then)]}
    today = {"cells": [code(source, count=None) for source in now]}
    missing = publish.join(today, executed)
    used = ["".join(o["text"]) for cell in today["cells"] for o in cell["outputs"]]
    assert all(o["text"][0][0] == cell["source"] for cell in today["cells"] for o in cell["outputs"])
    for source in set(now):  # equal sources: in order, none twice
        own = [text for text in used if text[0] == source]
        assert own == sorted(set(own))
    assert (
        missing == len(now) - len(used) == len(now) - sum(min(then.count(s), now.count(s)) for s in set(now))
    )


def test_toc_has_the_chapters_that_exist() -> None:
    text = yaml.safe_dump({"format": "jb-book", "root": "index", "parts": [
        {"caption": "About", "chapters": [{"file": "how_to_run"}]},
        {"caption": "I", "part": "one", "chapters": [{"file": "chapters/a"}, {"file": "chapters/missing"}]},
        {"caption": "II", "part": "two", "chapters": [{"file": "chapters/also_missing"}]}]})  # fmt: skip
    made = yaml.safe_load(publish.toc(text, ["a", "new", "odd"]))
    assert [(part["caption"], [entry["file"] for entry in part["chapters"]]) for part in made["parts"]] == [
        ("About", ["how_to_run"]),
        ("I", ["chapters/a"]),
        ("More", ["chapters/new", "chapters/odd"]),
    ]
    assert all("part" not in part for part in made["parts"]), "Jupyter Book refuses unknown keys"


def test_sync_writes_what_differs_and_deletes_what_is_gone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, files in {source: {"same": "1", "changed": "new", "sub/made": "3"},
                          target: {"same": "1", "changed": "old", "gone": "4"}}.items():  # fmt: skip
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    before = (target / "same").stat().st_mtime_ns
    publish.sync(source, target)
    assert {str(f.relative_to(target)): f.read_text() for f in target.rglob("*") if f.is_file()} == {
        "same": "1", "changed": "new", "sub/made": "3"}  # fmt: skip
    assert (target / "same").stat().st_mtime_ns == before


def test_tree_key_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("bc")
    keys = [publish.tree_key(tmp_path)]
    (tmp_path / "a").write_text("b")
    keys.append(publish.tree_key(tmp_path))
    (tmp_path / "a").rename(tmp_path / "ab")
    keys.append(publish.tree_key(tmp_path))
    (tmp_path / "ab").rename(tmp_path / "a")
    assert len(set(keys)) == 3 and publish.tree_key(tmp_path) == keys[1]


@pytest.fixture
def here(fixture_book: FixtureBook, monkeypatch: pytest.MonkeyPatch) -> FixtureBook:
    """The fixture book as the book of this process."""
    monkeypatch.setenv("READRUN_ROOT", str(fixture_book.root))
    return fixture_book


def test_paired_notebook_equals_its_script_and_is_stable(here: FixtureBook) -> None:
    import jupytext
    import nbformat

    text = publish.paired("alpha")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    read = jupytext.read(here.script("alpha"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in read.cells]
    here.script("alpha").with_suffix(".ipynb").write_text(text)
    assert publish.paired("alpha") == text


def test_pair_drops_outputs_of_changed_cells_and_keeps_the_others(here: FixtureBook) -> None:
    file = here.script("beta").with_suffix(".ipynb")
    notebook = json.loads(publish.paired("beta"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [stream("recorded")], "execution_count": 1}
    file.write_text(json.dumps(notebook))
    here.edit("beta", 'print("sum"', 'print("total"')
    kept = [c["outputs"] for c in json.loads(publish.paired("beta"))["cells"] if c["cell_type"] == "code"]
    assert kept.count([stream("recorded")]) == len(kept) - 1 and kept.count([]) == 1


def test_worked_examples_get_outputs_from_this_machine_and_nbval_sees_them_alone(here: FixtureBook) -> None:
    example = next(
        c for c in json.loads(publish.paired("alpha"))["cells"] if "NBVAL_CHECK" in "".join(c["source"])
    )
    other = "import os"
    folder = publish.run_folder("alpha", "cpu")
    folder.mkdir(parents=True)
    script = publish.source_notebook("alpha")
    for cell in script["cells"]:
        if cell["cell_type"] == "code" and (
            cell["source"] == "".join(example["source"]) or other in cell["source"]
        ):
            cell |= {"outputs": [stream("3.0\n")], "execution_count": 2}
    (folder / "executed.ipynb").write_text(json.dumps(script))
    found = {
        "".join(c["source"])[:9]: c["outputs"]
        for c in json.loads(publish.paired("alpha"))["cells"]
        if c.get("outputs")
    }
    assert found == {"# NBVAL_C": [stream("3.0\n")]}, "an ordinary cell took the output of another profile"


def test_top_heading_stays_first_and_the_failure_follows(here: FixtureBook, tmp_path: Path) -> None:
    status = {"state": "dead_kernel", "error": "it ~~~ died", "traceback": "```\nFile x", "cell": 3}
    publish.page("alpha", tmp_path, status, False, tmp_path / "stage")
    first = "".join(json.loads((tmp_path / "stage/chapters/alpha.ipynb").read_text())["cells"][0]["source"])
    assert first.startswith("# Alpha\n\n``````{admonition}") and "dead kernel in code cell 3" in first
    assert first.rstrip().endswith("Prose of alpha.")


def test_a_changed_style_rebuilds_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, html = tmp_path / "staged", tmp_path / "book" / "_build" / "html"
    (book / "_static").mkdir(parents=True)
    (book / "index.md").write_text("# Book")
    (book / "_static" / "look.css").write_text("p { color: red }")
    builds: list[bool] = []

    def jupyter_book(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        builds.append((html / "index.html").exists())  # whether the pages of the last build are still there
        html.mkdir(parents=True, exist_ok=True)
        (html / "index.html").write_text("page")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(publish.paths, "root", lambda: tmp_path)
    monkeypatch.setattr(publish.subprocess, "run", jupyter_book)
    assert [publish.build_html(book), publish.build_html(book)] == [0, 0]
    (book / "index.md").write_text("# The book")
    publish.build_html(book)
    (book / "_static" / "look.css").write_text("p { color: blue }")
    publish.build_html(book)
    assert builds == [False, True, False]  # first; a page in place; a style: all anew
