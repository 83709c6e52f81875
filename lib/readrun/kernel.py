"""Processes that end with their parent, and the notebook kernel that is one of them.

``make book`` is a chain: make, ``readrun book``, Snakemake, ``readrun execute``, kernel. A SIGKILL runs no
clean-up code anywhere, so each link asks the operating system to be killed together with the link above it.
What slips through (a worker that a chapter started) carries ``READRUN_JOB`` in its environment, and the next
run ends it before it starts: see :func:`end_orphans`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

JOB = "READRUN_JOB"


def die_with_parent() -> None:
    """Ask Linux to SIGKILL this process when its parent dies; elsewhere do nothing.

    Safe as ``preexec_fn``. Where the parent is gone already (it died between fork and this call), leave at once.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def end_orphans(folder: Path) -> list[int]:
    """Kill what an earlier, killed run left computing under ``folder``; return the process ids.

    Only call this under the run's own lock: every process marked with ``folder`` is then a left-over.
    """
    import psutil

    mark, ended = str(folder), []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(JOB) == mark:
                process.kill()
                ended.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or somebody else's
    psutil.wait_procs(ended, timeout=10)
    return [process.pid for process in ended]


def install(folder: Path) -> dict[str, str]:
    """Write the ``readrun`` kernelspec under ``folder``; return the environment in which Jupyter finds it.

    IPython's own folder is private too: a reader's start-up files must not change the book.
    """
    import json

    quiet = ["--HistoryManager.hist_file=:memory:"]  # two kernels would wait for each other's history file
    spec = folder / "kernels" / "readrun"
    spec.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "argv": [sys.executable, "-m", "readrun.kernel", "-f", "{connection_file}", *quiet],
            "display_name": "Read & Run",
            "language": "python",
        }
    )
    part = spec / f"kernel.json.{os.getpid()}"  # two executions may write it at once: renamed, never half there
    part.write_text(text, encoding="utf-8")
    part.replace(spec / "kernel.json")
    return {"JUPYTER_PATH": str(folder), "IPYTHONDIR": str(folder / "ipython")}


if __name__ == "__main__":
    die_with_parent()
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
