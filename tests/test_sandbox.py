"""Foreign code is contained, on both backends. Each attack's control shows that it does its harm outside."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from readrun import paths, sandbox, sandbox_box, sandbox_inside, tables
from readrun.sandbox import Limits, Policy, SandboxUnavailable, run
from readrun.sandbox_attacks import ATTACKS, attempt, control
from readrun.sandbox_files import copy_files, printable

BACKENDS = ("bwrap", "namespaces")


def reason(backend: str) -> str:
    """Why a backend cannot be tested here; empty where it can."""
    if backend == "bwrap" and not shutil.which("bwrap"):
        return "bubblewrap is not installed"
    with sandbox.only(backend):
        return sandbox.report()["reason"]


WHY_NOT = {backend: reason(backend) for backend in BACKENDS}
sandbox.close()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """One backend after the other; only a machine that cannot isolate skips, and says so."""
    if WHY_NOT[request.param]:
        pytest.skip(f"{request.param}: {WHY_NOT[request.param]}")
    with sandbox.only(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def nothing_left():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    sandbox.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def value(code: str, **policy):
    result = run(code, Policy(answer="ans", **policy), Limits(time=10))
    assert result.status == "ok", result
    return result.value


# ---- attacks


@functools.cache
def of_those_that_run_on(do, backend=""):
    """{name: result} of the attacks that only take time, all at once."""
    attacks = [attack for attack in ATTACKS if attack.effect == "runs on"]
    with ThreadPoolExecutor(len(attacks)) as pool:
        return dict(zip([attack.name for attack in attacks], pool.map(do, attacks), strict=True))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_contained(backend, attack):
    together = attack.effect == "runs on"
    harmed, result = of_those_that_run_on(attempt, backend)[attack.name] if together else attempt(attack)
    assert not harmed, result
    assert result.isolation == backend


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_does_harm_outside(attack):
    if attack.root and os.geteuid() != 0:
        pytest.skip("this control needs root")
    assert of_those_that_run_on(control)[attack.name] if attack.effect == "runs on" else control(attack)


def test_at_least_one_backend_works_here():
    if sys.platform != "linux":
        pytest.skip("only Linux can isolate")
    assert "" in WHY_NOT.values(), WHY_NOT


@pytest.mark.parametrize(
    "backend, command",
    [
        ("bwrap", "bwrap --unshare-all --ro-bind / / true"),
        ("namespaces", "unshare --user --map-root-user --mount --pid --fork --net --ipc true"),
    ],
)
def test_no_backend_is_skipped_where_the_machine_can(backend, command):
    if (
        not shutil.which(command.split()[0])
        or subprocess.run(command.split(), capture_output=True).returncode
    ):
        pytest.skip(f"{command} does not work here")
    assert WHY_NOT[backend] == ""


def test_layers_are_those_found_from_outside(backend):
    report = sandbox.report()
    assert report["isolation"] == backend and report["reason"] == ""
    assert all(report[layer] for layer in sandbox.LAYERS if layer != "landlock")
    try:
        sandbox_inside.call("syscall", 444, None, 0, 1)
    except OSError:
        return
    assert report["landlock"]


COUNT = {  # start one after the other until the kernel refuses, say how many there were
    "compute": """
import threading
threading.stack_size(65536)
stop, made = threading.Event(), 0
try:
    while made < 150: threading.Thread(target=stop.wait, daemon=True).start(); made += 1
except RuntimeError: pass
print(made)
""",
    "script": """
import os, signal
made = []
try:
    while len(made) < 150:
        if not (pid := os.fork()): signal.pause()
        made.append(pid)
except BlockingIOError: pass
print(len(made))
""",
}


@pytest.mark.parametrize("kind", COUNT)
def test_the_kernel_holds_the_limit_on_processes_when_the_host_never_looks(backend, kind, monkeypatch):
    monkeypatch.setattr(sandbox_box.Box, "_excess", lambda *_: "")
    job = COUNT[kind] if kind == "compute" else ["python", "-S", "-c", COUNT[kind]]

    def made(processes: int) -> int:
        result = run(job, Policy(kind), Limits(time=20, processes=processes))
        assert result.status == "ok", result
        return int(result.stdout)

    for processes in (1, 32):
        assert processes - 1 <= made(processes) < processes + sandbox_box.SPARE
    assert made(200) == 150  # the control: nothing else stops it


def test_a_limit_that_only_the_host_holds_is_reported(backend, monkeypatch, tmp_path):
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"] or os.geteuid():
        pytest.skip("only the machine's own root has processes that the kernel does not limit")
    tmp_path.chmod(0o700)  # as if nobody could not read an installed package
    real = sandbox_box._packages()
    monkeypatch.setattr(sandbox_box, "_packages", lambda: [str(tmp_path), *real])
    sandbox.close()
    report = sandbox.report()
    sandbox.close()
    assert [layer for layer in sandbox.LAYERS if not report[layer]] == ["processes"]


def test_nothing_of_the_host_is_mounted(backend):
    result = run(
        [
            "bash",
            "-c",
            "ls -A / /dev; for d in / /usr /etc /dev /python /proc/$$/comm; do test -w $d && echo W $d; done",
        ],
        Policy("script"),
    )
    names = set(result.stdout.split())
    assert "W" not in names
    assert not names & {"home", "var", "opt", "mnt", "sys", "boot", "sda", "kvm", "mem"}
    assert not [name for name in names if name.startswith("nvidia")]
    packages = Path(sandbox.__file__).parent
    assert value(f"import os; ans = os.path.exists({str(packages / 'sandbox.py')!r})") is False


def test_the_jobs_environment_is_what_the_policy_says(backend, monkeypatch):
    monkeypatch.setenv("READRUN_CANARY", "secret")
    result = run(["env"], Policy("script", env={"NONCE": "n1"}))
    names = {line.split("=")[0] for line in result.stdout.splitlines()}
    assert "NONCE=n1" in result.stdout and "READRUN_CANARY" not in names
    assert names <= set(
        "NONCE PATH HOME TMPDIR LANG PYTHONPATH PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS".split()
    ) | set("OPENBLAS_NUM_THREADS MKL_NUM_THREADS".split())


def test_the_table_of_the_book_is_about_these_attacks():
    found = json.loads((paths.data() / "results/sandbox.json").read_text(encoding="utf-8"))
    assert [row["attack"] for row in found["attacks"]] == [attack.name for attack in ATTACKS]
    for row in found["attacks"]:
        assert row["outside"] == "harm" and set(row) == {"attack", "kind", "outside", *BACKENDS}
        assert all(row[backend].startswith("contained: ") for backend in BACKENDS), row
    page = str(tables.sandbox())
    assert all(attack.name in page for attack in ATTACKS[:3]) and "median (ms)" in page


# ---- snippets


def test_answers(backend):
    assert value("ans = 6 * 7") == 42
    assert value("ans = {'a': [1, 2.5, None, True, 'x']}") == {"a": [1, 2.5, None, True, "x"]}
    assert value("from fractions import Fraction as F; ans = F(1, 3)") == "1/3"
    assert value("ans = [float('nan'), float('-inf')]") == ["nan", "-inf"]
    assert value("ans = '\\ud800x\\x1b[2J'") == "?x\x1b[2J"
    assert run("ans = 1", Policy(answer="ans")).kind == "int"
    assert run("import sys; sys.exit(0)").status == "ok"
    assert run("print('a'); raise ValueError('bad')").error == "ValueError: bad"
    missing = run("x = 1", Policy(answer="ans"))
    assert missing.status == "error" and "no variable 'ans'" in missing.error


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import os; os.close(3)",
        "import os; os.write(3, b'{\"value\": 1}')",  # a first message, then the real one
        "import os; os.write(3, b'{\"value\": 1'); os._exit(0)",
        "import os; os.write(3, b'[1]'); os._exit(0)",
        "import os; os.write(3, b'{\"value\": NaN}'); os._exit(0)",
        "import os; os.write(3, b'{\"value\": ' + b'[' * 20000 + b']' * 20000 + b'}'); os._exit(0)",
        "import os; os.write(3, b'\\xff\\xfe'); os._exit(0)",
        "ans = 10 ** 5000",
        "ans = []; ans.append(ans)",
        "class A:\n  def __str__(s): raise SystemExit(0)\nans = A()",
        "class A:\n  __class__ = property(lambda s: 1 / 0)\n  def __str__(s): return 5\nans = A()",
        "class E(BaseException):\n  def __str__(s): raise E\nraise E",
        "import sys; sys.stdout = None; 1 / 0",
        "import builtins, json; json.dumps = builtins.print = None; ans = 1",
    ],
)
def test_a_report_that_lies_or_lacks_is_an_error_and_the_next_job_is_clean(backend, code):
    assert run("ans = 1\n" + code, Policy(answer="ans")).status in ("error", "killed")
    assert value("import json, builtins; print(1); ans = json.dumps([1])") == "[1]"


def test_infinite_numbers_in_a_forged_report_become_text(backend):
    forged = run("import os; os.write(3, b'{\"value\": [1e999]}'); os._exit(0)", Policy(answer="ans"))
    assert forged.value == ["inf"]


def test_a_large_answer_is_output(backend):
    assert run("ans = 'x' * 100_000", Policy(answer="ans")).status == "output"


def test_jobs_do_not_see_one_another(backend):
    run(
        "import builtins, sys, json; builtins.leak = sys.leak = json.leak = 1; sys.path.insert(0, '/scratch')"
    )
    assert (
        value("import builtins, sys, json\nans = [hasattr(m, 'leak') for m in (builtins, sys, json)]")
        == [False] * 3
    )
    assert value("import sys; ans = '/scratch' in sys.path") is False
    assert run("import os; os.kill(os.getppid(), 9)").status in ("ok", "error")  # process 1 is immune
    assert value("ans = 1") == 1


def test_a_job_does_not_find_an_earlier_one_in_its_memory(backend):
    # write(2) from an address that is not mapped fails and does not kill: a safe look at the whole heap
    scan = """
import ctypes, os
libc, (reader, writer) = ctypes.CDLL(None), os.pipe()
libc.sbrk.restype, page = ctypes.c_void_p, 4096
top, arena, seen = libc.sbrk(0), id(object()), []
arena -= arena % page
for start in [*range(top - (16 << 20), top, page), *range(arena - (8 << 20), arena + (8 << 20), page)]:
    if libc.write(writer, ctypes.c_void_p(start), page) == page:
        seen.append(os.read(reader, page))
memory = b''.join(seen)
ans = [(word + 'mark').encode() in memory for word in ('first', 'second')]
"""
    run("first" + "mark = 1; del first" + "mark #" + " firstmark" * 3000)
    assert value("secondmark = 1\n" + scan) == [False, True]  # the second is the control: it finds itself


def test_a_job_inherits_nothing_of_a_host_with_many_open_files(backend):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    sandbox.close()  # the next one's socket gets a number beyond 1024
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        script = run(["bash", "-c", "ls /proc/$$/fd"], Policy("script"), Limits(time=10))
        code = "import os; ans = []\nfor fd in range(4, 2000):\n"
        code += "  try: os.fstat(fd); ans.append(fd)\n  except OSError: pass"
        assert value(code) == [] and script.stdout.split() == ["0", "1", "2", "3"]  # 3: what ls reads
    finally:
        for descriptor in many:
            os.close(descriptor)
        sandbox.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_of_one_snippet_are_gone_for_the_next(backend, tmp_path):
    (tmp_path / "module.py").write_text("x = 5")
    code = "import sys; sys.path.insert(0, '.'); import module; ans = module.x"
    assert value(code, files=tmp_path) == 5
    assert value("import os; ans = os.listdir('.')") == []
    (tmp_path / "module.py").unlink()
    (tmp_path / "name").mkdir()  # no file, but it says something
    assert value("import os; ans = os.listdir('.')", files=tmp_path) == ["name"]
    assert value("import os; ans = os.listdir('.')") == []


def test_warm_imports(backend):
    assert value("import sympy; ans = str(sympy.sqrt(8))", preload=("sympy",)) == "2*sqrt(2)"
    assert value("import sys; ans = 'sympy' in sys.modules", preload=("sympy",)) is True
    with pytest.raises(ValueError, match="preload: no module 'no_such_module'"):
        run("1", Policy(preload=("no_such_module",)))


def test_z3_and_its_time_limit(backend):
    pytest.importorskip("z3")
    code = (
        "import z3; x = z3.Int('x'); s = z3.Solver(); s.set('timeout', 2000); s.add(x * x == 1521, x > 0)\n"
    )
    assert value(code + "s.check(); ans = s.model()[x].as_long()", preload=("z3",)) == 39


def test_a_hundred_jobs_leave_nothing(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def state():
        me = psutil.Process()
        return len(me.children(recursive=True)), me.num_fds(), me.num_threads()

    sandbox.close()
    before = state()
    run("1")
    warm = state()
    for number in range(100):
        assert run(f"print({number})").stdout == f"{number}\n"
    assert state() == warm
    run(["true"], Policy("script"))
    sandbox.close()
    assert state() == before
    assert list(tmp_path.iterdir()) == []


def test_threads_of_the_caller_work_side_by_side(backend):
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(
            lambda i: run(f"ans = {i} ** 2", Policy(answer="ans"), Limits(time=20)).value, range(20)
        )
    assert list(answers) == [i**2 for i in range(20)]


# ---- scripts


def test_a_script_and_its_files(backend, tmp_path):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "reproduce.sh").write_text(
        "python -c 'import numpy; print(numpy.arange(3).sum())' > out.txt; echo err >&2; echo x >> sub/a"
    )
    (source / "sub" / "a").write_text("a\n")
    result = run(
        ["bash", "reproduce.sh"],
        Policy("script", files=source, collect=tmp_path / "out", merge=True),
        Limits(time=20),
    )
    assert (result.status, result.stdout, result.skipped) == ("ok", "err\n", {})
    assert (tmp_path / "out" / "out.txt").read_text() == "3\n"
    assert result.before["sub/a"] == hashlib.sha256(b"a\n").hexdigest()
    assert result.files["sub/a"] == hashlib.sha256(b"a\nx\n").hexdigest()
    assert (source / "sub" / "a").read_text() == "a\n"  # the job worked on a copy
    assert run(["bash", "-c", "exit 3"], Policy("script")).returncode == 3
    assert run(["no-such-program"], Policy("script")).returncode == 127
    assert run(["bash", "-c", "kill -SEGV $$"], Policy("script")).error == "SIGSEGV"


HOSTILE = r"""
ln -s SECRET link; ln -s / root; ln -s ../../.. up; mkdir -p a/b; ln -s /etc a/etc; mkfifo fifo
mkdir results.json; touch 'new
line' $'esc\e[2J' $'bad\xff' ; echo 1 > case; echo 2 > CASE; truncate -s 15M sparse; truncate -s 15M sparse2
python3 -c 'import socket; socket.socket(1).bind("sock")'; ln case hard; echo ok > a/b/good; true
"""


def test_hostile_results_are_neither_followed_nor_waited_for(backend, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    job = ["bash", "-c", HOSTILE.replace("SECRET", str(tmp_path / "secret"))]
    limits = Limits(time=20, disk=16)
    result = run(job, Policy("script", collect=tmp_path / "out"), limits)
    assert result.status == "ok", result
    out = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*")}
    assert all(path.is_file() or path.is_dir() for path in out.values())
    assert not any(path.is_symlink() for path in out.values())
    assert out["a/b/good"].read_text() == "ok\n"
    assert {"link", "root", "up", "a/etc", "fifo", "sock"} <= set(result.skipped)
    assert {"new\\nline", "esc\\x1b[2J", "bad\ufffd"} <= set(result.skipped)
    assert len({"case", "CASE"} & set(result.files)) == 1 and len({"sparse", "sparse2"} & set(out)) == 1
    assert "results.json" not in result.files
    assert "the secret" not in "".join(path.read_text("latin-1") for path in out.values() if path.is_file())

    naive = tmp_path / "naive"  # the control: a copier that follows links takes the secret along
    naive.mkdir()
    (naive / "link").symlink_to(tmp_path / "secret")
    shutil.copytree(naive, tmp_path / "copied")
    assert (tmp_path / "copied" / "link").read_text() == "the secret"
    assert copy_files(naive, None, max_bytes=100, max_files=9) == ({}, {"link": "link"})


def test_a_hostile_submission_folder(tmp_path):
    (tmp_path / "secret").write_text("the secret")
    source = tmp_path / "source"
    source.mkdir()
    os.link(tmp_path / "secret", source / "hard")
    os.mkfifo(source / "fifo")
    (source / "link").symlink_to("../secret")
    (source / "large").write_bytes(b"x" * 2000)
    (source / "good").write_text("x")
    started = time.monotonic()
    found, skipped = copy_files(source, None, max_bytes=1000, max_files=10)
    assert time.monotonic() - started < 5 and set(found) == {"good"}
    assert skipped == {"hard": "hard link", "fifo": "FIFO", "link": "link", "large": "too large"}
    assert copy_files(source, None, max_bytes=9999, max_files=2)[1]["…"] == "too many files"


def test_a_link_swapped_in_after_the_look_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("the secret")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    (source / "a").write_text("harmless")
    real = os.stat

    def stat_then_swap(path, **how):
        seen = real(path, **how)
        if path == "a" and stat.S_ISREG(seen.st_mode):
            (source / "a").unlink()
            (source / "a").symlink_to(tmp_path / "secret")
        return seen

    monkeypatch.setattr(os, "stat", stat_then_swap)
    found, skipped = copy_files(source, target, max_bytes=100, max_files=10)
    assert found == {} and set(skipped) == {"a"} and list(target.iterdir()) == []


def test_a_broken_limit_keeps_what_was_written(backend):
    result = run(["bash", "-c", "echo first; sleep 30"], Policy("script"), Limits(time=0.5))
    assert (result.status, result.stdout, result.returncode) == ("timeout", "first\n", None)


def test_output_sent_away_does_not_keep_the_caller_waiting(backend):
    # sockets that hold their own other end and stdout: nobody closes it before the kernel looks for such
    code = """python3 -S -c "import array, socket
a, b = socket.socketpair()
for s, fds in ((a, [1, 2]), (a, [a.fileno(), b.fileno()]), (b, [a.fileno(), b.fileno()])):
    s.sendmsg([b'x'], [(1, 1, array.array('i', fds).tobytes())])
print('sent')" """
    started = time.monotonic()
    result = run(["bash", "-c", code], Policy("script"), Limits(time=5))
    assert (result.status, result.stdout) == ("ok", "sent\n")
    assert time.monotonic() - started < result.seconds + 2


def test_ended_orphans_do_not_count_as_processes(backend):
    job = ["bash", "-c", "for i in $(seq 60); do (true &); sleep 0.01; done; echo done"]
    assert run(job, Policy("script"), Limits(time=20, processes=32)).stdout == "done\n"


def test_both_streams_have_names_and_limits(backend):
    job = ["bash", "-c", "echo a > /dev/stdout; echo b > /dev/stderr"]
    result = run(job, Policy("script"))
    assert (result.stdout, result.stderr) == ("a\n", "b\n")
    flood = run("import sys\nwhile True: sys.stderr.write('x' * 1000)", Policy(), Limits(output=5000))
    assert flood.status == "output" and len(flood.stderr) == 5000
    for _ in range(5):  # however fast it ends
        assert run("print('x' * 30_000)", Policy(), Limits(output=5000)).status == "output"


def test_printable():
    assert printable(b"a\tb\n\x1b]0;t\x07\x00\xff\r") == "a\tb\n\\x1b]0;t\\x07\\x00\ufffd\\r"
    assert printable("\u202eevil\u200b".encode()) == "\\u202eevil\\u200b"


# ---- refusal, ends


def test_without_a_backend_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "BACKENDS", ())
    with pytest.raises(SandboxUnavailable, match="neither file system nor network can be isolated"):
        run("1")
    assert sandbox.report()["isolation"] == "none"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_refuse(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(SandboxUnavailable, match=f"only on Linux on x86-64, not on {platform}"):
        run("1")
    assert platform in sandbox.report()["reason"]


def test_a_sandbox_with_the_hosts_network_is_refused(monkeypatch):
    if WHY_NOT["bwrap"]:
        pytest.skip(WHY_NOT["bwrap"])
    real = sandbox_box._bwrap
    monkeypatch.setattr(
        sandbox_box, "_bwrap", lambda *a: ["bwrap", "--unshare-all", "--share-net", *real(*a)[2:]]
    )
    sandbox.close()
    with sandbox.only("bwrap"), pytest.raises(SandboxUnavailable, match="not isolated: network"):
        run("1")


@pytest.mark.parametrize(
    "job, policy, limits, message",
    [
        ("", Policy(), Limits(), "job: empty"),
        (["a"], Policy(), Limits(), "job: Python source"),
        ("a", Policy("script"), Limits(), "job: a list"),
        (["a\0b"], Policy("script"), Limits(), "NUL"),
        ("1", Policy("other"), Limits(), "kind: 'compute' or 'script'"),  # type: ignore[arg-type]
        ("1", Policy(env={"A": "b"}), Limits(), "env: not for compute"),
        (["a"], Policy("script", env={"A=B": "b"}), Limits(), "env: 'A=B' is no name"),
        (["a"], Policy("script", env={"A": 1}), Limits(), "no text"),  # type: ignore[dict-item]
        ("1", Policy(), Limits(time=1e18), "time: a positive number below"),
        (["a"], Policy("script", answer="x"), Limits(), "answer: not for script"),
        ("1", Policy(), Limits(time=0), "time: a positive number"),
        ("1", Policy(), Limits(time=float("nan")), "time: a positive number"),
        ("1", Policy(), Limits(memory=1.5), "memory: a whole number"),  # type: ignore[arg-type]
        ("1", Policy(files=Path("/no/such")), Limits(), "files: /no/such is no folder"),
    ],
)
def test_bad_arguments_name_the_parameter(job, policy, limits, message):
    with pytest.raises(ValueError, match=message):
        run(job, policy, limits)


def test_results_never_land_in_a_folder_that_holds_something(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="collect: .* is not empty"):
        run(["true"], Policy("script", collect=tmp_path))


def test_a_killed_caller_takes_its_sandbox_along(backend):
    code = f"from readrun import sandbox as s; s.BACKENDS = ('{backend}',); s.run('1'); "
    code += "print('up', flush=True); input()"
    caller = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert caller.stdout and caller.stdout.readline() == b"up\n"
    below = psutil.Process(caller.pid).children(recursive=True)
    assert len(below) >= 2
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    caller.stdout.close(), caller.stdin and caller.stdin.close()
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_forked_child_leaves_its_parents_sandbox_alone(backend):
    assert value("ans = 1") == 1
    if (child := os.fork()) == 0:
        os._exit(0 if run("ans = 2", Policy(answer="ans"), Limits(time=20)).value == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert value("ans = 3") == 3


def test_a_sandbox_that_was_killed_from_outside_is_replaced(backend):
    value("ans = 1")
    (box,) = sandbox._idle[(backend, "compute", (), 64 * 2**20, 10_000)]
    os.kill(box.pid, signal.SIGKILL)
    assert run("ans = 1", Policy(answer="ans")).status in ("killed", "ok")
    assert value("ans = 2") == 2


def test_loopback_works_inside_a_script(backend):
    code = "import socket as s; a = s.create_server(('127.0.0.1', 0)); "
    code += "s.create_connection(a.getsockname()).close(); print('ok')"
    assert run(["python", "-c", code], Policy("script"), Limits(time=10)).stdout == "ok\n"
    assert socket.AF_INET in sandbox_inside.SOCKETS
