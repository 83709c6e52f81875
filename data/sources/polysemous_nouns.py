"""Make data/assets/meddistract/polysemous_nouns.json: nouns with a medical sense and another one.

    python data/sources/polysemous_nouns.py

A word counts if it is a single lower-case word, a lemma of a synset at or below one of
readrun.wordnet.MEDICAL and of a synset that is not. `examples` are the usage examples of the other senses
that contain the word itself.
"""

from __future__ import annotations

import json
import re

from readrun import paths, wordnet


def is_medical(sense: wordnet.Synset) -> bool:
    """Whether a sense is, or lies below, an illness, symptom, injury, body part or organ."""
    return not {s.name for s in (sense, *sense.ancestors)}.isdisjoint(wordnet.MEDICAL)


def polysemous_nouns() -> list[dict]:
    """One entry per word, sorted: {word, medical: [sense], other: [sense]}; senses in WordNet's order."""
    roots = map(wordnet.synset, wordnet.MEDICAL)
    words = {word for root in roots for s in (root, *root.descendants) for word in s.lemmas}
    found = []
    for word in sorted(w for w in words if w.isalpha() and w.islower()):
        entry: dict = {"word": word, "medical": [], "other": []}
        uses = re.compile(rf"\b{word}(s|es)?\b", re.IGNORECASE)
        for sense in wordnet.synsets(word, "n"):
            if word in sense.lemmas:  # not "Cancer", the constellation, for "cancer"
                about = {"name": sense.name, "lexname": sense.lexname, "definition": sense.definition}
                if not is_medical(sense):
                    about |= {"examples": [e for e in sense.examples if uses.search(e)]}
                entry["medical" if is_medical(sense) else "other"].append(about)
        found += [entry] if entry["other"] else []
    return found


def main() -> None:
    """Write the list and its entry of MANIFEST.json."""
    source = "WordNet 3.0, from data/assets/shared/wordnet"
    licence = "WordNet 3.0 licence (Princeton University): data/assets/shared/wordnet/LICENSE.txt"
    words = polysemous_nouns()
    lines = ",\n".join(json.dumps(word) for word in words)
    head = json.dumps({"source": source, "licence": licence}, indent=0)[:-2]
    text = f'{head},\n"words": [\n{lines}\n]\n}}\n'
    paths.write_atomic(paths.assets("meddistract") / "polysemous_nouns.json", text)
    paths.write_manifest("meddistract", source, licence, "data/sources/polysemous_nouns.py")
    usable = sum(any(s["examples"] for s in w["other"]) for w in words)
    print(f"{len(words)} words, {usable} with an example of the other sense")


if __name__ == "__main__":
    main()
