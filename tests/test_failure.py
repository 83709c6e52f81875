"""A chapter that fails, fails alone: status and page say how, the others are built, the exit code is 1."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FixtureBook
from readrun.execute import _failure


def test_raising_cell_fails_alone_today_and_tomorrow(fixture_book: FixtureBook) -> None:
    done = fixture_book.book(FIXTURE_FAULT="raise")
    assert done.returncode == 1 and "ArithmeticError: planted in gamma" in done.stdout
    (status,) = fixture_book.statuses("gamma").values()
    assert (status["state"], status["cell"]) == ("failed", 4)
    assert "planted in gamma" in status["traceback"] and "\x1b" not in status["traceback"]
    page = fixture_book.page("gamma")
    assert "did not run to its end: failed in code cell 4" in page and "planted in gamma" in page
    assert "before" in page, "what ran before the failure is not shown"
    assert [s["state"] for slug in ("alpha", "beta") for s in fixture_book.statuses(slug).values()] == [
        "ok",
        "ok",
    ]
    assert "sum [10.0]" in fixture_book.page("beta")
    # nothing was touched since: the failure may not turn into "nothing to be done"
    before = fixture_book.executions()
    assert fixture_book.book(FIXTURE_FAULT="raise").returncode == 1
    after = fixture_book.executions()
    assert [file.parts[-4] for file in before if before[file] != after[file]] == ["gamma"]
    # the cause outside the sources is gone
    assert fixture_book.book().returncode == 0
    assert "did not run to its end" not in fixture_book.page("gamma")


@pytest.fixture
def small_disk(fixture_book: FixtureBook) -> Iterator[Path]:
    """A file system of 2 MiB where gamma's runs go; a skip where nothing may be mounted."""
    folder = fixture_book.build / "gamma"
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("may not mount a file system; see test_full_disk_is_named for the classification alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(fixture_book: FixtureBook, small_disk: Path) -> None:
    done = fixture_book.book("--chapters", "gamma", FIXTURE_FAULT="fill")
    assert done.returncode == 1
    (status,) = fixture_book.statuses("gamma").values()
    assert status["state"] == "disk_full" and f"[Errno {errno.ENOSPC}]" in status["error"]
    assert "disk full" in fixture_book.page("gamma")


def test_full_disk_is_named() -> None:
    assert _failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False, 1.0)["state"] == "disk_full"
    assert _failure(OSError(errno.EACCES, os.strerror(errno.EACCES)), False, 1.0)["state"] == "failed"


def test_the_error_that_another_one_hides_is_named() -> None:
    """A block whose exit fails too, as that of a broken CUDA capture does."""

    @contextlib.contextmanager
    def capture() -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("a previous error")

    for hidden, more in ((MemoryError("no room"), " (while handling MemoryError: no room)"), (None, "")):
        with pytest.raises(RuntimeError) as caught, capture():  # noqa: PT012
            if hidden:
                raise hidden
        assert _failure(caught.value, False, 1.0)["error"] == f"RuntimeError: a previous error{more}"


@pytest.mark.parametrize(("fault", "state", "cell"), [("die", "dead_kernel", 4), ("hang", "timeout", 4)])
def test_status_names_state_and_cell(fixture_book: FixtureBook, fault: str, state: str, cell: int) -> None:
    folder = fixture_book.root / "run"
    limit = "12" if fault == "hang" else "100"
    done = fixture_book.run(
        "execute",
        "gamma",
        "--profile",
        "smoke",
        "--folder",
        str(folder),
        "--limit",
        limit,
        FIXTURE_FAULT=fault,
    )
    assert done.returncode == 0, done.stdout  # the status is the result
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["cell"]) == (state, cell), status
    outputs = [
        cell["outputs"]
        for cell in json.loads((folder / "executed.ipynb").read_text())["cells"]
        if cell.get("outputs")
    ]
    assert "before" in json.dumps(outputs), "the partial notebook lost what ran"
    assert not (folder / "status.part").exists()


def test_corrupt_data_record_and_syntax_fail_their_chapters(fixture_book: FixtureBook) -> None:
    (fixture_book.root / "data/assets/beta/numbers.txt").write_text("5 5\n")
    fixture_book.edit("gamma", 'print("before")', 'print("before"')
    record = fixture_book.root / "data/results/alpha.gpu.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text('{"schema": 1, "slug": ')
    done = fixture_book.book()
    assert done.returncode == 1
    (beta,), (gamma,) = (fixture_book.statuses(slug).values() for slug in ("beta", "gamma"))
    assert beta["state"] == "corrupt_data" and "numbers.txt" in beta["error"]
    assert gamma["state"] == "failed" and "SyntaxError" in gamma["error"]
    assert "numbers.txt" in fixture_book.page("beta")
    assert "bad record" in fixture_book.page("alpha") and "3.0" in fixture_book.page("alpha")
    assert record.read_text() == '{"schema": 1, "slug": ', "a broken record was touched"


def test_no_status_at_all_is_a_failure(fixture_book: FixtureBook) -> None:
    """An execution that ends before it can say anything: here a cell kills it."""
    fixture_book.edit(
        "alpha", 'print(f"{score', 'import signal; os.kill(os.getppid(), signal.SIGKILL)\nprint(f"{score'
    )
    done = fixture_book.book("--chapters", "alpha")
    assert done.returncode == 1 and "without a status" in done.stdout
    assert "did not run to its end: lost" in fixture_book.page("alpha")
