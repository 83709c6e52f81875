"""Chapter meddistract: oracles for its definitions, its bad inputs, its path for one's own checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import types
from collections import Counter

import numpy as np
import pytest
import readrun
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter
from readrun.llm import LLMError, Reply, ScriptedLLM
from whole_script import run_script

q = chapter("meddistract")
WORLD = q.make_world(0, 24, 36, 6)
BIG = q.make_world(3)
VARIANTS = q.make_variants(WORLD, 60, seed=5)


@pytest.fixture(autouse=True)
def _run(tmp_path, monkeypatch):
    """Functions of the experiment read the run's device."""
    made = readrun.start("meddistract", profile="smoke", device="cpu", out=str(tmp_path / "run"))
    monkeypatch.setattr(q, "run", made, raising=False)


def tiny(kind: str = "llama", seed: int = 0, vocab: int = 64, room: int = 128):
    """A random model of one of two families."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(seed)
    return cls(
        config(
            vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, bos_token_id=None,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=room, pad_token_id=0,
            eos_token_id=2, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def small_llm(seed: int = 0, room: int = 320):
    tokenizer = q.make_tokenizer(WORLD)
    return q.SharedPrefixLLM(tiny(seed=seed, vocab=len(tokenizer), room=room), tokenizer)


# ---------------------------------------------------------------- world and items


def brute_decide(world, findings, options):
    """The rule by loops over the weight matrix."""
    scores = []
    for d in options:
        total = 0
        for f, x in findings.items():
            total += int(world.weights[world.conditions.index(d)][world.findings.index(f)]) * x
        scores.append(total)
    ranked = sorted(scores, reverse=True)
    return options[scores.index(ranked[0])], ranked[0] - ranked[1]


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_decide_against_brute_force(seed) -> None:
    rng = random.Random(seed)
    options = rng.sample(BIG.conditions, 4)
    findings = {f: rng.choice((-1, 0, 1)) for f in rng.sample(BIG.findings, 6)}
    assert BIG.decide(findings, options) == brute_decide(BIG, findings, options)


@pytest.mark.parametrize("difficulty", ["hard", "easy"])
def test_items_have_exactly_one_best_option(difficulty) -> None:
    rng, families = random.Random(0), []
    for _ in range(150):
        item = q.make_item(BIG, rng, difficulty)
        q.check_item(item)
        answer, margin = brute_decide(BIG, item.findings, item.options)
        assert answer == item.answer and margin >= 2 and 3 <= len(item.findings) <= 6
        words = Counter(w for w in re.findall("[a-z]+", item.stem) if w in BIG.known)
        assert words == Counter(dict.fromkeys(item.findings, 1)), "every finding of the chart, named once"
        families.append(len({BIG.family[BIG.conditions.index(o)] for o in item.options}))
    assert set(families) == ({1} if difficulty == "hard" else {2, 3, 4} & set(families))


def test_weights_are_those_that_the_chapter_describes() -> None:
    assert set(np.unique(BIG.weights)) == {-2, -1, 0, 1, 2, 3}
    for d in range(96):
        row = BIG.weights[d]
        assert (row > 0).sum() == 6 and (row < 0).sum() <= 2
        assert sum(f in q.TEST_WORDS for f in BIG.typical(BIG.conditions[d])) == 1
        mates = BIG.weights[(BIG.family == BIG.family[d])]
        assert ((mates > 0).all(0)).sum() == 3, "three findings are shared by the family"
    assert len(BIG.findings) == 120 and len(set(BIG.findings) & set(q.POLYSEMOUS)) >= 60
    assert not np.array_equal(q.make_world(0).weights, BIG.weights)


def test_options_alone_say_nothing() -> None:
    """All positions and all conditions of a family are right equally often (chi-square)."""
    rng = random.Random(1)
    items = [q.make_item(WORLD, rng) for _ in range(1200)]
    exam = q.make_variants(WORLD, 48, 2)["clean"]
    assert Counter(i.answer for i in exam) == dict.fromkeys(WORLD.conditions, 2), "the exam is balanced"
    places = Counter(i.options.index(i.answer) for i in items)
    answers = Counter(i.answer for i in items)
    assert scipy.stats.chisquare(list(places.values())).pvalue > 1e-3
    assert len(answers) == 24 and scipy.stats.chisquare(list(answers.values())).pvalue > 1e-3


# ---------------------------------------------------------------- distractors


def test_no_distractor_changes_the_answer() -> None:
    """Metamorphic: the perfect reader is right on every variant, in both prompt styles."""
    reader = q.RuleLLM(WORLD)
    for items in VARIANTS.values():
        assert q.evaluate(reader, items).correct.all()
        assert q.evaluate(reader, items[:10], "generate").correct.all()
        assert q.evaluate(reader, items[:10], "generate", "paper").correct.all()
        assert all(a.findings == b.findings for a, b in zip(VARIANTS["clean"], items, strict=True))


def test_the_blind_reader_is_misled_where_it_should_be() -> None:
    blind, at = q.BagOfFindings(WORLD), {}
    for name, items in VARIANTS.items():
        at[name] = q.evaluate(blind, items)
    assert at["clean"].correct.all() and at["neutral"].correct.all() and at["echo"].correct.all()
    for kind in ("nonliteral", "bystander"):
        assert at[kind].accuracy < 0.95
        assert (at[kind].correct == at["bystander"].correct).all(), "both kinds name the same term"
        owners = [i.options.index(i.meta["owner"]) for i in VARIANTS[kind]]
        wrong = ~at[kind].correct
        assert (at[kind].picks == owners)[wrong].all(), "every error picks the owner of the term"
    right = np.array([i.options.index(i.answer) for i in VARIANTS["clean"]])
    rows = np.arange(len(right))
    gain = at["congruent"].logliks[rows, right] - at["clean"].logliks[rows, right]
    assert (gain > 0).all(), "a finding of the right option adds to it"


def test_terms_belong_to_whom_they_should() -> None:
    for name, items in VARIANTS.items():
        for item in items[:40]:
            if name in ("nonliteral", "bystander"):
                assert item.meta["owner"] != item.answer and item.meta["term"] in q.TEST_WORDS
                weights = {o: WORLD.weight(o, item.meta["term"]) for o in item.options}
                assert weights[item.meta["owner"]] >= 1 and sum(w > 0 for w in weights.values()) == 1
            elif name == "congruent":
                assert item.meta["owner"] == item.answer
            elif name == "echo":
                assert item.findings[item.meta["term"]] == 1
            if name not in ("clean", "echo", "neutral"):
                assert item.meta["term"] not in item.findings
            if name == "neutral":
                assert not WORLD.known & set(re.findall("[a-z]+", item.meta["sentence"]))


def test_the_control_is_as_long_and_as_strange_as_what_it_controls() -> None:
    variants = q.make_variants(WORLD, 250, seed=9)
    length = {
        k: np.mean([len(re.findall(r"\w+", i.meta["sentence"])) for i in v])
        for k, v in variants.items()
        if k != "clean"
    }
    both = (length["nonliteral"] + length["bystander"]) / 2
    assert abs(length["neutral"] - both) < 0.7


def test_every_control_is_the_twin_of_a_sentence_of_its_item() -> None:
    """Nonliteral: the same text but for the word. Bystander: the other frame of the pair, the same people."""

    def said_by(frame: str, text: str) -> re.Match[str] | None:
        named = re.sub(r"\{(\w+)\}", r"(?P<\1>\\w+)", frame.lower())
        return re.fullmatch(named, text.lower())

    twins = Counter()
    for k, control in enumerate(VARIANTS["neutral"]):
        kind, said = control.meta["twin"], control.meta["sentence"]
        other, term = VARIANTS[kind][k].meta["sentence"], VARIANTS[kind][k].meta["term"]
        twins[kind, k % 2] += 1
        if kind == "nonliteral":
            assert re.sub(rf"\b{control.meta['term']}\b", term, said) == other
        else:
            both = [(said_by(sick, other), said_by(well, said)) for sick, well in q.TEST.bystander]
            found = [(a, b) for a, b in both if a and b]
            assert len(found) == 1
            a, b = (m.groupdict() for m in found[0])
            assert a.pop("f") == term and b.pop("w") == control.meta["term"] and a == b
    assert set(twins.values()) == {15}, "half each, and half of each in either half of the items"


def test_owner_share_has_a_control(monkeypatch) -> None:
    """By hand: one model that always errs towards the owner, with and without the term."""
    right = q.answers_of(VARIANTS["clean"])
    owners = np.array([i.options.index(i.meta["owner"]) for i in VARIANTS["nonliteral"]])
    third = np.array([min({0, 1, 2, 3} - {a, b}) for a, b in zip(right, owners, strict=True)])
    picks = np.tile(right, (6, 1))
    picks[2, :10], picks[3, :20] = owners[:10], owners[:20]
    picks[1, :4] = [owners[0], *third[1:4]]
    unit = type("Done", (dict,), {"done": True})(picks=picks[None])
    setting = dict(exam=lambda key, n: VARIANTS, key=(), answers=right, trained={("base", "a", 3): unit})
    setting |= dict(S=types.SimpleNamespace(sizes={"a": []}, test={"n": 60}))
    for name, value in (setting | {"run": types.SimpleNamespace(seeds=[3])}).items():
        monkeypatch.setattr(q, name, value, raising=False)
    q.gather_mechanism(metrics := {}, {})
    assert (
        metrics["owner_share"] == {"base": {3: 1.0}, "neutral": {3: 0.25}} and "mended_share" not in metrics
    )


def test_nothing_of_the_test_occurs_in_training_text() -> None:
    rng = random.Random(0)
    rows = q.training_rows(WORLD, 0, 1500, 0.5) + q.training_rows(WORLD, 1, 1500, 0.0, distract=1.0)
    rows += q.facts(WORLD, 0, 200)
    pages = q.build_textbook(WORLD, 100)
    text = " ".join(t for t, _ in rows) + " ".join(pages)
    seen = set(re.findall(r"\w+", text))
    for words in (q.TEST.people, q.TEST.animals, q.TEST.neutral):
        assert not set(words) & seen
    frames = [f for g in q.TEST.nonliteral.values() for f in g] + [
        f for pair in q.TEST.bystander for f in pair
    ]
    for frame in frames:
        longest = max(re.sub(r"\{\w+\}", "|", frame).strip(" .|").split("|"), key=len).strip()
        assert longest not in text, frame
    # the everyday sense of a test word: only chart sentences, facts and pages may hold it
    for stem, _ in q.training_rows(WORLD, 2, 800, 0.0, distract=1.0):
        for sentence in q.sentences(stem.partition("[A]")[0].removeprefix("Question: ")):
            if set(re.findall("[a-z]+", sentence)) & set(q.TEST_WORDS):
                assert q.RuleLLM(WORLD).findings(sentence), sentence
    uses = [q.story(WORLD, rng)[0] for _ in range(800)]
    starts = tuple(re.sub(r".*\{x\} (\w+ ?\w*).*", r"\1", f) for g in q.STORY_USE.values() for f in g)
    for sentence in itertools.chain.from_iterable(map(q.sentences, uses)):
        if any(f" {s} " in sentence for s in starts):
            assert not set(re.findall("[a-z]+", sentence)) & set(q.TEST_WORDS)


def test_splits_are_disjoint() -> None:
    assert not set(q.TRAIN_WORDS) & set(q.TEST_WORDS) and len(q.TEST_WORDS) == pytest.approx(0.3 * 95, abs=2)
    assert {q.sense_group(w) for w in q.TEST_WORDS} == {"thing", "event", "idea"}
    for part in ("people", "animals", "neutral"):
        assert not set(getattr(q.TRAIN, part)) & set(getattr(q.TEST, part))
    assert set(q.POLYSEMOUS) <= set(q.NOUNS) and not set(q.SINGLE) & set(q.POLYSEMOUS)
    train_items = {stem for stem, _ in q.training_rows(WORLD, 0, 500)}
    assert not any(f"{q.item_prompt(i)} {q.ANSWER}" in train_items for i in VARIANTS["clean"])


def test_training_with_distractors_keeps_the_answers() -> None:
    reader = q.RuleLLM(WORLD)
    inserted = 0
    for prompt, answer in q.training_rows(WORLD, 4, 150, distract=1.0):
        stem, options = q.read_question([{"role": "user", "content": prompt}])
        best, _ = WORLD.decide(reader.findings(stem), options)
        assert answer == f"{best} [{'ABCD'[options.index(best)]}]."
        inserted += len(reader.findings(stem)) < len(q.sentences(stem)) - 2 - stem.count("pulse")
    assert inserted > 0


# ---------------------------------------------------------------- insertion

WORDS = st.lists(
    st.sampled_from(["fever", "3.5", "mg", "e.g.", "Dr.", "a", "rash", "no", "12,000"]),
    min_size=1,
    max_size=5,
)
SENTENCE = st.builds(lambda w, end: " ".join(w).rstrip(".") + end, WORDS, st.sampled_from(".!?"))


@given(st.lists(SENTENCE, min_size=1, max_size=5), SENTENCE)
@settings(deadline=None)
def test_insertion_round_trip(parts, sentence) -> None:
    stem = " ".join(parts)
    after = q.insert_before_question(stem, sentence)
    question = q.sentences(stem)[-1]
    assert after.endswith(f"{sentence} {question}")
    assert q.remove_sentence(after, sentence) == stem


def test_insertion_position_and_quotes() -> None:
    stem = "A man took 3.5 mg.  He fell! What now?"
    assert q.insert_before_question(stem, ' "A cat." ') == "A man took 3.5 mg. He fell! A cat. What now?"
    assert q.insert_before_question("Why?", "A cat.") == "A cat. Why?"
    for item in VARIANTS["bystander"]:
        assert q.sentences(item.stem)[-2] == item.meta["sentence"]
        assert q.remove_sentence(item.stem, item.meta["sentence"]) in {c.stem for c in VARIANTS["clean"]}


# ---------------------------------------------------------------- reading answers

TABLE = [
    ("Therefore, the final answer is [A].", "A"), ("Therefore, the final answer is [B]", "B"),
    ("therefore, the FINAL answer is [C].", "C"), ("The final answer is: [D].", "D"),
    ("the final answer is **[A]**.", "A"), ("the final answer is $[B]$", "B"),
    ("Therefore, the final answer is brona [C].", "C"), ("the final answer\nis [D].", "D"),
    ("The final answer is [A]. Wait, the final answer is [B].", "B"), ("final answer is [A][B]", "A"),
    ("The patient is Caucasian. Therefore, the final answer is [B].", "B"),
    ("The cause is Coxsackie. The final answer is [D].", "D"), ("the answer is [A].", None),
    ("Answer: A", None), ("A", None), ("[C]", None), ("", None), ("\\boxed{B}", None),
    ("the final answer is B.", None), ("the final answer is (C).", None), ("the final answer is [E].", None),
    ("the final answer is [b].", None), ("the final answer is [AB].", None),
    ("the final answer is [].", None),
    ("the final answer is unclear. [A] is possible.", None), ("The final answer was [A].", None),
    ("the final answer isn't [A].", None), ("final answers is [A]", None), ("I think it is A.", None),
    ("Option B is best.", None), ("**C**", None), ("the final answer is [ A ].", None),
    ("My final answer is [A], not [B].", "A"), ("So the final answer is: **brona** [B].", "B"),
    ("the final answer is\n\n[C]", "C"), ("final answer is[D]", "D"),
    ("[A] is wrong, [B] is wrong; the final answer is [C].", "C"),
    ("The final answer is [A]. Not [D].", "A"), ("the final answer is {[B]}", "B"),
    ("Final Answer is [C]!", "C"), ("the final answer is [D]. The final answer is E.", "D"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), TABLE)
def test_strict_parser_table(text, letter) -> None:
    assert q.parse_answer(text) == letter


@given(st.text(max_size=60), st.sampled_from("ABCD"), st.text(alphabet="abc \n", max_size=20))
@settings(deadline=None, max_examples=60)
def test_the_requested_form_always_parses(before, letter, after) -> None:
    assert q.parse_answer(f"{before} Therefore, the final answer is [{letter}].{after}") == letter


def test_lenient_parser_falls_into_the_trap() -> None:
    assert len(q.LENIENT) == 16
    assert q.parse_answer_lenient("The patient is Caucasian; the final answer is [B].") == "C"
    assert q.parse_answer_lenient("Therefore, the final answer is [B].") == "B"
    assert q.parse_answer_lenient("nothing") is None
    differ = sum(q.parse_answer(t) != q.parse_answer_lenient(t) for t, _ in TABLE)
    assert differ >= 10


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_shared_prefix_equals_independent_passes(kind) -> None:
    """Unpadded rows one by one are the oracle; prompts and options differ in length."""
    model, rng = tiny(kind), np.random.default_rng(0)
    draw = lambda n: rng.integers(3, 64, n).tolist()  # noqa: E731
    prompts = [draw(n) for n in (5, 17, 9)]
    options = [[draw(n) for n in row] for row in ((1, 3, 2, 4), (5, 1, 1, 2), (2, 2, 6, 3))]
    expected = []
    with torch.no_grad():
        for prompt, row in zip(prompts, options, strict=True):
            expected.append([])
            for option in row:
                logp = model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
                at = range(len(prompt) - 1, len(prompt) + len(option) - 1)
                expected[-1].append(sum(logp[i, t].item() for i, t in zip(at, option, strict=True)))
    for k in range(4):  # the same from rows padded on the right
        rows = [p + o[k] for p, o in zip(prompts, options, strict=True)]
        padded = torch.tensor([r + [0] * (24 - len(r)) for r in rows])
        with torch.no_grad():
            logp = model(padded, attention_mask=(padded != 0).long()).logits.log_softmax(-1)
        for r, (prompt, row) in enumerate(zip(prompts, options, strict=True)):
            got = sum(logp[r, len(prompt) - 1 + i, t].item() for i, t in enumerate(row[k]))
            assert got == pytest.approx(expected[r][k], abs=1e-4)
    shared = q.score_options(model, prompts, options)
    assert np.allclose(shared, expected, atol=1e-4)
    assert np.allclose(q.score_options_four_passes(model, prompts, options), expected, atol=1e-4)
    one = [[[o[0]] for o in row] for row in options]  # single tokens: nothing is packed
    assert np.allclose(
        q.score_options(model, prompts, one), q.score_options_four_passes(model, prompts, one), atol=1e-4
    )
    many = q.score_encoded(model, list(zip(prompts, options, strict=True)), 0, batch_size=2)
    assert np.allclose(many, expected, atol=1e-4), "the order of the items is kept"


def test_packing_by_hand() -> None:
    ids, positions, allowed, width = q.pack_options([[5, 6], [7, 8, 9]], [[[1, 2], [3, 4]], [[1], [2, 3]]], 0)
    assert width == 3 and ids.shape == (2, 11)
    assert ids[:, :5].tolist() == [[0, 5, 6, 1, 3], [7, 8, 9, 2, 0]]
    assert positions[:, :5].tolist() == [[0, 0, 1, 2, 2], [0, 1, 2, 3, 0]]
    assert allowed[0, 4, :5].int().tolist() == [0, 1, 1, 0, 1], "an option does not see the other one"


def test_loglik_and_generate_modes_of_the_harness() -> None:
    llm, items = small_llm(), VARIANTS["clean"][:8]
    found = q.evaluate(llm, items)
    for item, row in zip(items[:3], found.logliks[:3], strict=True):
        one = llm.loglik(q.conversation(item, "short", "loglik"), list(item.options))
        assert np.allclose(one, row, atol=1e-4)
    again = q.evaluate(llm, items)
    assert (again.logliks == found.logliks).all() and (found.picks == found.logliks.argmax(1)).all()
    wrote = q.evaluate(llm, items, "generate", max_tokens=4)
    assert wrote.texts is not None and len(wrote.texts) == 8 and wrote.invalid.dtype == bool
    assert not (wrote.correct & wrote.invalid).any()


def test_invalid_answers_are_counted_and_never_dropped() -> None:
    items = VARIANTS["clean"][:4]
    right = ["ABCD"[i.options.index(i.answer)] for i in items]
    llm = ScriptedLLM(
        [f"so the final answer is [{right[0]}].", "no idea", Reply(f"final answer is [{right[2]}]"), "[A]"]
    )
    found = q.evaluate(llm, items, "generate", "paper")
    assert found.correct.tolist() == [True, False, True, False]
    assert found.invalid.tolist() == [False, True, False, True]
    assert found.accuracy == 0.5 and found.effective_accuracy == 1.0
    with pytest.raises(LLMError):
        q.evaluate(ScriptedLLM(["x"] * 4), items)  # no log-likelihoods


def test_openai_compatible_server() -> None:
    """The harness over a loopback server, through readrun's OpenAI client."""
    pytest.importorskip("openai")
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from readrun.llm import OpenAILLM

    reader, asked = q.RuleLLM(WORLD), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            text = reader.generate(body["messages"])[0].text
            answer = json.dumps({
                "id": "1", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop",
                             "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        llm = OpenAILLM(f"http://127.0.0.1:{server.server_port}/v1", "m", top_logprobs=0)
        assert q.evaluate(llm, VARIANTS["bystander"][:3], "generate", "paper").correct.all()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "## Instructions" in asked[0]["messages"][0]["content"]


# ---------------------------------------------------------------- statistics


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@settings(deadline=None)
def test_paired_stats_by_definition(pairs) -> None:
    base, dist = (np.array(v) for v in zip(*pairs, strict=True))
    found, d = q.paired_stats(base, dist), base.astype(float) - dist
    assert found["delta"] == pytest.approx(d.mean())
    assert found["se_paired"] == pytest.approx(math.sqrt(d.var() / len(d)), abs=1e-12)
    b, c = int((d > 0).sum()), int((d < 0).sum())
    p = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert found["mcnemar_p"] == pytest.approx(p)
    unpaired = math.sqrt((base.var() + dist.var()) / len(d))
    assert found["se_unpaired"] == pytest.approx(unpaired)


def test_paired_stats_against_a_bootstrap_and_identical_inputs() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.8
    dist = base & (rng.random(400) < 0.85) | (rng.random(400) < 0.03)
    rows = rng.integers(0, 400, (4000, 400))
    boot = (base[rows].mean(1) - dist[rows].mean(1)).std()
    found = q.paired_stats(base, dist)
    assert found["se_paired"] == pytest.approx(boot, rel=0.05) and found["se_unpaired"] > 1.3 * boot
    same = q.paired_stats(base, base)
    assert same["delta"] == same["se_paired"] == 0 and same["mcnemar_p"] == 1


def test_welch_against_its_formula() -> None:
    a, b = [0.1, 0.15, 0.2, 0.12], [0.05, 0.06, 0.02]
    va, vb = np.var(a, ddof=1) / 4, np.var(b, ddof=1) / 3
    t = (np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    found = q.group_welch(a, b)
    assert found["t"] == pytest.approx(t) and found["p"] == pytest.approx(2 * scipy.stats.t.sf(t, df))


def test_split_halves_are_not_fooled_by_noise() -> None:
    """All models are alike: the naive correlation is positive from noise alone, the split one is not."""
    rng, naive, split = np.random.default_rng(0), [], []
    for i in range(30):
        base, dist = rng.random((40, 200)) < 0.8, rng.random((40, 200)) < 0.6
        found = q.robustness_vs_baseline(base, dist, np.arange(40), draws=1, seed=i)
        naive.append(found["naive"])
        split.append(found["rho"])
    assert np.mean(naive) > 0.4 and abs(np.mean(split)) < 0.1


def test_robustness_finds_what_is_there() -> None:
    rng = np.random.default_rng(1)
    level = np.repeat(np.linspace(0.5, 0.95, 12), 3)
    base = rng.random((36, 1000)) < level[:, None]
    dist = (
        rng.random((36, 1000)) < (0.25 + (level - 0.25) * level)[:, None]
    )  # the better, the smaller the share lost
    runs = np.repeat(np.arange(12), 3)
    found = q.robustness_vs_baseline(base, dist, runs, draws=300)
    assert found["rho"] < -0.8 and found["low"] < found["rho"] < found["high"] < -0.5 and found["n"] == 36
    assert np.mean(list(found["pseudo"].values())) == pytest.approx(found["rho"], abs=0.1)
    floor = q.robustness_vs_baseline(base, dist, runs, floor=0.8, draws=1)
    assert floor["n"] < 36
    above = {str(r) for r in runs if base[runs == r][:, ::2].mean(1).max() >= 0.8}
    assert set(floor["pseudo"]) == above and len(above) < 12, "runs below the floor are no evidence"
    arrays = {f"correct/{k}": np.packbits(v, axis=1) for k, v in
              (("clean", base), ("nonliteral", dist), ("bystander", dist))}  # fmt: skip
    arrays |= {"correct/n": np.array([1000]), "correct/runs": runs}
    assert q.robustness_rho({}, arrays)["base"] == pytest.approx(list(found["pseudo"].values()))
    naive = q.robustness_naive({}, arrays)["base"]
    assert len(naive) == 12 and np.mean(naive) == pytest.approx(found["naive"], abs=0.1)


def test_size_at_equal_baselines_by_hand() -> None:
    base = np.zeros((3, 20))
    base[:, :16] = 1  # 0.8 on both halves
    dist = base.copy()
    dist[0, 1:12:2] = 0  # the smallest model loses 6 of the 8 it has on half B
    gap, pairs = q.size_at_matched_baseline(base, dist, [10, 20, 30])
    assert pairs == 3 and gap == pytest.approx((2 * 0.6 / 0.55 + 0) / 3)
    assert q.size_at_matched_baseline(base * 0, dist, [1, 2, 3])[1] == 0


def test_padding_share_by_hand() -> None:
    encoded = [([1] * n, []) for n in (4, 1, 2, 3)]
    assert q.padding_share(encoded, 2) == pytest.approx(1 - 10 / 12)


def test_coverage_of_both_forms() -> None:
    """Independent errors: both forms are right. Agreeing errors: the unpaired form covers too often."""
    independent = [0.56, 0.24, 0.14, 0.06]
    found = q.coverage(independent, 1273, 4000)
    assert abs(found["paired"].mean() - 0.95) < 0.012 and abs(found["unpaired"].mean() - 0.95) < 0.012
    agreeing = q.coverage([0.7, 0.12, 0.01, 0.17], 1273, 4000)
    assert abs(agreeing["paired"].mean() - 0.95) < 0.012 and agreeing["unpaired"].mean() > 0.97


def test_derived_metrics_by_hand() -> None:
    metrics = {"drop_nonliteral": {"base": [0.2, 0.1], "augmented": [0.05, 0.06]}}
    assert q.half_drop_left(metrics, {})["nonliteral"] == pytest.approx([0.05, -0.01])
    part = {"drop_bystander": {"base": [0.2, 0.1], "augmented": [0.01]}}  # only seed 4 has both arms
    ids = {"seeds/drop_bystander/base": np.array([3, 4]), "seeds/drop_bystander/augmented": np.array([4])}
    assert q.half_drop_left(part, ids)["bystander"] == pytest.approx([0.04])
    assert q.half_drop_left({}, {}) == {} and q.robustness_rho({}, {}) == {}
    clean, other = np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 1], bool)
    assert q.joint_table(clean, other) == [0.25, 0.5, 0.25, 0.0]


def test_calibration_takes_the_stem_away_and_turns_the_options() -> None:
    bare = q.no_stem(VARIANTS["bystander"][:3])
    assert len(bare) == 12 and Counter(i.options.index(i.answer) for i in bare) == dict.fromkeys(range(4), 3)
    assert all(len(q.sentences(i.stem)) == 1 for i in bare)


# ---------------------------------------------------------------- retrieval and the sceptic's rule


def test_retrieval_against_brute_force() -> None:
    pages = q.build_textbook(WORLD, 30)
    queries = [i.stem for i in VARIANTS["clean"][:5]]
    vectors = {t: np.random.default_rng(len(t)).normal(size=6) for t in pages + queries}
    ranks = q.retrieve(lambda texts: np.array([vectors[t] for t in texts]), queries, pages)
    for row, query in zip(ranks, queries, strict=True):
        cosine = [
            vectors[query] @ vectors[p] / np.linalg.norm(vectors[query]) / np.linalg.norm(vectors[p])
            for p in pages
        ]
        assert row.tolist() == np.argsort(-np.array(cosine), kind="stable").tolist()
    found = q.retrieve(
        q.lsa_encoder(pages), [f"{i.stem} {' '.join(i.options)}" for i in VARIANTS["clean"]], pages
    )
    right = [WORLD.conditions.index(i.answer) for i in VARIANTS["clean"]]
    family = WORLD.family[np.array(right)]
    assert (
        np.mean([WORLD.family[f] == g if f < 24 else False for f, g in zip(found[:, 0], family, strict=True)])
        > 0.8
    )


def test_textbook_and_context() -> None:
    pages = q.build_textbook(WORLD, 10)
    assert len(pages) == 34
    for d, page in zip(WORLD.conditions, pages, strict=False):
        middle = q.trim_edges(page)
        assert d in middle and all(f in middle for f in WORLD.typical(d))
        assert len(q.sentences(middle)) == len(q.sentences(page)) - 2
    item = q.with_context(VARIANTS["clean"][0], pages[0])
    assert q.item_prompt(item).startswith("Context: Typical of") and "## Context\nTypical" in q.item_prompt(
        item, "paper"
    )
    assert q.evaluate(q.RuleLLM(WORLD), [item]).correct.all()
    with pytest.raises(ValueError, match="three sentences"):
        q.trim_edges("One. Two.")


def test_bm25_prefers_the_page_with_the_words() -> None:
    pytest.importorskip("bm25s")
    pages = ["the cat sat on the mat", "fever and rash of the skin", "a long road"]
    assert q.bm25_ranks(["rash with fever"], pages)[0, 0] == 1


def test_encoders_of_the_hub(tmp_path) -> None:
    """CLS and mean pooling of a saved BERT against its hidden states."""
    from transformers import BertConfig, BertModel

    tokenizer = q.make_tokenizer(WORLD)
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **size)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["There is no fever.", "She reports rash and cough of the sea."]
    for pooling in ("cls", "mean"):
        got = q.transformers_encoder(str(tmp_path), pooling)(texts)
        for text, row in zip(texts, got, strict=True):
            with torch.no_grad():
                hidden = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
            assert np.allclose(row, (hidden[0] if pooling == "cls" else hidden.mean(0)).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="pooling"):
        q.transformers_encoder(str(tmp_path), "max")


def test_the_sceptics_rule_keeps_the_chart() -> None:
    for clean, other in zip(VARIANTS["clean"], VARIANTS["bystander"], strict=True):
        assert q.drop_other_subjects(clean.stem) == clean.stem
        assert q.RuleLLM(WORLD).findings(q.drop_other_subjects(other.stem)) == dict(clean.findings)
    kept = sum(i.meta["sentence"] in q.drop_other_subjects(i.stem) for i in VARIANTS["bystander"])
    assert kept < 6, "other people are deleted"


# ---------------------------------------------------------------- models


def test_every_text_is_in_the_vocabulary_and_names_are_one_token() -> None:
    tokenizer = q.make_tokenizer(BIG)
    assert len(tokenizer) < 1500
    names = tokenizer([f"{c}" for c in BIG.conditions], add_special_tokens=False).input_ids
    assert all(len(n) == 1 for n in names), "equal lengths: no option is favoured"
    rows = q.training_rows(BIG, 0, 200, 0.3, 0.5) + q.facts(BIG, 0, 50)
    ids, labels = q.encode_rows(
        tokenizer, rows + q.training_rows(BIG, 0, 50, pages=q.build_textbook(BIG, 20))
    )
    assert ids.shape == labels.shape and ((labels == -100) | (labels == ids)).all()
    answer = [t for t in labels[0].tolist() if t != -100]
    assert tokenizer.decode(answer[:-1]).replace(" ", "") == rows[0][1].replace(" ", "")
    for items in q.make_variants(BIG, 20, 1).values():
        assert all(
            len(p) < 320
            for p, _ in q.encode_items(q.SharedPrefixLLM(tiny(vocab=8, room=320), tokenizer), items)
        )


def test_answer_loss_is_the_mean_log_likelihood_of_answers() -> None:
    model = tiny(vocab=16)
    ids = torch.tensor([[5, 6, 7, 8, 2, 0], [5, 9, 9, 2, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 2, -100], [-100, -100, 9, 2, -100, -100]])
    logp = model(ids).logits.log_softmax(-1)
    expected = [logp[0, 1, 7], logp[0, 2, 8], logp[0, 3, 2], logp[1, 1, 9], logp[1, 2, 2]]
    assert q.answer_loss(model, (ids, labels)).item() == pytest.approx(-sum(expected).item() / 5, rel=1e-5)


def test_the_gpu_path_in_bfloat16() -> None:
    """Training under bf16 autocast and scoring with bf16 weights, as on a GPU, on tiny shapes."""
    model = tiny(vocab=16)
    ids = torch.tensor([[5, 6, 7, 8, 2, 0]] * 2)
    labels = torch.tensor([[-100, -100, 7, 8, 2, -100]] * 2)
    exact = q.answer_loss(model, (ids, labels)).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = q.answer_loss(model, (ids, labels))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.05)
    prompts, options = [[3, 4, 5], [6, 7]], [[[8, 9], [10], [11, 3], [4]]] * 2
    expected = np.array(q.score_options(model, prompts, options))
    half = np.array(q.score_options(model.bfloat16(), prompts, options))
    assert np.isfinite(half).all() and np.abs(half - expected).max() < 0.5


def test_batches_visit_every_row_once_per_epoch() -> None:
    ids = torch.arange(1, 13)[:, None].repeat(1, 3)
    seen = [b[0][:, 0].tolist() for b in q.batches(ids, ids, 6, 4, seed=1)]
    assert (
        sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(1, 13)) and seen[:3] != seen[3:]
    )


# ---------------------------------------------------------------- bad input


def test_bad_items_name_themselves() -> None:
    item, llm = VARIANTS["clean"][0], small_llm()
    for broken, words in (
        (dict(options=item.options[:3]), "four different"),
        (dict(options=(item.answer,) * 4), "four different"),
        (dict(answer="nobody"), "not among"), (dict(stem="  "), "empty"),
        (dict(stem=item.stem + " Quixotic?"), "does not have"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"item {item.id}.*{words}"):
            q.evaluate(llm, [dataclasses.replace(item, **broken)])
    with pytest.raises(ValueError, match=f"item {item.id}.*do not fit"):
        q.evaluate(small_llm(room=20), [item])
    nan = ScriptedLLM([], loglik=lambda messages, text: math.nan)
    with pytest.raises(ValueError, match=f"item {item.id}.*not a number"):
        q.evaluate(nan, [item])
    with pytest.raises(ValueError, match="mode"):
        q.evaluate(llm, [item], "guess")
    with pytest.raises(ValueError, match="style"):
        q.item_prompt(item, "long")


def test_bad_worlds_distractors_and_numbers() -> None:
    item, rng = VARIANTS["clean"][0], random.Random(0)
    for bad in ((0, 24, 36, 5), (0, 24, 36, 24), (0, 24, 10, 6), (0, 24, 500, 6), (0, 24, 36, 0)):
        with pytest.raises(ValueError, match="families|n_findings"):
            q.make_world(*bad)
    with pytest.raises(ValueError, match="difficulty"):
        q.make_item(WORLD, rng, "medium")
    with pytest.raises(ValueError, match="kind"):
        q.make_distractor(item, WORLD, "rumour", rng)
    patient = next(f for f, x in item.findings.items() if x > 0)
    for kind in ("nonliteral", "bystander", "bystander_congruent"):
        with pytest.raises(ValueError, match=f"item {item.id}"):
            q.make_distractor(item, WORLD, kind, rng, term=patient)
    with pytest.raises(ValueError, match="names"):
        q.make_distractor(item, WORLD, "neutral", rng, term=patient)
    for frame in (q.PRESENT[0], q.ABSENT[3]):  # a frame whose subject is the patient would change the answer
        wrong = dataclasses.replace(q.TEST, bystander=[(frame, frame)])
        with pytest.raises(ValueError, match=f"item {item.id}.*of the patient"):
            q.make_distractor(item, WORLD, "bystander", rng, wrong)
    with pytest.raises(ValueError, match="unknown"):
        WORLD.decide({"nothing": 1}, item.options)
    with pytest.raises(ValueError, match="unknown"):
        WORLD.decide({patient: 2}, item.options)
    for call in (lambda: q.insert_before_question("", "A cat."),
                 lambda: q.insert_before_question("Why?", ' "" '),
                 lambda: q.remove_sentence("A cat. Why?", "A dog."), lambda: q.parse_answer("x", 1),
                 lambda: q.paired_stats(np.ones(2), np.ones(3)),
                 lambda: q.paired_stats(np.ones(0), np.ones(0)),
                 lambda: q.coverage([0.5, 0.6, 0, 0], 10, 10), lambda: q.pack_options([[]], [[[1]]], 0),
                 lambda: q.retrieve(lambda t: np.ones((len(t), 2)), ["a"], []),
                 lambda: q.retrieve(lambda t: np.full((len(t), 2), np.nan), ["a"], ["b"]),
                 lambda: q.robustness_vs_baseline(np.ones((2, 4)), np.ones((2, 4)), [1]),
                 lambda: q.encode_rows(q.make_tokenizer(WORLD), [("Quixotic", "yes")])):  # fmt: skip
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------- real data, own checkpoint

REAL = [
    {"question": "A 23-year-old pregnant woman presents with burning upon urination. What now?",
     "answer": "Nitrofurantoin", "meta_info": "step2&3", "answer_idx": "D", "metamap_phrases": [],
     "options": {"A": "Ampicillin", "B": "Ceftriaxone", "C": "Doxycycline", "D": "Nitrofurantoin"}},
    {"question": "A baby is brought in. What is the cause?", "answer": "Mother", "meta_info": "step1",
     "answer_idx": "A", "options": {"A": "Mother", "B": "Father", "C": "Nobody", "D": "Diet"}},
]  # fmt: skip


def write_real(
    folder, rows=REAL, sentences=('"Her zodiac sign is Cancer."', "The aunt's fish had a heart attack.")
):
    data, more = folder / "test.jsonl", folder / "bystander.json"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    more.write_text(json.dumps([{"confounder_sentence": s, "index": i} for i, s in enumerate(sentences)]))
    return str(data), str(more)


def test_medqa_in_its_published_format(tmp_path) -> None:
    found = q.load_medqa(*write_real(tmp_path))
    assert [i.answer for i in found["clean"]] == ["Nitrofurantoin", "Mother"]
    assert found["distracted"][0].stem.endswith("urination. Her zodiac sign is Cancer. What now?")
    assert found["distracted"][1].options == found["clean"][1].options
    prompt = q.item_prompt(found["clean"][0], "paper")
    assert (
        "## Question\nA 23" in prompt and "[D] : Nitrofurantoin" in prompt and "final answer is [X]" in prompt
    )
    assert set(q.load_medqa(write_real(tmp_path)[0])) == {"clean"}


def test_bad_medqa_files(tmp_path) -> None:
    for change in ({"options": {"A": "x", "B": "y", "C": "z"}}, {"options": dict.fromkeys("ABCD", "x")},
                   {"answer_idx": "E"}, {"question": ""}):  # fmt: skip
        with pytest.raises(ValueError, match="dataset: test.jsonl, line 1"):
            q.load_medqa(write_real(tmp_path, [REAL[0] | change])[0])
    (tmp_path / "no.jsonl").write_text("not json")
    for name in ("no.jsonl", "nowhere.jsonl"):
        with pytest.raises(ValueError, match="dataset"):
            q.load_medqa(str(tmp_path / name))
    with pytest.raises(ValueError, match="3 sentences for 2"):
        q.load_medqa(*write_real(tmp_path, sentences=("a.", "b.", "c.")))
    data, more = write_real(tmp_path)
    (tmp_path / "bystander.json").write_text('[{"sentence": "a"}]')
    with pytest.raises(ValueError, match="distractors"):
        q.load_medqa(data, more)


def save_qwen2(folder, seed: int):
    """A random Qwen2 with a byte-level tokenizer and a chat template, sharded, in the published layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=special[1:2],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = tiny("qwen2", seed, vocab=-(-len(tokenizer) // 8) * 8, room=4096)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_checkpoint_path(tmp_path, capsys, monkeypatch) -> None:
    """The notebook in smoke on two checkpoints with real-format data: ends well, different numbers."""
    data, more = write_real(tmp_path)
    said = []
    for seed in (0, 1):
        folder = save_qwen2(tmp_path / f"model{seed}", seed)
        assert (folder / "model.safetensors.index.json").is_file()
        run_script(
            "meddistract", monkeypatch, profile="smoke", out=str(tmp_path / f"run{seed}"), only="own_model*",
            checkpoint=str(folder), dataset=data, distractors=more,
        )  # fmt: skip
        said.append(re.findall(r"(?:clean|distracted): accuracy.*", capsys.readouterr().out))
    assert len(said[0]) == 2 and said[0] != said[1]


def test_wrong_checkpoints(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="checkpoint:"):
        q.load_checkpoint(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="checkpoint"):
        readrun.start("meddistract", profile="smoke", checkpoint=str(tmp_path / "nowhere"))


def test_traffic_counts_what_is_read_and_written_between_products() -> None:
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    with torch.no_grad(), q.Traffic() as traffic:
        y = x * 2  # reads and writes 4 x 8 floats
        z = torch.cat([y, y])  # reads two of them, writes twice as many
        torch.nn.functional.linear(z.view(8, 8).T, w)  # views and products do not count
    assert traffic.bytes == 4 * (2 * 32 + 4 * 32)
    small = q.bytes_between_products(1, 8, [64, 1, 2, 2, 128, 16])
    assert q.bytes_between_products(2, 8, [64, 3, 2, 2, 128, 16]) == pytest.approx(6 * small, rel=0.05)


def test_seeds_needed_is_the_first_that_is_enough() -> None:
    d = np.array([0.013, 0.002, -0.005, -0.002, 0.005])
    n = int(q.seeds_needed(d, 0.0072).split()[0])
    half = lambda k: scipy.stats.t.ppf(0.975, k - 1) * d.std(ddof=1) / k**0.5  # noqa: E731
    assert half(n) <= 0.0072 < half(n - 1)
    assert q.seeds_needed(d, -0.01).startswith("no number")
