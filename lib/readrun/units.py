"""Units: one saved result per function, arguments and reached definitions, so that killed work resumes."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import linecache
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readrun import content, paths

if TYPE_CHECKING:
    from readrun.run import Run

# what of its run a unit may read without all parameters in its key; names that hide what a function reaches
RUN_FREE = frozenset(
    "profile settings checkpoint seeds device slug folder media unit results recorded torch_setup".split()
)
DOUBTFUL = frozenset({"globals", "eval", "exec", "__import__", "importlib"})


class Unit(Mapping[str, Any]):
    """The saved result of one piece of an experiment: a mapping over what its function returned.

    `id` names it in logs and `only` patterns, `key` tells whether a saved result is its own, `arguments` are
    the call's, `done` says whether there is a result, `meta` has time, memory, device, versions, commit.
    """

    def __init__(self, fn: str, arguments: dict[str, Any], key: str, compute: Callable[[Unit], None]) -> None:
        scalars = {k: v for k, v in arguments.items() if isinstance(v, (str, int, float))}
        short = ",".join(f"{k}={v}" for k, v in scalars.items() if len(str(v)) < 40)
        self.id = re.sub(r"\s", "_", f"{fn}/{short}".rstrip("/"))
        self.fn, self.arguments, self.key, self.name = fn, arguments, key, f"{fn}-{key[:16]}"
        self.folder: Path | None = None
        self.meta: dict[str, Any] = {}
        self._compute, self._values = compute, dict[str, Any]()

    @property
    def done(self) -> bool:
        return self.folder is not None

    def ensure(self) -> Unit:
        """Compute it now if there is no result yet."""
        if not self.done:
            self._compute(self)
        return self

    def _kinds(self) -> dict[str, str]:
        if not self.done:
            raise KeyError(f"unit {self.id} has no result: `only` did not select it and none is saved")
        return self.meta["kinds"]

    def __getitem__(self, name: str) -> Any:
        kind = self._kinds()[name]
        if name not in self._values and self.folder is not None:
            self._values[name] = read_value(self.folder, name, kind)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds())

    def __len__(self) -> int:
        return len(self._kinds())

    def __repr__(self) -> str:
        return f"Unit({self.id}, {'done' if self.done else 'no result'})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unit) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def units_in(value: Any) -> list[Unit]:
    """The units among (nested) arguments."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [value] if isinstance(value, Unit) else [u for v in nested for u in units_in(v)]


def plain(value: Any, where: str) -> Any:
    """`value` as JSON data (a unit as its key). Raises TypeError naming `where` for anything else."""
    if isinstance(value, Unit):
        return {"unit": value.key}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} is neither JSON data with string keys nor a unit")


# ---------------------------------------------------------------- the key


def executed(fn: Any, slug: str) -> list[str]:
    """Sources that made `fn`'s globals: cells run in this kernel, a script's cells so far, a whole file."""
    script = content.cells(slug) if paths.notebook(slug).is_file() else []
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and fn.__globals__ is shell.user_global_ns:
        hidden = {cell.source for cell in script if not cell.computes}
        ran = [source.rstrip("\n") for source in shell.history_manager.input_hist_raw[1:]]
        if not ran:  # nbval keeps no history, but what tracebacks quote is there
            home, known = os.path.dirname(fn.__code__.co_filename), dict[str, Any](linecache.cache).items()
            ran = ["".join(e[2]).rstrip("\n") for name, e in known if os.path.dirname(name) == home and e[2:]]
        return [s for i, s in enumerate(ran) if s not in hidden and s not in ran[i + 1 :]]  # its last run
    if not (file := Path(fn.__code__.co_filename)).is_file():
        raise TypeError(f"unit: {fn.__name__} has no source file; define it in a notebook or a module")
    if file.resolve() != paths.notebook(slug).resolve():
        return [file.read_text(encoding="utf-8")]
    line, frame = sys.maxsize, inspect.currentframe()
    while frame := frame and frame.f_back:
        if frame.f_globals is fn.__globals__ and frame.f_code.co_name == "<module>":
            line = frame.f_lineno
    return [cell.source for cell in script if cell.computes and cell.first_line <= line]


@functools.lru_cache(maxsize=256)
def follow(start: str, sources: tuple[str, ...], leaves: frozenset[str]) -> tuple[dict, set[str], bool]:
    """What `start` reaches: {global name: its statements}, names of the run, whether this is in doubt.

    Leaves are parameters: their values count, not their statements.
    """
    code = [statement for source in sources for statement in content.statements(source)]
    # a notebook with `import *` or `global` hides who binds what: doubtful as a whole
    doubt = any("*" in s.binds or any(name.startswith("global ") for name in s.reads) for s in code)
    found, todo, runs = dict[str, list[ast.stmt]](), {start}, set[str]()
    while todo := todo - found.keys():
        name = todo.pop()
        last = max((i for i, s in enumerate(code) if name in s.binds), default=-1)
        reached, found[name] = code[last : last + 1] if last >= 0 else [], []
        value = reached and getattr(reached[0].node, "value", None)
        if name in leaves or isinstance(value, ast.Call) and content.call_name(value) == "start":
            runs |= {name} - leaves
            continue
        solid = last >= 0 and isinstance(code[last].node, content.DEFINITIONS)  # calls do not change it
        reached += [s for s in code[last + 1 :] if name in s.changes or (name in s.touches and not solid)]
        found[name] = [content.binding_of(s.node, name) for s in reached]
        todo |= {n for s in reached for n in s.reads}
        doubt |= name in DOUBTFUL or name == start and not reached
    return found, runs, doubt


def unit_key(fn: Callable[..., Any], arguments: dict[str, Any], run: Run) -> str:
    """Digest of all that `fn(**arguments)` can depend on. Raises TypeError for unsuitable arguments."""
    inner = inspect.unwrap(fn)
    name = getattr(inner, "__name__", "")
    if not inspect.isfunction(inner) or not name.isidentifier():
        raise TypeError(f"unit: {fn!r} is not a function with a name")
    if inner.__closure__ or inner.__globals__.get(name, fn) is not fn:  # its variables are in no source
        raise TypeError(f"unit: {name} must be defined at the top level, and be what {name} stands for there")
    call = [content.SCHEME, name, plain(arguments, f"{name}: argument")]
    values = content.key_parameters(run.slug, run.parameters)
    given = run.parameters | {k: v for k, v in inner.__globals__.items() if k in run.parameters}
    leaves = frozenset(k for k, v in given.items() if not callable(v))
    module, sources = inner.__module__, tuple[str, ...]()
    if module.startswith("readrun.") and not module.startswith("readrun.chapters."):
        found, runs, doubt = {module: ast.parse(f"import {module}").body}, set[str](), False
    else:
        sources = tuple(executed(inner, run.slug))
        found, runs, doubt = follow(name, sources, leaves)
    trees = [tree for nodes in found.values() for tree in nodes]
    nodes = [node for tree in trees for node in content.nodes(tree)]
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    of_run = [n.attr for n in attributes if getattr(n.value, "id", "") in runs]
    used: dict[str, Any] = {k: repr(given[k]) for k in leaves & found.keys() - {"only", "out", "device"}}
    seen = {"profile" if a == "settings" else a for a in (*used, *of_run)} & {"profile", "checkpoint"}
    used |= {k: values[k] for k in seen}
    if {*of_run} - RUN_FREE or sum(isinstance(n, ast.Name) and n.id in runs for n in nodes) > len(of_run):
        used |= values  # it can see all of them, perhaps because the run itself is handed on
    if "parameters" in of_run or any(n.attr == "seeds" for n in attributes):  # also of settings
        used |= {"all seeds": [run.parameters["seed"], run.parameters["seeds"]]}
    code = {n: [content.canonical(t, run.profile) for t in own] for n, own in found.items() if own}
    modules = content.modules_reached(trees)
    assets = content.assets_reached([*trees, ast.parse(repr(call))], modules, run.slug)
    whole: list[str] = []
    if doubt:  # then everything counts
        whole += [content.content_key(run.slug, run.parameters)] if paths.notebook(run.slug).is_file() else []
        whole += [inspect.getsource(inner), repr((inner.__defaults__, inner.__kwdefaults__))]
        every = [s for source in sources for s in content.statements(source)]
        whole += [content.canonical(s.node, run.profile) for s in every if not s.binds or s.binds - leaves]
    return content.digest([call, code, modules, assets, used, whole])


# ---------------------------------------------------------------- files


def _kind(value: Any) -> str:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy and isinstance(value, numpy.ndarray):
        return "array"
    if torch and isinstance(value, dict) and value and all(map(torch.is_tensor, value.values())):
        return "state"
    return "tensor" if torch and torch.is_tensor(value) else "json"


def write_values(folder: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """Write a unit's result into `folder`: JSON, arrays as npz, tensors as safetensors.

    Returns {name: json | array | tensor | state}. Raises TypeError for anything else.
    """
    kinds = {name: _kind(value) for name, value in result.items()}
    data = {name: plain(result[name], f"result[{name!r}]") for name, kind in kinds.items() if kind == "json"}
    (folder / "result.json").write_text(json.dumps(data), encoding="utf-8")
    arrays = {f"{name}.": result[name] for name, kind in kinds.items() if kind == "array"}
    if any(array.dtype.hasobject for array in arrays.values()):
        raise TypeError(f"result: an array of Python objects among {', '.join(arrays)}")
    if arrays:
        sys.modules["numpy"].savez_compressed(folder / "arrays.npz", **arrays)
    for name in [name for name, kind in kinds.items() if kind in ("tensor", "state")]:
        from safetensors.torch import save

        tensors = result[name] if kinds[name] == "state" else {"": result[name]}
        # copies: safetensors refuses tensors that share memory, such as tied weights
        copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
        (folder / f"{name}.safetensors").write_bytes(save(copies, {"order": json.dumps(list(copies))}))
    return kinds


def read_value(folder: Path, name: str, kind: str) -> Any:
    """One value of a saved result; tensors come to the CPU."""
    if kind == "json":
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))[name]
    if kind == "array":
        import numpy as np

        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            return arrays[f"{name}."]
    from safetensors import safe_open

    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in json.loads(file.metadata()["order"])}
    return tensors if kind == "state" else tensors[""]


def read_meta(folder: Path, key: str = "") -> dict[str, Any]:
    """meta.json of a unit's folder, after checking all its files. Raises ValueError if one is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        wrong = [name for name, sha256 in meta["files"].items() if paths.file_sha256(folder / name) != sha256]
        if wrong or meta["key"] != (key or meta["key"]):
            raise ValueError(f"{wrong[0]} differs from its checksum" if wrong else "it has another key")
        return meta
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"unit folder {folder} is damaged ({error!r})") from error


def find(stores: list[Path], name: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The first sound copy of a unit; damaged ones are put aside where that is allowed, with a warning."""
    for folder in [store / name for store in stores if (store / name).exists()]:
        try:
            return folder, read_meta(folder, key)
        except ValueError as error:
            warnings.warn(f"{error}: it is kept aside and not used", RuntimeWarning, stacklevel=3)
            with contextlib.suppress(OSError):  # a read-only folder, or another process was faster
                folder.rename(folder.with_name(f".damaged-{name}-{uuid.uuid4().hex[:8]}"))
    return None


def publish(store: Path, name: str, key: str, fill: Callable[[Path], object]) -> None:
    """Let `fill` make a temporary folder and rename it to store/name; a sound one already there stays.

    Raises OSError naming the unit (full disk, no permission); nothing half-written is left then.
    """
    temporary = store / f".tmp-{uuid.uuid4().hex[:12]}"
    try:
        store.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        if find([store], name, key) is None:
            try:
                temporary.rename(store / name)
            except OSError:  # another process was faster, or the disk fails
                if find([store], name, key) is None:
                    raise
    except OSError as error:
        why = f"unit {name} could not be saved in {store}: {error.strerror or error}"
        raise OSError(error.errno, f"{why}; nothing half-written is left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def bring(source: Path, store: Path) -> None:
    """Copy the sound units found anywhere below `source` into `store`; what is sound there already stays."""
    for folder in sorted(file.parent for file in source.rglob("[!.]*/meta.json")):
        try:
            key = read_meta(folder)["key"]
        except ValueError as error:
            warnings.warn(f"{error}: it is not brought in", RuntimeWarning, stacklevel=2)
        else:
            publish(store, folder.name, key, functools.partial(shutil.copytree, folder))


# ---------------------------------------------------------------- computing


@contextlib.contextmanager
def seeded(value: Any, device: str) -> Iterator[None]:
    """Random streams of python, numpy, torch that depend on `value` alone; then the caller's are back."""
    import numpy as np

    number = int(content.digest(value)[:8], 16)
    python, legacy, torch = random.getstate(), np.random.get_state(), sys.modules.get("torch")
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, legacy)
        if torch:
            gpus = range(torch.cuda.device_count() if device == "cuda" else 0)
            stack.enter_context(torch.random.fork_rng(gpus))
            torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        yield


@contextlib.contextmanager
def measured(meta: dict[str, Any], device: str) -> Iterator[None]:
    """Fill `meta` with seconds, peak_ram_gib (of this process) and peak_gpu_gib (None on the CPU)."""
    cuda: Any = sys.modules["torch"].cuda if device == "cuda" and "torch" in sys.modules else None
    if cuda:
        cuda.init()  # nothing has used the GPU yet: its statistics do not exist
    gpus = range(cuda.device_count() if cuda else 0)
    for gpu in gpus:
        cuda.reset_peak_memory_stats(gpu)
    with contextlib.suppress(OSError):  # Linux: the peak starts anew
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    yield
    for gpu in gpus:
        cuda.synchronize(gpu)
    meta["seconds"] = round(time.perf_counter() - start, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, of the process's whole life
    if (status := Path("/proc/self/status")).exists():
        peak = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    meta["peak_ram_gib"] = round(peak / 2**30, 3)
    meta["peak_gpu_gib"] = round(sum(map(cuda.max_memory_allocated, gpus)) / 2**30, 3) if cuda else None


def provenance(device: str) -> dict[str, Any]:
    """Where, when and with what something is computed: {device, versions, commit, recorded}."""
    names = "numpy scipy sklearn torch torchvision transformers diffusers accelerate peft timm triton".split()
    loaded = {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in names}
    versions = {"python": platform.python_version()} | {name: text for name, text in loaded.items() if text}
    where = platform.processor() or platform.machine()
    if device == "cuda":
        where = sys.modules["torch"].cuda.get_device_name()
    elif (cpus := Path("/proc/cpuinfo")).exists() and "model name" in (text := cpus.read_text()):
        where = text.split("model name")[1].split("\n")[0].strip("\t :")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": where, "versions": versions, "commit": commit(), "recorded": now}


@functools.lru_cache(maxsize=1)
def commit() -> str | None:
    """$READRUN_COMMIT, else the commit that git has checked out, else None."""
    if named := os.environ.get("READRUN_COMMIT"):
        return named
    call = ["git", "-C", str(paths.root()), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
