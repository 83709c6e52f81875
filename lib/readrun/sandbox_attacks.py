"""Attacks on `readrun.sandbox`, each with its control: the same code does its harm when run outside.

    python -m readrun.sandbox_attacks   # run all of them on every backend here, write the table of the book

An attack is told where its targets are (`World`) and is judged by its effect, seen from outside: did the
secret come out, did a server hear from it, is there a file or a process that should not be. Every attack
must stay harmless where it succeeds, because its control does: small sizes, a victim started for it, never
a signal to more than that one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from readrun import paths, sandbox, sandbox_box
from readrun.sandbox import Limits, Policy, Result

LIMITS = Limits(time=5.0, memory=256, processes=32, output=20_000, disk=16, files=500)
SHORT = 0.5  # seconds, for those that would run on


@dataclass(frozen=True)
class Attack:
    """`code`: Python for compute, bash for script; `@NAME@` stands for a part of the `World`.

    effect    what harm is: "secret", "token" (its stdout holds one), "heard" (a server got the token),
              "file" (in the outside folder), "process" (left behind, or the victim is gone), "runs on" (past
              the time limit), "dies" (takes down its interpreter), "large" (more output than allowed)
    expected  statuses that are right inside
    root      the control needs root
    """

    name: str
    kind: str
    effect: str
    expected: list[str]
    code: str
    root: bool = False


def _read() -> list[Attack]:
    text = Path(__file__).with_suffix(".yml").read_text(encoding="utf-8")
    return [Attack(name, **row) for name, row in yaml.safe_load(text).items()]


ATTACKS = _read()


@dataclass
class World:
    """What attacks aim at: a secret file, a server, an outside folder, a process to kill. A context."""

    token: str = field(default_factory=lambda: "t" + secrets.token_hex(8))
    secret: str = field(default_factory=lambda: "s" + secrets.token_hex(8))
    heard: list[bytes] = field(default_factory=list)

    def __enter__(self) -> World:
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="readrun")))
        self.folder.chmod(0o755)  # all is open to anyone: a path must be missing, not only a permission
        (self.folder / "outside").mkdir()
        (self.folder / "outside").chmod(0o777)
        (self.folder / "secret").write_text(self.secret)
        descriptor = os.open(self.folder / "secret", os.O_RDONLY)  # for a job that inherits too much
        os.set_inheritable(descriptor, True)
        self._stack.callback(os.close, descriptor)
        home, name = tempfile.mkstemp(prefix=".readrun-", dir=Path.home())
        with os.fdopen(home, "w") as file:
            file.write(self.secret)
        os.chmod(name, 0o644)
        self._stack.callback(os.unlink, name)
        os.environ["READRUN_CANARY"] = self.secret
        self._stack.callback(os.environ.pop, "READRUN_CANARY", None)
        parent = subprocess.Popen(  # its environment holds the secret from its start
            ["victim" + self.token, "600"],
            executable=shutil.which("sleep"),
            env=os.environ | {"READRUN_CANARY": self.secret},
        )
        self._stack.callback(parent.wait)
        self._stack.callback(parent.kill)
        self.victim = parent
        port = self._listen()
        self.names = {"TOKEN": self.token, "SECRET": str(self.folder / "secret"), "HOME": name, "PORT": port}
        self.names |= {"OUTSIDE": str(self.folder / "outside"), "UNIX": str(self.folder / "unix")}
        self.names |= {"BOOK": sandbox.__file__, "PID": parent.pid, "VICTIM": parent.pid}
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _listen(self) -> int:
        """Servers that note what they hear: TCP and UDP on one port, two unix sockets."""
        tcp = socket.create_server(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", port))
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        unix.bind(str(self.folder / "unix"))
        (self.folder / "unix").chmod(0o777)
        abstract.bind("\0" + self.token)

        def serve(server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                if server.type == socket.SOCK_DGRAM:
                    while True:
                        self.heard.append(server.recv(100))
                server.listen()
                while True:
                    with server.accept()[0] as connection:
                        self.heard.append(connection.recv(100))

        def stop(server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()

        for server in (tcp, udp, unix, abstract):
            threading.Thread(target=serve, args=(server,), daemon=True).start()
            self._stack.callback(stop, server)
        return port

    def code(self, attack: Attack) -> str:
        """The attack's code with this world's names. A token that the code itself spells is split in two."""
        text = attack.code.replace("@TO", self.token[:4]).replace("KEN@", self.token[4:])
        for name, value in self.names.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    def harmed(self, attack: Attack, stdout: str, code: int | None, late: bool) -> bool:
        """Whether the attack had its effect. `late`: it still ran when its time was over."""
        if attack.effect == "secret":
            return self.secret in stdout or "root:x:0:0" in stdout or "SandboxUnavailable" in stdout
        if attack.effect == "token":
            return self.token in stdout
        if attack.effect == "heard":
            deadline = time.monotonic() + (0.5 if code == 0 else 0.05)
            while time.monotonic() < deadline and not any(self.token.encode() in h for h in self.heard):
                time.sleep(0.01)
            return any(self.token.encode() in text for text in self.heard)
        if attack.effect == "file":
            return (self.folder / "outside" / self.token).exists()
        if attack.effect == "process":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.victim.wait(0.1)
            return self.victim.poll() is not None or bool(list(processes(self.token)))
        if attack.effect == "large":
            return len(stdout) > LIMITS.output
        return late if attack.effect == "runs on" else (code or 0) < 0


def processes(token: str) -> Iterator[int]:
    """Processes of the host with an argument that is the token."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if token.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    yield int(entry.name)


def control(attack: Attack) -> bool:
    """Run the attack without a sandbox, in a temporary folder: does it do its harm?"""
    with World() as world, tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        job = subprocess.Popen(
            [*([sys.executable, "-c"] if attack.kind == "compute" else ["bash", "-c"]), world.code(attack)],
            cwd=folder,
            env=os.environ | {"TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=False,
        )
        code, patience = None, {"large": 0.3, "runs on": 2 * SHORT}.get(attack.effect, 20)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = job.wait(patience)
        if code is None:
            job.kill()
            job.wait()
        out.seek(0)
        text = out.read(200_000).decode(errors="replace")
        harmed = world.harmed(attack, text, code, late=code is None)
        for pid in processes(world.token):
            os.kill(pid, signal.SIGKILL)
        return harmed


def attempt(attack: Attack) -> tuple[bool, Result]:
    """Run the attack in the sandbox: (did it do any harm or end in an unexpected way, the result)."""
    limits = replace(LIMITS, time=SHORT) if attack.effect == "runs on" else LIMITS
    preload = ("sympy",) if "import sympy" in attack.code else ()  # what takes long is not its import
    with World() as world:
        job: Any = world.code(attack) if attack.kind == "compute" else ["bash", "-c", world.code(attack)]
        result = sandbox.run(job, Policy(attack.kind, preload), limits)  # type: ignore[arg-type]
        late = result.seconds > limits.time + sandbox_box.GRACE
        harmed = attack.effect != "dies" and world.harmed(attack, result.stdout, result.returncode, late)
    return harmed or result.status not in attack.expected, result


def backends() -> list[str]:
    """The backends that work on this machine."""
    found = []
    for name in sorted(sandbox.BACKENDS):
        with sandbox.only(name):
            found += [name] if not sandbox.report()["reason"] else []
    return found


def table(names: Sequence[str] = ()) -> list[dict[str, str]]:
    """One row per attack (of `names`, if given): its harm outside, what became of it on each backend here."""
    rows, here = [], backends()
    for attack in [attack for attack in ATTACKS if not names or attack.name in names]:
        row = {
            "attack": attack.name,
            "kind": attack.kind,
            "outside": "harm" if control(attack) else "no harm",
        }
        for backend in here:
            with sandbox.only(backend):
                harmed, result = attempt(attack)
            row[backend] = f"{'not ' if harmed else ''}contained: {STATUS.get(result.status, result.status)}"
        rows.append(row)
    return rows


STATUS = {"ok": "no effect", "error": "refused", "killed": "killed", "timeout": "time limit"}
STATUS |= {name: f"{name} limit" for name in ("memory", "output", "processes", "disk")}


def timings(repeats: int = 30) -> list[dict[str, Any]]:
    """Milliseconds of a job that does nothing: median and largest, warm (a snippet) and whole (a script)."""
    rows: list[dict[str, Any]] = []

    def measure(what: str, backend: str, job: Any) -> None:
        job()  # starts what stays warm
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            job()
            times.append(1000 * (time.perf_counter() - started))
        rows.append({"job": what, "backend": backend, "median (ms)": statistics.median(times)})
        rows[-1]["largest (ms)"] = max(times)

    cold = [sys.executable, "-I", "-c", "import sympy"]
    measure("a new interpreter that imports sympy", "none", lambda: subprocess.run(cold, check=True))
    for backend in backends():
        with sandbox.only(backend):
            for name, preload in {"snippet": (), "snippet, sympy imported": ("sympy",)}.items():
                policy = Policy(preload=preload)
                measure(name, backend, lambda policy=policy: sandbox.run("1", policy))
            measure("script", backend, lambda: sandbox.run(["true"], Policy("script")))
    return rows


def write() -> int:
    """Write data/results/sandbox.json; returns how many attacks were not contained."""
    rows = table()
    found: dict[str, Any] = {
        "recorded": time.strftime("%Y-%m-%d", time.gmtime()),
        "kernel": platform.release(),
    }
    found |= {"attacks": rows, "timings": timings()}
    text = json.dumps(found, indent=1) + "\n"
    paths.write_atomic(paths.data() / "results/sandbox.json", text)
    return sum("not contained" in text for row in rows for text in row.values())


if __name__ == "__main__":
    sys.exit(write())
