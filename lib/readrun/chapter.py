"""Import the definitions of a chapter's notebook, never its experiment."""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import linecache
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from readrun import paths

PREFIX = "readrun.chapters."


def chapter(slug: str) -> ModuleType:
    """The module `readrun.chapters.<slug>`: imports, UPPER_CASE constants, functions and classes of a notebook.

    Line numbers are those of the script, so that tracebacks, `inspect.getsource` and Triton work; worker processes
    can import it by name. A script that changed since is loaded again. Raises ValueError for an unknown slug.
    """
    if slug not in paths.chapters():
        raise ValueError(f"chapter: unknown slug {slug!r}; accepted: {', '.join(paths.chapters()) or '(none)'}")
    name = PREFIX + slug
    known = sys.modules.get(name)
    script = paths.notebook(slug)
    if known is not None and getattr(known, "__readrun__", None) != _fingerprint(script):
        del sys.modules[name]
    return importlib.import_module(name)


def _fingerprint(script: Path) -> tuple[str, str]:
    return str(script), hashlib.sha256(script.read_bytes()).hexdigest()


def definitions(source: str, filename: str) -> tuple[ast.Module, dict[str, str]]:
    """The part of a script that `chapter` executes, and for each constant or function left out the reason."""
    from readrun.content import MUTATORS, call_name, effects, free_names

    kept: list[ast.stmt] = []
    known = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    left_out: dict[str, str] = {}
    for node in ast.parse(source, filename).body:
        binds, changes, touches = effects(node)
        names = binds | changes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and call_name(node.value) in MUTATORS:
            names = touches
        is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        is_constant = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr))
        is_constant = is_constant and bool(names) and all(n.isupper() for n in names)
        if _only_imports(node):
            known |= names
        elif is_definition or is_constant:
            missing = sorted(free_names(node, deferred=False) - known - (binds if is_definition else set()))
            if missing:
                left_out |= dict.fromkeys(binds, f"line {node.lineno} needs {', '.join(missing)}")
                continue
            known |= names
        else:
            continue
        kept.append(node)
    return ast.Module(kept, []), left_out


def _only_imports(node: ast.stmt) -> bool:
    """An import, or a `try`/`if` made of imports and fallbacks such as `x = None`."""
    if isinstance(node, (ast.Try, ast.If)):
        parts = [*node.body, *node.orelse, *getattr(node, "finalbody", [])]
        parts += [s for h in getattr(node, "handlers", []) for s in h.body]
        plain = [isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant) for s in parts]
        rest = [s for s, is_plain in zip(parts, plain, strict=True) if not is_plain and not isinstance(s, ast.Pass)]
        return bool(rest) and all(_only_imports(s) for s in rest)
    return isinstance(node, (ast.Import, ast.ImportFrom))


class _ChapterFinder(MetaPathFinder, Loader):
    """Finds `readrun.chapters.<slug>` in the notebooks folder."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        slug = fullname.removeprefix(PREFIX)
        if slug == fullname or not slug.isidentifier() or not paths.notebook(slug).is_file():
            return None
        return ModuleSpec(fullname, self, origin=str(paths.notebook(slug)))

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None and module.__spec__.origin is not None
        script = Path(module.__spec__.origin)
        module.__file__ = str(script)
        module.__dict__["__readrun__"] = _fingerprint(script)
        linecache.checkcache(str(script))
        tree, left_out = definitions(script.read_text(encoding="utf-8"), str(script))

        def __getattr__(name: str) -> object:
            reason = f": {left_out[name]} of the experiment" if name in left_out else ""
            raise AttributeError(f"chapter {script.stem!r} does not define {name!r}{reason}")

        module.__dict__["__getattr__"] = __getattr__
        exec(compile(tree, str(script), "exec"), module.__dict__)


def install() -> None:
    """Put the finder on `sys.meta_path`, once."""
    if not any(type(f).__qualname__ == _ChapterFinder.__qualname__ for f in sys.meta_path):
        sys.meta_path.append(_ChapterFinder())
