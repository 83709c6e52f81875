"""Chapter dr_grpo: oracles for its definitions, its bad inputs, its path for one's own checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter
from readrun.rl import group_advantages, policy_loss

q = chapter("dr_grpo")


def tiny(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model of one of two families on the puzzle's vocabulary, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    tokenizer = q.make_tokenizer()
    torch.manual_seed(seed)
    model = cls(
        config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    return model.to(dtype).eval(), tokenizer


# ---------------------------------------------------------------- masks, log-probabilities, sampling


def test_completion_mask() -> None:
    ids = torch.tensor([[5, 1, 1, 5], [1, 5, 5, 1], [5, 5, 5, 5]])
    assert q.completion_mask(ids, 1).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(deadline=None)
def test_completion_mask_against_a_loop(row) -> None:
    expected, open_ = [], True
    for token in row:
        expected.append(open_)
        open_ = open_ and token != 1
    assert q.completion_mask(torch.tensor([row]), 1)[0].tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_left_padding_changes_nothing(kind, chunk) -> None:
    """GPT-2 has absolute positions; rotary ones would not notice that a whole row is shifted."""
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=22, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ).eval()
    else:
        model, _ = tiny(kind)
    prompts, tails = [[5, 6, 7], [8, 9, 10, 11, 12]], [[13, 14, 1], [15, 16, 17]]
    ids = torch.tensor([[0, 0, *prompts[0], *tails[0]], [*prompts[1], *tails[1]]])
    mask = (torch.arange(8) >= torch.tensor([[2], [0]])).long()
    got = q.token_logps(model, ids, mask, 5, chunk=chunk)
    for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        alone = torch.tensor([prompt + tail])
        logits = model(input_ids=alone).logits[0].log_softmax(-1)
        expected = logits[torch.arange(len(prompt) - 1, len(prompt) + 2), torch.tensor(tail)]
        assert torch.allclose(got[row], expected, atol=1e-5)


def test_token_logps_errors() -> None:
    model, _ = tiny()
    ids = torch.ones(2, 6, dtype=torch.long)
    for mask, prompt_len in ((torch.ones(2, 5), 3), (torch.ones(2, 6), 0), (torch.ones(2, 6), 6)):
        with pytest.raises(ValueError, match="prompt_len"):
            q.token_logps(model, ids, mask.long(), prompt_len)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_logps(chunk) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).requires_grad_() for n in (40, 50))
    targets, grad = torch.randint(50, (40,), generator=g), torch.randn(40, generator=g)
    naive = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    ours = q.ChunkedLogps.apply(hidden, weight, targets, chunk)
    assert torch.allclose(ours, naive, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight), grad),
        torch.autograd.grad(naive, (hidden, weight), grad),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_chunked_logps_gradcheck() -> None:
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    targets = torch.tensor([0, 3, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: q.ChunkedLogps.apply(h, w, targets, 2), (hidden, weight))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_sampler_equals_generate(kind) -> None:
    model, tokenizer = tiny(kind)
    asked = q.questions_of(range(6), [1, 3])
    batch = tokenizer([a.prompt for a in asked], padding=True, return_tensors="pt")
    theirs = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch.input_ids.shape[1] :]
    ours = q.sample_group(model, tokenizer([a.prompt for a in asked]).input_ids, 1, 20, temperature=0.0)
    for row, tokens in zip(theirs.tolist(), ours.completions, strict=True):
        assert row[: len(tokens)] == tokens


def test_groups_are_contiguous_and_stop_at_eos() -> None:
    model, tokenizer = tiny()
    asked = [q.Question((1,), 2), q.Question((3, 4), 5)]
    got = q.collect(model, tokenizer, asked, 3, 12, torch.Generator().manual_seed(0))
    assert got.rewards.shape == (6,) and len(got.texts) == 6
    prompt = tokenizer.batch_decode(got.rollout.ids[:, : got.rollout.prompt_len])
    assert [p.replace("<pad>", "") for p in prompt] == [asked[i // 3].prompt for i in range(6)]
    for text, length, done in zip(
        got.texts, got.lengths.tolist(), got.rollout.finished.tolist(), strict=True
    ):
        assert text.count(".") == int(done) and len(tokenizer(text).input_ids) == length
    assert torch.equal(got.rollout.mask, q.completion_mask(got.rollout.ids[:, got.rollout.prompt_len :], 1))


def test_cut_at_ends_a_response_at_the_stop_string() -> None:
    tokenizer = q.make_tokenizer()
    ids = tokenizer(["?+1=2x1;1+1=2;yww#1", "?+1=2x1;1+1=3;nhh#1"], return_tensors="pt").input_ids
    rollout = q.Rollout(ids, torch.ones(2, ids.shape[1] - 5, dtype=torch.bool), torch.zeros(2).bool(), 5)
    got = q.cut_at(rollout, tokenizer, "yw")
    assert got.finished.tolist() == [True, False]
    assert tokenizer.batch_decode(got.completions)[0] == "x1;1+1=2;yw"


# ---------------------------------------------------------------- the puzzle


def test_reward_by_brute_force_over_digits() -> None:
    for addends in ((3,), (3, 8), (9, 9, 9)):
        for target in range(10):
            question = q.Question(addends, target)
            right = [d for d in range(10) if (d + sum(addends)) % 10 == target]
            assert [d for d in range(10) if q.verify(question, f"x{d};#{d}.")] == right == [question.answer]


@pytest.mark.parametrize(
    "text", ["#5", "#5#5.", "#4#5.", "#5.#5.", "5.", "", ".", "#.", "##5.", "#15.", "#٥.", "#5. "]
)
def test_malformed_responses_earn_nothing(text) -> None:
    assert q.verify(q.Question((3, 8), 6), text) is False


@given(st.text(alphabet="0123456789?+=x;ynwh#.é\n", max_size=30))
@settings(deadline=None)
def test_reward_never_raises(text) -> None:
    assert q.verify(q.Question((3, 8), 6), text) in (True, False)
    assert q.check_is_right(q.Question((3, 8), 6), text) in (True, False)


def test_corpus_checks_are_right_and_filler_is_useless() -> None:
    rng, found = np.random.default_rng(0), {"main": [], "shared": [], "retry": []}
    for style, rows in found.items():
        for _ in range(1500):
            question = q.make_question(rng, int(rng.integers(1, 4)))
            text = q.render_chain(question, rng, style)
            assert q.check_is_right(question, text)
            assert q.verify(question, text) == (text[-2] == str(question.answer))
            rows.append((q.verify(question, text), text.count("w"), text.count("h"), text.count("x")))
    right, w, h, tries = (np.array(x) for x in zip(*found["main"], strict=True))
    assert right.mean() == pytest.approx(0.55, abs=0.05) and set(tries) == {1}
    assert w[right].mean() == pytest.approx(0.85 / 0.15, abs=0.8) and w[~right].sum() == 0
    assert h[~right].mean() == pytest.approx(0.85 / 0.15, abs=0.8) and h[right].sum() == 0
    right, w, h, _ = (np.array(x) for x in zip(*found["shared"], strict=True))
    assert h.sum() == 0 and w[~right].mean() == pytest.approx(0.85 / 0.15, abs=0.8)
    right, _, _, tries = (np.array(x) for x in zip(*found["retry"], strict=True))
    assert right[tries == 1].mean() < right.mean() and tries.mean() == pytest.approx(
        1 / (1 - 0.45 * 0.3), abs=0.06
    )


def test_training_and_evaluation_questions_come_from_different_seeds() -> None:
    assert q.TUNING_SEED not in range(0, 100) and q.HELD_OUT > 100_000
    assert q.questions_of([3, 4], [1, 4]) == q.questions_of([3, 4], [1, 4])
    sizes = {len(x.addends) for x in q.questions_of(range(200), [1, 4])}
    assert sizes == {1, 2, 3, 4}


def test_pre_training_reads_the_tokens_of_the_tokenizer_and_scores_responses_only() -> None:
    model, tokenizer = tiny()
    seen, rng = [], np.random.default_rng(3)
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    losses = q.pretrain(model, tokenizer, "retry", [1, 3], 1, 8, 1e-3, 3)
    asked = [q.make_question(rng, int(rng.integers(1, 4))) for _ in range(8)]
    texts = [question.prompt + q.render_chain(question, rng, "retry") for question in asked]
    coded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert torch.equal(seen[0], coded.input_ids)
    torch.manual_seed(0)
    fresh, _ = tiny()
    logps = fresh(**coded).logits.log_softmax(-1)[:, :-1].gather(-1, coded.input_ids[:, 1:, None])[..., 0]
    places = [(i, j - 1) for i, text in enumerate(texts) for j in range(len(asked[i].prompt), len(text))]
    assert losses[0] == pytest.approx(-np.mean([logps[place].item() for place in places]), rel=1e-4)


def test_puzzle_errors() -> None:
    with pytest.raises(ValueError, match="terms"):
        q.make_question(np.random.default_rng(0), 0)
    with pytest.raises(ValueError, match="style"):
        q.render_chain(q.Question((1,), 2), np.random.default_rng(0), "loud")


def test_math_verify_agrees_on_integers() -> None:
    pytest.importorskip("math_verify")
    for template, wrap in (("none", "so \\boxed{%s}"), ("r1", "thought</think> <answer> %s </answer>")):
        for answer, said in itertools.product((7, 12, -3), repeat=2):
            assert q.verify_math(q.Problem("?", str(answer), template), wrap % said) == (answer == said)
    assert not q.verify_math(q.Problem("?", "7", "r1"), "the answer is 7")  # no answer tag
    assert not q.verify_math(q.Problem("?", "7", "none"), "")


# ---------------------------------------------------------------- exact gradients


def reward(question: int, text: str) -> int:
    return int(text.endswith(".") and (text.count("b") % 2 == 1 if question == 0 else "a" in text))


def brute_force(table: torch.Tensor, cap: int, group_size: int, name: str) -> torch.Tensor:
    """Expected gradient of one objective by listing every batch and differentiating the loss itself."""
    table = table.clone().requires_grad_()
    texts, visits, lengths = q.token_mdp(cap)
    logp = torch.stack([(visits * t.log_softmax(-1)).flatten(1).sum(1) for t in table])  # (Q, N)
    tokens = torch.zeros(len(table), len(texts), cap, dtype=torch.float64)
    for i, t in enumerate(table.log_softmax(-1)):
        for n, text in enumerate(texts):
            states = [k for s in range(len(text)) for k in [prefix_index(text[:s])]]
            tokens[i, n, : len(text)] = t[states, ["ab.".index(c) for c in text]]
    mask = torch.arange(cap) < lengths[:, None]
    how, total = q.OBJECTIVES[name], torch.zeros_like(table)
    rows = len(table) * group_size
    owner = torch.arange(len(table)).repeat_interleave(group_size)
    for batch in itertools.product(range(len(texts)), repeat=rows):
        chosen = torch.tensor(batch)
        p = logp.detach()[owner, chosen].sum().exp()
        r = torch.tensor(
            [float(reward(int(o), texts[n])) for o, n in zip(owner, batch, strict=True)]
        ).double()
        now = tokens[owner, chosen]
        loss = policy_loss(
            now, now.detach(), group_advantages(r, group_size, how["scale"]), mask[chosen],
            aggregate=how["aggregate"], constant=cap,
        )  # fmt: skip
        total -= p * torch.autograd.grad(loss, table, retain_graph=True)[0]
    return total


def prefix_index(prefix: str) -> int:
    """Number of a prefix in the order of token_mdp: by length, a before b."""
    return 2 ** len(prefix) - 1 + sum(2**i for i, c in enumerate(reversed(prefix)) if c == "b")


@pytest.mark.parametrize("name", ["grpo", "no_std", "no_length", "dr_grpo", "bnpo", "rloo"])
@pytest.mark.parametrize(("questions", "group_size"), [(1, 2), (1, 3), (2, 2)])
def test_exact_gradients_brute_force(name, questions, group_size) -> None:
    if (questions, name) == (2, "rloo"):
        pytest.skip("one size is enough")
    table = torch.tensor(np.random.default_rng(questions).normal(size=(questions, 3, 3)))
    exact = q.exact_gradients(table, reward, 2, group_size)[name]
    assert torch.allclose(exact, brute_force(table, 2, group_size, name), atol=1e-12)


def test_true_gradient_by_finite_differences() -> None:
    table = torch.tensor(np.random.default_rng(0).normal(size=(2, 31, 3)))
    texts, visits, lengths = q.token_mdp(5)
    assert (
        len(texts) == 63 and visits.shape == (63, 31, 3) and sorted(set(lengths.tolist())) == [1, 2, 3, 4, 5]
    )

    def expected(t):
        p = [q.response_scores(one, visits)[0] for one in t]
        assert all(x.sum().item() == pytest.approx(1) for x in p)
        return (
            sum((x * torch.tensor([float(reward(i, s)) for s in texts])).sum() for i, x in enumerate(p)) / 2
        )

    true = q.exact_gradients(table, reward, 5, 8)["true"]
    for index in [(0, 0, 1), (0, 3, 2), (1, 0, 0)]:
        step = torch.zeros_like(table)
        step[index] = 1e-6
        slope = (expected(table + step) - expected(table - step)) / 2e-6
        assert slope.item() == pytest.approx(true[index].item(), abs=1e-8)


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_dr_grpo_is_unbiased_and_the_others_are_not(group_size) -> None:
    table = torch.tensor(np.random.default_rng(0).normal(size=(2, 31, 3)))
    grads = q.exact_gradients(table, reward, 5, group_size)
    true = grads["true"]
    cosine = {k: ((g * true).sum() / g.norm() / true.norm()).item() for k, g in grads.items()}
    assert cosine["dr_grpo"] >= 1 - 1e-12 and cosine["rloo"] >= 1 - 1e-12
    assert 5 * (grads["dr_grpo"].norm() / true.norm()).item() == pytest.approx(
        (group_size - 1) / group_size, abs=1e-12
    )
    assert torch.allclose(grads["rloo"] * 5, true, atol=1e-14)
    assert max(cosine["grpo"], cosine["no_std"]) < cosine["bnpo"] < 1 - 1e-6
    if group_size > 3:  # with two or three responses all groups that count have the same std
        assert cosine["no_length"] < 1 - 1e-6


def test_with_one_question_and_two_responses_the_std_only_rescales() -> None:
    table = torch.tensor(np.random.default_rng(1).normal(size=(1, 31, 3)))
    grads = q.exact_gradients(table, reward, 5, 2)
    assert torch.allclose(grads["no_length"], grads["dr_grpo"] * math.sqrt(2), rtol=1e-6)


# ---------------------------------------------------------------- difficulty


def test_difficulty_closed_form_by_listing_groups() -> None:
    for scale, p in itertools.product(("std", "none"), (0.1, 0.5)):
        total = 0.0
        for rewards in itertools.product((0.0, 1.0), repeat=4):
            r = torch.tensor(rewards, dtype=torch.float64)
            total += (
                p ** sum(rewards)
                * (1 - p) ** (4 - sum(rewards))
                * group_advantages(r, 4, scale).abs().mean().item()
            )
        assert q.difficulty_mass(p, 4, scale) == pytest.approx(total, abs=1e-12)


def test_expected_mass_has_no_bias() -> None:
    n, p = 12, 0.3
    rows = np.array([[i < hits for i in range(n)] for hits in range(n + 1)])
    chance = np.array([math.comb(n, h) * p**h * (1 - p) ** (n - h) for h in range(n + 1)])
    for scale in ("std", "none"):
        values, variance = q.expected_mass(rows, 4, scale)
        assert chance @ values == pytest.approx(q.difficulty_mass(p, 4, scale), abs=1e-12)
        assert (variance >= 0).all()


# ---------------------------------------------------------------- training


def test_rl_train_is_repeatable_and_differs_between_objectives() -> None:
    asked, ends = q.questions_of(range(20), [1, 1]), {}
    for name in ("grpo", "grpo", "dr_grpo"):
        model, tokenizer = tiny()
        history = q.rl_train(
            model, tokenizer, asked, name, 2, lr=1e-3, group_size=4, rollouts=16, updates=2, budget=24,
            reward=lambda question, text: "x" in text,
        )  # fmt: skip
        assert set(history) >= {
            "reward",
            "length_right",
            "length_wrong",
            "clip_fraction",
            "grad_norm",
            "zero_groups",
        }
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        if name in ends:
            assert torch.equal(weights, ends[name])  # bit for bit
        ends[name] = weights
    assert not torch.equal(ends["grpo"], ends["dr_grpo"])


def test_groups_with_equal_rewards_teach_nothing() -> None:
    model, tokenizer = tiny()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    history = q.rl_train(
        model, tokenizer, q.questions_of(range(9), [1, 1]), "grpo", 1, lr=1e-3, group_size=4, rollouts=8,
        updates=1, budget=6, reward=lambda question, text: False, optimizer="sgd",
    )  # fmt: skip
    assert history["zero_groups"][0] == 1 and history["grad_norm"][0] == 0
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_training_errors() -> None:
    model, tokenizer = tiny()
    asked = q.questions_of(range(9), [1, 1])
    with pytest.raises(ValueError, match="objective"):
        q.rl_train(model, tokenizer, asked, "ppo", 1, lr=1e-3)
    with pytest.raises(ValueError, match="rollouts"):
        q.rl_train(model, tokenizer, asked, "grpo", 1, lr=1e-3, rollouts=12, group_size=4, updates=2)


def test_dropout_is_noticed() -> None:
    model, tokenizer = tiny()
    got = q.collect(
        model, tokenizer, q.questions_of(range(2), [1, 1]), 4, 8, torch.Generator().manual_seed(0)
    )
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with pytest.raises(RuntimeError, match="dropout"):
        q.policy_step(model, q.train.Updater(model, 1e-3), got, torch.ones(8), "response", 8, 1)


def test_non_finite_log_probabilities_stop_training_and_quote_the_responses() -> None:
    model, tokenizer = tiny()
    got = q.collect(
        model, tokenizer, q.questions_of(range(2), [1, 1]), 4, 8, torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    with pytest.raises((FloatingPointError, ValueError), match="not finite") as error:
        q.policy_step(model, q.train.Updater(model, 1e-3), got, torch.ones(8), "response", 8, 1)
    assert got.texts[0] in str(error.value)


def test_scaled_rewards_scale_one_arm_and_not_the_other() -> None:
    """Rewards times c: the std arm's gradient stays, the Dr. arm's is c times as long."""
    logp = -torch.rand(4, 5, dtype=torch.float64) - 0.1
    mask, r = torch.ones(4, 5), torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    for name, factor in (("grpo", 1.0), ("dr_grpo", 3.0)):
        how, slopes = q.OBJECTIVES[name], []
        for c in (1.0, 3.0):
            x = logp.clone().requires_grad_()
            a = group_advantages(c * r, 4, how["scale"])
            policy_loss(x, logp, a, mask, aggregate=how["aggregate"], constant=5).backward()
            slopes.append(x.grad)
        assert torch.allclose(slopes[1], factor * slopes[0], atol=1e-7)


def test_rloo_takes_the_same_path_as_dr_grpo() -> None:
    found = q.rloo_identity()
    assert found["moved"] > 1e-4 and found["gap"] < 1e-6


def test_lengths_by_outcome_are_counted_by_hand(monkeypatch) -> None:
    right = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    rollout = q.Rollout(
        torch.zeros(4, 3), torch.ones(4, 2).bool(), torch.tensor([True, True, True, False]), 1
    )
    got = q.Experience(rollout, torch.ones(4, 3), right, torch.tensor([4, 6, 10, 20]), ["", "", "", ""])
    monkeypatch.setattr(q, "collect", lambda *a, **k: got)
    monkeypatch.setattr(q, "decoder_for", lambda *a, **k: None)
    found = q.length_by_outcome(None, None, [1, 2], 2, budget=20)
    assert (found["accuracy"], found["right_tokens"], found["wrong_tokens"]) == (0.25, 4.0, 12.0)
    assert found["truncated"] == pytest.approx(0.25) and found["all_tokens"] == 10.0
    # wrong: question 1 has one (6), question 2 two (10 + 20); residuals 6 - 12 and 30 - 24
    assert found["wrong_se"] == pytest.approx(math.sqrt(36 + 36) / 3)


# ---------------------------------------------------------------- choices and derived metrics


def test_rate_and_penalty_are_chosen_by_the_stated_rule() -> None:
    assert q.choose_rate({1e-4: 0.300, 2e-4: 0.304, 4e-4: 0.296}) == 1e-4  # ties go to the smaller rate
    assert q.choose_rate({1e-4: 0.300, 2e-4: 0.310, 4e-4: 0.306}) == 2e-4
    assert q.choose_penalty({0.1: (0.50, 40.0), 0.3: (0.49, 20.0), 1.0: (0.40, 5.0)}) == 0.3


def test_derived_metrics_pair_by_seed() -> None:
    values = {
        "grpo": [60.0, 50.0, 70.0],
        "dr_grpo": [20.0, 20.0],
        "no_std": [55.0, 50.0],
        "no_length": [21.0, 45.0],
    }
    metrics = {
        "wrong_answer_tokens": values,
        "shared_wrong_answer_tokens": {"grpo": [30.0], "dr_grpo": [25.0]},
    }
    arrays = {f"seeds/wrong_answer_tokens/{arm}": np.arange(len(v)) for arm, v in values.items()}
    arrays |= {f"seeds/shared_wrong_answer_tokens/{arm}": np.array([1]) for arm in ("grpo", "dr_grpo")}
    assert q.ablation_slack(metrics, arrays) == {"no_std": [15.0, 15.0], "no_length": [19.0, -10.0]}
    assert q.shared_gap_slack(metrics, arrays) == {"shared": [0.3 * 30 - 5]}
    assert q.ablation_slack({}, {}) == {} and q.shared_gap_slack({}, {}) == {}


def test_filler_runs_away_under_grpo_and_wanders_under_dr_grpo() -> None:
    grpo, ours = (q.simulate_filler(name, 8, 0.3, 0.05)[-1].mean(0) for name in ("grpo", "dr_grpo"))
    assert grpo[1] > 0.97 and grpo[0] < 0.6
    assert abs(ours[1] - 0.85) < 0.12 and abs(ours[0] - 0.85) < 0.2
    with pytest.raises(ValueError, match="objective"):
        q.simulate_filler("ppo", 8, 0.3, 0.05)


# ---------------------------------------------------------------- a checkpoint of one's own


def save_qwen2(folder: Path, seed: int) -> Path:
    """A random Qwen2 with a byte-level tokenizer in the published layout, weights in several files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_checkpoint_path(tmp_path, monkeypatch) -> None:
    """The whole notebook in smoke on a checkpoint: it prints that model's numbers, not another's."""
    pytest.importorskip("math_verify")
    import readrun
    from readrun.execute import execute

    problems = tmp_path / "questions.jsonl"
    problems.write_text("\n".join(json.dumps({"problem": f"{n}+1?", "answer": str(n + 1)}) for n in range(4)))
    folders = [save_qwen2(tmp_path / f"model{seed}", seed) for seed in (0, 1)]
    assert (folders[0] / "model.safetensors.index.json").is_file()
    status = execute(
        "dr_grpo", profile="smoke", folder=tmp_path / "run",
        parameters={"checkpoint": str(folders[0]), "template": "qwen_math", "questions": str(problems)},
    )  # fmt: skip
    assert status["state"] == "ok", status["error"] + status["traceback"]
    cells = json.loads((tmp_path / "run" / "executed.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))
    started = readrun.start("dr_grpo", profile="smoke", device="cpu", out=str(tmp_path / "direct"))
    monkeypatch.setattr(q, "run", started, raising=False)
    own = [q.own_model(str(f), "qwen_math", str(problems), group_size=8, budget=48) for f in folders]
    said = [f"mean log-probability {found['logp']:.4f} " for found in own]
    assert said[0] in text and said[1] not in text


@pytest.mark.parametrize("template", ["none", "r1"])
def test_other_templates(tmp_path, monkeypatch, template) -> None:
    pytest.importorskip("math_verify")
    import readrun

    monkeypatch.setattr(
        q, "run", readrun.start("dr_grpo", profile="smoke", device="cpu", out=str(tmp_path)), raising=False
    )
    found = q.own_model(str(save_qwen2(tmp_path / "m", 0)), template, "", group_size=2, budget=8)
    assert found["reward"] == 0 and found["cosine"] is None and math.isfinite(found["logp"])


def test_wrong_checkpoints_questions_and_templates(tmp_path, monkeypatch) -> None:
    import readrun

    monkeypatch.setattr(
        q, "run", readrun.start("dr_grpo", profile="smoke", device="cpu", out=str(tmp_path)), raising=False
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="checkpoint:"):
        q.load_checkpoint(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="template:.*qwen_math"):
        q.load_problems("", "chatml")
    for content in ("", "not json", '{"problem": "1+1?"}'):
        (tmp_path / "q.jsonl").write_text(content)
        with pytest.raises(ValueError, match="questions:"):
            q.load_problems(str(tmp_path / "q.jsonl"), "none")
    with pytest.raises(ValueError, match="questions:"):
        q.load_problems(str(tmp_path / "nowhere.jsonl"), "none")


def test_committed_checkpoints_are_small_and_competent() -> None:
    """The base models of smoke and cpu: under 1 MB together, checks right, guesses better than chance."""
    import readrun
    from transformers import AutoModelForCausalLM

    folders = {puzzle: readrun.asset(q.BASES[puzzle]) for puzzle in ("main", "shared")}
    assert sum(f.stat().st_size for folder in folders.values() for f in folder.iterdir()) < 1_000_000
    asked = q.questions_of(range(q.HELD_OUT, q.HELD_OUT + 256), [1, 2])
    for puzzle, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        got = q.collect(model, q.make_tokenizer(), asked, 8, 64, torch.Generator().manual_seed(0))
        assert np.mean([q.check_is_right(asked[i // 8], t) for i, t in enumerate(got.texts)]) > 0.95
        assert got.rewards.mean() > 0.15
        assert any("h" in t for t in got.texts) == (puzzle == "main")
