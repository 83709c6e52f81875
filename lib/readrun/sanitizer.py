"""NVIDIA's compute-sanitizer on a piece of a chapter: does a GPU kernel touch memory that is not its own?

`python -m readrun.sanitizer` runs a kernel that does: the control, whose error the tool has to see.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import Any

PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def _count(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """(errors that memcheck counts while Python runs with `arguments`, or None; why there is no count)."""
    program = next(filter(None, map(shutil.which, PLACES)), None)
    if program is None:
        return None, "not run: there is no compute-sanitizer"
    # one allocation per tensor: inside a cached block of 2 MB nothing is out of bounds
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", "memcheck", sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)
    except subprocess.TimeoutExpired:
        return None, f"not finished in {seconds:.0f} s"
    text = done.stdout + done.stderr
    told = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if not told or (done.returncode and not int(told[1])):  # the program itself failed: nothing was checked
        return None, f"ended with {done.returncode}: {text[-400:]}"
    return int(told[1]), ""


def sanitize(code: str, device: str, seconds: float = 150) -> dict[str, Any]:
    """{errors, why}: errors that compute-sanitizer's memcheck counts in Python `code` on a GPU.

    errors is None, and `why` says the reason, where it cannot run, `code` fails, or the tool does not see the
    error of the control.
    """
    if device != "cuda":
        return {"errors": None, "why": "not run: no GPU"}
    errors, why = _count(["-c", code], seconds)
    if errors == 0:
        control, why = _count(["-m", "readrun.sanitizer"], seconds)
        errors = 0 if control else None
        why = "" if control else f"the control's error was not seen: {why or 'no errors'}"
    return {"errors": errors, "why": why}


if __name__ == "__main__":
    import torch
    import triton
    import triton.language as tl

    def wrong(x: torch.Tensor) -> None:
        """Write far behind the end of x."""
        tl.store(x + (1 << 28) + tl.program_id(0), 1.0)

    triton.jit(wrong)[(1,)](torch.zeros(16, device="cuda"))
    torch.cuda.synchronize()
