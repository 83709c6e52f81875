"""Make data/assets/shared/corpus: the frozen text on which several chapters train.

    mkdir packages && cd packages
    apt-get download r-cran-janeaustenr python3.11-doc libpython3.11-stdlib libpython3.11-minimal \
        python-scipy-doc python-sklearn-doc python-statsmodels-doc python-pandas-doc python-sympy-doc
    for file in *.deb; do dpkg-deb -x "$file" "${file%%_*}"; done && cd ..
    python data/sources/corpus.py packages

Kinds of documents: `novel` (a chapter of Jane Austen's), `guide` (a page of a manual or user guide),
`docstring` (the prose of a module's docstrings), `code` (a module of Python's standard library).
Prose keeps whole paragraphs of sentences; mathematics, tables, listings, signatures and release notes are
left out. All text is printable ASCII with newlines. A paragraph is dropped if more than half of its runs of
eight words stand in what was read before, so that nothing of one split is repeated in another.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import lzma
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from readrun import paths
from readrun.corpus import FILE, Document

VERSIONS = {
    "r-cran-janeaustenr": "1.0.0-1",
    "python3.11-doc": "3.11.2-6+deb12u9",
    "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "libpython3.11-minimal": "3.11.2-6+deb12u9",
    "python-scipy-doc": "1.10.1-2",
    "python-sklearn-doc": "1.2.1+dfsg-1",
    "python-statsmodels-doc": "0.13.5+dfsg-7",
    "python-pandas-doc": "1.5.3+dfsg-2",
    "python-sympy-doc": "1.11.1-1",
}
DOCSTRINGS = {"numpy": "2.4.6", "scipy": "1.17.1", "scikit-learn": "1.9.1", "statsmodels": "0.15.0",
              "networkx": "3.6.1"}  # fmt: skip
GUIDES = ["python3.11-doc", "python-sklearn-doc", "python-scipy-doc", "python-statsmodels-doc",
          "python-pandas-doc", "python-sympy-doc"]  # fmt: skip
NOT_GUIDES = re.compile(
    r"/(generated|api|_modules|_static|includes|whatsnew|whats_new|release|dev|developers|development"
    r"|contributing|distutils|install|gitwash)/|genindex|search\.html|modindex|changelog|release|license"
    r"|copyright|about|testimonials|related_projects|contents|/index\.html|references\.html"
)
NOT_PROSE_MODULES = re.compile(
    r"/(tests?|testing|_examples|conftest\.py|externals|_lib/array_api\w*|lib2to3)(/|$)"
)
XZ = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=4, pb=0, nice_len=273)]
CITED = re.compile(r"\b(in|see|by|from|of|to|is|and|with|on|as|at|also|eg|ie|or)[.,:]? \W?\[", re.IGNORECASE)
ASCII = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "…": "...", "\xa0": " ", "−": "-",
     "×": "x", "ß": "ss", "æ": "ae", "ø": "o", "ł": "l", "•": "-", "→": "->"}
)  # fmt: skip


# ---------------------------------------------------------------- paragraphs


def ascii_text(text: str) -> str:
    """Typographic signs and accents as printable ASCII; other characters stay and are seen later."""
    text = unicodedata.normalize("NFKD", text.translate(ASCII))
    return "".join(c for c in text if not unicodedata.combining(c))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is made of sentences: 6 words or more, mostly letters, ended as sentences end."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        re.fullmatch(r"[ -~]+", paragraph) is not None
        and len(paragraph.split()) >= 6
        and letters >= 0.88 * len(paragraph)
        and re.match(r"[\"'(_]*[A-Z]", paragraph) is not None
        and re.search(r"[.!?:;]['\")_]*$", paragraph) is not None
        and re.search(r"[\\|{}<>=~^]|https?:|::|\.\.\. [.]| [.,;:)]|\( |\(\)[A-Za-z]", paragraph) is None
    )


class Page(HTMLParser):
    """The paragraphs of a Sphinx page: text of <p> in the body, but not in tables, listings, notes."""

    SKIP = {"pre", "table", "nav", "script", "style", "dt", "aside", "footer", "header"}
    VOID = {"br", "img", "hr", "meta", "link", "input", "col", "area", "base", "wbr", "source"}

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, bool, bool]] = []  # tag, in the body, skipped
        self.paragraphs: list[str] = []
        self.words: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {k: v or "" for k, v in attrs}
        if tag in self.VOID:
            self.words = self.words and [*self.words, "\0" if "math" in named.get("class", "") else " "]
            return
        body = named.get("role") == "main" or tag == "main"
        bad = tag in self.SKIP or re.search(
            r"headerlink|highlight-|math|citation|footnote|field-list|toctree|versionmodified|deprecated"
            r"|sphx-glr|sidebar|admonition-title|caption", named.get("class", "")
        )  # fmt: skip
        _, inside, skipped = self.open[-1] if self.open else ("", False, False)
        self.open.append((tag, inside or body, skipped or bool(bad)))
        if tag == "p" and self.open[-1][1] and not self.open[-1][2]:
            self.words = []
        elif bad and self.words is not None and re.search("math|citation|footnote", named.get("class", "")):
            lacking = "math" in named["class"] or CITED.search("".join(self.words) + "[")
            self.words += ["\0"] if lacking else []  # what lacks a formula or a name is no prose

    def handle_endtag(self, tag: str) -> None:
        if all(name != tag for name, _, _ in self.open):
            return
        while self.open and self.open.pop()[0] != tag:
            pass
        if tag == "p" and self.words is not None:
            self.paragraphs.append(" ".join("".join(self.words).split()))
            self.words = None

    def handle_data(self, data: str) -> None:
        if self.words is not None and self.open and not self.open[-1][2]:
            self.words.append(data)


def docstring_paragraphs(text: str) -> list[str]:
    """The prose of a docstring: what stands before its first section, and in Notes; marks of reST removed."""
    found, section, lines = [], "", inspect.cleandoc(text).split("\n")
    blocks: list[list[str]] = [[]]
    for i, current in enumerate(lines):
        rule = lines[i + 1] if i + 1 < len(lines) else ""
        if re.fullmatch(r"\s*[-=]{3,}\s*", rule) and current.strip():
            section = current.strip()
        keep = section in ("", "Notes") and current.strip() and not re.match(r"\s|[-=*.>|]", current)
        if keep and current.strip() != section:
            blocks[-1].append(current)
        elif blocks[-1]:
            blocks.append([])
    for block in blocks:
        prose = re.sub(r":math:|\$", "\0", " ".join(" ".join(block).split()))
        prose = re.sub(CITED.pattern, "\0", prose)
        prose = re.sub(r":[\w:]+:`~?\.?([^`<]+?)( <[^`]*>)?`", r"\1", prose)
        prose = re.sub(r" ?\[\w+\]_", "", re.sub(r"`+([^`]+)`+_*|\*+(\w[^*]*)\*+", r"\1\2", prose))
        found.append(prose)
    return found


# ---------------------------------------------------------------- sources


def novels(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(id, paragraphs) of each chapter in the R package's data file: zlib pieces, each a vector of lines."""
    packed = next(folder.rglob("Rdata.rdb")).read_bytes()
    while packed:
        piece = zlib.decompressobj()
        raw, packed = piece.decompress(packed[4:]), b""
        packed = piece.unused_data
        lines, at = [], raw.find(b"\x00\x04\x00\x09")
        while 0 <= at < len(raw) - 8 and raw[at + 1 : at + 4] == b"\x04\x00\x09":  # one CHARSXP each
            size = int.from_bytes(raw[at + 4 : at + 8], "big")
            lines.append(raw[at + 8 : at + 8 + size].decode("ascii", "replace"))
            at += 8 + size
        title = re.sub(r"\W+", "-", next((x for x in lines if x.strip()), "").strip().lower())
        text = "\n".join(lines)
        for number, chapter in enumerate(
            re.split(r"\n(?:chapter|volume) [\dIVXLC]+\.?.*\n", text, flags=re.I)
        ):
            blocks = [" ".join(block.split()) for block in chapter.split("\n\n")]
            yield f"austen/{title}/{number:02}", [b.replace("_", "") for b in blocks if number]


def guides(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(id, paragraphs) of each page of a manual."""
    for file in sorted(folder.rglob("*.html")):
        name = file.relative_to(folder).as_posix().partition("/html/")[2]
        if name and not NOT_GUIDES.search("/" + name):
            page = Page(file.read_text(encoding="utf-8", errors="replace"))
            yield f"{folder.name}/{name.removesuffix('.html')}", page.paragraphs


def docstrings(package: str) -> Iterator[tuple[str, list[str]]]:
    """(id, paragraphs) of each module file of an installed package, read without importing it."""
    name = {"scikit-learn": "sklearn"}.get(package, package)
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        raise ValueError(f"package {package} is not installed")
    folder = Path(spec.origin).parent
    for file in sorted(folder.rglob("*.py")):
        path = f"{name}/{file.relative_to(folder).as_posix()}"
        if not NOT_PROSE_MODULES.search("/" + path):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts = [ast.get_docstring(n) for n in nodes if isinstance(n, kinds)]
            yield path, [p for text in texts if text for p in docstring_paragraphs(text)]


def modules(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, source) of the standard library's modules that are ASCII and of a usual size."""
    for file in sorted(p for p in folder.rglob("*.py") if p.is_file()):  # there are links to nowhere
        name = file.relative_to(folder).as_posix().partition("/python3.11/")[2]
        text = file.read_text(encoding="utf-8", errors="replace").expandtabs()
        usual = 3_000 <= len(text) <= 40_000 and re.fullmatch(r"[ -~\n]+", text)
        if name and usual and not re.search(r"(^|/)(test|tests|idlelib|lib2to3|encodings|pydoc_data)/", name):
            yield f"python3.11/{name}", text


# ---------------------------------------------------------------- the corpus


class Seen:
    """Runs of eight words that stand in the text so far."""

    def __init__(self) -> None:
        self.runs: set[int] = set()

    def is_new(self, paragraph: str) -> bool:
        """Whether at most half of a paragraph's runs are known; they are then known as well."""
        words = re.findall(r"[a-z]+", paragraph.lower())
        runs = {" ".join(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
        keys = {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs}
        known = len(keys & self.runs)
        if 2 * known <= len(keys) and known < len(keys):
            self.runs |= keys
            return True
        return False


def clean(
    kind: str, pages: Iterable[tuple[str, list[str]]], seen: Seen, least: int = 200
) -> Iterator[Document]:
    """A document of each page's new prose paragraphs, if they have `least` characters together."""
    for name, paragraphs in pages:
        kept = [p for p in map(ascii_text, paragraphs) if is_prose(p) and seen.is_new(p)]
        if len(text := "\n\n".join(kept)) >= least:
            yield Document(name, kind, text)


def collect(folder: Path) -> list[Document]:
    """All documents, from unpacked Debian packages below `folder` and installed Python packages."""
    for package, version in DOCSTRINGS.items():
        if importlib.metadata.version(package) != version:
            raise ValueError(f"{package} {version} is needed, {importlib.metadata.version(package)} is here")
    seen = Seen()
    found = list(clean("novel", novels(folder / "r-cran-janeaustenr"), seen))
    for package in GUIDES:
        found += clean("guide", guides(folder / package), seen)
    for package in DOCSTRINGS:
        found += clean("docstring", docstrings(package), seen)
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        found += [Document(name, "code", text) for name, text in modules(folder / package)]
    return found


def main(folder: Path) -> None:
    """Write the corpus and its entries of MANIFEST.json; print the size of each kind."""
    documents = collect(folder)
    lines = [json.dumps([d.id, d.kind, d.text]) for d in documents]
    packed = lzma.compress(("\n".join(lines) + "\n").encode("ascii"), check=lzma.CHECK_CRC32, filters=XZ)
    paths.write_atomic(paths.assets("shared") / FILE, packed)
    for kind in ("novel", "guide", "docstring", "code"):
        mine = [d for d in documents if d.kind == kind]
        print(f"{kind}: {len(mine)} documents, {sum(len(d.text) for d in mine):,} characters")
    print(f"{len(packed):,} bytes")
    named = [f"{name} {version}" for name, version in VERSIONS.items()]
    source = f"Debian packages {', '.join(named)}; Python packages "
    source += ", ".join(f"{name} {version}" for name, version in DOCSTRINGS.items())
    licence = "public domain, PSF-2.0, BSD-3-Clause, MIT: see shared/corpus/LICENSES.txt"
    paths.write_manifest("shared", source, licence, "data/sources/corpus.py")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
