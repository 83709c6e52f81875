"""What a chapter's results depend on: cells, names followed through them, content keys.

Keys must agree between papermill, nbval, JupyterLab, a script and Python 3.11 to 3.13. So nothing here uses
`ast.dump` or `symtable`, which differ between versions, and nothing is imported to find out what it contains.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from readrun import paths

PROFILES = ("smoke", "cpu", "gpu")
PRESENTATION = frozenset(
    "plots picker media tables publish execute records claims stats __main__ kernel new".split()
)
CORE = frozenset("__init__ paths run units content chapter chapters".split())
SCHEME = 1  # raise it when a change in a CORE module alters what a unit computes: CORE sources are in no key
NOT_IN_KEY = frozenset({"seed", "seeds", "only", "out", "device"})
# what `run.<attribute>` inside a unit function may read without entering the unit's key
RUN_FREE = NOT_IN_KEY | {"folder", "media", "unit", "results", "recorded", "slug", "torch_setup"}
DOUBTFUL = frozenset({"globals", "eval", "exec", "__import__", "importlib"})
MUTATORS = frozenset(
    "append extend insert update pop popitem setdefault clear remove sort reverse add discard"
    " load_state_dict register register_buffer".split()
)
HARMLESS = frozenset({"print", "display", "len", "repr", "show"})
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Cell:
    """One notebook cell; `first_line` is the line of its first source line in the script, from 1."""

    source: str
    tags: tuple[str, ...]
    kind: str  # code | markdown | raw
    first_line: int

    @property
    def presentation(self) -> bool:
        """Figure and widget cells draw; nothing that is computed depends on them."""
        return "figure" in self.tags or "widget" in self.tags


def cells(slug: str) -> list[Cell]:
    """The cells of a chapter's py:percent script, as jupytext reads them (jupytext needs 2 s to import)."""
    return list(split_percent(paths.notebook(slug).read_text(encoding="utf-8")))


@lru_cache(maxsize=64)
def split_percent(text: str) -> tuple[Cell, ...]:
    """Split a py:percent script. Each cell starts with `# %% title [kind] tags=[...]`."""
    lines = text.split("\n")
    start = lines.index("# ---", 1) + 1 if lines[0] == "# ---" and "# ---" in lines[1:] else 0
    marks = [i for i in range(start, len(lines)) if re.match(r"# %%(\s|$)", lines[i])]
    found = []
    if any(line.strip() for line in lines[start : marks[0] if marks else len(lines)]):
        marks.insert(0, start - 1)  # code before the first marker is a cell too
    for mark, end in zip(marks, [*marks[1:], len(lines)], strict=True):
        head = lines[mark] if mark >= start else ""
        body, first = lines[mark + 1 : end], mark + 2
        while body and not body[-1].strip():
            body.pop()
        while body and not body[0].strip():
            body, first = body[1:], first + 1
        kind = re.search(r"\[(markdown|md|raw)\]", head)
        tags = re.search(r'"?tags"?\s*[=:]\s*(\[[^\]]*\])', head)
        if kind and body and body[0] in ('"""', "'''") and body[-1] == body[0]:
            body, first = body[1:-1], first + 1
        elif kind:
            body = [re.sub(r"^# ?", "", line) for line in body]
        else:
            body = [re.sub(r"^# ([%!]\S)", r"\1", line) for line in body]
        name = {"md": "markdown"}.get(kind[1], kind[1]) if kind else "code"
        found.append(Cell("\n".join(body), tuple(json.loads(tags[1])) if tags else (), name, first))
    return tuple(found)


# ---------------------------------------------------------------- syntax trees


def parse(source: str, where: str = "<cell>") -> list[ast.stmt]:
    """Top-level statements of a cell; IPython magics become string constants. Raises SyntaxError."""
    if source.startswith("%%"):
        head, _, rest = source.partition("\n")
        # an empty first line instead of the magic keeps the line numbers
        source = f"\n{rest}" if head[2:].split(" ")[0] in ("time", "timeit", "capture", "prun") else repr(source)
    try:
        return ast.parse(source, where).body
    except SyntaxError:
        plain = re.sub(r"(?m)^([ \t]*)([%!?].*|.*\?)$", lambda m: m[1] + repr(m[2]), source)
        return ast.parse(plain, where).body


def canonical(node: Any, profile: str = "") -> str:
    """Text of a tree without positions, docstrings and empty fields: equal for equal code on any Python.

    With a `profile`, `run.settings(smoke=…, cpu=…, gpu=…)` keeps that profile's part only.
    """
    if isinstance(node, list):
        return "[" + ",".join([canonical(n, profile) for n in node]) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name in node._fields:
        value = getattr(node, name, None)
        if value is None or value == [] or name in ("ctx", "kind", "type_comment", "type_ignores"):
            continue
        if name == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            value = value[1:] if _is_text(value[0]) else value
        elif name == "values" and isinstance(node, ast.JoinedStr):
            value = _merged(value)
        elif name == "keywords" and profile and getattr(getattr(node, "func", None), "attr", "") == "settings":
            value = [k for k in value if k.arg not in PROFILES or k.arg == profile]
        parts.append(f"{name}={canonical(value, profile)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _merged(parts: list[ast.expr]) -> list[ast.expr]:
    """Constants of an f-string joined: Python 3.12 splits them differently."""
    merged: list[ast.expr] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            merged[-1] = ast.Constant(str(last.value) + str(part.value))
        elif not (isinstance(part, ast.Constant) and part.value == ""):
            merged.append(part)
    return merged


@lru_cache(maxsize=4096)
def _scope(nodes: tuple[ast.AST, ...], deferred: bool) -> tuple[frozenset[str], frozenset[str]]:
    """Names that a scope reads from outside and names that it binds. `global x` reads as "global x"."""
    reads: set[str] = set()
    binds: set[str] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Name):
            (reads if isinstance(node.ctx, ast.Load) else binds).add(node.id)
        elif isinstance(node, (*FUNCTIONS, ast.Lambda, ast.ClassDef, *COMPREHENSIONS)):
            if isinstance(node, (*FUNCTIONS, ast.Lambda)):  # decorators and defaults belong to the outer scope
                todo += [*getattr(node, "decorator_list", []), *node.args.defaults]
                todo += [d for d in node.args.kw_defaults if d]
                body = node.body if isinstance(node.body, list) else [node.body]
                children = [node.args, *body] if deferred else []
            inner, own = _scope(tuple(children), deferred)
            # methods do not see what a class body binds
            reads |= inner if isinstance(node, ast.ClassDef) else inner - own
            binds |= {node.name} if hasattr(node, "name") else set()
        else:
            if isinstance(node, ast.alias):
                binds.add(node.asname or node.name.split(".")[0])
            elif isinstance(node, ast.Global):
                reads |= {f"global {name}" for name in node.names} | set(node.names)
            elif isinstance(node, ast.arg):
                binds.add(node.arg)
            elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
                binds.add(node.name)
            todo += children
    return frozenset(reads), frozenset(binds)


def free_names(node: ast.AST, deferred: bool = True) -> frozenset[str]:
    """Global names that a top-level statement reads; without `deferred`, only those needed to execute it."""
    return _scope((node,), deferred)[0]


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement that run in its own scope."""
    yield node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return
    for name, value in ast.iter_fields(node):
        if not (isinstance(node, ast.comprehension) and name == "target"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _own(child)


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def call_name(call: ast.Call) -> str:
    """`f` of f(...) and of a.b.f(...)."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def effects(node: ast.stmt) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Names that a top-level statement binds anew, changes, or perhaps changes (a call on or with them)."""
    reads, binds = _scope((node,), False)
    if isinstance(node, DEFINITIONS):
        return binds, frozenset(), frozenset()
    fresh = binds - reads if isinstance(node, (ast.Assign, ast.AnnAssign)) else frozenset()
    changed, touched = set(binds - fresh), set()
    for part in _own(node):
        call = part.value if isinstance(part, ast.Expr) else part
        if isinstance(part, (ast.Attribute, ast.Subscript)) and not isinstance(part.ctx, ast.Load):
            changed.add(_root(part))
        elif isinstance(call, ast.Call):
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if method.startswith("set_"):
                changed.add(_root(call.func))
            elif method in MUTATORS or (method.endswith("_") and method[-2:] != "__"):
                touched.add(_root(call.func))
            if call is not part and _root(call.func) not in HARMLESS:
                touched |= {_root(call.func), *[a.id for a in call.args if isinstance(a, ast.Name)]}
    return fresh, frozenset(changed - {""}), frozenset(touched - {""})


@dataclass(frozen=True)
class Statement:
    """A top-level statement with what it binds, changes, perhaps changes and reads."""

    node: ast.stmt
    binds: frozenset[str]
    changes: frozenset[str]
    touches: frozenset[str]
    reads: frozenset[str]


@lru_cache(maxsize=1024)
def statements(source: str, where: str = "<cell>") -> tuple[Statement, ...]:
    """The analysed top-level statements of a cell."""
    return tuple(Statement(node, *effects(node), free_names(node)) for node in parse(source, where))


# ---------------------------------------------------------------- readrun modules, assets, parameters


@lru_cache(maxsize=128)
def _module(path: Path, stamp: int) -> tuple[ast.Module, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return tree, digest(canonical(tree))


def _tree(module: str) -> ast.Module:
    path = paths.library() / f"{module}.py"
    return _module(path, path.stat().st_mtime_ns)[0]


def digest(value: Any) -> str:
    """SHA-256 of a text or of JSON data."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=4096)
def modules_in(tree: ast.AST) -> frozenset[str]:
    """The `readrun` modules that a tree imports or names as `readrun.x`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("readrun.")}
        elif isinstance(node, ast.ImportFrom):
            module = "readrun." + (node.module or "") if node.level else node.module or ""
            package, _, rest = module.partition(".")
            if package == "readrun":
                names |= {rest.split(".")[0]} if rest else {a.name for a in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "readrun":
            names.add(node.attr)
    return frozenset(n for n in names if (paths.library() / f"{n}.py").is_file())


def modules_reached(names: Iterable[str]) -> dict[str, str]:
    """Digest of each module reached from `names`, directly or through another; CORE and PRESENTATION left out."""
    found: dict[str, str] = {}
    todo = set(names) - CORE - PRESENTATION
    while todo:
        path = paths.library() / f"{(name := todo.pop())}.py"
        tree, found[name] = _module(path, path.stat().st_mtime_ns)
        todo |= modules_in(tree) - CORE - PRESENTATION - found.keys()
    return dict(sorted(found.items()))


def assets_digest(name: str) -> str:
    """Digest of the file or folder data/assets/`name`; manifests do not count."""
    top = paths.assets(name)
    return digest({p.relative_to(top).as_posix(): paths.file_sha256(p) for p in paths.asset_files(top)})


@lru_cache(maxsize=8192)
def _asset_names(tree: ast.AST) -> frozenset[str]:
    """String literals that may be names of assets, and "" where `asset(...)` gets something else."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value.strip("/")} if re.fullmatch(r"\w+/[\w./-]+", node.value[:200]) else set()
        elif isinstance(node, ast.Call) and call_name(node) in ("asset", "assets"):
            names |= set() if node.args and isinstance(node.args[0], ast.Constant) else {""}
    return frozenset(names)


def assets_reached(trees: Iterable[ast.AST], modules: Iterable[str], slug: str) -> dict[str, str]:
    """Digests of the assets named in `trees` and `modules`; of all of the chapter's where a name is computed."""
    names = {name or slug for tree in [*trees, *map(_tree, modules)] for name in _asset_names(tree)}
    return {n: assets_digest(n) for n in sorted(names) if ".." not in n and paths.assets(n).exists()}


def default_parameters(slug: str) -> dict[str, Any]:
    """The values that the cell tagged `parameters` gives."""
    found: dict[str, Any] = {}
    for cell in cells(slug) if paths.notebook(slug).is_file() else []:
        for node in parse(cell.source) if "parameters" in cell.tags else []:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def key_parameters(slug: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameters that a chapter's results depend on: profile, checkpoint and its own, defaults filled in."""
    defaults = default_parameters(slug)
    merged = defaults | {k: v for k, v in (given or {}).items() if not defaults or k in defaults}
    merged["profile"] = merged.get("profile") or os.environ.get("READRUN_PROFILE") or "cpu"
    merged["checkpoint"] = checkpoint_digest(merged.get("checkpoint") or "")
    return {k: v for k, v in sorted(merged.items()) if k not in NOT_IN_KEY}


def checkpoint_digest(checkpoint: str) -> str:
    """A hub id as it is; a folder with the names, sizes and time stamps of its files (it may hold gigabytes)."""
    path = Path(checkpoint).expanduser()
    if not checkpoint or not path.exists():
        return checkpoint
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])


# ---------------------------------------------------------------- keys


def content_key(slug: str, parameters: Mapping[str, Any] | None = None) -> str:
    """Digest of all that a chapter's results can depend on. Raises SyntaxError if a cell does not parse."""
    values = key_parameters(slug, parameters)
    code = [c for c in cells(slug) if c.kind == "code" and not c.presentation and "parameters" not in c.tags]
    trees = [node for c in code for node in parse(c.source, f"{slug}.py cell at line {c.first_line}")]
    modules = modules_reached(name for tree in trees for name in modules_in(tree))
    assets = assets_reached(trees, modules, slug) | {slug: assets_digest(slug)}
    return digest([SCHEME, canonical(trees, values["profile"]), modules, assets, values])


def render_key(slug: str, parameters: Mapping[str, Any] | None = None) -> str:
    """Digest of what else a chapter's page shows: exact sources, presentation modules, claims, record."""
    code = [c.source for c in cells(slug) if c.kind == "code"]
    names = {"records", "claims", "stats"}
    for source in code:
        names |= {m for node in parse(source) for m in modules_in(node)}
    todo, seen = set(names & PRESENTATION), set()
    while todo:
        seen.add(name := todo.pop())
        todo |= (modules_in(_tree(name)) & PRESENTATION) - seen  if (paths.library() / f"{name}.py").is_file() else set()
    files = [paths.library() / f"{n}.py" for n in sorted(seen)]
    files += [paths.papers(slug), paths.results(slug), paths.results(slug, "npz")]
    return digest([code, [[p.name, paths.file_sha256(p)] for p in files if p.is_file()], dict(parameters or {})])
