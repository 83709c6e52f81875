"""The book as a reader gets it, in a folder of its own: this checkout, and one chapter made by the template.

Built once per test session, also when several workers ask for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SLUG = "made_from_template"
STEPS = (
    ("new", SLUG),
    ("pair",),  # its exit code says that something was out of step, which the new chapter was
    ("record", SLUG, "--out", "runs/a", "--only", "*rise*"),
    ("record", SLUG, "--out", "runs/b", "--only", "*bowl* *line*"),
    ("merge", SLUG, "runs/a", "runs/b"),
    ("pair", "--check"),
    ("check", "--chapters", SLUG),
    ("book", "--edition", "recorded"),
)


class Site:
    """`root`: the book's folder; `html`: its pages; `log`: {command: [exit code, output]} of the build."""

    def __init__(self, root: Path) -> None:
        self.root, self.html = root, root / "book" / "_build" / "html"
        keep = {name: os.environ[name] for name in ("HOME", "PATH", "LANG", "TMPDIR") if name in os.environ}
        self.environment = keep | {
            "PYTHONPATH": str(CHECKOUT / "lib"), "READRUN_ROOT": str(root), "READRUN_DEVICE": "cpu",
            "READRUN_COMMIT": "0" * 40, "OMP_NUM_THREADS": "1", "READRUN_HEADLESS": "1",
        }  # fmt: skip

    def run(self, *arguments: str, module: str = "readrun") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=self.root, text=True, timeout=600, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def log(self) -> dict[str, list]:
        return json.loads((self.root / "steps.json").read_text())

    def build(self) -> None:
        self.root.mkdir(parents=True)
        for name in ("book", "data", "notebooks"):
            if (CHECKOUT / name).is_dir():
                shutil.copytree(CHECKOUT / name, self.root / name, ignore=shutil.ignore_patterns("_build"))
        shutil.copy(CHECKOUT / "_config.yml", self.root)
        (self.root / "notebooks").mkdir(exist_ok=True)
        (self.root / "tests").mkdir()
        log = {}
        for step in STEPS:
            done = self.run(*step)
            log[" ".join(step)] = [done.returncode, done.stdout]
        (self.root / "steps.json").write_text(json.dumps(log))


def site(factory: pytest.TempPathFactory) -> Site:
    """The site of this test session."""
    base = factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with open(base / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Site(base / "site")
        if not (made.root / "steps.json").exists():
            shutil.rmtree(made.root, ignore_errors=True)
            made.build()
    return made
