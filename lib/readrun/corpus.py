"""The book's frozen text: the same bytes on every machine, whatever packages are installed there.

    from readrun import corpus
    corpus.text("train", kinds=("novel", "guide"))     # one string
    corpus.documents("test")                           # its documents

data/sources/corpus.py makes it, and says from what.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from readrun import paths

FILE = "corpus/documents.xz"
KINDS = ("novel", "guide", "docstring", "code")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """A chapter of a novel, a page of a guide, the docstrings of a module file, or a module's source.

    id: where it is from ("scipy/optimize/_minimize.py"). text: printable ASCII and newlines; in prose,
    an empty line stands between paragraphs.
    """

    id: str
    kind: str
    text: str

    @property
    def split(self) -> str:
        return split_of(self.id)


def split_of(name: str) -> str:
    """Which split a document belongs to, by its id alone: 90 % train, 5 % validation, 5 % test."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


@lru_cache(maxsize=1)
def _all() -> tuple[Document, ...]:
    packed = paths.asset("shared/corpus") / "documents.xz"
    lines = lzma.decompress(packed.read_bytes()).decode("ascii").splitlines()
    return tuple(Document(*json.loads(line)) for line in lines)


def documents(split: str | None = None, kinds: Iterable[str] = KINDS) -> list[Document]:
    """The documents of a split (of all three without one) and of some kinds, always in the same order.

    Raises ValueError for an unknown split or kind, or if the committed file is damaged.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r}: it is one of {', '.join(SPLITS)}, or None for all")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds: {', '.join(map(repr, sorted(unknown)))} is not one of {', '.join(KINDS)}")
    return [d for d in _all() if d.kind in kinds and split in (None, d.split)]


def text(split: str | None = None, kinds: Iterable[str] = KINDS) -> str:
    """The documents' texts as one string, two empty lines between them."""
    return "\n\n\n".join(d.text for d in documents(split, kinds))
