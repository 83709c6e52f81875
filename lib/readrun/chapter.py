"""Import the definitions of a chapter's notebook, never its experiment."""

from __future__ import annotations

import ast
import codeop
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


def _defined(node: ast.stmt) -> frozenset[str]:
    """Names that a statement of a script defines for `chapter`; empty: it belongs to the experiment."""
    from readrun.content import DEFINITIONS, effects

    binds, changes, touches = effects(node)
    if isinstance(node, DEFINITIONS) or _only_imports(node):
        return binds | changes
    names = binds | changes | (touches if isinstance(node, ast.Expr) else set())  # CONSTANT.update(...)
    simple = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr))
    return names if simple and all(name.isupper() for name in names) else frozenset()


def _only_imports(node: ast.stmt) -> bool:
    """A `try` or `if` made of imports and fallbacks such as `x = None`."""
    if not isinstance(node, (ast.Try, ast.If)):
        return isinstance(node, (ast.Import, ast.ImportFrom))
    parts = [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", []) for s in h.body)]
    fallback = [isinstance(s, ast.Pass) or isinstance(getattr(s, "value", None), ast.Constant) for s in parts]
    return not all(fallback) and all(f or _only_imports(s) for f, s in zip(fallback, parts, strict=True))


class Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        slug = fullname.removeprefix(PREFIX)
        if slug == fullname or not slug.isidentifier() or not paths.notebook(slug).is_file():
            return None
        return ModuleSpec(fullname, self, origin=str(paths.notebook(slug)))

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        file = str(module.__spec__.origin)
        linecache.checkcache(file)
        path_and_source, compiled = _fingerprint(Path(file)), codeop.Compile()  # it keeps `from __future__`
        left_out: dict[str, str] = {}

        def absent(name: str) -> Any:
            reason = f": {left_out[name]} of the experiment" if name in left_out else ""
            raise AttributeError(f"chapter {Path(file).stem} does not define {name!r}{reason}")

        module.__dict__.update(__file__=file, __readrun__=path_and_source, __getattr__=absent)
        for node in ast.parse(path_and_source[1], file).body:
            if names := _defined(node):
                try:
                    exec(compiled(ast.Module([node], []), file, "exec"), module.__dict__)  # type: ignore[arg-type]
                except NameError as error:
                    left_out |= dict.fromkeys(names, f"line {node.lineno} needs {error.name}")
