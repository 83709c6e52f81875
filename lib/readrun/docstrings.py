"""Docstrings of installed packages and what they point to, read by AST: nothing is imported.

from readrun import docstrings
docstrings.of("networkx")                      # all documented objects
docstrings.bibliography(text)                  # (text without its reference list, {label: reference})
docstrings.Names({"networkx": [...]}).resolve("nx.norm", "networkx")
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TESTS = re.compile(r"tests?|testing|test_.*|.*_tests?|conftest|benchmarks?")
MARK = re.compile(
    r"(?P<bib>(?<!\.\. )\[(?P<label>[\w.+-]+)\]_)"
    r"|:(?:[\w+]+:)?(?:func|class|meth|obj|attr|mod|exc|data):`(?P<role>[^`\n]+)`"
    r"|\[`(?P<hub>~?[\w.]+)`\]"
    r"|(?<![`\w:\[])`(?P<tick>[A-Za-z_][\w.]*)(?:\(\))?`(?![`_\w\]])"
)
ENTRY = re.compile(
    r"^[ \t]*\.\. \[(?P<label>[\w.+-]+)\](?P<text>.*(?:\n(?![ \t]*\.\. \[)[ \t]+\S.*)*)\n?", re.M
)
HEADING = re.compile(r"^[ \t]*References?[ \t]*\n[ \t]*[-=~^*]{3,}[ \t]*\n(?=\s*(?:\n|\Z|\S))", re.M)
TYPE = re.compile(  # what stands before the name of a type: "x (", "x : ", "Returns:\\n    "
    r"(^|\n)[ \t]*([-*][ \t]+)?[\w.*`, ]*(\([^)\n]*|[ \t]:[ \t][^.\n]*|-> [^\n]*)$|[\w`]+ \(\[?$"
    r"|(\n[ \t]*|[:-][ \t]*)\n[ \t]*([`\[]?[\w.]+[`\]]?[ \t]+(or|,)[ \t]+)?$"
)
SHORT = {"np": "numpy", "pd": "pandas", "nx": "networkx", "sp": "scipy", "mpl": "matplotlib"}


class Docstring(NamedTuple):
    """One documented object: name without private modules, source file, parameters, text."""

    name: str
    module: str
    parameters: frozenset[str]
    text: str


class Mark(NamedTuple):
    """A place (start, end) of a text that points at an entry of its reference list, or at a name.

    bare: the name stands in back-ticks only.
    """

    start: int
    end: int
    label: str
    name: str
    bare: bool


def of(package: str, folder: Path | None = None) -> list[Docstring]:
    """All docstrings of a package's files outside its tests; folder: where it lies if not installed.

    Raises ValueError if there are none.
    """
    spec = None if folder else importlib.util.find_spec(package)
    top = Path(spec.origin).parent if spec and spec.origin else folder
    found = []
    for file in sorted(top.rglob("*.py")) if top else ():
        parts = (package, *file.relative_to(top or "").with_suffix("").parts)
        if any(TESTS.fullmatch(part) for part in parts[1:]):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # a template, Python 2, or bytes that are no text
            continue
        for name, node in _nodes(".".join(parts).removesuffix(".__init__"), tree):
            text = ast.get_docstring(node)
            if text and len(text) >= 30 and "\ufffd" not in text:
                public = [p for p in name.split(".") if not p.startswith("_") or p.startswith("__")]
                named = ast.walk(getattr(node, "args", ast.Pass()))
                parameters = frozenset(a.arg for a in named if isinstance(a, ast.arg))
                found.append(Docstring(".".join(public), "/".join(parts), parameters, text))
    if not found:
        raise ValueError(f"packages: {package!r} is not installed here, or has no docstrings")
    return sorted(found, key=lambda d: (d.module, d.name))


def _nodes(name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator:
    """(dotted name, node) of what can have a docstring, the node first, the last child next."""
    yield name, node
    for child in reversed(list(ast.iter_child_nodes(node))):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _nodes(f"{name}.{child.name}", child)


def bibliography(text: str) -> tuple[str, dict[str, str]]:
    """(text without its reference list, {label: reference}) of one docstring."""
    entries = {m["label"]: " ".join(m["text"].split()) for m in ENTRY.finditer(text)}
    if not entries:
        return text, {}
    return HEADING.sub("", ENTRY.sub("", text)).rstrip(), {k: v for k, v in entries.items() if len(v) >= 20}


def marks(text: str) -> Iterator[Mark]:
    """What a docstring points at, in order. The type of a parameter is left out: nobody decided to point."""
    for found in MARK.finditer(text):
        label = found["label"] or ""
        name = found["role"] or found["hub"] or found["tick"] or ""
        if label or not TYPE.search(text[max(0, found.start() - 150) : found.start()]):
            yield Mark(found.start(), found.end(), label, name, bool(found["tick"]))


class Names:
    """Resolves a name in a docstring to the one object that it can mean, or to nothing."""

    def __init__(self, found: Mapping[str, Sequence[Docstring]]) -> None:
        self.last: dict[str, dict[str, set[str]]] = {package: {} for package in found}
        for package, item in ((p, item) for p, items in found.items() for item in items):
            self.last[package].setdefault(item.name.rpartition(".")[2], set()).add(item.name)

    def resolve(self, name: str, package: str, bare: bool = False) -> str | None:
        """The full name that `name` in `package` means, if it is exactly one; a `bare` one is no method."""
        parts = re.sub(r".*<(.+)>", r"\1", name).strip(" ~!").split(".")
        parts[0] = SHORT.get(parts[0], parts[0])
        absolute = parts[0] in self.last
        if len(parts[-1]) < 3:
            return None
        names = self.last[parts[0] if absolute else package].get(parts[-1], set())
        owner = {n: n.rpartition(".")[0].rpartition(".")[2][:1] for n in names}  # its first letter
        fit = [n for n in names if n.endswith("." + ".".join(parts[-2:]))] if len(parts) > 1 else list(names)
        if bare and len(parts) == 1:  # `weight` is a word of the text, not a method of some class
            fit = [n for n in fit if not owner[n].isupper()]
        fit = fit or [n for n in names if absolute and owner[n].islower()]
        return fit[0] if len(fit) == 1 else None
