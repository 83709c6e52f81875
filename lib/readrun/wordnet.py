"""WordNet 3.0's nouns and adjectives, read from the committed extract; names follow NLTK's reader.

    from readrun import wordnet
    penguin = wordnet.synset("penguin.n.01")
    penguin.hypernyms, penguin.depth, penguin.ancestors, penguin.definition

data/sources/wordnet.py makes the extract and says what it leaves out (verbs, most glosses, other relations).
Miller: WordNet, a lexical database for English. Communications of the ACM 38 (11), 1995.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from readrun import paths

FILE = "wordnet/synsets.xz"
COLUMNS = ("pos", "lexfile", "lemmas", "hypernyms", "count", "gloss")
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body"
    " noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location"
    " noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process"
    " noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change"
    " verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation"
    " verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()  # by lexicographer number, lexnames(5WN)
MEDICAL = tuple(
    f"{w}.n.01" for w in "ill_health symptom pathological_state injury body_part organ".split()
)  # what makes a sense medical: it is one of these or lies below one


@dataclass(frozen=True)
class Synset:
    """One sense: a set of lemmas that mean the same. Two are equal if they have the same `number`.

    name: first lemma, part of speech ("n", "a"), sense number, as in "dog.n.01". lexname: topic, as in
    "noun.animal". lemmas: words of the synset, spaces between the parts of a compound. count: how often it is
    tagged in WordNet's texts (0 for most). definition, examples: empty where the extract has no gloss.
    """

    number: int
    name: str
    pos: str
    lexname: str
    lemmas: tuple[str, ...]
    count: int
    definition: str
    examples: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Synset) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"Synset({self.name!r})"

    @property
    def hypernyms(self) -> tuple[Synset, ...]:
        """Direct hypernyms, those of an instance ("Rome" is one of "city") included."""
        return tuple(map(_synset, _tables().up[self.number]))

    @property
    def hyponyms(self) -> tuple[Synset, ...]:
        """Direct hyponyms and instances, the inverse of `hypernyms`."""
        return tuple(map(_synset, _tables().down.get(self.number, ())))

    @property
    def is_instance(self) -> bool:
        """Whether it names one thing ("Rome") instead of a kind of things."""
        return self.number in _tables().instances

    @property
    def ancestors(self) -> dict[Synset, int]:
        """{synset above: shortest number of hypernym steps to it}, nearest first."""
        return _closure(self, lambda s: s.hypernyms)

    @property
    def descendants(self) -> dict[Synset, int]:
        """{synset below: shortest number of hyponym steps to it}, nearest first."""
        return _closure(self, lambda s: s.hyponyms)

    @property
    def depth(self) -> int:
        """Shortest number of steps to a synset without hypernyms ("entity.n.01" for nouns)."""
        above = {self: 0} | self.ancestors
        return min(steps for s, steps in above.items() if not _tables().up[s.number])


def synset(name: str) -> Synset:
    """The synset that has this name ("dog.n.01"), by any of its lemmas. ValueError if there is none."""
    lemma, _, rest = name.lower().replace(" ", "_").rpartition(".")
    lemma, _, pos = lemma.rpartition(".")
    found = _tables().index.get((pos, lemma), {})
    if not rest.isdecimal() or int(rest) not in found:
        raise ValueError(f"synset: {name!r} is not in WordNet; names are like 'dog.n.01'")
    return _synset(found[int(rest)])


def synsets(lemma: str, pos: str | None = None) -> list[Synset]:
    """The senses of a word, the most frequent first, nouns before adjectives; [] for an unknown word."""
    if pos not in (None, "n", "a"):
        raise ValueError(f"pos={pos!r}: the extract holds 'n' (nouns) and 'a' (adjectives)")
    found = [_tables().index.get((p, lemma.lower().replace(" ", "_")), {}) for p in (pos or "na")]
    return [_synset(senses[n]) for senses in found for n in sorted(senses)]


def all_synsets(lexname: str = "") -> Iterator[Synset]:
    """Every synset in WordNet's order, or those of one topic ("noun.animal", or "noun" for all nouns)."""
    for number, lexfile in enumerate(_tables().lexfile):
        if lexname in ("", LEXNAMES[lexfile], LEXNAMES[lexfile].partition(".")[0]):
            yield _synset(number)


def lexicon() -> dict[str, list[str]]:
    """{lexname: its lemmas, each once, sorted}."""
    words: dict[str, set[str]] = {}
    for lexfile, lemmas in zip(_tables().lexfile, _tables().lemmas, strict=True):
        words.setdefault(LEXNAMES[lexfile], set()).update(_plain(w) for w in lemmas)
    return {name: sorted(words[name]) for name in LEXNAMES if name in words}


# ---------------------------------------------------------------- reading


class _Tables:
    """The columns of the extract, a synset's number being its place in them."""

    def __init__(self, text: str) -> None:
        lines = text.removesuffix("\n").split("\n")
        n, rest = divmod(len(lines), len(COLUMNS))
        if rest:
            raise ValueError(f"{FILE}: {len(lines)} lines are not {len(COLUMNS)} columns")
        self.pos, lexfile, lemmas, up, count, self.gloss = (
            lines[i * n : (i + 1) * n] for i in range(len(COLUMNS))
        )
        self.lexfile, self.count = list(map(int, lexfile)), [int(c or 0) for c in count]
        self.lemmas = [row.split(" ") for row in lemmas]
        self.up = [tuple(map(int, row.replace("|", " ").split())) for row in up]
        self.instances = frozenset(i for i, row in enumerate(up) if "|" in row)

    @cached_property
    def down(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for number, above in enumerate(self.up):
            for other in above:
                found.setdefault(other, []).append(number)
        return found

    @cached_property
    def index(self) -> dict[tuple[str, str], dict[int, int]]:
        found: dict[tuple[str, str], dict[int, int]] = {}
        for number, words in enumerate(self.lemmas):
            for word in words:
                lemma, _, sense = word.lower().partition("~")
                found.setdefault((self.pos[number], lemma), {})[int(sense or 1)] = number
        return found


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    packed = paths.asset("shared/wordnet") / "synsets.xz"
    return _Tables(lzma.decompress(packed.read_bytes()).decode("utf-8"))


def _plain(word: str) -> str:
    return word.partition("~")[0].replace("_", " ")


@cache
def _synset(number: int) -> Synset:
    t = _tables()
    first, _, sense = t.lemmas[number][0].lower().partition("~")
    name = f"{first}.{t.pos[number]}.{int(sense or 1):02}"
    examples = tuple(re.findall(r'"([^"]+)"', t.gloss[number]))
    definition = re.split(r';? *"', t.gloss[number], maxsplit=1)[0].strip(" ;:,")
    lemmas = tuple(map(_plain, t.lemmas[number]))
    lexname = LEXNAMES[t.lexfile[number]]
    return Synset(number, name, t.pos[number], lexname, lemmas, t.count[number], definition, examples)


def _closure(start: Synset, step: Callable[[Synset], tuple[Synset, ...]]) -> dict[Synset, int]:
    found, edge, steps = dict[Synset, int](), {start: 0}, 0
    while edge := {s: steps for s in edge for s in step(s) if s not in found}:
        steps += 1
        found |= dict.fromkeys(edge, steps)
    return found
