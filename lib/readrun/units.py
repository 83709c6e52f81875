"""Units: one saved result per (function, arguments, reached definitions), so that killed work resumes."""

from __future__ import annotations

import ast
import builtins
import contextlib
import hashlib
import inspect
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from readrun import content, paths


class Unit(Mapping[str, Any]):
    """The saved result of one piece of an experiment; a mapping over what its function returned.

    `id` names it in logs and `only` patterns, `key` decides whether a saved result is its own, `arguments` are those
    of the call, `done` says whether there is a result, `meta` holds seconds, peak memory, device, versions, commit.
    """

    def __init__(self, fn: str, arguments: dict[str, Any], key: str, compute: Callable[[Unit], None]) -> None:
        short = {k: v for k, v in arguments.items() if isinstance(v, (str, int, float)) and len(str(v)) <= 40}
        self.id = f"{fn}/{','.join(f'{k}={v}' for k, v in short.items())}".rstrip("/").replace(" ", "_")
        self.fn, self.arguments, self.key = fn, arguments, key
        self.meta: dict[str, Any] = {}
        self.folder: Path | None = None
        self._compute = compute
        self._values: dict[str, Any] = {}

    @property
    def done(self) -> bool:
        return self.folder is not None

    def ensure(self) -> Unit:
        """Compute it now if there is no result yet."""
        if not self.done:
            self._compute(self)
        return self

    def _kinds(self) -> dict[str, str]:
        if self.folder is None:
            raise KeyError(f"unit {self.id} has no result: it was not selected by `only` and is not saved")
        return self.meta["kinds"]

    def __getitem__(self, name: str) -> Any:
        kind = self._kinds()[name]
        if name not in self._values:
            assert self.folder is not None
            self._values[name] = read_value(self.folder, name, kind)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds())

    def __len__(self) -> int:
        return len(self._kinds())

    def __repr__(self) -> str:
        return f"Unit({self.id}, {'done' if self.done else 'no result'})"

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unit) and other.key == self.key


def units_in(value: Any) -> list[Unit]:
    """The units among (nested) arguments."""
    if isinstance(value, Unit):
        return [value]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [u for v in nested for u in units_in(v)]


def plain(value: Any, where: str) -> Any:
    """`value` as JSON data (a unit as its key). Raises TypeError naming `where` for anything else."""
    if isinstance(value, Unit):
        return {"unit": value.key}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item(), where)
    raise TypeError(f"{where}: {type(value).__name__} is neither JSON data with string keys nor a unit")


# ---------------------------------------------------------------- the key


def executed(fn: Callable[..., Any], slug: str) -> list[str]:
    """Sources that made the globals of `fn`: cells run in this kernel, cells of a script so far, or a whole file."""
    script = content.cells(slug) if paths.notebook(slug).is_file() else []
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and any(fn.__globals__ is n for n in (shell.user_ns, shell.user_global_ns)):
        hidden = {c.source for c in script if c.presentation}
        raw = [s.rstrip("\n") for s in shell.history_manager.input_hist_raw]
        return [s for i, s in enumerate(raw) if s not in hidden and s not in raw[i + 1 :]]  # a cell's last run counts
    line, frame = sys.maxsize, sys._getframe()
    while frame is not None:
        if frame.f_globals is fn.__globals__ and frame.f_code.co_name == "<module>":
            line = frame.f_lineno
        frame = frame.f_back
    file = Path(fn.__code__.co_filename)
    if not file.is_file():
        raise ValueError(f"unit function {fn.__name__} has no source: define it in a notebook or in a file")
    if script and file.resolve() == paths.notebook(slug).resolve():
        return [c.source for c in script if c.kind == "code" and not c.presentation and c.first_line <= line]
    return [file.read_text(encoding="utf-8")]


def read_statements(sources: tuple[str, ...]) -> list[content.Statement]:
    code: list[content.Statement] = []
    for source in sources:
        with contextlib.suppress(SyntaxError):  # it never ran
            code += content.statements(source)
    return code


@lru_cache(maxsize=256)
def follow(start: str, sources: tuple[str, ...], leaves: frozenset[str]) -> tuple[dict[str, list[ast.stmt]], set[str], bool]:
    """What `start` reaches: {global name: its statements}, the names of the `Run`, whether all this is in doubt.

    Leaves are parameters: their values count, not their statements.
    """
    code = read_statements(sources)
    star = any("*" in s.binds for s in code)
    escaped = {n for s in code for n in s.reads if n.startswith("global ")}
    found: dict[str, list[ast.stmt]] = {}
    todo, runs, doubt = [start], set(), False
    while todo:
        name = todo.pop()
        if name in found:
            continue
        bound = [i for i, s in enumerate(code) if name in s.binds]
        last = bound[-1] if bound else -1
        solid = bound and isinstance(code[last].node, content.DEFINITIONS)
        reached = [code[last]] if bound else []
        found[name] = []
        if name in leaves or any(_starts_run(s.node) for s in reached):
            runs |= {name} - leaves
            continue
        reached += [s for s in code[last + 1 :] if name in s.changes or (name in s.touches and not solid)]
        found[name] = [s.node for s in reached]
        doubt |= f"global {name}" in escaped or name == start and not bound
        doubt |= star and not reached and not hasattr(builtins, name)
        for statement in reached:
            todo += statement.reads
            doubt |= bool(statement.reads & content.DOUBTFUL) or any(n.startswith("global ") for n in statement.reads)
    return found, runs, doubt


def _starts_run(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Assign) else None
    return isinstance(call, ast.Call) and content.call_name(call) == "start"


def unit_key(fn: Callable[..., Any], arguments: dict[str, Any], run: Any) -> str:
    """Digest of what `fn(**arguments)` can depend on. Raises TypeError for arguments that are not JSON data or units."""
    inner = inspect.unwrap(fn)
    if not inspect.isfunction(inner) or inner.__name__ == "<lambda>":
        raise TypeError(f"unit: {fn!r} is not a named function")
    call = [content.SCHEME, inner.__name__, plain(arguments, f"argument of {inner.__name__}")]
    module = inner.__module__.removeprefix("readrun.")
    if module != inner.__module__ and not module.startswith("chapters."):
        return content.digest([call, content.modules_reached([module])])
    values = content.key_parameters(run.slug, run.parameters)
    space = inner.__globals__
    named = {**run.parameters, **content.default_parameters(run.slug)}
    leaves = frozenset(n for n in named if not callable(space.get(n)))
    sources = tuple(executed(inner, run.slug))
    found, runs, doubt = follow(inner.__name__, sources, leaves)
    trees = [s for nodes in found.values() for s in nodes]
    used: dict[str, Any] = {}
    for name in (found.keys() & leaves) - {"only", "out", "device"}:
        used[name] = values[name] if name in ("profile", "checkpoint") else repr(space.get(name, named[name]))
    for node in [n for tree in trees for n in ast.walk(tree)]:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in runs:
            read = {"settings": "profile"}.get(node.attr, node.attr)
            if read not in content.RUN_FREE:
                used |= {read: values[read]} if read in ("profile", "checkpoint") else values
    code = {n: [content.canonical(s, run.profile) for s in nodes] for n, nodes in sorted(found.items()) if nodes}
    modules = content.modules_reached(m for tree in trees for m in content.modules_in(tree))
    assets = content.assets_reached([*trees, ast.parse(repr(call))], modules, run.slug)
    whole: list[str] = []
    if doubt:
        whole = [content.content_key(run.slug, run.parameters)] if paths.notebook(run.slug).is_file() else []
        every = [s for s in read_statements(sources) if not s.binds or s.binds - leaves]
        whole += [inspect.getsource(inner), *[content.canonical(s.node, run.profile) for s in every]]
    return content.digest([call, code, modules, assets, used, whole])


# ---------------------------------------------------------------- files of one unit


def _kind(value: Any) -> str:
    """json | array | tensor | state: where a returned value is stored."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray):
        return "array"
    if torch and isinstance(value, torch.Tensor):
        return "tensor"
    if torch and isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
        return "state"
    return "json"


def write_values(folder: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """Write a unit's result into `folder`; returns {name: kind} in the result's order."""
    kinds = {name: _kind(value) for name, value in result.items()}
    scalars = {n: plain(result[n], f"result[{n!r}]") for n, k in kinds.items() if k == "json"}
    (folder / "result.json").write_text(json.dumps(scalars), encoding="utf-8")
    arrays = {n: result[n] for n, k in kinds.items() if k == "array"}
    if arrays:
        import numpy as np

        if bad := [n for n, a in arrays.items() if a.dtype.hasobject]:
            raise TypeError(f"result[{bad[0]!r}]: arrays of Python objects cannot be saved")
        with open(folder / "arrays.npz", "wb") as out:
            np.savez_compressed(out, **{f"array:{n}": a for n, a in arrays.items()})
    for name in [n for n, k in kinds.items() if k in ("tensor", "state")]:
        from safetensors.torch import save

        tensors = result[name] if kinds[name] == "state" else {"tensor": result[name]}
        # a clone each: safetensors refuses tensors that share memory (tied weights)
        own = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
        (folder / f"{name}.safetensors").write_bytes(save(own, {"order": json.dumps(list(own))}))
    return kinds


def read_value(folder: Path, name: str, kind: str) -> Any:
    """One value of a saved result; tensors come to the CPU."""
    if kind == "json":
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))[name]
    if kind == "array":
        import numpy as np

        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            return arrays[f"array:{name}"]
    from safetensors import safe_open

    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in json.loads(file.metadata()["order"])}
    return tensors if kind == "state" else tensors["tensor"]


def read_meta(folder: Path, key: str = "") -> dict[str, Any]:
    """A unit folder's meta.json after checking every file. Raises ValueError saying what is wrong with it."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if key and meta["key"] != key:
            raise ValueError("it holds another key")
        for name, digest in meta["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} differs from its checksum")
        return meta
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"unit folder {folder} is damaged: {error}") from error


def find(stores: list[Path], name: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The first sound copy of a unit; a damaged one in the first store (our own) is put aside, with a warning."""
    for place, store in enumerate(stores):
        folder = store / name
        try:
            if folder.exists():
                return folder, read_meta(folder, key)
        except ValueError as error:
            warnings.warn(f"{error}; it is not used", RuntimeWarning, stacklevel=2)
            if place == 0:
                with contextlib.suppress(OSError):  # another process was faster
                    folder.rename(store / f".damaged-{name}-{uuid.uuid4().hex[:8]}")
    return None


def publish(store: Path, name: str, key: str, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write a temporary folder and rename it to store/name: whole or not at all.

    Where another process was faster its sound copy stays. Raises OSError (full disk, no permission) with the unit's
    name; nothing half-written is left.
    """
    folder, temporary = store / name, store / f".tmp-{uuid.uuid4().hex[:12]}"
    try:
        store.mkdir(parents=True, exist_ok=True)
        for old in store.glob(".tmp-*"):  # left by a killed process
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
        fill(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if find([store], name, key) is None:
                temporary.rename(folder)
    except OSError as error:
        reason = f"unit {name} could not be saved in {store}: {error.strerror or error}; nothing half-written is left"
        raise OSError(error.errno, reason) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# ---------------------------------------------------------------- computing


@contextlib.contextmanager
def seeded(value: Any, with_torch: bool) -> Iterator[None]:
    """Random streams of python, numpy and torch that depend on `value` alone; the caller's come back after."""
    number = int(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8], 16)
    import numpy as np

    if with_torch:
        with contextlib.suppress(ImportError):
            import torch  # noqa: F401  (a later import inside the function would escape the seed)
    torch = sys.modules.get("torch")
    states = random.getstate(), np.random.get_state()
    random.seed(number)
    np.random.seed(number)
    if torch is None:
        guard: Any = contextlib.nullcontext()
    else:
        guard = torch.random.fork_rng(list(range(torch.cuda.device_count())))
    try:
        with guard:
            if torch is not None:
                torch.manual_seed(number)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def measured(meta: dict[str, Any]) -> Iterator[None]:
    """Fill meta with seconds, peak_ram_gib (this process) and peak_gpu_gib (None without a GPU)."""
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    for index in range(torch.cuda.device_count() if gpu else 0):
        torch.cuda.reset_peak_memory_stats(index)
    with contextlib.suppress(OSError):  # Linux: the peak starts anew
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    yield
    gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())] if gpu else []
    if gpu:
        torch.cuda.synchronize()
    meta["seconds"] = round(time.perf_counter() - start, 3)
    meta["peak_ram_gib"] = round(peak_ram() / 2**30, 3)
    meta["peak_gpu_gib"] = round(sum(peaks) / 2**30, 3) if gpu else None


def peak_ram() -> int:
    """Peak resident bytes of this process, since `measured` began where the system can tell."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: str) -> str:
    """The name of the GPU or of the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python's version and those of the loaded packages that compute."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in "numpy scipy torch transformers diffusers accelerate peft timm torchvision triton sklearn".split():
        with contextlib.suppress(PackageNotFoundError):
            if name in sys.modules:
                found[name] = version({"sklearn": "scikit-learn"}.get(name, name))
    return found


@lru_cache(maxsize=1)
def commit() -> str | None:
    """$READRUN_COMMIT, else the commit that git has checked out, else None."""
    if os.environ.get("READRUN_COMMIT"):
        return os.environ["READRUN_COMMIT"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        call = ["git", "-C", str(paths.root() or Path.cwd()), "rev-parse", "HEAD"]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def now() -> str:
    """UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
