# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Dr. GRPO: why wrong answers grow
#
# Zichen Liu, Changyu Chen, Wenjun Li, Penghui Qi and colleagues, *Understanding R1-Zero-Like Training: A
# Critical Perspective* (2025), [arXiv 2503.20783](https://arxiv.org/abs/2503.20783). Official code:
# [sail-sg/understand-r1-zero](https://github.com/sail-sg/understand-r1-zero).
#
# :::{admonition} The idea in three sentences
# :class: tip
# A language model that is trained with {term}`GRPO` to answer questions writes longer and longer, and that
# growth has been read as the model learning to think. Part of it is arithmetic: GRPO divides the loss of each
# response by its own length, so that a wrong answer is punished less per token the longer it is, and padding
# a failure becomes cheap. Remove that division, and the division by the standard deviation of the rewards,
# and what is left (*Dr. GRPO*, "GRPO Done Right") is the plain {term}`policy gradient`: without the padding
# and, the paper finds, as accurate. Here the padding goes; five seeds do not settle the accuracy.
#
# **You need to know** what a {term}`policy gradient`, an {term}`advantage` and an {term}`importance ratio`
# are, and how to read an {term}`interval` over {term}`seed`s. Symbols are in [Notation](../notation.md).
#
# **You will run** the exact bias on a policy small enough to enumerate; then reinforcement learning of a
# small transformer on a puzzle whose failures it can see, with both divisions, with either, and with none.
#
# **It costs** seconds in `smoke`, under two minutes on one core in `cpu`; the recorded `gpu` run is described
# below.
# :::

# %% tags=["parameters", "hide-input"]
profile = ""  # smoke | cpu | gpu; "" means $READRUN_PROFILE, else cpu
seed = 0  # first seed
seeds = 0  # how many seeds; 0: the profile's own number
device = "auto"  # auto | cpu | cuda
checkpoint = ""  # hub id or folder of a causal language model of your own
only = ""  # patterns of units to compute; "": all; "none": draw from saved units
out = ""  # folder for this run's files; "": build/dr_grpo/<profile>/live
template = "none"  # prompt for your own model: r1 | qwen_math | none
questions = ""  # JSON lines {"problem": …, "answer": …} for your own model; "": sums of two numbers

# %% tags=["hide-input"]
import copy
import functools
import inspect
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import readrun
import torch
from IPython.display import HTML, Code
from readrun import bench, decode, picker, plots, tables, train
from readrun.decode import Rollout
from readrun.onequery import compiled_step
from readrun.rl import group_advantages, policy_loss
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

run = readrun.start(
    "dr_grpo", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only,
    out=out, template=template, questions=questions,
)  # fmt: skip
plots.style()
disable_progress_bar()

# %% [markdown]
# ## The idea in a picture
#
# One question, eight responses, two of them right. Every token of a response is pushed up (right) or down
# (wrong) with a weight. Under GRPO that weight is the response's {term}`advantage` divided by the response's
# own length; under Dr. GRPO the divisor is one constant, the longest response allowed.

# %% tags=["figure", "hide-input"]
arms = plots.arms(["dr_grpo", "grpo"])
lengths = np.arange(4, 65)
figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.1), sharex=True)
for ax, answer, advantage in zip(axes, ("right", "wrong"), (1.62, -0.54), strict=True):
    ax.plot(lengths, advantage / lengths, label="GRPO: A / length", **arms["grpo"])
    ax.plot(lengths, np.full(61, advantage * 0.463 / 64), label="Dr. GRPO: A / constant", **arms["dr_grpo"])
    ax.axhline(0, color="#555555", linewidth=0.8)
    plots.label(ax, "response length (tokens)", "weight of each token (1)", f"a {answer} answer")
axes[0].legend()
plots.show(
    figure,
    alt="Two panels, weight per token against response length. Right answers: GRPO's weight is large "
    "for short responses and falls with length, so brevity is rewarded. Wrong answers: GRPO's "
    "negative weight is strong for short responses and fades to zero for long ones, so length is "
    "rewarded. Dr. GRPO's lines are flat in both.",
    caption="The push on each token of a response (group of 8, two right). GRPO: short when right, long "
    "when wrong.",
)

# %% [markdown]
# A right answer gets the strongest push when it is short, a wrong one the weakest penalty when it is long. If
# the model can tell, while it writes, that it has already failed, the cheapest thing to do is to keep
# writing.

# %% [markdown]
# ## Set-up
#
# One code path, three sizes; the active profile is in bold. `cpu` shows directions with one seed, `gpu` is
# the recorded experiment. All numbers that a claim depends on, and the rules that decide it, were written
# into `data/papers/dr_grpo.yml` before the first experiment.

# %% tags=["hide-input"]
S = run.settings(
    smoke=dict(
        seeds=1, arms=["grpo", "dr_grpo"], puzzles=["main", "shared", "retry"], rates=[4e-4], penalties=[],
        size=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4),
        pretrain=dict(steps=5, adapt=5, batch=16, lr=1e-3, from_checkpoint=True),
        rl=dict(steps=2, tune_steps=2, rollouts=16, updates=2, budget=32, group_size=4,
                terms=[1, 2], pool=100),
        evaluate=dict(questions=8, samples=4, hard_terms=[3, 3]),
        exact=dict(tables=3, group_size=4),
        difficulty=dict(questions=8, samples=40, steps=1, bins=2),
        speed=dict(repeats=3, inner=1, rows=16, batch=8, new_tokens=8, wide_batch=16, wide=[64, 2]),
        logps=dict(repeats=3, tokens=64, hidden=32, vocab=500, chunk=16),
        play=dict(group_size=[8], accuracy=[0.25], lr=[0.02, 0.08]),
    ),
    cpu=dict(
        seeds=1, arms=["grpo", "dr_grpo"], puzzles=["main", "shared"], rates=[4e-4], penalties=[],
        size=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4),
        pretrain=dict(steps=0, adapt=0, batch=64, lr=4e-3, from_checkpoint=True),
        rl=dict(steps=30, tune_steps=30, rollouts=128, updates=2, budget=64, group_size=8,
                terms=[1, 2], pool=10000),
        evaluate=dict(questions=128, samples=4, hard_terms=[3, 3]),
        exact=dict(tables=20, group_size=8),
        difficulty=dict(questions=32, samples=80, steps=0, bins=3),
        speed=dict(repeats=3, inner=1, rows=128, batch=64, new_tokens=32, wide_batch=64, wide=[64, 2]),
        logps=dict(repeats=5, tokens=512, hidden=64, vocab=2000, chunk=64),
        play=dict(group_size=[4, 16], accuracy=[0.25, 0.6], lr=[0.02, 0.08]),
    ),
    gpu=dict(
        seeds=5, arms=["grpo", "dr_grpo", "no_std", "no_length", "bnpo", "rloo", "length_penalty"],
        puzzles=["main", "shared", "retry"], rates=[1e-4, 2e-4, 4e-4], penalties=[0.1, 0.3, 1.0],
        size=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4),
        pretrain=dict(steps=3000, adapt=800, batch=256, lr=1e-3, from_checkpoint=False),
        rl=dict(steps=150, tune_steps=75, rollouts=256, updates=2, budget=192, group_size=8,
                terms=[1, 4], pool=10000),
        evaluate=dict(questions=512, samples=8, hard_terms=[5, 5]),
        exact=dict(tables=20, group_size=8),
        difficulty=dict(questions=96, samples=1280, steps=40, bins=6),
        speed=dict(repeats=15, inner=5, rows=2048, batch=256, new_tokens=192, wide_batch=1024, wide=[384, 6]),
        logps=dict(repeats=15, tokens=24000, hidden=1536, vocab=151936, chunk=1024),
        play=dict(group_size=[4, 16], accuracy=[0.25, 0.6], lr=[0.02, 0.08]),
    ),
)  # fmt: skip
S

# %% [markdown]
# ## The algorithm
#
# ### Step 1: compare each response with its group
#
# For a question $q$ the current policy writes a group of $G$ responses $o_1,\dots,o_G$. Each earns a reward
# $R_i\in\{0,1\}$: 1 if the final answer is right. How good is a response *for this question*? GRPO measures
# that in standard deviations, Dr. GRPO in plain reward:
#
# $$
# A_i^{\text{GRPO}} = \frac{R_i-\bar R}{\operatorname{std}(R)+\varepsilon}, \qquad
# A_i^{\text{Dr}} = R_i - \bar R,
# \qquad \bar R = \frac1G\sum_j R_j .
# $$
#
# The mean is a {term}`baseline`: it makes the gradient less noisy and leaves its direction alone. The
# standard deviation is not: it is small where a question is very easy or very hard, and dividing by it makes
# those questions count more. It is the sample standard deviation ($G-1$ in its denominator). $\varepsilon$ is
# $10^{-8}$ here and in the official code ($10^{-4}$ in TRL); with 0/1 rewards it changes nothing that can be
# seen. A group with equal rewards teaches nothing and has advantage exactly 0.
#
# The function is shared with other chapters and lives in `readrun.rl`; this is its code.

# %% tags=["hide-input"]
Code(inspect.getsource(group_advantages), language="python")

# %%
# NBVAL_CHECK_OUTPUT
R = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0], dtype=torch.float64)
for scale in ("std", "none"):
    print(f"{scale:>4}:", " ".join(f"{a:+.4f}" for a in group_advantages(R, 4, scale).tolist()))

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Two groups of four. In the first one of four is right: mean $\tfrac14$, so the plain advantages are
# $\tfrac34$ and $-\tfrac14$. Its sample variance is $(\tfrac{9}{16}+3\cdot\tfrac1{16})/3=\tfrac14$, its
# standard deviation $\tfrac12$: the scaled advantages are $1.5$ and $-0.5$. In the second two of four are
# right: plain $\pm\tfrac12$, variance $4\cdot\tfrac14/3=\tfrac13$, scaled $\pm\tfrac12\sqrt3=\pm0.8660$.
#
# One right answer among four counted $0.75$ against $0.5$ for one of two right ones, a factor $1.5$. After
# scaling it is $1.5$ against $0.866$, a factor $1.73$: the harder question has gained weight.
# :::
#
# ### Step 2: from advantages to a loss
#
# Token $t$ of response $i$ has the {term}`importance ratio`
# $r_{i,t}=\pi_\theta(o_{i,t}\mid q,o_{i,<t})\,/\,\pi_{\text{old}}(o_{i,t}\mid q,o_{i,<t})$, formed from
# log-probabilities token by token, and contributes the clipped surrogate of {term}`PPO`,
#
# $$
# \ell_{i,t}=\min\bigl(r_{i,t}A_i,\ \operatorname{clip}(r_{i,t},1-\epsilon,1+\epsilon)\,A_i\bigr),
# \qquad \epsilon=0.2 .
# $$
#
# All objectives share $\ell_{i,t}$. They differ in how the tokens of a batch of $B$ responses are added up.
# With $|o_i|$ the number of tokens of response $i$ and $C$ a constant (the generation budget: 3000 in the
# paper),
#
# $$
# J_{\text{GRPO}}=\frac1B\sum_i\frac{1}{|o_i|}\sum_t\ell_{i,t},\qquad
# J_{\text{Dr}}=\frac1B\sum_i\frac{1}{C}\sum_t\ell_{i,t},\qquad
# J_{\text{batch}}=\frac{\sum_i\sum_t\ell_{i,t}}{\sum_i|o_i|} .
# $$
#
# The third, the token mean over the whole batch (`bnpo` in TRL, also DAPO), is neither: its divisor is the
# same for all responses of a batch, but it depends on how long they are. $J$ is maximised, so that the loss
# is $-J$. There is no KL term in any of the paper's runs ($\beta=0$).

# %% tags=["hide-input"]
Code(inspect.getsource(policy_loss), language="python")

# %% [markdown]
# The paper's ablation is a 2×2 family: with and without the division by the standard deviation, with and
# without the division by length. Two baselines join it. Nothing else differs between the {term}`arm`s of this
# chapter.

# %%
OBJECTIVES: dict[str, dict[str, str]] = {
    "grpo": {"scale": "std", "aggregate": "response"},
    "no_std": {"scale": "none", "aggregate": "response"},
    "no_length": {"scale": "std", "aggregate": "constant"},
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    "bnpo": {"scale": "none", "aggregate": "batch"},
    "rloo": {"scale": "loo", "aggregate": "constant"},
}

# %% [markdown]
# What a token feels is the derivative of the loss in its log-probability. Two wrong responses with the same
# advantage, one of 2 tokens and one of 8:

# %%
# NBVAL_CHECK_OUTPUT
logp = torch.full((2, 8), -1.0, dtype=torch.float64, requires_grad=True)
mask = torch.arange(8) < torch.tensor([[2], [8]])
for name in ("response", "constant", "batch"):
    loss = policy_loss(
        logp, logp.detach(), torch.tensor([-1.0, -1.0]).double(), mask, aggregate=name, constant=16
    )
    (push,) = torch.autograd.grad(loss, logp)
    print(f"{name:>8}: short {push[0, 0]:.4f}  long {push[1, 0]:.4f}")

# %% [markdown]
# :::{dropdown} Where these numbers come from
# On the policy that sampled, $r=1$ and $\partial\ell/\partial\log\pi=A=-1$, so the loss has slope $+1$ times
# the weight of the token. *Response*: $\tfrac12\cdot\tfrac12=0.25$ for the short response,
# $\tfrac12\cdot\tfrac18=0.0625$ for the long one: four times less for each token of the longer failure.
# *Constant* ($C=16$): $\tfrac12\cdot\tfrac1{16}=0.03125$ for both. *Batch*: $\tfrac1{10}$ for both, since 10
# tokens were written.
# :::
#
# ### Step 3: which tokens count
#
# The end-of-sequence token (EOS) is an action like any other: a policy that is not scored on it never learns
# to stop. What stands after it is padding. A response that is cut off by the budget has no EOS; it earns
# reward 0 and *stays in the loss* with all its tokens.


# %%
def completion_mask(ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """True up to and including the first EOS of each row of (B, T) completion ids; all true without EOS."""
    is_eos = (ids == eos_id).long()
    return is_eos.cumsum(1) - is_eos == 0


# %%
# NBVAL_CHECK_OUTPUT
print(completion_mask(torch.tensor([[5, 7, 1, 1], [5, 7, 9, 4]]), eos_id=1).int().tolist())

# %% [markdown]
# :::{dropdown} Where these numbers come from
# EOS is 1. The first row ends at its third token, which counts; the 1 after it is padding. The second row was
# cut off: all four tokens count.
# :::
#
# ### Step 4: log-probabilities without the logits
#
# The ratio needs $\log\pi(o_t)$ for every token of every response. A vocabulary of 151 936 makes that
# expensive: for 8 responses of 3000 tokens the logits alone are 14.6 GB in float32, and automatic
# differentiation keeps several copies. But one number per token is all that is wanted, and its slope in the
# logits is known,
#
# $$
# \frac{\partial \log\pi(o_t)}{\partial z}= \mathbf 1_{o_t}-\operatorname{softmax}(z),\qquad z = W h_t ,
# $$
#
# with $h_t$ the last hidden state and $W$ the output matrix. So: take a chunk of tokens, compute its logits,
# keep $\log\sum\exp z$, forget the logits; in the backward pass compute them again. One matrix product more,
# and memory for one chunk instead of all.


# %%
def row_stats(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp, log-probability of the target) of each row of (N, vocab) logits, at least in float32."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    norm = logits.logsumexp(-1)
    return norm, logits.gather(-1, targets[:, None])[:, 0] - norm


def logit_gradient(logits: torch.Tensor, targets: torch.Tensor, norm: torch.Tensor, grad: torch.Tensor):
    """grad * (onehot(target) - softmax), (N, vocab): slope of each row's log-probability in its logits."""
    onehot = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    slope = (onehot.to(norm.dtype) - (logits.to(norm.dtype) - norm[:, None]).exp()) * grad[:, None]
    return slope.to(logits.dtype)


@functools.cache
def fused(function: Callable, kind: str) -> Callable:
    """One kernel instead of six on a GPU: the float32 copies of the logits then never exist in memory."""
    return torch.compile(function) if kind == "cuda" else function


# %%
class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] of N tokens, holding the logits of `chunk` tokens at a time.

    hidden (N, h), weight (vocab, h), targets (N,). Forward keeps one log-sum-exp per token; backward
    computes each chunk's logits again: one matrix product more than autograd's two.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        stats = fused(row_stats, hidden.device.type)
        pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        norms, logps = (torch.cat(x) for x in zip(*[stats(h @ weight.T, y) for h, y in pairs], strict=True))
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, targets, norms)
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, norms = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        slope_of = fused(logit_gradient, hidden.device.type)
        parts = (x.split(ctx.chunk) for x in (hidden, targets, norms, grad, grad_hidden))
        for h, y, norm, g, out in zip(*parts, strict=True):
            slope = slope_of(h @ weight.T, y, norm, g)
            torch.mm(slope, weight, out=out)
            grad_weight.addmm_(slope.T, h)
        return grad_hidden, grad_weight, None, None


# %% [markdown]
# Prompts have different lengths and are padded on the left, so that all responses of a batch start in one
# column. A row must not notice its padding. So each row is moved to the left first: what is then padding
# stands behind it, where causal attention never looks, and position ids count from the first real token.


# %%
def token_logps(
    model: torch.nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_len: int,
    *,
    chunk: int | None = None,
) -> torch.Tensor:
    """log pi(o_t | q, o_<t) of the T = width - prompt_len completion tokens, (B, T), temperature 1, float32.

    ids, attention_mask: (B, prompt_len + T), prompts padded on the left, completions on the right. chunk:
    tokens whose logits are held at once (None: all). Raises ValueError for shapes that differ or a
    prompt_len outside 1 … width - 1.
    """
    if ids.shape != attention_mask.shape or not 0 < prompt_len < ids.shape[1]:
        shapes = f"ids {tuple(ids.shape)}, attention_mask {tuple(attention_mask.shape)}"
        raise ValueError(
            f"{shapes}, prompt_len {prompt_len}: shapes must agree and leave room for a completion"
        )
    columns, pads = torch.arange(ids.shape[1], device=ids.device), (attention_mask.cumsum(1) == 0).sum(1)
    moved = ids.gather(1, (columns + pads[:, None]).clamp_max(len(columns) - 1))  # rows begin in column 0
    backbone, head = model.get_decoder(), model.get_output_embeddings().weight
    states = backbone(input_ids=moved, use_cache=False).last_hidden_state
    before = columns[prompt_len - 1 : -1] - pads[:, None]  # the state before a token predicts it
    hidden = states.gather(1, before[..., None].expand(-1, -1, states.shape[-1]))
    targets, kind = ids[:, prompt_len:], ids.device.type
    if torch.is_autocast_enabled(kind):
        hidden, head = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, head))
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    logps = ChunkedLogps.apply(flat, head, wanted, chunk) if chunk else row_stats(flat @ head.T, wanted)[1]
    return logps.view_as(targets)


# %%
# NBVAL_CHECK_OUTPUT
hidden = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
logps = ChunkedLogps.apply(hidden, weight, torch.tensor([1, 0]), 1)
logps.sum().backward()
print(
    "log-probabilities",
    [f"{x:.4f}" for x in logps.tolist()],
    "slopes",
    [f"{x:.4f}" for x in hidden.grad[:, 0]],
)

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Two tokens of a vocabulary of two with output weights $0$ and $\ln3$. First token: logits $(0,\ln3)$,
# probabilities $(\tfrac14,\tfrac34)$, target 1: $\ln\tfrac34=-0.2877$. Second: logits $(0,2\ln3)$,
# probabilities $(\tfrac1{10},\tfrac9{10})$, target 0: $\ln\tfrac1{10}=-2.3026$. Slopes in $h$ are
# $(\mathbf 1-\operatorname{softmax}) \cdot W$: $(1-\tfrac34)\ln3=0.2747$ and $(0-\tfrac9{10})\ln3=-0.9888$.
# :::
#
# ### Step 5: sampling a group
#
# A group is sampled at temperature 1: scoring at another temperature than sampling would make the ratio wrong
# from the start. `readrun.decode` keeps a static {term}`KV cache` and, on a GPU, replays one captured step
# per token instead of launching hundreds of kernels; rows stop at their EOS.


# %%
def sample_group(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    decoder: decode.Decoder | None = None,
) -> Rollout:
    """`group_size` responses to each prompt (token ids), rows of one prompt together; each stops at its EOS.

    Returns Rollout(ids, mask, finished, prompt_len). A `decoder` made once for the shape saves time.
    """
    config = model.generation_config
    pad = config.pad_token_id if config.pad_token_id is not None else model.config.pad_token_id
    return decode.sample(
        model, prompts, max_new_tokens, eos_id=config.eos_token_id, pad_id=pad, temperature=temperature,
        num_return_sequences=group_size, generator=generator, decoder=decoder,
    )  # fmt: skip


# %% [markdown]
# ### Step 6: which of these is the gradient of the expected reward?
#
# What one wants to climb is $\bar J(\theta)=\mathbb E[R]$. Its gradient is $\mathbb E[R\,\nabla\log\pi(o)]$
# with $\nabla\log\pi(o)=\sum_t\nabla\log\pi(o_t\mid\cdot)$: a plain sum over tokens, no division. Subtracting
# the group mean costs only a factor. Write the mean with and without the response itself,
#
# $$
# R_i-\bar R=\frac{G-1}{G}\Bigl(R_i-\frac1{G-1}\sum_{j\ne i}R_j\Bigr).
# $$
#
# The bracket is the {term}`RLOO` advantage; its baseline is independent of $o_i$ and drops out of the
# expectation. So the expected Dr. GRPO gradient is $\tfrac{G-1}{G}\nabla\bar J/C$ *exactly*. Nothing of the
# kind holds once each response is divided by its own length.
#
# No sampling is needed to see it. Take a vocabulary of $a$, $b$ and EOS and at most five tokens: 63
# responses. A table of random logits, one row per prefix, is the policy. The expectation over a group is a
# sum over how many of the others are right; for the batch mean also over how long they are, which is a
# convolution.


# %%
EOS = "."


def token_mdp(length_cap: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """All responses over {a, b, EOS} of at most `length_cap` tokens, as paths through states "prefix so far".

    Returns (texts, visits, lengths): N responses, visits (N, S, 3) of (state, token) pairs, lengths (N,)
    tokens. For length_cap 5: N = 63 (31 end with EOS, 32 are cut off), S = 31.
    """
    prefixes = [""]
    for prefix in prefixes:
        if len(prefix) < length_cap - 1:
            prefixes += [prefix + "a", prefix + "b"]
    state = {prefix: i for i, prefix in enumerate(prefixes)}
    texts = [p + EOS for p in prefixes] + [p + c for p in prefixes if len(p) == length_cap - 1 for c in "ab"]
    visits = torch.zeros(len(texts), len(prefixes), 3, dtype=torch.float64)
    for n, text in enumerate(texts):
        for t, token in enumerate(text):
            visits[n, state[text[:t]], f"ab{EOS}".index(token)] += 1
    return texts, visits, visits.sum((1, 2))


def response_scores(table: torch.Tensor, visits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probability (N,), gradient of its logarithm (N, S, 3)) of every response under logits (S, 3)."""
    logs = table.log_softmax(-1)
    slopes = visits - visits.sum(-1, keepdim=True) * logs.exp()
    return (visits * logs).sum((1, 2)).exp(), slopes


def advantage_table(group_size: int, scale: str) -> torch.Tensor:
    """(G + 1, 2): advantage of a wrong (column 0) and of a right response in a group with k right ones."""
    groups = (torch.arange(group_size) < torch.arange(group_size + 1)[:, None]).double()
    advantages = group_advantages(groups.flatten(), group_size, scale).view_as(groups)
    return torch.stack([advantages[:, -1], advantages[:, 0]], 1)


# %% tags=["hide-input"]
def convolve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Full convolution of two matrices: the distribution of a sum of two independent pairs of counts."""
    pad = (b.shape[0] - 1, b.shape[1] - 1)
    return torch.nn.functional.conv2d(a[None, None], b.flip(0, 1)[None, None], padding=pad)[0, 0]


def totals(p: torch.Tensor, rewards: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """P(k right, l tokens in all) of `count` independent responses, (count + 1, count * longest + 1)."""
    one = torch.zeros(2, int(lengths.max()) + 1, dtype=p.dtype)
    one.index_put_((rewards.long(), lengths.long()), p, accumulate=True)
    total = torch.ones(1, 1, dtype=p.dtype)
    for _ in range(count):
        total = convolve(total, one)
    return total


def response_weights(
    how: dict[str, str], p, right, lengths, elsewhere, questions: int, group_size: int, cap: int
):
    """E[advantage / divisor | response] of each response (N,), over the other members of its group.

    elsewhere: (1, L) distribution of the tokens that the other questions' groups write (batch mean only).
    """
    rest = totals(p, right, lengths, group_size - 1)
    if how["aggregate"] == "batch":
        rest = convolve(rest, elsewhere)
    values, tokens, out = advantage_table(group_size, how["scale"]), torch.arange(rest.shape[1]), []
    for r, length in zip(right.long().tolist(), lengths.tolist(), strict=True):
        a = values[torch.arange(group_size) + r, r]  # by the number k of right ones among the others
        if how["aggregate"] == "batch":
            out.append((a @ rest / (tokens + length)).sum() * questions * group_size)
        else:
            out.append((a @ rest).sum() / (length if how["aggregate"] == "response" else cap))
    return torch.stack(out)


# %%
def exact_gradients(
    policy_table: torch.Tensor, reward_fn: Callable[[int, str], int], length_cap: int, group_size: int
) -> dict[str, torch.Tensor]:
    """Expected on-policy gradient of every objective, and "true", the gradient of the expected reward.

    policy_table: (Q, S, 3) float64 logits, one table per question; reward_fn(question, text) in {0, 1}.
    Exact for any group size. Returns {name: (Q, S, 3)}; the constant divisor is length_cap. Source: the
    paper's appendix A.
    """
    texts, visits, lengths = token_mdp(length_cap)
    count = len(policy_table)
    right = torch.tensor([[reward_fn(q, t) for t in texts] for q in range(count)], dtype=torch.float64)
    probabilities, slopes = zip(*(response_scores(table, visits) for table in policy_table), strict=True)
    written = [totals(p, torch.zeros_like(p), lengths, group_size)[:1] for p in probabilities]
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in ("true", *OBJECTIVES)}
    for q, (p, slope) in enumerate(zip(probabilities, slopes, strict=True)):
        elsewhere = functools.reduce(
            convolve, written[:q] + written[q + 1 :], torch.ones(1, 1, dtype=p.dtype)
        )
        weights = {"true": right[q]}
        for name, how in OBJECTIVES.items():
            weights[name] = response_weights(
                how, p, right[q], lengths, elsewhere, count, group_size, length_cap
            )
        for name, weight in weights.items():
            grads[name].append(torch.einsum("n,nsa->sa", p * weight, slope) / count)
    return {name: torch.stack(parts) for name, parts in grads.items()}


# %%
# NBVAL_CHECK_OUTPUT
flat = torch.zeros(1, 31, 3, dtype=torch.float64)
exact = exact_gradients(flat, lambda q, text: int(text == "ab."), length_cap=5, group_size=8)
for name in ("dr_grpo", "rloo", "no_std"):
    cosine = torch.nn.functional.cosine_similarity(exact[name].flatten(), exact["true"].flatten(), dim=0)
    print(
        f"{name:>8}: cosine {cosine:.6f}, norm ratio x C {5 * exact[name].norm() / exact['true'].norm():.6f}"
    )

# %% [markdown]
# :::{dropdown} Where these numbers come from
# For a group of 8 the identity above says $\tfrac{G-1}{G}=\tfrac78=0.875$ for Dr. GRPO and $1$ for RLOO,
# whose baseline leaves the response out, both with cosine 1. "No std" keeps the division by length; with one
# question and a uniform policy its gradient points elsewhere, and there is no simple number to expect: only a
# cosine below 1.
# :::
#
# ### Step 7: how much the standard deviation favours extreme questions
#
# The division by $\operatorname{std}(R)$ is the other bias. A question with pass rate $p$ gets, in a group of
# $G$, a mean absolute advantage that is a binomial sum,
#
# $$
# m(p)=\sum_{k=0}^{G}\binom Gk p^k(1-p)^{G-k}\
# \frac{k\,|A_{\text{right}}(k)|+(G-k)\,|A_{\text{wrong}}(k)|}{G} .
# $$
#
# With infinitely many responses the scaling is $1/\sqrt{p(1-p)}$ and grows without bound. With eight it
# cannot: the most extreme group that teaches anything has one right answer, and groups without any are
# silent.


# %%
def difficulty_mass(pass_rate: np.ndarray | float, group_size: int, scale: str) -> np.ndarray:
    """Closed form of the expected mean |advantage| of a group whose responses are right with `pass_rate`."""
    k, p = np.arange(group_size + 1), np.asarray(pass_rate, dtype=float)[..., None]
    ways = np.array([math.comb(group_size, i) for i in k])
    wrong, right = np.abs(advantage_table(group_size, scale).numpy().T)
    return (ways * p**k * (1 - p) ** (group_size - k)) @ ((k * right + (group_size - k) * wrong) / group_size)


# %%
# NBVAL_CHECK_OUTPUT
weight_of = lambda p: difficulty_mass(p, 8, "std") / difficulty_mass(p, 8, "none")  # noqa: E731
one, four = (1 / math.sqrt(k * (8 - k) / (8 * 7)) for k in (1, 4))
print(f"1/std with 1 of 8 right {one:.4f}, with 4 of 8 {four:.4f}, ratio {one / four:.4f}")
print(f"mean weight at pass rate 0.02 over that at 0.5: {weight_of(0.02) / weight_of(0.5):.4f}")

# %% [markdown]
# :::{dropdown} Where these numbers come from
# With $k$ of $G$ right the sample variance is $k(G-k)/(G(G-1))$: $7/56=0.125$ for $k=1$, so
# $1/\operatorname{std}= \sqrt8=2.8284$; $16/56$ for $k=4$, so $1.8708$. The ratio $1.5119$ is the most that
# scaling can ever favour one group over another. On average over the groups that a pass rate of 0.02 produces
# it is $1.39$.
# :::

# %% [markdown]
# ## The puzzle
#
# The experiment needs a task in which a small model fails often, *sees* that it has failed, and can then do
# something useless. A question is a sum with a missing first number, modulo 10:
#
# > `?+3+8=6` → `x4;4+3=7;7+8=5;nhhh#4.`
#
# The response is a guess `x4;`, a check of the guess link by link, a flag (`y`: the chain ends at the target,
# `n`: it does not), filler, the answer `#4` and EOS (`.`). Filler after `y` is `w` ("so"), after `n` it is
# `h` ("hmm"). Four properties matter:
#
# - the guess is hard, since the model must invert the sum before it has written anything down;
# - the check is easy, so that the flag tells the policy whether it will be paid;
# - filler cannot change the outcome, so that any change of its length is waste, by construction;
# - the number of addends sets the pass rate.
#
# The base model learns from rendered responses whose guess is right half of the time and uniform otherwise,
# and whose filler goes on with probability 0.85 after *both* flags. Two variants serve as controls: `shared`
# uses the same filler token after success and failure; in `retry` a failed check is followed by another guess
# with probability 0.3, so that length can buy accuracy.


# %%
GUESS_RIGHT, MORE_FILLER, TRY_AGAIN = 0.5, 0.85, 0.3  # probabilities of the pre-training corpus
PUZZLES = ("main", "shared", "retry")


@dataclass(frozen=True)
class Question:
    """?+a+b+…=target, modulo 10."""

    addends: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return "?" + "".join(f"+{a}" for a in self.addends) + f"={self.target}"

    @property
    def answer(self) -> int:
        return (self.target - sum(self.addends)) % 10


def make_question(rng: np.random.Generator, terms: int) -> Question:
    """A random puzzle with `terms` addends. Raises ValueError for terms < 1."""
    if terms < 1:
        raise ValueError(f"a question needs at least one addend, got terms={terms}")
    *addends, target = (int(d) for d in rng.integers(0, 10, terms + 1))
    return Question(tuple(addends), target)


def questions_of(seeds: Sequence[int], terms: Sequence[int]) -> list[Question]:
    """One question per seed, with terms[0] to terms[1] addends."""
    rngs = (np.random.default_rng(seed) for seed in seeds)
    return [make_question(rng, int(rng.integers(terms[0], terms[1] + 1))) for rng in rngs]


# %%
def render_chain(question: Question, rng: np.random.Generator, style: str = "main") -> str:
    """One response as the pre-training corpus has it: guess, check, flag, filler, answer, EOS.

    style: "main", "shared" (one filler token for both flags) or "retry". Raises ValueError for another one.
    """
    if style not in PUZZLES:
        raise ValueError(f"style must be one of {', '.join(PUZZLES)}, got {style!r}")
    text = ""
    while True:
        guess = question.answer if rng.random() < GUESS_RIGHT else int(rng.integers(10))
        text, total = text + f"x{guess};", guess
        for addend in question.addends:
            text += f"{total}+{addend}={(total + addend) % 10};"
            total = (total + addend) % 10
        solved = total == question.target
        filler = "w" if solved or style == "shared" else "h"
        text += ("y" if solved else "n") + filler * int(rng.geometric(1 - MORE_FILLER) - 1)
        if solved or style != "retry" or rng.random() >= TRY_AGAIN:
            return text + f"#{guess}" + EOS


def verify(question: Question, text: str) -> bool:
    """The reward: the response ended by itself and holds exactly one "#d", d right. Never raises on text."""
    finished = text.endswith(EOS) and text.count(EOS) == 1
    return finished and text.count("#") == 1 and re.findall(r"#([0-9])", text) == [str(question.answer)]


def check_is_right(question: Question, text: str) -> bool:
    """Whether the first check of a response follows from its guess, link by link, and its flag is true."""
    links = "".join(rf"([0-9])\+{a}=([0-9]);" for a in question.addends)
    found = re.match(rf"x([0-9]);{links}([yn])", text)
    if not found:
        return False
    guess, *digits, flag = found.groups()
    total = int(guess)
    for addend, left, right in zip(question.addends, digits[::2], digits[1::2], strict=True):
        if int(left) != total or int(right) != (total + addend) % 10:
            return False
        total = int(right)
    return flag == ("y" if total == question.target else "n")


# %%
# NBVAL_CHECK_OUTPUT
puzzle = Question((3, 8), 6)
for text in ("x5;5+3=8;8+8=6;yww#5.", "x4;4+3=7;7+8=5;nhhh#4.", "x5;5+3=8;8+8=6;yww#5", "x5;#5#5."):
    print(
        f"{puzzle.prompt} {text:24} reward {int(verify(puzzle, text))}  check {check_is_right(puzzle, text)}"
    )

# %% [markdown]
# :::{dropdown} Where these numbers come from
# $?+3+8\equiv6$: the missing number is $6-11=-5\equiv5$. The second response guesses 4, checks correctly that
# the chain ends at 5 and not at 6, and flags `n`: right check, no reward. The third has no EOS: it was cut
# off. The fourth gives two answers and no check.
# :::
#
# ### The model and its pre-training
#
# A Llama from `transformers` with one token per character.


# %%
def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; "." ends a response."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", EOS, *"0123456789?+=x;ynwh#"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token=EOS, padding_side="left"
    )


def make_model(size: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights; `size` holds fields of LlamaConfig."""
    torch.manual_seed(seed)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **size, **ids)
    )


def pretrain(
    model, tokenizer, style: str, terms: Sequence[int], steps: int, batch: int, lr: float, seed: int
):
    """Next-token training on freshly rendered responses; prompts are not scored. Returns the losses."""
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    codes, pad = (
        tokenizer.get_vocab(),
        tokenizer.pad_token_id,
    )  # the tokenizer itself takes longer than a step

    def batches():
        for _ in range(steps):
            asked = [make_question(rng, int(rng.integers(terms[0], terms[1] + 1))) for _ in range(batch)]
            rows = [[codes[c] for c in q.prompt + render_chain(q, rng, style)] for q in asked]
            width, start = max(map(len, rows)), torch.tensor([len(q.prompt) for q in asked])
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            scored = (ids != pad) & (torch.arange(width) >= start[:, None])
            yield ids.to(device), ids.masked_fill(~scored, -100).to(device)

    def loss_of(model, pair):
        logits = model(input_ids=pair[0]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), pair[1][:, 1:].flatten())

    updater = train.Updater(model, lr, steps=steps, warmup=steps // 20, betas=(0.9, 0.98))
    return train.fit(updater, batches(), loss_of, name=f"pre-train {style}")


# %% [markdown]
# ### One round of experience
#
# Sample a group for each question, score the texts.


# %%
class Experience(NamedTuple):
    """One round of rollouts, B responses; groups are contiguous."""

    rollout: Rollout
    attention_mask: torch.Tensor  # (B, prompt + T)
    rewards: torch.Tensor  # (B,)
    lengths: torch.Tensor  # (B,) tokens up to and including EOS
    texts: list[str]


def cut_at(rollout: Rollout, tokenizer: Any, stop: str) -> Rollout:
    """End each response after the first token that completes the string `stop`; it is then finished."""
    mask, finished = rollout.mask.clone(), rollout.finished.clone()
    for i, tokens in enumerate(rollout.completions):
        if stop in tokenizer.decode(tokens):
            ends = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
            mask[i, ends:], finished[i] = False, True
    return Rollout(rollout.ids, mask, finished, rollout.prompt_len)


# %%
def collect(
    model,
    tokenizer,
    asked: Sequence,
    group_size: int,
    budget: int,
    generator=None,
    decoder=None,
    reward=verify,
    stop="",
) -> Experience:
    """Sample a group for each question and score it; what does not end within the budget has reward 0."""
    prompts = tokenizer([q.prompt for q in asked]).input_ids
    rollout = sample_group(model, prompts, group_size, budget, generator=generator, decoder=decoder)
    rollout = cut_at(rollout, tokenizer, stop) if stop else rollout
    texts, device = tokenizer.batch_decode(rollout.completions), rollout.mask.device
    pairs = zip(texts, rollout.finished.tolist(), strict=True)
    rewards = [float(done and reward(asked[i // group_size], text)) for i, (text, done) in enumerate(pairs)]
    width = torch.tensor([len(p) for p in prompts for _ in range(group_size)])[:, None]
    prompt = torch.arange(rollout.prompt_len) >= rollout.prompt_len - width
    seen = torch.cat([prompt.to(device), rollout.mask], 1).long()
    paid = torch.tensor(rewards, dtype=torch.float64, device=device)
    return Experience(rollout, seen, paid, rollout.mask.sum(1), texts)


def decoder_for(model, tokenizer, asked: Sequence, group_size: int, rows: int, budget: int) -> decode.Decoder:
    """A decoder wide enough for every question, captured once and used for many calls."""
    width = max(len(p) for p in tokenizer([q.prompt for q in asked]).input_ids)
    ends = dict(eos_id=model.generation_config.eos_token_id, pad_id=tokenizer.pad_token_id)
    kind = (
        torch.bfloat16 if model.device.type == "cuda" else None
    )  # as the learner's autocast; it scores again
    return decode.Decoder(model, rows, width, budget, num_return_sequences=group_size, dtype=kind, **ends)


# %% [markdown]
# ### Several updates on one round
#
# A round is used for several mini-batches of whole groups; from the second on the ratio differs from 1 and
# the clip can act. (The paper: 128 questions × 8 responses per round, 8 updates.) The old log-probabilities
# come from the learner and not from the sampler, in the same mini-batches and precision, so that the first
# ratio is exactly 1; the code checks that.


# %%
def clip_fraction(logp, old_logp, advantages, mask, clip: float = 0.2) -> torch.Tensor:
    """Share of counted tokens whose gradient the clip has removed (scalar tensor)."""
    ratio, a = (logp - old_logp).exp(), advantages[:, None]
    cut = ((ratio > 1 + clip) & (a > 0)) | ((ratio < 1 - clip) & (a < 0))
    return (cut & mask).sum() / mask.sum()


def policy_step(
    model, updater, got: Experience, advantages, aggregate: str, budget: int, updates: int, clip: float = 0.2
):
    """One pass over a round of rollouts in `updates` mini-batches; (mean clip fraction, mean gradient norm).

    Raises FloatingPointError, quoting the responses, when a loss is not finite, and RuntimeError when the
    first ratio is not 1 (dropout on, weights changed in between).
    """
    rows = torch.arange(len(advantages), device=advantages.device).chunk(updates)
    ids, prompt_len, mask = got.rollout.ids, got.rollout.prompt_len, got.rollout.mask

    def logps(part):
        with train.autocast(ids.device):
            return token_logps(model, ids[part], got.attention_mask[part], prompt_len)

    old = [logps(part).detach() for part in rows]  # not under no_grad, which may choose other kernels
    cut, norms = [], []
    for part, old_logp in zip(rows, old, strict=True):
        logp, scored = logps(part), mask[part]
        a = advantages[part].to(logp.dtype)
        if part[0] == 0 and (logp.detach() - old_logp)[scored].abs().max() > 1e-3:
            raise RuntimeError("the first ratio must be 1: is dropout on, or did a weight change in between?")
        bad = ~torch.isfinite(logp.masked_fill(~scored, 0)).all(1)
        if bad.any():
            texts = [got.texts[j] for j in part[bad].tolist()]
            raise FloatingPointError(f"log-probabilities are not finite for the responses {texts}")
        loss = policy_loss(logp, old_logp, a, scored, aggregate=aggregate, constant=budget, clip=clip)
        cut.append(clip_fraction(logp.detach(), old_logp, a, scored, clip))
        norms.append(updater(loss))
    return torch.stack(cut).mean().item(), torch.stack(norms).mean().item()


# %%
def rl_train(
    model, tokenizer, asked: Sequence, objective: str, steps: int, *, lr: float, group_size: int = 8,
    rollouts: int = 128, updates: int = 2, budget: int = 64, seed: int = 0, length_penalty: float = 0.0,
    optimizer: str = "adamw", reward: Callable = verify, stop: str = "",
) -> dict[str, np.ndarray]:  # fmt: skip
    """Train `model` in place; returns per step: reward, lengths by outcome, truncation, clipping, norm …

    The optimiser is the paper's: AdamW, constant rate, betas (0.9, 0.95), no decay, gradient norm clipped
    at 1. length_penalty: advantages come from reward - length_penalty * length / budget; the history
    shows the reward. Raises ValueError for an unknown objective, or rollouts that do not split into whole
    groups per update.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if rollouts % (group_size * updates):
        raise ValueError(
            f"rollouts={rollouts} is not a multiple of group_size x updates = {group_size * updates}"
        )
    rng, generator, how = (
        np.random.default_rng(seed),
        torch.Generator().manual_seed(seed),
        OBJECTIVES[objective],
    )
    updater = train.Updater(model, lr, optimizer=optimizer)
    decoder = decoder_for(model, tokenizer, asked, group_size, rollouts, budget)
    rows = []
    for _ in train.progress(range(steps), objective):
        chosen = [asked[i] for i in rng.choice(len(asked), rollouts // group_size, replace=False)]
        got = collect(model, tokenizer, chosen, group_size, budget, generator, decoder, reward, stop)
        paid = got.rewards - length_penalty * got.lengths / budget
        advantages = group_advantages(paid, group_size, how["scale"])
        cut, norm = policy_step(model, updater, got, advantages, how["aggregate"], budget, updates)
        rows.append(step_record(got, advantages, group_size) | {"clip_fraction": cut, "grad_norm": norm})
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


# %%
def step_record(got: Experience, advantages: torch.Tensor, group_size: int) -> dict[str, float]:
    """What is drawn against the steps; a mean over nothing (no wrong response left) is nan."""
    right, lengths = got.rewards > 0.5, got.lengths.double()
    return {
        "reward": got.rewards.mean().item(),
        "length_right": lengths[right].mean().item(),
        "length_wrong": lengths[~right].mean().item(),
        "length_all": lengths.mean().item(),
        "tokens": lengths.sum().item(),
        "truncated": 1 - got.rollout.finished.double().mean().item(),
        "zero_groups": (advantages.view(-1, group_size) == 0).all(1).double().mean().item(),
    }


# %%
def length_by_outcome(
    model, tokenizer, asked: Sequence, n: int, *, budget: int, seed: int = 0, rows: int = 1024, reward=verify
) -> dict[str, Any]:
    """`n` samples per question at temperature 1: accuracy; tokens of right and wrong responses, mean and SE.

    A response cut off by the budget is wrong and counts with all its tokens. The SE takes questions as
    clusters; nan where an outcome does not occur. Also returns "outcomes" (questions, n) bool and "texts"
    (questions * n).
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = decoder_for(model, tokenizer, asked, n, min(rows // n, len(asked)) * n, budget)
    got = collect(model, tokenizer, asked, n, budget, generator, decoder, reward)
    right = (got.rewards > 0.5).cpu().numpy().reshape(-1, n)
    lengths = got.lengths.cpu().numpy().reshape(-1, n)
    out: dict[str, Any] = {"accuracy": float(right.mean()), "outcomes": right, "texts": got.texts}
    out["truncated"] = 1 - float(got.rollout.finished.float().mean())
    for name, chosen in (("right", right), ("wrong", ~right), ("all", np.ones_like(right))):
        count, total = chosen.sum(1), (lengths * chosen).sum(1)
        mean = total.sum() / count.sum() if count.any() else math.nan
        spread = math.sqrt(((total - mean * count) ** 2).sum()) / count.sum() if count.any() else math.nan
        out |= {f"{name}_tokens": float(mean), f"{name}_se": float(spread)}
    return out


# %% [markdown]
# ## Corrections
#
# Where short accounts of the paper go wrong, and what the official code does:
#
# - **The sign.** Pseudo-code of both objectives often returns $J$ under the name "loss". Minimised as
#   printed, it trains the model to be wrong.
# - **0/0.** Without $\varepsilon$ in the denominator a group with equal rewards gives NaN, and such groups
#   are common.
# - **"No normalisation" is not Dr. GRPO.** A constant divisor is used, the generation budget. Dividing by the
#   number of tokens *in the batch* is another objective, and still biased (step 6 and the figure below).
# - **One switch is not enough in TRL.** `loss_type="dr_grpo"` alone still divides by the standard deviation;
#   `scale_rewards="none"` is needed as well. TRL's default loss is neither of the two.
# - **The ratio is per token**, in log space. A ratio of whole responses is another algorithm (GSPO).
# - **The base model of the comparison** is Qwen2.5-1.5B with the R1 template; the Math models serve the study
#   of templates and the final run.
# - **Truncation, KL and updates.** A truncated response has reward 0 and stays in the loss; $\beta=0$ in
#   every run; each round of rollouts is used for 8 updates, so that the clip is active after the first.
# - **43.3 on AIME** is 13 of 30 problems, decoded greedily: a binomial standard error of 9 points. The mean
#   over five benchmarks is 51.4.
# - **Early growth is not the claim.** With either objective responses grow early *with* the reward. The claim
#   is about growth that goes on after the reward has flattened, and about the length of wrong answers.

# %% [markdown]
# ## Experiment
#
# ### The exact bias
#
# First without any sampling: random logit tables for two questions of the enumerable policy of step 6. One
# question pays for an odd number of $b$, the other, harder one for responses that begin with $ab$; both only
# if the response ends. Besides the angle to the true gradient it measures what a short step along each
# gradient does to the expected length of a *wrong* response.


# %%
def mdp_reward(question: int, text: str) -> int:
    """1 for an ended response with an odd number of b (question 0) or beginning with ab (question 1)."""
    return int(text.endswith(EOS) and (text.count("b") % 2 == 1 if question == 0 else text.startswith("ab")))


def wrong_length(policy_table: torch.Tensor, length_cap: int) -> torch.Tensor:
    """Expected tokens of a wrong response, mean over questions; differentiable in the table (Q, S, 3)."""
    texts, visits, lengths = token_mdp(length_cap)
    out = policy_table.new_zeros(())
    for q, table in enumerate(policy_table):
        wrong = response_scores(table, visits)[0] * torch.tensor([1.0 - mdp_reward(q, t) for t in texts])
        out = out + (wrong * lengths).sum() / wrong.sum() / len(policy_table)
    return out


def exact_mdp(tables: int, group_size: int, length_cap: int = 5) -> dict[str, Any]:
    """Per objective and random table: cosine with the truth, |C x norm ratio - (G-1)/G|, slope of length."""
    out: dict[str, list[float]] = {}
    for number in range(tables):
        table = torch.tensor(np.random.default_rng(number).normal(size=(2, 31, 3)), requires_grad=True)
        (slope,) = torch.autograd.grad(wrong_length(table, length_cap), table)
        grads = exact_gradients(table.detach(), mdp_reward, length_cap, group_size)
        true = grads["true"]
        for name, g in grads.items():
            scale = length_cap * (g.norm() / true.norm()).item() - (group_size - 1) / group_size
            for key, value in {
                "cosine": (g * true).sum() / g.norm() / true.norm(),
                "scale_error": abs(scale),
                "slope": (g * slope).sum() / g.norm(),
            }.items():
                out.setdefault(f"{key}__{name}", []).append(float(value))
    return {key: np.array(values) for key, values in out.items()}


# %%
mdp = run.unit(exact_mdp, **S.exact)

# %% [markdown]
# ### Base models
#
# In `gpu` a larger model is pre-trained here; the bases of the two controls continue from the main one on
# their own corpus, so that all three know nearly the same. `smoke` and `cpu` start from a small committed
# checkpoint that `make_checkpoint` below has trained on a CPU.
#
# Reinforcement learning uses questions of the seeds 0 to 9999, the evaluation others. Questions with one or
# two addends exist only 100 and 1000 times, so that the same question can occur on both sides; what is
# measured is behaviour on fresh draws, not memory. A *hard* set has one addend more than any question in
# training.


# %%
BASES = {"main": "dr_grpo/base", "shared": "dr_grpo/base_shared", "retry": "dr_grpo/base"}
HELD_OUT, TUNING_SEED = 1_000_000, 1000


def pretrain_base(
    puzzle: str, size: dict, recipe: dict, terms: list[int], start=None, seed: int = 0
) -> dict[str, Any]:
    """The base model of a puzzle: from the committed checkpoint, from another base, or from scratch."""
    tokenizer, steps = make_tokenizer(), recipe["adapt"] if start else recipe["steps"]
    if recipe["from_checkpoint"]:
        model = AutoModelForCausalLM.from_pretrained(readrun.asset(BASES[puzzle]), dtype=torch.float32)
    elif start:
        model = policy_of(start, size)[0]
    else:
        model = make_model(size, tokenizer, seed)
    model.to(run.device)
    losses = pretrain(model, tokenizer, puzzle, terms, steps, recipe["batch"], recipe["lr"], seed)
    return {"weights": model.state_dict(), "losses": np.array(losses)}


# %%
def policy_of(base, size: dict) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A fresh copy of a base model on the run's device, and its tokenizer."""
    tokenizer = make_tokenizer()
    model = make_model(size, tokenizer, 0)
    model.load_state_dict(base["weights"])
    return model.to(run.device), tokenizer


def evaluation_of(model, tokenizer, rl: dict, evaluate: dict) -> dict[str, Any]:
    """Held-out accuracy and lengths, accuracy on the hard set, a response to the first six questions."""
    asked = questions_of(range(HELD_OUT, HELD_OUT + evaluate["questions"]), rl["terms"])
    hard = questions_of(range(HELD_OUT, HELD_OUT + evaluate["questions"]), evaluate["hard_terms"])
    n, budget = evaluate["samples"], rl["budget"]
    found = length_by_outcome(model, tokenizer, asked, n, budget=budget)
    harder = length_by_outcome(model, tokenizer, hard, n, budget=budget)
    found["hard_accuracy"] = harder["accuracy"]
    checks = [check_is_right(asked[i // n], text) for i, text in enumerate(found["texts"])]
    guesses = [text[:3] == f"x{asked[i // n].answer};" for i, text in enumerate(found["texts"])]
    found["checked"], found["guessed"] = (np.reshape(x, (-1, n)).mean(1) for x in (checks, guesses))
    found["prompts"] = [q.prompt for q in asked[:6]]
    found["texts"] = found["texts"][: 6 * n : n]
    return {key: value for key, value in found.items() if key != "outcomes"}


def judge_base(puzzle: str, base, size: dict, rl: dict, evaluate: dict) -> dict[str, Any]:
    """What the base model can do before any reinforcement learning."""
    return evaluation_of(*policy_of(base, size), rl, evaluate)


# %%
weights = make_model(S.size, make_tokenizer(), 0).num_parameters()
print(f"{weights / 1e6:.2f} M parameters in this profile")
bases: dict[str, readrun.Unit] = {}
for puzzle in S.puzzles:
    shape = dict(size=S.size, recipe=S.pretrain, terms=S.rl["terms"], start=bases.get("main"))
    bases[puzzle] = run.unit(pretrain_base, puzzle=puzzle, **shape)
judged = {
    puzzle: run.unit(judge_base, puzzle=puzzle, base=base, size=S.size, rl=S.rl, evaluate=S.evaluate)
    for puzzle, base in bases.items()
}
tables.grid(
    [
        {
            "base model": puzzle,
            "right check and flag (ceiling 1.00)": round(float(unit["checked"].mean()), 3),
            "right guess (floor 0.10, ceiling 0.55)": round(float(unit["guessed"].mean()), 3),
            "accuracy": round(unit["accuracy"], 3),
            "tokens, right": round(unit["right_tokens"], 1),
            "tokens, wrong": round(unit["wrong_tokens"], 1),
        }
        for puzzle, unit in judged.items()
        if unit.done
    ],
    caption="Competence of the base models. Below 0.95 (check) or 0.15 (guess) the claims that use them "
    "are void.",
)

# %% [markdown]
# ### Reinforcement learning
#
# Arms share base model, questions, seeds, optimiser and number of rollouts. AdamW hides the scale of a loss
# but not its noise, so each arm of the 2×2 family (and `bnpo`) picks its learning rate from the same three
# values on a tuning seed that is used for nothing else: the highest mean reward over the last quarter of the
# steps, ties within 0.005 to the smaller rate. The length penalty is tuned the same way: among penalties that
# cost at most 0.02 of reward, the one with the shortest wrong answers. Both rules were fixed before the first
# run. In `smoke` and `cpu` there is one rate.


# %%
def train_and_measure(arm: str, seed: int, lr: float, penalty: float, base, size: dict, rl: dict):
    """(model, tokenizer, history) after reinforcement learning of one arm."""
    model, tokenizer = policy_of(base, size)
    asked = questions_of(range(rl["pool"]), rl["terms"])
    objective = "grpo" if arm == "length_penalty" else arm
    shape = {k: rl[k] for k in ("group_size", "rollouts", "updates", "budget")}
    history = rl_train(
        model, tokenizer, asked, objective, rl["steps"], lr=lr, seed=seed, length_penalty=penalty, **shape
    )
    return model, tokenizer, history


def tune_arm(arm: str, lr: float, base, size: dict, rl: dict, penalty: float = 0.0) -> dict[str, Any]:
    """Mean reward and wrong length over the last quarter of a run on the tuning seed; 0 where it diverges."""
    short = {**rl, "steps": rl["tune_steps"]}
    try:
        history = train_and_measure(arm, TUNING_SEED, lr, penalty, base, size, short)[2]
    except FloatingPointError:
        return {"reward": 0.0, "wrong": float(rl["budget"])}
    last = slice(-max(1, rl["tune_steps"] // 4), None)
    return {
        "reward": float(history["reward"][last].mean()),
        "wrong": float(np.nanmean(history["length_wrong"][last])),
    }


def train_arm(
    arm: str,
    puzzle: str,
    seed: int,
    lr: float,
    base,
    size: dict,
    rl: dict,
    evaluate: dict,
    penalty: float = 0.0,
) -> dict[str, Any]:
    """One arm, one seed: training curves ("curve__…") and the evaluation at the end."""
    model, tokenizer, history = train_and_measure(arm, seed, lr, penalty, base, size, rl)
    found = evaluation_of(model, tokenizer, rl, evaluate)
    found |= {f"curve__{key}": values.astype(np.float32) for key, values in history.items()}
    return found | {"tokens_sampled": float(history["tokens"].sum())}


# %%
def choose_rate(rewards: dict[float, float]) -> float:
    """The rate with the highest reward; ties within 0.005 go to the smaller rate."""
    return min(rate for rate, reward in rewards.items() if reward >= max(rewards.values()) - 0.005)


def choose_penalty(found: dict[float, tuple[float, float]]) -> float:
    """Of {penalty: (reward, wrong length)}: shortest wrong answers among rewards within 0.02 of the best."""
    best = max(reward for reward, _ in found.values())
    return min((wrong, penalty) for penalty, (reward, wrong) in found.items() if reward >= best - 0.02)[1]


# %%
def tuned_rates() -> tuple[dict[str, float], dict[str, dict[float, readrun.Unit]]]:
    """({arm: rate}, {arm: {rate: tuning run}}); an arm whose tuning runs are not there is left out."""
    rates, runs = {}, {}
    for arm in [arm for arm in S.arms if arm not in ("rloo", "length_penalty")]:
        if len(S.rates) == 1:
            rates[arm] = S.rates[0]
            continue
        shape = dict(base=bases["main"], size=S.size, rl=S.rl)
        found = {rate: run.unit(tune_arm, arm=arm, lr=rate, **shape) for rate in S.rates}
        if all(unit.done for unit in found.values()):
            runs[arm] = found
            rates[arm] = choose_rate({rate: unit["reward"] for rate, unit in found.items()})
    for arm, like in (("rloo", "dr_grpo"), ("length_penalty", "grpo")):
        if arm in S.arms and like in rates:
            rates[arm] = rates[like]
    return rates, runs


# %%
rates, tuned = tuned_rates()
penalty = 0.0
if "length_penalty" in rates:
    shape = dict(lr=rates["length_penalty"], base=bases["main"], size=S.size, rl=S.rl)
    found = {p: run.unit(tune_arm, arm="length_penalty", penalty=p, **shape) for p in S.penalties}
    if all(unit.done for unit in found.values()):
        tuned["length_penalty"] = found
        penalty = choose_penalty({p: (unit["reward"], unit["wrong"]) for p, unit in found.items()})
    else:
        del rates["length_penalty"]
print("learning rates:", {arm: f"{rate:g}" for arm, rate in rates.items()})

# %% [markdown]
# In order of importance: the 2×2 family on the main puzzle, then the control with a shared filler, then the
# puzzle where length helps, then the sceptic's baselines. The controls take the rate that their arm chose on
# the main puzzle.

# %%
trained: dict[tuple[str, str, int], readrun.Unit] = {}
plan = [
    ("main", arm, s) for arm in S.arms if arm in ("grpo", "dr_grpo", "no_std", "no_length") for s in run.seeds
]
plan += [(puzzle, arm, s) for puzzle in S.puzzles[1:] for arm in ("grpo", "dr_grpo") for s in run.seeds[:3]]
plan += [
    ("main", arm, s) for arm in S.arms if arm in ("bnpo", "rloo", "length_penalty") for s in run.seeds[:3]
]
for puzzle, arm, s in plan:
    if arm in rates:
        unit = run.unit(
            train_arm, arm=arm, puzzle=puzzle, seed=s, lr=rates[arm], base=bases[puzzle], size=S.size,
            rl=S.rl, evaluate=S.evaluate, penalty=penalty if arm == "length_penalty" else 0.0,
        )  # fmt: skip
        if unit.done:
            trained[puzzle, arm, s] = unit
print(f"{len(trained)} of {len(plan)} training runs are there")

# %% [markdown]
# ### RLOO is Dr. GRPO
#
# The two differ by $\tfrac{G}{G-1}$. Under plain stochastic gradient descent, with the rate scaled by that
# factor, they must produce the same weights, rollouts included. In float64 on the CPU, with the committed
# checkpoint:


# %%
def rloo_identity(steps: int = 3, group_size: int = 4) -> dict[str, float]:
    """Relative difference of the weights after `steps` rounds of RLOO and of Dr. GRPO at G/(G-1) its rate."""
    tokenizer, asked, ends = make_tokenizer(), questions_of(range(100), [1, 2]), []
    for objective, lr in (("rloo", 0.5), ("dr_grpo", 0.5 * group_size / (group_size - 1))):
        model = AutoModelForCausalLM.from_pretrained(readrun.asset("dr_grpo/base"), dtype=torch.float64)
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        shape = dict(group_size=group_size, rollouts=32, updates=2, budget=48)
        rl_train(model, tokenizer, asked, objective, steps, lr=lr, optimizer="sgd", **shape)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    moved = (ends[0] - start).abs().max().item()
    return {"gap": (ends[0] - ends[1]).abs().max().item() / moved, "moved": moved}


# %%
identity = run.unit(rloo_identity)
if identity.done:
    print(f"weights moved by up to {identity['moved']:.4f}, differ by {identity['gap']:.1e} of that")

# %% [markdown]
# ### Difficulty, measured
#
# Does the closed form of step 7 hold for real rollouts? Each question is sampled many times. One part of the
# samples sorts questions into bins of pass rate, a second gives the closed form (it is a polynomial of degree
# $G$ in $p$, so it has an estimator without bias: the hypergeometric average), a third is cut into groups of
# $G$ whose mean $|A|$ is measured. The parts are independent, so that the comparison is fair.


# %%
def expected_mass(right: np.ndarray, group_size: int, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased estimate of difficulty_mass from outcomes (questions, n), and its variance to first order."""
    n, hits = right.shape[1], right.sum(1).astype(int)
    wrong_a, right_a = np.abs(advantage_table(group_size, scale).numpy().T)
    k = np.arange(group_size + 1)
    mass = (k * right_a + (group_size - k) * wrong_a) / group_size
    ways = [
        [math.comb(h, i) * math.comb(n - h, group_size - i) / math.comb(n, group_size) for i in k]
        for h in hits
    ]
    p, step = np.clip(hits / n, 0.5 / n, 1 - 0.5 / n), 1e-4
    slope = (difficulty_mass(p + step, group_size, scale) - difficulty_mass(p - step, group_size, scale)) / (
        2 * step
    )
    return np.array(ways) @ mass, slope**2 * p * (1 - p) / n


# %%
def measure_difficulty(
    base, size: dict, rl: dict, difficulty: dict, lr: float, seed: int = 0
) -> dict[str, Any]:
    """Binned mean |advantage| of rollouts against the closed form; base model and a briefly trained one."""
    part, group_size = difficulty["samples"] // 5 // rl["group_size"] * rl["group_size"], rl["group_size"]
    asked = questions_of(range(HELD_OUT, HELD_OUT + difficulty["questions"]), rl["terms"])
    model, tokenizer = policy_of(base, size)
    policies = [model]
    if difficulty["steps"]:
        brief = {**rl, "steps": difficulty["steps"]}
        policies.append(train_and_measure("dr_grpo", seed, lr, 0.0, base, size, brief)[0])
    options = dict(budget=rl["budget"], seed=seed + 1, rows=4096)
    found = [length_by_outcome(m, tokenizer, asked, 5 * part, **options)["outcomes"] for m in policies]
    right = np.concatenate(found)
    bins = np.array_split(np.argsort(right[:, :part].mean(1), kind="stable"), difficulty["bins"])
    out: dict[str, Any] = {"rate": [float(right[b].mean()) for b in bins]}
    for scale in ("std", "none"):
        predicted, variance = expected_mass(right[:, part : 3 * part], group_size, scale)
        rest = torch.tensor(right[:, 3 * part :].reshape(-1).astype(float))
        groups = (
            group_advantages(rest, group_size, scale).abs().view(len(right), -1, group_size).mean(2).numpy()
        )
        spread = variance + groups.var(1, ddof=1) / groups.shape[1]
        rows = [(groups[b].mean(), predicted[b].mean(), math.sqrt(spread[b].sum()) / len(b)) for b in bins]
        out |= {
            f"{scale}__{key}": [float(r[i]) for r in rows] for i, key in enumerate(("measured", "form", "se"))
        }
    return out


# %%
hardness = None
if "dr_grpo" in rates:
    hardness = run.unit(
        measure_difficulty,
        base=bases["main"],
        size=S.size,
        rl=S.rl,
        difficulty=S.difficulty,
        lr=rates["dr_grpo"],
    )

# %% [markdown]
# ### Speed and memory
#
# Three questions. Is the fix free (step time of the four objectives)? What does the captured decode step gain
# over `generate` as it comes, without a compiled static cache? And what do chunked log-probabilities cost at
# the paper's real dimensions, hidden size 1536 and a vocabulary of 151 936, for 8 responses of 3000 tokens
# (random weights: time and memory depend on shapes only)?


# %%
def seconds_of(function: Callable, *arguments) -> float:
    """Wall-clock seconds of one call, the GPU's queue drained before and after."""
    wait = torch.cuda.synchronize if run.device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - start


def bench_objectives(base, size: dict, rl: dict, speed: dict) -> dict[str, Any]:
    """Milliseconds of one update pass per objective, interleaved; "rollout": sampling and scoring a round.

    A round has speed["rows"] responses, so many that a GPU and not the host decides how long an update takes.
    """
    model, tokenizer = policy_of(base, size)
    shape = rl["group_size"], speed["rows"], rl["budget"]
    asked = questions_of(range(shape[1] // shape[0]), rl["terms"])
    decoder = decoder_for(model, tokenizer, asked, *shape)
    sample_round = lambda: collect(model, tokenizer, asked, shape[0], shape[2], torch.Generator(), decoder)  # noqa: E731
    got, updater = sample_round(), train.Updater(model, 0.0)
    out: dict[str, list[float]] = {}
    for i in range(speed["repeats"] + 2):
        times = {"rollout": seconds_of(sample_round)}
        for name in ("grpo", "no_std", "no_length", "dr_grpo"):
            how = OBJECTIVES[name]
            advantages = group_advantages(got.rewards, shape[0], how["scale"])
            step = lambda a=advantages, how=how: policy_step(  # noqa: E731
                model, updater, got, a, how["aggregate"], shape[2], rl["updates"]
            )
            times[name] = float(np.median([seconds_of(step) for _ in range(speed["inner"])]))
        if i >= 2:  # the first two warm up
            for name, value in times.items():
                out.setdefault(name, []).append(1e3 * value)
    return {name: np.array(values) for name, values in out.items()}


# %% [markdown]
# A captured step spares the host; what remains is the GPU's own time, most of it in attention: kernels made
# for many queries per row, fed one. For one query attention is a dot product and a weighted sum.
# `readrun.onequery` writes it so in Triton: each key and value that the mask lets a row see is read once,
# and nothing else. The rest of the step goes to `torch.compile`, which merges the many small element-wise
# kernels. The table below has the step without it as a peer.


# %%
def rollout_speed(model, prompts: list[list[int]], new_tokens: int, repeats: int) -> dict[str, np.ndarray]:
    """Tokens per second of the captured step and of `generate`, same prompts, full budget, taking turns.

    Both in bfloat16 on a GPU (float32 on a CPU). "captured" is, on a GPU, of a `compiled_step`;
    "captured_uncompiled" is not; "generate_float32" is the peer in float32, maybe faster.
    "limit": one value, the step that only reads weights and cache, once each, at the measured copy bandwidth.
    """
    never = model.config.vocab_size  # a token that does not exist: no row ends early on either side
    kind = torch.bfloat16 if run.device == "cuda" else torch.float32
    half = copy.deepcopy(model).to(kind)
    sizes, made = (len(prompts), len(prompts[0]), new_tokens), dict(eos_id=never, pad_id=0)
    # a CPU may lack the compiler, and shows no gain at these sizes
    fast = decode.Decoder(compiled_step(half) if run.device == "cuda" else half, *sizes, **made)
    plain = decode.Decoder(half, *sizes, **made)
    ids = torch.tensor(prompts, device=run.device)
    options = dict(max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    arms = {
        "captured": lambda: fast.generate(prompts),
        "captured_uncompiled": lambda: plain.generate(prompts),
        "generate": lambda: half.generate(ids, attention_mask=torch.ones_like(ids), **options),
        "generate_float32": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options),
    }
    out: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(repeats + 1):
        for name, call in arms.items():
            rate = len(prompts) * new_tokens / seconds_of(call)
            out[name] += [rate] if i else []  # the first round warms up, compiles and captures
    cache = 2 * model.config.num_hidden_layers * model.config.hidden_size * (len(prompts[0]) + new_tokens / 2)
    read = kind.itemsize * (model.num_parameters() + len(prompts) * cache)
    out["limit"] = [len(prompts) * 1e9 * bench.ceilings(run.device, kind)["copy_gb_s"] / read]
    return {name: np.array(rates) for name, rates in out.items()}


# %%
def differing(model, decoder_of: Callable, prompts: list[list[int]], new_tokens: int) -> int:
    """Greedy tokens of `generate` that a decoder on `decoder_of(model)` does not choose."""
    ids, end = torch.tensor(prompts, device=run.device), model.generation_config.eos_token_id
    greedy = dict(max_new_tokens=new_tokens, do_sample=False)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[:, len(prompts[0]) :]
    ends = completion_mask(theirs, end).sum(1).tolist()
    theirs = [row[:end] for row, end in zip(theirs.tolist(), ends, strict=True)]
    ours = sample_group(decoder_of(model), prompts, 1, new_tokens, temperature=0.0).completions
    pairs = [pair for rows in zip(theirs, ours, strict=True) for pair in itertools.zip_longest(*rows)]
    return sum(a != b for a, b in pairs)


def bench_rollouts(base, size: dict, shape: dict) -> dict[str, Any]:
    """Sampling speed on the chapter's model and on a 10.7 M parameter Llama; greedy tokens that differ."""
    model, tokenizer = policy_of(base, size)
    prompts = tokenizer([q.prompt for q in questions_of(range(shape["batch"]), [2, 2])]).input_ids
    repeats = min(4, shape["repeats"])
    out = {f"own__{k}": v for k, v in rollout_speed(model, prompts, shape["new_tokens"], repeats).items()}
    count = {"mismatches": differing(model, lambda same: same, prompts, shape["new_tokens"])}
    backend = "inductor" if run.device == "cuda" else "eager"
    compiled = functools.partial(compiled_step, backend=backend)
    count["compiled_mismatches"] = differing(model, compiled, prompts, shape["new_tokens"])
    width, layers = shape["wide"]
    wide = LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )  # fmt: skip
    torch.manual_seed(0)
    big = LlamaForCausalLM(wide).to(run.device).eval()
    prompts = torch.randint(1, 128, (shape["wide_batch"], 16)).tolist()
    found = rollout_speed(big, prompts, min(64, shape["new_tokens"]), repeats)
    return out | {f"wide__{k}": v for k, v in found.items()} | count


# %%
def bench_logps(shape: dict) -> dict[str, Any]:
    """Log-probabilities, forward and backward: ms (taking turns), GiB beyond inputs and gradients."""
    kind = torch.bfloat16 if run.device == "cuda" else torch.float32
    n, h, v, device = shape["tokens"], shape["hidden"], shape["vocab"], run.device
    hidden = torch.randn(n, h, device=device, dtype=kind).requires_grad_()
    weight = (torch.randn(v, h, device=device, dtype=kind) / math.sqrt(h)).requires_grad_()
    targets, grad = torch.randint(v, (n,), device=device), torch.randn(n, device=device)

    def naive():
        logps = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]
        return torch.autograd.grad(logps, (hidden, weight), grad)

    def chunked():
        return torch.autograd.grad(
            ChunkedLogps.apply(hidden, weight, targets, shape["chunk"]), (hidden, weight), grad
        )

    arms, out = {"naive": naive, "chunked": chunked}, {}
    results = {name: call() for name, call in arms.items()}
    for name, call in arms.items():
        out[f"gib__{name}"] = (bench.peak_memory(call) - hidden.nbytes - weight.nbytes) / 2**30
    errors = [
        ((b.float() - a.float()).abs().max() / a.float().abs().max()).item()
        for a, b in zip(*results.values(), strict=True)
    ]
    del results
    times = [
        {name: 1e3 * seconds_of(call) for name, call in arms.items()} for _ in range(shape["repeats"] + 2)
    ][2:]
    limit = bench.ceilings(device, kind)["matmul_tflop_s"]
    out |= {f"ms__{name}": np.array([t[name] for t in times]) for name in arms}
    return out | {"error": max(errors), "tflop": 8e-12 * n * h * v, "limit": limit}


# %%
timed = {
    "objectives": run.unit(bench_objectives, base=bases["main"], size=S.size, rl=S.rl, speed=S.speed),
    "rollouts": run.unit(bench_rollouts, base=bases["main"], size=S.size, shape=S.speed),
    "logps": run.unit(bench_logps, shape=S.logps),
}

# %% [markdown]
# ### Results of this run
#
# All measurements in one place, with the verdicts that follow from them. Two metrics are derived: how much of
# *half of the gap* between GRPO and Dr. GRPO is left after taking one normaliser away (the ablation), and how
# much of *30 % of the gap* is left over by the control with the shared filler.


# %%
def by_seed(metrics: dict, arrays: dict, metric: str, arm: str) -> dict[int, float]:
    """{seed: value} of one arm."""
    values = metrics.get(metric, {}).get(arm, [])
    return dict(
        zip(np.asarray(arrays.get(f"seeds/{metric}/{arm}", range(len(values)))).tolist(), values, strict=True)
    )


def gap_of(metrics: dict, arrays: dict, metric: str) -> dict[int, float]:
    """{seed: wrong length of GRPO minus that of Dr. GRPO}."""
    grpo, ours = (by_seed(metrics, arrays, metric, arm) for arm in ("grpo", "dr_grpo"))
    return {s: grpo[s] - ours[s] for s in grpo if s in ours}


def ablation_slack(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """Half of the gap minus |no_std - GRPO|, and minus |no_length - Dr. GRPO|; tokens, per common seed."""
    gap, out = gap_of(metrics, arrays, "wrong_answer_tokens"), {}
    for arm, near in (("no_std", "grpo"), ("no_length", "dr_grpo")):
        one, other = (by_seed(metrics, arrays, "wrong_answer_tokens", name) for name in (arm, near))
        values = [gap[s] / 2 - abs(one[s] - other[s]) for s in gap if s in one]
        out |= {arm: values} if values else {}
    return out


def shared_gap_slack(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """30 % of the gap minus the size of the gap with the shared filler; tokens, per common seed."""
    gap, control = (gap_of(metrics, arrays, m) for m in ("wrong_answer_tokens", "shared_wrong_answer_tokens"))
    values = [0.3 * gap[s] - abs(control[s]) for s in gap if s in control]
    return {"shared": values} if values else {}


# %% tags=["hide-input"]
CURVES = "length_right length_wrong length_all reward clip_fraction truncated zero_groups".split()


def gather_trained(metrics: dict, arrays: dict) -> None:
    """Add every training run: end values per seed, curves over seeds, one set of transcripts."""

    def put(metric: str, arm: str, seed: int, value: float) -> None:
        metrics.setdefault(metric, {}).setdefault(arm, {})[seed] = value

    for (puzzle, arm, s), unit in trained.items():
        prefix = "" if puzzle == "main" else f"{puzzle}_"
        found = {
            f"{outcome}_answer_tokens": unit[f"{outcome}_tokens"] for outcome in ("right", "wrong", "all")
        }
        found |= {key: unit[key] for key in ("accuracy", "hard_accuracy", "truncated", "tokens_sampled")}
        for metric, value in found.items():
            if math.isfinite(value):
                put(prefix + metric, arm, s, value)
        if puzzle == "retry" and judged["retry"].done:
            put("retry_accuracy", "base", s, judged["retry"]["accuracy"])
        for key in CURVES:
            name, curve = f"curve/{puzzle}/{arm}/{key}", unit[f"curve__{key}"][None].astype(np.float16)
            arrays[name] = np.concatenate([arrays[name], curve]) if name in arrays else curve
        if s == run.seeds[0]:
            arrays[f"transcripts/{puzzle}/{arm}"] = np.array(unit["texts"])
            arrays[f"prompts/{puzzle}"] = np.array(unit["prompts"])


# %% tags=["hide-input"]
def gather() -> tuple[dict, dict]:
    """(metrics, arrays) of the exact gradients and the base models."""
    metrics: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    if mdp.done:
        for key, values in mdp.items():
            kind, arm = key.split("__")
            if metric := {"cosine": "gradient_cosine", "slope": "wrong_length_slope"}.get(kind):
                name = arm.replace("true", "true_gradient")
                metrics.setdefault(metric, {})[name] = values.tolist()
        metrics["gradient_cosine_worst"] = {"dr_grpo": [float(mdp["cosine__dr_grpo"].min())]}
        metrics["gradient_scale_error_worst"] = {"dr_grpo": [float(mdp["scale_error__dr_grpo"].max())]}
    for puzzle, unit in judged.items():
        if unit.done:
            metrics.setdefault("base_chain_correct", {})[puzzle] = unit["checked"].tolist()
            metrics.setdefault("base_guess_accuracy", {})[puzzle] = unit["guessed"].tolist()
            arrays[f"transcripts/{puzzle}/base"] = np.array(unit["texts"])
            arrays[f"base/{puzzle}"] = np.array(
                [unit[k] for k in ("accuracy", "right_tokens", "wrong_tokens")]
            )
    return metrics, arrays


# %% tags=["hide-input"]
def gather_rest(metrics: dict, arrays: dict) -> None:
    """Add tuning runs, difficulty, RLOO identity and timings."""
    for arm, runs in tuned.items():
        for metric, key in (("tuning_reward", "reward"), ("tuning_wrong_tokens", "wrong")):
            metrics.setdefault(metric, {})[arm] = {value: unit[key] for value, unit in runs.items()}
    ratio = difficulty_mass(0.02, 8, "std") / difficulty_mass(0.02, 8, "none")
    even = difficulty_mass(0.5, 8, "std") / difficulty_mass(0.5, 8, "none")
    metrics["difficulty_weight_ratio"] = {"g8": [float(ratio / even)]}
    if identity.done:
        metrics["rloo_weight_gap"] = {"dr_grpo": [identity["gap"]]}
    if hardness is not None and hardness.done:
        z = []
        for scale in ("std", "none"):
            measured, form, se = (np.array(hardness[f"{scale}__{k}"]) for k in ("measured", "form", "se"))
            arrays[f"difficulty/{scale}"] = np.stack([hardness["rate"], measured, form, se])
            z += (np.abs(measured - form)[se > 0] / se[se > 0]).tolist()
        metrics["difficulty_max_z"] = {"all_bins": [max(z)]} if z else {}
    if timed["objectives"].done:
        times = {arm: timed["objectives"][arm] for arm in ("grpo", "no_std", "no_length", "dr_grpo")}
        arrays |= {f"ms/{arm}": values for arm, values in times.items()} | {
            "ms/rollout": timed["objectives"]["rollout"]
        }
        table = np.stack(list(times.values()))
        metrics["step_time_spread"] = {"four_objectives": (np.ptp(table, 0) / np.median(table, 0)).tolist()}
    if timed["rollouts"].done:
        unit = timed["rollouts"]
        for metric, prefix in (
            ("rollout_tokens_per_second", "own"),
            ("rollout_tokens_per_second_1024", "wide"),
        ):
            kinds = ("captured", "captured_uncompiled", "generate", "generate_float32")
            metrics[metric] = {arm: unit[f"{prefix}__{arm}"].tolist() for arm in kinds}
            arrays[f"limit/{metric}"] = unit[f"{prefix}__limit"]
        metrics["greedy_mismatches"] = {
            arm: [unit[name]]
            for arm, name in (("captured", "mismatches"), ("compiled", "compiled_mismatches"))
        }
    if timed["logps"].done:
        unit = timed["logps"]
        metrics["logprob_extra_gib"] = {arm: [max(unit[f"gib__{arm}"], 1e-9)] for arm in ("chunked", "naive")}
        metrics["logprob_ms"] = {arm: unit[f"ms__{arm}"].tolist() for arm in ("chunked", "naive")}
        metrics["logprob_gradient_error"] = {"chunked": [unit["error"]]}
        arrays["logprob"] = np.array([unit["tflop"], unit["limit"]])


# %%
metrics, arrays = gather()
gather_trained(metrics, arrays)
gather_rest(metrics, arrays)
here = run.results(metrics=metrics, arrays=arrays)
book = run.recorded()

# %% [markdown]
# Figures are functions of results, so that the recorded run can be drawn anywhere. First the exact gradients.

# %% tags=["figure", "hide-input"]
NAMES = {
    "dr_grpo": "Dr. GRPO", "grpo": "GRPO", "no_std": "no std", "no_length": "no length",
    "bnpo": "batch mean (bnpo)",
    "rloo": "RLOO", "length_penalty": "GRPO + length penalty", "true_gradient": "true gradient",
}  # fmt: skip
STYLE = plots.arms(list(NAMES))


def draw_exact(results):
    """Cosine with the true gradient, and what a step does to wrong answers, one dot per random table."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
    for ax, metric in zip(axes, ("gradient_cosine", "wrong_length_slope"), strict=True):
        found = results.metrics.get(metric, {})
        names = [n for n in NAMES if n in found and n != "rloo"]
        for i, name in enumerate(names):
            values = np.array(found[name])
            ax.barh(i, values.mean(), color=STYLE[name]["color"], alpha=0.35)
            ax.plot(values, np.full(len(values), i), "o", markersize=3, color=STYLE[name]["color"])
        ax.set_yticks(range(len(names)), [NAMES[n] for n in names])
    axes[0].invert_yaxis()
    low = min((min(v) for v in results.metrics.get("gradient_cosine", {}).values()), default=0.9)
    axes[0].set_xlim(math.floor(low * 20) / 20, 1.005)
    plots.label(axes[0], "cosine with the truth (1)", "objective")
    plots.label(axes[1], "wrong length per step (tokens)", "objective")
    axes[1].set_ylabel("")
    return figure


plots.show(
    draw_exact(here),
    alt="Left: cosine between each objective's expected gradient and the true one over random tables. "
    "Dr. GRPO is at 1, no length and the batch mean just below, GRPO and no std clearly lower. "
    "Right: change of the expected length of a wrong answer along each gradient: larger for GRPO "
    "and no std than for the true gradient.",
    caption="Enumerated, nothing sampled: one dot per random table, bars are means.",
)

# %% [markdown]
# ### What training does to the length of answers


# %% tags=["figure", "hide-input"]
def draw_lengths(results, puzzle="main", arms=("dr_grpo", "grpo", "no_std", "no_length")):
    """Tokens against steps for wrong and right responses, and reward against tokens."""
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.3))
    for arm in [a for a in arms if f"curve/{puzzle}/{a}/reward" in results.arrays]:
        curve = {
            k: results.arrays[f"curve/{puzzle}/{arm}/{k}"].astype(float)
            for k in ("length_wrong", "length_right", "length_all", "reward")
        }
        steps = np.arange(1, curve["reward"].shape[1] + 1)
        for ax, key in zip(axes, ("length_wrong", "length_right"), strict=False):
            plots.band(ax, steps, smooth(curve[key]), NAMES[arm], **STYLE[arm])
        axes[2].plot(
            smooth(curve["length_all"]).mean(0),
            smooth(curve["reward"]).mean(0),
            label=NAMES[arm],
            **STYLE[arm],
        )
    plots.label(axes[0], "step", "length (tokens)", "wrong answers")
    plots.label(axes[1], "step", "length (tokens)", "right answers")
    plots.label(axes[2], "length, all answers (tokens)", "reward (1)", "what tokens buy")
    axes[0].legend(fontsize=9)
    return figure


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Running mean over steps (last axis), blind to steps without such an outcome."""
    out = np.full(values.shape, np.nan)
    for t in range(values.shape[-1]):
        part = values[..., max(0, t - width + 1) : t + 1]
        out[..., t] = np.where(np.isfinite(part), part, 0).sum(-1) / np.maximum(np.isfinite(part).sum(-1), 1)
    return out


LENGTHS_ALT = (
    "Three panels for each objective. Length of wrong answers against training steps, length of right "
    "answers against steps, and reward against length."
)
plots.show(
    draw_lengths(here),
    alt=f"This run. {LENGTHS_ALT}",
    caption=f"This run ({here.profile}): running mean of 5 steps.",
)


# %% tags=["hide-input"]
def summary(results, puzzle="main"):
    """One row per arm: means over seeds at the end of training, on held-out questions."""
    prefix, rows = ("" if puzzle == "main" else f"{puzzle}_"), []

    def pm(values, digits: int) -> str:
        if len(values) < 2:
            return f"{values[0]:.{digits}f}" if len(values) else "–"
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"

    for arm in [n for n in NAMES if n in results.metrics.get(f"{prefix}accuracy", {})]:
        of = lambda metric, arm=arm: results.metrics.get(prefix + metric, {}).get(arm, [])  # noqa: E731
        late = lambda key, arm=arm: results.arrays[f"curve/{puzzle}/{arm}/{key}"][:, -10:].mean(dtype=float)  # noqa: E731
        rows.append({
            "arm": NAMES[arm], "wrong": pm(of("wrong_answer_tokens"), 1),
            "right": pm(of("right_answer_tokens"), 1), "accuracy": pm(of("accuracy"), 3),
            "hard set": pm(of("hard_accuracy"), 3), "cut off": pm(of("truncated"), 3),
            "sampled": pm(np.array(of("tokens_sampled")) / 1e6, 2),
            "clipped": f"{late('clip_fraction'):.4f}", "silent": f"{late('zero_groups'):.2f}",
            "seeds": len(of("accuracy")),
        })  # fmt: skip
    return tables.grid(rows, caption=f"Puzzle {puzzle}, {results.profile}: mean ± standard error over seeds. "
        "Wrong, right: tokens of such answers; cut off: share that reached the budget; sampled: millions of "
        "tokens in training. Clipped: share of tokens, silent: share of groups with equal rewards, both over "
        "the last 10 steps.")  # fmt: skip


summary(here)

# %% [markdown]
# The control: with one filler token for both flags, a push on "more filler after a failure" is to a large
# part a push on "more filler", and right and wrong responses pull it in opposite directions. The flag itself
# stays in the response, so that attention could still tell the two cases apart: the control makes the failure
# harder to act on, it does not hide it. The bases of both controls have had a few more steps of pre-training
# than the main one; the table of base models shows how nearly they are as good.

# %%
summary(here, "shared")

# %% [markdown]
# The same questions under both policies; filler after a failed check is red, after a successful one blue.


# %% tags=["figure", "hide-input"]
def transcripts(results, puzzle="main", arms=("base", "dr_grpo", "grpo"), count=3):
    """Responses to the same questions under several policies, filler coloured, long ones shortened."""
    colour = {"h": "var(--rr-bad, #a3271c)", "w": "var(--pst-color-link, #0072B2)"}  # readable in both themes

    def paint(match):
        run_of, n = match[0], len(match[0])
        shown = run_of if n <= 24 else run_of[:20] + f"…(×{n})"
        return f'<span style="color:{colour[run_of[0]]};font-weight:600">{shown}</span>'

    rows = []
    for i, prompt in enumerate(results.arrays.get(f"prompts/{puzzle}", [])[:count]):
        for arm in [a for a in arms if f"transcripts/{puzzle}/{a}" in results.arrays]:
            text = re.sub(
                "h+|w+", paint, str(results.arrays[f"transcripts/{puzzle}/{arm}"][i]).replace("<", "&lt;")
            )
            name = NAMES.get(arm, "base model")
            rows.append(f"<tr><td><code>{prompt}</code></td><td>{name}</td><td><code>{text}</code></td></tr>")
    head = "<thead><tr><th>question</th><th>policy</th><th>response</th></tr></thead>"
    return HTML(f'<div style="overflow-x:auto"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>')


transcripts(here)

# %% [markdown]
# ### Difficulty


# %% tags=["figure", "hide-input"]
def draw_difficulty(results):
    """Weight by the standard deviation against pass rate: closed form for several G, and measured dots."""
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.2))
    p = np.linspace(0.005, 0.995, 199)
    for group_size, style in zip((4, 8, 16, 64), plots.arms("abcd").values(), strict=True):
        weight = difficulty_mass(p, group_size, "std") / difficulty_mass(p, group_size, "none")
        axes[0].plot(p, weight, label=f"G = {group_size}", **style)
    axes[0].plot(p, 1 / np.sqrt(p * (1 - p)), color="#555555", linewidth=1, label="G → ∞")
    axes[0].set_ylim(0, 9)
    axes[0].legend(fontsize=9)
    plots.label(axes[0], "pass rate (1)", "weight relative to reward (1)", "division by std")
    size = 8 if results.profile != "smoke" else 4
    for scale, arm in (("std", "grpo"), ("none", "dr_grpo")):
        axes[1].plot(p, difficulty_mass(p, size, scale), label=f"closed form, {scale}", **STYLE[arm])
        if f"difficulty/{scale}" in results.arrays:
            rate, measured, _, se = results.arrays[f"difficulty/{scale}"]
            axes[1].errorbar(rate, measured, yerr=2 * se, fmt="o", markersize=4, color=STYLE[arm]["color"])
    axes[1].legend(fontsize=9)
    plots.label(axes[1], "pass rate (1)", "mean |advantage| (1)", f"measured, G = {size}")
    return figure


plots.show(
    draw_difficulty(here),
    alt="Left: how much division by the standard deviation weighs a question against its pass rate, for "
    "group sizes 4, 8, 16, 64 and infinity: a U shape that is shallow for small groups and "
    "unbounded only for infinite ones. Right: measured mean absolute advantage of rollouts as dots "
    "on the closed-form curves.",
    caption="The difficulty bias is bounded by the group size. Bars: two standard errors.",
)

# %% [markdown]
# ## GPU experiment

# %% tags=["hide-input"]
tables.provenance(book) if book else print(
    "The GPU run is not recorded yet; below is what this machine measured."
)

# %% tags=["figure", "hide-input"]
shown = book or here
plots.show(
    draw_lengths(shown),
    alt=f"Recorded run. {LENGTHS_ALT}",
    caption=f"Profile {shown.profile}; bands: 95 % over seeds.",
)

# %% tags=["hide-input"]
summary(shown)

# %% [markdown]
# Is the gap one of learning rates? Each arm chose its own. The tuning runs tell what happened at equal rates:
# every cell has the rate (or the penalty), the mean reward, and the length of wrong answers, over the last
# quarter of the steps of a run on the tuning seed.
#
# At the smallest rate GRPO and Dr. GRPO are as far apart as in the experiment, at the middle one too, though
# no arm is then better than its base model. At the largest every arm has collapsed, and its lengths say
# nothing. All arms chose the smallest rate, so that the three do not enclose the best one: a smaller one
# might serve any arm better.


# %% tags=["hide-input"]
def tuning_table(results):
    """One row per tuned arm: reward and wrong length at each value tried, and the chosen value."""
    rows, metrics = [], results.metrics
    for arm, rewards in metrics.get("tuning_reward", {}).items():
        values = results.arrays[f"seeds/tuning_reward/{arm}"].tolist()
        found = list(zip(values, rewards, metrics["tuning_wrong_tokens"][arm], strict=True))
        if arm == "length_penalty":
            chosen = choose_penalty({value: (reward, wrong) for value, reward, wrong in found})
        else:
            chosen = choose_rate({value: reward for value, reward, _ in found})
        cells = [f"{value:g}: {reward:.3f}, {wrong:.1f} tokens" for value, reward, wrong in found]
        names = ("smallest", "middle", "largest")
        rows.append({"arm": NAMES[arm], **dict(zip(names, cells, strict=False)), "chosen": f"{chosen:g}"})
    return tables.grid(rows, caption="Learning rates (length penalty: its weight) on the tuning seed.")


tuning_table(shown) if "tuning_reward" in shown.metrics else print("This profile has one rate: no tuning.")

# %% [markdown]
# The two controls: the shared filler (the policy's two fillers are tied together), and the puzzle in which
# another try can pay.

# %% tags=["hide-input"]
summary(shown, "shared")

# %% tags=["hide-input"]
summary(shown, "retry")

# %% tags=["hide-input"]
transcripts(shown)

# %% [markdown]
# ### Speed and memory against the limits


# %% tags=["hide-input"]
def speed_rows(results) -> list[dict]:
    """Achieved, physical limit, peer and ratio of every measured piece."""
    m, rows, mean = results.metrics, [], lambda v: float(np.median(v))
    for metric, name in (("rollout_tokens_per_second", "rollout, this chapter's model"),
                         ("rollout_tokens_per_second_1024", "rollout, 10.7 M, wide batch")):  # fmt: skip
        if metric in m:
            ours, limit = mean(m[metric]["captured"]), float(results.arrays[f"limit/{metric}"][0])
            for peer in [p for p in m[metric] if p != "captured"]:
                speed = dict(achieved=ours, limit=limit, peer=mean(m[metric][peer]))
                rows.append(bench.row(f"{name}, against {peer}", None, "tokens/s", **speed))
    if "logprob_ms" in m and "logprob" in results.arrays:
        tflop, limit = results.arrays["logprob"]
        needed = 1e3 * 0.75 * tflop  # three products; the fourth, of the chunks again, is no achievement
        peer = needed / mean(m["logprob_ms"]["naive"])
        for arm in ("naive", "chunked"):
            ms, gib = mean(m["logprob_ms"][arm]), m["logprob_extra_gib"][arm][0]
            name = f"log-probabilities, {arm} (+{gib:.2f} GiB)"
            speed = dict(achieved=needed / ms, limit=float(limit), peer=peer)
            rows.append(bench.row(name, ms, "TFLOP/s", **speed))
    for arm in ("grpo", "no_std", "no_length", "dr_grpo"):
        if f"ms/{arm}" in results.arrays:
            ms, peer = (mean(results.arrays[f"ms/{a}"]) for a in (arm, "grpo"))
            rows.append(
                bench.row(f"update pass, {NAMES[arm]}", ms, "passes/s", achieved=1e3 / ms, peer=1e3 / peer)
            )
    if "ms/rollout" in results.arrays:
        ms, update = mean(results.arrays["ms/rollout"]), mean(results.arrays["ms/dr_grpo"])
        rounds = {"captured": ms}
        if "rollout_tokens_per_second" in m:  # the round that its tokens per second would give
            speed = {k: mean(v) for k, v in m["rollout_tokens_per_second"].items()}
            rounds |= {k: ms * speed["captured"] / speed[k] for k in ("generate", "generate_float32")}
        for kind, ms in rounds.items():
            share = f"rollout round, {kind} ({ms / (ms + update):.0%} of a step)"
            rows.append(bench.row(share, ms, "rounds/s", achieved=1e3 / ms))
    return rows


tables.bench(speed_rows(shown))

# %% [markdown]
# The recorded verdicts beside those of this run:

# %% tags=["hide-input"]
tables.compare_runs(book, here)

# %% [markdown]
# ## Verdicts
#
# Computed from the record by rules that were committed before it. Intervals over seeds are paired t
# intervals, over items a paired bootstrap; "exact" numbers have none.

# %% tags=["hide-input"]
tables.verdicts(shown)


# %% [markdown]
# ### What is not reproduced, and why
#
# These are the numbers behind it.


# %% tags=["figure", "hide-input"]
def lengths_not_reproduced(results) -> list[tuple[str, str, str]]:
    """(claim, what, numbers) behind the open claims on accuracy and length; needs two seeds."""
    from scipy import stats

    m, list_of = results.metrics, lambda values, digits=0: ", ".join(f"{v:.{digits}f}" for v in values)

    def less(metric: str) -> np.ndarray:
        return -np.array(list(gap_of(m, results.arrays, metric).values()))

    def needed(values: np.ndarray, room: float) -> int:  # seeds until half the interval fits
        half = lambda n: stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)  # noqa: E731
        return next(n for n in range(2, 10_000) if half(n) < room)

    gap, rows = less("accuracy"), []
    if len(gap) > 1:
        rows.append(("c2c", "accuracy, Dr. GRPO − GRPO, by seed", list_of(gap, 3)))
        n = needed(gap, 0.02)
        rows.append(("c2c", "seeds for an interval of half-width 0.02, with this scatter", f"{n}"))
        if -0.02 < gap.mean() < 0:
            n = needed(gap, 0.02 + gap.mean())
            rows.append(("c2c", "… if the true difference is the measured one", f"{n}"))
    for outcome in ("wrong", "right") if len(less("shared_accuracy")) > 1 else ():
        values = m[f"shared_{outcome}_answer_tokens"]["grpo"]
        rows.append(("c4", f"GRPO, shared filler: tokens of {outcome} answers, by seed", list_of(values)))
    if len(less("retry_accuracy")) > 1:
        rows.append(("c6b", "tokens of wrong answers, Dr. GRPO − GRPO, retry, by seed",
                     list_of(less("retry_wrong_answer_tokens"))))  # fmt: skip
        rows.append(("c6b", "accuracy, Dr. GRPO − GRPO, retry, by seed", list_of(less("retry_accuracy"), 3)))
        for arm in ("grpo", "dr_grpo"):
            cut, right = (np.array(m[f"retry_{k}"][arm]) for k in ("truncated", "accuracy"))
            share = list_of(cut / (1 - right), 2)
            rows.append(("c6b", f"{NAMES[arm]}: share of wrong answers that were cut off, retry", share))
    return rows


# %% tags=["figure", "hide-input"]
def costs_not_reproduced(results) -> list[tuple[str, str, str]]:
    """(claim, what, numbers) behind the open claims on time."""
    m, rows, arms = results.metrics, [], ("grpo", "no_std", "no_length", "dr_grpo")
    if "step_time_spread" in m:
        spread, ms = (
            np.array(m["step_time_spread"]["four_objectives"]),
            [results.arrays[f"ms/{a}"] for a in arms],
        )
        middle, far = [np.median(v) for v in ms], np.flatnonzero(spread > 0.1)
        slow = ", ".join(NAMES[arms[int(np.argmax([v[i] for v in ms]))]] for i in far) or "none"
        rows.append(("c8a", "spread of the four: median over repeats, mean",
                     f"{np.median(spread):.3f}, {spread.mean():.3f}"))  # fmt: skip
        rows.append(("c8a", f"repeats with a spread above 0.1: {len(far)}; slowest in them", slow))
        rows.append(("c8a", "spread of the four medians", f"{np.ptp(middle) / np.median(middle):.3f}"))
    for metric, batch, label in (
        ("rollout_tokens_per_second", S.speed["batch"], "this chapter's model"),
        ("rollout_tokens_per_second_1024", S.speed["wide_batch"], "10.7 M"),
    ):
        if metric in m:
            step = {k: 1e3 * batch / np.median(v) for k, v in m[metric].items()}
            found = [f"{NAMED[k]} {step[k]:.2f}" for k in ("generate", "captured_uncompiled", "captured")]
            found += [f"at the copy bandwidth {1e3 * batch / results.arrays[f'limit/{metric}'][0]:.2f}"]
            found += (
                [f"a factor of 20 needs {step['generate'] / 20:.2f}"] if batch != S.speed["batch"] else []
            )
            rows.append(
                ("c9b, c9i", f"ms for one token of each row, batch {batch}, {label}", ", ".join(found))
            )
    return rows


NAMED = {"generate": "generate", "captured": "compiled", "captured_uncompiled": "captured only"}
found = lengths_not_reproduced(shown) + costs_not_reproduced(shown)
tables.grid([dict(zip(("claim", "number", "value"), row, strict=True)) for row in found])

# %% [markdown]
# *c2c, accuracy kept.* The mean difference is inside the margin of 0.02, but seeds scatter by more than that:
# two are in favour of Dr. GRPO, three against. Neither "kept" nor "lost" follows; the table says how many
# seeds would decide it. *c2, c3a, c3b* have intervals beyond their margins. They are `weaker` because they
# require c2c: shorter wrong answers that cost accuracy would be no cure.
#
# *c4, the shared filler.* Here we expected the effect to vanish and it did not: in two of three seeds wrong
# answers run away while right ones stay short. So the policy does tell the two cases apart, by the flag that
# stands before the filler; a shared token is no blindfold. That the effect is slower than with two tokens
# is visible, how much slower three seeds cannot say. The control was too weak for what it should show: that
# the bias needs a failure the policy can see.
#
# *c6b, still shorter where length helps.* All three differences have the claimed sign, but three seeds make
# a wide interval, and there is little room for a difference: a wrong answer of this puzzle is mostly one
# that was still trying when the budget ended, under either objective. c6 falls with it. Not claimed, but
# seen: in all three seeds Dr. GRPO ends less accurate than GRPO on this puzzle.
#
# *c8a, the fix is free.* The rule takes the largest minus the smallest of four times, which is above zero for
# four equal ones too. A few repeats with one slow objective, not always the same, carry the mean over the
# bound; the medians of the four lie within it. The rule is about the mean, so the claim stays open.
#
# *c9b, c9i, twenty times `generate`.* `generate` waits for the host, and hardly longer for a larger batch of
# the larger model; our step has become the GPU's own work and grows. What is left is not memory bandwidth:
# the compiled step is several times slower than reading weights and cache once. Where that time goes the
# record does not say.

# %% [markdown]
# ## Play
#
# The whole effect fits into a policy of two numbers: the probability of more filler after a success and after
# a failure (a third, the probability of being right, is held at the value you choose). Nothing rewards
# filler. Watch where the two curves go under each objective, and how the group size and the learning rate
# change it.


# %%
def simulate_filler(
    objective: str, group_size: int, accuracy: float, lr: float, steps: int = 150, seeds: int = 4
) -> np.ndarray:
    """P(more filler | right), P(more filler | wrong) over Adam steps of 32 groups, (steps + 1, seeds, 2).

    A response is 16 fixed tokens and geometric filler, cut off at 64 tokens (then wrong). Each step
    follows the exact log-probability gradient of freshly sampled groups. Raises ValueError for an unknown
    objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    rng, base, budget, how = np.random.default_rng(0), 16, 64, OBJECTIVES[objective]
    theta = np.full((seeds, 2), math.log(MORE_FILLER / (1 - MORE_FILLER)))
    m, v, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t in range(1, steps + 2):
        p = 1 / (1 + np.exp(-theta))
        path.append(p)
        right = rng.random((seeds, 32, group_size)) < accuracy
        more = np.where(right, p[:, :1, None], p[:, 1:, None])
        drawn = rng.geometric(1 - np.clip(more, 0, 1 - 1e-6)) - 1
        filler, ended = np.minimum(drawn, budget - base), drawn <= budget - base
        paid = (right & ended).astype(float)
        a = paid - paid.mean(2, keepdims=True)
        if how["scale"] != "none":
            std = paid.std(2, ddof=1, keepdims=True) + 1e-8
            a = a / std if how["scale"] == "std" else a * group_size / (group_size - 1)
        length = base + filler
        batch = length.mean((1, 2), keepdims=True)
        w = a / {"response": length, "constant": budget, "batch": batch}[how["aggregate"]]
        score = w * (filler * (1 - more) - ended * more)  # w * d log p(this much filler) / d theta
        g = np.stack([(score * right).mean((1, 2)), (score * ~right).mean((1, 2))], 1)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        theta = theta + lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-12)
    return np.array(path)


# %% tags=["figure", "hide-input"]
def panel(ax, objective: str, group_size: int, accuracy: float, lr: float) -> None:
    """Both filler probabilities over the steps, four seeds."""
    path = simulate_filler(objective, group_size, accuracy, lr)
    for i, (name, style) in enumerate(plots.arms(["after a right answer", "after a wrong answer"]).items()):
        lines = ax.plot(path[:, :, i], alpha=0.75, linewidth=1.5, **style)
        lines[0].set_label(name)
    ax.axhline(MORE_FILLER, color="#555555", linewidth=0.8)
    ax.set_ylim(-0.02, 1.02)
    plots.label(ax, "step", "P(one more filler token) (1)", f"{NAMES[objective]}, G = {group_size}")


figure, axes = plt.subplots(1, 4, figsize=(10.4, 3.0), sharey=True)
for ax, objective in zip(axes, ("grpo", "no_std", "no_length", "dr_grpo"), strict=True):
    panel(ax, objective, group_size=8, accuracy=0.25, lr=0.05)
    ax.set_ylabel("" if objective != "grpo" else ax.get_ylabel())
axes[0].legend(loc="lower left", fontsize=8)
plots.show(
    figure,
    alt="Four panels, probability of one more filler token against training steps, four seeds each. GRPO and "
    "no std: after a wrong answer it rises to 1, after a right one it falls. No length and Dr. GRPO: both "
    "wander around the start.",
    caption="With the division by length the two probabilities run apart; without it they wander.",
)


# %% tags=["widget", "hide-input"]
def draw_filler(objective: str, group_size: int, accuracy: float, lr: float):
    """Both filler probabilities over the steps, four seeds."""
    figure, ax = plt.subplots(figsize=(6.2, 3.1))
    panel(ax, objective, group_size, accuracy, lr)
    ax.legend(loc="lower left", fontsize=9)
    return figure


GRID = {"objective": ["grpo", "no_std", "no_length", "dr_grpo"], **S.play}
FILLER_ALT = "P(one more filler token) after right and after wrong answers, over training steps, four seeds."
picker.live(draw_filler, GRID)
picker.picker(
    run, "filler", draw_filler, GRID, alt=FILLER_ALT,
    caption="With the division by length, filler runs up after a failure and down after a success.",
)  # fmt: skip

# %% [markdown]
# ## Your own model
#
# `checkpoint` names a causal language model on the hub or in a folder (config, tokenizer, weights, sharded or
# not): `Qwen/Qwen2.5-1.5B` for the paper's comparison, `Qwen/Qwen2.5-Math-7B` for its final run. `template`
# chooses the prompt, `questions` a file of JSON lines with `problem` and `answer` (MATH, GSM8K, ASDiv …).
# Answers are compared by [math-verify](https://github.com/huggingface/Math-Verify)
# (`pip install math-verify`); nobody should write that again.
#
# Without `checkpoint` the same code runs on the chapter's small base model, saved first in the published
# layout.


# %%
QWEN = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    "<|im_end|>\n"
)
TEMPLATES = {  # (prompt, string that ends a response)
    "none": ("{problem}", ""),
    "qwen_math": (QWEN + "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves "
        "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
        "User with the answer. The reasoning process is enclosed within <think> </think> and answer is "
        "enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
        "</think> <answer> answer here </answer>.\nUser: {problem}\nAssistant: <think>",
        "</answer>",
    ),
}


@dataclass(frozen=True)
class Problem:
    """A problem in words with its reference answer, under a prompt template."""

    problem: str
    answer: str
    template: str

    @property
    def prompt(self) -> str:
        return TEMPLATES[self.template][0].format(problem=self.problem)


# %%
def verify_math(problem: Problem, text: str) -> bool:
    """Whether math-verify finds the reference answer: in the answer tag (r1) or anywhere in the response.

    Raises ImportError saying what to install; never raises on model text.
    """
    try:
        from math_verify import parse
        from math_verify import verify as same
    except ImportError as error:
        raise ImportError(
            'the reward of a real checkpoint needs math-verify: pip install "math-verify"'
        ) from error
    if problem.template == "r1":
        found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        text = found[-1] if found else ""
    return bool(text.strip()) and bool(same(parse(f"\\boxed{{{problem.answer}}}"), parse(text)))


# %%
def load_problems(path: str, template: str) -> list[Problem]:
    """Problems of a JSON-lines file; "" gives 16 sums. Raises ValueError naming `questions` or `template`."""
    if template not in TEMPLATES:
        raise ValueError(f"template: {template!r}; accepted: {', '.join(TEMPLATES)}")
    if not path:
        rng = np.random.default_rng(0)
        pairs = rng.integers(10, 100, (16, 2)).tolist()
        return [Problem(f"What is {a} + {b}?", str(a + b), template) for a, b in pairs]
    try:
        lines = [
            json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        found = [Problem(str(line["problem"]), str(line["answer"]), template) for line in lines]
    except (OSError, KeyError, TypeError, ValueError) as error:
        wanted = 'accepted: a file of JSON lines {"problem": …, "answer": …}'
        raise ValueError(f"questions: {path}: {error!r}; {wanted}") from error
    if not found:
        raise ValueError(f"questions: {path} has no lines")
    return found


def load_checkpoint(path: str):
    """(model, tokenizer) of a causal language model. Raises ValueError naming `checkpoint` if it is none."""
    try:
        kind = torch.bfloat16 if run.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, trust_remote_code=False).to(run.device)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        wanted = "accepted: hub id or folder of a causal language model (config.json, weights, tokenizer)"
        raise ValueError(f"checkpoint: {path}: {str(error)[:300]}; {wanted}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"checkpoint: {path}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = model.generation_config.eos_token_id or tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


# %%
def own_model(
    path: str, template: str, questions: str, group_size: int, budget: int, seed: int = 0
) -> dict[str, Any]:
    """One round of rollouts of a checkpoint: rewards, lengths, angle between the two gradients."""
    model, tokenizer = load_checkpoint(path)
    puzzle = not questions and tokenizer.get_vocab().keys() == make_tokenizer().get_vocab().keys()
    asked = (
        questions_of(range(HELD_OUT, HELD_OUT + 4), [1, 2])
        if puzzle
        else load_problems(questions, template)[:4]
    )
    reward, stop = (verify, "") if puzzle else (verify_math, TEMPLATES[template][1])
    got = collect(
        model, tokenizer, asked, group_size, budget, torch.Generator().manual_seed(seed), None, reward, stop
    )
    grads, out = {}, {"reward": got.rewards.mean().item(), "tokens": got.lengths.double().mean().item()}
    last = [p for p in model.parameters() if p.requires_grad][-1:]  # one tensor is enough to see the angle
    chunk = 1024 if model.config.get_text_config().vocab_size > 10_000 else None
    logp = token_logps(model, got.rollout.ids, got.attention_mask, got.rollout.prompt_len, chunk=chunk)
    out["logp"] = (logp.detach() * got.rollout.mask).sum().item() / got.rollout.mask.sum().item()
    for name in ("grpo", "dr_grpo"):
        how, kept = OBJECTIVES[name], dict(constant=budget, aggregate=OBJECTIVES[name]["aggregate"])
        advantages = group_advantages(got.rewards, group_size, how["scale"])
        loss = policy_loss(logp, logp.detach(), advantages, got.rollout.mask, **kept)
        grads[name] = torch.autograd.grad(loss, last, retain_graph=True)[0].flatten().double()
    norm = (grads["grpo"].norm() * grads["dr_grpo"].norm()).item()
    out["cosine"] = (grads["grpo"] @ grads["dr_grpo"]).item() / norm if norm else None
    return out | {"text": got.texts[0][:200], "prompt": asked[0].prompt[-80:]}


# %%
if run.checkpoint:
    own = run.unit(
        own_model, path=run.checkpoint, template=template, questions=questions, group_size=8, budget=48
    )
else:
    load_problems(questions, template)  # wrong parameters are an error here too
    folder = run.folder / "own_model"
    own_base = AutoModelForCausalLM.from_pretrained(readrun.asset("dr_grpo/base"), dtype=torch.float32)
    own_base.save_pretrained(folder, max_shard_size="200KB")
    make_tokenizer().save_pretrained(folder)
    own = own_model(str(folder), "none", "", group_size=8, budget=48)
print(
    f"reward {own['reward']:.3f}, {own['tokens']:.1f} tokens, mean log-probability {own['logp']:.4f} per "
    f"token"
)
cosine = own["cosine"]
print(
    "no group with both outcomes: no gradient"
    if cosine is None
    else f"cosine GRPO / Dr. GRPO gradient {cosine:.4f}"
)
print(own["prompt"], "→", own["text"])

# %% [markdown]
# The committed checkpoints were made with the same definitions. `make_checkpoint` needs a few minutes on one
# CPU core:
#
# ```
# python -c "import readrun; readrun.chapter('dr_grpo').make_checkpoint('main', 'data/assets/dr_grpo/base')"
# ```


# %%
def make_checkpoint(puzzle: str, folder: str, start: str = "", seed: int = 0) -> None:
    """Train and save (float16) the small base model of a puzzle for `smoke` and `cpu`, on the CPU.

    From scratch 2800 steps of 64 responses; from the folder of another one (`start`) 400 steps.
    """
    tokenizer = make_tokenizer()
    if start:
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    else:
        size = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        model = make_model(size, tokenizer, seed)
    pretrain(model, tokenizer, puzzle, [1, 2], 400 if start else 2800, 64, 1e-3 if start else 4e-3, seed)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# %% [markdown]
# ## Limits
#
# - Filler is useless here by construction. In real chains of thought a part of the length is useful, and this
#   chapter says nothing about how large that part is; the retry puzzle is only a first step.
# - Nothing about benchmark scores, templates, pre-training data or the "Aha moment" is run here; the paper's
#   second half stands above as numbers only.
# - The base model is a stand-in whose weakness is manufactured. The intervals are over seeds of reinforcement
#   learning; all seeds of a puzzle share one base model.
# - A budget that is too small hides the effect, because everything is cut off; one that is never reached
#   hides the run-away. The table shows the share cut off. Where two arms both end at the budget, that they
#   agree says little: then look at how fast their curves rise. In the recorded run nearly all wrong answers
#   of GRPO are cut off: the size of the gap is that of the budget.
# - Horizons are short: 150 steps, against thousands in practice. Three learning rates were tried, and all
#   arms chose the smallest.
# - The length penalty was chosen on one seed and does not carry over well: over the other seeds its accuracy
#   scatters more than that of any other arm.
#
# **Exercise 1.** With `G = 2` and 0/1 rewards, what does the division by the standard deviation do to the
# *direction* of the gradient over many questions?
#
# :::{dropdown} Solution
# A group either teaches nothing or has one right and one wrong response: advantages $\pm\tfrac12$ and
# standard deviation $\tfrac1{\sqrt2}$, always. All groups that count are scaled by the same number, so that
# nothing but the step size changes. Three responses give the same answer, since groups with one and with two
# right ones have equal spread: the difficulty bias needs $G\ge4$.
# :::
#
# **Exercise 2.** Someone divides the loss by the longest response *of the batch* instead of the budget. Is
# that Dr. GRPO?
#
# :::{dropdown} Solution
# No. The divisor is shared by all responses of a batch, but it is random and correlated with them: a batch in
# which one response is very long gets a smaller step. Its expectation is no longer the gradient of the
# expected reward, as for the batch mean.
# :::
#
# **Exercise 3.** A response is right and long. Under GRPO, is there any question for which its tokens are
# pushed *harder* than under Dr. GRPO (constant 64, group of 8)?
#
# :::{dropdown} Solution
# The ratio of the weights is $\tfrac{64}{|o|\operatorname{std}(R)}$. It exceeds 1 whenever
# $|o|<64/\operatorname{std}(R)$; the standard deviation of 0/1 rewards is at most 0.535, so for every
# response within the budget. What GRPO changes is not the size of the push but how it compares between short
# and long responses, and Adam normalises the size away.
# :::
#
# **References.** Z. Liu et al., *Understanding R1-Zero-Like Training: A Critical Perspective*, 2025, arXiv
# 2503.20783.
#
# ```bibtex
# @article{liu2025understanding,
#   title   = {Understanding R1-Zero-Like Training: A Critical Perspective},
#   author  = {Liu, Zichen and Chen, Changyu and Li, Wenjun and Qi, Penghui and Pang, Tianyu and Du, Chao
#              and Lee, Wee Sun and Lin, Min},
#   journal = {arXiv preprint arXiv:2503.20783},
#   year    = {2025}
# }
# ```
