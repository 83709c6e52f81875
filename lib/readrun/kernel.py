"""Processes that end with their parent, and the notebook kernel that is one of them.

`make book` is a chain: make, `readrun book`, Snakemake, `readrun execute`, kernel. SIGKILL runs no clean-up
code, so each link asks the system to be killed together with the link above it. What slips through (a worker
that a chapter started) has READRUN_JOB in its environment: the next run ends it before it starts.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

JOB = "READRUN_JOB"
# jsonschema, which checks notebooks, compiles a grammar of web addresses when imported: 2 s that nobody needs
SLOW_IMPORT = "rfc3987_syntax"


def die_with_parent() -> None:
    """Ask Linux to SIGKILL this process when its parent dies; elsewhere do nothing. Safe as `preexec_fn`."""
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died meanwhile
            os._exit(1)


def end_orphans(folder: Path) -> list[int]:
    """Kill what a killed run left computing for `folder`; return process ids. Only under the run's lock."""
    import psutil

    ended = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(JOB) == str(folder):
                process.kill()
                ended.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or somebody else's
    psutil.wait_procs(ended, timeout=10)
    return [process.pid for process in ended]


def install(folder: Path) -> dict[str, str]:
    """Write the `readrun` kernelspec under `folder`; return the environment in which Jupyter finds it.

    IPython's own folder is private too: a reader's start-up files must not change the book.
    """
    from readrun import paths

    # without a history file: two kernels would wait for each other's
    start = [sys.executable, "-m", "readrun.kernel", "-f", "{connection_file}"]
    start += ["--HistoryManager.hist_file=:memory:"]
    spec = {"argv": start, "display_name": "Read & Run", "language": "python"}
    paths.write_atomic(folder / "kernels" / "readrun" / "kernel.json", json.dumps(spec))
    # 6: torch's profiler would write a log line per call onto the page
    return {"JUPYTER_PATH": str(folder), "IPYTHONDIR": str(folder / "ipython"), "KINETO_LOG_LEVEL": "6"}


if __name__ == "__main__":
    die_with_parent()
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
    # taking torch and transformers apart, module by module, takes 1.5 s: end after the clean-up functions
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
