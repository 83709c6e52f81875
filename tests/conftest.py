"""A small book of its own for the tests of the machine: three chapters that need no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


class FixtureBook:
    """A copy of ``tests/fixture_book`` in ``root``, and the commands of the book on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(CHECKOUT / "tests" / "fixture_book", root)
        self.build = root / "build"
        self.html = root / "book" / "_build" / "html"
        keep = {name: os.environ[name] for name in ("HOME", "PATH", "LANG") if name in os.environ}
        path = f"{CHECKOUT / 'lib'}{os.pathsep}{root / 'no_torch'}"
        self.environment = keep | {"PYTHONPATH": path, "READRUN_ROOT": str(root), "READRUN_DEVICE": "cpu"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "readrun", *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one command of the book to its end; output as text."""
        return subprocess.run(
            self.command(*arguments), env=self.environment | environment, cwd=self.root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip

    def book(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("book", "--profile", "smoke", *arguments, **environment)

    def statuses(self, slug: str, profile: str = "smoke") -> dict[str, dict[str, Any]]:
        """{name of the run folder: status} of all executions of a chapter."""
        files = sorted((self.build / slug / profile).glob("*/status.json"))
        return {file.parent.name: json.loads(file.read_text()) for file in files}

    def executions(self) -> dict[Path, int]:
        """When each status was written: equal before and after means that nothing was executed."""
        return {file: file.stat().st_mtime_ns for file in self.build.glob("*/*/*/status.json")}

    def units(self, slug: str, profile: str = "smoke") -> dict[str, int]:
        """When each unit of a chapter was saved."""
        found = (self.build / slug / profile / "units").glob("*/meta.json")
        return {file.parent.name: file.stat().st_mtime_ns for file in found}

    def script(self, slug: str) -> Path:
        return self.root / "notebooks" / f"{slug}.py"

    def edit(self, slug: str, old: str, new: str) -> None:
        """Replace text in a chapter's script; it must be there exactly once."""
        text = self.script(slug).read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {slug}"
        self.script(slug).write_text(text.replace(old, new))

    def page(self, slug: str) -> str:
        """A chapter's published page as text, without the tags of coloured code."""
        return re.sub(r"</?span[^>]*>", "", (self.html / "chapters" / f"{slug}.html").read_text())


@pytest.fixture
def fixture_book(tmp_path: Path) -> FixtureBook:
    return FixtureBook(tmp_path / "book")


@pytest.fixture(scope="module")
def built_book(tmp_path_factory: pytest.TempPathFactory) -> FixtureBook:
    """A fixture book after `book --profile smoke`, shared by a file's tests, which leave it as it was."""
    made = FixtureBook(tmp_path_factory.mktemp("built") / "book")
    done = made.book()
    assert done.returncode == 0, done.stdout
    return made
