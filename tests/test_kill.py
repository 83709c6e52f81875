"""SIGKILL at any moment, to one process or the whole group: nothing goes on writing, and the next run makes
the same book as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import FixtureBook

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dying with the parent needs Linux")
SLOW = {"FIXTURE_SLEEP": "0.3"}


def contents(book: FixtureBook) -> dict[str, str]:
    """Digest of every published file and of every executed cell's outputs."""
    found = {}
    for file in sorted(book.html.rglob("*")):
        if file.is_file() and file.name not in (".buildinfo", "searchindex.js"):
            found[str(file.relative_to(book.html))] = hashlib.sha256(file.read_bytes()).hexdigest()
    index = (book.html / "searchindex.js").read_text()
    found["searchindex.js"] = hashlib.sha256(
        "".join(sorted(index)).encode()
    ).hexdigest()  # its order may differ
    for slug in ("alpha", "beta", "gamma"):
        for name in book.statuses(slug):
            cells = json.loads((book.build / slug / "smoke" / name / "executed.ipynb").read_text())["cells"]
            found[f"{slug}/{name}"] = json.dumps([cell.get("outputs") for cell in cells])
    return found


def working(book: FixtureBook) -> list[psutil.Process]:
    """Processes that this book's run started and that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("READRUN_JOB") == str(book.build)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """A book of one go, and the seconds that it took."""
    # the same length of path for all: some cells' outputs and logs could otherwise differ in line breaks
    book, started = FixtureBook(tmp_path_factory.mktemp("undisturbed") / "book"), time.monotonic()
    assert book.book(**SLOW).returncode == 0
    return contents(book), time.monotonic() - started


@pytest.mark.parametrize("whom", ["parent", "group"])
def test_killed_at_random_moments_the_next_run_makes_the_same_book(
    fixture_book: FixtureBook, undisturbed: tuple[dict[str, str], float], whom: str
) -> None:
    expected, seconds = undisturbed
    draw = random.Random()
    for moment in (
        draw.uniform(0.5, 0.3 * seconds),
        draw.uniform(0.3 * seconds, 0.6 * seconds),
        draw.uniform(1, seconds),
    ):
        command = fixture_book.command("--with-parent", "book", "--profile", "smoke")
        # as under make: a parent that waits, and the book's process below it
        parent = subprocess.Popen(
            ["sh", "-c", '"$@" & wait', "sh", *command], env=fixture_book.environment | SLOW,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(moment)
        if whom == "parent":
            parent.kill()
        else:
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 5
        while working(fixture_book) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not working(fixture_book), (
            f"killed {whom} after {moment:.2f} s; still there: {working(fixture_book)}"
        )
    done = fixture_book.book(**SLOW)
    assert done.returncode == 0, done.stdout
    other = {name: value for name, value in contents(fixture_book).items() if expected.get(name) != value}
    assert not other and contents(fixture_book).keys() == expected.keys()
    temporary = [
        p for p in fixture_book.build.rglob("*") if p.name.startswith("status.part") or p.name == "book.new"
    ]
    assert not temporary


HOLD = """import time
from readrun.__main__ import locked
with locked():
    print("in", flush=True)
    time.sleep({})
"""


def start(book: FixtureBook, code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env=book.environment | environment, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_a_left_over_worker_is_ended_before_the_next_run(fixture_book: FixtureBook) -> None:
    """A worker that a chapter started in a session of its own outlives the kernel; the next run ends it."""
    worker = start(fixture_book, "import time; time.sleep(600)", READRUN_JOB=str(fixture_book.build))
    other = start(fixture_book, "import time; time.sleep(600)")
    try:
        said, _ = start(fixture_book, HOLD.format(0)).communicate(timeout=60)
        assert f"ended process {worker.pid}" in said
        assert worker.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None, "a process that is none of the run's was ended"
    finally:
        for process in (worker, other):
            process.kill()


def test_a_second_run_waits_for_the_first(fixture_book: FixtureBook) -> None:
    holder = start(fixture_book, HOLD.format(3))
    assert holder.stdout is not None and holder.stdout.readline() == "in\n"
    said, _ = start(fixture_book, HOLD.format(0)).communicate(timeout=60)
    assert f"process {holder.pid}" in said and said.endswith("in\n")
    assert holder.poll() == 0, "the second run did not wait for the first, or ended it"


def test_a_truncated_page_of_a_killed_build_is_built_again(fixture_book: FixtureBook) -> None:
    assert fixture_book.book("--edition", "recorded").returncode == 0
    page: Path = fixture_book.html / "chapters" / "alpha.html"
    whole = page.read_text()
    page.write_text(whole[:100])  # newer than its source, as after a kill while Sphinx wrote it
    (fixture_book.root / "book" / "_build" / "readrun.json").unlink()
    assert fixture_book.book("--edition", "recorded").returncode == 0
    assert page.read_text() == whole
