"""The policy-gradient core against TRL, against its formula, and against what must not change it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun.rl import group_advantages, k3_kl, policy_loss

GROUP, BUDGET = 4, 12


def batch(seed: int = 0, rows: int = 8, width: int = 9):
    """Random log-probabilities whose ratios hit the clip on both sides, with both signs of the advantage."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, width, generator=g, dtype=torch.float64) * 3 - 0.7
    old = (logp + 0.4 * torch.randn(rows, width, generator=g, dtype=torch.float64)).clamp(max=0)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    mask = torch.arange(width) < lengths[:, None]
    rewards = (torch.rand(rows, generator=g, dtype=torch.float64) < 0.5).double()
    rewards[:2] = torch.tensor([0.0, 1.0])
    return logp, old, group_advantages(rewards, GROUP), mask


# ---------------------------------------------------------------- advantages


def test_advantages() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    std = group_advantages(rewards, 4, "std")
    assert torch.allclose(std[:4], torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64), atol=1e-7)
    assert (std[4:] == 0).all()  # all right: exactly nothing to learn
    assert group_advantages(rewards, 4, "none").tolist()[:4] == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, 4, "loo").tolist()[0] == 1.0  # 1 minus the mean of the other three


def test_equal_rewards_that_are_not_exact_in_binary_give_exactly_zero() -> None:
    for size in (3, 6, 7):
        assert (group_advantages(torch.full((size,), 0.1), size, "std") == 0).all()


@pytest.mark.parametrize(
    ("rewards", "size", "word"),
    [
        ([1.0, 0, 1], 2, "split"),
        ([1.0, 0], 1, "at least 2"),
        ([1.0, float("nan")], 2, "finite"),
        ([1.0, float("inf")], 2, "finite"),
    ],
)
def test_advantage_errors(rewards, size, word) -> None:
    with pytest.raises(ValueError, match=word):
        group_advantages(torch.tensor(rewards), size)


def test_unknown_scale() -> None:
    with pytest.raises(ValueError, match="scale"):
        group_advantages(torch.tensor([0.0, 1.0]), 2, "var")  # type: ignore[arg-type]


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.floats(-5, 5),
    st.floats(0.5, 4),
    st.permutations(range(4)),
)
@settings(deadline=None)
def test_shift_scale_and_order(rewards, shift, factor, order) -> None:
    r = torch.tensor(rewards, dtype=torch.float64)
    if r.max() - r.min() < 1e-2:
        return
    for scale, grows in (("std", 1.0), ("none", factor), ("loo", factor)):
        a = group_advantages(r, 4, scale)
        assert torch.allclose(group_advantages(r + shift, 4, scale), a, atol=1e-6)
        assert torch.allclose(group_advantages(r * factor, 4, scale), a * grows, atol=1e-6)
        assert torch.allclose(group_advantages(r[list(order)], 4, scale), a[list(order)], atol=1e-12)


def test_permuting_groups_permutes_advantages() -> None:
    r = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    a = group_advantages(r, 3).view(2, 3)
    assert torch.equal(group_advantages(r.view(2, 3).flip(0).reshape(-1), 3).view(2, 3), a.flip(0))


def test_rloo_is_the_plain_advantage_up_to_scale() -> None:
    r = torch.rand(24, dtype=torch.float64)
    by_hand = torch.stack(
        [r.view(3, 8)[:, i] - r.view(3, 8)[:, [j for j in range(8) if j != i]].mean(1) for i in range(8)], 1
    )
    assert torch.allclose(group_advantages(r, 8, "loo").view(3, 8), by_hand)
    assert torch.allclose(group_advantages(r, 8, "none") * 8 / 7, group_advantages(r, 8, "loo"))


# ---------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's own trainers on a tiny model whose log-probabilities we can choose."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from readrun import chapter
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    q = chapter("dr_grpo")
    folder = tmp_path_factory.mktemp("trl")
    q.make_tokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)  # with beta > 0 TRL loads its reference from there
    data = Dataset.from_dict({"prompt": ["?+1=2"] * 8})

    def make(loss_type: str, beta: float = 0.0):
        config = trl.GRPOConfig(
            output_dir=str(folder / "out"), loss_type=loss_type, beta=beta, epsilon=0.2,
            num_generations=GROUP, report_to=[], bf16=False, use_cpu=True, use_bias_correction_kl=False,
            per_device_train_batch_size=8, max_completion_length=BUDGET,
        )  # fmt: skip
        reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
        trainer = trl.GRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    return make


@pytest.mark.parametrize(
    ("loss_type", "aggregate"), [("grpo", "response"), ("dr_grpo", "constant"), ("bnpo", "batch")]
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_losses_equal_trl(trainers, loss_type, aggregate, beta) -> None:
    trainer = trainers(loss_type, beta)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        prompt, completion = (
            torch.randint(2, 20, (8, 5), generator=g),
            torch.randint(2, 20, (8, 9), generator=g),
        )
        _, _, advantages, mask = batch(seed)
        logp = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt, completion], 1),
            torch.cat([torch.ones_like(prompt), mask.long()], 1),
            9,
        )[0].detach()
        old = (logp + 0.4 * torch.randn(logp.shape, generator=g)).clamp(max=0)
        ref = (logp + 0.4 * torch.randn(logp.shape, generator=g)).clamp(max=0)
        ratio, a = (logp - old).exp()[mask], advantages[:, None].expand_as(mask)[mask]
        for side, sign in ((ratio > 1.2, 1), (ratio > 1.2, -1), (ratio < 0.8, 1), (ratio < 0.8, -1)):
            assert (side & (a * sign > 0)).any()  # every branch of the clip is used
        inputs = dict(
            prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), completion_ids=completion,
            completion_mask=mask.long(), advantages=advantages.float(), old_per_token_logps=old,
            ref_per_token_logps=ref, num_items_in_batch=mask.sum(),
        )  # fmt: skip
        theirs = trainer._compute_loss(trainer.model, inputs).item()
        ours = policy_loss(
            logp,
            old,
            advantages.float(),
            mask,
            aggregate=aggregate,
            constant=BUDGET,
            clip=0.2,
            ref_logp=ref,
            beta=beta,
        )
        assert ours.item() == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("aggregate", ["response", "constant", "batch"])
def test_on_policy_gradient_is_the_formula(aggregate) -> None:
    """d loss / d logp = -w_i A_i with w = 1/(B |o_i|), 1/(B C), 1/(sum of |o|)."""
    logp, _, a, mask = batch(3)
    logp.requires_grad_()
    policy_loss(logp, logp.detach(), a, mask, aggregate=aggregate, constant=BUDGET).backward()
    lengths, rows = mask.sum(1, keepdim=True), len(a)
    w = {"response": 1 / (rows * lengths), "constant": 1 / (rows * BUDGET), "batch": 1 / lengths.sum()}[
        aggregate
    ]
    assert torch.allclose(logp.grad, -w * a[:, None] * mask, atol=1e-14)


@pytest.mark.parametrize("aggregate", ["response", "constant", "batch"])
def test_gradient_by_finite_differences(aggregate) -> None:
    """A policy of two numbers: token log-probabilities -softplus(t0 + t1 x), old ones elsewhere."""
    _, old, a, mask = batch(5)
    x = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view_as(mask)

    def loss(theta):
        logp = -torch.nn.functional.softplus(theta[0] + theta[1] * x)
        return policy_loss(logp, old, a, mask, aggregate=aggregate, constant=BUDGET)

    theta = torch.tensor([0.9, 0.3], dtype=torch.float64, requires_grad=True)
    loss(theta).backward()
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-6
        slope = (loss(theta.detach() + step) - loss(theta.detach() - step)) / 2e-6
        assert slope.item() == pytest.approx(theta.grad[i].item(), abs=1e-7)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_padding_and_the_number_of_masked_tokens(seed, extra) -> None:
    logp, old, a, mask = batch(seed)
    junk = torch.full((len(a), extra), torch.nan, dtype=torch.float64)
    wide = [torch.cat([x, junk], 1) for x in (logp, old)]
    wide_mask = torch.cat([mask, torch.zeros_like(junk).bool()], 1)
    for aggregate in ("response", "constant", "batch"):
        how = dict(aggregate=aggregate, constant=40)
        assert torch.allclose(policy_loss(*wide, a, wide_mask, **how), policy_loss(logp, old, a, mask, **how))
    even = (
        torch.arange(mask.shape[1]).expand_as(mask) % 2 == 0
    )  # "constant" is a sum over tokens: halves add up
    halves = [policy_loss(logp, old, a, m, aggregate="constant", constant=40) for m in (even, ~even)]
    assert torch.allclose(
        sum(halves), policy_loss(logp, old, a, even | ~even, aggregate="constant", constant=40)
    )


def test_per_response_weights_depend_on_length_and_constant_ones_do_not() -> None:
    logp = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    a = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for aggregate, ratio in (("response", 4.0), ("constant", 1.0), ("batch", 1.0)):
        logp.grad = None
        policy_loss(logp, logp.detach(), a, mask, aggregate=aggregate, constant=4).backward()
        assert (logp.grad[0, 0] / logp.grad[1, 0]).item() == pytest.approx(ratio)


def test_sequence_level_ratio() -> None:
    logp, old, a, mask = batch(1)
    ours = policy_loss(logp, old, a, mask, aggregate="constant", constant=BUDGET, level="sequence")
    ratio = ((logp - old) * mask).sum(1).exp()
    each = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask.sum(1) / BUDGET
    assert torch.allclose(ours, each.mean())


def test_k3_is_never_negative_and_unbiased() -> None:
    p, r = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    k3 = k3_kl(p.log(), r.log())
    assert (k3 >= 0).all() and (k3_kl(p.log(), p.log()) == 0).all()
    assert (p * k3).sum().item() == pytest.approx((p * (p / r).log()).sum().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(logp=torch.full((8, 8), -1.0)), "must be"),
        (dict(advantages=torch.zeros(7)), "must be"),
        (dict(constant=None), "constant"),
        (dict(constant=3), "longest"),
        (dict(mask=torch.zeros(8, 9)), "no tokens"),
        (dict(logp=torch.full((8, 9), 0.5)), "positive"),
        (dict(aggregate="mean"), "aggregate"),
    ],
)
def test_loss_errors(change, word) -> None:
    logp, old, a, _ = batch(0)
    arguments = (
        dict(logp=logp, old_logp=old, advantages=a, mask=torch.ones(8, 9), aggregate="constant", constant=12)
        | change
    )
    with pytest.raises(ValueError, match=word):
        policy_loss(**arguments)
