"""The commands beside `book`: record in parts, merge, tar, pair, nbval, check, compare."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from conftest import CHECKOUT, FixtureBook
from readrun import __main__ as commands


def record(book: FixtureBook) -> dict:
    return json.loads((book.root / "data" / "results" / "alpha.gpu.json").read_text())


def test_a_record_in_parts_survives_a_crash_and_is_completed(fixture_book: FixtureBook) -> None:
    out = [fixture_book.root / "one", fixture_book.root / "two"]
    # two calls at once, each with a part of the units; the second is killed after the first of its two
    first, second = (
        subprocess.Popen(
            fixture_book.command("record", "alpha", "--out", str(folder), "--only", only, *tar),
            env=fixture_book.environment | {"FIXTURE_SLEEP": "0.3"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for folder, only, tar in ((out[0], "measure/arm=ours*", ["--tar"]), (out[1], "*arm=base*", []))
    )
    deadline = time.monotonic() + 100
    while not list(out[1].glob("units/*/meta.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    second.kill()
    assert first.wait() == 0 and second.wait() == -9
    parts = sorted(out[0].glob("*.tar"))
    assert parts and not [f for f in out[0].rglob("*") if f.is_file() and f.suffix != ".tar"]
    assert any("status.json" in name for part in parts for name in tarfile.open(part).getnames())
    # elsewhere: another checkout of the book, without a GPU and without the build folder
    home = FixtureBook(fixture_book.root / "elsewhere")
    del home.environment["READRUN_DEVICE"]
    merged = home.run("merge", "alpha", *map(str, parts), str(out[1]))
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


def test_damaged_and_foreign_units_are_not_brought_in(tmp_path: Path) -> None:
    source, store = tmp_path / "source" / "units" / "f-0123456789abcdef", tmp_path / "store"
    source.mkdir(parents=True)
    (source / "meta.json").write_text("{}")
    (store / source.name).mkdir(parents=True)
    (store / source.name / "meta.json").write_text('{"mine": 1}')
    commands.bring(tmp_path / "source", store)
    assert (store / source.name / "meta.json").read_text() == '{"mine": 1}'
    assert not list(store.glob(".bring-*"))


def test_pack_keeps_every_file_in_few_small_parts(tmp_path: Path) -> None:
    sizes = {"a/x.bin": 9 << 20, "a/y.bin": 8 << 20, "b/z.bin": 5 << 20, "b/small.json": 10}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))
    commands.pack(tmp_path)
    parts = sorted(tmp_path.glob("*.tar"))
    assert len(parts) == 2 and all(part.stat().st_size <= 16 << 20 for part in parts)
    found = {member.name: member.size for part in parts for member in tarfile.open(part).getmembers()}
    assert found == sizes
    (tmp_path / "huge.bin").write_bytes(bytes(17 << 20))
    with pytest.raises(ValueError, match="does not fit"):
        commands.pack(tmp_path)
    assert (tmp_path / "huge.bin").exists()


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
