"""A chapter from the template: `python -m readrun new SLUG`."""

from __future__ import annotations

import re
from pathlib import Path

from readrun import paths


def create(slug: str) -> list[Path]:
    """Write a chapter's notebook script, paper file and tests; ValueError if one of them is there."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ValueError(f"slug: {slug!r}; accepted: lower-case letters, digits and underscores")
    test = paths.root() / "tests" / f"test_{slug}.py"
    files = {"chapter.py": paths.notebook(slug), "paper.yml": paths.papers(slug), "test.py": test}
    if there := [str(file) for file in files.values() if file.exists()]:
        raise ValueError(f"slug: {slug!r}; already there: {', '.join(there)}")
    for name, file in files.items():
        text = (Path(__file__).parent / "template" / f"{name}.txt").read_text(encoding="utf-8")
        paths.write_atomic(file, text.replace("__slug__", slug))
    return list(files.values())
