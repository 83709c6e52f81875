"""What a chapter's results depend on: its cells, the names that code reaches, content keys.

Keys must agree between papermill, nbval, JupyterLab, a script, and Python 3.11 to 3.13. So nothing here uses
`ast.dump` or `symtable`, which differ between versions, and nothing is imported to see what it contains.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from readrun import paths

SCHEME = 2  # raise it when a change in a CORE module alters what a unit computes: no key has their source
CORE = frozenset("__init__ paths run units content chapter".split())
# what a page shows and no result depends on; PRESENTATION has the commands' own modules besides
DRAWING = frozenset("plots picker media tables records grading claims stats".split())
PRESENTATION = DRAWING | {"publish", "execute", "__main__", "kernel", "new"}
PROFILES = ("smoke", "cpu", "gpu")
NOT_IN_KEY = frozenset({"seed", "seeds", "only", "out", "device"})
MUTATORS = frozenset(  # methods that change their object; so do those that end with an underscore
    "append extend insert update pop popitem setdefault clear remove sort reverse add discard"
    " load_state_dict register register_buffer".split()
)
HARMLESS = frozenset({"print", "display", "len", "repr", "show"})
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Cell:
    """A notebook cell; `kind` is code, markdown or raw, `first_line` (from 1) its place in the script."""

    source: str
    tags: tuple[str, ...]
    kind: str
    first_line: int

    @property
    def computes(self) -> bool:
        """Code on which results can depend: figures, widgets and parameters' default values are not."""
        return self.kind == "code" and not {"figure", "widget", "parameters"} & set(self.tags)


def cells(slug: str) -> list[Cell]:
    """The cells of a chapter's script as jupytext reads them (which takes 2 s to import, this does not)."""
    return list(split_percent(paths.notebook(slug).read_text(encoding="utf-8")))


@lru_cache(maxsize=64)
def split_percent(text: str) -> tuple[Cell, ...]:
    """The cells of a py:percent script; each starts with `# %% title [kind] tags=[...]`."""
    lines, found = text.split("\n"), []
    start = lines.index("# ---", 1) + 1 if lines[0] == "# ---" and "# ---" in lines[1:] else 0
    marks = [i for i in range(start, len(lines)) if re.match(r"# %%(\s|$)", lines[i])]
    for mark, end in pairwise([start - 1, *marks, len(lines)]):
        head = lines[mark] if mark >= start else ""
        full = [i for i in range(mark + 1, end) if lines[i].strip()]
        first, last = (full[0], full[-1] + 1) if full else (mark + 1, mark + 1)
        if not head and not full:  # code before the first marker is a cell too
            continue
        kind = re.search(r"\[(markdown|md|raw)\]", head)
        tags = re.search(r'\btags"?\s*[=:]\s*(\[[^\]]*\])', head)
        pattern = r"^# ?()" if kind else r"^# ([%!]\S)"  # text and magics stand in comments
        source = "\n".join(re.sub(pattern, r"\1", line) for line in lines[first:last])
        name = {"md": "markdown"}.get(kind[1], kind[1]) if kind else "code"
        found.append(Cell(source, tuple(json.loads(tags[1])) if tags else (), name, first + 1))
    return tuple(found)


# ---------------------------------------------------------------- syntax trees


@lru_cache(maxsize=8192)
def parse(source: str) -> list[ast.stmt]:
    """Top-level statements of a cell, not to be changed; magics become strings. Raises SyntaxError."""
    if source.startswith("%%"):
        head, _, rest = source.partition("\n")
        source = rest if re.match(r"%%(time|timeit|capture|prun)\b", head) else repr(source)
    try:
        return ast.parse(source).body
    except SyntaxError:
        return ast.parse(re.sub(r"(?m)^([ \t]*)([%!?].*|.*\?)$", lambda m: m[1] + repr(m[2]), source)).body


def canonical(node: Any, profile: str = "") -> str:
    """Text of a tree without positions, docstrings, empty fields: the same for the same code on any Python.

    With a `profile`, only its part of `run.settings(smoke=…, cpu=…, gpu=…)` counts.
    """
    if isinstance(node, list):
        return f"[{','.join([canonical(n, profile) for n in node])}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(node, ast.JoinedStr):  # Python 3.12 ends format specifications with an empty text
            value = [v for v in node.values if getattr(v, "value", None) != ""]
        if value is None or value == [] or name in ("ctx", "kind", "type_comment", "type_ignores"):
            continue
        if name == "body" and isinstance(node, (*DEFINITIONS, ast.Module)) and is_text(value[0]):
            value = value[1:]
        elif name == "keywords" and profile and isinstance(node, ast.Call) and call_name(node) == "settings":
            value = [k for k in value if k.arg not in PROFILES or k.arg == profile]
        parts.append(f"{name}={canonical(value, profile)}")
    return f"{type(node).__name__}({','.join(parts)})"


def is_text(node: ast.stmt) -> bool:
    """Nothing but a string: a docstring, or a magic."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def call_name(call: ast.Call) -> str:
    """`f` of f(...) and of a.b.f(...)."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


@lru_cache(maxsize=8192)
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree."""
    return tuple(ast.walk(tree))


@lru_cache(maxsize=8192)
def scope(*todo: ast.AST) -> tuple[frozenset[str], frozenset[str]]:
    """Names that a scope reads from outside, and that it binds; `global x` also reads "global x"."""
    reads, binds, stack = set[str](), set[str](), list(todo)
    while stack:
        node = stack.pop()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Name):
            (reads if isinstance(node.ctx, ast.Load) else binds).add(node.id)
        elif isinstance(node, ast.Global):
            reads |= {*node.names, *(f"global {name}" for name in node.names)}
        elif isinstance(node, SCOPES):
            if isinstance(node, FUNCTIONS):  # decorators and defaults belong to the outer scope
                outer = [*getattr(node, "decorator_list", []), *node.args.defaults, *node.args.kw_defaults]
                stack += [n for n in outer if n]
                children = [node.args, *(node.body if isinstance(node.body, list) else [node.body])]
            inner, own = scope(*children)
            reads |= inner if isinstance(node, ast.ClassDef) else inner - own  # methods see no class names
            reads |= {name for name in own if f"global {name}" in inner}
            binds |= {node.name} if hasattr(node, "name") else set()
            continue
        elif isinstance(node, ast.alias):
            binds.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, ast.arg):
            binds.add(node.arg)
        else:  # except … as name, case … as name, case {**rest}
            binds |= {str(n) for n in (getattr(node, "name", 0), getattr(node, "rest", 0)) if n}
        stack += children
    return frozenset(reads), frozenset(binds)


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def effects(node: ast.stmt) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Names that a top-level statement binds anew, changes, perhaps changes (by a call on or with them)."""
    reads, binds = scope(node)
    if isinstance(node, DEFINITIONS):
        return binds, frozenset(), frozenset()
    fresh = binds - reads if isinstance(node, (ast.Assign, ast.AnnAssign)) else frozenset()
    changed, touched = set(binds - fresh), set[str]()
    for part in nodes(node):
        if isinstance(part, (ast.Attribute, ast.Subscript)) and not isinstance(part.ctx, ast.Load):
            changed.add(_root(part))
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            name = part.func.attr  # torch.set_default_dtype(...) counts, torch.manual_seed(...) does not
            if name.startswith("set_"):
                changed.add(_root(part.func))
            elif name in MUTATORS or re.fullmatch(r".*[^_]_", name):
                touched.add(_root(part.func))
        elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            if _root(part.value.func) not in HARMLESS:
                touched |= {_root(a) for a in (part.value.func, *part.value.args)}
    return fresh, frozenset(changed - {""}), frozenset(touched - {""})


def binding_of(node: ast.stmt, name: str) -> ast.stmt:
    """An import without its other names; any other statement as it is."""
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return node
    names = [a for a in node.names if name == (a.asname or a.name.split(".")[0])]
    if isinstance(node, ast.Import):
        return ast.Import(names)
    return ast.ImportFrom(node.module, names, node.level)


@dataclass(frozen=True)
class Statement:
    """A top-level statement with the names that it binds, changes, perhaps changes, and reads."""

    node: ast.stmt
    binds: frozenset[str]
    changes: frozenset[str]
    touches: frozenset[str]
    reads: frozenset[str]


@lru_cache(maxsize=1024)
def statements(source: str) -> tuple[Statement, ...]:
    """The top-level statements of a cell; none if it does not parse (then it never ran)."""
    try:
        return tuple(Statement(node, *effects(node), scope(node)[0]) for node in parse(source))
    except SyntaxError:
        return ()


# ---------------------------------------------------------------- modules, assets, parameters


def digest(value: Any) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def module(name: str) -> tuple[ast.Module, str]:
    """Tree and digest of a `readrun` module; comments and docstrings do not count."""
    path = paths.library() / f"{name}.py"
    return _module(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=128)
def _module(path: Path, stamp: int) -> tuple[ast.Module, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return tree, digest(canonical(tree))


@lru_cache(maxsize=8192)
def modules_in(tree: ast.AST) -> frozenset[str]:
    """The `readrun` modules that a tree imports or names as `readrun.x`."""
    names: list[str] = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
            if any(a.name == "readrun" and a.asname for a in node.names):  # x.rl is not followed: all count
                names += [f"readrun.{path.stem}" for path in paths.library().glob("*.py")]
        elif isinstance(node, ast.ImportFrom):
            package = f"readrun.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            names += [f"{package}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.append(f"{node.value.id}.{node.attr}")
    parts = {name.split(".")[1] for name in names if name.startswith("readrun.")}
    return frozenset(n for n in parts if (paths.library() / f"{n}.py").is_file())


def modules_reached(trees: Iterable[ast.AST]) -> dict[str, str]:
    """Digest of each `readrun` module that `trees` use, not CORE or PRESENTATION ones, also indirectly."""
    found: dict[str, str] = {}
    todo = {m for tree in trees for m in modules_in(tree)}
    while todo := todo - CORE - PRESENTATION - found.keys():
        name = todo.pop()
        tree, found[name] = module(name)
        todo |= modules_in(tree)
    return dict(sorted(found.items()))


@lru_cache(maxsize=8192)
def _asset_names(tree: ast.AST) -> frozenset[str]:
    """String literals that may name assets; "" where `asset(...)` gets something else."""
    names: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(r"\w+(/[\w-][\w.-]*)+", node.value[:200]) else set()
        elif isinstance(node, ast.Call) and call_name(node) in ("asset", "assets"):
            first = node.args[0] if node.args else None
            names.add(str(first.value) if isinstance(first, ast.Constant) else "")
    return frozenset(names)


def assets_reached(trees: Iterable[ast.AST], modules: Iterable[str], slug: str) -> dict[str, str]:
    """Digest of each asset that `trees` or `modules` name; if a name is computed, of all that it may mean."""
    named = {name for tree in [*trees, *(module(m)[0] for m in modules)] for name in _asset_names(tree)}
    named |= {slug, "shared"} if "" in named else set()
    return {name: assets_digest(name) for name in sorted(named - {""}) if paths.assets(name).exists()}


def assets_digest(name: str) -> str:
    """Digest of the file or folder data/assets/`name`."""
    files = paths.asset_files(paths.assets(name))
    return digest([[p.relative_to(paths.data()).as_posix(), paths.file_sha256(p)] for p in files])


def default_parameters(slug: str) -> dict[str, Any]:
    """The values in a chapter's cell with the tag `parameters`."""
    script = cells(slug) if paths.notebook(slug).is_file() else []
    found = [node for cell in script if "parameters" in cell.tags for node in parse(cell.source)]
    return {_root(n.targets[0]): ast.literal_eval(n.value) for n in found if isinstance(n, ast.Assign)}


def key_parameters(slug: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameters on which a chapter's results depend: profile, checkpoint, its own; with defaults."""
    values = default_parameters(slug)
    known = (*values, "profile", "checkpoint") if values else given or ()
    values |= {k: v for k, v in (given or {}).items() if k in known}
    values["profile"] = values.get("profile") or os.environ.get("READRUN_PROFILE") or "cpu"
    local = Path(values.setdefault("checkpoint", "")).expanduser()
    if values["checkpoint"] and local.exists():  # gigabytes perhaps: names, sizes, time stamps stand for it
        files = sorted(p for p in [local, *local.rglob("*")] if p.is_file())
        values["checkpoint"] = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return {k: v for k, v in values.items() if k not in NOT_IN_KEY}


# ---------------------------------------------------------------- keys


def content_key(slug: str, parameters: Mapping[str, Any] | None = None) -> str:
    """Digest of all that a chapter's results can depend on. SyntaxError has the line in the script."""
    values, trees = key_parameters(slug, parameters), []
    for cell in cells(slug):
        try:
            trees += parse(cell.source) if cell.computes else []
        except SyntaxError as error:
            error.filename, error.lineno = f"{slug}.py", (error.lineno or 1) + cell.first_line - 1
            raise
    modules = modules_reached(trees)
    assets = assets_reached(trees, modules, slug) | {slug: assets_digest(slug)}
    return digest([SCHEME, canonical(trees, values["profile"]), modules, assets, values])


def render_key(slug: str) -> str:
    """Digest of what a chapter's page shows besides: exact sources, what draws, claims, record."""
    code = [cell.source for cell in cells(slug) if cell.kind == "code"]
    files = [paths.papers(slug), paths.results(slug), paths.results(slug, "npz")]
    files += [paths.library() / f"{name}.py" for name in sorted(DRAWING)]
    files += sorted(paths.library().glob("template/*.html"))
    shown = [[path.name, paths.file_sha256(path)] for path in files if path.is_file()]
    return digest([code, shown])
