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
# # Quamba2: sort the channels once, then use four bits
#
# Hung-Yueh Chiang et al., *Quamba2: A Robust and Scalable Post-training Quantization Framework for Selective
# State Space Models* (ICML 2025), [arXiv 2503.22879](https://arxiv.org/abs/2503.22879). Official code:
# [enyac-group/Quamba](https://github.com/enyac-group/Quamba).
#
# :::{admonition} The idea in three sentences
# :class: tip
# A Mamba-2 language model that writes one token reads every weight once, so weights of four bits should make
# it almost four times as fast; but its recurrence adds up the rounding errors of a few very large channels.
# *Which* channels are large is a property of the model, not of the text: so they can be sorted and clustered
# once, offline, and every cluster gets a scale of its own. The permutation, like the rotations that tame the
# other tensors, disappears in the weights.
#
# **You need to know** what a recurrent state is, what {term}`quantisation` to integers does, and how to read
# an {term}`interval` and a {term}`roofline`. Symbols are in [Notation](../notation.md).
#
# **You will run** every step on transformers' own `Mamba2ForCausalLM`, integer products with exact
# references, a quantised model that generates, and kernels at the dimensions of the 8-billion model.
#
# **It costs** seconds in `smoke`, under two minutes on one core in `cpu`; the `gpu` run is described below.
# :::

# %% tags=["parameters", "hide-input"]
profile = ""  # smoke | cpu | gpu; "" means $READRUN_PROFILE, else cpu
seed = 0  # first seed
seeds = 0  # how many seeds; 0: the profile's own number
device = "auto"  # auto | cpu | cuda
checkpoint = ""  # hub id or folder of a Mamba-2 checkpoint of your own (transformers' format)
only = ""  # patterns of units to compute; "": all; "none": draw from saved units
out = ""  # folder for this run's files; "": build/quamba2/<profile>/live

# %% tags=["hide-input"]
import contextlib
import copy
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import readrun
import scipy.stats
import torch
import torch.nn.functional as F
from readrun import attempts, corpus, lm, lowbit, onerow, paths, picker, plots, sanitizer, ssm, tables, train
from readrun import bench as clock
from readrun.lowbit import kernel_linear, norm_quant, quant, real, rows_key, use_kernels, wide
from sklearn.cluster import AgglomerativeClustering, KMeans
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.utils.logging import disable_progress_bar

run = readrun.start(
    "quamba2", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only,
    out=out,
)  # fmt: skip
plots.style()
disable_progress_bar()
# %% [markdown]
# ## The idea in a picture
#
# Channels of $x$ inside four heads (made up): large ones stand anywhere, and one scale must serve the
# largest. Sorted inside their head, with alike heads side by side, rectangles of equal size appear: one
# scale each.

# %% tags=["figure", "hide-input"]
rng = np.random.default_rng(0)
shape_of = np.array([np.r_[np.full(6, 1.0), np.full(2, 24.0)], np.r_[np.full(3, 1.0), np.full(5, 8.0)]])
before = np.concatenate([shape_of, shape_of]) * rng.uniform(0.8, 1.25, (4, 8))
before = np.take_along_axis(before, rng.permuted(np.tile(np.arange(8), (4, 1)), axis=1), 1)
after = np.sort(before, 1)[[0, 2, 1, 3]]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.4))
for ax, values, title, heads in zip(axes, (before, after), ("as trained", "sorted, clustered"), ("0123",
        "0213"),
                                    strict=True):  # fmt: skip
    ax.imshow(np.log2(values), cmap="cividis", vmin=-1, vmax=5, aspect="auto")
    ax.set_yticks(range(4), list(heads))
    ax.grid(False)
    plots.label(ax, "channel (new order)" if heads[1] == "2" else "channel", "head", title)
for y, x in ((0, 5.5), (2, 2.5)):
    axes[1].plot([x, x], [y - 0.5, y + 1.5], color="white", linewidth=3)
axes[1].axhline(1.5, color="white", linewidth=3)
plots.show(
    figure,
    alt="Two grids of four heads by eight channels, bright where a channel is large. Left: bright cells "
    "anywhere. "
    "Right: channels sorted within each head and heads of the same shape together; white lines cut the "
    "grid into "
    "four rectangles of equal brightness.",
    caption="Which channels are large belongs to the model, so the order and the four scales are found once.",
)

# %% [markdown]
# ## Set-up
#
# One code path, three sizes; the active profile is in bold. Rules and margins were written into
# `data/papers/quamba2.yml` before the first experiment.

# %% tags=["hide-input"]
SMALL = dict(
    size=dict(vocab=256, width=128, depth=4, heads=16, groups=2, state=32),
    plan=dict(steps=2200, batch=16, length=128, lr=3e-3),
)

VARIANTS: dict[str, dict] = {
    "quamba2_w4a8": dict(recipe="w4a8"),
    "naive_w4a8": dict(recipe="w4a8", sort_cluster=False, per_state_group=False, hadamard=False, gptq=False),
    "quamba2_w4a16": dict(recipe="w4a16"),
    "quamba2_w8a8": dict(recipe="w8a8"),
    "dynamic_w4a8": dict(recipe="w4a8", sort_cluster=False, per_state_group=False, hadamard=False, gptq=False,
                         dynamic=True),
    "smooth_w4a8": dict(recipe="w4a8", smooth=True, gptq=False),
    "no_gptq": dict(recipe="w4a8", gptq=False),
    "no_hadamard": dict(recipe="w4a8", hadamard=False),
    "no_sort": dict(recipe="w4a8", sort_cluster=False),
    "no_state_group": dict(recipe="w4a8", per_state_group=False),
}  # fmt: skip
TINY = dict(hidden_size=128, num_heads=4, head_dim=64, n_groups=2, num_hidden_layers=2, vocab_size=256,
            state_size=16, tie_word_embeddings=False)  # fmt: skip
SLOW = dict(tiny=True, batches=[1, 2], prompts=[[1, 16], [1, 24], [2, 16]], repeats=3, warmup=1, rows=[1, 2])
S = run.settings(
    smoke=dict(
        seeds=1, trained="small", size=SMALL["size"], plan=dict(steps=2, batch=2, length=32, lr=1e-3),
        data=dict(calib=4, items=4, length=64, batch=4, prefix=8, steps=3), variants=["quamba2_w4a8",
        "naive_w4a8"],
        stress=[4], speed=SLOW, play=dict(groups=[1, 4], bits=[4, 8]),
    ),
    cpu=dict(
        seeds=1, trained="small", size=SMALL["size"], plan=dict(steps=8, batch=8, length=64, lr=1e-3),
        data=dict(calib=16, items=64, length=256, batch=16, prefix=64, steps=32), variants=list(VARIANTS),
        stress=[4, 6], speed=SLOW, play=dict(groups=[1, 2, 4, 8], bits=[4, 6, 8]),
    ),
    gpu=dict(
        seeds=3, trained="here", size=dict(vocab=4096, width=512, depth=12, heads=32, groups=4, state=64),
        plan=dict(steps=1000, batch=16, length=512, lr=1.5e-3),
        data=dict(calib=128, items=256, length=512, batch=16, prefix=256, steps=64), variants=list(VARIANTS),
        stress=[4, 6],
        speed=dict(tiny=False, batches=[1, 4, 16, 64], repeats=60, warmup=20, rows=[1, 16, 1024, 8192],
                   prompts=[[1, 1024], [1, 2048], [8, 1024], [1, 512], [8, 512], [8, 2048]]),
        play=dict(groups=[1, 2, 4, 8], bits=[4, 6, 8]),
    ),
)  # fmt: skip
S


# %% [markdown]
# ## The algorithm
#
# ### Step 1: the block, as matrix products
#
# A Mamba-2 block makes five things out of its input $u$ with one matrix, `in_proj`: a gate $z$, the sequence
# $x$, the input-dependent $B$ and $C$, and a step size $\Delta$ per head. $x$, $B$, $C$ pass a short causal
# convolution and SiLU. Head $h$ keeps a state $S_t$ of $P\times N$ numbers ($P$ channels, $N$ state indices);
# its group $g(h)$ of heads shares $B$ and $C$:
#
# $$
# S_t = e^{\Delta_t A}\, S_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = S_t C_t + D\,x_t .
# $$
#
# Unrolled, $y = (\,(C B^\top)\circ L\,)\,(\Delta x)$ with $L_{ts}=e^{\sum_{s<r\le t}\Delta_r A}$: within
# chunks of $Q$ tokens a masked matrix product, between chunks the recurrence. $CB^\top$ is computed once
# per *group*, not per head. This one scan serves the float model, ours, and the training of the small model.


# %%
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int = 32,
        state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The selective scan: y (b, l, H, P), and the state after each chunk (b, chunks, H, P, N).

    x (b, l, H, P), dt (b, l, H) >= 0, A (H,) < 0, B, C (b, l, G, N), D (H,), state (b, H, P, N) or None.
    """
    (b, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    r, pad = heads // groups, -length % chunk
    if pad:  # dt = 0: the state stays
        x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, pad)) for t in (x, dt, B, C))
    v = (x * dt[..., None]).view(b, -1, chunk, groups, r, p)
    cum = (dt * A).view(b, -1, chunk, groups, r).cumsum(2).permute(0, 1, 3, 4, 2)  # (b, c, g, r, q)
    B, C = (t.view(b, -1, chunk, groups, n).transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
    v = v.permute(0, 1, 3, 4, 2, 5)  # (b, c, g, r, q, p)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(~later, -math.inf).exp()
    y = ((C @ B.transpose(-1, -2))[:, :, :, None] * decay) @ v
    own = (v * (cum[..., -1:] - cum).exp()[..., None]).transpose(-1, -2) @ B[:, :, :, None]
    s = x.new_zeros(b, groups, r, p, n) if state is None else state.view(b, groups, r, p, n)
    before, after = [], []
    for kept, new in zip(cum[..., -1:, None].exp().unbind(1), own.unbind(1), strict=True):
        before.append(s)
        s = s * kept + new
        after.append(s)
    y = y + (C[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2)) * cum.exp()[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, -1, heads, p) + D[:, None] * x
    return y[:, :length], torch.stack(after, 1).flatten(2, 3)


# %%
# NBVAL_CHECK_OUTPUT
one = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
toy_y, toy_states = ssd(
    x=one(1, 1, 1).view(1, 3, 1, 1), dt=torch.ones(1, 3, 1, dtype=torch.float64), A=one(-math.log(2)),
    B=one(1, 2, 4).view(1, 3, 1, 1), C=one(1, 1, 10).view(1, 3, 1, 1), D=one(0), chunk=2,
)  # fmt: skip
print("y:", [f"{v:.2f}" for v in toy_y.flatten().tolist()])
print("state after each chunk of two:", [f"{v:.3f}" for v in toy_states.flatten().tolist()])

# %% [markdown]
# :::{dropdown} Where these numbers come from
# One head, one channel, one state; every step halves the state. $S_1=1$, $S_2=\tfrac12+2=2.5$,
# $S_3=1.25+4=5.25$; $y=(1,\;2.5,\;52.5)$. The second chunk holds token 3 and one padded token whose step size
# is zero, which leaves the state alone.
# :::


# %%
def conv_silu(xbc: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution and SiLU: xbc (b, l, c), weight (c, k), before (b, k - 1, c) or zeros."""
    k = weight.shape[1]
    longer = F.pad(xbc, (0, 0, k - 1, 0)) if before is None else torch.cat([before, xbc], 1)
    made = sum(longer[:, i : i + xbc.shape[1]] * weight[:, i] for i in range(k))
    return F.silu(made if bias is None else made + bias)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of y silu(z) in `groups` equal parts of the last axis, times weight; y, z (..., e)."""
    v = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight


class GroupScanMixer(Mamba2Mixer):
    """transformers' mixer with the scan above where it has no cache: the same function, faster to train."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        """hidden_states (b, l, d) -> (b, l, d)."""
        if cache_params is not None or attention_mask is not None:
            return super().forward(hidden_states, cache_params, attention_mask=attention_mask, **kwargs)
        e, conv, heads = self.intermediate_size, self.conv_dim, self.num_heads
        z, xbc, dt = self.in_proj(hidden_states).split([e, conv, heads], -1)
        bias = None if self.conv1d.bias is None else self.conv1d.bias.to(xbc.dtype)
        xbc = conv_silu(xbc, self.conv1d.weight[:, 0].to(xbc.dtype), bias)
        x, B, C = xbc.split([e, (conv - e) // 2, (conv - e) // 2], -1)
        dt = F.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit)
        y, _ = ssd(x.unflatten(-1, (heads, -1)).float(), dt, -self.A_log.float().exp(),
                   B.unflatten(-1, (self.n_groups, -1)).float(), C.unflatten(-1, (self.n_groups, -1)).float(),
                   self.D, chunk=self.chunk_size)  # fmt: skip
        y = gated_norm(y.flatten(2), z.float(), self.norm.weight, self.n_groups, self.norm.variance_epsilon)
        return self.out_proj(y.to(hidden_states.dtype))


def group_scan_(model: Mamba2ForCausalLM) -> Mamba2ForCausalLM:
    """Give every mixer of the model the grouped scan, in place; weights and names stay."""
    for block in model.backbone.layers:
        block.mixer.__class__ = GroupScanMixer
    return model


# %% [markdown]
# ### Step 2: rotate what need not be seen
#
# Outliers in the residual stream cost the linear layers their precision. An orthonormal *Hadamard* matrix
# $H_n$ (entries $\pm1/\sqrt n$) spreads each of them over all $n$ channels. The residual stream is rotated
# once and for all: the embedding becomes $EH_d$, every matrix that reads the stream $W\,\mathrm{diag}(\gamma)
# H_d$, every matrix that writes it $H_d^\top W$. RMSNorm with unit weight commutes with a rotation, so the
# norm's weight $\gamma$ moves into the matrix first; the head must be untied, since it and the embedding are
# transformed differently. Nothing of this is computed at run time.
#
# Sizes: $2^k$ by Sylvester's doubling; $12\cdot2^k$ and $20\cdot2^k$ start from Paley's matrices: with
# $\chi(a)=\pm1$ for squares and non-squares modulo a prime $q\equiv3\pmod 4$, $H_{q+1}=I+S$ where
# $S_{0j}=1=-S_{j0}$ and $S_{ij}=\chi(i-j)$.


# %%
@functools.lru_cache(maxsize=32)
def hadamard(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthonormal Hadamard matrix (n, n). Raises ValueError unless n is 2^k, 12·2^k or 20·2^k."""
    base = next((b for b in (1, 12, 20) if n >= b and n % b == 0 and (n // b) & (n // b - 1) == 0), 0)
    if n < 1 or not base:
        raise ValueError(f"hadamard: n={n}; accepted: 2^k, 12·2^k, 20·2^k (which holds 40·2^k)")
    made = torch.ones(1, 1, dtype=torch.float64)
    if base > 1:
        q = base - 1
        squares = {i * i % q for i in range(1, q)}
        made = torch.eye(base, dtype=torch.float64)
        made[0, 1:], made[1:, 0] = 1, -1
        chi = [0] + [1 if i in squares else -1 for i in range(1, q)]
        made[1:, 1:] += torch.tensor([[chi[(i - j) % q] for j in range(q)] for i in range(q)])
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(made) < n:
        made = torch.kron(made, two)
    return (made / math.sqrt(n)).to(dtype)


def untie_(model: Mamba2ForCausalLM) -> None:
    """Give the head weights of its own."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@torch.no_grad()
def fold_norms_(model: Mamba2ForCausalLM) -> Mamba2ForCausalLM:
    """Move the weight of every residual norm into the matrix behind it, in place; unties the head."""
    untie_(model)
    pairs = [(block.norm, block.mixer.in_proj) for block in model.backbone.layers]
    for norm, linear in [*pairs, (model.backbone.norm_f, model.lm_head)]:
        linear.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)
    return model


# %%
@torch.no_grad()
def rotate_(model: Mamba2ForCausalLM) -> Mamba2ForCausalLM:
    """Rotate the residual stream by a Hadamard matrix, in place; logits stay. Raises ValueError (`hadamard`).

    The input of out_proj is rotated later, by `QMamba2Mixer`, because that needs work at run time.
    """
    had = hadamard(model.config.hidden_size).to(model.lm_head.weight)
    fold_norms_(model)
    model.backbone.embeddings.weight.copy_(model.backbone.embeddings.weight @ had)
    model.lm_head.weight.copy_(model.lm_head.weight @ had)
    for block in model.backbone.layers:
        block.mixer.in_proj.weight.copy_(block.mixer.in_proj.weight @ had)
        block.mixer.out_proj.weight.copy_(had.T @ block.mixer.out_proj.weight)
        if block.mixer.out_proj.bias is not None:
            block.mixer.out_proj.bias.copy_(block.mixer.out_proj.bias @ had)
    return model


# %%
# NBVAL_CHECK_OUTPUT
toy = torch.tensor([8.0, 0, 0, 0], dtype=torch.float64)
print("an outlier, rotated:", (toy @ hadamard(4, torch.float64)).tolist())
print("signs of row 1 of H_12:", "".join("+" if v > 0 else "-" for v in hadamard(12)[1]))

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Entries of $H_4$ are $\pm\tfrac12$: an 8 becomes four 4s. An int8 scale for 8 has steps of $8/127$, for 4
# half of that, and no channel is lost in rounding.
#
# $q=11$: squares are 1, 3, 4, 5, 9. Row 1 is $-1$ in column 0, $I$ on the diagonal (column 1), then
# $\chi(0-j)=\chi(11-j)$ for $j=1,\dots,10$: $\chi(10)=-$, $\chi(9)=+$, $\chi(8)=-$, $-$, $-$, $+$, $+$,
# $+$, $-$, $+$.
# :::
#
# ### Step 3: sort and cluster
#
# The statistic of channel $c$ of $x$ is the mean of $|x_c|$ over the tokens of one sample, then the maximum
# over the calibration samples. Within each SSD group (heads that share $B$ and $C$):
#
# 1. inside every head, sort the $P$ channels by the statistic;
# 2. divide each head's sorted profile by its length and cluster the heads by Ward's method into $m=4$ groups:
#    heads of similar *shape*; order heads by group;
# 3. in each head group, cluster the $P$ ranks by k-means into $n=4$ contiguous ranges, starting from the
#    ranks $0, P/4, P/2, 3P/4$.
#
# That gives $4\times4=16$ static scales per SSD group. Channels never leave their head, nor heads their SSD
# group. If k-means returns ranges that are not contiguous, the best contiguous partition is found by dynamic
# programming.


# %%
@dataclass
class ReorderPlan:
    """Where channels and heads go: new position i holds old channel idx_c[i] (e,), old head idx_h[i] (H,).

    head_sizes (G, m): heads per head group; chan_sizes (G, m, n): channels of a head per channel group.
    """

    idx_c: Tensor
    idx_h: Tensor
    head_sizes: Tensor
    chan_sizes: Tensor

    def group_of(self) -> Tensor:
        """Scale group of every channel in the new order, int64 (e,): numbered over (G, m, n)."""
        groups, m, n = self.chan_sizes.shape
        parts = []
        for i in range(groups * m):
            one = torch.repeat_interleave(torch.arange(n) + n * i, self.chan_sizes.view(-1, n)[i])
            parts.append(one.repeat(int(self.head_sizes.view(-1)[i])))
        return torch.cat(parts)


def best_ranges(values: np.ndarray, n: int) -> np.ndarray:
    """Sizes of the n contiguous ranges of rows (P, k) with the least inertia, by dynamic programming."""
    count, sums = len(values), np.cumsum(np.pad(values, ((1, 0), (0, 0))), 0)
    squares = np.cumsum(np.pad((values**2).sum(1), (1, 0)))

    def inertia(i: int, j: int) -> float:
        return squares[j] - squares[i] - ((sums[j] - sums[i]) ** 2).sum() / (j - i)

    cost, cut = np.full((n + 1, count + 1), np.inf), np.zeros((n + 1, count + 1), int)
    cost[0, 0] = 0
    for k in range(1, n + 1):
        for j in range(k, count + 1):
            found = [cost[k - 1, i] + inertia(i, j) for i in range(k - 1, j)]
            cut[k, j] = k - 1 + int(np.argmin(found))
            cost[k, j] = min(found)
    ends = [count]
    for k in range(n, 0, -1):
        ends.append(cut[k, ends[-1]])
    return np.diff(ends[::-1])


# %%
def rank_ranges(values: np.ndarray, n: int) -> np.ndarray:
    """Sizes of n contiguous ranges of the rows of values (P, k): k-means, else `best_ranges`."""
    start = values[[i * len(values) // n for i in range(n)]]
    if len(np.unique(start, axis=0)) == n:
        labels = KMeans(n, init=start, n_init=1, max_iter=100).fit(values).labels_
        if (np.diff(labels) >= 0).all() and len(np.unique(labels)) == n:
            return np.bincount(labels, minlength=n)
    return best_ranges(values, n)


# %%
def sort_and_cluster(stat: Tensor, G: int, H: int, P: int, m: int = 4, n: int = 4) -> ReorderPlan:
    """The plan for one layer from its channel statistic (e = H P,).

    Raises ValueError if a group has fewer than m heads, a head fewer than n channels, or sizes do not fit.
    """
    if stat.numel() != H * P or H % G:
        raise ValueError(
            f"stat: {stat.numel()} channels, H={H} heads of P={P}, G={G}; accepted: e = H P, G | H"
        )
    if H // G < m or P < n:
        raise ValueError(f"m={m}, n={n}; accepted: at most H/G={H // G} head groups, P={P} channel groups")
    values = stat.detach().double().cpu().numpy().reshape(H, P)
    order = np.argsort(values, 1, kind="stable")
    profile, at, sizes, chans = np.take_along_axis(values, order, 1), [], [], []
    for heads in np.arange(H).reshape(G, -1):
        shape = profile[heads] / np.maximum(np.linalg.norm(profile[heads], axis=1, keepdims=True), 1e-30)
        ward = AgglomerativeClustering(m, linkage="ward")
        labels = ward.fit(shape).labels_ if m > 1 else np.zeros(len(heads), int)
        by_label = np.argsort(labels, kind="stable")
        at += heads[by_label].tolist()
        sizes.append(np.bincount(labels, minlength=m))
        chans.append([rank_ranges(profile[heads[labels == i]].T, n) for i in range(m)])
    channels = (np.array(at)[:, None] * P + order[at]).ravel()
    return ReorderPlan(*(torch.tensor(np.array(t)) for t in (channels, at, sizes, chans)))


@torch.no_grad()
def reorder_(mixer: Mamba2Mixer, plan: ReorderPlan) -> Mamba2Mixer:
    """Rearrange the weights of a mixer by the plan, in place; what it computes stays the same."""
    c, h, e = plan.idx_c.to(mixer.D.device), plan.idx_h.to(mixer.D.device), mixer.intermediate_size
    bc = torch.arange(mixer.conv_dim - e, device=c.device)
    rows = torch.cat([c, e + c, 2 * e + bc, e + mixer.conv_dim + h])  # z, x, B and C, dt
    conv = torch.cat([c, e + bc])
    for tensor, index in (
        (mixer.in_proj.weight, rows), (mixer.in_proj.bias, rows), (mixer.conv1d.weight, conv),
        (mixer.conv1d.bias, conv), (mixer.A_log, h), (mixer.D, h), (mixer.dt_bias, h), (mixer.norm.weight, c),
    ):  # fmt: skip
        if tensor is not None:
            tensor.copy_(tensor[index])
    mixer.out_proj.weight.copy_(mixer.out_proj.weight[:, c])
    return mixer


# %%
# NBVAL_CHECK_OUTPUT
toy_stat = torch.tensor([[9.0, 1, 1, 8], [1, 1, 1, 2], [2, 20, 2, 18], [4, 2, 2, 2]])  # 4 heads of 4 channels
toy_plan = sort_and_cluster(toy_stat.flatten(), G=1, H=4, P=4, m=2, n=2)
print("heads:", toy_plan.idx_h.tolist(), " head groups of", toy_plan.head_sizes[0].tolist())
print("channels:", toy_plan.idx_c.view(4, 4).tolist())
print("channel groups of", toy_plan.chan_sizes[0].tolist())

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Heads 0 and 2 have two large channels, heads 1 and 3 one: after division by their lengths the pairs have
# almost equal profiles. Sorted ascending, head 0 is $(1,1,8,9)$ from channels 1, 2, 3, 0; head 2 is
# $(2,2,18,20)$ from 8, 10, 11, 9. In the group of two large channels the ranks split 2 + 2, in the other,
# with profiles $(1,1,1,2)$ and $(2,2,2,4)$, 3 + 1. Which group comes first is Ward's label.
# :::
#
# `channel_stats` listens behind `in_proj`. A batch is a tensor of token ids or a mapping with `input_ids` and
# `attention_mask`; padding does not count.


# %%
def as_batches(calib: Any) -> list[tuple[Tensor, Tensor]]:
    """[(ids (b, l), mask (b, l) bool)] from tensors or mappings. Raises ValueError if there is no token."""
    found = []
    for batch in [calib] if isinstance(calib, Tensor) else calib:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        found.append((ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()))
    if (
        not found
        or not all(mask.any(1).all() for _, mask in found if mask.numel())
        or not any(ids.numel() for ids, _ in found)
    ):
        raise ValueError("calib: an empty batch, or a row of padding; accepted: token ids (batch, length)")
    return found


@torch.no_grad()
def run_batches(model, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Run the model on the batches for what its hooks see."""
    for ids, mask in batches:
        ids = ids.to(model.device)
        model(ids, attention_mask=None if mask.all() else mask.to(ids).long(), use_cache=False)


# %%
@torch.no_grad()
def listen(model: Mamba2ForCausalLM, batches: Any, see: Callable[[int, Tensor, Tensor], None]) -> None:
    """see(layer, x | B | C behind convolution and SiLU (b, l, c), mask (b, l, 1)), layer by layer."""
    current: list[Tensor] = []

    def hook(i: int, mixer: Mamba2Mixer, _module, _inputs, made: Tensor) -> None:
        xbc = made[..., mixer.intermediate_size : -mixer.num_heads]
        see(
            i,
            conv_silu(xbc, mixer.conv1d.weight[:, 0], mixer.conv1d.bias),
            current[0].to(made.device)[..., None],
        )

    hooks = [block.mixer.in_proj.register_forward_hook(functools.partial(hook, i, block.mixer))
             for i, block in enumerate(model.backbone.layers)]  # fmt: skip
    for ids, mask in as_batches(batches):
        current[:] = [mask]
        run_batches(model, [(ids, mask)])
    for one in hooks:
        one.remove()


def channel_stats(model: Mamba2ForCausalLM, batches: Any) -> list[Tensor]:
    """Per layer the statistic (e,) of x: mean |x| over the tokens of a sample, largest over the samples."""
    found = [
        torch.zeros(block.mixer.intermediate_size, device=model.device) for block in model.backbone.layers
    ]

    def see(i: int, xbc: Tensor, mask: Tensor) -> None:
        x = xbc[..., : len(found[i])].abs()
        found[i] = torch.maximum(found[i], ((x * mask).sum(1) / mask.sum(1)).amax(0))

    listen(model, batches, see)
    return found


# %% [markdown]
# ### Step 4: numbers in eight and four bits
#
# Everything is symmetric. Activations are int8 with a *static* scale, $s=\max|a|/127$ over calibration data,
# $q=\mathrm{clip}(\mathrm{round}(a/s),-128,127)$. Eight-bit weights have one scale per matrix. Four-bit
# weights have one per 128 inputs of a row, $s=2\max|w|/15$,
# $q=\mathrm{clip}(\mathrm{round}(w/s)+8,\,0,\,15)$, kept in 16 bits: 4.125 bits per weight. In memory
# eight weights share one 32-bit word: nibble $j$ of word $i$ of a group is weight $16j+i$, so that a
# kernel meets contiguous inputs for each nibble.


# %%
def absmax_scale(a: Tensor, bits: int = 8) -> Tensor:
    """max |a| / (2^(bits-1) - 1): the scale of a whole tensor."""
    return a.abs().amax().clamp_min(1e-8) / (2 ** (bits - 1) - 1)


def pack_w4(q: Tensor) -> Tensor:
    """Values 0 … 15 (out, in) to uint8 (out, in / 2), as eight nibbles per little-endian 32-bit word."""
    words = q.to(torch.uint8).unflatten(1, (-1, 8, 16)).transpose(2, 3).flatten(1)  # (.., word, nibble)
    return words[:, ::2] | (words[:, 1::2] << 4)


def unpack_w4(packed: Tensor) -> Tensor:
    """The inverse of `pack_w4`: uint8 (out, in)."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return nibbles.unflatten(1, (-1, 16, 8)).transpose(2, 3).flatten(1)


def w4_scale(w: Tensor) -> Tensor:
    """Scale of each row of w (.., group): 2 max |w| / 15, rounded to 16 bits, as float32."""
    return (2 * w.abs().amax(-1) / 15).clamp(1e-6, 6e4).half().float()


def quant_w4(w: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """(packed uint8 (out, in/2), scales fp16 (out, in/group)) of w (out, in), rounded to nearest.

    Raises ValueError unless group is 128 and divides the inputs.
    """
    check_group(w.shape[1], group)
    parts = w.float().unflatten(1, (-1, group))
    scale = w4_scale(parts)
    q = (parts / scale[..., None]).round().add(8).clamp(0, 15)
    return pack_w4(q.flatten(1)), scale.half()


def dequant_w4(packed: Tensor, scales: Tensor) -> Tensor:
    """float32 (out, in): (q - 8) times the scale of the group."""
    q = unpack_w4(packed).float() - 8
    return q * scales.float().repeat_interleave(q.shape[1] // scales.shape[1], 1)


# %%
def check_group(inputs: int, group: int = 128) -> None:
    """Raises ValueError unless group is 128 and divides `inputs`."""
    if group != 128 or inputs % group:
        raise ValueError(
            f"weight: {inputs} inputs in groups of {group}; accepted: a multiple of 128, group 128"
        )


# %% [markdown]
# Round-to-nearest treats all inputs alike. *GPTQ* knows the inputs: with the Hessian $\mathcal H=2XX^\top$
# of the layer's squared output error it quantises one column after another and lets the columns still to come
# absorb the error, $w_{j} \leftarrow w_{j} - \frac{w_k-\hat w_k}{U_{kk}}U_{kj}$, where $U$ is the upper
# Cholesky factor of the damped inverse. Scales of a group are taken when its first column comes up, from
# the weights as they are then.


# %%
@torch.no_grad()
def gptq(w: Tensor, hessian: Tensor, group: int = 128, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """(packed, scales) of w (out, in) as `quant_w4`, errors compensated by hessian (in, in)."""
    check_group(w.shape[1], group)
    w, hessian = w.float().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal().add_(dead + damp * hessian.diagonal().mean().clamp_min(1e-12))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    q, scales = torch.empty_like(w), []
    for start in range(0, w.shape[1], group):
        end = start + group
        block, errors = w[:, start:end], torch.empty_like(w[:, start:end])
        scale = w4_scale(block)
        scales.append(scale.half())
        for k in range(group):
            at, column = start + k, block[:, k]
            q[:, at] = (column / scale).round().add(8).clamp(0, 15)
            errors[:, k] = (column - (q[:, at] - 8) * scale) / upper[at, at]
            block[:, k:] -= errors[:, k, None] * upper[at, at:end]  # a view of w
        w[:, end:] -= errors @ upper[start:end, end:]
    return pack_w4(q), torch.stack(scales, 1)


@torch.no_grad()
def gptq_(linear: nn.Linear, hessian: Tensor, group: int = 128, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """`gptq` of a layer; its weight becomes the quantised one. Returns (packed, scales)."""
    packed, scales = gptq(linear.weight, hessian, group, damp)
    linear.weight.copy_(dequant_w4(packed, scales))
    return packed, scales


# %%
# NBVAL_CHECK_OUTPUT
toy_w = torch.zeros(1, 128)
toy_w[0, :4] = torch.tensor([7.5, 1.4, -3.2, 0.3])
toy_packed, toy_scales = quant_w4(toy_w)
print("scale:", toy_scales.item(), " values:", (unpack_w4(toy_packed)[0, :4].int() - 8).tolist())
toy_h = torch.eye(128)
toy_h[1, 3] = toy_h[3, 1] = 0.9  # inputs 1 and 3 come together
print("GPTQ:        values:", (unpack_w4(gptq(toy_w, toy_h)[0])[0, :4].int() - 8).tolist())

# %% [markdown]
# :::{dropdown} Where these numbers come from
# $s=2\cdot7.5/15=1$. $7.5$ rounds to 8, which does not exist ($q\le15$): 7. $1.4\to1$, $-3.2\to-3$,
# $0.3\to0$.
#
# Inputs 1 and 3 are correlated with $0.9$ (1 % damping makes the diagonal $1.01$). Rounding $1.4$ to 1 leaves
# $0.4$ undone; column 3 takes over $0.4\cdot0.9/1.01=0.36$, becomes $0.66$, and rounds to 1. When both inputs
# are 1, the error of their sum was $0.4+0.3=0.7$ and is now $0.4-0.7=-0.3$.
# :::
#
# ### Step 5: integer products
#
# For W4A8 the products should add up in *one* int32 number per output, although each group of 128 weights has
# a scale of its own. So there are two levels: $s^{ch}_n=\max_k|W_{nk}|/127$ per output, and the ratio
# $r=s^{group}/s^{ch}$ by which a four-bit value is turned into an eight-bit one on the fly:
#
# $$
# w_8=\mathrm{round}\big((q-8)\,r\big),\qquad y_n = s^{ch}_n s_x \sum_k w_8\,x_8 \quad(\,/\,s^{out}_n
# \text{ and rounded, where the output is int8}).
# $$
#
# Both sums below are exact: below $2^{24}$ float32 holds every integer, above it float64 does.


# %%
def int_matmul(x8: Tensor, w8: Tensor) -> Tensor:
    """Exact x8 (M, K) int8 times w8 (N, K) int8 transposed: int32 (M, N)."""
    kind = torch.float32 if x8.shape[1] * 128 * 128 <= 2**24 else torch.float64
    return (x8.to(kind) @ w8.to(kind).T).to(torch.int32)


def widen_w4(packed: Tensor, ratio: Tensor) -> Tensor:
    """int8 (out, in): round((q - 8) r), ties to even, clipped to ±127."""
    return dequant_w4(packed, ratio).round().clamp(-127, 127).to(torch.int8)


def two_level(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(ratio fp16 (out, in/128), s_ch float32 (out,)) from four-bit weights."""
    s_ch = dequant_w4(packed, scales).abs().amax(1).clamp_min(1e-6) / 127
    return (scales.float() / s_ch[:, None]).half(), s_ch


def epilogue(acc: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """int32 sums times scale (N,): float, or rounded and clipped int8; out_dtype int32 gives the sums."""
    if out_dtype == torch.int32:
        return acc
    y = acc.float() * scale
    return y.round().clamp(-128, 127).to(torch.int8) if out_dtype == torch.int8 else y.to(out_dtype)


def check_linear(x: Tensor, w: Tensor, inputs: int, kinds: Sequence[torch.dtype], stored: torch.dtype
                 ) -> None:  # fmt: skip
    """Raises ValueError naming x or w unless shapes, dtypes and devices fit."""
    if w.ndim != 2 or w.dtype != stored:
        raise ValueError(f"w: {w.dtype}, shape {tuple(w.shape)}; accepted: {stored} with two axes")
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (M, {inputs}) for these weights")
    if inputs % 128:
        raise ValueError(f"w: {inputs} inputs; accepted: a multiple of 128")
    if x.dtype not in kinds:
        raise ValueError(f"x: {x.dtype}; accepted: {', '.join(str(kind) for kind in kinds)}")
    if x.device != w.device:
        raise ValueError(f"x on {x.device}, w on {w.device}; accepted: the same device")


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# %%
def w4a8_linear(x8: Tensor, packed: Tensor, ratio: Tensor, s_ch: Tensor, s_x: float = 1.0,
                s_out: Tensor | float | None = None, *, out_dtype: torch.dtype | None = None,
                plan: Any = None) -> Tensor:  # fmt: skip
    """x8 (M, K) int8 times four-bit weights (N, K): (M, N) float, or int8 where s_out is given.

    packed uint8 (N, K/2), ratio fp16 (N, K/128), s_ch (N,) (`two_level`), s_x: scale of x8, s_out: of the
    output, a number or (N,). plan: kernel choice (`lowbit.LINEAR_PLANS`). Raises ValueError (`check_linear`).
    """
    check_linear(x8, packed, 2 * packed.shape[1], [torch.int8], torch.uint8)
    scale = s_ch * s_x if s_out is None else s_ch * s_x / s_out
    kind = out_dtype or (wide(x8) if s_out is None else torch.int8)
    if use_kernels(x8):
        return kernel_linear("w4a8", x8, packed, ratio, scale, kind, plan)
    return epilogue(int_matmul(x8, widen_w4(packed, ratio)), scale, kind)


def w8a8_linear(x8: Tensor, w8: Tensor, s_w: float | Tensor, s_x: float = 1.0,
                s_out: Tensor | float | None = None, *, out_dtype: torch.dtype | None = None,
                plan: Any = None) -> Tensor:  # fmt: skip
    """x8 (M, K) int8 times w8 (N, K) int8 with scale s_w (a number or (N,)); else as `w4a8_linear`."""
    check_linear(x8, w8, w8.shape[1], [torch.int8], torch.int8)
    scale = torch.ones(len(w8), device=x8.device) * s_w * s_x
    kind = out_dtype or (wide(x8) if s_out is None else torch.int8)
    scale = scale if s_out is None else scale / s_out
    if use_kernels(x8):
        return kernel_linear("w8a8", x8, w8, None, scale, kind, plan)
    return epilogue(int_matmul(x8, w8), scale, kind)


def w4a16_linear(x: Tensor, packed: Tensor, s_group: Tensor, *, out_dtype: torch.dtype | None = None,
                 plan: Any = None) -> Tensor:  # fmt: skip
    """x (M, K) float times four-bit weights (N, K) with scales s_group fp16 (N, K/128): (M, N)."""
    check_linear(x, packed, 2 * packed.shape[1], FLOATS, torch.uint8)
    if use_kernels(x):
        return kernel_linear("w4a16", x, packed, s_group, None, out_dtype or x.dtype, plan)
    return (x.float() @ dequant_w4(packed, s_group).T).to(out_dtype or x.dtype)


# %%
# NBVAL_CHECK_OUTPUT
toy_w[0, :4] = torch.tensor([7.0, 1.0, -3.0, 2.0])
toy_packed, toy_scales = quant_w4(toy_w)
toy_ratio, toy_sch = two_level(toy_packed, toy_scales)
toy_x8 = torch.zeros(1, 128, dtype=torch.int8)
toy_x8[0, :4] = torch.tensor([1, 2, 3, 4])
print("w8:", widen_w4(toy_packed, toy_ratio)[0, :4].tolist(), f" s_ch: {toy_sch.item():.5f}")
print("sum:", w4a8_linear(toy_x8, toy_packed, toy_ratio, toy_sch, out_dtype=torch.int32).item())
print(f"y: {w4a8_linear(toy_x8, toy_packed, toy_ratio, toy_sch, 0.5, out_dtype=torch.float32).item():.4f}")

# %% [markdown]
# :::{dropdown} Where these numbers come from
# $s=14/15$ (in 16 bits $0.93311$), so $q-8=(7,1,-3,2)$ after rounding $7.5,\,1.07,\,-3.2,\,2.1$ and
# clipping. $\max|\hat w|=7\cdot0.9331$, $s^{ch}=6.5317/127=0.05143$, $r=18.14$ and $w_8=(127,18,-54,36)$.
# The sum is $127+36-162+144=145$, and $y=145\cdot0.05143\cdot0.5=3.7287$, where exact arithmetic with
# $\hat w$ gives $0.9331\cdot(7+2-9+8)\cdot0.5=3.7324$: the second rounding costs a tenth of a percent.
# :::


# %% [markdown]
# ### Step 6: the quantised block
#
# `QMamba2Mixer` takes the place of a `Mamba2Mixer`: same arguments, same cache, so `model(...)` and
# `model.generate` work unchanged. What is int8, and with which static scale:
#
# | tensor | scales |
# |---|---|
# | input of `in_proj`, of `out_proj`, of the head | one each |
# | outputs $z$, $x$, $B$, $C$, $\Delta$ of `in_proj`; the conv state | one per slice |
# | $x$ behind the convolution | 16 per SSD group (sort-and-cluster) |
# | $B$, $C$ behind the convolution | one per SSD group (*per-state-group*) |
# | SSM state between tokens | one per scale group of $x$ and state index |
# | $A_{\log}$, $D$ | one each |
#
# With one SSD group, as in all public models up to 2.7B, per-state-group *is* per-tensor.
#
# Just before `out_proj` a Hadamard matrix is applied at run time and its inverse sits in the weights:
# $H_e = H_H\otimes H_P$, one factor across heads, one inside them, which is what a kernel will want.


# %%
@dataclass
class LayerScales:
    """Static scales of one layer, in real value per integer step.

    u, y: inputs of in_proj and out_proj; slices (5,): z, x, B, C, dt as in_proj gives them; x (groups,),
    b, c (G,): behind the convolution; state (groups, N); group_of (e,): which group a channel of x is in.
    """

    u: float
    y: float
    slices: Tensor
    x: Tensor
    b: Tensor
    c: Tensor
    state: Tensor
    group_of: Tensor


@dataclass
class Scales:
    """All static scales of a model: one `LayerScales` per layer, and the head's input."""

    layers: list[LayerScales]
    head: float


# %%
class QLinear(nn.Module):
    """A linear layer with 4, 8 or 16 bits per weight and, if a8, int8 inputs (a scale per token if dynamic).

    (..., in) -> (..., out) in the dtype of the input. s_in: static scale of the input.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, a8: bool, s_in: float = 0.0,
                 packed: tuple[Tensor, Tensor] | None = None, dynamic: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.bits, self.a8, self.s_in, self.dynamic, self.shape = bits, a8, s_in, dynamic, tuple(weight.shape)
        self.weight = torch.empty(0, device=weight.device)  # transformers asks the head for its dtype
        self.register_buffer("bias", bias)
        if bits == 4:
            w, scales = packed or quant_w4(weight)
            scales, s_ch = two_level(w, scales) if a8 else (scales, None)
            self.register_buffer("scales", scales)
            self.register_buffer("s_ch", s_ch)
        elif bits == 8:
            s = absmax_scale(weight.float())
            w, s_ch = quant(weight.float(), s), torch.full((len(weight),), s, device=weight.device)
            self.register_buffer("s_ch", s_ch)
        else:
            w = weight.detach().clone()
        self.register_buffer("w", w)

    def forward(self, x: Tensor, s_out: Tensor | None = None) -> Tensor:
        """With s_out (out,) the result is rounded to int8 steps of that size (returned as real values)."""
        flat = x.reshape(-1, x.shape[-1])
        if not self.a8:
            y = (
                w4a16_linear(flat, self.w, self.scales)
                if self.bits == 4
                else F.linear(flat, self.w.to(x.dtype))
            )
        else:
            s = absmax_rows(flat) if self.dynamic else self.s_in
            x8, per_token, rest = quant(flat, s), s if self.dynamic else 1.0, (1.0 if self.dynamic else s)
            if self.bits == 4:
                y = w4a8_linear(x8, self.w, self.scales, self.s_ch, rest, out_dtype=torch.float32) * per_token
            else:
                y = w8a8_linear(x8, self.w, self.s_ch, rest, out_dtype=torch.float32) * per_token
        y = y if self.bias is None else y + self.bias
        y = y if s_out is None else quant(y, s_out).float() * s_out
        return y.to(x.dtype).view(*x.shape[:-1], -1)


# %%
def absmax_rows(a: Tensor) -> Tensor:
    """The scale of each row (..., 1) for int8."""
    return a.abs().amax(-1, keepdim=True).clamp_min(1e-8).float() / 127


class QEmbedding(nn.Module):
    """Token embeddings in 4 or 8 bits with one scale per row: ids (...) -> (..., d) float32."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, top = bits, {4: 7.5, 8: 127.0}[bits]
        scale = (weight.float().abs().amax(1) / top).clamp_min(1e-6).half()
        q = (weight.float() / scale[:, None].float()).round()
        w = pack_w4((q + 8).clamp(0, 15)) if bits == 4 else q.clamp(-127, 127).to(torch.int8)
        self.register_buffer("w", w)
        self.register_buffer("scales", scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows, scale = self.w[ids.flatten()], self.scales[ids.flatten()].float()[:, None]
        q = unpack_w4(rows).float() - 8 if self.bits == 4 else rows.float()
        return (q * scale).view(*ids.shape, -1)


# %%
def quant_x(x: Tensor, scales: LayerScales, bits: int = 8) -> Tensor:
    """x (b, l, H, P) to integers with the scale of each channel's group (H, P in the plan's order)."""
    return quant(x, channel_scale(scales, x.device).view(x.shape[2:]) * step_factor(bits), bits)


def dequant_x(q: Tensor, scales: LayerScales, bits: int = 8) -> Tensor:
    """The inverse of `quant_x` up to rounding, float32."""
    return q.float() * channel_scale(scales, q.device).view(q.shape[2:]) * step_factor(bits)


def quant_bc(v: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """B or C (b, l, G, N) to integers with a scale per SSD group (G,)."""
    return quant(v, scale.to(v.device)[:, None] * step_factor(bits), bits)


def quant_state(state: Tensor, scales: LayerScales) -> Tensor:
    """State (b, H, P, N) to int8 with a scale per group of x and state index."""
    return quant(state, state_scale(scales, state))


def step_factor(bits: int) -> float:
    """How much larger a step of `bits` is than one of 8 bits over the same range."""
    return 127 / (2 ** (bits - 1) - 1)


def channel_scale(scales: LayerScales, device: Any) -> Tensor:
    """Scale of every channel of x, (e,)."""
    return scales.x.to(device)[scales.group_of.to(device)]


def state_scale(scales: LayerScales, like: Tensor) -> Tensor:
    """Scale of every element of a state, (H, P, N)."""
    return scales.state.to(like.device)[scales.group_of.to(like.device)].view(like.shape[1:])


# %%
def online_hadamard(y: Tensor, heads: int) -> Tensor:
    """y (..., e) times H_heads ⊗ H_P: the rotation in front of out_proj, at run time."""
    v = y.unflatten(-1, (heads, -1))
    across, inside = hadamard(heads).to(y), hadamard(v.shape[-1]).to(y)
    return torch.einsum("hk,...hp->...kp", across, v @ inside).flatten(-2)


def small_int8(v: Tensor) -> Tensor:
    """v as eight bits with one scale would hold it."""
    scale = absmax_scale(v)
    return quant(v, scale).float() * scale


# %%
class MixerParts(nn.Module):
    """The tensors of a quantised mixer, and the switch from float to a recipe."""

    def __init__(self, mixer: Mamba2Mixer, hadamard_out: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.groups = mixer.num_heads, mixer.head_dim, mixer.n_groups
        self.e, self.conv_dim, self.layer_idx = mixer.intermediate_size, mixer.conv_dim, mixer.layer_idx
        self.limit, self.eps, self.chunk = (
            mixer.time_step_limit,
            mixer.norm.variance_epsilon,
            mixer.chunk_size,
        )
        self.rotated, self.see = hadamard_out, None
        self.scales: LayerScales | None = None
        self.a8, self.xbc_bits, self.state_bits, self.dynamic = False, 16, 16, False
        out = mixer.out_proj.weight.detach()
        if hadamard_out:
            out = online_hadamard(out, self.heads)
        self.in_proj: nn.Module = QLinear(mixer.in_proj.weight.detach(), mixer.in_proj.bias, 16, False)
        self.out_proj: nn.Module = QLinear(out, mixer.out_proj.bias, 16, False)
        for name, value in dict(
            conv_weight=mixer.conv1d.weight[:, 0], conv_bias=mixer.conv1d.bias, dt_bias=mixer.dt_bias,
            A=-mixer.A_log.float().exp(), D=mixer.D, norm_weight=mixer.norm.weight,
        ).items():  # fmt: skip
            self.register_buffer(name, None if value is None else value.detach().float().clone())

    @torch.no_grad()
    def quantize_(self, scales: LayerScales, recipe: str, packed: dict, options: dict) -> None:
        """Switch to a recipe: quantise the weights (packed: GPTQ's result per layer, else to nearest)."""
        w_bits, self.a8 = RECIPES[recipe]
        self.scales, self.dynamic = scales, options["dynamic"]
        self.xbc_bits = options["xbc_bits"] if self.a8 or options["xbc_bits"] < 8 else 16
        self.state_bits = options["state_bits"] if self.a8 else 16
        for name, s in (("in_proj", scales.u), ("out_proj", scales.y)):
            old = getattr(self, name)
            setattr(self, name, QLinear(old.w, old.bias, w_bits, self.a8, s, packed.get(name), self.dynamic))
        if self.a8:
            self.A = -small_int8((-self.A).log()).exp()
            self.D = small_int8(self.D)
        self.see = None


# %%
class MixerSteps(MixerParts):
    """Scales, rounding and the cache of a quantised mixer."""

    def slice_scale(self) -> Tensor:
        """Scale of each output of in_proj, (out,)."""
        bc = self.groups * (self.conv_dim - self.e) // (2 * self.groups)
        sizes = torch.tensor([self.e, self.e, bc, bc, self.heads], device=self.D.device)
        return self.scales.slices.to(self.D.device).repeat_interleave(sizes)

    def fake(self, name: str, v: Tensor) -> Tensor:
        """x, B or C behind the convolution as its integers hold it; float if this layer keeps 16 bits."""
        if self.see:
            self.see(name, v)
        if self.xbc_bits == 16:
            return v
        if self.dynamic:
            flat = v.flatten(2)
            s = absmax_rows(flat) * step_factor(self.xbc_bits)
            return (quant(flat, s, self.xbc_bits).float() * s).view(v.shape)
        if name == "x":
            return dequant_x(quant_x(v, self.scales, self.xbc_bits), self.scales, self.xbc_bits)
        s = getattr(self.scales, name).to(v.device)[:, None] * step_factor(self.xbc_bits)
        return quant_bc(v, getattr(self.scales, name), self.xbc_bits).float() * s

    def take(self, cache: Any, xbc: Tensor, s: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(last three inputs of the convolution (b, 3, c), SSM state (b, H, P, N)) of a cache, or None each;
        the cache's conv state moves on. s (c,): scale of the conv state in int8."""
        layer, state = cache.layers[self.layer_idx], None
        had = bool(layer.has_previous_state[0])
        if had:
            state = layer.recurrent_states[0].float()
            state = state if self.state_bits == 16 else state * state_scale(self.scales, state)
        new = (xbc if s is None else quant(xbc, s)).transpose(1, 2)
        whole = cache.update_conv_state(new, self.layer_idx, conv_kernel_size=self.conv_weight.shape[1])
        if not had:
            return None, None
        k = self.conv_weight.shape[1] - 1
        before = whole[..., -new.shape[-1] - k : -new.shape[-1]].transpose(1, 2).float()
        return before if s is None else before * s, state


# %%
class QMamba2Mixer(MixerSteps):
    """A Mamba2Mixer whose parts can be quantised; made from one, takes its place in a block.

    Until `quantize_` it computes in float; `see(name, tensor)`, if set, is shown what calibration needs.
    Raises ValueError (`hadamard`) where heads or head_dim have no Hadamard matrix.
    """

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        """hidden_states (b, l, d) -> (b, l, d), as Mamba2Mixer; the cache may hold int8."""
        kept, static = hidden_states.dtype, self.a8 and not self.dynamic
        u = hidden_states.float()
        mask = None if attention_mask is None else attention_mask[:, -u.shape[1] :, None].to(u)
        u = u if mask is None else u * mask
        s = self.slice_scale() if static else None
        made = self.in_proj(u, s)
        for name, v in (("u", u), ("made", made)) if self.see else ():
            self.see(name, v)
        z, xbc, dt = made.split([self.e, self.conv_dim, self.heads], -1)
        before, state = None, None
        if cache_params is not None:
            before, state = self.take(cache_params, xbc, None if s is None else s[self.e : -self.heads])
        xbc = conv_silu(xbc, self.conv_weight, self.conv_bias, before)
        x, B, C = (xbc if mask is None else xbc * mask).split(
            [self.e, *[(self.conv_dim - self.e) // 2] * 2], -1
        )
        x = self.fake("x", x.unflatten(-1, (self.heads, -1)))
        B, C = (self.fake(k, v.unflatten(-1, (self.groups, -1))) for k, v in (("b", B), ("c", C)))
        dt = F.softplus(dt + self.dt_bias)
        if state is not None and u.shape[1] == 1:
            y, state = ssm_step(state, x[:, 0], dt[:, 0], self.A, B[:, 0], C[:, 0], self.D)
            y = y[:, None]
        else:
            dt = dt.clamp(*self.limit)
            y, states = ssd(x, dt, self.A, B, C, self.D, 16 if self.see else self.chunk, state)
            state = states[:, -1]
            if self.see:
                self.see("state", states)
        if cache_params is not None:
            kept_state = state if self.state_bits == 16 else quant_state(state, self.scales)
            cache_params.update_recurrent_state(kept_state, layer_idx=self.layer_idx)
        y = gated_norm(y.flatten(2), z, self.norm_weight, self.groups, self.eps)
        y = online_hadamard(y, self.heads) if self.rotated else y
        if self.see:
            self.see("y", y)
        return self.out_proj(y).to(kept)


# %%
def ssm_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token: (y (b, H, P), new state (b, H, P, N)) from x (b, H, P), dt (b, H), B, C (b, G, N)."""
    r = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(r, 1), C.repeat_interleave(r, 1)
    state = state * (dt * A).exp()[..., None, None] + (dt[..., None] * x)[..., None] * B[:, :, None]
    return (state @ C[..., None])[..., 0] + D[:, None] * x, state


# %% [markdown]
# ### Step 7: calibrate, quantise, pack
#
# The order matters: fold and rotate; collect the channel statistics and reorder; calibrate all static scales
# on the reordered float model; then quantise the weights, GPTQ with the Hessians of the same pass. (The
# Hessians are those of the float model, not of one whose earlier layers are already quantised: one pass
# instead of one per layer.)

# %%
RECIPES = {"w16a16": (16, False), "w8a8": (8, True), "w4a8": (4, True), "w4a16": (4, False)}


def floating_(model: Mamba2ForCausalLM, hadamard_out: bool = True) -> Mamba2ForCausalLM:
    """Replace every mixer by a `QMamba2Mixer` that still computes in float, in place."""
    for block in model.backbone.layers:
        block.mixer = QMamba2Mixer(block.mixer, hadamard_out)
    return model


# %%
@torch.no_grad()
def calibrate(model: Mamba2ForCausalLM, batches: Any, plans: Sequence[ReorderPlan | None],
              per_state_group: bool = True, hessians: bool = False) -> Any:  # fmt: skip
    """`Scales` of a model with float `QMamba2Mixer`s that were reordered by `plans` (None: one scale).

    With hessians also [{layer name: (in, in)}] per layer, the head's last. The maximum of the state is taken
    after every 16th token. Raises ValueError for empty batches.
    """
    batches, tops = as_batches(batches), [dict[str, Tensor]() for _ in range(len(plans) + 1)]
    grams = [dict[str, Tensor]() for _ in tops]
    mask_of: list[Tensor] = []

    def keep(i: int, name: str, v: Tensor) -> None:
        if name != "state":  # padding does not count
            v = v.flatten(0, 1)[mask_of[0].flatten().to(v.device)]
        top = v.abs().flatten(0, 1).amax(0) if name == "state" else v.abs().amax(0)
        tops[i][name] = torch.maximum(tops[i].get(name, top), top)
        if hessians and name in ("u", "y"):
            grams[i][name] = grams[i].get(name, 0) + 2 * v.T.double() @ v.double() / len(v)

    for i, block in enumerate(model.backbone.layers):
        block.mixer.see = functools.partial(keep, i)
    hook = model.lm_head.register_forward_pre_hook(
        lambda _m, inputs: keep(len(plans), "u", inputs[0].float())
    )
    for ids, mask in batches:
        mask_of[:] = [mask]
        run_batches(model, [(ids, mask)])
    hook.remove()
    layers = []
    for block, plan, top in zip(model.backbone.layers, plans, tops[:-1], strict=True):
        block.mixer.see = None
        layers.append(layer_scales(block.mixer, plan, top, per_state_group))
    made = Scales(layers, tops[-1]["u"].amax().item() / 127)
    return (made, grams) if hessians else made


# %%
def layer_scales(mixer: QMamba2Mixer, plan: ReorderPlan | None, top: dict[str, Tensor], per_group: bool
                 ) -> LayerScales:  # fmt: skip
    """Scales of one layer from the largest absolute values of its tensors, per channel."""
    e, bc = mixer.e, (mixer.conv_dim - mixer.e) // 2
    least = 1e-6
    slices = torch.stack([part.amax() for part in top["made"].split([e, e, bc, bc, mixer.heads])])
    group_of = torch.zeros(e, dtype=torch.long) if plan is None else plan.group_of()
    group_of = group_of.to(slices.device)
    count = int(group_of.max()) + 1
    x = torch.zeros(count, device=slices.device).scatter_reduce(0, group_of, top["x"].flatten(), "amax")
    state = top["state"].flatten(0, 1)
    rows = torch.zeros(count, state.shape[1], device=slices.device)
    rows = rows.scatter_reduce(0, group_of[:, None].expand_as(state), state, "amax")
    b, c = (top[k].amax(1) if per_group else top[k].amax().expand(mixer.groups) for k in ("b", "c"))
    sized = [v.clamp_min(least) / 127 for v in (slices, x, b, c, rows)]
    return LayerScales(top["u"].amax().clamp_min(least).item() / 127,
            top["y"].amax().clamp_min(least).item() / 127,
                       *sized, group_of)  # fmt: skip


# %%
def check_recipe(recipe: str | Sequence[str], layers: int) -> list[str]:
    """One recipe per layer. Raises ValueError that lists the valid names."""
    found = [recipe] * layers if isinstance(recipe, str) else list(recipe)
    if len(found) != layers or set(found) - RECIPES.keys():
        raise ValueError(f"recipe: {recipe!r}; accepted: {', '.join(RECIPES)}, or a list of {layers} of them")
    return found


@torch.no_grad()
def smooth_(model: Mamba2ForCausalLM, batches: Any, power: float = 0.5) -> None:
    """SmoothQuant's balance instead of a rotation: large inputs of in_proj are divided, in the norm."""
    tops = [torch.zeros(model.config.hidden_size, device=model.device) for _ in model.backbone.layers]

    def look(i: int, _module, inputs: tuple) -> None:
        tops[i] = torch.maximum(tops[i], inputs[0].abs().flatten(0, -2).amax(0))

    hooks = [block.mixer.in_proj.register_forward_pre_hook(functools.partial(look, i))
             for i, block in enumerate(model.backbone.layers)]  # fmt: skip
    run_batches(model, as_batches(batches))
    for block, top, hook in zip(model.backbone.layers, tops, hooks, strict=True):
        hook.remove()
        factor = (top**power / block.mixer.in_proj.weight.abs().amax(0) ** (1 - power)).clamp_min(1e-4)
        block.norm.weight.div_(factor)
        block.mixer.in_proj.weight.mul_(factor)


# %%
def reorder_all_(model: Mamba2ForCausalLM, batches: Any) -> list[ReorderPlan | None]:
    """Sort and cluster every layer, rearrange its weights in place; the plans."""
    plans: list[ReorderPlan | None] = []
    for block, stat in zip(model.backbone.layers, channel_stats(model, batches), strict=True):
        m = block.mixer
        plans.append(sort_and_cluster(stat, m.n_groups, m.num_heads, m.head_dim))
        reorder_(m, plans[-1])
    return plans


# %%
@torch.no_grad()
def quantize(model: Mamba2ForCausalLM, recipe: str | Sequence[str], calib: Any, *, sort_cluster: bool = True,
             per_state_group: bool = True, hadamard: bool = True, gptq: bool = True,
             quant_embedding: bool = True, quant_lm_head: bool = True, state_bits: int = 8,
             xbc_bits: int = 8, dynamic: bool = False,
             smooth: bool = False) -> Mamba2ForCausalLM:  # fmt: skip
    """A quantised copy of a Mamba-2: recipe "w8a8", "w4a8", "w4a16" ("w16a16": none), or one per layer.

    calib: batches of token ids (batch, length), or mappings with attention_mask. The switches leave parts
    out; state_bits 16 keeps the state, xbc_bits < 8 is a stress test, dynamic scales every token at run time,
    smooth replaces the rotation. The copy is float32: 4 bytes per parameter while it is made.
    Raises ValueError naming the argument.
    """
    if not hasattr(model, "backbone") or not hasattr(model.backbone.layers[0].mixer, "n_groups"):
        raise ValueError(
            f"model: {type(model).__name__}; accepted: Mamba2ForCausalLM (Mamba-1 has no groups)"
        )
    recipes = check_recipe(recipe, len(model.backbone.layers))
    batches = [dict(input_ids=ids, attention_mask=mask) for ids, mask in as_batches(calib)]
    model = copy.deepcopy(model).float().eval()
    if smooth:
        untie_(model)
        smooth_(model, batches)
    else:
        (rotate_ if hadamard else fold_norms_)(model)
    grouped = sort_cluster and (any(RECIPES[r][1] for r in recipes) or xbc_bits < 8)
    plans = reorder_all_(model, batches) if grouped else [None] * len(recipes)
    floating_(model, hadamard and not smooth)
    scales, grams = calibrate(model, batches, plans, per_state_group, hessians=True)
    options = dict(state_bits=state_bits, xbc_bits=xbc_bits, dynamic=dynamic)
    for block, one, gram, kind in zip(model.backbone.layers, scales.layers, grams[:-1], recipes, strict=True):
        linears = dict(in_proj=(block.mixer.in_proj, gram["u"]), out_proj=(block.mixer.out_proj, gram["y"]))
        packed = {k: GPTQ(v.w, h) for k, (v, h) in linears.items()} if gptq and RECIPES[kind][0] == 4 else {}
        block.mixer.quantize_(one, kind, packed, options)
    bits, a8 = RECIPES[max(set(recipes), key=recipes.count)]
    if quant_lm_head and bits < 16:
        head = model.lm_head
        packed = GPTQ(head.weight, grams[-1]["u"]) if gptq and bits == 4 else None
        model.lm_head = QLinear(head.weight.detach(), head.bias, bits, a8, scales.head, packed, dynamic)
    if quant_embedding and bits < 16:
        model.backbone.embeddings = QEmbedding(model.backbone.embeddings.weight.detach(), bits)
    return model


# %%
GPTQ = gptq  # `quantize` has a switch of that name


# %% [markdown]
# ### Step 8: what it weighs
#
# Counting needs no GPU: four bits and 1/8 bit of scales per weight of a linear layer, four bits and a 16-bit
# scale per row of the embedding, 16 bits for convolutions, norms and biases.


# %%
def model_bytes(config: Mamba2Config, recipe: str = "w16a16") -> dict[str, int]:
    """Bytes of a model: {embedding, linear, head, other, total}, and of the states of one sequence."""
    (bits, a8), d = RECIPES[check_recipe(recipe, 1)[0]], config.hidden_size
    e, gn, heads = config.num_heads * config.head_dim, config.n_groups * config.state_size, config.num_heads
    linear = config.num_hidden_layers * (d * (2 * e + 2 * gn + heads) + e * d)
    conv = config.num_hidden_layers * (e + 2 * gn) * (config.conv_kernel + int(config.use_conv_bias))
    other = 2 * (conv + config.num_hidden_layers * (d + e + 3 * heads) + d)
    table = config.vocab_size * d
    weights = {16: lambda n: 2 * n, 8: lambda n: n, 4: lambda n: n // 2 + 2 * n // 128}[bits]
    tied = bits == 16 and config.tie_word_embeddings
    embedding = table * bits // 8 + (2 * config.vocab_size if bits < 16 else 0)
    parts = dict(embedding=embedding, linear=weights(linear), head=0 if tied else weights(table), other=other)
    state = config.num_hidden_layers * (config.conv_kernel * (e + 2 * gn) + e * config.state_size)
    return parts | dict(total=sum(parts.values()), state=state * (1 if a8 else 2))


def measured_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, tied ones once."""
    found = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(found.values())


COMMON = dict(
    state_size=128, conv_kernel=4, expand=2, chunk_size=128, bos_token_id=0, eos_token_id=0, pad_token_id=0
)
CONFIGS = {
    "8b": dict(hidden_size=4096, num_heads=128, head_dim=64, n_groups=8, num_hidden_layers=56,
               vocab_size=256000,
               tie_word_embeddings=False),
    "2.7b": dict(hidden_size=2560, num_heads=80, head_dim=64, n_groups=1, num_hidden_layers=64,
                 vocab_size=50288,
                 tie_word_embeddings=True),
}  # fmt: skip
PAPER_MIB = {"8b": (15711, 7859, 4040), "2.7b": (5155, 2702, 1394)}

# %%
# NBVAL_CHECK_OUTPUT
for name, fields in CONFIGS.items():
    counted = [model_bytes(Mamba2Config(**COMMON | fields), r)["total"] for r in ("w16a16", "w8a8", "w4a8")]
    print(name, [round(n / 2**20) for n in counted], "MiB; the paper:", list(PAPER_MIB[name]))

# %% [markdown]
# :::{dropdown} Where these numbers come from
# 8B: 6.136 billion weights in linear layers, 1.049 in the head and as many in the embedding. At 4.125 bits
# the linear layers are 3017 MiB and the head 516; the embedding 500 and 0.5 for its scales; the
# rest 7. The paper prints MiB/1000 as "GB".
# :::


# %% [markdown]
# ### Step 9: kernels
#
# At batch 1 a product reads each weight once: 38 MB for the 18 560 × 4096 `in_proj` at four bits, 12 µs on
# an H100. In that time the chip can spend about five instructions per weight, so unpacking must be lean. Two
# tricks of the kernels in `readrun.lowbit`: nibble $j$, value $t$, is or-ed where it stands into the bits of
# the float $2^{23}$, which makes it $2^{23}+16^jt$ without conversion or shift (the factor is undone in
# the input or the scale); and adding and subtracting $1.5\cdot2^{23}$ rounds to the nearest integer, ties
# to even, as the definition of $w_8$ asks. Sums of $w_8x_8$ stay exact in float32 as long as one thread
# adds fewer than a thousand of them; threads are then added as integers. Where the time goes is measured
# below, product by product.
#
# | variant | rows | what it does |
# |---|---|---|
# | `gemv` | 1 | registers only; RMSNorm in front and the residual addition behind can be fused |
# | `row` | 1 | second attempt: the next weights are on their way, an instruction less per weight |
# | `fused` | 2 and more | tensor cores, one product per nibble plane (int8: one product) |
# | `unpacked` | many | unpack into an int8 scratch matrix, then our int8 product with its epilogue |
# | `library` | many | unpack, then `torch._int_mm` with an epilogue kernel, or cuBLAS |
#
# `LINEAR_PLANS` lists variants, tiles, warps and stages per kind and number of rows; the first is the
# default, and the tuning unit below measures all.


# %% [markdown]
# The rest of a layer, in a form that fits few kernels. `norm_quant` normalises and rounds. `conv_quant` and
# `ssd_scan` serve prefill; one scan kernel with 16-bit products serves the bf16 baseline and ours, so that no
# speed-up comes from it. It goes through the chunks in order, with the state of one head in registers.


# %%
def conv_quant(zx: Tensor, weight: Tensor, bias: Tensor, e: int, s_in: Tensor | None, s_out: Tensor | None
               ) -> Tensor:  # fmt: skip
    """zx (b, l, W) of in_proj -> x, B, C behind convolution and SiLU, (b, l, c): int8 with scales per
    channel s_in and s_out (c,), else 16 bits. weight (c, 4), bias (c,)."""
    (b, length, width), c = zx.shape, len(weight)
    if not use_kernels(zx):
        v = real(zx[..., e : e + c]) * (1.0 if s_in is None else s_in)
        y = conv_silu(v, real(weight), real(bias))
        return y.to(wide(zx)) if s_out is None else quant(y, s_out)
    out = torch.empty(b, length, c, dtype=wide(zx) if s_out is None else torch.int8, device=zx.device)
    quantised = s_out is not None
    ssm.conv_kernel[(lowbit.triton.cdiv(length, 16), lowbit.triton.cdiv(c, 256), b)](
        zx, weight, bias, s_in if quantised else bias, s_out if quantised else bias, out, length, width, e, c,
        QUANT=quantised, BT=16, BC=256, num_warps=8,
    )  # fmt: skip
    return out


# %%
def ssd_scan(w: Any, zx: Tensor, xbc: Tensor, state: Tensor) -> Tensor:
    """y (b, l, e) in 16 bits from zx (b, l, W) and xbc (b, l, c) of `conv_quant`; state (b, H, P, N) is set.

    w: `LayerWeights`. Raises ValueError unless P and N are powers of two of at least 16.
    """
    b, length, width = zx.shape
    heads, p, n = state.shape[1:]
    if min(p, n) < 16 or p & (p - 1) or n & (n - 1):
        raise ValueError(f"ssd_scan: head_dim {p}, state_size {n}; accepted: powers of two from 16 on")
    if not use_kernels(zx):
        v = real(xbc) * (1.0 if w.s_mid is None else w.s_mid)
        x, B, C = v.split([w.e, *[w.groups * n] * 2], -1)
        dt = F.softplus(real(zx[..., -heads:]) * w.s_dt + w.dt_bias)
        y, states = ssd(x.unflatten(-1, (heads, p)), dt, w.A, B.unflatten(-1, (w.groups, n)),
                        C.unflatten(-1, (w.groups, n)), w.D)  # fmt: skip
        last = states[:, -1]
        state.copy_(quant(last, w.state_scale()) if state.dtype == torch.int8 else last)
        return y.flatten(2).to(wide(zx))
    y = torch.empty(b, length, w.e, dtype=wide(zx), device=zx.device)
    kind, chunk = (lowbit.tl.bfloat16, 64) if zx.is_cuda else (lowbit.tl.float32, 16)
    part = min(p, 32)
    ssm.ssd_kernel[(b, heads, p // part)](
        zx, xbc, w.D if w.s_mid is None else w.s_mid, w.dt_bias, w.A, w.D, y, state,
        w.D if w.s_state is None else w.s_state, w.D if w.rows is None else w.rows, length, width, w.s_dt,
        QUANT=w.s_mid is not None, STATE8=state.dtype == torch.int8, H=heads, P=p, N=n, G=w.groups, KIND=kind,
        Q=chunk, BP=part, num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


# %% [markdown]
# In front of `out_proj`: gate, grouped RMSNorm, Hadamard, rounding. The Hadamard matrix of 8192 is the
# product of one of 64 inside heads and one of 128 across them: two small matrix products per token. While
# decoding the first of them rides along with the state update, which owns a whole head, and a second
# kernel mixes the heads.


# %%
def gate_had_quant(w: Any, y: Tensor, zx: Tensor) -> Tensor:
    """y (b, l, e) gated by z, the first e columns of zx -> the input of out_proj, (b l, e)."""
    heads, p = w.heads, w.e // w.heads
    y, zx = y.flatten(0, 1), zx.flatten(0, 1)
    if not use_kernels(y):
        v = gated_norm(real(y), real(zx[:, : w.e]) * w.s_z, w.norm_weight, w.groups, w.eps)
        v = online_hadamard(v, heads) if w.rotated else v
        return v.to(wide(y)) if w.s_y is None else quant(v, w.s_y)
    out = torch.empty(y.shape, dtype=wide(y) if w.s_y is None else torch.int8, device=y.device)
    ssm.gate_kernel[(len(y),)](
        y, zx, w.norm_weight, w.inside, w.across, out, 1 / (w.s_y or 1.0), zx.shape[1], w.s_z, w.eps,
        H=heads, P=p,
        R=heads // w.groups, BH=max(16, lowbit.triton.next_power_of_2(heads)), BP=max(16,
        lowbit.triton.next_power_of_2(p)),
        ROTATE=w.rotated, OUT8=w.s_y is not None, KIND=lowbit.tl.float16 if y.is_cuda else lowbit.tl.float32,
        num_warps=8 if w.e > 2048 else 4,
    )  # fmt: skip
    return out


# %%
def decode_core(w: Any, zx: Tensor, ring: Tensor, pos: Tensor, state: Tensor, u: Tensor, squares: Tensor,
                out: Tensor, pdl: bool = False) -> Tensor:  # fmt: skip
    """One token per row between the two products: zx (b, W) -> the input of out_proj, `out` (b, e).

    ring (b, 4, c): the last inputs of the convolution, token t in slot t mod 4; pos (1,): number of tokens
    seen; state (b, H, P, N); both are updated. u (b, e), squares (b, H): scratch. pdl: see `onerow`.
    """
    (b, width), (heads, p, n) = zx.shape, state.shape[1:]
    if not use_kernels(zx):
        return decode_reference(w, zx, ring, int(pos), state, out)
    q8, d, early = w.s_mid is not None, w.D, dict(PDL=pdl) | (dict(launch_pdl=True) if pdl else {})
    ssm.step_kernel[(b, heads)](
        zx, ring, pos, w.conv_weight, w.conv_bias, w.s_in if q8 else d, w.s_mid if q8 else d, w.dt_bias,
        w.A, d,
        state, d if w.s_state is None else w.s_state, d if w.rows is None else w.rows, w.norm_weight,
w.inside, u,         squares, width, w.s_z, w.s_dt, QUANT=q8, STATE8=state.dtype == torch.int8,
ROTATE=w.rotated, H=heads, P=p,
        N=n, G=w.groups, num_warps=8 if p * n > 4096 else 4, **early,
    )  # fmt: skip
    ssm.mix_kernel[(b, lowbit.triton.cdiv(p, 16))](
        u, squares, w.across, out, 1 / (w.s_y or 1.0), w.eps, H=heads, P=p, R=heads // w.groups,
        BH=max(16, lowbit.triton.next_power_of_2(heads)), BP=16, ROTATE=w.rotated, OUT8=w.s_y is not None,
        KIND=lowbit.tl.float16 if zx.is_cuda else lowbit.tl.float32, num_warps=4, **early,
    )  # fmt: skip
    return out


# %%
def decode_reference(w: Any, zx: Tensor, ring: Tensor, pos: int, state: Tensor, out: Tensor) -> Tensor:
    """`decode_core` in plain torch."""
    heads, p, n = state.shape[1:]
    ring[:, pos % 4] = zx[:, w.e : -heads]
    order = [(pos + 1 + i) % 4 for i in range(4)]
    past = real(ring[:, order]) * (1.0 if w.s_in is None else w.s_in)
    v = F.silu((past * real(w.conv_weight.T)).sum(1) + w.conv_bias)
    v = v if w.s_mid is None else real(quant(v, w.s_mid)) * w.s_mid
    x, B, C = v.split([w.e, *[w.groups * n] * 2], -1)
    dt = F.softplus(real(zx[:, -heads:]) * w.s_dt + w.dt_bias)
    eight = state.dtype == torch.int8
    old = real(state) * (w.state_scale() if eight else 1.0)
    y, new = ssm_step(old, x.unflatten(-1, (heads, p)), dt, w.A, B.unflatten(-1, (w.groups, n)),
                      C.unflatten(-1, (w.groups, n)), w.D)  # fmt: skip
    state.copy_(quant(new, w.state_scale()) if eight else new)
    v = gated_norm(y.flatten(1), real(zx[:, : w.e]) * w.s_z, w.norm_weight, w.groups, w.eps)
    v = online_hadamard(v, heads) if w.rotated else v
    return out.copy_(v if w.s_y is None else quant(v, w.s_y))


# %% [markdown]
# ### Step 10: a runtime
#
# `Engine` runs a model of `QMamba2Mixer`s with these kernels: five per layer and token at most (norm and
# rounding, `in_proj`, step, mix, `out_proj` with the residual addition; where weights alone are quantised the
# norm is inside `in_proj`). On a GPU one step is one CUDA graph. The bf16 baseline is the same engine on a
# `w16a16` model: only the products and the roundings differ.


# %%
class LayerWeights:
    """One layer in the layout that the kernels want; views of a `QMamba2Mixer`, scales as vectors."""

    def __init__(self, mixer: QMamba2Mixer) -> None:
        scales, self.a8 = mixer.scales, mixer.a8
        if mixer.dynamic or mixer.in_proj.bias is not None or mixer.out_proj.bias is not None:
            raise ValueError(
                "model: dynamic scales and projections with bias have no kernels; use model(...)"
            )
        self.e, self.heads, self.groups, self.eps = mixer.e, mixer.heads, mixer.groups, mixer.eps
        self.rotated, device = mixer.rotated, mixer.D.device
        self.in_proj, self.out_proj = mixer.in_proj, mixer.out_proj
        for name in ("conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight"):
            setattr(self, name, getattr(mixer, name))
        if self.conv_bias is None:
            self.conv_bias = torch.zeros(mixer.conv_dim, device=device)
        p = self.e // self.heads
        half = torch.float16 if device.type == "cuda" else torch.float32
        self.inside = shared_hadamard(p, half, device) if self.rotated else self.D
        self.across = shared_hadamard(self.heads, half, device) if self.rotated else self.D
        self.s_y, self.s_z, self.s_dt, self.s_in, self.s_mid = None, 1.0, 1.0, None, None
        self.s_state, self.rows, self.scale_in, self.scale_out, self.s_u = None, None, None, None, None
        if self.a8 and scales is not None:
            per_row = mixer.slice_scale()
            self.s_u, self.s_y = scales.u, scales.y
            self.s_z, self.s_dt = scales.slices[0].item(), scales.slices[4].item()
            self.s_in = per_row[self.e : -self.heads].contiguous()
            n = (mixer.conv_dim - self.e) // (2 * self.groups)
            bc = torch.cat([scales.b, scales.c]).to(device).repeat_interleave(n)
            self.s_mid = torch.cat([channel_scale(scales, device), bc]).contiguous()
            self.s_state = scales.state.to(device).contiguous()
            self.rows = scales.group_of.to(device, torch.int32)
            self.scale_in = self.in_proj.s_ch * scales.u / per_row
            self.scale_out = self.out_proj.s_ch * scales.y

    def state_scale(self) -> Tensor:
        """Scale of every element of a state, (H, P, N)."""
        return self.s_state[self.rows.long()].view(self.heads, -1, self.s_state.shape[1])


# %%
@functools.lru_cache(maxsize=32)
def shared_hadamard(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One copy per device of a Hadamard matrix."""
    return hadamard(n).to(device, dtype)


# %%
class EngineState:
    """Weights, states and scratch of `Engine`."""

    def __init__(
        self, model: Mamba2ForCausalLM, batch: int, *, wide_state: bool = False, plans: Any = None,
        pdl: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.plans, self.pdl = model, batch, plans or {}, pdl
        self.layers = [LayerWeights(block.mixer) for block in model.backbone.layers]
        self.eps, w, mixer = model.config.layer_norm_epsilon, self.layers[0], model.backbone.layers[0].mixer
        device, d = w.D.device, model.config.hidden_size
        n, p = model.config.state_size, w.e // w.heads
        new = functools.partial(torch.zeros, device=device)
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.h, self.pos = new(batch, d), new(1, dtype=torch.int64)
        self.ids = new(batch, dtype=torch.int64)
        self.u, self.squares = new(batch, w.e), new(batch, w.heads)
        self.zx = {a8: new(batch, w.e + mixer.conv_dim + w.heads, dtype=torch.int8 if a8 else half)
                   for a8 in {layer.a8 for layer in self.layers}}  # fmt: skip
        self.mid = {a8: new(batch, w.e, dtype=torch.int8 if a8 else half) for a8 in self.zx}
        self.rings = [
            new(batch, 4, mixer.conv_dim, dtype=torch.int8 if layer.a8 else half) for layer in self.layers
        ]
        self.states = [new(batch, w.heads, p, n, dtype=torch.int8 if layer.a8 and not wide_state else half)
                       for layer in self.layers]  # fmt: skip
        head = model.lm_head
        self.head = head if isinstance(head, QLinear) else QLinear(head.weight.detach(), None, 16, False)
        self.head_scale = self.head.s_ch * self.head.s_in if self.head.a8 else None
        self.logits = new(batch, self.head.shape[0], dtype=half)
        self.graph: Any = None


# %%
def plain_product(layer: QLinear, x: Tensor, kind: torch.dtype, scale: Tensor | None) -> Tensor:
    """The reference of `EngineProducts.linear`: x (M, in), int8 or float, to int8 (kind) or float32."""
    if layer.a8:
        w8 = widen_w4(layer.w, layer.scales) if layer.bits == 4 else layer.w
        return epilogue(int_matmul(x, w8), scale, kind if kind == torch.int8 else torch.float32)
    return w4a16_linear(x, layer.w, layer.scales) if layer.bits == 4 else F.linear(x.float(), layer.w.float())


# %%
class EngineProducts(EngineState):
    """The three products of `Engine`, by kernels or their references."""

    def linear(self, name: str, layer: QLinear, x: Tensor, out: Tensor | None, kind: torch.dtype,
               scale: Tensor | None, add: bool = False, eps: float | None = None) -> Tensor:  # fmt: skip
        """One product with the plan of its name; eps: RMSNorm in front, add: into out."""
        of = f"w{layer.bits}a{8 if layer.a8 else 16}"
        if not use_kernels(x):
            y = plain_product(layer, x if eps is None else norm_quant(x, eps), kind, scale)
            return y.to(kind) if out is None else out.add_(y) if add else out.copy_(y)
        if x.shape[0] > 1 and eps is not None:
            x, eps = norm_quant(x, eps), None
        if layer.bits == 16 and x.shape[0] > 1:
            y = F.linear(x.to(layer.w.dtype), layer.w)
            return y if out is None else out.add_(y) if add else out.copy_(y)
        plan = self.plans.get(f"{of}/{rows_key(x.shape[0])}/{name}")
        if plan and plan[0] == "row":
            out = x.new_empty(1, len(layer.w), dtype=kind) if out is None else out
            scales = getattr(layer, "scales", None)
            return onerow.row_linear(of, x, layer.w, scales, scale, out, plan, add, eps, self.pdl)
        return kernel_linear(of, x, layer.w, getattr(layer, "scales", None), scale, kind, plan, out, add, eps)

    def project(self, w: LayerWeights, h: Tensor, out: Tensor | None) -> Tensor:
        """Norm, rounding and in_proj of h (M, d) float32."""
        if w.a8:
            return self.linear(
                "in_proj", w.in_proj, norm_quant(h, self.eps, w.s_u), out, torch.int8, w.scale_in
            )
        return self.linear("in_proj", w.in_proj, h, out, self.logits.dtype, None, eps=self.eps)

    def read(self, h: Tensor, out: Tensor | None) -> Tensor:
        """Logits of h (M, d)."""
        if self.head.a8:
            x = norm_quant(h, self.eps, self.head.s_in)
            return self.linear("lm_head", self.head, x, out, self.logits.dtype, self.head_scale)
        return self.linear("lm_head", self.head, h, out, self.logits.dtype, None, eps=self.eps)


# %%
class EngineSteps(EngineProducts):
    """Decoding of `Engine`."""

    def step(self) -> Tensor:
        """One token per sequence: `ids` in, `logits` and the greedy next `ids` out, in place."""
        self.h.copy_(self.model.backbone.embeddings(self.ids))
        for w, ring, state in zip(self.layers, self.rings, self.states, strict=True):
            zx = self.project(w, self.h, self.zx[w.a8])
            mid = decode_core(w, zx, ring, self.pos, state, self.u, self.squares, self.mid[w.a8], self.pdl)
            self.linear("out_proj", w.out_proj, mid, self.h, torch.float32, w.scale_out, add=True)
        self.read(self.h, self.logits)
        self.pos.add_(1)
        self.ids.copy_(self.logits.argmax(-1))
        return self.logits

    def decode(self) -> Tensor:
        """`step` as a replay of one CUDA graph (on a CPU: `step`)."""
        if not self.h.is_cuda:
            return self.step()
        if self.graph is None:
            kept = [t.clone() for t in (*self.rings, *self.states, self.pos, self.ids)]
            self.graph = captured(self.step)
            for t, old in zip((*self.rings, *self.states, self.pos, self.ids), kept, strict=True):
                t.copy_(old)
        self.graph()
        return self.logits


# %%
class Engine(EngineSteps):
    """Prefill and decoding of `batch` sequences with the kernels.

    model: from `quantize` or `random_quantized`. wide_state keeps a 16-bit state where the recipe has int8.
    plans: {"w4a16/1/in_proj": plan, …} from tuning. pdl: kernels of decoding start early (Hopper and later).
    Raises ValueError for what has no kernels.
    """

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ids (batch, l >= 4): sets states and next `ids`; returns the last logits (batch, vocab)."""
        b, length = ids.shape
        if b != self.batch or length < 4:
            raise ValueError(f"ids: {tuple(ids.shape)}; accepted: ({self.batch}, 4 tokens or more)")
        h = self.model.backbone.embeddings(ids).flatten(0, 1).float()
        for w, ring, state in zip(self.layers, self.rings, self.states, strict=True):
            zx = self.project(w, h, None).view(b, length, -1)
            xbc = conv_quant(zx, w.conv_weight, w.conv_bias, w.e, w.s_in, w.s_mid)
            y = ssd_scan(w, zx, xbc, state)
            for t in range(length - 4, length):
                ring[:, t % 4] = zx[:, t, w.e : -w.heads]
            mid = gate_had_quant(w, y, zx)
            self.linear("out_proj", w.out_proj, mid, h, torch.float32, w.scale_out, add=True)
        self.pos.fill_(length)
        self.logits.copy_(self.read(h.view(b, length, -1)[:, -1].contiguous(), None))
        self.ids.copy_(self.logits.argmax(-1))
        return self.logits


# %%
def captured(call: Callable, warmup: int = 3) -> Callable:
    """A CUDA graph of `call`; its replay."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def random_scales(mixer: QMamba2Mixer, device: str) -> LayerScales:
    """Scales of plausible size for a layer of random weights."""
    count, n = 16 * mixer.groups, (mixer.conv_dim - mixer.e) // (2 * mixer.groups)
    plan = torch.arange(mixer.e, device=device) * count // mixer.e
    one = lambda *shape: torch.full(shape, 4 / 127, device=device)  # noqa: E731
    return LayerScales(
        4 / 127, 4 / 127, one(5), one(count), one(mixer.groups), one(mixer.groups), one(count, n), plan
    )


# %%
@torch.no_grad()
def random_quantized(config: Mamba2Config, recipe: str, device: str) -> Mamba2ForCausalLM:
    """A model of these dimensions with random weights, quantised layer by layer, made on the device itself.

    For speed and memory only: they depend on the shapes, not on the values.
    """
    check_recipe(recipe, 1)
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config).requires_grad_(False)
    bits, a8 = RECIPES[recipe]
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    rand = lambda *shape: torch.randn(shape, device=device, dtype=kind) * shape[-1] ** -0.5  # noqa: E731
    options = dict(dynamic=False, xbc_bits=8, state_bits=8)
    for i, block in enumerate(model.backbone.layers):
        with torch.device(device):
            mixer = Mamba2Mixer(config, i).requires_grad_(False).to(kind)
        for linear in (mixer.in_proj, mixer.out_proj):
            linear.weight.data = rand(*linear.weight.shape)
        made = QMamba2Mixer(mixer, hadamard_out=False)
        made.rotated = bits < 16  # random weights need no rotation, the run time does
        made.quantize_(random_scales(made, device), recipe, {}, options)
        for name in ("conv_weight", "conv_bias", "norm_weight", "dt_bias", "A", "D"):
            setattr(made, name, getattr(made, name).to(kind))
        block.mixer, block.norm.weight = (
            made,
            nn.Parameter(torch.ones(config.hidden_size, device=device, dtype=kind)),
        )
    head = rand(config.vocab_size, config.hidden_size)
    table = head if config.tie_word_embeddings and bits == 16 else rand(config.vocab_size, config.hidden_size)
    model.lm_head = QLinear(head, None, bits, a8, 4 / 127)
    if bits == 16:
        model.lm_head.w = head
        model.backbone.embeddings = nn.Embedding.from_pretrained(table)
    else:
        model.backbone.embeddings = QEmbedding(table, bits)
    model.backbone.norm_f.weight = nn.Parameter(torch.ones(config.hidden_size, device=device, dtype=kind))
    return model.requires_grad_(False)


# %% [markdown]
# ## Corrections
#
# - *"Channels are sorted while the model runs."* Nothing is permuted online; the permutation is in the
# weights.
# - *"Channels are sorted, then heads are clustered."* Channels are sorted *inside* their head, heads by the
#   *shape* of their profile, and both only inside an SSD group: 16 scales each.
# - *"Per-state-group quantisation"* does nothing in models with one group, which are all public ones up to
#   2.7B. Models here have two or four.
# - *"4×, 15.7 → 4.0 GB."* 3.9× for 8B, 3.7× for 2.7B, and the paper's GB are MiB/1000.
# - *"1.3× faster prefill."* The project's own table has 1.62× for W8A8, 1.41× for W4A8, 0.95× for W4A16:
#   slower than FP16.
# - Often left out: the int8 states, the two-level scale of W4A8, the untied head, and that W4A16 is not
#   reordered.
#
# ## Experiment: quality
#
# The language model is trained here, on the book's frozen text: novels, guides, docstrings, code. Scales come
# from its validation split, numbers from its test split. Every variant sees the same sequences. On a GPU the
# variants run on the references, not on the kernels: quality says nothing about speed, and the reverse.


# %%
@functools.lru_cache(maxsize=4)
def make_tokenizer(vocab: int):
    """256: one token per byte; else byte-level BPE of that size, trained on the train split."""
    if vocab == 256:
        return lm.byte_tokenizer()
    return lm.bpe_tokenizer((d.text for d in corpus.documents("train")), vocab)


@functools.lru_cache(maxsize=8)
def token_ids(vocab: int, split: str, kinds: tuple[str, ...] = corpus.KINDS, most: int = 0) -> np.ndarray:
    """Ids of the documents of a split and some kinds, in an order that mixes them; the first `most`."""
    documents = corpus.documents(split, kinds)
    texts, size = [], 0
    for i in np.random.default_rng(0).permutation(len(documents)):
        texts.append(documents[i].text)
        size += len(texts[-1])
        if most and size > most * (1 if vocab == 256 else 8):  # a token is less than eight characters long
            break
    if vocab == 256:  # the ids of the byte tokenizer are the bytes
        ids = np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int32)
    else:
        ids = lm.encode(make_tokenizer(vocab), texts)
    return ids[:most] if most else ids


def sample(vocab: int, split: str, batch: int, length: int, seed: int = 0, kinds=corpus.KINDS) -> Tensor:
    """`batch` different sequences of `length` tokens of a split, int64 (batch, length)."""
    ids = token_ids(vocab, split, tuple(kinds), 40 * batch * length)
    return next(lm.batches(ids, batch, length, seed))


def small_lm(size: dict, seed: int) -> Mamba2ForCausalLM:
    """A Mamba-2 of transformers with random weights. size: vocab, width, depth, heads, groups, state."""
    config = lm.causal_config(
        "mamba2", make_tokenizer(256), width=size["width"], depth=size["depth"], heads=size["heads"],
        n_groups=size["groups"], state_size=size["state"], chunk_size=32, vocab_size=size["vocab"],
    )  # fmt: skip
    return lm.causal_lm(config, seed)


# %%
def fit_lm(model: Mamba2ForCausalLM, plan: dict, vocab: int, seed: int, device: str) -> list[float]:
    """Train on the train split. plan: steps, batch, length, lr. Returns the losses (nat per token)."""
    group_scan_(model).to(device).train()
    updater = train.Updater(model, plan["lr"], steps=plan["steps"], warmup=plan["steps"] // 20 + 1,
                            weight_decay=0.05)  # fmt: skip
    ids = token_ids(vocab, "train")
    found = lm.batches(ids, plan["batch"], plan["length"], seed, plan["steps"])

    def loss_of(m, batch: Tensor) -> Tensor:
        logits = m(batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    losses = train.fit(updater, (batch.to(device) for batch in found), loss_of, "language model")
    model.eval()
    return losses


def make_checkpoint(folder: str, seed: int = 0) -> None:
    """Train the committed small model on one core (about a quarter of an hour), save it in float16."""
    model = small_lm(SMALL["size"], seed)
    losses = fit_lm(model, SMALL["plan"], SMALL["size"]["vocab"], seed, "cpu")
    print(f"{len(losses)} steps, loss {np.mean(losses[-50:]):.4f}")
    model.half().save_pretrained(folder)
    make_tokenizer(256).save_pretrained(folder)


# %%
def trained_lm(trained: str, size: dict, plan: dict, seed: int, device: str) -> Mamba2ForCausalLM:
    """The committed small model ("small"), or one trained now ("here"); float32, evaluation mode."""
    if trained == "small":
        model = Mamba2ForCausalLM.from_pretrained(paths.asset("quamba2/base"), dtype=torch.float32)
    else:
        model = small_lm(size, seed)
        fit_lm(model, plan, size["vocab"], seed, device)
    return group_scan_(model).to(device).eval()


@torch.no_grad()
def sequence_nll(model: Mamba2ForCausalLM, ids: Tensor, batch: int) -> np.ndarray:
    """Mean negative log-likelihood (nat per token) of each sequence of ids (items, length)."""
    found = []
    for rows in ids.split(batch):
        logits = model(rows, use_cache=False).logits[:, :-1].float()
        found.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1))
    return torch.cat(found).cpu().double().numpy()


@torch.no_grad()
def stepwise_nll(model: Mamba2ForCausalLM, ids: Tensor, prefix: int, steps: int) -> np.ndarray:
    """As `sequence_nll`, for `steps` tokens decoded one by one (teacher-forced) after a prefix."""
    made = model(ids[:, :prefix], use_cache=True)
    found = []
    for t in range(prefix, prefix + steps):
        found.append(F.cross_entropy(made.logits[:, -1].float(), ids[:, t], reduction="none"))
        made = model(ids[:, t : t + 1], cache_params=made.cache_params, use_cache=True)
    return torch.stack(found).mean(0).cpu().double().numpy()


def unigram_nll(vocab: int, ids: Tensor) -> float:
    """Nats per token of ids under token frequencies of the train split (plus one)."""
    counts = np.bincount(token_ids(vocab, "train", corpus.KINDS, 1_000_000), minlength=vocab) + 1.0
    return float(-np.log(counts / counts.sum())[ids[:, 1:].cpu().numpy()].mean())


# %% [markdown]
# **C2, C3.** How alike is the order of the channels on different texts, and what does a layout of scales
# bring? The signal-to-quantisation-noise ratio is $10\log_{10}\sum x^2/\sum(x-\hat x)^2$, in dB, on test
# sequences, with scales from the calibration set. The random control has the group sizes of sort-and-cluster.


# %%
def order_numbers(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """Medians over layers of the Spearman correlation and of the Jaccard index of the top 5 % channels."""
    ranks = [scipy.stats.spearmanr(x.cpu(), y.cpu()).statistic for x, y in zip(a, b, strict=True)]
    share = []
    for x, y in zip(a, b, strict=True):
        k = max(1, round(0.05 * len(x)))
        one, two = (set(v.topk(k).indices.tolist()) for v in (x, y))
        share.append(len(one & two) / len(one | two))
    return float(np.median(ranks)), float(np.median(share))


def token_order(model: Mamba2ForCausalLM, ids: Tensor) -> float:
    """Control: Spearman correlation of the per-token maxima of |x| of two sequences, median over layers."""
    found: dict[int, float] = {}

    def see(i: int, xbc: Tensor, mask: Tensor) -> None:
        top = xbc[:2, :, : model.backbone.layers[i].mixer.intermediate_size].abs().amax(-1).cpu()
        found[i] = scipy.stats.spearmanr(top[0], top[1]).statistic

    listen(model, [ids[:2]], see)
    return float(np.median(list(found.values())))


def scale_layouts(plan: ReorderPlan, e: int, heads: int, groups: int, seed: int) -> dict[str, Tensor]:
    """Group of every channel in the model's own order, for each layout of scales."""
    channel, p = torch.arange(e), e // heads
    sorted_groups = torch.empty(e, dtype=torch.long)
    sorted_groups[plan.idx_c] = plan.group_of()
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.cat(
        [part[torch.randperm(len(part), generator=generator)] for part in sorted_groups.chunk(groups)]
    )
    return dict(per_tensor=channel * 0, random_16=mixed, contiguous_16=channel * 16 * groups // e,
                sort_cluster=sorted_groups, per_head=channel // p, per_channel=channel)  # fmt: skip


def group_scale(top: Tensor, group: Tensor) -> Tensor:
    """Scale of every channel (e,) for int8 from the largest values (e,) and the channels' groups."""
    most = torch.zeros(int(group.max()) + 1).scatter_reduce(0, group, top, "amax")
    return most[group].clamp_min(1e-8) / 127


# %%
def layout_sqnr(model: Mamba2ForCausalLM, calib: Any, test: Any, seed: int) -> dict[str, np.ndarray]:
    """SQNR (dB) per layer: "x/<layout>", "b/…", "c/…"; int8."""
    layers = [block.mixer for block in model.backbone.layers]
    tops: dict[int, Tensor] = {}

    def largest(i: int, xbc: Tensor, mask: Tensor) -> None:
        top = (xbc * mask).abs().amax((0, 1)).cpu()
        tops[i] = torch.maximum(tops.get(i, top), top)

    listen(model, calib, largest)
    plans = [sort_and_cluster(s, m.n_groups, m.num_heads, m.head_dim)
             for s, m in zip(channel_stats(model, calib), layers, strict=True)]  # fmt: skip
    power: dict[tuple[str, int], np.ndarray] = {}

    def measure(i: int, xbc: Tensor, mask: Tensor) -> None:
        m, e = layers[i], layers[i].intermediate_size
        bc = (m.conv_dim - e) // 2
        v = dict(zip("xbc", xbc.split([e, bc, bc], -1), strict=True))
        top = dict(zip("xbc", tops[i].split([e, bc, bc]), strict=True))
        scales = {f"x/{k}": group_scale(top["x"], g)
                  for k, g in scale_layouts(plans[i], e, m.num_heads, m.n_groups, seed).items()}  # fmt: skip
        for k in "bc":
            group = torch.arange(bc) * m.n_groups // bc
            scales |= {
                f"{k}/per_tensor": group_scale(top[k], group * 0),
                f"{k}/per_group": group_scale(top[k], group),
            }
        for name, scale in scales.items():
            signal, s = v[name[0]], scale.to(xbc.device)
            noise = signal - quant(signal, s).float() * s
            both = np.array([signal.double().square().sum().item(), noise.double().square().sum().item()])
            power[name, i] = power.get((name, i), 0) + both

    listen(model, test, measure)
    names = dict.fromkeys(name for name, _ in power)
    return {name: np.array([10 * np.log10(power[name, i][0] / power[name, i][1]) for i in range(len(layers))])
            for name in names}  # fmt: skip


# %% [markdown]
# One unit per seed: train, then everything that needs this model.


# %%
def quality_of(model: Mamba2ForCausalLM, calib: Any, test: Tensor, variants: Sequence[str], data: dict
               ) -> dict[str, np.ndarray]:  # fmt: skip
    """nll__<variant> of every sequence."""
    found = {"nll__float": sequence_nll(model, test, data["batch"])}
    for name in train.progress(variants, "variants"):
        made = quantize(model, calib=calib, **VARIANTS[name])
        found[f"nll__{name}"] = sequence_nll(made, test, data["batch"])
    return found


def extras(model: Mamba2ForCausalLM, calib: Any, test: Tensor, stress: Sequence[int], data: dict
           ) -> dict[str, np.ndarray]:  # fmt: skip
    """Of the first seed: stress widths, and decoding with int8 and float states."""
    found = {}
    for bits in stress:
        for name, on in (("grouped", True), ("per_tensor", False)):
            made = quantize(model, "w16a16", calib, xbc_bits=bits, sort_cluster=on, per_state_group=on)
            found[f"stress{bits}__{name}"] = sequence_nll(made, test, data["batch"])
    for name, bits in (("int8_state", 8), ("float_state", 16)):
        made = quantize(model, "w4a8", calib, state_bits=bits)
        found[f"steps__{name}"] = stepwise_nll(made, test, data["prefix"], data["steps"])
    return found


# %%
def score(seed: int, first: bool, trained: str, size: dict, plan: dict, data: dict, variants: list,
        stress: list
          ) -> dict[str, Any]:  # fmt: skip
    """All of C1 to C3 for one seed."""
    model, vocab = trained_lm(trained, size, plan, seed, run.device), size["vocab"]
    count, length, batch = data["calib"], data["length"], data["batch"]
    draw = lambda *a, **k: sample(vocab, *a, **k).to(run.device)  # noqa: E731
    calib, test = (
        list(draw("validation", count, length).split(batch)),
        draw("test", data["items"], length, seed=1),
    )
    with lowbit.references():
        found: dict[str, Any] = quality_of(model, calib, test, variants, data)
        found |= extras(model, calib, test, stress, data) if first else {}
        found["unigram"] = unigram_nll(vocab, test)
        half = max(1, len(calib) // 2) if len(calib) > 1 else 0
        parts = [calib[:half], calib[half:]] if half else [[calib[0][::2]], [calib[0][1::2]]]
        prose, code = ([draw("validation", max(2, count // 4), length, kinds=[k])] for k in ("novel", "code"))
        stats = [channel_stats(model, part) for part in (*parts, prose, code)]
        fresh = group_scan_(small_lm(size, seed + 100)).to(run.device).eval()
        order = {"halves": order_numbers(*stats[:2]), "prose_code": order_numbers(*stats[2:]),
                 "untrained": order_numbers(*(channel_stats(fresh, v) for v in (prose, code)))}  # fmt: skip
        found["order"] = {k: list(v) for k, v in order.items()} | {"tokens": [token_order(model, test), 0.0]}
        found |= {f"sqnr__{k.replace('/', '__')}": v
                  for k, v in layout_sqnr(model, calib, test.split(batch), seed).items()}  # fmt: skip
        if first:
            found |= portrait(model, calib, stats[2], stats[3], len(stats[0]) // 2)
    return found


# %%
def portrait(
    model: Mamba2ForCausalLM, calib: Any, prose: list, code: list, layer: int
) -> dict[str, np.ndarray]:
    """What the pictures of one layer need: channel statistics, the plan, some values of x."""
    m, kept = model.backbone.layers[layer].mixer, []

    def see(i: int, xbc: Tensor, mask: Tensor) -> None:
        if i == layer and not kept:
            kept.append(xbc[0, :64, : m.intermediate_size].half().cpu().numpy())

    listen(model, calib, see)
    plan = sort_and_cluster(channel_stats(model, calib)[layer], m.n_groups, m.num_heads, m.head_dim)
    stats = np.stack([prose[layer].cpu(), code[layer].cpu()]).astype(np.float16)
    return dict(stats=stats, x=kept[0], idx_c=plan.idx_c.numpy(), sizes=plan.chan_sizes.numpy(),
                head_sizes=plan.head_sizes.numpy(), shape=np.array([m.n_groups, m.num_heads,
                m.head_dim]))  # fmt: skip


# %%
scored = {
    s: run.unit(score, seed=s, first=s == run.seeds[0], trained=S.trained, size=S.size, plan=S.plan,
    data=S.data,
                variants=S.variants, stress=S.stress)
    for s in run.seeds
}  # fmt: skip


# %% [markdown]
# The training code itself runs in every profile (a few steps in the small ones, which reuse the committed
# model; `make_checkpoint` made that one in twelve minutes of one core).


# %%
def training_check(size: dict, plan: dict, seed: int) -> dict[str, Any]:
    """Losses of a few steps of a fresh model."""
    return {
        "losses": np.array(fit_lm(small_lm(size, seed), plan, size["vocab"], seed, run.device), np.float32)
    }


if S.trained == "small":
    few = run.unit(training_check, size=S.size, plan=S.plan, seed=0)
    print(f"{len(few['losses'])} training steps: loss {few['losses'][0]:.2f} to {few['losses'][-1]:.2f}")


# %% [markdown]
# ## Experiment: speed and memory
#
# At the dimensions of the 8-billion model, with random weights: speed depends on shapes only. First the
# kernels are compared with float64 references on fresh inputs, for every shape, plan and kind in use, and
# at small odd shapes under NVIDIA's `compute-sanitizer`, where the machine has it. Tolerances: integer
# sums exactly; int8 outputs one step; 16-bit outputs 1 % of the largest entry.


# %%
def bench_config(speed: dict) -> Mamba2Config:
    """The dimensions to measure: 8B, or a tiny stand-in that only tests the code."""
    return Mamba2Config(**COMMON | (TINY if speed["tiny"] else CONFIGS["8b"]))


def linear_shapes(config: Mamba2Config) -> dict[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of the three products."""
    e, gn, d = config.num_heads * config.head_dim, config.n_groups * config.state_size, config.hidden_size
    return dict(
        in_proj=(2 * e + 2 * gn + config.num_heads, d), out_proj=(d, e), lm_head=(config.vocab_size, d)
    )


def plans_of(kind: str, rows: int, speed: dict) -> list[tuple]:
    """The plans to try (the first speed["plans"]); on a CPU the reference stands for all of them."""
    if speed["tiny"]:
        return [("reference", (), 0, 0)]
    return lowbit.LINEAR_PLANS.get(f"{kind}/{rows_key(rows)}", [])[: speed.get("plans")]


def make_weights(kind: str, n: int, k: int, device: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Random (weights, group scales or ratios, output scale) of a kind, made on the device."""
    scale = torch.rand(n, device=device) * 1e-4 + 1e-4
    if kind.startswith("w4"):
        w = torch.randint(256, (n, k // 2), device=device, dtype=torch.uint8)
        top = 15.8 if kind == "w4a8" else k**-0.5
        return w, (torch.rand(n, k // 128, device=device) * top).half(), scale
    if kind == "w8a8":
        return torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8), None, scale
    half = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(n, k, device=device, dtype=half) * k**-0.5, None, scale


def make_input(kind: str, rows: int, k: int, device: str, fused: bool) -> Tensor:
    """Random rows (rows, k): int8, float32 for a product with a norm in front, else 16 bits."""
    if kind.endswith("a8"):
        return torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8)
    return torch.randn(
        rows, k, device=device, dtype=torch.float32 if fused or device == "cpu" else torch.bfloat16
    )


# %%
def one_call(
    kind: str, name: str, x: Tensor, w: Tensor, sg: Any, scale: Tensor, plan: Any, out: Tensor
) -> Tensor:
    """The product as the engine calls it: norm in front of one 16-bit row, sum into out_proj's output."""
    eps = 1e-5 if kind.endswith("a16") and len(x) == 1 and name != "out_proj" else None
    if not use_kernels(x):
        y = reference_linear(kind, x, w, sg, scale, eps, torch.float32)
        return out.add_(y) if name == "out_proj" else out.copy_(rounded(y) if out.dtype == torch.int8 else y)
    return kernel_linear(kind, x, w, sg, scale, out.dtype, plan, out, name == "out_proj", eps)


def rounded(y: Tensor) -> Tensor:
    """To the nearest int8 value, still as floats."""
    return y.round().clamp(-128, 127)


def reference_linear(kind: str, x: Tensor, w: Tensor, sg: Any, scale: Tensor, eps: float | None,
                     real_type: torch.dtype = torch.float64) -> Tensor:  # fmt: skip
    """The product in plain torch, unrounded, in float64, in slices of rows of w."""
    v, parts = x.to(real_type), []
    if eps is not None:
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    for i in range(0, len(w), 16384):
        rows = w[i : i + 16384]
        if kind == "w4a8":
            rows = widen_w4(rows, sg[i : i + 16384])
        elif kind == "w4a16":
            rows = dequant_w4(rows, sg[i : i + 16384])
        y = v @ rows.to(real_type).T
        parts.append(y * scale[i : i + 16384] if kind.endswith("a8") else y)
    return torch.cat(parts, 1)


# %%
def out_of(kind: str, name: str, rows: int, n: int, device: str) -> Tensor:
    """Where the engine wants this product: float32 residual, int8 or 16 bits."""
    half = torch.bfloat16 if device == "cuda" else torch.float32
    dtype = (
        torch.float32
        if name == "out_proj"
        else torch.int8
        if kind.endswith("a8") and name == "in_proj"
        else half
    )
    return torch.zeros(rows, n, dtype=dtype, device=device)


# %%
def off_by(got: Tensor, expected: Tensor) -> float:
    """Error over tolerance: int8 in steps, others against 1 % of the largest expected value.

    Rounding down is never off by more than a step, but by half a step in the mean: the mean counts too.
    """
    if got.dtype == torch.int8:
        inside = expected.double().clamp(-128, 127)
        bias = (got.double() - inside).mean().abs().item() / (0.05 + 1.5 * got.numel() ** -0.5)
        return max(bias, (got.double() - rounded(inside)).abs().max().item())
    return ((got.double() - expected).abs().max() / (0.01 * expected.abs().max().clamp_min(1e-9))).item()


@torch.no_grad()
def linear_errors(kind: str, shapes: dict, rows_list: Sequence[int], speed: dict, device: str
                  ) -> dict[str, float]:  # fmt: skip
    """Error over tolerance by shape, number of rows and plan; integer sums must be exact.

    Rows that are no multiple of 16, and the sums themselves, are tried with the default plan. A product
    that no plan can do counts as an error of 1e9.
    """
    found = {}
    for name, (n, k) in shapes.items():
        w, sg, scale = make_weights(kind, n, k, device)
        for rows in rows_list if name != "lm_head" else [r for r in rows_list if r <= 64]:
            x = make_input(kind, rows, k, device, rows == 1 and name != "out_proj")
            eps = 1e-5 if kind.endswith("a16") and rows == 1 and name != "out_proj" else None
            expected = reference_linear(kind, x, w, sg, scale, eps)
            plans = plans_of(kind, rows, speed)
            for plan in plans if rows == 1 or rows % 16 == 0 else plans[:1]:
                key = f"{kind} {name} {rows} {plan}"
                try:
                    out = out_of(kind, name, rows, n, device)
                    found[key] = off_by(one_call(kind, name, x, w, sg, scale, plan, out), expected)
                    if kind.endswith("a8") and plan == plans[0] and use_kernels(x):
                        sums = kernel_linear(kind, x, w, sg, scale, torch.int32, plan).double()
                        exact = reference_linear(kind, x, w, sg, torch.ones_like(scale), eps)
                        found[key + " sums"] = (
                            sums - exact
                        ).abs().max().item() * 1e3  # any error is too large
                except Exception as error:  # a plan that does not run here is not used either
                    print(f"{key}: {str(error)[:160]}")
            if plans and not any(key.startswith(f"{kind} {name} {rows} ") for key in found):
                found[f"{kind} {name} {rows} does not run"] = 1e9
    return found


# %%
@torch.no_grad()
def layer_errors(config: Mamba2Config, rows: int, length: int, device: str) -> dict[str, float]:
    """Error over tolerance of the kernels around the products, int8 and 16-bit, prefill and one step."""
    found = {}
    one = copy.deepcopy(config)
    one.num_hidden_layers, one.vocab_size = 1, 64
    for recipe in ("w16a16", "w4a16", "w4a8"):
        engine = Engine(random_quantized(one, recipe, device), rows)
        w, ring, state = engine.layers[0], engine.rings[0], engine.states[0]
        width = engine.zx[w.a8].shape[1]
        zx = torch.randn(rows, length, width, device=device)
        zx = (zx * 40).clamp(-127, 127).to(torch.int8) if w.a8 else zx.to(state.dtype)
        xbc = conv_quant(zx, w.conv_weight, w.conv_bias, w.e, w.s_in, w.s_mid)
        y = torch.randn(rows, length, w.e, device=device).to(wide(zx))
        h = torch.randn(rows, config.hidden_size, device=device)
        rand = torch.randn(state.shape, device=device)
        state.copy_((rand * 40).clamp(-127, 127) if state.dtype == torch.int8 else rand)
        ring.copy_(zx[:, :4, w.e : -w.heads])
        engine.pos.fill_(5)

        def results(
            w=w, engine=engine, zx=zx, xbc=xbc, y=y, h=h, ring=ring, state=state
        ) -> dict[str, Tensor]:
            step, mine, after = state.clone(), ring.clone(), state.clone()
            out = decode_core(w, zx[:, 0].contiguous(), mine, engine.pos, step, engine.u, engine.squares,
                              torch.empty_like(engine.mid[w.a8]))  # fmt: skip
            return dict(norm=norm_quant(h, 1e-5, w.s_u), scan=ssd_scan(w, zx, xbc, after), after=after,
                    ring=mine,
                        conv=conv_quant(zx, w.conv_weight, w.conv_bias, w.e, w.s_in, w.s_mid),
                        gate=gate_had_quant(w, y, zx), step=out, state=step)  # fmt: skip

        got = results()
        with lowbit.references(torch.float64):
            expected = results()
        for key, value in got.items():
            tolerance = (
                2.0 if value.dtype != torch.int8 and key in ("scan", "after") else 1.0
            )  # chained 16-bit products
            found[f"{recipe} {key}"] = off_by(value, expected[key].double()) / tolerance
    return found


# %%
def check_products(kind: str, speed: dict) -> dict[str, Any]:
    """Errors over tolerance of the products of one kind at the measured shapes."""
    odd = set() if speed["tiny"] else {5, 1000}
    rows = sorted({min(r, 1024) for r in speed["rows"]} | odd)
    found = linear_errors(kind, linear_shapes(bench_config(speed)), rows, speed, run.device)
    return {"errors": found, "worst": max(found.values())}


@torch.no_grad()
def check_engine(tokens: int, steps: int) -> dict[str, float]:
    """Largest difference of logits over the largest logit, kernels against references, small real model."""
    model, found = trained_lm("small", {}, {}, 0, "cpu"), {}
    ids = sample(256, "test", 2, tokens, seed=3).to(run.device)
    for recipe in ("w8a8", "w4a8", "w4a16"):
        with lowbit.references():
            made = quantize(model, recipe, sample(256, "validation", 4, 64)).to(run.device)
        for batch in (1, 2):
            logits = []
            for plain in (False, True):
                with lowbit.references() if plain else contextlib.nullcontext():
                    engine = Engine(made, batch)
                    parts = [engine.prefill(ids[:batch, :-steps]).float().clone()]
                    for t in range(tokens - steps, tokens):
                        engine.ids.copy_(ids[:batch, t])
                        parts.append(engine.step().float().clone())
                logits.append(torch.stack(parts))
            gap = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
            found[f"{recipe}, {batch} rows"] = gap.item()
    return found


# %%
def check_layers(speed: dict) -> dict[str, Any]:
    """Errors over tolerance of the other kernels; what compute-sanitizer says of all at small odd shapes."""
    found = {}
    for b, length in ((1, 40), (3, 200)):
        found |= {f"{k} {b}": v for k, v in layer_errors(bench_config(speed), b, length, run.device).items()}
    return {
        "errors": found,
        "worst": max(found.values()),
        "engine": check_engine(*(12, 3) if speed["tiny"] else (40, 8)),
    }


# %%
def row_call(
    kind: str, name: str, x: Tensor, w: Tensor, sg: Any, scale: Tensor, plan: Any, out: Tensor
) -> Tensor:
    """`one_call`, also with the plans of `readrun.onerow`."""
    if plan[0] != "row":
        return one_call(kind, name, x, w, sg, scale, plan, out)
    eps = 1e-5 if kind.endswith("a16") and name != "out_proj" else None
    return onerow.row_linear(kind, x, w, sg, scale, out, plan, name == "out_proj", eps)


# %%
@torch.no_grad()
def row_errors(kind: str, shapes: dict, device: str) -> dict[str, float]:
    """`linear_errors` of the plans of `readrun.onerow`; here a plan that does not run is an error of 1e9."""
    found = {}
    for name, (n, k) in shapes.items():
        w, sg, scale = make_weights(kind, n, k, device)
        x = make_input(kind, 1, k, device, name != "out_proj")
        eps = 1e-5 if kind.endswith("a16") and name != "out_proj" else None
        expected = reference_linear(kind, x, w, sg, scale, eps)
        exact = reference_linear(kind, x, w, sg, torch.ones_like(scale), None) if kind[-2:] == "a8" else None
        for plan in onerow.ROW_PLANS[kind]:
            key = f"{kind} {name} 1 {plan}"
            try:
                out = out_of(kind, name, 1, n, device)
                found[key] = off_by(row_call(kind, name, x, w, sg, scale, plan, out), expected)
                if exact is not None:
                    sums = torch.zeros(1, n, dtype=torch.int32, device=device)
                    gap = onerow.row_linear(kind, x, w, sg, scale, sums, plan).double() - exact
                    found[key + " sums"] = gap.abs().max().item() * 1e3
            except Exception as error:
                print(f"{key}: {str(error)[:160]}")
                found[key] = 1e9
    return found


# %%
def check_rows(speed: dict) -> dict[str, Any]:
    """Errors over tolerance of the second attempt at products of one row, at the measured shapes."""
    found: dict[str, float] = {}
    if not speed["tiny"]:
        shapes = linear_shapes(bench_config(speed))
        for kind in onerow.ROW_PLANS:
            found |= row_errors(kind, shapes, run.device)
    return {"errors": found, "worst": max(found.values(), default=0.0)}


# %%
@torch.no_grad()
def early_start(steps: int = 40) -> str:
    """Whether kernels that start early change a bit (graphs of four layers of 8B): "", or what differs."""
    config = bench_config(dict(tiny=False))
    config.num_hidden_layers, config.vocab_size = 4, 4096
    for kind in ("w16a16", "w8a8", "w4a8", "w4a16"):
        model = random_quantized(config, kind, "cuda")
        plans = {f"{kind}/1/{name}": onerow.ROW_PLANS[kind][0] for name in linear_shapes(config)}
        pair = [Engine(model, 1, plans=plans, pdl=pdl) for pdl in (False, True)]
        for _ in range(steps):
            for engine in pair:
                engine.decode()
        if gap := engines_differ(*pair):
            return f"{kind}: {gap}"
    return ""


# %%
def engines_differ(a: Engine, b: Engine) -> str:
    """What of two engines is not equal bit by bit, or ""."""
    parts = dict(logits=(a.logits, b.logits), tokens=(a.ids, b.ids))
    parts |= {f"state {i}": pair for i, pair in enumerate(zip(a.states, b.states, strict=True))}
    return ", ".join(name for name, (x, y) in parts.items() if not torch.equal(x, y))[:80]


# %%
def check_early() -> dict[str, Any]:
    """{same, why}: `early_start` in a process of its own, since a fault on a GPU ends its process."""
    if run.device != "cuda":
        return {"same": False, "why": "not run: no GPU"}
    code = "import readrun; print('differs:', readrun.chapter('quamba2').early_start())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    except subprocess.TimeoutExpired:
        return {"same": False, "why": "not finished in 200 s"}
    last = (done.stdout.splitlines() or [""])[-1]
    same = done.returncode == 0 and last.strip() == "differs:"
    return {"same": same, "why": "" if same else (last if done.returncode == 0 else done.stderr[-300:])}


# %%
def check_memory() -> dict[str, Any]:
    """What compute-sanitizer says of all kernels at small odd shapes: errors (None: why)."""
    code = (
        "import readrun; q = readrun.chapter('quamba2'); few = dict(tiny=False, plans=2)\n"
        "shapes = dict(in_proj=(88, 256), out_proj=(72, 384))\n"
        "found = q.layer_errors(q.bench_config(dict(tiny=True)), 2, 21, 'cuda')\n"
        "for kind in ('w4a16', 'w4a8', 'w8a8', 'w16a16'):\n"
        "    found |= q.linear_errors(kind, shapes, [1, 5, 80], few, 'cuda')\n"
        "    found |= q.row_errors(kind, shapes, 'cuda')\n"
        "assert max(found.values()) < 1e9, found"  # what does not run is not checked either
    )
    return sanitizer.sanitize(code, run.device, 300)


# %% [markdown]
# Single products: every plan, on weights that rotate past the L2 cache, many calls in one CUDA graph so that
# launching costs nothing; beside torch's own int4 product, cuBLAS in bf16, `torch._int_mm` and fp8.


# %%
def graph_ms(calls: Sequence[Callable], speed: dict, least: int = 12) -> float:
    """Milliseconds per call, calls taken in turn."""
    if run.device != "cuda":
        turn = clock.time(lambda: [c() for c in calls], warmup=1, repeat=3, device="cpu")
        return turn.median_ms / len(calls)
    rounds = max(1, least // len(calls))
    replay = captured(lambda: [c() for _ in range(rounds) for c in calls], 1)
    return clock.time(replay, warmup=3, repeat=15, device="cuda").median_ms / (rounds * len(calls))


def peers_of(kind: str, rows: int, n: int, k: int, speed: dict) -> dict[str, float]:
    """Milliseconds of the libraries' products of this shape; what does not run is left out."""
    found, device = {}, run.device
    half = torch.bfloat16 if device == "cuda" else torch.float32
    makers: dict[str, Callable] = {}
    x = torch.randn(rows, k, device=device).to(half)
    if kind == "w16a16":
        makers["cuBLAS"] = lambda w: functools.partial(F.linear, x, w)
        source = torch.randn(n, k, device=device, dtype=half)
        if rows > 64 and device == "cuda":
            x8, one = x.to(torch.float8_e4m3fn), torch.ones((), device=device)
            makers["fp8"] = lambda w: functools.partial(
                torch._scaled_mm, x8, w.to(x8.dtype).T, one, one, out_dtype=half
            )
    elif kind == "w4a16" and device == "cuda" and rows <= 64:
        source = torch.randint(256, (n, k // 2), device=device, dtype=torch.uint8)
        zeros = torch.rand(k // 128, n, 2, device=device, dtype=half)
        makers["int4pack"] = lambda w: functools.partial(
            torch._weight_int4pack_mm, x, torch._convert_weight_to_int4pack(w, 8), 128, zeros
        )
    else:
        return found
    for name, make in makers.items():
        try:
            copies = clock.rotate(source)[: None if rows <= 64 else 2]
            found[name] = graph_ms([make(w) for (w,) in copies], speed, 40 if rows <= 64 else 4)
        except Exception as error:
            print(f"{name} {rows} x {n} x {k}: {str(error)[:160]}")
    return found


# %%
def row_plans(kind: str, rows: int, speed: dict) -> list[tuple]:
    """Plans of the second attempt, which is for one row."""
    return onerow.ROW_PLANS[kind] if rows == 1 and not speed["tiny"] else []


def least_of(times: dict[tuple, tuple]) -> dict[str, list]:
    """The best plan of the first attempt and of the second ("rows"), from {plan: (ms, …)}."""
    found = {}
    for way, own in (("first", False), ("rows", True)):
        some = [(ms, plan) for plan, (ms, _) in times.items() if (plan[0] == "row") == own]
        found |= {way: list(min(some)[1])} if some else {}
    return found


# %%
@torch.no_grad()
def tune_linear(rows: int, speed: dict) -> dict[str, Any]:
    """Milliseconds of every plan for the three products at so many rows; the best plan of each; peers.

    least: of one row, the best plans of each attempt, {"first" | "rows": {key: plan}}.
    """
    shapes, calls_in_graph = (
        linear_shapes(bench_config(speed)),
        40 if rows <= 64 else 12 if rows < 8000 else 4,
    )
    table, best, peers, least = {}, {}, {}, {"first": {}, "rows": {}}
    names = {n: s for n, s in shapes.items() if rows <= 64 or n != "lm_head"}
    names = names if rows < 8000 else {"in_proj": shapes["in_proj"]}
    for name, (n, k) in names.items():
        for kind in ("w4a16", "w4a8", "w8a8", "w16a16"):
            peers |= {f"{p}/{name}": ms for p, ms in peers_of(kind, rows, n, k, speed).items()}
            w, sg, scale = make_weights(kind, n, k, run.device)
            copies = clock.rotate(w)[: None if rows <= 64 else 2]
            x = make_input(kind, rows, k, run.device, rows == 1 and name != "out_proj")
            eps = 1e-5 if kind.endswith("a16") and rows == 1 and name != "out_proj" else None
            expected, times = reference_linear(kind, x, w, sg, scale, eps), {}
            for plan in plans_of(kind, rows, speed) + row_plans(kind, rows, speed):
                out = out_of(kind, name, rows, n, run.device)
                calls = [
                    functools.partial(row_call, kind, name, x, one, sg, scale, plan, out) for (one,) in copies
                ]
                try:
                    if off_by(calls[0](), expected) <= 1:  # a wrong plan is not timed
                        times[plan] = graph_ms(calls, speed, calls_in_graph), calls
                except Exception as error:
                    print(f"{kind} {name} {rows} {plan}: {str(error)[:160]}")
            table |= {f"{kind}/{name}/{plan}": ms for plan, (ms, _) in times.items()}
            if times:
                _, chosen = min((ms, plan) for plan, (ms, _) in times.items())
                again = graph_ms(times[chosen][1], speed, calls_in_graph)  # anew: the least of many flatters
                key = f"{kind}/{rows_key(rows)}/{name}"
                best[key] = [list(chosen), again]
                for way, plan in least_of(times).items() if rows == 1 else ():
                    least[way][key] = plan
            times.clear()
            del w, sg, copies
    kind_of = torch.bfloat16 if run.device == "cuda" else torch.float32
    return {"table": table, "best": best, "least": least, "peers": peers} | clock.ceilings(
        run.device, kind_of
    )


# %%
def plans_from(tuned: Any, way: str = "") -> dict[str, tuple]:
    """What `Engine` wants, from tuning units {rows: unit}: the best plans, of one row those of `way`.

    On a CPU nothing. Raises RuntimeError for a unit that has no result.
    """
    if missing := [f"tune_linear/rows={r}" for r, unit in tuned.items() if not unit.done]:
        raise RuntimeError(f"not run: {', '.join(missing)} has no result yet, and its plans are needed")
    found = {}
    for unit in tuned.values() if run.device == "cuda" else ():
        found |= {k: p for k, (p, _) in unit["best"].items()} | unit["least"].get(way, {})
    return {k: (p[0], tuple(p[1]), p[2], p[3]) for k, p in found.items()}


# %%
def take_turns(calls: dict[str, Callable], repeats: int, warmup: int) -> dict[str, np.ndarray]:
    """Milliseconds of each call, all of them once per round, after `warmup` rounds."""
    out: dict[str, list] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            if run.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(), call(), end.record()
                out[name] += [(start, end)] if i >= warmup else []
            else:
                began = time.perf_counter()
                call()
                out[name] += [1e3 * (time.perf_counter() - began)] if i >= warmup else []
    if run.device == "cuda":
        torch.cuda.synchronize()
        return {name: np.array([a.elapsed_time(b) for a, b in marks]) for name, marks in out.items()}
    return {name: np.array(values) for name, values in out.items()}


def bench_models(speed: dict) -> dict[str, Mamba2ForCausalLM]:
    """The bf16 baseline and the three recipes, with random weights."""
    if run.device != "cuda" and not speed["tiny"]:
        raise ValueError(
            "device: 8B dimensions are measured on a GPU; on a CPU only speed['tiny'] is accepted"
        )
    names = {"bf16": "w16a16", "w4a8": "w4a8", "w4a16": "w4a16", "w8a8": "w8a8"}
    return {name: random_quantized(bench_config(speed), recipe, run.device) for name, recipe in names.items()}


# %%
WAYS = {"first": {}, "rows": {}, "pdl": dict(pdl=True)}  # of decoding one sequence: options of `Engine`


def try_ways(
    models: dict, tuned: Any, early: bool
) -> tuple[dict[str, Engine], dict[str, float], dict[str, str]]:
    """Engines of one sequence, for every model its fastest way; ms of all; what did not run or was not exact.

    first: the first kernels. rows: those of `readrun.onerow`. pdl: the same, started early, which must not
    change a bit of logits and states (tried only if `early`).
    """
    best, ms, errors = {}, {}, {}
    for name, model in models.items():
        found: dict[str, Engine] = {}
        for way in ("first",) if run.device != "cuda" else [w for w in WAYS if early or w != "pdl"]:
            try:
                plans = plans_from(tuned, "first" if way == "first" else "rows")
                engine = Engine(model, 1, plans=plans, **WAYS[way])
                for _ in range(16):
                    engine.decode()
                if way == "pdl" and (gap := engines_differ(engine, found["rows"])):
                    raise RuntimeError(f"not the same bits: {gap}")
                found[way] = engine
            except Exception as error:
                if way == "first":
                    raise
                errors[f"{name}/{way}"] = str(error)[:200]
        calls = {way: e.graph if run.device == "cuda" else e.step for way, e in found.items()}
        ms |= {f"{name}/{k}": float(np.median(v)) for k, v in take_turns(calls, 15, 5).items()}
        best[name] = found[min(found, key=lambda way: ms[f"{name}/{way}"])]
    return best, ms, errors


# %%
@torch.no_grad()
def bench_decode(speed: dict, tuned: Any, early: Any) -> dict[str, Any]:
    """Milliseconds per token of every recipe at every batch: "ms__<recipe>__<batch>"; bytes of the models.

    One sequence in each way: "ways" {"<recipe>/<way>": ms}. The fastest is chosen, then measured anew.
    """
    plans = plans_from(tuned)
    models, found = bench_models(speed), {}
    config = bench_config(speed)
    sizes = {name: measured_bytes(model) for name, model in models.items()}
    ways, errors = {}, {}
    for batch in speed["batches"]:
        calls, engines = {}, {}
        if batch == 1:
            single, ways, errors = try_ways(models, tuned, early["same"])
        for name, model in models.items():
            for wide_state in (False, True) if name == "w4a8" and batch == speed["batches"][-1] else (False,):
                key = f"{name}__{batch}" + "__wide" * wide_state
                try:
                    engine = single[name] if batch == 1 and not wide_state else Engine(
                        model, batch, wide_state=wide_state, plans=plans
                    )  # fmt: skip
                    engine.decode()
                    engines[key], calls[key] = engine, engine.graph if run.device == "cuda" else engine.step
                except Exception as error:
                    if batch == 1:
                        raise
                    errors[key] = str(error)[:200]
                    engine = None
        found |= {f"ms__{k}": v for k, v in take_turns(calls, speed["repeats"], speed["warmup"]).items()}
        single = engine = None
        calls.clear(), engines.clear()  # graphs and states, before those of the next batch
    counted = model_bytes(config, "w4a8")["total"]
    return (
        found
        | {"bytes": sizes, "counted": counted, "errors": errors, "ways": ways}
        | clock.ceilings(run.device, torch.bfloat16 if run.device == "cuda" else torch.float32)
    )


# %%
@torch.no_grad()
def bench_prefill(speed: dict, tuned: Any) -> dict[str, Any]:
    """Milliseconds to read a prompt, "ms__<recipe>__<length>x<batch>", each one CUDA graph."""
    plans = plans_from(tuned)
    models, found, errors = bench_models(speed), {}, {}
    for i, (batch, length) in enumerate(speed["prompts"]):
        ids, calls = torch.randint(bench_config(speed).vocab_size, (batch, length), device=run.device), {}
        engines = []  # a graph writes into the states of its engine
        for name, model in models.items():
            try:
                engines.append(Engine(model, batch, plans=plans))
                call = functools.partial(engines[-1].prefill, ids)
                calls[f"{name}__{length}x{batch}"] = captured(call, 2) if run.device == "cuda" else call
            except Exception as error:
                if length == 1024 and batch == 1:
                    raise
                errors[f"{name}__{length}x{batch}"] = str(error)[:200]
        repeats = max(3, speed["repeats"] // (3 if i < 3 else 10))  # the first three decide claims
        found |= {f"ms__{k}": v for k, v in take_turns(calls, repeats, 2).items()}
        del calls, engines
    return found | {"errors": errors}


# %%
@torch.no_grad()
def bench_parts(speed: dict, length: int) -> dict[str, Any]:
    """Milliseconds of the kernels around the products (bf16, int8) and of a copy of their input."""
    config, found = bench_config(speed), {}
    config.num_hidden_layers, config.vocab_size = 1, 64
    for name, recipe in (("bf16", "w16a16"), ("int8", "w4a8")):
        engine = Engine(random_quantized(config, recipe, run.device), 1)
        w = engine.layers[0]
        zx = (
            torch.randn(1, length, engine.zx[w.a8].shape[1], device=run.device)
            .mul(40)
            .to(engine.zx[w.a8].dtype)
        )
        xbc = conv_quant(zx, w.conv_weight, w.conv_bias, w.e, w.s_in, w.s_mid)
        y, h = (
            ssd_scan(w, zx, xbc, engine.states[0]),
            torch.randn(length, config.hidden_size, device=run.device),
        )
        one, target = zx[:, 0].contiguous(), torch.empty_like(y)
        calls: dict[str, Callable] = {
            "norm": lambda w=w, h=h: norm_quant(h, 1e-5, w.s_u),
            "conv": lambda w=w, zx=zx: conv_quant(zx, w.conv_weight, w.conv_bias, w.e, w.s_in, w.s_mid),
            "scan": lambda w=w, zx=zx, xbc=xbc, s=engine.states[0]: ssd_scan(w, zx, xbc, s),
            "gate": lambda w=w, y=y, zx=zx: gate_had_quant(w, y, zx),
            "copy": lambda y=y, target=target: target.copy_(y),
            "step": lambda w=w, g=engine, one=one: decode_core(w, one, g.rings[0], g.pos, g.states[0],
                                                               g.u, g.squares, g.mid[w.a8]),
        }  # fmt: skip
        found |= {f"{name}/{key}": graph_ms([call], speed) for key, call in calls.items()}
    return {"ms": found}


# %%
tries = attempts.Attempts(run)  # what fails on some machine does not end the rest
checked = {
    kind: tries.unit(check_products, kind=kind, speed=S.speed) for kind in ("w4a16", "w4a8", "w8a8", "w16a16")
}
checked["layers"] = tries.unit(check_layers, speed=S.speed)
checked["rows"] = tries.unit(check_rows, speed=S.speed)
early = tries.unit(check_early)
memory = tries.unit(check_memory)
tuned = {str(rows): tries.unit(tune_linear, rows=rows, speed=S.speed) for rows in S.speed["rows"][:2]}
timed = tries.unit(bench_decode, speed=S.speed, tuned=dict(tuned), early=early)
tuned |= {str(rows): tries.unit(tune_linear, rows=rows, speed=S.speed) for rows in S.speed["rows"][2:3]}
prefilled = tries.unit(bench_prefill, speed=S.speed, tuned=dict(tuned))
tuned |= {str(rows): tries.unit(tune_linear, rows=rows, speed=S.speed) for rows in S.speed["rows"][3:]}
parts = tries.unit(bench_parts, speed=S.speed, length=32 if S.speed["tiny"] else 1024)
tries.check()
if all(unit.done for unit in checked.values()) and memory.done:
    print(f"{sum(len(unit['errors']) for unit in checked.values())} comparisons, worst error over tolerance "
          f"{max(unit['worst'] for unit in checked.values()):.3f}; compute-sanitizer: "
          f"{memory['why'] or str(memory['errors']) + ' errors'}")  # fmt: skip
    print(
        "engine, kernels against references:", {k: f"{v:.1e}" for k, v in checked["layers"]["engine"].items()}
    )
if early.done and not early["same"]:
    print("kernels do not start early:", early["why"])
for unit in (timed, prefilled):
    if unit.done and unit["errors"]:
        print("did not run:", unit["errors"])


# %% [markdown]
# ### Results of this run
#
# All measurements in one place, with the verdicts that follow from them. Two metrics are derived.


# %%
def nll_increase(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """Mean NLL of every variant minus that of the float model, one value per seed (nat per token)."""
    per_seed = [found for k, found in sorted(metrics.items()) if k[:4] == "nll_" and k[4:].isdigit()]
    base = [float(np.mean(found["float"])) for found in per_seed]
    arms = dict.fromkeys(arm for found in per_seed for arm in found if arm != "float")
    return {arm: [float(np.mean(f[arm])) - b for f, b in zip(per_seed, base, strict=True) if arm in f]
            for arm in arms}  # fmt: skip


def memory_ratio(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """Bytes of FP16 over bytes of W4A8 for both sizes; of the 8B states, 16 bits over int8."""
    found = {}
    for name, fields in CONFIGS.items():
        whole, small = (model_bytes(Mamba2Config(**COMMON | fields), r) for r in ("w16a16", "w4a8"))
        found[name] = [whole["total"] / small["total"]]
        found[f"state_{name}"] = [whole["state"] / small["state"]]
    return found


# %% tags=["hide-input"]
def gather_quality(metrics: dict, arrays: dict) -> None:
    """C1 to C3 from the scoring units."""
    for i, (s, unit) in enumerate(scored.items(), 1):
        if not unit.done:
            continue
        metrics[f"nll_{i}"] = {k[5:]: unit[k].tolist() for k in unit if k.startswith("nll__")}
        gain = unit["unigram"] - float(np.mean(unit["nll__float"]))
        metrics.setdefault("lm_gain", {}).setdefault("float", []).append(gain)
        for arm, (rank, share) in unit["order"].items():
            metrics.setdefault("order_spearman", {}).setdefault(arm, {})[s] = rank
            metrics.setdefault("order_jaccard", {}).setdefault(arm, {})[s] = share
        for key in (k for k in unit if k.startswith("sqnr__")):
            _, tensor, layout = key.split("__")
            metrics.setdefault(f"sqnr_{tensor}", {}).setdefault(layout, []).extend(unit[key].tolist())
        for key in (k for k in unit if k.startswith(("stress", "steps__"))):
            name, arm = key.split("__")
            name = "nll_steps" if name == "steps" else f"nll_{name}"
            metrics.setdefault(name, {})[arm] = unit[key].tolist()
        if "stats" in unit:
            arrays |= {f"layer/{k}": unit[k] for k in ("stats", "x", "idx_c", "sizes", "head_sizes", "shape")}


# %% tags=["hide-input"]
def gather_memory(metrics: dict, arrays: dict) -> None:
    """C4: exact counts, and the buffers on the device."""
    wrong = 0
    for name, fields in CONFIGS.items():
        for recipe, mib in zip(("w16a16", "w8a8", "w4a8"), PAPER_MIB[name], strict=True):
            made = model_bytes(Mamba2Config(**COMMON | fields), recipe)
            wrong += round(made["total"] / 2**20) != mib
            arrays[f"memory/{name}/{recipe}"] = np.array(
                [made[k] for k in ("embedding", "linear", "head", "other")]
            )
    metrics["mib_wrong"] = {"analytic": [wrong]}
    if timed.done and not S.speed["tiny"]:
        metrics["memory_mismatch"] = {"w4a8": [abs(timed["bytes"]["w4a8"] / timed["counted"] - 1)]}


# %% tags=["hide-input"]
def gather_decode(metrics: dict, arrays: dict) -> None:
    """C5: milliseconds per token, the baseline's bandwidth, kernels against limits and peers."""
    real_shapes = not S.speed["tiny"]  # a CPU's times of a tiny model decide nothing
    if all(unit.done for unit in checked.values()) and real_shapes:
        metrics["kernel_error"] = {"worst": [max(unit["worst"] for unit in checked.values())]}
        if memory.done and memory["errors"] is not None:
            metrics["kernel_error"]["sanitizer"] = [memory["errors"]]
    if timed.done:
        ms = {k[4:]: timed[k] for k in timed if k.startswith("ms__")}
        arrays |= {f"decode/{k}": v for k, v in ms.items()}
        first = {k[:-3]: v for k, v in ms.items() if k.endswith("__1")}
        best = min(("w4a8", "w4a16"), key=lambda k: np.median(first[k]))
        arrays["decode/best"] = np.array(best)
        arrays["decode/copy_gb_s"] = np.array(timed["copy_gb_s"])
        arrays["ways/what"], arrays["ways/ms"] = (
            np.array(list(f())) for f in (timed["ways"].keys, timed["ways"].values)
        )
    if timed.done and real_shapes:
        metrics["tpot_ms"] = {k: v.tolist() for k, v in first.items()} | {"best_w4": first[best].tolist()}
        counted = model_bytes(bench_config(S.speed))
        read = counted["total"] - counted["embedding"]  # a token reads one row of it
        rate = 1e-6 * read / float(np.median(first["bf16"]))
        metrics["baseline_share"] = {"bf16": [rate / timed["copy_gb_s"]]}
        last = S.speed["batches"][-1]
        if f"w4a8__{last}" in ms and f"w4a8__{last}__wide" in ms:
            metrics["batch_ms"] = {"int8_state": ms[f"w4a8__{last}"].tolist(),
                                   "wide_state": ms[f"w4a8__{last}__wide"].tolist()}  # fmt: skip
    if (one := tuned[str(S.speed["rows"][0])]).done and real_shapes:
        shapes = linear_shapes(bench_config(S.speed))
        for name, (n, k) in shapes.items():
            ms = one["best"][f"w4a16/1/{name}"][1]
            share = 1e-6 * (n * k / 2 + n * k / 64) / ms / one["copy_gb_s"]
            metrics.setdefault("gemv_share", {})[name] = [share]
            if f"int4pack/{name}" in one["peers"]:
                metrics.setdefault("gemv_peer", {})[name] = [one["peers"][f"int4pack/{name}"] / ms]


# %% tags=["hide-input"]
def gather_prefill(metrics: dict, arrays: dict) -> None:
    """C6: milliseconds to the first token, products of many rows, the fused Hadamard."""
    if prefilled.done:
        for key in (k for k in prefilled if k.startswith("ms__")):
            _, name, shape = key.split("__")
            if not S.speed["tiny"]:
                metrics.setdefault(f"ttft_{shape}", {})[name] = prefilled[key].tolist()
            arrays[f"prefill/{name}/{shape}"] = prefilled[key]
    for rows in S.speed["rows"]:
        unit = tuned[str(rows)]
        if not unit.done:
            continue
        arrays[f"tuned/{rows}/what"] = np.array(list(unit["table"]))
        arrays[f"tuned/{rows}/ms"] = np.array(list(unit["table"].values()))
        arrays[f"peers/{rows}/what"] = np.array(list(unit["peers"]) or ["none"])
        arrays[f"peers/{rows}/ms"] = np.array(list(unit["peers"].values()) or [0.0])
        arrays[f"limits/{rows}"] = np.array([unit["copy_gb_s"], unit["matmul_tflop_s"]])
        if rows > 64 and not S.speed["tiny"] and "cuBLAS/in_proj" in unit["peers"]:
            speedup = unit["peers"]["cuBLAS/in_proj"] / unit["best"]["w8a8/many/in_proj"][1]
            metrics.setdefault("gemm_speedup", {})[f"m{rows}"] = [speedup]
    if parts.done:
        arrays["parts/what"], arrays["parts/ms"] = (
            np.array(list(f())) for f in (parts["ms"].keys, parts["ms"].values)
        )
        if not S.speed["tiny"]:
            metrics["hadamard_over_copy"] = {"m1024": [parts["ms"]["int8/gate"] / parts["ms"]["int8/copy"]]}


# %%
metrics: dict[str, dict] = {}
arrays: dict[str, np.ndarray] = {}
for gather in (gather_quality, gather_memory, gather_decode, gather_prefill):
    gather(metrics, arrays)
here = run.results(metrics=metrics, arrays=arrays)
book = run.recorded()


# %% tags=["figure", "hide-input"]
def draw_heat(results, reordered: bool = True):
    """|x_c| of one layer for prose and code, before and after reordering, cluster borders drawn."""
    rows = 2 if reordered else 1
    figure, axes = plt.subplots(rows, 2, figsize=(8.4, 2.6 * rows), squeeze=False)
    if "layer/stats" not in results.arrays:
        axes[0, 0].text(0.1, 0.5, "not measured in this run")
        plots.label(axes[0, 0], "channel", "head")
        return figure
    stats, shape = results.arrays["layer/stats"].astype(float), results.arrays["layer/shape"]
    groups, heads, p = (int(v) for v in shape)
    ends = [np.log10(np.maximum(stats, 1e-4)).min(), np.log10(stats.max())]
    for j, name in enumerate(("prose", "code")):
        for i in range(rows):
            ax = axes[i, j]
            values = stats[j][results.arrays["layer/idx_c"]] if i else stats[j]
            shown_values = np.log10(np.maximum(values, 1e-4)).reshape(heads, p)
            image = ax.imshow(shown_values, cmap="cividis", vmin=ends[0], vmax=ends[1], aspect="auto")
            ax.grid(False)
            plots.label(
                ax,
                "channel of the head" if i == rows - 1 else " ",
                "head",
                f"{name}, {'reordered' if i else 'as trained'}",
            )
            if i:
                top = 0
                for sizes, counts in zip(
                    results.arrays["layer/sizes"].reshape(-1, 4),
                    results.arrays["layer/head_sizes"].ravel(),
                    strict=True,
                ):  # noqa: E501
                    for x in np.cumsum(sizes)[:-1]:
                        ax.plot([x - 0.5] * 2, [top - 0.5, top + counts - 0.5], color="white", linewidth=1.5)
                    top += int(counts)
                    if top < heads:
                        ax.axhline(top - 0.5, color="white", linewidth=1.5)
    figure.colorbar(image, ax=axes, label="log10 of the statistic")
    return figure


# %% tags=["figure", "hide-input"]
HEAT_ALT = (
    "Heads by channels, coloured by size, for prose and code. As trained, bright channels stand "
    "anywhere, in the same "
    "places for prose and code. Reordered, brightness rises to the right within rectangles bounded by "
    "white lines."
)
plots.show(draw_heat(here), alt=HEAT_ALT, caption=f"A middle layer's channels of x, profile {here.profile}.")


# %% tags=["figure", "hide-input"]
def draw_sqnr(results):
    """SQNR per layer for the layouts of scales, and the NLL increase of every variant."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6))
    found = results.metrics.get("sqnr_x", {})
    for name, style in plots.arms(
        ["sort_cluster", "per_tensor", "random_16", "contiguous_16", "per_head", "per_channel"]
    ).items():  # noqa: E501
        if name in found:
            axes[0].plot(np.arange(len(found[name])), found[name], label=name, **style)
    axes[0].legend(fontsize=7, ncols=2)
    plots.label(axes[0], "layer (seeds one after another)", "SQNR of x (dB)")
    table = results.metrics.get("nll_1", {})
    base = np.array(table.get("float", [0.0]))
    arms = [k for k in table if k != "float"]
    gaps = [np.array(table[k]) - base for k in arms]
    colours = [plots.PALETTE[0 if k.startswith("quamba2") else 1 if k == "naive_w4a8" else 6] for k in arms]
    axes[1].barh(range(len(arms)), [g.mean() for g in gaps], color=colours,
                 xerr=[1.96 * g.std(ddof=1) / math.sqrt(len(g)) for g in gaps])  # fmt: skip
    axes[1].set_yticks(range(len(arms)), arms, fontsize=8)
    axes[1].invert_yaxis()
    plots.label(axes[1], "NLL increase (nat per token)", "variant")
    return figure


SQNR_ALT = (
    "Left: signal-to-quantisation-noise ratio per layer, one line per layout of scales. Right: increase "
    "of the negative "
    "log-likelihood of every variant over the float model, with intervals."
)
plots.show(draw_sqnr(here), alt=SQNR_ALT, caption=f"First seed at the right. Profile {here.profile}.")


# %% tags=["hide-input"]
def quality_rows(results) -> list[dict]:
    """NLL of the first seed and the increase by variant; SQNR by layout."""
    table, rows = results.metrics.get("nll_1", {}), []
    for name, values in table.items():
        gap = np.array(values) - np.array(table["float"])
        rows.append({"variant": name, "NLL (nat)": float(np.mean(values)), "increase": float(gap.mean()),
                     "standard error": float(gap.std(ddof=1) / math.sqrt(len(gap)))})  # fmt: skip
    for bits in (4, 6):
        for name, values in results.metrics.get(f"nll_stress{bits}", {}).items():
            gap = np.array(values) - np.array(table["float"])
            rows.append({"variant": f"x, B, C at {bits} bits, {name}", "NLL (nat)": float(np.mean(values)),
                         "increase": float(gap.mean())})  # fmt: skip
    return rows or [{"variant": "not measured"}]


def layout_rows(results) -> list[dict]:
    """Mean SQNR by layout, and correlations of the channel order."""
    rows = [{"what": f"SQNR of {k[-1]}, {name} (dB)", "value": float(np.mean(v))}
            for k in ("sqnr_x", "sqnr_b", "sqnr_c") for name, v in results.metrics.get(k,
                    {}).items()]  # fmt: skip
    rows += [{"what": f"{k[6:]} of the order, {arm}", "value": float(np.mean(v))}
             for k in ("order_spearman", "order_jaccard") for arm, v in results.metrics.get(k, {}).items()
             if (k, arm) != ("order_jaccard", "tokens")]  # fmt: skip
    return rows or [{"what": "not measured"}]


tables.grid(quality_rows(here), caption=f"First seed, profile {here.profile}.")

# %% tags=["hide-input"]
tables.grid(layout_rows(here), caption="Means over layers and seeds; correlations are medians over layers.")

# %% [markdown]
# What is it in W4A8 that costs likelihood: the weights, the activations, or their scales? Differences of
# two variants on the same sequences, with standard errors; where one does not exceed two of them, this model
# at this width cannot tell, and the stress widths above are where to look.

# %% tags=["hide-input"]
PAIRS = {
    "four-bit instead of eight-bit weights": ("quamba2_w4a8", "quamba2_w8a8"),
    "int8 instead of 16-bit activations": ("quamba2_w4a8", "quamba2_w4a16"),
    "one scale for x instead of sort-and-cluster": ("no_sort", "quamba2_w4a8"),
    "one scale for B and C instead of one per group": ("no_state_group", "quamba2_w4a8"),
}
table = here.metrics.get("nll_1", {})
gaps = {what: np.subtract(*(table[k] for k in pair)) for what, pair in PAIRS.items() if {*pair} <= {*table}}
tables.grid(
    [{"change": what, "costs (nat)": float(gap.mean()),
      "standard error": float(gap.std(ddof=1) / math.sqrt(len(gap)))} for what, gap in gaps.items()]
    or [{"change": "not measured in this profile"}],
    caption=f"First seed, profile {here.profile}.",
)  # fmt: skip

# %% [markdown]
# ## GPU experiment

# %% tags=["hide-input"]
tables.provenance(book) if book else print(
    "The GPU run is not recorded yet; below is what this machine measured."
)

# %% tags=["figure", "hide-input"]
shown = book or here
if book:
    plots.show(draw_heat(shown), alt=f"Recorded run. {HEAT_ALT}", caption=f"Profile {shown.profile}.")

# %% tags=["figure", "hide-input"]
if book:
    plots.show(draw_sqnr(shown), alt=f"Recorded run. {SQNR_ALT}", caption=f"Profile {shown.profile}.")


# %% tags=["figure", "hide-input"]
def draw_memory(results):
    """Bytes by part for both sizes and three recipes."""
    figure, ax = plt.subplots(figsize=(7.2, 3.0))
    names = [f"{size}/{recipe}" for size in CONFIGS for recipe in ("w16a16", "w8a8", "w4a8")]
    left = np.zeros(len(names))
    values = np.array([results.arrays[f"memory/{name}"] for name in names]) / 2**20
    for i, part in enumerate(("embedding", "linear", "head", "other")):
        ax.barh(range(len(names)), values[:, i], left=left, color=plots.PALETTE[i], label=part)
        left += values[:, i]
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.legend(fontsize=8)
    plots.label(ax, "size (MiB)", "model and recipe")
    return figure


plots.show(
    draw_memory(here),
    alt="Stacked bars of model size by embedding, linear layers, head and the rest: 8B and 2.7B at 16, "
    "8 and 4 bits.",
    caption="Counted, not measured: what four bits leave of each part.",
)


# %% tags=["figure", "hide-input"]
def draw_speed(results):
    """Milliseconds per token against batch, with the limit of reading the weights; prefill against length."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6))
    for name, style in plots.arms(["w4a8", "bf16", "w4a16", "w8a8"]).items():
        keys = [k for k in results.arrays if k.startswith(f"decode/{name}__") and not k.endswith("wide")]
        points = sorted((int(k.split("__")[1]), float(np.median(results.arrays[k]))) for k in keys)
        axes[0].plot(*zip(*points, strict=True), marker="o", label=name, **style) if points else None
        keys = [k for k in results.arrays if k.startswith(f"prefill/{name}/") and k.endswith("x1")]
        points = sorted((int(k.split("/")[2][:-2]), float(np.median(results.arrays[k]))) for k in keys)
        axes[1].plot(*zip(*points, strict=True), marker="o", label=name, **style) if points else None
        if results.profile == "gpu" and "decode/copy_gb_s" in results.arrays:
            size = model_bytes(Mamba2Config(**COMMON | CONFIGS["8b"]), "w16a16" if name == "bf16" else name)
            limit = 1e-6 * (size["total"] - size["embedding"]) / float(results.arrays["decode/copy_gb_s"])
            axes[0].axhline(limit, color=style["color"], linestyle=":", linewidth=1)
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    plots.label(axes[0], "sequences", "time per step (ms)", "decode; dotted: reading the weights once")
    plots.label(axes[1], "prompt (tokens)", "time (ms)", "prefill, one sequence")
    return figure


plots.show(
    draw_speed(shown),
    alt="Left: milliseconds per decoding step against batch for bf16 and three recipes, with dotted "
    "limits. Right: "
    "milliseconds of prefill against prompt length.",
    caption=f"Profile {shown.profile}; only the gpu profile has the dimensions of 8B.",
)


# %% tags=["hide-input"]
def speed_rows(results) -> list[dict]:
    """Achieved, limit, peer, ratio: decoding, prefill, single products, the fused gate."""
    rows, a = [], results.arrays
    gpu = results.profile == "gpu"
    config = Mamba2Config(**COMMON | (CONFIGS["8b"] if gpu else TINY))
    copy_rate = float(a["decode/copy_gb_s"]) if "decode/copy_gb_s" in a else None
    paper = {"w4a8": 22.73 / 7.43, "w4a16": 22.73 / 7.58, "w8a8": 22.73 / 12.61}
    for name in ("bf16", "w8a8", "w4a8", "w4a16"):
        if f"decode/{name}__1" in a:
            ms, base = (float(np.median(a[f"decode/{k}__1"])) for k in (name, "bf16"))
            size = model_bytes(config, "w16a16" if name == "bf16" else name)
            read = 1e-9 * (size["total"] - size["embedding"])
            rows.append(clock.row(f"decode {name}, batch 1", ms, "GB/s", work=read, limit=copy_rate)
                        | {"speed-up": base / ms, "paper": paper.get(name)})  # fmt: skip
    paper = {"w4a8": 197.8 / 140.78, "w4a16": 197.8 / 209.19, "w8a8": 197.8 / 122.33}
    for key in (k for k in a if k.startswith("prefill/") and not k.startswith("prefill/bf16")):
        _, name, shape = key.split("/")
        ms, base = float(np.median(a[key])), float(np.median(a[f"prefill/bf16/{shape}"]))
        rows.append({"name": f"prefill {name}, {shape}", "ms": ms, "speed-up": base / ms,
                     "paper": paper.get(name) if shape == "1024x1" else None})  # fmt: skip
    return rows or [{"name": "not measured"}]


tables.bench(speed_rows(shown), caption="Bytes of weights read per second; limit: the measured copy.")


# %% tags=["hide-input"]
def product_rows(results) -> list[dict]:
    """The best plan of every product beside the libraries, and how far the others are."""
    rows, a = [], results.arrays
    for key in sorted(
        (k for k in a if k.startswith("tuned/") and k.endswith("what")), key=lambda k: int(k.split("/")[1])
    ):  # noqa: E501
        count = key.split("/")[1]
        times = dict(zip(a[key].tolist(), a[f"tuned/{count}/ms"].tolist(), strict=True))
        peers = dict(zip(a[f"peers/{count}/what"].tolist(), a[f"peers/{count}/ms"].tolist(), strict=True))
        for group in dict.fromkeys("/".join(k.split("/")[:2]) for k in times):
            own = {k[len(group) + 1 :]: v for k, v in times.items() if k.startswith(group + "/")}
            best = min(own, key=own.get)
            name = group.split("/")[1]
            peer = peers.get(f"int4pack/{name}" if group.startswith("w4a16") else f"cuBLAS/{name}")
            rows.append({"product": f"{group}, {count} rows", "plan": best, "ms": own[best],
            "slowest plan": max(own.values()),
                         "peer (ms)": peer, "peer / ours": peer / own[best] if peer else None})  # fmt: skip
    return rows or [{"product": "not measured"}]


tables.grid(
    product_rows(shown), caption="Peer: torch's int4 product for w4a16 up to 64 rows, else cuBLAS in bf16."
)

# %% tags=["hide-input"]
tries_of: dict[str, dict] = {}
for key, ms in zip(shown.arrays.get("ways/what", []), shown.arrays.get("ways/ms", []), strict=True):
    name, way = str(key).split("/")
    tries_of.setdefault(name, {"decode, one sequence": name})[f"{way} (ms)"] = float(ms)
tables.grid(list(tries_of.values()) or [{"decode, one sequence": "not measured"}],
            caption="Three attempts. first: the first kernels; rows: the next weights are on their way; "
            "pdl: kernels start before the one in front ends. The fastest is measured anew.")  # fmt: skip

# %% tags=["hide-input"]
pairs = zip(shown.arrays.get("parts/what", []), shown.arrays.get("parts/ms", []), strict=True)
tables.grid([{"kernel": str(k), "ms": float(v)} for k, v in pairs] or [{"kernel": "not measured"}],
            caption="Around the products: one layer, prefill of one prompt; step: one token.")  # fmt: skip

# %% [markdown]
# The recorded verdicts beside those of this run:

# %% tags=["hide-input"]
tables.compare_runs(book, here)

# %% [markdown]
# ## Verdicts
#
# Computed by rules that were committed before any number. Intervals over sequences and layers are paired
# bootstraps, over seeds Student's t; over timing repeats they know nothing of another machine.

# %% tags=["hide-input"]
tables.verdicts(shown)

# %% [markdown]
# ## Play
#
# How many head groups and channel groups, how many bits? The picture shows one layer's channels in the order
# that the clustering finds, its borders, and the SQNR of $x$.


# %%
def layout_of(stats: np.ndarray, x: np.ndarray, shape: np.ndarray, groups: int, bits: int) -> tuple:
    """(plan, SQNR in dB) of x (tokens, e) with groups x groups scales per SSD group at so many bits."""
    n_groups, heads, p = (int(v) for v in shape)
    plan = sort_and_cluster(torch.from_numpy(stats.astype(np.float32)), n_groups, heads, p, groups, groups)
    v = torch.from_numpy(x.astype(np.float32))[:, plan.idx_c]
    scale = group_scale(v.abs().amax(0), plan.group_of()) * step_factor(bits)
    noise = v - quant(v, scale, bits).float() * scale
    return plan, float(10 * torch.log10(v.square().sum() / noise.square().sum()))


# %% tags=["widget", "hide-input"]
def draw_layout(groups: int, bits: int):
    """One layer's reordered channels with the borders of groups x groups clusters."""
    a = shown.arrays
    plan, decibel = layout_of(a["layer/stats"].max(0), a["layer/x"], a["layer/shape"], groups, bits)
    _, heads, p = (int(v) for v in a["layer/shape"])
    figure, ax = plt.subplots(figsize=(5.2, 3.0))
    values = a["layer/stats"].max(0).astype(float)[plan.idx_c.numpy()].reshape(heads, p)
    ax.imshow(np.log10(np.maximum(values, 1e-4)), cmap="cividis", aspect="auto")
    ax.grid(False)
    top = 0
    for sizes, count in zip(
        plan.chan_sizes.view(-1, groups).tolist(), plan.head_sizes.flatten().tolist(), strict=True
    ):
        for x in np.cumsum(sizes)[:-1]:
            ax.plot([x - 0.5] * 2, [top - 0.5, top + count - 0.5], color="white", linewidth=1.5)
        top += count
        ax.axhline(top - 0.5, color="white", linewidth=1.5) if top < heads else None
    plots.label(ax, "channel of the head (sorted)", "head (clustered)", f"{bits} bits: {decibel:.1f} dB")
    return figure


def describe(groups: int, bits: int) -> str:
    """Alt text of one state."""
    a = shown.arrays
    _, decibel = layout_of(a["layer/stats"].max(0), a["layer/x"], a["layer/shape"], groups, bits)
    return f"{groups} head groups of {groups} channel groups, {bits} bits: {decibel:.1f} dB."


GRID = dict(S.play)
ready = "layer/stats" in shown.arrays
if ready:
    picker.live(draw_layout, GRID)
picker.picker(
    run, "layout", draw_layout, GRID, alt=describe,
    caption="More scales and more bits: what each of them brings.",
) if ready else print("no trained model in these units")  # fmt: skip

# %% [markdown]
# ## Your own model
#
# ```python
# from readrun import chapter
# from transformers import Mamba2ForCausalLM
# q = chapter("quamba2")
# model = Mamba2ForCausalLM.from_pretrained("mistralai/Mamba-Codestral-7B-v0.1")
# small = q.quantize(model, "w4a8", calib)      # calib: batches of token ids of your own text
# small.generate(ids, max_new_tokens=50)        # transformers' own loop
# engine = q.Engine(small.cuda(), batch=1)      # the kernels: engine.prefill(ids), then engine.decode()
# ```
#
# `checkpoint` takes a hub id or folder in transformers' Mamba-2 format. Without it the committed small model
# is saved in that layout, in shards, and read back.


# %%
def load_checkpoint(path: str) -> Mamba2ForCausalLM:
    """A float32 model. Raises ValueError naming `checkpoint`."""
    wanted = "accepted: hub id or folder of a Mamba-2 model in transformers' format, safetensors"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "mamba2":
            raise ValueError(f"a {config.model_type!r} model")
        return Mamba2ForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"checkpoint: {path}: {str(error)[:300]}; {wanted}") from error


@torch.no_grad()
def own_model(path: str, tokens: int = 64, seed: int = 0) -> dict[str, Any]:
    """Quantise a checkpoint to W4A8: sizes, NLL before and after (without tokenizer: of random ids)."""
    model = load_checkpoint(path)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (4, tokens), generator=generator)
    if (Path(path) / "tokenizer.json").is_file() or not Path(path).exists():
        text = "\n".join(d.text[:4000] for d in corpus.documents("validation")[:4])
        found = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0, : 4 * tokens]
        ids = found[: len(found) // 4 * 4].view(4, -1)
    ids, model = ids.to(run.device), model.to(run.device)
    made = quantize(model, "w4a8", [ids[:3]])
    before, after = (float(sequence_nll(m, ids[3:], 1).mean()) for m in (model, made))
    new = made.generate(ids[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 8:]
    sizes = dict(bytes_before=measured_bytes(model) // 2, bytes_after=measured_bytes(made))
    return {"nll": before, "nll_w4a8": after, "new": new.tolist(), **sizes}


# %%
if run.checkpoint:
    own = run.unit(own_model, path=run.checkpoint)
else:
    folder = run.folder / "own_model"
    base_model = Mamba2ForCausalLM.from_pretrained(paths.asset("quamba2/base"), dtype=torch.float32)
    base_model.save_pretrained(folder, max_shard_size="500KB")
    make_tokenizer(256).save_pretrained(folder)
    own = own_model(str(folder))
if not isinstance(own, dict) and not own.done:
    print("own model: not computed")
else:
    print(f"NLL {own['nll']:.4f}, W4A8 {own['nll_w4a8']:.4f} nat per token")
    print(f"{own['bytes_before'] / 2**20:.2f} MiB in 16 bits, {own['bytes_after'] / 2**20:.2f} MiB in W4A8; "
          f"next tokens {own['new']}")  # fmt: skip

# %% [markdown]
# ## Limits
#
# - The quality of the real 2.7B and 8B models is not measured, nor any zero-shot task: there are no such
#   weights here. The models are small and trained briefly; their outliers are milder than those of large
# ones.
# - Speeds are of random weights on one GPU, sequences of equal length. The official kernels are not compared.
# - With more than one row the bf16 baseline adds the residual in a kernel of its own, the int8 products in
# their epilogue.
# - Hessians come from the float model in one pass; the official code quantises layer after layer.
# - The maximum of the state is taken after every 16th token, so that int8 states may clip in between.
# - W4AX, the searched mix of W4A8 and W4A16 layers, is possible (`recipe` takes a list) but not searched.
# - Mamba-1, Jetson boards and tensor parallelism are left out.
#
# **Exercise 1.** Why may a channel move inside its head and a head inside its SSD group, but not further?
#
# :::{dropdown} Solution
# Channels of a head share $A$, $\Delta$, $D$; moved to another head, a channel would decay at another
# rate. Heads of a group share $B$ and $C$, and the gated norm's mean square is over the group.
# :::
#
# **Exercise 2.** W4A8 accumulates $\sum_k w_8x_8$ in int32 with $|w_8|,|x_8|\le127$. How large may $K$ be?
#
# :::{dropdown} Solution
# $2^{31}/127^2=133\,144$. With one scale per group *inside* the sum there would be $K/128$ partial sums to
# scale in floating point instead of one.
# :::
#
# **Exercise 3.** At batch $b$, when does the state, not the weights, dominate a decoding step of the 8B
# model?
#
# :::{dropdown} Solution
# Weights are 3.7 GB at four bits; the int8 states of one sequence are 0.06 GB, read and written: 0.12 GB.
# They are equal at $b\approx30$, and at half of that with 16-bit states.
# :::
#
# **References.** H.-Y. Chiang et al., *Quamba2: A Robust and Scalable Post-training Quantization Framework
# for Selective State Space Models*, ICML 2025, arXiv 2503.22879.
#
# ```bibtex
# @inproceedings{chiang2025quamba2,
#   title     = {{Quamba2}: A Robust and Scalable Post-training Quantization Framework for Selective State
# Space
#                Models},
#   author    = {Chiang, Hung-Yueh and Chang, Chi-Chih and Frumkin, Natalia and Wu, Kai-Chiang and
#                Abdelfattah, Mohamed S. and Marculescu, Diana},
#   booktitle = {ICML},
#   year      = {2025}
# }
# ```
