"""Import the definitions of a chapter's notebook, never its experiment."""

from __future__ import annotations

import ast
import builtins
import importlib
import linecache
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from readrun import paths

PREFIX = "readrun.chapters."


def chapter(slug: str) -> ModuleType:
    """The module `readrun.chapters.<slug>`: a script's imports, CONSTANTS, functions and classes.

    Line numbers are those of the script, so that tracebacks, `inspect.getsource` and Triton work; worker
    processes import it by name; a script that changed is loaded anew. Raises ValueError for an unknown slug.
    """
    if slug not in paths.chapters():
        raise ValueError(f"chapter: {slug!r} is unknown; accepted: {', '.join(paths.chapters()) or '(none)'}")
    known = sys.modules.get(PREFIX + slug)
    if known is not None and vars(known).get("__readrun__") != _fingerprint(paths.notebook(slug)):
        del sys.modules[PREFIX + slug]
    return importlib.import_module(PREFIX + slug)


def _fingerprint(script: Path) -> tuple[str, str]:
    return str(script), script.read_text(encoding="utf-8")


def definitions(source: str, filename: str) -> tuple[ast.Module, dict[str, str]]:
    """What `chapter` executes of a script; for each definition that needs the experiment, what it needs."""
    from readrun.content import DEFINITIONS, MUTATORS, call_name, effects, free_names

    kept: list[ast.stmt] = []
    known = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    left_out: dict[str, str] = {}
    for node in ast.parse(source, filename).body:
        binds, changes, touches = effects(node)
        names = binds | changes
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and call_name(node.value) in MUTATORS
        ):
            names |= touches  # CONSTANT.update(...)
        simple = isinstance(node, (*DEFINITIONS, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr))
        constant = simple and bool(names) and all(n.isupper() for n in names)
        if not (constant or isinstance(node, DEFINITIONS) or _only_imports(node)):
            continue
        missing = sorted(free_names(node, deferred=False) - known - names)
        if changes - known and simple or missing:
            left_out |= dict.fromkeys(names, f"line {node.lineno} needs {', '.join(missing) or 'more'}")
        else:
            known |= names
            kept.append(node)
    return ast.Module(kept, []), left_out


def _only_imports(node: ast.stmt) -> bool:
    """A `try` or `if` made of imports and fallbacks such as `x = None`."""
    if not isinstance(node, (ast.Try, ast.If)):
        return isinstance(node, (ast.Import, ast.ImportFrom))
    parts = [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", []) for s in h.body)]
    fallback = [isinstance(s, ast.Pass) or isinstance(getattr(s, "value", None), ast.Constant) for s in parts]
    return not all(fallback) and all(f or _only_imports(s) for f, s in zip(fallback, parts, strict=True))


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        slug = fullname.removeprefix(PREFIX)
        if slug == fullname or not slug.isidentifier() or not paths.notebook(slug).is_file():
            return None
        return ModuleSpec(fullname, self, origin=str(paths.notebook(slug)))

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        file = str(module.__spec__.origin)
        linecache.checkcache(file)
        path_and_source = _fingerprint(Path(file))
        tree, left_out = definitions(path_and_source[1], file)

        def absent(name: str) -> Any:
            reason = f": {left_out[name]} of the experiment" if name in left_out else ""
            raise AttributeError(f"chapter {Path(file).stem} does not define {name!r}{reason}")

        module.__dict__.update(__file__=file, __readrun__=path_and_source, __getattr__=absent)
        exec(compile(tree, file, "exec"), module.__dict__)


def install() -> None:
    """Put the finder on `sys.meta_path`, once."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
