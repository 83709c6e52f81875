"""A chapter's whole notebook from top to bottom, in this process: a kernel of its own costs seconds."""

from __future__ import annotations

import re
import sys
import types

import pytest
import readrun
from readrun import content


def run_script(slug: str, monkeypatch: pytest.MonkeyPatch, figures: bool = True, **parameters: str) -> None:
    """Run the code of notebooks/<slug>.py with these parameters, whose default in it is "".

    figures=False leaves out the cells on which no result depends.
    """
    script = readrun.paths.notebook(slug)
    source = script.read_text(encoding="utf-8")
    if not figures:
        kept = [c for c in content.cells(slug) if c.computes or "parameters" in c.tags]
        source = "\n".join(cell.source for cell in kept)
    for name, value in parameters.items():
        line = re.compile(rf'^{name} = "".*$', re.M)
        assert len(line.findall(source)) == 1
        source = line.sub(lambda _, said=f"{name} = {value!r}": said, source)
    module = types.ModuleType(f"{slug}_script")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(script), "exec"), vars(module))
