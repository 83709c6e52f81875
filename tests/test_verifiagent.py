"""Chapter verifiagent: oracles for its definitions, its bad inputs, its path for one's own checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
import types
from fractions import Fraction

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter, questions, sandbox
from readrun.llm import LLMError, Reply, ScriptedLLM, Usage
from whole_script import run_script

q = chapter("verifiagent")
isolated = pytest.mark.skipif(sandbox.report()["isolation"] == "none", reason="no isolation on this machine")


SEARCH = "Action: Use Search Engine[Who?]"


def agent_of(script, *tools: str, **options):
    """An agent that says what the script says; its tools observe "x"."""
    return q.VerifiAgent(ScriptedLLM(script), {t: lambda _: q.Observation("x") for t in tools}, **options)


# ---------------------------------------------------------------- parsers


PIECE = st.one_of(
    st.text(alphabet="abcé \n=+()[]", max_size=12).filter(lambda t: t.count("[") == t.count("]")),
    st.sampled_from(["x[0]", "[1, [2]]", "']'", '"["', "'''[\n'''", "# ]]\n", "f(a[i])"]),
)


def balanced_outside_strings(text: str) -> bool:
    return q.closing_bracket(text + "]", 0, True) == len(text)


@given(st.lists(PIECE, min_size=1, max_size=6).map("\n".join))
@settings(deadline=None, max_examples=200)
def test_action_round_trip(program) -> None:
    if not program.strip() or not balanced_outside_strings(program):
        return
    got = q.parse_action(f"Thought: x\nAction: Use Python Interpreter[{program}]\nAction: Evaluate[Correct]")
    assert got == q.PythonAction(program.strip())


@given(st.lists(st.one_of(st.text(max_size=40), st.sampled_from(q.POSES)), max_size=4).map("\n".join))
@settings(deadline=None, max_examples=100)
def test_garbage_never_crashes(text) -> None:
    q.parse_meta(text)
    for candidate in (text, f"Action: Use Theorem Prover[{text}"):
        try:
            q.parse_action(candidate)
        except q.ActionError as error:
            assert str(error)
    with pytest.raises(q.ActionError, match="no action"):  # what is quoted cannot act
        q.parse_action(q.quote(text))


def test_first_action_at_the_beginning_of_a_line() -> None:
    assert q.parse_action("I would Evaluate[Correct].\nEvaluate[Incorrect]") == q.EvaluateAction(False)
    assert q.parse_action("use search engine [Who?] x") == q.SearchAction("Who?")
    later = "Step 1: Action: Evaluate[Correct]"
    for bad in ("", "Evaluate[]", "Evaluate[maybe]", "Use Search Engine[open", later):
        with pytest.raises(q.ActionError):
            q.parse_action(bad)


def test_meta_reads_what_the_training_text_writes() -> None:
    rng = np.random.default_rng(0)
    for kind in q.KINDS:
        for _ in range(20):
            c = q.make_candidate(questions.MAKERS[kind](rng, False), rng)
            meta = q.parse_meta(q.meta_text(c, c.marks))
            assert [good for _, good in meta.steps] == list(c.marks)
            assert meta.complete is (c.fault != "missing_answer")
            bad = [i + 1 for i, good in enumerate(c.marks) if not good]
            assert meta.first_bad_step == (bad[0] if bad else None)
            assert meta.conditions == c.item.conditions and meta.objective == c.item.objective


# ---------------------------------------------------------------- confidence


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=8), st.integers(0, 7))
@settings(deadline=None)
def test_v_score_against_its_formula(logprobs, pick) -> None:
    top = sorted(((str(i), p) for i, p in enumerate(logprobs)), key=lambda x: -x[1])[:5]
    token, p = str(pick % len(logprobs)), logprobs[pick % len(logprobs)]
    among = [math.exp(v) for _, v in top]
    expected = math.exp(p) / (sum(among) + (0 if token in dict(top) else math.exp(p)))
    assert q.v_score(token, p, top) == pytest.approx(expected)
    assert 0 <= q.v_score(token, p, top) <= 1


def test_v_score_grows_with_the_probability_and_refuses_nonsense() -> None:
    others = [("b", -2.0), ("c", -3.0)]
    values = [q.v_score("a", p, [("a", p), *others]) for p in (-4.0, -2.0, -0.1)]
    assert values == sorted(values)
    with pytest.raises(ValueError, match="at most 0"):
        q.v_score("a", 0.5, [])


def test_first_sub_token_of_the_verdict_decides() -> None:
    """Whatever words the thought before it holds."""
    tokens = ["Thought: complete yes, the answer is correct", "\n", "Evaluate", "[", "In", "correct", "]"]
    logprobs = [-5.0] * 4 + [-0.5, -9.0, -9.0]
    top = [[(t, p)] for t, p in zip(tokens, logprobs, strict=True)]
    top[4] = [("In", -0.5), ("Cor", -1.5)]
    expected = pytest.approx(math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5)))
    said = Reply("".join(tokens), tokens, logprobs, top)
    assert agent_of([said]).verify("Is it?", "x").v_score == expected
    assert q.vanilla_verify(ScriptedLLM([said]), "Is it?", "x").v_score == expected
    silent = Reply("Evaluate[Correct]")
    assert q.vanilla_verify(ScriptedLLM([silent]), "Is it?", "x").v_score is None
    nothing = Reply("nothing", ["nothing"], [-1.0], [[("nothing", -1.0)]])
    assert q.vanilla_verify(ScriptedLLM([nothing]), "Is it?", "x").v_score is None


# ---------------------------------------------------------------- data


def test_searches_count_only_with_the_passages_that_decide() -> None:
    item = q.make_items("commonsense", 1, 3)[0]
    turns = tuple(q.Turn("", None, seen) for _, _, seen in q.tool_turns(item))
    assert q.tools_decide(item, q.Verdict(True, trace=turns, calls=("search",)))
    assert not q.tools_decide(item, q.Verdict(True, trace=turns[:-1], calls=("search",)))
    assert not q.tools_decide(item, q.Verdict(True))


@pytest.mark.parametrize("kind", ["math", "logic", "commonsense", "hybrid"])
def test_injected_faults_are_what_they_say(kind) -> None:
    found = q.injected_set(kind, 60)
    assert sum(c.correct for c in found) == 30
    assert {c.fault for c in found} >= {*q.FAULTS[kind], *q.SHARED_FAULTS}
    for c in found:
        answer = q.final_answer(c.text)
        if c.fault == "none":
            assert answer == c.item.answer and all(c.marks)
        elif c.fault == "missing_answer":
            assert answer == ""
        elif c.fault in ("skipped_step", "irrelevant_step"):
            assert answer == c.item.answer and not all(c.marks)
        else:
            assert not q.same_answer(answer, c.item.answer)


def test_tokenizer_writes_back_every_training_text() -> None:
    rng = np.random.default_rng(1)
    examples = [q.make_example(rng) for _ in range(60)]
    tokenizer = q.train_tokenizer(q.texts_of(examples), 600)
    for segments in examples:
        ids, learned = q.encode(tokenizer, segments)
        assert tokenizer.decode(ids) == "".join(t for t, _ in segments)
        kept = tokenizer.decode([i for i, keep in zip(ids, learned, strict=True) if keep])
        assert kept == "".join(t for t, keep in segments if keep)
    text = tokenizer.apply_chat_template(q.dialogue("judge", "a"), tokenize=False, add_generation_prompt=True)
    assert text == q.said("judge", "a")[0][0] + "<|assistant|>"


# ---------------------------------------------------------------- tools


@isolated
@pytest.mark.parametrize("engine", ["z3", "truth_table"])
def test_prover_against_the_truth_table(engine) -> None:
    if engine == "z3":
        pytest.importorskip("z3")
    tool, seen = q.ProverTool(engine), set()
    for item in q.make_items("logic", 12, 5):
        assert q.same_answer(tool(item.program).text, item.answer)
        seen.add(item.answer)
    assert len(seen) == 3
    contradiction = [("fact", ("a", True)), ("fact", ("a", False))]
    assert tool(questions.z3_program(contradiction, "b")).text == "Inconsistent"
    assert q.ProverTool().engine in ("z3", "truth_table")


@isolated
def test_programs_in_the_sandbox() -> None:
    assert q.run_sandboxed("ans = 6 * 7").value == 42
    assert q.PythonTool()("import sympy\nans = sympy.Rational(1, 3)").text == "1/3"
    assert q.PythonTool(0.5)("while True: pass").status == "timeout"
    assert q.PythonTool()("ans = 1 /").status == "error"
    assert len(q.PythonTool()("ans = 'x' * 3000").text) < 300
    with pytest.raises(ValueError, match="positive"):
        q.run_sandboxed("ans = 1", timeout_s=0)
    with pytest.raises(ValueError, match="engine"):
        q.ProverTool("prolog")


@isolated
def test_answers_cannot_attack() -> None:
    names = "class that lies,forged answer,terminal escape,leave before answering,huge text"
    for name in names.split(","):
        seen = q.PythonTool(1.0)(q.ANSWER_ATTACKS[name])
        assert len(seen.text) < 300 and seen.text.replace("\n", "").isprintable() and seen.text != "42", name
        assert q.PythonTool()("ans = str(6 * 7)").text == "42"


@isolated
def test_openai_compatible_server(monkeypatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr(q, "run", types.SimpleNamespace(device="cpu"), raising=False)
    with q.tiny_server() as spec:
        llm, prompts = q.load_llm(spec)
        agent = q.VerifiAgent(llm, {"python": q.PythonTool()}, prompts=prompts)
        verdict = agent.verify("What is 14 * 6 - 20?", "Answer: 84")
    assert prompts == "full" and verdict.correct is False and verdict.trace[0].observed == "64"
    assert verdict.v_score == pytest.approx(1.0) and verdict.usage.prompt_tokens == 100


def test_no_isolation_is_refused(monkeypatch) -> None:
    def refuse(*args):
        raise sandbox.SandboxUnavailable("no network isolation")

    monkeypatch.setattr(sandbox, "run", refuse)
    with pytest.raises(sandbox.SandboxUnavailable):
        q.PythonTool()("ans = 1")


def test_search_scores_against_the_formula() -> None:
    rnd = random.Random(0)
    words = ["red", "blue", "bird", "fish", "tree", "stone"]
    texts = {f"{rnd.choice(words)} {i}": " ".join(rnd.choices(words, k=rnd.randint(2, 9))) for i in range(50)}
    index = q.Index(texts)

    def bm25(column, query: list[str]) -> np.ndarray:
        docs = [q.Index.words(text) for text in column]
        f = np.array([[d.count(t) for t in query] for d in docs])
        n, length = (f > 0).sum(0), np.array([[len(d)] for d in docs])
        weight = 1.2 * (1 - 0.75 + 0.75 * length / length.mean())
        return (np.log(1 + (len(docs) - n + 0.5) / (n + 0.5)) * f / (f + weight)).sum(1)

    expected = bm25(texts, ["red", "bird"]) + 0.5 * bm25(texts.values(), ["red", "bird"])
    got = index.scores("What is a red bird?")
    keep = expected > 0
    ratio = got[keep] / expected[keep]
    assert np.allclose(ratio, ratio[0], rtol=1e-4) and not got[~keep].any()
    assert index.search("nothing known") == []
    with pytest.raises(ValueError, match="passages"):
        q.Index({})


def test_most_names_find_their_own_passage() -> None:
    tax, index = q.taxonomy(), q.wordnet_index()
    names = sorted(tax.up)[::40]
    hits = sum(index.search(f"What is {q.article(n)}?") == [tax.passage(n)] for n in names)
    assert hits >= 0.95 * len(names)
    last = q.SearchTool(index, 20, rerank=lambda question, found: np.arange(len(found)))("What is a penguin?")
    assert len(last.text) <= 20


# ---------------------------------------------------------------- the loop


def perfect(messages) -> str:
    """The reply that the training text has at this point of a conversation."""
    asked = messages[1]["content"]
    question, _, solution = asked.removeprefix("Question: ").partition("\nSolution:\n")
    candidate = WORLD[question, solution]
    quiet = types.SimpleNamespace(random=lambda: 0.99)  # no noisy example
    segments = q.agent_example(candidate, quiet)
    turns = "".join(t for t, _ in segments).split("<|assistant|>")[1:]
    return turns[sum(m["role"] == "assistant" for m in messages)].split("<|end|>")[0]


WORLD: dict = {}


@isolated
def test_a_perfect_agent_is_always_right() -> None:
    candidates = [c for kind in q.KINDS for c in q.injected_set(kind, 12)]
    WORLD.update({(c.item.question, c.text): c for c in candidates})
    agent = q.VerifiAgent(ScriptedLLM(perfect), q.make_tools())
    verdicts = agent.verify_many([(c.item.question, c.text) for c in candidates])
    assert [v.correct for v in verdicts] == [c.correct for c in candidates]
    for c, v in zip(candidates, verdicts, strict=True):
        assert q.same_answer(q.tool_answer(v), c.item.answer)
        assert v.calls[0] == q.TOOL_OF[c.item.kind]
        assert (v.error_reason, v.revision) == ("None", "None") if c.correct else v.error_reason != "None"


def test_one_batch_a_turn_and_one_thread_for_the_model() -> None:
    """Tools run in threads of their own; a GPU that is capturing a graph must see one thread only."""
    sizes, asking, using = [], set(), set()

    class Watched(ScriptedLLM):
        def _generate(self, requests):
            sizes.append(len(requests))
            asking.add(threading.get_ident())
            return super()._generate(requests)

    def search(_: str) -> q.Observation:
        using.add(threading.get_ident())
        return q.Observation("x")

    turns = {f"Is {n} even?": n for n in (1, 2, 3)}  # so many searches before the verdict

    def script(messages):
        wanted = next(n for question, n in turns.items() if question in messages[1]["content"])
        return "Action: Evaluate[Correct]" if len(messages) > 2 * wanted else SEARCH

    agent = q.VerifiAgent(Watched(script), {"search": search}, workers=3)
    verdicts = agent.verify_many([(question, "Answer: True") for question in [*turns, "Is 3 even?"]])
    assert [len(v.calls) for v in verdicts] == [1, 2, 3, 3] and all(v.correct for v in verdicts)
    assert sizes == [4, 4, 3, 2], "not all that wait for the model were asked together"
    assert asking == {threading.get_ident()} and asking.isdisjoint(using)


def test_a_malformed_agent_ends_without_a_verdict() -> None:
    verdict = agent_of(lambda messages: "hmm").verify("Is it?", "Answer: True")
    assert verdict.correct is None and len(verdict.trace) == 2
    forever = agent_of(lambda messages: SEARCH, "search", max_turns=4).verify("Is it?", "Answer: True")
    assert forever.correct is None and len(forever.trace) == 4


def test_one_bad_action_is_forgiven() -> None:
    agent = agent_of(["no action", "Action: Evaluate[Correct]"])
    assert agent.verify("Is it?", "Answer: True").correct
    assert "no action" in agent.llm.requests[1].messages[-1]["content"]


def test_gate_stops_before_the_tools() -> None:
    text = "Complete: no\nAction: Use Python Interpreter[ans = 1]"
    used = []
    tools = {"python": lambda program: used.append(program) or q.Observation("1")}
    assert q.VerifiAgent(ScriptedLLM([text]), tools, gate=True).verify("1?", "x").correct is False
    assert not used
    llm = ScriptedLLM([text, "Action: Evaluate[Incorrect]"])
    assert q.VerifiAgent(llm, tools).verify("1?", "x").calls == ("python",) and used


def test_a_missing_tool_leaves_the_prompt() -> None:
    agent = agent_of([SEARCH] * 2, "python", prompts="full")
    prompt = agent.start("1?", "x")[0]["content"]
    assert "Search" not in prompt and "Interpreter" in prompt
    verdict = agent.verify("1?", "x")
    assert verdict.correct is None and "no tool search" in verdict.trace[0].observed
    assert agent_of([], "python", use_tools=False).tools == {}


def test_poses_and_long_input() -> None:
    assert q.attack_prompts()["escapes"] == 0
    agent = agent_of([], context=100)
    told = agent.start("Is it?", "a" * 500 + "b" * 500)[1]["content"]
    assert " … " in told and told.rstrip().endswith("b") and len(told) < 200
    wide = agent_of(["Evaluate[Correct]"] * 2, context=9000)
    assert not wide.verify("Is it?", "a" * 9000).cut
    assert "a" * 9000 in wide.llm.requests[0].messages[1]["content"]
    assert wide.verify("Is it?", "a" * 9001).cut
    for question, solution in (("", "x"), ("x", "  ")):
        with pytest.raises(ValueError, match="empty"):
            agent.start(question, solution)
    for bad in (dict(max_turns=0), dict(prompts="short")):
        with pytest.raises(ValueError, match="accepted"):
            agent_of([], **bad)
    with pytest.raises(ValueError, match="unknown"):
        agent_of([], "oracle")


def test_endpoint_down_and_context_full() -> None:
    with pytest.raises(LLMError):
        agent_of([LLMError("down")]).verify("Is it?", "x")
    verdict = agent_of([SEARCH, LLMError("too long")], "search").verify("Is it?", "x")
    assert verdict.correct is None and len(verdict.trace) == 1


def test_usage_counts_every_turn() -> None:
    script = [Reply(SEARCH, usage=Usage(10, 3)), Reply("Evaluate[Correct]", usage=Usage(20, 4))]
    assert agent_of(script, "search").verify("Is it?", "x").usage == Usage(30, 7)


# ---------------------------------------------------------------- baselines


def test_baselines() -> None:
    yes = ScriptedLLM(lambda m: "Evaluate[Correct]" if m[0]["content"] == "judge" else "yes")
    assert q.vanilla_verify(yes, "Is it?", "Answer: True").correct
    assert q.deductive_verify(yes, "Is it?", "a step\nAnswer: True").correct
    assert len(yes.requests) == 3
    assert q.deductive_verify(yes, "Is it?", "a step").correct is False
    assert q.deductive_verify(ScriptedLLM(["yes", "no"]), "Is it?", "a\nb\nAnswer: True").correct is False
    assert q.backward_verify(ScriptedLLM(["7"]), "3 and 7 eggs?", "Answer: 10").correct
    assert q.backward_verify(ScriptedLLM(["8"]), "3 and 7 eggs?", "Answer: 10").correct is False
    assert q.backward_verify(ScriptedLLM(["True"]), "Is a a b?", "Answer: True").correct
    assert q.backward_verify(ScriptedLLM([]), "3 eggs?", "no answer").correct is False
    assert q.vanilla_verify(ScriptedLLM(["well"]), "Is it?", "x").correct is None
    assert q.deductive_verify(ScriptedLLM([]), "Is it?", "").correct is False
    for verify in (q.vanilla_verify, q.deductive_verify, q.backward_verify):
        llm = ScriptedLLM(["yes"])
        verify(llm, "Is it?", "Answer: True", prompts="full")
        assert "Reply" in llm.requests[0].messages[0]["content"]


def test_deductive_sees_only_premises_and_backward_hides_the_number() -> None:
    told = q.check_message("Ann has 14 pens. Bob has 9 cups. How many?", ["14 * 2 = 28", "28 - 9 = 19"], 1)
    assert "28" in told and "9 cups" in told and "14 pens" not in told
    assert q.mask_condition("3 and 17 eggs?") == ("3 and X eggs?", "17")
    assert q.mask_condition("no numbers") == ("no numbers", "")


# ---------------------------------------------------------------- answers, scaling, feedback


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (Fraction(1, 2), "0.5", True), ("3.0", 3, True), ("1,000", "1000", True), ("True", "yes", True),
        ("True", True, True), ("64 euros", "64", True), ("$12", "12", True), ({1, 2}, {2, 1}, True),
        ("1/0", "1", False), ("true", "1", False), ("", "0", False), ("Uncertain", "uncertain", True),
        ("10", "100", False), ("1e3", "1000", True), ("−5", "-5", True),
    ],
)  # fmt: skip
def test_same_answer(a, b, same) -> None:
    assert q.same_answer(a, b) is same and q.same_answer(b, a) is same
    assert q.same_answer(sympy.Rational(1, 3), "1/3") and q.same_answer(sympy.Integer(4), "4")


def test_votes_and_best() -> None:
    assert q.majority_vote(["1", "2", "2.0"]) == "2"
    assert q.majority_vote(["2", "1", "1", "2"]) == "2"
    assert q.majority_vote(["", ""]) == "" and q.majority_vote([]) == ""
    assert q.best_of_n(["a", "b", "c"], {"a": None, "b": 0.2, "c": 0.2}.get) == "b"
    with pytest.raises(ValueError):
        q.best_of_n([], len)


def test_scaling_stops_and_falls_back() -> None:
    texts = ["Answer: 1", "Answer: 2", "Answer: 2"]
    drawn = iter(texts)
    reply = lambda: Reply(next(drawn), usage=Usage(5, 1))  # noqa: E731
    refused = q.scale_inference(reply, lambda t: q.Verdict(False, usage=Usage(7, 1)), cap=3)
    assert (refused.text, refused.samples, refused.verified) == ("2", 3, False)
    assert refused.usage == Usage(36, 6)
    drawn = iter(texts)
    assert q.scale_inference(reply, lambda t: q.Verdict("2" in t), cap=3).samples == 2
    with pytest.raises(ValueError, match="cap"):
        q.scale_inference(reply, lambda t: q.Verdict(True), cap=0)


def test_table_of_samples_gives_what_the_loop_gives() -> None:
    """`scaling_curves` reads the experiment's table; `scale_inference` runs. Same samples, same result."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, (40, 5)).astype(str)
    verdict = rng.integers(0, 2, (40, 5))
    solving, verifying = rng.integers(1, 9, (2, 40, 5))
    table = {"answers": answers, "right": (answers == "1").astype(float), "verdict": verdict,
             "solving": solving, "verifying": verifying, "v": np.full((40, 5), 0.5)}  # fmt: skip
    right, tokens = q.scaling_curves(table)["scaled"]
    for i, cap in itertools.product(range(40), (1, 3, 5)):
        at = iter(range(5))

        def reason(i=i, at=at):
            reason.now = next(at)
            return Reply(f"Answer: {answers[i, reason.now]}", usage=Usage(0, int(solving[i, reason.now])))

        def check(text, i=i, reason=reason):
            cost = Usage(0, int(verifying[i, reason.now]))
            return q.Verdict(bool(verdict[i, reason.now]), usage=cost)

        got = q.scale_inference(reason, check, cap)
        assert right[i, cap - 1] == (got.text == "1")
        assert tokens[i, cap - 1] == got.usage.completion_tokens


def test_feedback_levels_and_modes() -> None:
    verdict = q.Verdict(False, None, "Step 2 is wrong.", "The answer is 64.")
    shown = [
        q.feedback_messages("1?", "Answer: 3", verdict, "precaution", level)[1]["content"]
        for level in range(3)
    ]
    assert "Step 2" not in shown[0] and "Step 2" in shown[1] and "64" not in shown[1] and "64" in shown[2]
    assert "Answer: 3" not in shown[2]
    mended = q.feedback_messages("1?", "Answer: 3", verdict, "post_edit", 0)
    assert "Answer: 3" in mended[1]["content"] and mended[0]["content"] == "revise"
    for judged, now in ((q.Verdict(True), "old"), (q.Verdict(None), "old"), (verdict, "new")):
        assert q.with_feedback(lambda m: Reply("new"), "1?", "old", judged, "precaution", 0) == now
    for mode, level in (("other", 0), ("precaution", 3)):
        with pytest.raises(ValueError, match="accepted"):
            q.feedback_messages("1?", "x", verdict, mode, level)


# ---------------------------------------------------------------- measures


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
@settings(deadline=None, max_examples=60)
def test_measures_against_scikit_learn(pairs) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    pred, true = zip(*pairs, strict=True)
    got = q.verification_metrics(pred, true)
    expected = {"acc": metrics.accuracy_score(true, pred)}
    if len(set(true)) == 2:
        expected["mcc"] = metrics.matthews_corrcoef(true, pred)
        expected["balanced_acc"] = metrics.balanced_accuracy_score(true, pred)
        values = q.balanced(np.equal(pred, true).astype(float), np.array(true))
        assert values.mean() == pytest.approx(got["balanced_acc"])
    if any(pred):
        expected["precision"] = metrics.precision_score(true, pred)
    if any(true):
        expected["recall"] = metrics.recall_score(true, pred)
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_no_verdict_counts_as_incorrect() -> None:
    got = q.verification_metrics([None, None, True], [False, False, True])
    assert got["acc"] == 1.0 and got["coverage"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        q.verification_metrics([True], [])


def test_intervals_and_mcnemar() -> None:
    pred, true = [True, False] * 20, [True, True, False, False] * 10
    value, low, high = q.with_intervals(pred, true, resamples=200)["acc"]
    assert low <= value <= high
    assert q.with_intervals(pred, true, clusters=[0] * 40, resamples=20)["acc"][1:] == (value, value)
    assert q.mcnemar([True] * 8 + [False] * 2, [False] * 8 + [True] * 2) == pytest.approx(0.109375)
    assert q.mcnemar([True], [True]) == 1.0


def test_auroc_and_jackknife() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    score, positive = rng.normal(size=60).round(1), rng.random(60) < 0.4
    assert q.auroc(score, positive) == pytest.approx(metrics.roc_auc_score(positive, score))
    values = q.jackknife(lambda i: score[i].mean(), 60)
    assert np.allclose(values, score)


# ---------------------------------------------------------------- backbone, checkpoint


def tiny(folder, seed: int = 0) -> str:
    tokenizer = q.train_tokenizer(q.texts_of(q.examples_of(0, 60)), 500)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=2048)  # fmt: skip
    model = q.make_model(size, tokenizer, seed)
    losses = q.pretrain(model, tokenizer, 12, 1024, 0.02, seed, pool=32)
    assert losses[-1] < losses[0]
    model.save_pretrained(folder, max_shard_size="50KB")
    tokenizer.save_pretrained(folder)
    return str(folder)


@isolated
def test_own_checkpoints_run_and_differ(tmp_path, monkeypatch) -> None:
    """The whole notebook on two checkpoints, rendered from what units there are; then wrong ones."""
    monkeypatch.setattr(q, "run", types.SimpleNamespace(device="cpu"), raising=False)
    found = []
    for name in "01":
        folder = tiny(tmp_path / name, int(name))
        how = dict(profile="smoke", only="own_model*", checkpoint=folder, out=str(tmp_path / f"run{name}"))
        run_script("verifiagent", monkeypatch, figures=False, **how)
        (unit,) = (tmp_path / f"run{name}" / "units").glob("own_model-*/result.json")
        found.append(json.loads(unit.read_text()))
    assert found[0]["prompts"] == "terse" and len(found[0]["rows"]) == 6
    assert found[0]["logprob"] != found[1]["logprob"]
    (tmp_path / "0" / "config.json").unlink()
    with pytest.raises(ValueError, match="checkpoint"):
        q.load_llm(str(tmp_path / "0"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="checkpoint"):
        q.load_llm("openai:model@https://example.org/v1")


def test_batches_keep_every_example_and_mask() -> None:
    """Every example comes `reuse` times but for those that still wait; shapes depend on the width alone."""
    rng = np.random.default_rng(0)
    pools = [[([i] * n, [j % 2 == 0 for j in range(n)]) for i, n in enumerate(rng.integers(1, 90, 50), start)]
             for start in (1, 51, 101)]  # fmt: skip
    batches = list(q.token_batches([q.padded(pool) for pool in pools], 200, 3, rng))
    sizes = {number: len(ids) for pool in pools for ids, _ in pool for number in ids[:1]}
    count = dict.fromkeys(sizes, 0)
    for ids, learned in batches:
        assert ids.shape == learned.shape and ids.shape == (max(1, 200 // ids.shape[1]), ids.shape[1])
        for row, marks in zip(ids.tolist(), learned.tolist(), strict=True):
            number = row[0]
            count[number] += 1
            assert row == [number] * sizes[number] + [0] * (len(row) - sizes[number])
            assert len(row) - sizes[number] < 24
            assert marks == [j % 2 == 0 and j < sizes[number] for j in range(len(row))]
    assert max(count.values()) == 3
    assert sum(count.values()) > 3 * 150 - sum(200 // width for width in (24, 48, 72, 96))
