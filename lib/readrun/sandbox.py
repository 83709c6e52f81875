"""Run code that a model or a submission wrote, on Linux: no network, no view of the host, fixed limits.

    run("ans = 6 * 7", Policy("compute", answer="ans")).value              # 42
    run(["bash", "reproduce.sh"], Policy("script", files=submission, collect=results), Limits(time=60))

Two kinds of job. `compute` is a Python snippet: no exec, no fork, no sockets, nothing writable. `script` is a
command with all its children, whose only writable place is a scratch folder. Both see the operating system's
programs and Python with its installed packages, read-only; neither sees a home, an environment variable, the
repository, another job or a process of the host. It is meant for buggy code and for the attacks that
tests/test_sandbox.py tries; it is no defence against exploits of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "error", "timeout", "memory", "output", "processes", "disk", "killed", "refused"]


class SandboxUnavailable(RuntimeError):
    """This machine cannot isolate file system and network; the message says which layer is missing."""


@dataclass(frozen=True)
class Policy:
    """What a job may see and do.

    kind     "compute": the job is Python source, executed as `__main__` by an interpreter that is kept warm,
             in a forked child of its own, so that no job sees what an earlier one did. Threads are allowed.
             "script": the job is a list of arguments, say `["bash", "reproduce.sh"]`. `python` and `python3`
             are this interpreter, with the installed packages. When the command ends, so do all its children.
    preload  compute: modules imported once, before the first job ("sympy", "z3"): they cost nothing later.
    answer   compute: name of the variable that comes back as `Result.value`.
    files    a folder of the host whose regular files are copied into the job's working folder. Links,
             devices, FIFOs, odd names are left out and named in `Result.skipped`. compute: read-only.
    collect  script: a folder of the host, empty or not yet there, that receives the regular files of the
             working folder when no process of the job is left.
    env      script: variables beside PATH, HOME, TMPDIR, LANG and those that keep Python and BLAS quiet.
    merge    stderr goes into stdout, in order of writing.
    """

    kind: Literal["compute", "script"] = "compute"
    preload: tuple[str, ...] = ()
    answer: str | None = None
    files: Path | None = None
    collect: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    merge: bool = False


@dataclass(frozen=True)
class Limits:
    """What a job may use; what it used up is named by `Result.status`.

    time       wall-clock seconds from its start, all processes together ("timeout")
    memory     MiB of all processes together; compute: beyond what the warm interpreter has ("memory")
    processes  processes and threads together ("processes")
    output     bytes of stdout and of stderr each; also of the answer ("output")
    disk       MiB of the scratch folder and /tmp together ("disk")
    files      files and folders in the scratch folder ("disk")
    """

    time: float = 2.0
    memory: int = 512
    processes: int = 64
    output: int = 65_536
    disk: int = 64
    files: int = 10_000


@dataclass(frozen=True)
class Result:
    """What became of a job.

    status      "ok"; "error": an exception, an exit code other than 0, no answer; a limit's name (see
                `Limits`); "killed": by a signal of its own. `run` raises instead of "refused": that is for a
                caller who turns SandboxUnavailable into a result.
    stdout      text, invalid UTF-8 replaced, control characters but tab and newline escaped (`\\x1b`);
    stderr      at most `Limits.output` bytes
    seconds     wall-clock time of the job, without starting the sandbox
    isolation   "bwrap" or "namespaces"
    returncode  exit code, minus the number of a signal, None where the sandbox ended it
    value       the answer: None, bool, int, finite float, str, lists and string-keyed dicts of them; any
                other object as its `str`, so infinities are "inf"
    kind        name of the answer's type in the job: "int", "Rational", …
    error       one line that says why the status is not "ok"; the last line of a traceback
    before      {relative path: sha256} of the files as they went in
    files       {relative path: sha256} of the files that came out (script with `collect`)
    skipped     {relative path, escaped: reason} of what was left out on either way
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    isolation: str = "none"
    returncode: int | None = None
    value: Any = None
    kind: str = ""
    error: str = ""
    before: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def run(job: str | Sequence[str], policy: Policy | None = None, limits: Limits | None = None) -> Result:
    """Run one job and wait for it. Safe to call from several threads; each takes a sandbox of its own.

    Raises SandboxUnavailable where file system or network cannot be isolated, ValueError for a bad argument.
    Whatever the job does is in the Result, never an exception.
    """
    raise SandboxUnavailable("the sandbox is being built")


def report() -> dict[str, Any]:
    """Which layers this machine establishes, found by trying: {"isolation": "bwrap" | "namespaces" | "none",
    "reason": str, and a bool each for "file system", "network", "pid", "ipc", "user", "seccomp", "landlock",
    "rlimits"}. Never raises."""
    return {"isolation": "none", "reason": "the sandbox is being built"}


def copy_files(
    source: Path | int, target: Path | int | None, *, max_bytes: int, max_files: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Copy the regular files below a folder that may be hostile; nothing is followed and nothing blocks.

    `source`, `target`: folders, or open descriptors of folders; `target=None` only reads. Left out, with the
    reason: links of both kinds, devices, FIFOs, sockets, names that are not UTF-8, hold control characters or
    differ from another only by case, and whatever would pass the limits (a sparse file counts with its full
    size). Returns ({relative path: sha256}, {relative path, escaped: reason}).
    """
    raise SandboxUnavailable("the sandbox is being built")


def close() -> None:
    """End the warm interpreters of this process. Also done when it exits; the next job starts a new one."""
