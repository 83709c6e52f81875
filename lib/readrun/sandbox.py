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

import atexit
import contextlib
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from readrun.sandbox_files import clear, copy_files, printable

if TYPE_CHECKING:
    from readrun.sandbox_box import Box, Seen

__all__ = "Limits Policy Result SandboxUnavailable Status close copy_files printable report run".split()

Status = Literal["ok", "error", "timeout", "memory", "output", "processes", "disk", "killed", "refused"]


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


class SandboxUnavailable(RuntimeError):
    """This machine cannot isolate file system and network; the message says which layer is missing."""


BACKENDS = ["bwrap", "namespaces"]  # tried in this order
MIB = 2**20
LAYERS = ("file system", "network", "pid", "ipc", "user", "seccomp", "landlock", "rlimits", "processes")


def run(job: str | Sequence[str], policy: Policy | None = None, limits: Limits | None = None) -> Result:
    """Run one job and wait for it. Safe to call from several threads; each takes a sandbox of its own.

    Raises SandboxUnavailable where file system or network cannot be isolated, ValueError for a bad argument.
    Whatever the job does is in the Result, never an exception.
    """
    policy, limits = policy or Policy(), limits or Limits()
    _check(job, policy, limits)
    before: dict[str, str] = {}
    files: dict[str, str] = {}
    skipped: dict[str, str] = {}
    box = _take(policy, limits)
    try:
        if policy.files is not None:
            before, skipped = _copy(policy.files, box.work, limits)
        if isinstance(job, str):
            seen = box.run({"code": job, "answer": policy.answer}, limits, policy.merge)
            if policy.files is not None:
                clear(box.work)
        else:
            seen = box.run({"argv": list(job), "env": dict(policy.env)}, limits, policy.merge)
            box.end()  # from here on no process is left
            if policy.collect is not None:
                policy.collect.mkdir(parents=True, exist_ok=True)
                files, left_out = _copy(box.work, policy.collect, limits, own=True)
                skipped |= left_out
    except BaseException:
        box.end(kill=True)
        raise
    finally:
        _give_back(box)
    status, error, value, kind = _judge(seen, policy, limits)
    return Result(
        status,
        printable(seen.texts["stdout"]),
        printable(seen.texts.get("stderr", b"")),
        seen.seconds,
        box.backend,
        None if seen.broken else seen.code,
        value,
        kind,
        error,
        before,
        files,
        skipped,
    )


def report() -> dict[str, Any]:
    """Which layers this machine establishes, found by trying: {"isolation": "bwrap" | "namespaces" | "none",
    "reason": str, and a bool for each of `LAYERS`}. "processes": the kernel refuses a process too many;
    where it does not (to root), only the host's looks, 50 a second, end such a job. Never raises."""
    found: dict[str, Any] = {"isolation": "none", "reason": ""} | dict.fromkeys(LAYERS, False)
    policy, limits = Policy(answer="ans"), Limits(time=10)
    try:
        box = _take(policy, limits)
        try:
            seen = box.run({"code": TRIAL, "answer": "ans"}, limits)
        finally:
            _give_back(box)
    except SandboxUnavailable as error:
        return found | {"reason": str(error)}
    seccomp, largest, free, bound = _judge(seen, policy, limits)[2] or (0, -1, False, False)
    found |= {"isolation": box.backend, "seccomp": seccomp == 2, "rlimits": largest == 0}
    return found | box.layers | {"processes": free and not bound}


TRIAL = """
import _thread, ctypes, resource as r
def starts():
    try: return bool(_thread.start_new_thread(int, ()))
    except RuntimeError: return False
ans = [ctypes.CDLL(None).prctl(21), r.getrlimit(r.RLIMIT_FSIZE)[1], starts()]
r.setrlimit(r.RLIMIT_NPROC, (1, 1))
ans.append(starts())
"""


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Within it, jobs run on this backend ("bwrap", "namespaces") or not at all; for tests, not threads."""
    before, BACKENDS[:] = BACKENDS[:], [backend]
    try:
        yield
    finally:
        BACKENDS[:] = before


def close() -> None:
    """End the warm interpreters of this process. Also done when it exits; the next job starts a new one."""
    while _idle:
        for box in _idle.popitem()[1]:
            box.end()
            box.forget()


def _copy(
    source: Path | int, target: Path | int, limits: Limits, own: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    return copy_files(source, target, max_bytes=limits.disk * MIB, max_files=limits.files, own=own)


# ---- arguments and results


def _check(job: str | Sequence[str], policy: Policy, limits: Limits) -> None:
    if policy.kind not in ("compute", "script"):
        raise ValueError(f"kind: 'compute' or 'script', not {policy.kind!r}")
    if isinstance(job, str) != (policy.kind == "compute"):
        raise ValueError(f"job: {'Python source' if policy.kind == 'compute' else 'a list of arguments'}")
    words = [] if isinstance(job, str) else [*job, *policy.env, *policy.env.values()]
    if not job or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise ValueError("job: empty, or an argument that is no text or has a NUL character")
    if bad := [name for name in policy.env if not name or "=" in name]:
        raise ValueError(f"env: {bad[0]!r} is no name of a variable")
    for name in ("collect", "env") if policy.kind == "compute" else ("preload", "answer"):
        if getattr(policy, name):
            raise ValueError(f"{name}: not for {policy.kind}")
    for name, value in vars(limits).items():
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < 2**32):
            raise ValueError(f"{name}: a positive number below 2**32, not {value!r}")
        if name != "time" and not isinstance(value, int):
            raise ValueError(f"{name}: a whole number, not {value!r}")
    if policy.files is not None and not Path(policy.files).is_dir():
        raise ValueError(f"files: {policy.files} is no folder")
    if policy.collect is not None and policy.collect.exists() and any(policy.collect.iterdir()):
        raise ValueError(f"collect: {policy.collect} is not empty")


def _judge(seen: Seen, policy: Policy, limits: Limits) -> tuple[Status, str, Any, str]:
    """What the host saw, as (status, error, value, its kind)."""
    disk = f"more than {limits.disk} MiB or {limits.files} files"
    said: dict[str, tuple[Status, str]] = {
        "time": ("timeout", f"longer than {limits.time} s"),
        "memory": ("memory", f"more than {limits.memory} MiB"),
        "processes": ("processes", f"more than {limits.processes} processes and threads"),
        "output": ("output", f"more than {limits.output} bytes"),
        "disk": ("disk", disk),
    }
    if seen.broken:
        return *said[seen.broken], None, ""
    if seen.code is None:
        return "killed", "the sandbox ended", None, ""
    if policy.kind == "script" and (seen.code in (-signal.SIGXFSZ, 128 + signal.SIGXFSZ)):
        return "disk", disk, None, ""
    if policy.kind == "script" and seen.code and seen.full:
        return "disk", disk, None, ""
    if seen.code < 0:
        return "killed", signal.Signals(-seen.code).name, None, ""
    if policy.kind == "script":
        return ("error", f"exit code {seen.code}", None, "") if seen.code else ("ok", "", None, "")
    return _read_answer(seen.texts["answer"][1:], seen.code)


def _read_answer(data: bytes, code: int) -> tuple[Status, str, Any, str]:
    """The job's own report, which may be anything."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        reply = json.loads(data, parse_constant=refuse)
        if "error" in reply:
            error = printable(str(reply["error"]).encode(errors="replace"))
            return "memory" if reply.get("memory") is True else "error", error, None, ""
        kind = printable(str(reply.get("kind", "")).encode(errors="replace"))
        value = _clean(reply.get("value"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "error", "the job ended without a report that can be read", None, ""
    return ("error", f"exit code {code}", None, "") if code else ("ok", "", value, kind)


def _clean(value: Any) -> Any:
    """JSON data without infinities (1e999) and without half characters."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {_clean(k): _clean(v) for k, v in value.items()} if isinstance(value, dict) else value


# ---- warm sandboxes

_idle: dict[tuple[Any, ...], list[Box]] = {}
atexit.register(close)


def _forked() -> None:
    """A forked child must not talk to its parent's sandboxes, nor hold them open."""
    while _idle:
        for box in _idle.popitem()[1]:
            box.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _take(policy: Policy, limits: Limits) -> Box:
    """An idle sandbox that fits, else a new one from the first backend that isolates."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SandboxUnavailable(
            f"foreign code runs only on Linux on x86-64, not on {sys.platform} on {platform.machine()}: "
            "nothing else here could isolate file system and network"
        )
    from readrun.sandbox_box import Box

    key = (policy.kind, policy.preload, limits.disk * MIB, limits.files)
    for backend in BACKENDS:
        with contextlib.suppress(KeyError, IndexError):  # another thread may be faster
            return _idle[backend, *key].pop()
    reasons = []
    for backend in BACKENDS:
        try:
            return Box(backend, *key)
        except SandboxUnavailable as error:
            reasons.append(str(error))
    raise SandboxUnavailable(
        f"neither file system nor network can be isolated here, so nothing was run ({'; '.join(reasons)})"
    )


def _give_back(box: Box) -> None:
    """Keep a sandbox that still serves; forget one that has ended."""
    if box.ended:
        box.forget()
        return
    _idle.setdefault((box.backend, *box.key), []).append(box)
