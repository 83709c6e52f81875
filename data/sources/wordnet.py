"""Make data/assets/shared/wordnet from WordNet 3.0 as Debian packs it (`wordnet-base` 1:3.0-37).

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wn
    python data/sources/wordnet.py wn/usr/share/wordnet

All noun and adjective synsets are kept: lexicographer file, lemmas with sense numbers, hypernyms, how often
the senses are tagged in WordNet's texts. Glosses, two thirds of the bytes, are kept where a chapter reads
them: for animals, artefacts, food and plants with all that lies above them (verifiagent), and for every sense
of a noun that has both a medical and another one (meddistract). Verbs, adverbs and other relations are left
out.
"""

from __future__ import annotations

import lzma
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from readrun import paths
from readrun.wordnet import COLUMNS, FILE, MEDICAL

GLOSSED = {3, 5, 6, 13, 20}  # noun.Tops, noun.animal, noun.artifact, noun.food, noun.plant
XZ = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=4, pb=0, nice_len=273)]
SOURCE = "WordNet 3.0, Debian package wordnet-base 1:3.0-37"
LICENCE = "WordNet 3.0 licence (Princeton University), see shared/wordnet/LICENSE.txt"


@dataclass
class Row:
    """One line of data.noun or data.adj; `up` and `instance_of` hold keys (pos, offset)."""

    key: tuple[str, str]
    lexfile: int
    words: list[str]
    up: list[tuple[str, str]]
    instance_of: list[tuple[str, str]]
    gloss: str


def lines(path: Path) -> list[str]:
    """The lines of a WordNet file after its licence, which is indented by two spaces."""
    return [x for x in path.read_text(encoding="latin-1").splitlines() if not x.startswith("  ")]


def parse(line: str, pos: str) -> Row:
    """A line of data.<pos>, laid out as wndb(5WN) says."""
    head, gloss = line.split(" | ", 1)
    offset, lexfile, _, count, *rest = head.split()
    words = [re.sub(r"\(\w+\)$", "", word) for word in rest[: 2 * int(count, 16) : 2]]
    pointers = rest[2 * int(count, 16) + 1 :]
    up: dict[str, list[tuple[str, str]]] = {"@": [], "@i": []}
    for symbol, target in zip(pointers[::4], pointers[1::4], strict=True):
        up.get(symbol, []).append((pos, target))
    return Row((pos, offset), int(lexfile), words, up["@"], up["@i"], " ".join(gloss.split()))


def senses(folder: Path, pos: str, letter: str) -> dict[tuple[str, str], int]:
    """{(lower-case lemma, offset): sense number} from index.<pos>, whose offsets are in sense order."""
    found = {}
    for lemma, _, count, *rest in map(str.split, lines(folder / f"index.{pos}")):
        found |= {(letter + lemma, offset): i for i, offset in enumerate(rest[-int(count) :], 1)}
    return found


def extract(folder: Path) -> dict[str, list[str]]:
    """The extract's columns from a folder with data.noun, index.noun, data.adj, index.adj, cntlist.rev."""
    rows = [parse(x, pos[0]) for pos in ("noun", "adj") for x in lines(folder / f"data.{pos}")]
    number = {row.key: i for i, row in enumerate(rows)}
    sense = senses(folder, "noun", "n") | senses(folder, "adj", "a")
    tagged = {}
    for key, n, count in map(str.split, lines(folder / "cntlist.rev")):
        lemma, _, kind = key.partition("%")
        tagged[{"1": "n", "3": "a", "5": "a"}.get(kind[0], "-") + lemma, int(n)] = int(count)

    def of(row: Row) -> list[tuple[str, int]]:
        return [(row.key[0] + w.lower(), sense[row.key[0] + w.lower(), row.key[1]]) for w in row.words]

    kept = {i for i, row in enumerate(rows) if row.key[0] == "n" and row.lexfile in GLOSSED}
    kept |= medical_words(rows, number, of)
    todo = list(kept)
    while todo:
        row = rows[todo.pop()]
        above = {number[key] for key in row.up + row.instance_of} - kept
        kept |= above
        todo += above
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for i, row in enumerate(rows):
        lemmas = [w + (f"~{n}" if n > 1 else "") for w, (_, n) in zip(row.words, of(row), strict=True)]
        up = [" ".join(str(number[key]) for key in keys) for keys in (row.up, row.instance_of)]
        columns["pos"].append(row.key[0])
        columns["lexfile"].append(str(row.lexfile))
        columns["lemmas"].append(" ".join(lemmas))
        columns["hypernyms"].append("|".join(up).rstrip("|"))
        columns["count"].append(str(sum(tagged.get(x, 0) for x in of(row)) or ""))
        columns["gloss"].append(row.gloss if i in kept else "")
    return columns


def medical_words(rows: list[Row], number: dict, of) -> set[int]:
    """Every sense of the nouns that have both a sense below MEDICAL and another."""
    below, by_lemma, by_name = defaultdict(set), defaultdict(set), {}
    for i, row in enumerate(rows):
        for key in row.up + row.instance_of:
            below[number[key]].add(i)
        for lemma, n in of(row):
            by_lemma[lemma].add(i)
            by_name[f"{lemma[1:]}.{lemma[0]}.{n:02}"] = i
    medical: set[int] = set()
    todo = {by_name[name] for name in MEDICAL if name in by_name}
    while todo:
        medical |= todo
        todo = {j for i in todo for j in below[i]} - medical
    return {i for found in by_lemma.values() if found & medical and found - medical for i in found}


def main(folder: Path) -> None:
    """Write the extract, its licence and its entries of MANIFEST.json."""
    columns = extract(folder)
    text = "\n".join("\n".join(columns[name]) for name in COLUMNS) + "\n"
    out = paths.assets("shared") / FILE
    packed = lzma.compress(text.encode("utf-8"), check=lzma.CHECK_CRC32, filters=XZ)
    paths.write_atomic(out, packed)
    raw = (folder / "data.noun").read_text(encoding="latin-1").splitlines()
    notice = [re.sub(r"^  \d+ ", "", line).rstrip() for line in raw if line.startswith("  ")]
    paths.write_atomic(out.with_name("LICENSE.txt"), "\n".join(notice) + "\n")
    paths.write_manifest("shared", SOURCE, LICENCE, "data/sources/wordnet.py")
    print(f"{len(columns['pos'])} synsets, {sum(map(bool, columns['gloss']))} glosses, {len(packed)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
