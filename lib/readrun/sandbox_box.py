"""A sandbox as the host sees it: what is mounted, starting it, handing over a job, watching, ending.

Process 1 (`sandbox_inside`) does what it is told; everything is decided here, outside, where no job reaches:
a job's processes, memory, time and output are read by the host. No process outlives `Box.end`, because the
kernel kills a PID namespace with its process 1, and a process descriptor says when that is done.
"""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import math
import os
import re
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from readrun import sandbox_inside as inside
from readrun.sandbox import SandboxUnavailable

START, GRACE, TICK = 60.0, 3.0, 0.02  # seconds: to start a sandbox, to end a job, between looks at a job
SPARE = 8  # processes that the kernel counts and we do not: process 1, and orphans it has yet to bury
MIB = 2**20
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
CHILDREN = os.path.exists("/proc/thread-self/children")  # not in every kernel
NAMESPACES = {"file system": "mnt", "network": "net", "pid": "pid", "ipc": "ipc", "user": "user"}


@dataclass(frozen=True)
class Seen:
    """What the host saw of a job: the limit it broke, its exit code, seconds, what it wrote, a full disk."""

    broken: str
    code: int | None
    seconds: float
    texts: Mapping[str, bytes]
    full: bool


# ---- what a sandbox sees


def _packages() -> list[str]:
    """Folders of installed packages on this interpreter's path; the book's own is not one."""
    folders = [Path(entry) for entry in sys.path if entry and Path(entry).is_dir()]
    return [
        str(folder.resolve())
        for folder in folders
        if folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))
    ]


def _plan(kind: str, preload: Sequence[str]) -> tuple[list[tuple[str, str, str]], list[str], dict[str, int]]:
    """(kind, source, target) of everything in the new root; the path for packages; Landlock's rules."""
    plan: list[tuple[str, str, str]] = []
    bound: list[str] = []

    def bind(path: str, target: str = "") -> None:
        target = target or path
        if not any(Path(target).is_relative_to(there) for there in bound) and os.path.exists(path):
            plan.append(("bind", path, target))
            bound.append(target)

    for path in SYSTEM:
        if os.path.islink(path):
            plan.append(("link", os.readlink(path), path))
        else:
            bind(path)
    prefix, packages = os.path.realpath(sys.base_prefix), _packages()
    for path in [prefix, *packages]:
        bind(path)
    for path in packages:
        if os.path.isdir(f"{path}/readrun"):  # an installed book: its rubrics and records are not for jobs
            plan.append(("empty", "", f"{path}/readrun"))
    for name in preload:  # a package that lies elsewhere: itself, not what is around it
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"preload: no module {name!r}")
        origin = Path(spec.origin).resolve()
        if spec.origin not in ("built-in", "frozen") and not any(
            origin.is_relative_to(there) for there in bound
        ):
            source = origin.parent if spec.submodule_search_locations else origin
            bind(str(source), f"/packages/{source.name}")
    plan += [("device", f"/dev/{name}", f"/dev/{name}") for name in "null zero full random urandom".split()]
    plan += [("link", "/scratch/shm", "/dev/shm"), ("link", "/proc/self/fd", "/dev/fd")]
    plan += [("link", f"/proc/self/fd/{n}", f"/dev/std{name}") for n, name in enumerate(("in", "out", "err"))]
    plan += [("link", os.path.realpath(sys.executable), f"/python/{name}") for name in ("python", "python3")]
    if not any(path.startswith("/tmp/") for path in bound):
        plan.append(("link", "/scratch/tmp", "/tmp"))
    if kind == "script":
        plan.append(("proc", "", "/proc"))
        rules = {"/": inside.READ | inside.EXECUTE, "/dev": 0x4006, "/scratch": 0x77BF}  # all but devices
    else:
        readable = [*packages, "/packages", "/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", inside.WORK]
        readable += [prefix + "/lib", "/dev/urandom", "/dev/null", "/etc/ld.so.cache"]
        rules = dict.fromkeys(readable, inside.READ)
    return plan, [*packages, "/packages"], rules


def _bwrap(plan: list[tuple[str, str, str]], disk: int, fds: list[int]) -> list[str]:
    """The same plan as options of bubblewrap; with two `fds` it asks the host to map the users."""
    options = "bwrap --unshare-all --as-pid-1 --cap-drop ALL --hostname sandbox".split()
    if len(fds) == 2:  # the capabilities are for `inside.main`, which gives them up
        options += f"--unshare-user --userns-block-fd {fds[0]} --info-fd {fds[1]}".split()
        for name in "CHOWN SETGID SETUID SYS_ADMIN".split():
            options += ["--cap-add", f"CAP_{name}"]
    else:
        options += ["--uid", f"{inside.NOBODY}", "--gid", f"{inside.NOBODY}"]
    for kind, source, target in plan:
        if kind == "empty":
            options += ["--tmpfs", target, "--remount-ro", target]
        elif kind == "proc":
            options += ["--proc", target, "--remount-ro", target]
        else:
            flag = {"link": "--symlink", "bind": "--ro-bind", "device": "--dev-bind"}[kind]
            options += ["--dir", os.path.dirname(target), flag, source, target]  # else nobody may pass
    return [*options, "--size", str(disk), "--tmpfs", "/scratch", "--remount-ro", "/", "--chdir", "/", "--"]


def _environment(kind: str, packages: Sequence[str]) -> dict[str, str]:
    quiet = "OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS".split()
    environment = {"LANG": "C.UTF-8", "HOME": inside.WORK, "TMPDIR": "/scratch/tmp"}
    environment |= dict.fromkeys(quiet, "1")
    if kind == "compute":
        return environment | {"PYTHONHASHSEED": "0"}
    path = f"/python:{os.path.realpath(sys.base_prefix)}/bin:/usr/local/bin:/usr/bin:/bin"
    return environment | {"PATH": path, "PYTHONPATH": ":".join(packages), "PYTHONDONTWRITEBYTECODE": "1"}


class Box:
    """A sandbox with its process 1 ready for a job: one for a script, one after the other for snippets."""

    def __init__(self, backend: str, kind: str, preload: tuple[str, ...], disk: int, files: int):
        self.backend, self.kind, self.key = backend, kind, (kind, preload, disk, files)
        self.ended, self.work, self.pidfd = False, -1, -1
        plan, packages, rules = _plan(kind, preload)
        self.environment = _environment(kind, packages)
        self.tops = {target.split("/")[1] for _, _, target in plan} | {"scratch"}
        host, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        host.settimeout(START)
        root, alone = os.geteuid() == 0, backend == "namespaces"
        ends = [other, other.dup()] if root and not alone else [other]
        fds = [end.fileno() for end in ends]
        scratch = ("scratch", f"size={disk},nr_inodes={files + 100},mode=755", "/scratch")
        config = {"control": fds[0], "kind": kind, "preload": preload, "packages": packages}
        config |= {"readable": rules, "plan": [*plan, scratch] if alone else None, "mapped": root or alone}
        config["devices"] = [target for what, _, target in plan if what == "device" and root]
        command = [] if alone else _bwrap(plan, disk, fds)
        command += [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c"]
        command += [f"{Path(inside.__file__).read_text(encoding='utf-8')}\nmain({config!r})"]
        how: dict[str, Any] = {"env": self.environment, "cwd": "/", "pass_fds": fds}
        how |= dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
        self.socket = host
        with tempfile.TemporaryFile() as said:
            try:
                self.process = subprocess.Popen(command, stderr=said, start_new_session=True, **how)
            except OSError as error:
                host.close()
                raise SandboxUnavailable(f"{backend}: {error}") from None
            finally:
                for end in ends:
                    end.close()
            try:
                self._meet(packages)
            except BaseException as error:
                self.end(kill=True)
                if isinstance(error, OSError):
                    said.seek(0)
                    lines = said.read().decode(errors="replace").strip().splitlines() or [str(error)]
                    raise SandboxUnavailable(f"{backend}: {lines[-1]}") from None
                raise

    def _meet(self, packages: Sequence[str]) -> None:
        """Map the users if asked, learn the process and its namespaces, refuse what is not isolated."""
        while (heard := self.socket.recvmsg(256, 256))[0] != b"hello":
            if not heard[0]:
                raise OSError("it ended before its first word")
            if waits := re.search(rb"child-pid\D+(\d+)", heard[0]):
                word = self._map_users(int(waits[1]), packages)
                for _ in range(2):  # one lets it go on, the other tells process 1 who it can be
                    self.socket.send(word)
        for _, kind, data in heard[1]:
            if kind == socket.SCM_RIGHTS:
                self.work = int.from_bytes(data[:4], sys.byteorder)
            else:  # SCM_CREDENTIALS: the kernel's word for its process number out here
                self.pid = int.from_bytes(data[:4], sys.byteorder)
        self.pidfd = os.pidfd_open(self.pid)
        there, here = f"/proc/{self.pid}", "/proc/self"
        self.layers = {
            layer: os.readlink(f"{there}/ns/{name}") != os.readlink(f"{here}/ns/{name}")
            for layer, name in NAMESPACES.items()
        }
        self.layers["file system"] &= set(os.listdir(f"{there}/root")) <= self.tops
        if missing := [layer for layer in ("file system", "network", "pid") if not self.layers[layer]]:
            raise SandboxUnavailable(f"{self.backend}: not isolated: {', '.join(missing)}")
        self.socket.send(b"go")
        ready = marshal.loads(self.socket.recv(65_536) or marshal.dumps({}))
        if not ready:
            raise OSError("it ended while it got ready")
        if ready["failed"]:
            what = ValueError if ready["failed"].split(":")[0] in self.key[1] else OSError
            raise what(f"preload: {ready['failed']}")
        self.layers["landlock"] = ready["landlock"]

    def _map_users(self, pid: int, packages: Sequence[str]) -> bytes:
        """Let process 1 be nobody where we are root, whose processes no kernel limits; else itself."""
        user, group, folder = os.geteuid(), os.getegid(), f"/proc/{pid}"
        needed = [os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix), *packages[:-1]]
        if user == 0 and all(os.stat(path).st_mode & 0o5 == 0o5 for path in needed):
            with contextlib.suppress(OSError):
                for name in ("uid_map", "gid_map"):
                    Path(folder, name).write_text(f"0 0 1\n{inside.NOBODY} {inside.NOBODY} 1\n")
                return b"two"
        Path(folder, "setgroups").write_text("deny")
        Path(folder, "uid_map").write_text(f"{user} {user} 1\n")
        Path(folder, "gid_map").write_text(f"{group} {group} 1\n")
        return b"one"

    def end(self, kill: bool = False) -> None:
        """End process 1 and with it every process of its namespace; returns when none is left."""
        if self.ended:
            return
        self.ended = True
        self.socket.close()  # it leaves when it hears no more from us
        if self.pidfd >= 0:
            gone = select.poll()
            gone.register(self.pidfd, select.POLLIN)
            if kill or not gone.poll(GRACE * 1000):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                gone.poll()
            os.close(self.pidfd)
        elif kill:
            self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Close what is open of an ended sandbox."""
        if self.work >= 0:
            os.close(self.work)
            self.work = -1

    def abandon(self) -> None:
        """Close a parent's sandbox in a forked child, without ending it."""
        self.ended = True
        self.socket.close()
        os.close(self.pidfd)
        self.process.returncode = 0  # not ours to wait for
        self.forget()

    def run(self, order: dict[str, Any], limits: Any, merge: bool = False) -> Seen:
        """Hand over a job ({"code", "answer"} or {"argv", "env"}), watch it until it is over.

        `limits`: a `sandbox.Limits`. Raises SandboxUnavailable if the job could not take on its layers.
        """
        if "argv" in order:
            order = order | {"env": self.environment | order["env"]}
        order = order | {"rlimits": self._rlimits(limits)}
        memory = os.memfd_create("job", os.MFD_CLOEXEC)
        with os.fdopen(memory, "wb") as file, contextlib.ExitStack() as ours:
            file.write(marshal.dumps(order))
            file.flush()
            file.seek(0)
            names = ("stdout", "answer") if merge else ("stdout", "stderr", "answer")
            pipes = {name: os.pipe() for name in names}
            for reader, _ in pipes.values():
                ours.callback(os.close, reader)
            try:
                writers = [pipes.get(name, pipes["stdout"])[1] for name in ("stdout", "stderr", "answer")]
                for writer in writers:
                    os.fchmod(writer, 0o622)  # so that nobody may open /dev/stdout
                socket.send_fds(self.socket, [b"job"], [memory, *writers])
            except OSError:
                self.end(kill=True)
            finally:
                for _, writer in pipes.values():
                    os.close(writer)
            seen = self._watch({name: reader for name, (reader, _) in pipes.items()}, limits)
        if seen.code is not None and not seen.broken and not seen.texts["answer"].startswith(b"+"):
            raise SandboxUnavailable(f"{self.backend}: a layer is missing: {seen.texts['answer'].decode()}")
        return seen

    def _rlimits(self, limits: Any) -> dict[str, int]:
        cores = min(os.cpu_count() or 1, limits.processes)
        # CORE 1: like 0, and no handler of the host is started for it either
        shared = {"CORE": 1, "NPROC": limits.processes + SPARE, "CPU": math.ceil(limits.time * cores) + 1}
        if self.kind == "script":  # what all processes use together is watched from here
            return shared | {"DATA": 2 * limits.memory * MIB, "FSIZE": limits.disk * MIB, "NOFILE": 512}
        with contextlib.suppress(OSError):  # it has just ended: the job will not start either
            own = int(Path(f"/proc/{self.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            shared["AS"] = own + limits.memory * MIB
        return shared | {"FSIZE": 0, "NOFILE": 64}

    def _watch(self, pipes: Mapping[str, int], limits: Any) -> Seen:
        """Read all pipes until process 1 says that the job is over and nobody holds them any more."""
        heard = {name: bytearray() for name in pipes}
        broken, code, seconds, started, stop_by = "", None, 0.0, time.monotonic(), math.inf
        with selectors.DefaultSelector() as selector:
            for name, reader in pipes.items():
                os.set_blocking(reader, False)
                selector.register(reader, selectors.EVENT_READ, name)
            if not self.ended:
                selector.register(self.socket, selectors.EVENT_READ, "")
            while selector.get_map():
                over = bool(seconds) or self.ended  # no process is left: what there is to read is there
                events = selector.select(0 if over else TICK)
                if over and not events:  # a pipe's end is still open: sent to a socket that sent itself away
                    break
                for key, _ in events:
                    if not key.data:
                        message = b""
                        with contextlib.suppress(OSError):
                            message = self.socket.recv(64)
                        code, seconds = int(message) if message else None, time.monotonic() - started
                        selector.unregister(self.socket)
                        if not message:
                            self.end(kill=True)
                        continue
                    data = os.read(key.fd, 65_536)
                    if not data:
                        selector.unregister(key.fd)
                    room = limits.output + (key.data == "answer") - len(heard[key.data])
                    heard[key.data] += data[: max(room, 0)]
                    if len(data) > room:
                        broken = broken or "output"
                if seconds or self.ended:
                    continue
                now = time.monotonic()
                broken = broken or ("time" if now - started > limits.time else self._excess(limits))
                if broken and stop_by == math.inf:
                    stop_by = now + GRACE
                    self.socket.send(b"kill")
                elif now > stop_by:
                    selector.unregister(self.socket)
                    self.end(kill=True)
        used = os.statvfs(self.work)
        if used.f_files - used.f_ffree > limits.files + 100:  # faster than we looked
            broken = broken or "disk"
        full = used.f_bfree * used.f_frsize < 65_536 or used.f_ffree == 0
        texts = {name: bytes(text) for name, text in heard.items()}
        return Seen(broken, code, seconds or time.monotonic() - started, texts, full)

    def _excess(self, limits: Any) -> str:
        """The limit that the job's processes exceed together, if any."""
        used = os.statvfs(self.work)
        if used.f_files - used.f_ffree > limits.files + 100:
            return "disk"
        threads, tables, sizes = 0, 0, dict[int, int]()
        for pid in _below(self.pid):
            with contextlib.suppress(OSError, KeyError):  # it has just gone
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                values = dict(line.split(":", 1) for line in lines)
                threads += int(values["Threads"])
                sizes[pid], own = (int(values[name].split()[0]) * 1024 for name in ("VmRSS", "VmPTE"))
                tables += own
            if threads > limits.processes:
                return "processes"
        room = limits.memory * MIB - tables
        if self.kind == "script" and sum(sizes.values()) > room:  # count shared pages once
            return "memory" if sum(map(_proportional, sizes)) > room else ""
        return ""


def _below(pid: int) -> Iterator[int]:
    """All processes below `pid`, nearest first."""
    if not CHILDREN:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
        return
    todo = [pid]
    for parent in todo:
        with contextlib.suppress(OSError):  # it has just gone
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text().split()
                todo += map(int, children)
                yield from map(int, children)


def _proportional(pid: int) -> int:
    """Bytes of memory of a process with its part of shared pages; 0 if it has gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(text.split("Pss:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
