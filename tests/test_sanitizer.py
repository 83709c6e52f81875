"""compute-sanitizer, played by scripts: what it says is counted, what it cannot say is not called clean."""

from __future__ import annotations

import pytest
from readrun import sanitizer


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A function that makes `compute-sanitizer` a shell script with this body."""

    def make(body: str) -> None:
        file = tmp_path / "compute-sanitizer"
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    monkeypatch.setattr(sanitizer, "PLACES", (str(tmp_path / "compute-sanitizer"),))
    return make


CONTROL = 'case "$*" in *readrun.sanitizer*) echo "ERROR SUMMARY: 1 error"; exit 1;; esac\n'


@pytest.mark.parametrize(
    "body, errors, why",
    [
        (CONTROL + 'echo "ERROR SUMMARY: 0 errors"', 0, ""),
        (CONTROL + 'echo "ERROR SUMMARY: 3 errors"', 3, ""),
        (CONTROL + 'echo "ERROR SUMMARY: 2 errors"; exit 1', 2, ""),  # errors that end the program count
        (CONTROL + 'echo "ImportError"; echo "ERROR SUMMARY: 0 errors"; exit 1', None, "ended with 1"),
        (CONTROL + "exit 0", None, "ended with 0"),
        ('echo "ERROR SUMMARY: 0 errors"', None, "control"),  # a tool that sees nothing
        (CONTROL + "exec sleep 5", None, "not finished"),
        (CONTROL + '[ -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" ] && echo "ERROR SUMMARY: 7 errors"', 7, ""),
    ],
)
def test_what_the_tool_says(tool, body: str, errors: int | None, why: str) -> None:
    tool(body)
    found = sanitizer.sanitize("print()", "cuda", seconds=1)
    assert found["errors"] == errors and why in found["why"]
    assert bool(found["why"]) == (errors is None)


def test_no_tool_and_no_gpu(tool) -> None:
    assert "no compute-sanitizer" in sanitizer.sanitize("", "cuda")["why"]
    tool('echo "ERROR SUMMARY: 0 errors"')
    assert sanitizer.sanitize("", "cpu") == {"errors": None, "why": "not run: no GPU"}
