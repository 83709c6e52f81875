"""The commands beside `book`: record in parts, merge, pair, nbval, check, compare."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import CHECKOUT, FixtureBook
from readrun import units


def record(book: FixtureBook) -> dict:
    return json.loads((book.root / "data" / "results" / "alpha.gpu.json").read_text())


def test_a_record_in_parts_survives_a_crash_and_is_completed(fixture_book: FixtureBook) -> None:
    out = [fixture_book.root / "one", fixture_book.root / "two"]
    # two calls at once, each with a part of the units; the second is killed after the first of its two
    first, second = (
        subprocess.Popen(
            fixture_book.command("record", "alpha", "--out", str(folder), "--only", only),
            env=fixture_book.environment | {"FIXTURE_SLEEP": "0.3"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for folder, only in ((out[0], "measure/arm=ours*"), (out[1], "*arm=base*"))
    )
    deadline = time.monotonic() + 100
    while not list(out[1].glob("units/*/meta.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    second.kill()
    assert first.wait() == 0 and second.wait() == -9
    # elsewhere: another checkout of the book, without a GPU and without the build folder
    home = FixtureBook(fixture_book.root / "elsewhere")
    del home.environment["READRUN_DEVICE"]
    merged = home.run("merge", "alpha", *map(str, out))
    assert merged.returncode == 0, merged.stdout
    assert [len(record(home)["metrics"]["score"][arm]) for arm in ("ours", "base")] == [2, 1]
    notebook = (home.root / "notebooks" / "alpha.ipynb").read_text()
    assert "a figure of 2 seeds" in notebook and "papermill" not in notebook
    # a merge that fails leaves the record, and the committed notebook
    before = (home.root / "data" / "results" / "alpha.gpu.json").read_text()
    home.edit("alpha", "here = run.results(metrics=metrics)", "raise RuntimeError('planted')")
    failed = home.run("merge", "alpha")
    assert failed.returncode == 1 and "planted" in failed.stdout
    assert (home.root / "data" / "results" / "alpha.gpu.json").read_text() == before
    assert (home.root / "notebooks" / "alpha.ipynb").read_text() == notebook
    home.edit("alpha", "raise RuntimeError('planted')", "here = run.results(metrics=metrics)")
    # a second call brings what was missing
    last = home.run(
        "record",
        "alpha",
        "--out",
        str(home.root / "three"),
        "--only",
        "*arm=base,seed=1*",
        READRUN_DEVICE="cpu",
    )
    assert last.returncode == 0, last.stdout
    assert home.run("merge", "alpha", str(home.root / "three")).returncode == 0
    assert [len(record(home)["metrics"]["score"][arm]) for arm in ("ours", "base")] == [2, 2]
    checked = home.run("check")
    assert checked.returncode == 0, checked.stdout
    # the committed record is on the page of the other edition, and is stale once the code is another
    assert home.run("book", "--edition", "recorded").returncode == 0
    assert "a figure of 2 seeds" in home.page("alpha") and "stale" not in home.page("alpha")
    home.edit("alpha", '+ (arm == "ours")', '+ 2 * (arm == "ours")')
    assert home.run("book", "--edition", "recorded").returncode == 0
    assert "stale" in home.page("alpha") and "1 code cells have changed" in home.page("alpha")


def test_damaged_and_half_written_units_are_not_brought_in(tmp_path: Path) -> None:
    sound, store = tmp_path / "source" / "units" / "f-0123456789abcdef", tmp_path / "store"
    damaged, hidden = (sound.with_name(name) for name in ("g-0123456789abcdef", ".tmp-012345"))
    for folder in (sound, damaged, hidden):
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"key": "k", "files": {}}))
    (damaged / "meta.json").write_text("{}")
    (store / sound.name).mkdir(parents=True)
    (store / sound.name / "meta.json").write_text("{}")  # the one that is there is damaged
    with pytest.warns(RuntimeWarning) as told:
        units.bring(tmp_path / "source", store)
    assert ["not brought in" in str(w.message) for w in told] == [False, True]
    assert json.loads((store / sound.name / "meta.json").read_text())["key"] == "k"
    assert {p.name[:9] for p in store.iterdir()} == {sound.name[:9], ".damaged-"}
    (damaged / "meta.json").unlink()
    (store / sound.name / "note").write_text("mine")
    units.bring(tmp_path / "source", store)
    assert (store / sound.name / "note").exists(), "a sound unit that is there stays"


def test_pair_follows_the_newer_file_and_check_changes_nothing(fixture_book: FixtureBook) -> None:
    notebook = fixture_book.script("alpha").with_suffix(".ipynb")
    assert fixture_book.run("pair", "--check").returncode == 1
    assert not notebook.exists()
    assert fixture_book.run("pair").returncode == 1  # as pre-commit expects of a hook that changed files
    assert fixture_book.run("pair").returncode == 0 == fixture_book.run("pair", "--check").returncode
    content = json.loads(notebook.read_text())
    content["cells"][0]["source"] = ["# Alpha, edited in Jupyter"]
    notebook.write_text(json.dumps(content))
    later = fixture_book.script("alpha").stat().st_mtime + 10
    os.utime(notebook, (later, later))
    assert fixture_book.run("pair").returncode == 1
    assert "# # Alpha, edited in Jupyter" in fixture_book.script("alpha").read_text()
    assert fixture_book.run("pair", "--check").returncode == 0


def test_worked_examples_are_held_to_their_committed_output(fixture_book: FixtureBook) -> None:
    assert fixture_book.run("execute", "alpha", "--profile", "smoke").returncode == 0
    fixture_book.run("pair")
    assert fixture_book.run("nbval", "--chapters", "alpha").returncode == 0
    made = fixture_book.build / "nbval" / "alpha.ipynb"
    shown = [c["outputs"] for c in json.loads(made.read_text())["cells"] if c.get("outputs")]
    assert [output["text"] for outputs in shown for output in outputs] == [["3.0\n"]]

    def nbval() -> subprocess.CompletedProcess[str]:
        command = [
            *fixture_book.command()[:2],
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--nbval-lax",
            "--nbval-current-env",
            str(made),
        ]
        environment = fixture_book.environment | {"READRUN_PROFILE": "smoke", "READRUN_HEADLESS": "1"}
        return subprocess.run(command, env=environment, cwd=made.parent, capture_output=True, text=True)

    good = nbval()
    assert good.returncode == 0 and "passed" in good.stdout, good.stdout
    made.write_text(made.read_text().replace('"3.0\\n"', '"4.0\\n"'))
    wrong = nbval()
    assert wrong.returncode == 1 and "1 failed" in wrong.stdout


def test_wrong_arguments_are_one_line(fixture_book: FixtureBook) -> None:
    for arguments in (
        ("sweep", "--chapters", "alpha"),
        ("book", "--chapters", "none"),
        ("book", "--profile", "huge"),
        ("merge", "alpha", "no/such/folder"),
    ):
        done = fixture_book.run(*arguments)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stdout and done.stdout.startswith("readrun: "), done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from readrun.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += (
        "print(sorted({'torch', 'numpy', 'scipy', 'matplotlib', 'pydantic', 'jupytext'} & set(sys.modules)))"
    )
    command = [*FixtureBook.command(None, "")[:1], "-c", code]  # type: ignore[arg-type]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(CHECKOUT / "lib")}, capture_output=True, text=True
    )
    assert done.stdout.rstrip().endswith("[]"), done.stdout
