"""What `readrun book` executes and publishes after which change, on the fixture book."""

from __future__ import annotations

import json
import time

from conftest import FixtureBook


def test_a_fresh_book_is_executed_and_published(built_book: FixtureBook) -> None:
    for slug in ("alpha", "beta", "gamma"):
        (status,) = built_book.statuses(slug).values()
        assert status["state"] == "ok", status
        assert status["seconds"] > 0 and status["peak_ram_gib"] > 0.01
        folder = built_book.build / slug / "smoke" / next(iter(built_book.statuses(slug)))
        assert "Executing" in (folder / "log.txt").read_text()
    assert "sum [10.0]" in built_book.page("beta")
    assert "3.0" in built_book.page("alpha")
    assert "after smoke" in built_book.page("gamma")
    assert (built_book.html / "index.html").is_file()


def test_pages_have_no_traces_of_the_execution(built_book: FixtureBook) -> None:
    staged = json.loads((built_book.build / "book" / "chapters" / "alpha.ipynb").read_text())
    assert all("papermill" not in json.dumps(cell["metadata"]) for cell in staged["cells"])
    assert "injected-parameters" not in json.dumps(staged)
    assert str(built_book.build / "alpha") not in json.dumps(staged), (
        "the injected cell's `out` is on the page"
    )
    assert "widgets" not in staged["metadata"]


def test_media_of_a_run_are_reached_from_the_page(built_book: FixtureBook) -> None:
    assert 'src="../_static/media/beta/dot.svg"' in built_book.page("beta")
    assert (built_book.html / "_static" / "media" / "beta" / "dot.svg").is_file()


def test_table_of_contents_lists_the_chapters_that_exist(built_book: FixtureBook) -> None:
    toc = (built_book.build / "book" / "_toc.yml").read_text()
    assert "not_written" not in toc and "Empty so far" not in toc
    order = ["Reasoning", "chapters/beta", "More", "chapters/alpha", "chapters/gamma"]
    assert [toc.index(word) for word in order] == sorted(toc.index(word) for word in order)


def test_nothing_changed_executes_and_builds_nothing(built_book: FixtureBook) -> None:
    before, pages = (
        built_book.executions(),
        {p: p.stat().st_mtime_ns for p in built_book.html.rglob("*.html")},
    )
    started = time.monotonic()
    done = built_book.book()
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - started < 15
    assert built_book.executions() == before
    assert {p: p.stat().st_mtime_ns for p in built_book.html.rglob("*.html")} == pages


def test_prose_edit_republishes_one_page_without_executing(built_book: FixtureBook) -> None:
    before, beta = built_book.executions(), (built_book.html / "chapters" / "beta.html").stat().st_mtime_ns
    built_book.edit("alpha", "A worked example.", "A worked example, told better.")
    assert built_book.book().returncode == 0
    assert built_book.executions() == before
    assert "told better" in built_book.page("alpha") and "3.0" in built_book.page("alpha")
    assert (built_book.html / "chapters" / "beta.html").stat().st_mtime_ns == beta
    built_book.edit("alpha", "A worked example, told better.", "A worked example.")


def test_figure_and_comment_edits_draw_again_from_saved_units(built_book: FixtureBook) -> None:
    runs, units, others = built_book.statuses("alpha"), built_book.units("alpha"), built_book.statuses("beta")
    built_book.edit("alpha", '"a figure of"', '"a better figure of"')
    built_book.edit("alpha", "    values = []", "    values = []  # one per step")
    assert built_book.book().returncode == 0
    (new,) = set(built_book.statuses("alpha")) - set(runs)
    assert new.split("-")[0] in {name.split("-")[0] for name in runs}, "the content key changed"
    assert built_book.units("alpha") == units and len(units) == 2
    assert built_book.statuses("beta") == others
    assert "a better figure of 1 seeds" in built_book.page("alpha")
    built_book.edit("alpha", '"a better figure of"', '"a figure of"')
    built_book.edit("alpha", "    values = []  # one per step", "    values = []")


def test_code_edit_executes_its_chapter_alone_and_undoing_it_none(built_book: FixtureBook) -> None:
    units, others = built_book.units("alpha"), built_book.statuses("beta") | built_book.statuses("gamma")
    built_book.edit("alpha", '+ (arm == "ours")', '+ 2 * (arm == "ours")')
    assert built_book.book().returncode == 0
    assert len(built_book.units("alpha")) == 2 * len(units)
    assert built_book.statuses("beta") | built_book.statuses("gamma") == others
    before = built_book.executions()
    built_book.edit("alpha", '+ 2 * (arm == "ours")', '+ (arm == "ours")')
    assert built_book.book().returncode == 0
    assert built_book.executions() == before


def test_a_chapter_that_has_gone_leaves_no_page(built_book: FixtureBook) -> None:
    text = built_book.script("gamma").read_text()
    built_book.script("gamma").unlink()
    assert built_book.book().returncode == 0
    assert not (built_book.html / "chapters" / "gamma.html").exists()
    built_book.script("gamma").write_text(text)


def test_narrowing_to_chapters_and_seeds(built_book: FixtureBook) -> None:
    others = built_book.statuses("beta") | built_book.statuses("gamma")
    done = built_book.book("--chapters", "alpha", "--seed", "5", "--seeds", "3")
    assert done.returncode == 0, done.stdout
    (run,) = [name for name in built_book.statuses("alpha") if name.endswith("-s5n3")]
    results = json.loads((built_book.build / "alpha" / "smoke" / run / "results.json").read_text())
    assert len(results["metrics"]["score"]["ours"]) == 3
    assert built_book.statuses("beta") | built_book.statuses("gamma") == others
    wrong = built_book.book("--chapters", "alpha delta")
    assert wrong.returncode == 2 and "delta" in wrong.stdout and "alpha, beta, gamma" in wrong.stdout


def test_recorded_edition_executes_nothing(fixture_book: FixtureBook) -> None:
    cell = {"cell_type": "code", "metadata": {}, "execution_count": 3}
    cell["source"] = '# NBVAL_CHECK_OUTPUT\nprint(f"{score([1.0, 2.0, 6.0]):.1f}")'
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["recorded on a GPU\n"]}]
    notebook = {"cells": [cell], "metadata": {}}
    fixture_book.script("alpha").with_suffix(".ipynb").write_text(json.dumps(notebook))
    done = fixture_book.book("--edition", "recorded")
    assert done.returncode == 0, done.stdout
    assert fixture_book.executions() == {}
    assert "recorded on a GPU" in fixture_book.page("alpha")
    assert "have changed since this chapter was recorded" in fixture_book.page("alpha")
