"""Questions with exact answers and gold solutions, in a training and a test half that share nothing.

    from readrun import questions
    questions.make_items("logic", 1, seed=0)[0].question

math         word problems of two to four operations; the halves differ in the numbers
logic        premises about an invented person, a hypothesis that is True, False or Uncertain by trying every
             truth assignment; the halves differ in the names
commonsense  "is every x a y?" over one to three hypernym steps of WordNet, false targets being siblings at
             equal depth; the halves are different subtrees
hybrid       such a fact selects the number that a computation starts from
`ood` asks the same in words that no other question uses."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from readrun import wordnet

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda x, y: x // y if y else 0,
    "%": lambda x, y: x % y if y else 0, "gcd": math.gcd, "lcm": math.lcm,
}  # fmt: skip


def step_text(x: Any, op: str, y: Any, z: Any = None) -> str:
    """ "14 * 6 = 84"; without a result the expression of a program."""
    if z is None:
        return f"math.{op}({x}, {y})" if op in ("gcd", "lcm") else f"{x} {op.replace('/', '//')} {y}"
    return f"{op} {x} {y} = {z}" if op in ("gcd", "lcm") else f"{x} {op} {y} = {z}"


def run_steps(steps: Sequence[tuple], slips: Mapping[int, int] = {}) -> list[tuple[int, str, int, int]]:
    """[(x, op, y)] -> [(x, op, y, result)]; "r1" is the first result; `slips` {step: wrong result}."""
    done: list[tuple[int, str, int, int]] = []
    for i, (x, op, y) in enumerate(steps):
        a, b = (done[int(t[1:]) - 1][3] if isinstance(t, str) else t for t in (x, y))
        done.append((a, op, b, slips.get(i, OPERATORS[op](a, b))))
    return done


@dataclass(frozen=True)
class Item:
    """A question with its exact answer, gold lines, and what would find it.

    kind: one of KINDS. steps: gold solution lines without the answer line. program: for Python or (logic) a
    theorem prover that knows `check_constraint`. searches: names to look up. extra: what it was made of: math
    (steps, values), logic (premises, atom), commonsense (chain, target), hybrid (chain, target, numbers).
    """

    kind: str
    question: str
    answer: str
    steps: tuple[str, ...]
    conditions: str
    objective: str
    program: str = ""
    searches: tuple[str, ...] = ()
    extra: Any = None


def stable(text: str) -> int:
    """A number in 0 … 4 that depends on the text alone: group 0 is the test's."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 5


def draw_until(make: Callable[[], Any]) -> Any:
    """The first result that is not None."""
    for _ in range(10_000):
        if (found := make()) is not None:
            return found
    raise RuntimeError("nothing of the wanted kind was found: the pool is too small")


# (question, paraphrase, objective, parameters (low, high), rule between them, steps; r1, r2 are results)
TEMPLATES = [
    ("A machine makes {a} parts per hour for {b} hours. Then {c} parts are thrown away."
     " How many parts remain?",
     "After {b} hours at {a} parts an hour, a factory bins {c} parts. What is its stock?",
     "parts left", {"a": (3, 30), "b": (2, 9), "c": (2, 9)}, "c < a*b", "a*b r1-c"),
    ("{a} friends share {b} coins equally. Each then finds {c} coins. How many coins has each?",
     "Split {b} coins among {a} people; add {c} to every share. How big is a share?",
     "coins each", {"a": (2, 9), "b": (4, 90), "c": (2, 30)}, "b % a == 0", "b/a r1+c"),
    ("A coat costs {a} euros. It gets {b} percent cheaper, then {c} euros dearer. What does it cost?",
     "Take {b} percent off {a} euros and add {c} euros. Which price results?",
     "price", {"a": (20, 90), "b": (10, 50), "c": (2, 30)}, "a % 10 == 0 and b % 10 == 0",
     "a*b r1/100 a-r2 r3+c"),
    ("Tom buys {a} pens for {b} euros each and {c} books for {d} euros each. How much does he pay?",
     "What is the bill for {c} books at {d} euros and {a} pens at {b} euros?",
     "bill", {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (3, 30)}, "a != c", "a*b c*d r1+r2"),
    ("There are {a} eggs in one basket and {b} in another. Boxes hold {c} eggs."
     " How many eggs fit in no full box?",
     "{a} and {b} eggs go into boxes of {c}. What is the remainder?",
     "eggs left over", {"a": (5, 60), "b": (5, 60), "c": (3, 9)}, "a != b", "a+b r1%c"),
    ("Two ropes of {a} and {b} metres are cut into equal pieces, as long as possible."
     " How many pieces are there?",
     "Cut ropes {a} m and {b} m long into the longest equal parts. Count the parts.",
     "pieces", {"a": (4, 60), "b": (4, 60)}, "a != b and math.gcd(a, b) > 1", "a~b a/r1 b/r1 r2+r3"),
    ("One bus comes every {a} minutes, another every {b}. They met {c} minutes ago."
     " In how many minutes do they meet again?",
     "Lights blink every {a} and {b} minutes and blinked together {c} minutes ago. When is the next time?",
     "minutes", {"a": (4, 12), "b": (4, 12), "c": (2, 9)}, "a != b and c < math.lcm(a, b)", "a^b r1-c"),
    ("How many multiples of {b} are there from 1 to {a}, not counting the first {c}?",
     "Leave out the first {c} multiples of {b} up to {a}. How many stay?",
     "count", {"a": (20, 90), "b": (2, 6), "c": (1, 3)}, "a % b == 0 and a // b > c", "a/b r1-c"),
    ("Ann is {a} years old. Her father is {b} times as old. How old was he {c} years ago?",
     "A man is {b} times as old as his child of {a}. What was his age {c} years earlier?",
     "age", {"a": (4, 15), "b": (2, 6), "c": (2, 7)}, "a*b > c", "a*b r1-c"),
    ("A row of numbers starts at {a} and grows by {b} each time. What is number {c} of the row?",
     "Begin with {a} and keep adding {b}. Which value is at place {c}?",
     "value", {"a": (2, 30), "b": (2, 9), "c": (3, 9)}, "a != b", "c-1 r1*b a+r2"),
    ("Mia buys {a} tickets for {b} euros each and pays with {c} euros. How much change does she get?",
     "From {c} euros, {a} tickets at {b} euros are paid. What comes back?",
     "change", {"a": (2, 9), "b": (2, 12), "c": (20, 120)}, "c > a*b", "a*b c-r1"),
    ("Three tests gave {a}, {b} and {c} points. What is the mean, plus a bonus of {d}?",
     "Average {a}, {b}, {c}; then add {d}. What do you get?",
     "mean", {"a": (10, 60), "b": (10, 60), "c": (10, 60), "d": (2, 9)}, "(a+b+c) % 3 == 0",
     "a+b r1+c r2/3 r3+d"),
]  # fmt: skip


def math_steps(steps: str, values: Mapping[str, int]) -> list[tuple[Any, str, Any]]:
    """ "a*b r1-c" -> [(14, "*", 6), ("r1", "-", 20)]; "~" is gcd, "^" is lcm."""
    value = lambda t: values[t] if t in values else int(t) if t.isdecimal() else t  # noqa: E731
    parts = re.findall(r"(\w+)([^\w ])(\w+)", steps)
    return [(value(x), {"~": "gcd", "^": "lcm"}.get(op, op), value(y)) for x, op, y in parts]


def make_math(rng: np.random.Generator, test: bool, ood: bool = False) -> Item:
    """A word problem; training and test differ in the numbers, `ood` questions are worded differently."""

    def attempt() -> Item | None:
        plain, other, objective, ranges, rule, steps = TEMPLATES[rng.integers(len(TEMPLATES))]
        values = {k: int(rng.integers(lo, hi + 1)) for k, (lo, hi) in ranges.items()}
        if not eval(rule, {"math": math}, values) or (stable(f"{objective}{values}") == 0) != test:
            return None
        parts = math_steps(steps, values)
        done = run_steps(parts)
        if min(d[3] for d in done) < 0 or done[-1][3] > 9999:
            return None
        spell = lambda t: "pqrs"[int(t[1:]) - 1] if isinstance(t, str) else t  # noqa: E731
        named = zip("pqrs", parts, strict=False)
        body = "".join(f" {n} = {step_text(spell(x), op, spell(y))}\n" for n, (x, op, y) in named)
        program = f"def solver():\n{body} return {'pqrs'[len(parts) - 1]}\nans = solver()"
        return Item("math", (other if ood else plain).format(**values), str(done[-1][3]),
                    tuple(step_text(*d) for d in done), " ".join(map(str, values.values())), objective,
                    program, extra=(tuple(parts), values))  # fmt: skip

    return draw_until(attempt)


ADJECTIVES = (
    "kind calm tall brave quick loud soft green round sharp heavy bright cold sweet young proud rough shy"
    " warm wild plain rich bitter clever dull eager faint gentle happy hollow lazy neat odd polite quiet rare"
    " safe tidy vast weak"
).split()
SYLLABLES = "ba bo ci da do fe fi ga ho ja ke ki lo lu ma mi no pa pe ra ri so ta tu va wo ya zi".split()
Literal = tuple[str, bool]
SENTENCES = {  # premise: (as in training, as in `ood`, in Z3)
    "fact": ("{name} is {0}.", "{name} is {0}.", "{0}"),
    "all": ("All who are {0} are {1}.", "Whoever is {0} is {1}.", "Implies({0}, {1})"),
    "xor": ("Everyone is either {0} or {1}.", "One is {0} or {1}, never both.", "Xor({0}, {1})"),
}


def literal(atom: str, positive: bool) -> str:
    """ "calm" or "not calm"."""
    return atom if positive else f"not {atom}"


def z3_program(premises: Sequence[tuple], atom: str) -> str:
    """The program of the paper's template: add the premises, check the hypothesis and its negation."""
    spell = lambda a, positive: f"Bool('{a}')" if positive else f"Not(Bool('{a}'))"  # noqa: E731
    told = [SENTENCES[kind][2].format(*(spell(*p) for p in parts)) for kind, *parts in premises]
    lines = ["def main():", " s = Solver()", *(f" s.add({one})" for one in told)]
    return "\n".join([*lines, f" return check_constraint(s, Bool('{atom}'))", "ans = main()"])


def logic_label(premises: Sequence[tuple], atom: str) -> str | None:
    """True, False or Uncertain by trying every truth assignment; None for premises that contradict."""
    atoms = sorted({a for _, *parts in premises for a, _ in parts} | {atom})
    left = every = (1 << 2 ** len(atoms)) - 1  # a set of worlds: bit w is world w, atom i true if w has bit i
    where = {a: every // (2**2**i + 1) << 2**i for i, a in enumerate(atoms)}
    for kind, *literals in premises:
        p, *q = (where[a] if positive else every ^ where[a] for a, positive in literals)
        left &= p if kind == "fact" else every ^ p | q[0] if kind == "all" else p ^ q[0]
    yes, no = left & where[atom], left & ~where[atom]
    return "Uncertain" if yes and no else "True" if yes else "False" if no else None


def clauses_of(premise: tuple) -> list[tuple[Literal, Literal]]:
    """Rules p => q of a premise, contrapositives and both sides of an xor."""
    kind, p, *q = premise
    if not q:
        return []
    flip = lambda x: (x[0], not x[1])  # noqa: E731
    xor = [(p, flip(q[0])), (flip(p), q[0]), (q[0], flip(p)), (flip(q[0]), p)]
    return xor if kind == "xor" else [(p, q[0]), (flip(q[0]), flip(p))]


def derive(premises: Sequence[tuple], atom: str) -> list[tuple[Literal, Literal]] | None:
    """The shortest chain of rules from a fact to the atom; None where unit propagation does not reach it."""
    rules = [rule for premise in premises for rule in clauses_of(premise)]
    chains: dict[Literal, list] = {p[1]: [] for p in premises if p[0] == "fact"}
    edge = list(chains)
    for here in edge:  # breadth first: it grows while it is walked
        if here[0] == atom:
            return chains[here]
        for p, q in rules:
            if p == here and q not in chains:
                chains[q] = [*chains[here], (p, q)]
                edge.append(q)
    return None


def make_logic(rng: np.random.Generator, test: bool, ood: bool = False) -> Item:
    """A hypothesis about an invented person under 4 to 6 premises; its label by exhaustive assignment."""
    label = ("True", "False", "Uncertain")[rng.integers(3)]

    def attempt() -> Item | None:
        name = "".join(rng.choice(SYLLABLES, rng.integers(2, 4))).capitalize()
        if (stable(name) == 0) != test:
            return None
        pool = rng.choice(ADJECTIVES, 6, replace=False).tolist()
        premises: list[tuple] = [("fact", (pool[0], bool(rng.random() < 0.7)))]
        for _ in range(int(rng.integers(3, 6))):
            a, b = rng.choice(pool, 2, replace=False).tolist()
            xor = rng.random() < 0.3
            premises.append(("xor" if xor else "all", (a, True), (b, xor or bool(rng.random() < 0.7))))
        pairs = [frozenset((p[0], q[0])) for _, p, q in premises[1:]]
        atom = pool[rng.integers(1, 6)]
        if len(set(pairs)) < len(pairs) or logic_label(premises, atom) != label:
            return None
        chain = derive(premises, atom) if label != "Uncertain" else []
        decided = label == "Uncertain" or chain and len(chain) <= 3
        if not decided or not any(atom in pair for pair in pairs):
            return None
        mixed = [premises[i] for i in rng.permutation(len(premises))]
        return logic_item(mixed, atom, name, label, chain or [], ood)

    return draw_until(attempt)


def logic_item(premises: Sequence[tuple], atom: str, name: str, label: str, chain: list, ood: bool) -> Item:
    """Text, gold lines and program of a logic question."""
    said = lambda kind, *parts: SENTENCES[kind][ood].format(*(literal(*p) for p in parts), name=name)  # noqa: E731
    asked = f"Does it follow that {name} is {atom}?" if ood else f"Is {name} {atom}?"
    steps = [f"{literal(*p)} gives {literal(*q)}" for p, q in chain] or [f"nothing decides {atom}"]
    fact = next(literal(*p[1]) for p in premises if p[0] == "fact")
    question, program = " ".join([*(said(*p) for p in premises), asked]), z3_program(premises, atom)
    return Item("logic", question, label, tuple(steps), fact, atom, program, (), (tuple(premises), atom))


UNWANTED = re.compile(  # drugs, arms, sex, punishment: nothing that a question needs
    r"gallows|gibbet|guillotin|tortur|thumbscrew|gas cham|death|brothel|bordello|whore|porn|dildo|condom"
    r"|contracept|pessary|diaphragm|bomb|weapon|grenade|cocaine|heroin|\bcrack$|opiate|opium|morphine"
    r"|hashish|cannabis|marijuana|amphetamine|hallucinogen|narcotic|slave|bitch|jackass|\btits?$"
    r"|\bcock$|booby|dung|turd|lynch|noose|enema"
)


class Taxonomy:
    """The part of WordNet that the questions are about: names that mean one thing, and what is above them.

    up: {name: its hypernym's name}, below: the inverse; above: {name: all names above}; gloss; cut: {name:
    True for the test's half, False for training's, None above the cut}; names of each half, sorted.
    """

    def __init__(self) -> None:
        topics = ("noun.animal", "noun.plant", "noun.food", "noun.artifact")
        found = [s for topic in topics for s in wordnet.all_synsets(topic) if not s.is_instance]
        count = collections.Counter(s.lemmas[0] for s in found)
        clear = re.compile(r"(?=.{3,15}$)[a-z]+( [a-z]+)?")
        kept = {s for s in found if count[s.lemmas[0]] == 1 and clear.fullmatch(s.lemmas[0]) and s.hypernyms}
        kept = {s for s in kept if not UNWANTED.search(s.lemmas[0])}
        self.up = {s.lemmas[0]: s.hypernyms[0].lemmas[0] for s in kept if s.hypernyms[0] in kept}
        self.gloss = {s.lemmas[0]: s.definition for s in kept}
        self.above = {s.lemmas[0]: {a.lemmas[0] for a in s.ancestors} for s in kept if s.lemmas[0] in self.up}
        self.below: dict[str, list[str]] = collections.defaultdict(list)
        for name, parent in self.up.items():
            self.below[parent].append(name)
        self.cut = {s.lemmas[0]: self._half(s) for s in kept}
        self.names = {t: sorted(n for n in self.up if self.cut[n] is t) for t in (False, True)}

    @staticmethod
    def _half(synset: Any) -> bool | None:
        names = [synset.lemmas[0]]
        while synset.hypernyms:
            synset = synset.hypernyms[0]
            names.insert(0, synset.lemmas[0])
        at = 9 if "organism" in names else 6
        return stable(names[at]) == 0 if len(names) > at else None

    def passage(self, name: str) -> str:
        """What a search can find under this name: the hypernym sentence, then the gloss."""
        return f"{is_a([name, self.up[name]])[0]}. {self.gloss[name]}".capitalize()


@functools.cache
def taxonomy() -> Taxonomy:
    """The taxonomy, read once (2 s)."""
    return Taxonomy()


def article(name: str) -> str:
    """ "a penguin", "an eagle"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def is_a(chain: Sequence[str]) -> list[str]:
    """Lines "a penguin is a seabird" of a chain of names."""
    return [f"{article(x)} is {article(y)}" for x, y in itertools.pairwise(chain)]


def climb(tax: Taxonomy, name: str, target: str) -> tuple[str, ...]:
    """Names that a perfect agent looks up: the hypernyms until the target is found, at most three."""
    seen: tuple[str, ...] = ()
    while len(seen) < 3 and name != target and name in tax.up:
        seen, name = (*seen, name), tax.up[name]
    return seen


def siblings(tax: Taxonomy, chain: Sequence[str]) -> list[str]:
    """Names beside the chain's end that are not above its start, of the same half of the split."""
    beside, half = tax.below[tax.up[chain[-1]]], tax.cut[chain[0]]
    return [n for n in beside if n not in tax.above[chain[0]] and tax.cut[n] is half and n != chain[-1]]


def fact_chain(rng: np.random.Generator, test: bool, hops: int) -> tuple[list[str], str]:
    """(chain of hops + 1 names, target): its end or, half of the time, a sibling of that, at equal depth."""
    tax = taxonomy()

    def attempt() -> tuple[list[str], str] | None:
        chain = [tax.names[test][rng.integers(len(tax.names[test]))]]
        while len(chain) <= hops and tax.cut.get(parent := tax.up.get(chain[-1], "")) is test:
            chain.append(parent)
        if len(chain) <= hops or chain[-1] not in tax.up or not (beside := siblings(tax, chain)):
            return None
        return chain, chain[-1] if rng.random() < 0.5 else beside[rng.integers(len(beside))]

    return draw_until(attempt)


def make_commonsense(rng: np.random.Generator, test: bool, ood: bool = False) -> Item:
    """ "Is every x a y?" over one to three hypernym steps."""
    chain, target = fact_chain(rng, test, int(rng.integers(1, 4)))
    plain = f"Is every {chain[0]} {article(target)}?"
    asked = f"Can one call {article(chain[0])} also {article(target)}?" if ood else plain
    return Item("commonsense", asked, str(chain[-1] == target), tuple(is_a(chain)), chain[0], target,
                searches=climb(taxonomy(), chain[0], target), extra=(tuple(chain), target))  # fmt: skip


def hybrid_steps(n: int, c: int, d: int, slips: Mapping[int, int] = {}) -> tuple[list[str], str]:
    """(lines, answer) of n * c + d."""
    done = run_steps([(n, "*", c), ("r1", "+", d)], slips)
    return [step_text(*x) for x in done], str(done[-1][3])


def make_hybrid(rng: np.random.Generator, test: bool, ood: bool = False) -> Item:
    """A fact selects the number that a computation starts from."""
    hops, a, b = int(rng.integers(1, 3)), 0, 0
    while a == b:
        chain, target = fact_chain(rng, test, hops)
        a, b, c, d = (int(x) for x in rng.integers((10, 10, 2, 2), (40, 40, 7, 30)))
    n, what = a if chain[-1] == target else b, article(target)
    text = (
        f"Take {a} if every {chain[0]} is {what}, else {b}. Multiply by {c} and add {d}. What is the result?"
    )
    if ood:
        text = f"What is {c} times n, plus {d}? Here n is {a} when {article(chain[0])} is {what}, or {b}."
    lines, answer = hybrid_steps(n, c, d)
    program = f"def solver():\n p = {n} * {c}\n q = p + {d}\n return q\nans = solver()"
    made = (tuple(chain), target, (a, b, c, d))
    return Item("hybrid", text, answer, (*is_a(chain), *lines), f"{a} {b} {c} {d}", f"{chain[0]} {target}",
                program, climb(taxonomy(), chain[0], target), made)  # fmt: skip


KINDS = ("math", "logic", "commonsense", "hybrid")
MAKERS = {"math": make_math, "logic": make_logic, "commonsense": make_commonsense, "hybrid": make_hybrid}


def make_items(kind: str, count: int, seed: int, test: bool = True, ood: bool = False) -> list[Item]:
    """`count` questions of a kind without repetition."""
    rng, found = np.random.default_rng([seed, KINDS.index(kind), test, ood]), dict[str, Item]()
    while len(found) < count:
        item = MAKERS[kind](rng, test, ood)
        found.setdefault(item.question, item)
    return list(found.values())
