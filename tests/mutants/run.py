"""Planted faults: every patch under tests/mutants/<slug>/ must make the test that it names fail.

    python tests/mutants/run.py [SLUG ...]

A patch begins with lines `why: …` and `test: tests/…::name` (several of them: each must fail). It is
applied to a scratch copy, never to the checkout. Every named test must pass there without the patch: a test
that fails anyway finds nothing. The exit code is the number of patches whose fault stayed unseen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", "build", "_build", ".venv", "__pycache__", ".*_cache", ".hypothesis", "media"
)


def named(patch: Path) -> list[str]:
    """The tests that a patch names. Raises ValueError if there is none."""
    head = patch.read_text(encoding="utf-8").split("\n--- ", 1)[0]
    tests = re.findall(r"^test: (\S.*)$", head, re.M)
    if not tests:
        raise ValueError(f"{patch.name} names no test: its first lines need `test: tests/…::name`")
    return tests


def passes(book: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether pytest ran these tests in `book` and all passed; and the end of its output."""
    environment = os.environ | {"PYTHONPATH": str(book / "lib"), "READRUN_ROOT": str(book)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=book, env=environment, capture_output=True, text=True, timeout=900)
    text = done.stdout + done.stderr
    if done.returncode not in (0, 1) or (done.returncode == 0 and " passed" not in done.stdout):
        raise RuntimeError(
            f"pytest could not run {tests}: {text[-1500:]}"
        )  # misspelt, skipped, broken import
    return done.returncode == 0, text[-400:]


def main(slugs: list[str]) -> int:
    """Run the patches of `slugs` (none: of all chapters) and print one line for each."""
    patches = sorted(p for p in HERE.glob("*/*.patch") if not slugs or p.parent.name in slugs)
    if not patches:
        print(f"no patches for {' '.join(slugs) or 'any chapter'}")
        return 1
    unseen = []
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "book"
        shutil.copytree(CHECKOUT, book, ignore=LEFT_OUT)
        sound, text = passes(book, sorted({test for patch in patches for test in named(patch)}))
        if not sound:
            print(f"these tests fail without any fault:\n{text}")
            return len(patches)
        for patch in patches:
            name = f"{patch.parent.name}/{patch.stem}"
            subprocess.run(["git", "apply", str(patch)], cwd=book, check=True)
            missed = [test for test in named(patch) if passes(book, [test])[0]]
            subprocess.run(["git", "apply", "-R", str(patch)], cwd=book, check=True)
            unseen += [name] if missed else []
            print(
                f"{'NOT FOUND' if missed else 'found':10} {name}  by {', '.join(missed or named(patch))}",
                flush=True,
            )
    print(f"{len(patches) - len(unseen)} of {len(patches)} planted faults were found")
    return len(unseen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
