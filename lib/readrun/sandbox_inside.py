"""The inner side of `readrun.sandbox`: process 1 of the namespaces, and how they are made without bubblewrap.

Its source is handed to a bare interpreter with `-c`, so it imports only the standard library and no file of
the book is needed inside. Linux on x86-64: the numbers of system calls below are that machine's.
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import ctypes
import fcntl
import gc
import marshal
import os
import select
import struct
import sys

TYPE_CHECKING = False  # like the C modules above: `typing`, `signal`, `socket` would cost 40 ms a start
if TYPE_CHECKING:
    from typing import Any, NoReturn

WORK = "/scratch/work"
NOBODY = 65534
READ, EXECUTE, WRITE_FILE = 0b1100, 0b1, 0b10  # Landlock's access rights

DENIED = (  # by either kind: other processes, namespaces, kernel features with a past, uncounted memory
    "ptrace 101 process_vm_readv 310 process_vm_writev 311 kcmp 312 unshare 272 setns 308 chroot 161"
    " pivot_root 155 mount 165 umount2 166 swapon 167 swapoff 168 reboot 169 sethostname 170"
    " setdomainname 171 iopl 172 ioperm 173 init_module 175 delete_module 176 quotactl 179 acct 163"
    " settimeofday 164 syslog 103 kexec_load 246 kexec_file_load 320 finit_module 313 bpf 321"
    " perf_event_open 298 userfaultfd 323 add_key 248 request_key 249 keyctl 250 name_to_handle_at 303"
    " open_by_handle_at 304 memfd_create 319 shmget 29 shmat 30 shmctl 31 semget 64 msgget 68"
    " mq_open 240 io_setup 206 move_pages 279"
)
DENIED_TO_COMPUTE = (  # other programs and processes, sockets, every change of the file system
    "fork 57 vfork 58 execve 59 execveat 322 socket 41 socketpair 53 creat 85 truncate 76 rename 82 mkdir 83"
    " rmdir 84 link 86 unlink 87 symlink 88 chmod 90 fchmod 91 chown 92 fchown 93 lchown 94 utime 132"
    " mknod 133 setxattr 188 lsetxattr 189 fsetxattr 190 utimes 235 mkdirat 258 mknodat 259 fchownat 260"
    " futimesat 261 unlinkat 263 renameat 264 linkat 265 symlinkat 266 fchmodat 268 utimensat 280"
    " renameat2 316"
    # and whatever of process 1 the next job would inherit: priority, processors
    " setpriority 141 sched_setparam 142 sched_setscheduler 144 sched_setaffinity 203 ioprio_set 251"
    " sched_setattr 314"
)
NEW_SYSCALLS = 424  # and later, and x32's: "not implemented", so that libc takes calls a filter can read
EPERM, EACCES, ENOSYS = 1, 13, 38
SOCKETS = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6; others, such as AF_VSOCK, know no network namespaces
CLONE, CLONE_THREAD, CLONE_NEW = 56, 0x10000, 0x7E020000
PRLIMIT = 302
OPENS_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """A libc function, or a system call by number ("syscall", number, ...). Raises OSError."""
    exact = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if (result := getattr(_libc, name)(*exact)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments[:3]}: {os.strerror(number)}")
    return result


# ---- layers that a job takes on before its first instruction


def seccomp_program(kind: str) -> bytes:
    """The BPF program: what it names fails with an error code, another architecture kills."""

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    def load(offset: int) -> bytes:
        return op(0x20, offset)

    def give(errno: int) -> bytes:
        return op(0x06, 0x50000 | errno if errno else 0x7FFF0000)

    def when(number: int, *body: bytes) -> bytes:  # 0x15: equal, 0x35: at least, 0x45: has one of the bits
        return op(0x15, number, 0, len(body)) + b"".join(body)

    program = load(4) + op(0x15, 0xC000003E, 1, 0) + op(0x06, 0x80000000)
    program += load(0) + op(0x35, NEW_SYSCALLS, 0, 1) + give(ENOSYS)
    names = DENIED + (" " + DENIED_TO_COMPUTE if kind == "compute" else "")
    for number in map(int, names.split()[1::2]):
        program += when(number, give(EPERM))
    if kind == "compute":
        program += when(CLONE, load(16), op(0x45, CLONE_THREAD, 1, 0), give(EPERM), give(0))
        program += when(PRLIMIT, load(16), op(0x15, 0, 1, 0), give(EPERM), give(0))  # of oneself only
        for number, flags in ((2, 24), (257, 32)):  # open, openat
            program += when(number, load(flags), op(0x45, OPENS_FOR_WRITING, 0, 1), give(EACCES), give(0))
    else:
        program += when(CLONE, load(16), op(0x45, CLONE_NEW, 0, 1), give(EPERM), give(0))
        for number in (41, 53):  # socket, socketpair
            known = [op(0x15, family, len(SOCKETS) - i, 0) for i, family in enumerate(SOCKETS)]
            program += when(number, load(16), *known, give(EPERM), give(0))
    return program + give(0)


def take_seccomp(program: bytes) -> None:
    """Put the filter on this process and its children, for good."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", 22, 2, head, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def landlock_rules(rules: dict[str, int], network: bool) -> int:
    """A ruleset that allows only `rules` ({path: rights}), no TCP unless `network`; -1: not known here."""
    try:
        abi = call("syscall", 444, None, 0, 1)
    except OSError:
        return -1
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", files, 0 if network else 3, 3)  # 3: abstract sockets and signals
    ruleset = call("syscall", 444, attributes, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    for path, rights in rules.items():
        if os.path.exists(path):
            rights &= files if os.path.isdir(path) else files & 0b1100_0000_0000_0111
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", 445, ruleset, 1, struct.pack("Qi", rights, beneath), 0)
            os.close(beneath)
    return ruleset


def take_layers(job: dict[str, Any], ruleset: int, program: bytes) -> None:
    """Session, limits, no new privileges, Landlock, seccomp; raises if one of them cannot be had."""
    import resource

    os.setsid()
    for name, value in job["rlimits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if ruleset >= 0:
        call("syscall", 446, ruleset, 0)
    take_seccomp(program)


# ---- the job


def child(fds: list[int], ruleset: int, program: bytes) -> NoReturn:
    """In the forked process: take the layers, say "+", then become the job.

    The order is read here and not before the fork: the next job could find it in its own memory.
    """
    with os.fdopen(fds[0], "rb") as file:
        job = marshal.load(file)
    fds = fds[1:]
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in ([*fds, ruleset] if ruleset >= 0 else fds)]
    for fd, target in zip(high, (1, 2, 3, 4), strict=False):
        os.dup2(fd, target, inheritable=target < 3)
    answer, keep = 3, 4 if ruleset >= 0 else -1
    os.closerange(5 if keep == 4 else 4, 1024)
    os.chdir(WORK)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        take_layers(job, keep, program)
    except (OSError, ValueError) as error:
        os.write(answer, str(error).encode())
        os._exit(70)
    if keep >= 0:
        os.close(keep)
    os.write(answer, b"+")
    if "argv" in job:
        try:
            os.execvpe(job["argv"][0], job["argv"], job["env"])
        except OSError as error:
            os.write(2, f"{job['argv'][0]}: {error.strerror}\n".encode(errors="replace"))
            os._exit(127)
    os._exit(compute(job, answer))


def plain(value: Any) -> Any:
    """JSON data; what JSON lacks becomes its `str`."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if value - value == 0 else str(value)
    if kind in (list, tuple):
        return [plain(item) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: plain(item) for key, item in value.items()}
    return str(value)


def compute(job: dict[str, Any], answer: int) -> int:
    """Execute the snippet, report one JSON object; returns the exit code."""
    import json
    import traceback

    reply: dict[str, Any] = {}
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    name = job["answer"]
    try:
        try:
            exec(compile(job["code"], "<job>", "exec"), space)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        if name is not None:
            reply = {"value": plain(space[name]), "kind": type(space[name]).__name__}
        text = json.dumps(reply)
    except BaseException as error:
        if isinstance(error, KeyError) and name is not None and name not in space:
            error = NameError(f"the job set no variable {name!r}")
        reply = {"error": "".join(traceback.format_exception_only(error)).strip()[-1000:]}
        reply["memory"] = isinstance(error, MemoryError)
        text = json.dumps(reply)
        traceback.print_exception(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    data = text.encode()
    while data:
        data = data[os.write(answer, data) :]
    return int("error" in reply)


# ---- process 1


def reap_all() -> None:
    """Kill every other process of this PID namespace and wait until none is left."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def serve(control: socket.socket, kind: str, ruleset: int) -> None:
    """One job after the other, each in a fork; returns when the host closes its end."""
    program = seccomp_program(kind)
    while True:
        message, rights, _, _ = control.recvmsg(16, 256)
        if not message:
            return
        if message != b"job":
            continue  # "kill" came too late
        fds = list(struct.unpack("4i", rights[0][2]))
        if (pid := os.fork()) == 0:
            try:
                child(fds, ruleset, program)
            finally:
                os._exit(70)
        for fd in fds:
            os.close(fd)
        ended = os.pidfd_open(pid)
        while ended not in (ready := select.select([ended, control.fileno()], [], [], 0.02)[0]):
            if ready:
                if not control.recv(16):
                    return
                os.kill(-1, signal.SIGKILL)
            # orphans that ended are ours to bury, or they count as processes of the job
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while (gone := os.waitid(os.P_ALL, 0, how)) and gone.si_pid != pid:
                os.waitpid(gone.si_pid, 0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(ended)
        reap_all()
        control.send(str(code).encode())


def main(config: dict[str, Any]) -> None:
    """Make the namespaces unless bubblewrap has, introduce yourself to the host, serve."""
    # as low as can be: `child` closes what it inherits up to 1024, and `select` takes no more
    control = socket.socket(fileno=fcntl.fcntl(config["control"], fcntl.F_DUPFD_CLOEXEC, 3))
    os.close(config["control"])
    if config["plan"] is not None:
        namespaces(config, control)
    else:
        for path in config["devices"]:  # a job that stays root owns them, and could change their modes
            restrict(path, 3)
    if config["mapped"] and control.recv(16) == b"two":  # the host, root, has mapped 0 and nobody
        os.chown("/scratch", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    if os.getpid() != 1:  # `kill(-1)` below must never meet the host's processes
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("work", "tmp", "shm"):
        os.makedirs(f"/scratch/{name}", exist_ok=True)
    work = os.open(WORK, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    call("prctl", 4, 1, 0, 0, 0)  # dumpable for a moment: the host reads which namespaces these are
    control.sendmsg([b"hello"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", work))])
    os.close(work)
    if control.recv(16) != b"go":
        return
    call("prctl", 4, 0, 0, 0, 0)  # no job may look into this process
    sys.path[:] = [path for path in sys.path if path] + config["packages"]
    failed = ""
    for name in ["json", "traceback", *config["preload"]] if config["kind"] == "compute" else []:
        try:
            __import__(name)
        except BaseException as error:
            failed = f"{name}: {type(error).__name__}: {error}"
            break
    rules = config["readable"]
    ruleset = landlock_rules(rules, network=config["kind"] == "script")
    gc.collect()
    gc.freeze()  # forks share these pages
    control.send(marshal.dumps({"landlock": ruleset >= 0, "failed": failed}))
    serve(control, config["kind"], ruleset)


# ---- instead of bubblewrap


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    call("mount", texts[0], texts[1], texts[2], flags, texts[3])


def restrict(path: str, attributes: int, recursive: bool = True) -> None:
    """mount_setattr(2): 1 read-only, 2 no set-uid, 4 no devices."""
    call(
        "syscall", 442, -100, path.encode(), 0x8000 * recursive, struct.pack("QQQQ", attributes, 0, 0, 0), 32
    )


def namespaces(config: dict[str, Any], control: socket.socket) -> None:
    """Leave all of the host's namespaces; returns in process 1 of the new ones.

    The first process stays outside the PID namespace and waits, as bubblewrap's does.
    """
    call("unshare", 0x7E020000)  # mount, cgroup, host name, IPC, user, PID, network
    control.send(b"child-pid: %d" % os.getpid())  # as bubblewrap says it
    control.recv(16)  # the users are mapped
    if pid := os.fork():
        control.close()
        os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) & 255)
    bind, nosuid_nodev = 0x5000, 0x6  # MS_BIND | MS_REC
    mount("none", "/", None, 0x44000)  # MS_REC | MS_PRIVATE
    mount("tmpfs", "/tmp", "tmpfs", nosuid_nodev, "size=1m,nr_inodes=20k,mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for kind, source, target in config["plan"]:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if kind == "link":
            os.symlink(source, target)
        elif kind == "empty":
            mount("tmpfs", target, "tmpfs", nosuid_nodev, "size=4k,mode=755")
            restrict(target, 7)
        elif kind == "proc":
            os.makedirs(target, exist_ok=True)
            try:
                mount("proc", target, "proc", 0xF)  # read-only: some files in it are settings of the kernel
            except OSError:  # a container that hides parts of /proc: do without
                pass
        elif kind == "scratch":
            os.makedirs(target)
            mount("tmpfs", target, "tmpfs", nosuid_nodev, source)
        else:  # "bind" or "device"
            if os.path.isdir("/old" + source):
                os.makedirs(target, exist_ok=True)
            elif not os.path.exists(target):
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            mount("/old" + source, target, None, bind)
            restrict(target, 3 if kind == "device" else 7)
    call("umount2", b"/old", 2)  # MNT_DETACH
    os.rmdir("/old")
    restrict("/", 7, recursive=False)
    any_socket = socket.socket()
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # loopback up
    any_socket.close()
