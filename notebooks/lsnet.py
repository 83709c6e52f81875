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
# # LSNet: look wide, mix small
#
# Ao Wang, Hui Chen, Zijia Lin, Jungong Han, Guiguang Ding, *LSNet: See Large, Focus Small* (CVPR 2025),
# [arXiv 2503.23135](https://arxiv.org/abs/2503.23135). Official code:
# [THU-MIG/lsnet](https://github.com/THU-MIG/lsnet).
#
# :::{admonition} The idea in three sentences
# :class: tip
# A layer that mixes pixels does two things: it decides *how* to mix, and it mixes. Attention does both over
# the whole image, which is dear; a convolution does both over the same small window with fixed weights, which
# is blind. *LS convolution* separates them: a cheap large kernel looks at a wide neighbourhood and predicts,
# for every position, the nine weights of a 3×3 kernel that does the mixing.
#
# **You need to know** what a depthwise convolution is, and how to read an {term}`interval` over {term}`seed`s
# and a {term}`roofline`. Symbols are in [Notation](../notation.md).
#
# **You will run** the operator and both its gradients, as plain PyTorch and as Triton kernels; the three
# networks, checked against the integers of the official code; mixers at equal cost on two small tasks; and
# the speed of twenty networks.
#
# **It costs** seconds in `smoke`, under two minutes on one core in `cpu`; the `gpu` run is described below.
# :::

# %% tags=["parameters", "hide-input"]
profile = ""  # smoke | cpu | gpu; "" means $READRUN_PROFILE, else cpu
seed = 0  # first seed
seeds = 0  # how many seeds; 0: the profile's own number
device = "auto"  # auto | cpu | cuda
checkpoint = ""  # hub id, folder (timm's format) or official .pth / .safetensors file of an LSNet
only = ""  # patterns of units to compute; "": all; "none": draw from saved units
out = ""  # folder for this run's files; "": build/lsnet/<profile>/live

# %% tags=["hide-input"]
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import readrun
import scipy.stats
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from readrun import attempts, bench, graphed, media, picker, plots, replay, sanitizer, tables, train
from timm.layers import SqueezeExcite, trunc_normal_
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no GPU kernels on this platform: the reference path runs
    triton = tl = constexpr = None

run = readrun.start(
    "lsnet", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only, out=out
)
plots.style()
tries = attempts.Attempts(run)  # a network or kernel that fails on some machine does not end the others

# %% [markdown]
# ## The idea in a picture
#
# The blue square is what LS convolution *looks at* when it decides about the black pixel, the orange one what
# it *mixes*. A depthwise 3×3 convolution looks at nothing (its weights are fixed); attention looks at and
# mixes everything.

# %% tags=["figure", "hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.2))
for ax, (title, look, mix) in zip(
    axes, (("depthwise 3×3", 0, 1), ("attention", 7, 7), ("LS convolution", 3, 1)), strict=True
):
    canvas = np.ones((15, 15, 3))
    for reach, colour in ((look, "#56B4E9"), (mix, "#E69F00")):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        if reach:
            canvas[7 - reach : 8 + reach, 7 - reach : 8 + reach] = (
                rgb if look != mix else (0.5 * np.array(rgb) + 0.5 * canvas[7, 7])
            )
    canvas[7, 7] = 0
    ax.imshow(canvas, extent=(-7.5, 7.5, 7.5, -7.5))
    ax.set_xticks([-7, -3, 0, 3, 7])
    ax.set_yticks([-7, -3, 0, 3, 7])
    plots.label(ax, "column (positions)", "row (positions)" if ax is axes[0] else " ", title)
plots.show(
    figure,
    alt="Three 15 by 15 grids around one pixel. Depthwise 3 by 3: only the 3 by 3 neighbourhood is mixed, "
    "nothing is looked at. Attention: the whole grid is looked at and mixed. LS convolution: a 7 by 7 square "
    "is looked at, and the 3 by 3 square inside it is mixed.",
    caption="What decides the weights (blue) and what is mixed (orange).",
)

# %% [markdown]
# ## Set-up
#
# One code path, three sizes; the active profile is in bold. Rules and margins were written into
# `data/papers/lsnet.yml` before the first experiment.

# %% tags=["hide-input"]
PEERS = {
    "lsnet_t": ["edgenext_xx_small", "fasternet_t0", "efficientvit_m3", "starnet_s1"],
    "lsnet_s": ["mobilenetv3_large_100", "fastvit_t8", "efficientformerv2_s0", "efficientnet_b0",
                "fasternet_t1", "poolformer_s12", "shvit_s3", "repvit_m0_9"],
    "lsnet_b": ["swiftformer_s", "fastvit_t12", "efficientformer_l1", "edgenext_small", "repvit_m1_1"],
}  # fmt: skip
EVERY = [name for one, peers in PEERS.items() for name in (one, *peers)]
MICRO = dict(embed_dim=[32, 48, 64, 96], depth=[1, 2, 2, 2])
S = run.settings(
    smoke=dict(
        seeds=1, d2=["ls", "dw3"], d1=["ls"], kernel_sizes=[],
        net=MICRO, task=dict(size=32, classes=8, train=128, test=64, steps=3, batch=16, lr=2e-3),
        images_d1=128, steps_d1=2,
        models=["lsnet_t"], modern=["lsnet_t"], compiled=[],
        speed=dict(size=64, max_batch=2, modern_batch=2, repeats=3, warmup=1),
        ska=dict(batch=1, repeats=3, train_batch=2, shapes={"b7": [64, 7]}),
        look_sizes=[3, 7], play=dict(row=[1], column=[2]),
    ),
    cpu=dict(
        seeds=1, d2=["ls", "dw3"], d1=[], kernel_sizes=[],
        net=MICRO, task=dict(size=32, classes=8, train=4096, test=512, steps=150, batch=64, lr=2e-3),
        images_d1=2048, steps_d1=30,
        models=["lsnet_t", "fasternet_t0", "starnet_s1"], modern=[], compiled=[],
        speed=dict(size=224, max_batch=2, modern_batch=2, repeats=3, warmup=1),
        ska=dict(batch=4, repeats=5, train_batch=4,
                 shapes={"b28": [128, 28], "b14": [256, 14], "b7": [384, 7]}),
        look_sizes=[3, 7], play=dict(row=[0, 1, 2], column=[0, 1, 2, 3]),
    ),
    gpu=dict(
        seeds=5, d2=["ls", "dw3", "window_attn", "involution", "dw7", "no_ska", "no_lkp"],
        d1=["ls", "no_lkp", "no_ska"], kernel_sizes=[5, 3, 9],
        net=dict(embed_dim=[48, 96, 160, 224], depth=[2, 2, 4, 4]),
        task=dict(size=64, classes=200, train=100_000, test=10_000, steps=800, batch=512, lr=2e-3),
        images_d1=100_000, steps_d1=200, models="all twenty", modern="all twenty",
        compiled=["lsnet_t", "efficientvit_m3", "lsnet_b", "repvit_m1_1"],
        speed=dict(size=224, max_batch=4096, modern_batch=1024, repeats=5, warmup=1),
        ska=dict(batch=256, repeats=100, train_batch=512,
                 shapes={"b28": [128, 28], "b14": [256, 14], "b7": [384, 7]}),
        look_sizes=[3, 7], play=dict(row=[0, 1, 2], column=[0, 1, 2, 3]),
    ),
)  # fmt: skip
S

# %% [markdown]
# ## The algorithm
#
# ### Step 1: mix small — a 3×3 kernel of its own for every position
#
# The input is $x$ with $N$ images, $C$ channels, $H\times W$ positions. Eight channels share one kernel, so
# that $G'=C/8$ kernels per position are needed: $w$ has shape $(N, G', 9, H, W)$. *Small kernel aggregation*
# (SKA) is
#
# $$
# y_{n,c,i,j} = \sum_{a,b=0}^{K-1} w_{n,\;c \bmod G',\;Ka+b,\;i,j}\;\, x_{n,c,\,i+a-r,\,j+b-r},
# \qquad r = \lfloor K/2 \rfloor,
# $$
#
# with $K=3$ and zeros outside the image. Channel $c$ uses kernel $c \bmod G'$: channels 0, $G'$, $2G'$, …
# share one. Splitting the channels into *contiguous* groups of eight gives tensors of the same shapes, passes
# every shape test, and is wrong for the published weights.
#
# The reference unfolds $x$ into its nine shifted copies, multiplies and adds. It is short and obviously
# right, and it writes nine times the input to memory.


# %%
def check_ska(x: Tensor, w: Tensor) -> None:
    """Raise ValueError unless x (N, C, H, W) and w (N, G, K², H, W) fit: C % G == 0, odd K, sizes, device."""
    if x.ndim != 4 or w.ndim != 5:
        raise ValueError(f"x, w: {x.ndim} and {w.ndim} dimensions; accepted: (N, C, H, W), (N, G, K*K, H, W)")
    if w.shape[1] < 1 or x.shape[1] % w.shape[1]:
        raise ValueError(f"w: {w.shape[1]} kernels for {x.shape[1]} channels; accepted: a divisor of these")
    if math.isqrt(w.shape[2]) ** 2 != w.shape[2] or w.shape[2] % 2 == 0:
        raise ValueError(f"w: {w.shape[2]} taps; accepted: the square of an odd kernel size")
    if (x.shape[0], *x.shape[2:]) != (w.shape[0], *w.shape[3:]):
        raise ValueError(f"w: {tuple(w.shape)} does not fit x {tuple(x.shape)}: same images and positions")
    if x.device != w.device or x.dtype != w.dtype:
        raise ValueError(f"w: {w.dtype} on {w.device}, x: {x.dtype} on {x.device}; accepted: the same")


def shifts(x: Tensor, kernel_size: int, groups: int) -> Tensor:
    """The K² zero-padded shifts of x (N, C, H, W), as (N, C / groups, groups, K², H, W)."""
    n, c, h, w = x.shape
    patches = F.unfold(x.contiguous(), kernel_size, padding=kernel_size // 2)
    return patches.view(n, c // groups, groups, kernel_size**2, h, w)


def ska_reference(x: Tensor, w: Tensor) -> Tensor:
    """Small kernel aggregation by `unfold`, any odd K: x (N, C, H, W), w (N, G, K², H, W) -> (N, C, H, W).

    Channel c uses kernel c mod G. Raises ValueError (`check_ska`).
    """
    check_ska(x, w)
    patches = shifts(x, math.isqrt(w.shape[2]), w.shape[1])
    return (patches * w.unsqueeze(1)).sum(3).reshape(x.shape)


# %%
# NBVAL_CHECK_OUTPUT
x = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.float64)[None, :, None]  # two channels, one row
w = torch.zeros(1, 1, 9, 1, 4, dtype=torch.float64)  # one kernel per position
w[0, 0, 4] = 1  # centre tap: the identity ...
w[0, 0, 4, 0, 1], w[0, 0, 5, 0, 1] = 0, 10  # ... but position 1 takes ten times its right neighbour
print("y:", ska_reference(x, w).squeeze().tolist())
x = torch.arange(1.0, 5, dtype=torch.float64).view(1, 4, 1, 1)  # four channels, one position
w = torch.zeros(1, 2, 9, 1, 1, dtype=torch.float64)
w[0, :, 4, 0, 0] = torch.tensor([1.0, 100.0])  # two kernels
print("y:", ska_reference(x, w).flatten().tolist())

# %% [markdown]
# :::{dropdown} Where these numbers come from
# First example: tap 4 is the centre, tap 5 = $3\cdot1+2$ the right neighbour. Position 1 yields $10\cdot3=30$
# in the first channel and $10\cdot7=70$ in the second (one kernel serves both), all others themselves.
#
# Second: channel $c$ takes kernel $c \bmod 2$: factors 1, 100, 1, 100. Contiguous groups would give
# 1, 2, 300, 400.
# :::
#
# ### Step 2: both gradients
#
# Let $g$ be the gradient that arrives at $y$. An input position $(p,q)$ was read
# by the outputs around it, each with *its own* kernel:
#
# $$
# \frac{\partial}{\partial x_{n,c,p,q}} = \sum_{a,b}
# w_{n,\,c\bmod G',\,Ka+b,\;p-a+r,\,q-b+r}\; g_{n,c,\,p-a+r,\,q-b+r},
# \qquad
# \frac{\partial}{\partial w_{n,k,Ka+b,i,j}} = \sum_{c \,\equiv\, k} g_{n,c,i,j}\; x_{n,c,\,i+a-r,\,j+b-r}.
# $$
#
# The first is again a gather with mirrored shifts, in which the weight moves along with the gradient; the
# second a sum over the eight channels of a kernel. Neither needs atomic additions. `F.fold` is the adjoint of
# `F.unfold`, so that on the CPU both are one line.


# %%
def ska_grad_x(g: Tensor, w: Tensor) -> Tensor:
    """Gradient of SKA in its input: g (N, C, H, W), w (N, G, K², H, W) -> (N, C, H, W)."""
    (n, c, *size), k = g.shape, math.isqrt(w.shape[2])
    spread = g.reshape(n, c // w.shape[1], w.shape[1], 1, *size) * w.unsqueeze(1)
    return F.fold(spread.reshape(n, c * k * k, -1), size, k, padding=k // 2)


def ska_grad_w(g: Tensor, x: Tensor, groups: int, kernel_size: int) -> Tensor:
    """Gradient of SKA in its kernels: g, x (N, C, H, W) -> (N, groups, K², H, W)."""
    n, c, *size = g.shape
    return (shifts(x, kernel_size, groups) * g.reshape(n, c // groups, groups, 1, *size)).sum(1)


# %% [markdown]
# ### Step 3: one kernel, two layouts
#
# How fast can this be? Per output element SKA reads one $x$ and $9/8$ of a $w$ and writes one $y$: 3.125
# elements, 6.25 bytes in bf16, for nine multiply-adds. An H100 does some 250 operations in the time of one
# byte: SKA is *memory-bound*, and the best kernel is the one that moves every byte once.
#
# A program owns a tile of positions $p$ and kernels $k$ and *all eight channels* of each kernel, so that it
# reads a weight once and uses it eight times. Neighbouring positions are read again through the L1 cache.
# The tile is flattened into one axis $e$: in the usual layout (NCHW) $e$ runs over positions, in
# channels-last over kernels first, so that in both neighbouring threads touch neighbouring memory. All
# strides and sizes are compile-time constants: a shift becomes a constant in the load instruction. `VEC` is
# how many neighbours one thread takes. In NCHW it is 1: shifted rows are never aligned, and a thread that
# took eight positions would spread a warp's loads over four cache lines each.
#
# The same kernel computes the output and, mirrored, the gradient in $x$.


# %%
def jit(function: Callable) -> Callable:
    """triton.jit where Triton is installed; else the bare function, which nothing calls."""
    return triton.jit(function) if triton else function


@jit
def ska_gather_kernel(
    x, w, y, pixels, xn, wn, G: constexpr, R: constexpr, H: constexpr, W: constexpr,
    K: constexpr, xc: constexpr, xp: constexpr, wk: constexpr, wt: constexpr,
    wp: constexpr, MIRROR: constexpr, ACC: constexpr, BP: constexpr, BK: constexpr,
    BR: constexpr, VEC: constexpr,
):  # fmt: skip
    """y = SKA(x, w); with MIRROR the gradient in x (then x is the arriving gradient)."""
    e = tl.arange(0, BP * BK)
    m = tl.program_id(0) * BP + e // BK  # position, counted through all images
    k = tl.program_id(1) * BK + e % BK
    c = tl.arange(0, BR)[:, None] * G + k[None, :]  # the channels k, k + G, ... of kernel k
    n, p = (m // (H * W)).to(tl.int64), m % (H * W)
    i, j = p // W, p % W
    live = (m < pixels) & (k < G)
    alive = live[None, :] & (c < R * G)
    at = tl.max_contiguous((n * xn + p * xp)[None, :] + c * xc, (1, VEC))
    w_at = n * wn + p * wp + k * wk
    total = tl.zeros([BR, BP * BK], ACC)
    for tap in tl.static_range(K * K):
        di = tap // K - K // 2
        dj = tap % K - K // 2
        if MIRROR:
            di, dj = -di, -dj
        inside = live & (i + di >= 0) & (i + di < H) & (j + dj >= 0) & (j + dj < W)
        value = tl.load(x + at + (di * W + dj) * xp, mask=alive & inside[None, :], other=0.0)
        there = w_at + tap * wt
        if MIRROR:
            there += (di * W + dj) * wp  # the kernel of the output that read this input
        weight = tl.load(w + there, mask=inside, other=0.0)
        total += value.to(ACC) * weight.to(ACC)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=alive)


# %% [markdown]
# The gradient in $w$ keeps the arriving gradient in registers and, for each tap, adds up the products over
# the channels of its kernel: K² sums per position, each written once.


# %%
@jit
def ska_grad_w_kernel(
    g, x, gw, pixels, xn, wn, G: constexpr, R: constexpr, H: constexpr, W: constexpr,
    K: constexpr, xc: constexpr, xp: constexpr, wk: constexpr, wt: constexpr,
    wp: constexpr, ACC: constexpr, BP: constexpr, BK: constexpr, BR: constexpr,
    VEC: constexpr,
):  # fmt: skip
    """gw[k, tap, p] = sum over the channels c of kernel k of g[c, p] x[c, p + tap]."""
    e = tl.arange(0, BP * BK)
    m = tl.program_id(0) * BP + e // BK
    k = tl.program_id(1) * BK + e % BK
    c = tl.arange(0, BR)[:, None] * G + k[None, :]
    n, p = (m // (H * W)).to(tl.int64), m % (H * W)
    i, j = p // W, p % W
    live = (m < pixels) & (k < G)
    alive = live[None, :] & (c < R * G)
    at = tl.max_contiguous((n * xn + p * xp)[None, :] + c * xc, (1, VEC))
    w_at = n * wn + p * wp + k * wk
    arriving = tl.load(g + at, mask=alive, other=0.0).to(ACC)
    for tap in tl.static_range(K * K):
        di = tap // K - K // 2
        dj = tap % K - K // 2
        inside = live & (i + di >= 0) & (i + di < H) & (j + dj >= 0) & (j + dj < W)
        value = tl.load(x + at + (di * W + dj) * xp, mask=alive & inside[None, :], other=0.0)
        total = tl.sum(arriving * value.to(ACC), axis=0)
        tl.store(gw + w_at + tap * wt, total.to(gw.dtype.element_ty), mask=live)


# %% [markdown]
# The launcher reads the layout off the strides. `TILES` lists (positions, kernels, `VEC`, warps) of a
# program; the first is used, the others are measured below. They were chosen by compiling for an H100 and
# reading the result: no register spills, and in NCHW no shared memory, one load per tap and channel and one
# per weight.

# %%
TILES = {
    "nchw": [(128, 1, 1, 4), (64, 1, 1, 2), (256, 1, 1, 8), (256, 1, 2, 4), (32, 4, 1, 4)],
    "nhwc": [(16, 16, 2, 4), (8, 16, 4, 4), (16, 16, 8, 4), (32, 16, 2, 8), (16, 8, 1, 4)],
}


def layout_of(x: Tensor) -> str:
    """Return "nhwc" if x (N, C, H, W) is channels_last in memory and not also contiguous, else "nchw"."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return "nhwc" if last and not x.is_contiguous() else "nchw"


def as_dense(x: Tensor) -> Tensor:
    """x in the layout that `layout_of` says, without holes."""
    last = layout_of(x) == "nhwc"
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def empty_kernels(like: Tensor, groups: int, taps: int) -> Tensor:
    """Uninitialised (N, groups, taps, H, W) in the layout of `like` (N, C, H, W), taps beside each other."""
    n, _, h, w = like.shape
    last = torch.channels_last if layout_of(like) == "nhwc" else torch.contiguous_format
    flat = torch.empty(n, groups * taps, h, w, dtype=like.dtype, device=like.device, memory_format=last)
    return flat.view(n, groups, taps, h, w)


def positions_stride(w: Tensor) -> Tensor:
    """w (N, G, K², H, W), copied if its positions are not one evenly spaced run."""
    return w if w.stride(3) == w.stride(4) * w.shape[4] or w.shape[3] == 1 else w.contiguous()


# %%
def launch(kernel: Any, a: Tensor, b: Tensor, out: Tensor, x: Tensor, w: Tensor, tile: Any, **more) -> Tensor:
    """Run a kernel over tiles of positions and kernels; strides are those of x (N, C, H, W) and w."""
    (n, c, height, width), groups = x.shape, w.shape[1]
    if not out.numel():
        return out
    positions, kernels, vec, warps = tile or TILES[layout_of(x)][0]
    kernels = min(kernels, groups & -groups) if layout_of(x) == "nhwc" else kernels
    constants = dict(
        G=groups, R=c // groups, H=height, W=width, K=math.isqrt(w.shape[2]), xc=x.stride(1), xp=x.stride(3),
        wk=w.stride(1), wt=w.stride(2), wp=w.stride(4), BP=positions, BK=kernels,
        BR=1 << (c // groups - 1).bit_length(), VEC=min(vec, kernels) if layout_of(x) == "nhwc" else vec,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=warps, **more,
    )  # fmt: skip
    pixels = n * height * width
    grid = (triton.cdiv(pixels, positions), triton.cdiv(groups, kernels))
    kernel[grid](a, b, out, pixels, x.stride(0), w.stride(0), **constants)
    return out


# %%
def triton_ska(x: Tensor, w: Tensor, tile: Any = None) -> Tensor:
    """`ska_reference` as one Triton kernel; output in the layout of x."""
    x, w = as_dense(x), positions_stride(w)
    return launch(ska_gather_kernel, x, w, torch.empty_like(x), x, w, tile, MIRROR=False)


def triton_grad_x(g: Tensor, w: Tensor, tile: Any = None) -> Tensor:
    """`ska_grad_x` as one Triton kernel."""
    g, w = as_dense(g), positions_stride(w)
    return launch(ska_gather_kernel, g, w, torch.empty_like(g), g, w, tile, MIRROR=True)


def triton_grad_w(g: Tensor, x: Tensor, groups: int, kernel_size: int, tile: Any = None) -> Tensor:
    """`ska_grad_w` as one Triton kernel; output in the layout of x."""
    x = as_dense(x)
    g = g.contiguous(memory_format=torch.channels_last) if layout_of(x) == "nhwc" else g.contiguous()
    gw = empty_kernels(x, groups, kernel_size**2)
    return launch(ska_grad_w_kernel, g, x, gw, x, gw, tile)


# %% [markdown]
# ### Step 4: an operator that autograd and the compiler know
#
# A custom operator says what `torch.compile` and the FLOP counter need: the shape and layout of its output,
# its gradient (two more operators), its cost. On a GPU with Triton it runs the kernels, elsewhere the
# reference.


# %%
def on_gpu(x: Tensor) -> bool:
    """Do the Triton kernels run where x is?"""
    return triton is not None and x.is_cuda


# A name belongs to the last who defined it, and torch 2.14 crashes in an operator whose name was taken
# (PyTorch pull request 197025): a notebook keeps its own when `chapter("lsnet")` is loaded beside it, as
# `results` does.
SPACE = "readrun_" + __name__.rpartition(".")[2].strip("_")


@torch.library.custom_op(f"{SPACE}::ska_grad_x", mutates_args=())
def ska_grad_x_op(g: Tensor, w: Tensor) -> Tensor:
    """The gradient of `ska_op` in x."""
    return triton_grad_x(g, w) if on_gpu(g) else ska_grad_x(g, w).contiguous(memory_format=format_of(g))


@torch.library.custom_op(f"{SPACE}::ska_grad_w", mutates_args=())
def ska_grad_w_op(g: Tensor, x: Tensor, groups: int, kernel_size: int) -> Tensor:
    """The gradient of `ska_op` in w."""
    if on_gpu(g):
        return triton_grad_w(g, x, groups, kernel_size)
    return empty_kernels(x, groups, kernel_size**2).copy_(ska_grad_w(g, x, groups, kernel_size))


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format that operators give results about x."""
    return torch.channels_last if layout_of(x) == "nhwc" else torch.contiguous_format


@ska_grad_x_op.register_fake
def ska_grad_x_shape(g: Tensor, w: Tensor) -> Tensor:
    """Shape and layout of the gradient in x."""
    return torch.empty_like(g, memory_format=format_of(g))


@ska_grad_w_op.register_fake
def ska_grad_w_shape(g: Tensor, x: Tensor, groups: int, kernel_size: int) -> Tensor:
    """Shape and layout of the gradient in w."""
    return empty_kernels(x, groups, kernel_size**2)


# %%
def ska_backward(context: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in x and w, each only where asked for."""
    x, w = context.saved_tensors
    wants_x, wants_w = context.needs_input_grad
    g = g.contiguous(memory_format=format_of(x))
    gx = ska_grad_x_op(g, w) if wants_x else None
    return gx, ska_grad_w_op(g, x, w.shape[1], math.isqrt(w.shape[2])) if wants_w else None


def known(op: Any) -> Any:
    """Give the operator its fake kernel, its gradient and its FLOP formula; returns it."""
    op.register_fake(lambda x, w: torch.empty_like(x, memory_format=format_of(x)))
    op.register_autograd(
        ska_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    packet = getattr(torch.ops, SPACE).ska
    flop_registry.pop(packet, None)  # of an earlier run of this cell
    count_of = register_flop_formula(packet)
    count_of(lambda x, w, *_, out_shape=None, **__: 2 * w[2] * math.prod(x))
    return op


@known
@torch.library.custom_op(f"{SPACE}::ska", mutates_args=())
def ska_op(x: Tensor, w: Tensor) -> Tensor:
    """Small kernel aggregation, unchecked: Triton on CUDA, else the reference."""
    return triton_ska(x, w) if on_gpu(x) else ska_reference(x, w).contiguous(memory_format=format_of(x))


def ska(x: Tensor, w: Tensor) -> Tensor:
    """Small kernel aggregation: x (N, C, H, W), w (N, G, K², H, W) -> (N, C, H, W), layout of x.

    Channel c uses kernel c mod G, zeros outside. float32, float16, bfloat16 with float32 sums (float64 with
    float64). Differentiable, works under `torch.compile`. Raises ValueError (`check_ska`).
    """
    check_ska(x, w)
    return ska_op(x, w)


# %%
# NBVAL_CHECK_OUTPUT
x = torch.arange(1.0, 7, dtype=torch.float64).view(1, 2, 1, 3).requires_grad_()  # 1 2 3 / 4 5 6
w = torch.zeros(1, 1, 9, 1, 3, dtype=torch.float64)
w[0, 0, 5] = torch.tensor([1.0, 10.0, 100.0])  # each position takes so much of its right neighbour
w.requires_grad_()
ska(x, w).sum().backward()
print("dx:", x.grad.squeeze().tolist())
print("dw, right tap:", w.grad[0, 0, 5, 0].tolist(), " centre tap:", w.grad[0, 0, 4, 0].tolist())

# %% [markdown]
# :::{dropdown} Where these numbers come from
# $y_j = w_j x_{j+1}$ with $w=(1,10,100)$. Input 0 is nobody's right neighbour: gradient 0. Input 1 was read
# by output 0 with its weight 1, input 2 by output 1 with weight 10; the weight 100 met the zero outside. Both
# channels alike.
#
# The gradient of a weight is what it multiplied, summed over the channels that share it: right tap
# $2+5=7$, $3+6=9$, $0$; centre tap $1+4$, $2+5$, $3+6$.
# :::
#
# ### Step 5: look large — predict the kernels
#
# *Large kernel perception* (LKP) halves the channels, looks around with a static 7×7 depthwise convolution,
# and turns what it saw into $9\,G'$ numbers per position, group-normalised: one group is the nine taps of one
# kernel over all positions. There is no softmax, weights may be negative. `CB` is a convolution without bias
# followed by BatchNorm.
#
# $$
# \begin{aligned}
# u &= \mathrm{ReLU}(\mathrm{CB}_{1\times1}(x)) \in \mathbb R^{C/2},\quad
# u \leftarrow \mathrm{CB}_{7\times7}^{\text{depthwise}}(u),\quad
# u \leftarrow \mathrm{ReLU}(\mathrm{CB}_{1\times1}(u)),\\
# w &= \mathrm{GroupNorm}_{G'}(\mathrm{Conv}_{1\times1}(u)), \qquad
# \mathrm{LSConv}(x) = \mathrm{BN}(\mathrm{SKA}(x, w)) + x .
# \end{aligned}
# $$


# %%
def fused_pair(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals conv then bn (in eval mode)."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    bias = shift if conv.bias is None else shift + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), bias


class ConvBN(nn.Module):
    """CB(dim, out, kernel_size, stride, padding, groups): convolution `c` without bias, BatchNorm `bn`."""

    def __init__(self, dim: int, out: int, kernel_size: int = 1, stride: int = 1, padding: int = 0,
                 groups: int = 1, bn_weight: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        self.c = nn.Conv2d(dim, out, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out)
        nn.init.constant_(self.bn.weight, bn_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def fuse_(self) -> None:
        """Fold `bn` into `c`; nothing if that is done."""
        if isinstance(self.bn, nn.BatchNorm2d):
            weight, bias = fused_pair(self.c, self.bn)
            self.c.weight.data, self.c.bias = weight.data, nn.Parameter(bias.data)
            self.bn = nn.Identity()


# %%
class LKP(nn.Module):
    """Large kernel perception: x (N, dim, H, W) -> kernels (N, dim / groups, sks², H, W).

    lks: size of the look; sks: of the kernels; groups: channels that share one; hidden: inner width (0:
    dim / 2); look=False leaves the large convolution out. Raises ValueError unless groups and 2 divide dim.
    """

    def __init__(self, dim: int, lks: int = 7, sks: int = 3, groups: int = 8, hidden: int = 0,
                 look: bool = True) -> None:  # fmt: skip
        super().__init__()
        if dim % groups or dim % 2:
            raise ValueError(f"dim: {dim}; accepted: a multiple of {groups} (channels per kernel) and of 2")
        if lks % 2 == 0 or sks % 2 == 0:
            raise ValueError(f"lks, sks: {lks}, {sks}; accepted: odd sizes")
        hidden, self.taps = hidden or dim // 2, sks**2
        self.cv1 = ConvBN(dim, hidden)
        self.cv2 = ConvBN(hidden, hidden, lks, 1, lks // 2, hidden) if look else nn.Identity()
        self.cv3 = ConvBN(hidden, hidden)
        self.cv4 = nn.Conv2d(hidden, self.taps * dim // groups, 1)
        self.norm = nn.GroupNorm(dim // groups, self.taps * dim // groups)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.cv3(self.cv2(F.relu(self.cv1(x)))))
        w = self.cv4(u)  # kernel-major, tap-minor channels
        if w.dtype != self.norm.weight.dtype:  # under autocast
            w = w.float()  # sums over all positions: never in half precision
        w = self.norm(w)
        return w.view(len(w), -1, self.taps, *w.shape[2:])


class LSConv(nn.Module):
    """Look large, mix small: x (N, dim, H, W) -> the same shape, with its residual. Arguments as `LKP`."""

    def __init__(self, dim: int, **lkp: Any) -> None:
        super().__init__()
        self.lkp, self.bn, self.mix = LKP(dim, **lkp), nn.BatchNorm2d(dim), ska

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.mix(x, self.lkp(x).to(x.dtype))) + x


# %%
# NBVAL_CHECK_OUTPUT
layer = LSConv(8).double().eval()
with torch.no_grad():
    layer.lkp.norm.weight.zero_()
    layer.lkp.norm.bias.copy_(torch.arange(9))  # the predicted kernel is now 0, 1, ..., 8 everywhere
    y = layer(torch.ones(1, 8, 3, 3, dtype=torch.float64))
    print("LSConv of ones, channel 0:", [[f"{v:.4f}" for v in row] for row in y[0, 0].tolist()])
    print("parameters:", sum(p.numel() for p in layer.parameters()))

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Inside, all nine taps meet a one: $0+1+\dots+8=36$. At the upper left corner only taps 4, 5, 7, 8 lie
# inside: $24$; at the lower right one taps 0, 1, 3, 4: $8$. BatchNorm with its initial statistics divides by
# $\sqrt{1+10^{-5}}$, and the residual adds 1: $36.9998$, $24.9999$, $9.0000$ (rounded).
#
# Parameters for $C=8$: CB $8\cdot4+8$, depthwise $4\cdot49+8$, CB $4\cdot4+8$, cv4 $4\cdot9+9$, GroupNorm 18,
# BatchNorm 16: 40 + 204 + 24 + 45 + 18 + 16 = 347.
# :::
#
# ### Step 6: the block, the network
#
# Blocks alternate inside a stage. Even ones mix with *RepDW* (a 3×3 and a 1×1 depthwise `CB` and the
# identity, added; at inference they merge into one 3×3 convolution) and *squeeze-and-excitation* (SE); odd
# ones with LS convolution, in the last stage with attention (MSA). A feed-forward network (FFN) follows each.


# %%
class RepDW(nn.Module):
    """3×3 depthwise CB + 1×1 depthwise CB + identity, (N, dim, H, W); `fuse_` merges them into one 3×3."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = ConvBN(dim, dim, kernel_size, 1, kernel_size // 2, dim)
        self.conv1: nn.Module | None = ConvBN(dim, dim, 1, 1, 0, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.conv1 is None else self.conv(x) + self.conv1(x) + x

    def fuse_(self) -> None:
        """Merge the branches; nothing if that is done."""
        if self.conv1 is not None:
            self.conv.fuse_(), self.conv1.fuse_()
            mid = self.conv.c.kernel_size[0] // 2
            self.conv.c.weight.data[:, 0, mid, mid] += self.conv1.c.weight.data[:, 0, 0, 0] + 1
            self.conv.c.bias.data += self.conv1.c.bias.data
            self.conv1 = None


class FFN(nn.Module):
    """Pointwise CB to twice the width, ReLU, and back (last BatchNorm weight 0): (N, dim, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1, self.pw2 = ConvBN(dim, 2 * dim), ConvBN(2 * dim, dim, bn_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(F.relu(self.pw1(x)))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


# %%
class MSA(nn.Module):
    """Multi-head attention over resolution² tokens, (N, dim, H, W); q and k have 16 numbers per head.

    Logits get a learned bias per head and *absolute* offset |Δrow|, |Δcolumn|.
    """

    def __init__(self, dim: int, resolution: int, num_heads: int = 4, key_dim: int = 16) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: {dim}; accepted: a multiple of num_heads = {num_heads}")
        self.num_heads, self.key_dim, self.resolution = num_heads, key_dim, resolution
        inner = num_heads * key_dim
        self.qkv, self.dw = ConvBN(dim, dim + 2 * inner), ConvBN(inner, inner, 3, 1, 1, inner)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, bn_weight=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))
        self.register_buffer("attention_bias_idxs", self.offsets(resolution))

    @staticmethod
    def offsets(resolution: int) -> Tensor:
        """Index of |Δrow|, |Δcolumn| in the table, (tokens, tokens), numbered in order of appearance."""
        at = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 2, indexing="ij"), -1).view(-1, 2)
        difference = (at[:, None] - at[None]).abs()
        return difference[..., 0] * resolution + difference[..., 1]

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if (h, w) != (self.resolution,) * 2:
            raise ValueError(f"img_size: attention was built for {self.resolution}² tokens, got {h} x {w}")
        inner = self.num_heads * self.key_dim
        q, k, v = self.qkv(x).split([inner, inner, c], 1)
        q, k, v = (t.reshape(n, self.num_heads, -1, h * w) for t in (self.dw(q), k, v))
        logits = q.transpose(2, 3) @ k * self.key_dim**-0.5
        weights = (logits + self.attention_biases[:, self.attention_bias_idxs]).softmax(-1)
        return self.proj((v @ weights.transpose(2, 3)).reshape(n, c, h, w))


# %% [markdown]
# `Block` numbers its mixers as the official code does. `make_mixer` (Step 8) gives other mixers for the
# comparison.


# %%
class Block(nn.Module):
    """Block `index` of stage `stage` (0 … 3): mixer (and SE), then FFN; (N, dim, H, W)."""

    def __init__(self, dim: int, stage: int, index: int, resolution: int, num_heads: int, mixer: str,
                 lks: int = 7) -> None:  # fmt: skip
        super().__init__()
        self.se: nn.Module = nn.Identity()
        if index % 2 == 0:
            self.mixer: nn.Module = RepDW(dim)
            self.se = SqueezeExcite(dim, rd_ratio=0.25)
        elif stage == 3:
            self.mixer = Residual(MSA(dim, resolution, num_heads))
        else:
            self.mixer = LSConv(dim, lks=lks) if mixer == "ls" else make_mixer(mixer, dim, resolution)
        self.ffn = Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.se(self.mixer(x)))


class Head(nn.Module):
    """BatchNorm and linear classifier, (N, dim) -> (N, classes)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm1d(dim)
        self.l = nn.Linear(dim, classes)
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    def fuse_(self) -> None:
        """Fold the BatchNorm into the linear layer; nothing if that is done."""
        if isinstance(self.bn, nn.BatchNorm1d):
            scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
            shift = self.bn.bias - self.bn.running_mean * scale
            self.l.bias.data += self.l.weight.data @ shift.data
            self.l.weight.data = self.l.weight.data * scale.data
            self.bn = nn.Identity()


# %%
class LSNet(nn.Module):
    """(N, 3, img_size, img_size) -> logits (N, num_classes); parameter names of the official files.

    embed_dim, depth: widths and numbers of blocks of the four stages; num_heads: of the last stage;
    stem_stride: 8 as published, or 4 (third convolution without stride) for small images; mixer: of the odd
    blocks; distillation: a second head, averaged with the first in eval mode, a tuple in training. Raises
    ValueError naming the argument.
    """

    def __init__(self, img_size: int = 224, embed_dim: Any = (64, 128, 256, 384), depth: Any = (0, 2, 8, 10),
                 num_heads: int = 4, stem_stride: int = 8, mixer: str = "ls", num_classes: int = 1000,
                 distillation: bool = False, lks: int = 7, in_chans: int = 3) -> None:  # fmt: skip
        super().__init__()
        if stem_stride not in (4, 8):
            raise ValueError(f"stem_stride: {stem_stride}; accepted: 4, 8")
        if img_size < 8 * stem_stride:
            raise ValueError(
                f"img_size: {img_size}, a stage has no positions; accepted: >= {8 * stem_stride}"
            )
        if len(embed_dim) != 4 or len(depth) != 4 or embed_dim[0] % 4:
            raise ValueError(f"embed_dim, depth: {embed_dim}, {depth}; accepted: four each, first % 4 == 0")
        self.num_classes, first = num_classes, embed_dim[0]
        self.patch_embed = nn.Sequential(
            ConvBN(in_chans, first // 4, 3, 2, 1), nn.ReLU(),
            ConvBN(first // 4, first // 2, 3, 2, 1), nn.ReLU(),
            ConvBN(first // 2, first, 3, stem_stride // 4, 1),
        )  # fmt: skip
        resolution = math.ceil(img_size / stem_stride)
        for stage, (dim, blocks) in enumerate(zip(embed_dim, depth, strict=True)):
            before, parts = embed_dim[max(stage - 1, 0)], []
            if stage:
                parts = [ConvBN(before, before, 3, 2, 1, before), ConvBN(before, dim)]
                resolution = math.ceil(resolution / 2)
            parts += [Block(dim, stage, i, resolution, num_heads, mixer, lks) for i in range(blocks)]
            setattr(self, f"blocks{stage + 1}", nn.Sequential(*parts))
        self.head = Head(embed_dim[-1], num_classes)
        self.head_dist = Head(embed_dim[-1], num_classes) if distillation else None

    def forward(self, x: Tensor) -> Any:
        x = self.blocks2(self.blocks1(self.patch_embed(x)))
        x = self.blocks4(self.blocks3(x)).mean((2, 3))
        if self.head_dist is None:
            return self.head(x)
        both = self.head(x), self.head_dist(x)
        return both if self.training else (both[0] + both[1]) / 2


# %% [markdown]
# The three published sizes are registered with timm, which has no LSNet of its own:
# `timm.create_model("lsnet_t")` works after `chapter("lsnet")`, and so does `hf_hub:jameslahm/lsnet_t`.

# %%
warnings.filterwarnings("ignore", "Overwriting lsnet_", UserWarning)  # the chapter may be loaded twice
VARIANTS = {
    "t": dict(embed_dim=(64, 128, 256, 384), depth=(0, 2, 8, 10)),
    "s": dict(embed_dim=(96, 192, 320, 448), depth=(1, 2, 8, 10)),
    "b": dict(embed_dim=(128, 256, 384, 512), depth=(4, 6, 8, 10)),
}
CONFIG = dict(
    num_classes=1000, input_size=(3, 224, 224), pool_size=(4, 4), crop_pct=0.9, interpolation="bicubic",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classifier=("head.l", "head_dist.l"),
    first_conv="patch_embed.0.c",
)  # fmt: skip


def build(variant: str, distillation: bool, pretrained: bool, kwargs: dict[str, Any]) -> LSNet:
    """An LSNet through timm's builder; `pretrained` reads the checkpoint that timm was told about."""
    settings = {k: v for k, v in kwargs.items() if v is not None and k not in ("drop_path_rate", "drop_rate")}
    settings = dict(pretrained_cfg=CONFIG, distillation=distillation) | VARIANTS[variant] | settings
    return build_model_with_cfg(LSNet, f"lsnet_{variant}", pretrained, **settings)


@register_model
def lsnet_t(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-T: 11.4 M parameters, 0.3 GMAC."""
    return build("t", kwargs.pop("distillation", False), pretrained, kwargs)


@register_model
def lsnet_s(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-S: 16.1 M parameters, 0.5 GMAC."""
    return build("s", kwargs.pop("distillation", False), pretrained, kwargs)


@register_model
def lsnet_b(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-B: 23.2 M parameters, 1.3 GMAC."""
    return build("b", kwargs.pop("distillation", False), pretrained, kwargs)


@register_model
def lsnet_t_distill(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-T with a second, distilled head."""
    return build("t", kwargs.pop("distillation", True), pretrained, kwargs)


# %%
@register_model
def lsnet_s_distill(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-S with a second, distilled head."""
    return build("s", kwargs.pop("distillation", True), pretrained, kwargs)


@register_model
def lsnet_b_distill(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-B with a second, distilled head."""
    return build("b", kwargs.pop("distillation", True), pretrained, kwargs)


# %% [markdown]
# ### Step 7: fold, then count
#
# At inference a BatchNorm is a scale and a shift and folds into the convolution before it. The one after SKA
# stays: nothing before it has weights to fold into. Multiply-adds are counted as the paper does: convolution,
# linear, matrix product, SKA like a 3×3 depthwise convolution, 5 per element of a GroupNorm, 2 per element
# of a BatchNorm that stays, 1 per element of the final mean. torch's FLOP counter supplies the first four;
# the rest is added by hooks.


# %%
def fuse_(model: nn.Module) -> nn.Module:
    """Fold every foldable BatchNorm and merge every RepDW, in place (eval mode only); returns model.

    A second call changes nothing. Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("model: in training mode; accepted: model.eval(), BatchNorm must not move any more")
    for module in model.modules():
        if isinstance(module, ConvBN | RepDW | Head):
            module.fuse_()
    return model


# %%
@torch.no_grad()
def count(model: nn.Module, size: int = 224) -> dict[str, Any]:
    """{params, macs, by_stage, flops} of one square image; flops: torch's own count (2 per multiply-add)."""
    extra = dict.fromkeys([name for name, _ in model.named_children()], 0)

    def hook(part: str, per_element: int) -> Callable:
        def add(module: nn.Module, inputs: Any, output: Any) -> None:
            extra[part] += per_element * output.numel()

        return add

    cost, handles = {nn.GroupNorm: 5, nn.BatchNorm2d: 2, nn.BatchNorm1d: 2}, []
    for name, module in model.named_modules():
        if type(module) in cost:
            handles.append(module.register_forward_hook(hook(name.split(".")[0], cost[type(module)])))
    for part in [part for part in extra if part.startswith("blocks")][-1:]:  # its output is averaged
        handles.append(model.get_submodule(part).register_forward_hook(hook("head", 1)))
    where = next(model.parameters())
    x = torch.zeros(1, 3, size, size, device=where.device, dtype=where.dtype)
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    table, own = counter.get_flop_counts(), type(model).__name__
    stages = {part: sum(table.get(f"{own}.{part}", {}).values()) // 2 + extra[part] for part in extra}
    flops = counter.get_total_flops()
    return dict(
        params=sum(p.numel() for p in model.parameters()), macs=flops // 2 + sum(extra.values()),
        by_stage=stages, flops=flops,
    )  # fmt: skip


# %%
# NBVAL_CHECK_OUTPUT
branch = RepDW(1).double().eval()
with torch.no_grad():
    branch.conv.c.weight.fill_(1)
    branch.conv1.c.weight.fill_(2)
fuse_(branch)
print("merged kernel:", [[f"{v:.3f}" for v in row] for row in branch.conv.c.weight[0, 0].tolist()])
print("bias:", branch.conv.c.bias.item(), " branches left:", branch.conv1)

# %% [markdown]
# :::{dropdown} Where these numbers come from
# A fresh BatchNorm has mean 0 and variance 1, it only multiplies by $1/\sqrt{1+10^{-5}}\approx1.000$. The 1×1
# branch and the identity act on the centre: $1+2+1=4$.
# :::
#
# ### Step 8: other mixers at the same cost
#
# To ask whether LS convolution is *better*, and not only *more*, every other mixer gets the same number of
# multiply-adds: its inner width $h$ is chosen to match. `no_lkp` is LS convolution without the 7×7 look;
# `no_ska` keeps the look and mixes nothing dynamically (the features are projected back); `dw3` and `dw7` are
# depthwise convolutions with a channel MLP (`dw3` is close to RepMixer); `involution` predicts 5×5 kernels
# from the position itself; `window_attn` is attention inside windows of 8×8.


# %%
class WindowAttention(nn.Module):
    """Attention inside window × window squares, (N, dim, H, W); q, k, v have `hidden` channels each."""

    def __init__(self, dim: int, hidden: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.window, self.num_heads = window, num_heads
        self.qkv, self.proj = ConvBN(dim, 3 * hidden), ConvBN(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        s, heads = self.window, self.num_heads
        if h % s or w % s:
            raise ValueError(f"window: {s} does not divide {h} x {w}")
        cut = self.qkv(x).view(n, 3, heads, -1, h // s, s, w // s, s)
        q, k, v = cut.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6).flatten(1, 3)  # (windows, heads, s², d)
        y = F.scaled_dot_product_attention(q, k, v).view(n, h // s, w // s, heads, s, s, -1)
        return self.proj(y.permute(0, 3, 6, 1, 4, 2, 5).reshape(n, -1, h, w))


class Involution(nn.Module):
    """Kernels from the position itself, 16 channels share one: (N, dim, H, W)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.groups = max(1, dim // 16)
        self.reduce, self.span = ConvBN(dim, hidden), nn.Conv2d(hidden, kernel_size**2 * self.groups, 1)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        w = self.span(F.relu(self.reduce(x)))
        return self.bn(ska(x, w.view(len(w), self.groups, -1, *w.shape[2:]).to(x.dtype)))


class NoSKA(nn.Module):
    """LKP's features projected back to dim, nothing mixed dynamically: (N, dim, H, W)."""

    def __init__(self, dim: int, hidden: int, lks: int = 7) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBN(dim, hidden), ConvBN(hidden, hidden, lks, 1, lks // 2, hidden)
        self.cv3, self.cv4 = ConvBN(hidden, hidden), ConvBN(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(F.relu(self.cv3(self.cv2(F.relu(self.cv1(x))))))


# %%
def mixer_macs(kind: str, dim: int, h: int, tokens: int = 64) -> float:
    """Multiply-adds per position of a mixer of inner width h (BatchNorms folded where they can be)."""
    tail = 9 * dim + 5 * 9 * dim / 8 + 2 * dim  # SKA, GroupNorm, BatchNorm
    return {
        "ls": dim * h + 49 * h + h * h + h * 9 * dim / 8 + tail,
        "no_lkp": dim * h + h * h + h * 9 * dim / 8 + tail,
        "no_ska": dim * h + 49 * h + h * h + h * dim,
        "dw3": 9 * dim + 2 * dim * h,
        "dw7": 49 * dim + 2 * dim * h,
        "involution": dim * h + h * 25 * max(1, dim // 16) + 27 * dim,
        "window_attn": 4 * dim * h + 2 * tokens * h,
    }[kind]


def mixer_width(kind: str, dim: int, tokens: int = 64) -> tuple[int, int]:
    """(inner width, heads) at which a mixer costs what LS convolution costs."""
    budget = mixer_macs("ls", dim, dim // 2)
    exact = next(h for h in range(1, 8 * dim) if mixer_macs(kind, dim, h, tokens) > budget)
    for step in (4, 2, 1) if kind == "window_attn" else (1,):
        h = step * max(1, round((exact - 0.5) / step))
        if abs(mixer_macs(kind, dim, h, tokens) / budget - 1) < 0.04:
            break
    return h, step


MIXERS = ("ls", "no_lkp", "no_ska", "dw3", "dw7", "involution", "window_attn")


# %%
def make_mixer(kind: str, dim: int, resolution: int = 8) -> nn.Module:
    """A mixer (N, dim, H, W) -> same, with the multiply-adds of LSConv(dim) within 5 %, residual inside.

    kind: one of MIXERS. resolution: positions per side, for the window. Raises ValueError for another kind.
    """
    if kind not in MIXERS:
        raise ValueError(f"mixer: {kind!r}; accepted: {', '.join(MIXERS)}")
    window = min(8, resolution)
    h, heads = mixer_width(kind, dim, window**2)
    if kind == "ls":
        return LSConv(dim)
    if kind == "no_lkp":
        return LSConv(dim, hidden=h, look=False)
    if kind in ("dw3", "dw7"):
        mlp = nn.Sequential(ConvBN(dim, h), nn.ReLU(), ConvBN(h, dim))
        k = int(kind[2])
        return Residual(nn.Sequential(ConvBN(dim, dim, k, 1, k // 2, dim), mlp))
    made = {"no_ska": NoSKA, "involution": Involution}
    return Residual(WindowAttention(dim, h, window, heads) if kind == "window_attn" else made[kind](dim, h))


# %% tags=["hide-input"]
rows = []
for kind in MIXERS:
    row: dict[str, Any] = {"mixer": kind}
    for dim, resolution in zip(S.net["embed_dim"][:3], (16, 8, 4), strict=True):
        h = mixer_width(kind, dim, min(8, resolution) ** 2)[0]
        row[f"width at C = {dim}"] = h
        cost = mixer_macs(kind, dim, h, min(8, resolution) ** 2)
        row[f"cost at C = {dim}"] = f"{cost / mixer_macs('ls', dim, dim // 2):.3f}"
    rows.append(row)
tables.grid(rows, "Inner widths, and multiply-adds relative to LS convolution.")

# %% [markdown]
# ## Corrections
#
# - Summaries give SKA with *contiguous* channel groups. The official code uses $c \bmod C/8$; shapes agree,
#   and loaded weights give nonsense.
# - Pseudo-code that builds a `Conv2d` inside the function and passes it a `weight` cannot run, and no
#   ordinary convolution could do it: the weights differ from position to position.
# - Often left out: GroupNorm over the predicted kernels (over space too, so that kernels depend on the crop),
#   BatchNorm after SKA, the residual inside, BatchNorm and ReLU inside LKP. There is no softmax.
# - SE and the depthwise convolution do not stand in every block: they alternate with LS convolution. Stage
#   1 of T has no block at all; attention works only in the last stage, on 16 tokens.
# - The 7×7 convolution is no memory problem: it runs on half of the channels at stride 8 or more.
# - The stem has stride 8 and three convolutions. The paper's "1.3 G" of B is the count *before* folding
#   (1.2586 G); folded it is 1.2475 G.
#
# ### The networks against the integers of the official code
#
# The paper prints three digits; the integers here were counted on the official code (the multiply-adds with
# the convention of step 7). Every one of them has to agree.

# %%
INTEGERS = {  # parameters: training, folded, distilled training, distilled folded; multiply-adds; torch FLOPs
    "lsnet_t": (11_409_832, 11_370_488, 11_795_600, 11_755_488, 316_298_816, 631_437_568),
    "lsnet_s": (16_146_304, 16_098_232, 16_596_200, 16_547_232, 538_533_696, 1_075_522_688),
    "lsnet_b": (23_313_608, 23_249_320, 23_827_632, 23_762_320, 1_247_537_984, 2_488_555_520),
}


def check_network(name: str) -> dict[str, Any]:
    """Integers of one network beside the official ones, multiply-adds by stage, and the error of folding."""
    torch.manual_seed(0)
    found, counted = list[int](), dict[str, Any]()
    for kind in (name, f"{name}_distill"):
        with torch.device("meta"):
            model = timm.create_model(kind).eval()
            found.append(sum(p.numel() for p in model.parameters()))
            fuse_(model)
            found.append(sum(p.numel() for p in model.parameters()))
            counted = count(model) if kind == name else counted
    model = randomise_(timm.create_model(name)).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        error = ((fuse_(model)(x) - before).abs().max() / before.abs().max()).item()
    found += [counted["macs"], counted["flops"]]
    return dict(integers=found, wrong=sum(a != b for a, b in zip(found, INTEGERS[name], strict=True)),
                by_stage=counted["by_stage"], fuse_error=error)  # fmt: skip


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    """Random BatchNorm weights and statistics: fresh ones (some zero) would hide errors. Returns model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.0)
            module.bias.uniform_(-0.1, 0.1)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


# %%
checked = {name: tries.unit(check_network, name=name) for name in INTEGERS}
named = ("params", "folded", "distilled", "distilled, folded", "MACs", "torch FLOPs")
done = {name: unit for name, unit in checked.items() if unit.done}
rows = [
    {"network": n} | dict(zip(named, u["integers"], strict=True)) | {"differ": u["wrong"]}
    for n, u in done.items()
]
tables.grid(rows, "Every number is computed; `differ` counts those that are not the official ones.")

# %% tags=["hide-input"]
tables.grid(
    [{"network": n} | {k: f"{v / 1e6:.2f} M" for k, v in u["by_stage"].items()} for n, u in done.items()],
    "Multiply-adds by stage (downsampling belongs to the later one).",
)

# %% [markdown]
# ## Experiment
#
# ### Two small tasks
#
# **D2, neutral.** Two hundred characters in the fonts that come with matplotlib, randomly scaled, turned,
# sheared, coloured and blurred, on crops of photographs. *The test shows held-out font faces on held-out
# photographs.* Nothing in it was made to suit LS convolution; the quality claim is decided here.
#
# **D1, mechanism.** Four rings with a gap, as an optician draws them; a faint arc at the edge, on the
# *opposite* side, says which one counts. The label is its gap, one of eight directions: the fine detail is
# small, what tells where to look is far away. D1 is built in the paper's favour and decides only whether
# both halves of the layer matter.
#
# Images are small, so the third convolution of the stem has no stride (`stem_stride=4`). That is an
# adaptation; sizes and speeds use the unmodified networks at 224 pixels.

# %% tags=["hide-input"]
CHARACTERS = (
    "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnqrtuy123456789ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφψωБДЖИЙЛЦЧШЩЪЫЭЮЯЂЄЉЊЋЏѢЇЎбђ"
    "!#$%&+?@£¥§¶©®±÷¿¤¢€№†‡‰«»=<>{}()[]/ÅÄÆÇÈÉÊËÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãåæçèéêëìíîïñþðŒŁłŠŽČĐħŊŋɐɞɔɘɣɥɯɸʁʃʎʒʔʘʞ"
)[:200]
LETTERS = set("ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnqrtuy123456789")  # what Computer Modern has for certain
FACES = {
    "train": ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic",
              "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10",
              "cmti10"],
    "test": ["DejaVuSans-BoldOblique", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneralItalic",
             "cmb10", "cmtt10"],
}  # fmt: skip


@functools.lru_cache
def glyphs(split: str) -> tuple[Tensor, Tensor]:
    """Characters of the split's font faces, (faces, 200, 32, 32) in 0 … 1, and which exist, (faces, 200)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    masks = np.zeros((len(FACES[split]), len(CHARACTERS), 32, 32), np.uint8)
    there = np.zeros(masks.shape[:2], bool)
    for f, face in enumerate(FACES[split]):
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), 24)
        for c, character in enumerate(CHARACTERS):
            if there_is := not face.startswith("cm") or character in LETTERS:
                image = Image.new("L", (32, 32))
                ImageDraw.Draw(image).text((16, 16), character, 255, font, "mm")
                masks[f, c] = np.asarray(image)
            there[f, c] = there_is
    return torch.from_numpy(masks).float() / 255, torch.from_numpy(there)


def photographs(split: str) -> Tensor:
    """The split's photographs, (count, 3, 192, 192) in 0 … 1."""
    files = sorted(readrun.asset(f"lsnet/photographs/{split}").glob("*.webp"))
    images = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


# %%
def affine_crops(
    images: Tensor, scale: Tensor, angle: Tensor, shear: Tensor, at: Tensor, size: int
) -> Tensor:
    """Sample images (B, C, h, w) at size²: `scale` > 1 makes smaller; at (B, 2) is the centre in -1 … 1."""
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack(
        [torch.stack([cos, -sin + shear * cos], 1), torch.stack([sin, cos + shear * sin], 1)], 1
    )
    theta = torch.cat([rows, at[:, :, None]], 2)
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


# %%
def make_d2(count: int, split: str, size: int, classes: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Characters on photographs: images (count, 3, size, size) uint8, labels (count,) < classes.

    split: "train" or "test" (other font faces, photographs, random numbers). ValueError otherwise.
    """
    if split not in FACES:
        raise ValueError(f"split: {split!r}; accepted: {', '.join(FACES)}")
    rng = torch.Generator(device).manual_seed(2 * seed + (split == "test"))
    masks, there = (t.to(device) for t in glyphs(split))
    photos, images, labels = photographs(split).to(device), [], []
    order = torch.randperm(len(CHARACTERS), generator=torch.Generator().manual_seed(0)).to(device)[:classes]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng, device=device)

    for start in range(0, count, 2048):
        n = min(2048, count - start)
        label = torch.randint(classes, (n,), generator=rng, device=device)
        character = order[label]
        face = torch.multinomial(there.T[character].float(), 1, generator=rng)[:, 0]
        glyph = masks[face, character][:, None]
        scale = uniform(1.1, 1.7, n)
        at = uniform(-0.45, 0.45, n, 2) * (scale - 1)[:, None] * 1.5
        glyph = affine_crops(glyph, scale, uniform(-0.35, 0.35, n), uniform(-0.2, 0.2, n), at, size)
        which = torch.randint(len(photos), (n,), generator=rng, device=device)
        zoom = uniform(0.25, 0.6, n)
        place = uniform(-1, 1, n, 2) * (1 - 1.3 * zoom)[:, None]
        back = affine_crops(photos[which], zoom, uniform(-0.2, 0.2, n), uniform(0, 0, n), place, size)
        level = back.mean((1, 2, 3))
        colour = (
            uniform(0, 0.6, n, 3) + (level < 0.5).float()[:, None] * 0.4
        )  # bright on dark, dark on bright
        opacity = uniform(0.7, 1.0, n)[:, None, None, None] * glyph
        image = back * (1 - opacity) + colour[:, :, None, None] * opacity
        blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
        mix = uniform(0, 1, n)[:, None, None, None]
        images.append((image * (1 - mix) + blurred * mix).mul(255).round().clamp(0, 255).byte())
        labels.append(label)
    return torch.cat(images), torch.cat(labels)


# %%
def make_d1(
    count: int, split: str, size: int, seed: int, device: str, cue: bool = True
) -> tuple[Tensor, Tensor]:
    """Four gapped rings and a cue: images (count, 3, size, size) uint8, labels (count,) = cued gap, 0 … 7.

    The cue, a faint arc at the edge, lies opposite the ring that counts; cue=False leaves it out.
    """
    if split not in FACES:
        raise ValueError(f"split: {split!r}; accepted: {', '.join(FACES)}")
    rng = torch.Generator(device).manual_seed(2 * seed + (split == "test") + 1_000_003)
    line = (torch.arange(size, device=device) + 0.5) * 64 / size - 32  # in 64ths of the image
    y, x = line[:, None], line[None, :]
    images, labels = [], []

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng, device=device)

    def edge(distance: Tensor) -> Tensor:
        return (0.5 - distance * size / 64).clamp(0, 1)  # anti-aliased by about a pixel

    for start in range(0, count, 2048):
        n = min(2048, count - start)
        chosen = torch.randint(4, (n,), generator=rng, device=device)
        gaps = torch.randint(8, (n, 4), generator=rng, device=device)
        ink = torch.zeros(n, size, size, device=device)
        for ring in range(4):
            quarter = math.pi / 4 + ring * math.pi / 2
            cy = 15 * math.sin(quarter) * 1.2 + uniform(-2, 2, n, 1, 1)
            cx = 15 * math.cos(quarter) * 1.2 + uniform(-2, 2, n, 1, 1)
            radius, turn = torch.hypot(y - cy, x - cx), torch.atan2(y - cy, x - cx)
            away = (turn - gaps[:, ring, None, None] * math.pi / 4 + math.pi).remainder(2 * math.pi) - math.pi
            body = edge((radius - 5.5).abs() - 1.6) * (1 - edge(radius * away.abs() - 2.2))
            ink = torch.maximum(ink, body)
        angle = torch.atan2(y, x)[None]
        opposite = (math.pi / 4 + chosen * math.pi / 2 + math.pi)[:, None, None]
        away = (angle - opposite + math.pi).remainder(2 * math.pi) - math.pi
        arc = edge((torch.hypot(y, x)[None] - 29.5).abs() - 1.5) * (away.abs() < math.pi / 6)
        level = uniform(0.3, 0.6, n, 1, 1)
        image = level + 0.35 * ink + (0.12 * arc if cue else 0.0)
        image = image + 0.04 * torch.randn(image.shape, generator=rng, device=device)
        tint = uniform(0.85, 1.0, n, 3, 1, 1)
        images.append((image[:, None] * tint).mul(255).round().clamp(0, 255).byte())
        labels.append(gaps[torch.arange(n, device=device), chosen])
    return torch.cat(images), torch.cat(labels)


# %% tags=["figure", "hide-input"]
rows = [make_d2(8, split, 64, 200, 0, "cpu")[0] for split in ("train", "test")]
rows.append(make_d1(8, "test", 64, 0, "cpu")[0])
sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0).numpy()
media.picture(
    run, "tasks.webp", sheet.repeat(2, 0).repeat(2, 1),
    alt="Three rows of eight small pictures. D2 train and D2 test: one coloured, tilted character on a crop "
    "of a photograph, the test in other fonts on other photographs. D1: four rings, each with a gap in one "
    "of eight directions, and a faint arc at one corner.",
    caption="Rows: D2 train, D2 test, D1, at 64 pixels. In D1 the ring opposite the faint arc counts.",
)  # fmt: skip

# %% [markdown]
# ### Training
#
# Only the mixer changes. Steps, optimiser (AdamW, cosine, learning rate 0.002), data and batches are the same
# for all arms of a seed, and nothing is tuned for an arm.


# %%
def normalise(images: Tensor) -> Tensor:
    """uint8 images as float32 of about zero mean and unit spread."""
    return images.float() / 64 - 2


def batches(images: Tensor, labels: Tensor, batch: int, steps: int, seed: int) -> Any:
    """`steps` batches (images as float, labels), in an order that only the seed decides."""
    rng, epochs = np.random.default_rng(seed), -(-steps * batch // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])[: steps * batch]
    for rows in torch.from_numpy(order).to(images.device).view(steps, batch):  # sent once: no step waits
        yield normalise(images[rows]), labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in eval mode."""
    model.eval()
    with train.autocast(images.device):
        right = [
            (model(normalise(x)).argmax(1) == y).sum()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(r.item() for r in right) / len(labels)


def network_of(arm: str, net: dict, size: int, classes: int) -> LSNet:
    """The small LSNet of an arm: a mixer, or ls_k5 for LS convolution that looks at 5×5."""
    mixer, _, look = arm.partition("_k")
    return LSNet(size, mixer=mixer, lks=int(look or 7), stem_stride=4, num_classes=classes, **net)


# %% [markdown]
# A step of such a small network is about a thousand short kernels, which a host starts more slowly than a GPU
# runs them: `GraphedStep` captures forward, backward and update in one CUDA graph, and replays it.


# %%
def trainer(model: nn.Module, lr: float, steps: int) -> graphed.GraphedStep:
    """Step of AdamW in bf16 autocast (float32 on a CPU), learning rate with warm-up and cosine."""

    def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with train.autocast(images.device):
            return F.cross_entropy(model(images).float(), labels)

    def rate(i: int) -> float:
        return lr * min(1, (i + 1) / max(1, steps // 20)) * (0.5 + 0.5 * math.cos(math.pi * (i / steps)))

    optimizer = graphed.adamw(model.parameters(), 1.0, betas=(0.9, 0.95), weight_decay=0.05)
    return graphed.GraphedStep(model, loss_of, [optimizer], rate, dtype=torch.float32)


# %%
def train_mixer(
    task: str, arm: str, seed: int, net: dict, settings: dict, images: int, steps: int, keep: bool
):
    """Train one arm: {accuracy, loss (curve), params, macs}, with keep also its weights (`state`, half)."""
    where, size = run.device, settings["size"]
    classes = settings["classes"] if task == "d2" else 8
    data = []
    for split, count_ in (("train", images), ("test", settings["test"])):
        more = dict(split=split, size=size, seed=seed, device=where)
        data.append(make_d2(count_, classes=classes, **more) if task == "d2" else make_d1(count_, **more))
    model = network_of(arm, net, size, classes)
    counted = count(model.eval(), size)
    model = model.to(
        where, memory_format=torch.channels_last if where == "cuda" else torch.contiguous_format
    ).train()
    stepper = trainer(model, settings["lr"], steps)
    losses = stepper.fit(batches(*data[0], settings["batch"], steps, seed), f"{task} {arm}")
    found = dict(accuracy=accuracy(model, *data[1]), loss=np.array(losses, np.float32))
    found |= dict(params=counted["params"], macs=counted["macs"])
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    return found | ({"state": state} if keep else {})


# %%
def trainings() -> dict[tuple[str, str, int], Any]:
    """Units of all trainings, the most important arms first."""
    common = dict(net=S.net, settings=S.task)
    d1, plan = [*S.d1, *(f"ls_k{k}" for k in S.kernel_sizes)], list[tuple[str, str, int]]()
    for part in (run.seeds[:3], run.seeds[3:]):  # what is cut short has three seeds of every arm
        for task, arms in (("d2", S.d2[:5]), ("d1", d1), ("d2", S.d2[5:])):
            plan += [(task, arm, s) for arm in arms for s in part]
    size = {"d2": (S.task["train"], S.task["steps"]), "d1": (S.images_d1, S.steps_d1)}
    return {
        (task, arm, s): tries.unit(
            train_mixer, task=task, arm=arm, seed=s, images=size[task][0], steps=size[task][1],
            keep=(task, arm, s) == ("d2", "ls", run.seeds[0]), **common,
        )
        for task, arm, s in plan
    }  # fmt: skip


trained = trainings()

# %% [markdown]
# ### What a trained layer looks like
#
# The first LS convolution of the trained network, applied to a test image: its predicted kernels at every
# position. `look` cuts the trained 7×7 kernel down to its centre: what would it predict if it saw less?


# %%
@torch.no_grad()
def look_inside(base: Any, net: dict, settings: dict, looks: list[int], size: int) -> dict[str, Any]:
    """Kernels w (looks, G, 9, H, W), input and output (looks, H, W) of kernel 0, fixed kernel, image."""
    model = network_of("ls", net, settings["size"], settings["classes"])
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in base["state"].items()})
    model.eval()
    layer = next(m for m in model.modules() if isinstance(m, LSConv))
    fixed = next(m for m in model.modules() if isinstance(m, RepDW)).conv.c.weight[0, 0]
    image = make_d2(3, "test", size, settings["classes"], 0, "cpu")[0][2:]
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.blocks3(model.blocks2(model.blocks1(model.patch_embed(normalise(image)))))
    handle.remove()
    whole, kernels, outputs = layer.lkp.cv2.c.weight.clone(), [], []
    for look in looks:
        mask, cut = torch.zeros_like(whole), (7 - look) // 2
        mask[:, :, cut : 7 - cut, cut : 7 - cut] = 1
        layer.lkp.cv2.c.weight.copy_(whole * mask)
        w = layer.lkp(seen[0])
        kernels.append(w[0])
        outputs.append(ska(seen[0], w)[0, :: w.shape[1]].mean(0))  # the eight channels of kernel 0
    return dict(
        kernels=torch.stack(kernels).numpy().astype(np.float16), outputs=torch.stack(outputs).numpy(),
        inputs=seen[0][0, :: w.shape[1]].mean(0).numpy(), fixed=fixed.numpy(),
        image=image[0].permute(1, 2, 0).numpy(),
    )  # fmt: skip


inside = tries.unit(
    look_inside, base=trained["d2", "ls", run.seeds[0]], net=S.net, settings=S.task, looks=S.look_sizes,
    size=64 if run.profile == "gpu" else 128,
)  # fmt: skip

# %% [markdown]
# ### The operator, measured
#
# First: is it right, on this machine, at every shape of the three networks, in the layouts and dtypes in use?
# Fresh random inputs against the reference in float64. On a machine without a GPU this tests the reference
# path.


# %%
def ska_shapes() -> list[tuple[int, int]]:
    """(channels, positions per side) of every LS convolution of T, S and B at 224 pixels."""
    found = {
        (dim, size)
        for v in VARIANTS.values()
        for dim, size, blocks in zip(v["embed_dim"][:3], (28, 14, 7), v["depth"][:3], strict=True)
        if blocks > 1
    }
    return sorted(found)


# %%
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def ska_error(x: Tensor, w: Tensor, dtype: torch.dtype, tiles: dict | None = None) -> float:
    """Worst error of output and gradients, relative to the largest entry and the dtype's tolerance.

    tiles: of the kernels of `kernels_of`; None: through the operator and autograd.
    """
    x, w = x.to(dtype), w.to(dtype)
    g = torch.randn_like(x)
    rounded = [t.detach().double() for t in (x, w, g)]
    k = math.isqrt(w.shape[2])
    if tiles is None:
        a, b = x.requires_grad_(), w.requires_grad_()
        y = ska(a, b)
        found = [y, *torch.autograd.grad(y, (a, b), g)]
    else:
        found = [call(x, w, g, tile=tiles[name]) for name, call in kernels_of(x, w).items()]
    wanted = [ska_reference(*rounded[:2]), ska_grad_x(rounded[2], rounded[1]),
              ska_grad_w(rounded[2], rounded[0], w.shape[1], k)]  # fmt: skip
    errors = [(f.double() - t).abs().max() / t.abs().max() for f, t in zip(found, wanted, strict=True)]
    return max(e.item() for e in errors) / TOLERANCES[dtype]


def check_kernels(shapes: list, images: int) -> dict[str, Any]:
    """{worst, errors}: `ska_error` for every shape and each dtype and layout in use, fresh inputs."""
    errors = {}
    used = [(torch.float32, "nchw"), (torch.bfloat16, "nchw"), (torch.bfloat16, "nhwc")]
    for channels, size in shapes:
        for dtype, layout in used + [(torch.float16, "nchw")] * (channels == shapes[0][0]):
            x, w = ska_inputs(channels, size, images, torch.float32, layout, run.device)
            errors[f"{channels}x{size} {str(dtype)[6:]} {layout}"] = ska_error(x, w, dtype)
    return dict(
        worst=max(errors.values()), errors=errors, kernels=run.device == "cuda" and triton is not None
    )


# %%
def ska_inputs(
    channels: int, size: int, images: int, dtype: Any, layout: str, device: str
) -> tuple[Tensor, Tensor]:
    """Random x (images, channels, size, size) and w (images, channels / 8, 9, size, size) in a layout."""
    last = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(images, channels, size, size, device=device).to(dtype, memory_format=last)
    return x, empty_kernels(x, channels // 8, 9).normal_()


kernel_check = tries.unit(
    check_kernels,
    shapes=ska_shapes() if run.profile != "smoke" else [[24, 5]],
    images=4 if run.profile == "gpu" else 2,
)


# %% [markdown]
# Second, under `compute-sanitizer`, where there is one: does any kernel touch memory that is not its own?


# %%
def exercise_kernels(device: str) -> None:
    """Run every kernel on odd shapes, tiles and layouts; for the sanitizer."""
    for channels, size, layout in ((24, 5, "nchw"), (40, 7, "nhwc"), (16, 1, "nchw")):
        x, w = ska_inputs(channels, size, 3, torch.float16, layout, device)
        for tile in TILES[layout][:2]:
            triton_ska(x, w, tile), triton_grad_x(x, w, tile), triton_grad_w(x, x, w.shape[1], 3, tile)
    torch.cuda.synchronize()


def sanitize_kernels() -> dict[str, Any]:
    """{errors, why} of `sanitizer.sanitize` for `exercise_kernels`."""
    code = "import readrun; readrun.chapter('lsnet').exercise_kernels('cuda')"
    return sanitizer.sanitize(code, run.device)


# %% [markdown]
# Third: which tile? Each is timed on inputs of its own (a tuning run); the choice is then compared with
# float64 and timed again, on other inputs. A call takes 10 to 100 µs, less than a host needs to start it: so
# some twenty calls on rotating inputs are captured in one CUDA graph, and its replays are timed, of every
# form alike. The peers are the unfold reference and `torch.compile` of the *shift-and-add* form, the best
# that one would write without a kernel: nine slices of the padded input, multiplied and added.


# %%
def shift_and_add(x: Tensor, w: Tensor) -> Tensor:
    """SKA as K² multiplied slices of the padded input, for `torch.compile`: same arguments as `ska`."""
    (c, h, width), k = x.shape[1:], math.isqrt(w.shape[2])
    padded = F.pad(x, (k // 2,) * 4)
    taps = w[:, None].expand(-1, c // w.shape[1], -1, -1, -1, -1).flatten(1, 2)  # (N, C, K², H, W)
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for a in range(k):
        for b in range(k):
            total = total + padded[:, :, a : a + h, b : b + width].to(total.dtype) * taps[:, :, k * a + b]
    return total.to(x.dtype)


def kernels_of(x: Tensor, w: Tensor) -> dict[str, Callable]:
    """The three kernels of SKA at these tensors, each a function of (x, w, g, tile)."""
    groups, k = w.shape[1], math.isqrt(w.shape[2])
    return {
        "triton": lambda x, w, g, tile: triton_ska(x, w, tile),
        "grad_x": lambda x, w, g, tile: triton_grad_x(g, w, tile),
        "grad_w": lambda x, w, g, tile: triton_grad_w(g, x, groups, k, tile),
    }


def tune_tiles(shape: list[int], batch: int) -> dict[str, Any]:
    """{ms: {"layout kernel tile": milliseconds}, best: {layout: {kernel: tile}}} at one shape, bf16."""
    found, best = dict[str, float](), dict[str, dict]()
    for layout, tiles in TILES.items() if run.device == "cuda" else ():
        x, w = ska_inputs(*shape, batch, torch.bfloat16, layout, run.device)
        rotated = bench.rotate(x, w, torch.randn_like(x))
        for kernel, call in kernels_of(x, w).items():
            for tile in tiles:
                call_it = functools.partial(call, tile=tile)
                found[f"{layout} {kernel} {tile}"] = replay.time(call_it, inputs=rotated).median_ms
            ms = {tile: found[f"{layout} {kernel} {tile}"] for tile in tiles}
            best.setdefault(layout, {})[kernel] = list(min(ms, key=ms.__getitem__))
    return dict(ms=found, best=best)


# %%
def samples(call: Callable, inputs: list, repeats: int) -> np.ndarray:
    """Milliseconds over rotating inputs: 3 medians of a tenth of `repeats`, at least of 3.

    On a GPU 10 medians of a twentieth of `repeats` replays, divided by the calls in one.
    """
    if run.device != "cuda":
        how = dict(inputs=inputs, warmup=1, repeat=max(3, repeats // 10))
        return np.array([bench.time(call, **how).median_ms for _ in range(3)])
    many, count_ = replay.together(call, inputs)
    how = dict(warmup=1, repeat=max(3, repeats // 20))
    return np.array([bench.time(many, **how).median_ms for _ in range(10)]) / count_


# %%
def bench_ska(shape: list[int], tiles: Any, ska_settings: dict) -> dict[str, Any]:
    """Times (10 medians each, ms) in the better layout, copy GB/s, GB moved, extra memory, error."""
    cuda, batch, repeats = run.device == "cuda", ska_settings["batch"], ska_settings["repeats"]
    dtype = torch.bfloat16 if cuda else torch.float32
    times, extra, error = dict[str, dict[str, np.ndarray]](), 0.0, 0.0
    for layout in ("nchw", "nhwc"):
        x, w = ska_inputs(*shape, batch, dtype, layout, run.device)
        rotated = bench.rotate(x, w, torch.randn_like(x))
        calls: dict[str, Callable] = {"reference": lambda x, w, g: ska_reference(x, w)}
        if cuda:
            fast = torch.compile(shift_and_add, dynamic=False)
            calls["compiled"] = lambda x, w, g: fast(x, w)  # noqa: B023
            tile = tiles["best"][layout]
            few = ska_inputs(*shape, 4, torch.float32, layout, run.device)
            error = max(error, ska_error(*few, dtype, tile))  # what is timed is what is right
            calls |= {n: functools.partial(f, tile=tile[n]) for n, f in kernels_of(x, w).items()}
        else:
            calls["triton"] = lambda x, w, g: ska(x, w)
            calls["grad_x"] = lambda x, w, g: ska_grad_x(g, w)
            calls["grad_w"] = lambda x, w, g: ska_grad_w(g, x, w.shape[1], 3)
        for name, call in calls.items():
            times.setdefault(name, {})[layout] = samples(call, rotated, repeats)
        one = functools.partial(calls["triton"], *rotated[0])
        extra = max(extra, bench.peak_memory(one, run.device) / x.nbytes)
        del rotated, one
    copy = bench.ceilings(run.device, dtype, **({} if cuda else dict(elements=2**22, size=64)))["copy_gb_s"]
    out = dict(copy=copy, forward_gb=3.125 * x.nbytes / 1e9, train_gb=8.375 * x.nbytes / 1e9, extra=extra)
    out |= dict(kernels=cuda, error=error)
    for name, per in times.items():  # each in its better layout
        out[name] = min(per.values(), key=np.median)
        out |= {f"{name}__{layout}": values for layout, values in per.items()}
    train_ms = {y: times["triton"][y] + times["grad_x"][y] + times["grad_w"][y] for y in ("nchw", "nhwc")}
    return out | dict(train=min(train_ms.values(), key=np.median))


# %%
tuned = {n: tries.unit(tune_tiles, shape=shape, batch=S.ska["batch"]) for n, shape in S.ska["shapes"].items()}
timed = {
    n: tries.unit(
        bench_ska, shape=shape, tiles=tuned[n], ska_settings={k: S.ska[k] for k in ("batch", "repeats")}
    )
    for n, shape in S.ska["shapes"].items()
}

# %% [markdown]
# ### Whole networks
#
# `throughput` is the paper's measurement: random weights, BatchNorm folded, images per second at the largest
# power-of-two batch that fits. timm supplies the peers, and folds them where it can
# (`reparameterize_model`); other pairs of convolution and BatchNorm are folded here, and kept only if the
# output stays the same.


# %%
def fold_pairs_(model: nn.Module) -> int:
    """Fold adjacent (Conv2d, BatchNorm) children, in place; returns how many. Adjacent is no proof: check."""
    folded = 0
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, bn) in zip(children, children[1:], strict=False):
            if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d):
                continue
            if conv.out_channels != bn.num_features:
                continue
            weight, bias = fused_pair(conv, bn)
            conv.weight.data, conv.bias = weight.data, nn.Parameter(bias.data)
            setattr(parent, name, getattr(bn, "act", None) or nn.Identity())  # timm's BatchNormAct2d
            folded += 1
    return folded


@torch.no_grad()
def ready_for_inference(name: str, size: int, device: str) -> tuple[nn.Module, bool]:
    """(model with random weights, folded; whether all that could be folded was). Outputs are compared."""
    torch.manual_seed(0)
    more = dict(img_size=size) if name.startswith(("lsnet", "efficientvit_m")) and size != 224 else {}
    model = randomise_(timm.create_model(name, **more)).eval().to(device)
    x = torch.randn(2, 3, size, size, device=device)
    before = model(x)
    ours = isinstance(model, LSNet)
    plain = fuse_(model) if ours else timm.utils.reparameterize_model(model)
    if ours:
        return plain, True
    copied = timm.utils.reparameterize_model(model)
    fold_pairs_(copied)
    same = (copied(x) - before).abs().max() <= 2e-2 * before.abs().max()  # TF32 rounds at 1e-3
    return (copied, True) if same else (plain, False)


# %%
def traffic(model: nn.Module, x: Tensor) -> float:
    """Bytes that the leaf layers read and write per image: inputs, outputs, and (per batch) weights."""
    moved = [sum(p.nbytes for p in model.parameters()) / len(x)]

    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        moved[0] += sum(t.nbytes for t in tensors) / len(x)

    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    handles = [m.register_forward_hook(add) for m in leaves]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return moved[0]


def each_ms(call: Callable, repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of every one of `repeats` calls, by events on a GPU."""
    if device.type != "cuda":
        return [bench.time(call, warmup=1, repeat=3, device=device).median_ms for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


# %%
@torch.no_grad()
def throughput(
    model: nn.Module, batch: int, dtype: torch.dtype = torch.float32, layout: str = "nchw",
    compiled: bool = False, size: int = 224, repeats: int = 10, warmup: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Images per second of inference: {images_s: median, samples: (repeats,), gb_s, batch}.

    The batch is halved until it fits into memory. gb_s: bytes of `traffic` per second. Raises ValueError for
    an unknown layout.
    """
    if layout not in ("nchw", "nhwc"):
        raise ValueError(f"layout: {layout!r}; accepted: nchw, nhwc")
    device = next(model.parameters()).device
    last = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = model.to(dtype).to(memory_format=last).eval()
    bytes_per_image = traffic(
        model, torch.randn(2, 3, size, size, device=device).to(dtype, memory_format=last)
    )
    call = torch.compile(model) if compiled else model
    while True:
        try:
            x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=last)
            for _ in range(warmup):
                call(x)
            ms = each_ms(functools.partial(call, x), repeats, device)  # a batch is far larger than the L2
            break
        except RuntimeError as error:  # out of memory, or more elements than a library can index
            if batch == 1 or (compiled and not isinstance(error, torch.OutOfMemoryError)):
                raise  # what does not compile does not compile for smaller batches either
        x = None  # here, where no traceback holds tensors any more
        torch.cuda.empty_cache()
        batch //= 2
    speed = 1e3 * batch / np.array(ms)
    return dict(images_s=float(np.median(speed)), samples=speed, batch=batch,
                gb_s=float(np.median(speed)) * bytes_per_image / 1e9)  # fmt: skip


# %%
def bench_network(name: str, protocol: str, speed: dict) -> dict[str, Any]:
    """One network in protocol a (float32, eager), b (bf16, better layout, eager) or compiled (b, compiled).

    {samples (img/s), batch, layout, gb_s, folded}.
    """
    cuda = run.device == "cuda"
    dtype = torch.float32 if protocol == "a" or not cuda else torch.bfloat16
    batch = speed["max_batch" if protocol == "a" else "modern_batch"]
    options = dict(batch=batch, dtype=dtype, size=speed["size"], repeats=speed["repeats"],
                   warmup=speed["warmup"], compiled=protocol == "compiled")  # fmt: skip
    best: dict[str, Any] = {}
    model, folded = ready_for_inference(name, speed["size"], run.device)
    layouts = {"a": ["nchw"], "b": ["nchw", "nhwc"], "compiled": ["nhwc"]}[protocol]
    # cuDNN chooses by its heuristics: to try each algorithm at each shape takes minutes for twenty networks
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        for layout in layouts:
            found = throughput(model, layout=layout, **options) | dict(layout=layout, folded=folded)
            best = max(best, found, key=lambda row: row.get("images_s", 0))
    return best


# %% tags=["hide-input"]
wanted = dict(a=S.models, b=S.modern, compiled=S.compiled)
nets = {
    (protocol, name): tries.unit(bench_network, name=name, protocol=protocol, speed=S.speed)
    for protocol, names in wanted.items()
    for name in (EVERY if names == "all twenty" else names)
}

# %% [markdown]
# Where does LSNet-T's time go, and what do our gradients save in training?


# %%
@torch.no_grad()
def profile_ops(name: str, speed: dict) -> dict[str, Any]:
    """{share: {operator: share of the time}, ska: share of our kernels (None on a CPU)}, protocol B."""
    from torch.profiler import ProfilerActivity, profile

    cuda = run.device == "cuda"
    model, _ = ready_for_inference(name, speed["size"], run.device)
    last = torch.channels_last if cuda else torch.contiguous_format
    dtype = torch.bfloat16 if cuda else torch.float32
    model = model.to(dtype).to(memory_format=last)
    x = torch.randn(min(speed["max_batch"], 1024), 3, speed["size"], speed["size"], device=run.device)
    x = x.to(dtype, memory_format=last)
    model(x), model(x)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as recorded:
        model(x)
    spent = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in recorded.key_averages()
        if event.key.startswith(("aten::", f"{SPACE}::"))
    }
    total = sum(spent.values()) or 1.0
    on_device = {
        event.key: event.self_device_time_total
        for event in recorded.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    ours = sum(time for kernel, time in on_device.items() if kernel.startswith("ska_"))
    return dict(
        share={key: value / total for key, value in sorted(spent.items(), key=lambda kv: -kv[1])},
        ska=ours / sum(on_device.values()) if on_device else None,
    )  # fmt: skip


# %%
def training_step(batch: int, speed: dict) -> dict[str, Any]:
    """Milliseconds (5 samples) of forward and backward of LSNet-T: {triton, reference} for SKA."""
    cuda = run.device == "cuda"
    out: dict[str, Any] = dict(kernels=cuda)
    for name, mix in (("triton", ska), ("reference", ska_reference)):
        model = timm.create_model("lsnet_t", img_size=speed["size"]).to(run.device).train()
        for module in model.modules():
            if isinstance(module, LSConv):
                module.mix = mix
        model = model.to(memory_format=torch.channels_last) if cuda else model
        x = torch.randn(batch, 3, speed["size"], speed["size"], device=run.device)
        x = x.contiguous(memory_format=torch.channels_last) if cuda else x

        def step() -> None:
            with train.autocast(run.device):
                loss = model(x).float().logsumexp(1).mean()  # noqa: B023
            loss.backward()
            model.zero_grad(set_to_none=True)  # noqa: B023

        out[name] = np.array(
            [
                bench.time(step, warmup=1, repeat=3, device=run.device).median_ms
                for _ in range(5 if cuda else 1)
            ]
        )
    return out


shares = tries.unit(profile_ops, name="lsnet_t", speed=S.speed)
stepped = tries.unit(training_step, batch=S.ska["train_batch"], speed=S.speed)
sanitized = tries.unit(sanitize_kernels)
if sanitized.done:
    print("compute-sanitizer:", sanitized["why"] or f"{sanitized['errors']} errors")
tries.check()

# %% [markdown]
# ### Results of this run
#
# All measurements in one place, with the verdicts that follow from them. One metric is derived: the rank
# correlation with the paper's speeds.

# %% tags=["hide-input"]
PAPER_SPEED = {  # model: (GMAC, images per second on an RTX 3090, top-1), as the paper prints them
    "lsnet_t": (0.3, 14708, 74.9), "edgenext_xx_small": (0.3, 5089, 71.2), "fasternet_t0": (0.3, 14467, 71.9),
    "efficientvit_m3": (0.3, 14613, 73.4), "starnet_s1": (0.4, 5034, 73.5), "lsnet_s": (0.5, 9023, 77.8),
    "mobilenetv3_large_100": (0.2, 7921, 75.2), "fastvit_t8": (0.7, 3909, 75.6),
    "efficientformerv2_s0": (0.4, 1329, 75.7), "efficientnet_b0": (0.4, 4481, 77.1),
    "fasternet_t1": (0.9, 8660, 76.2), "poolformer_s12": (1.8, 2769, 77.2), "shvit_s3": (0.6, 8993, 77.4),
    "repvit_m0_9": (0.8, 4817, 77.4), "lsnet_b": (1.3, 3996, 80.3), "swiftformer_s": (1.0, 3376, 78.5),
    "fastvit_t12": (1.4, 2586, 79.1), "efficientformer_l1": (1.3, 3280, 79.2),
    "edgenext_small": (1.3, 2128, 79.4), "repvit_m1_1": (1.3, 3604, 79.4),
}  # fmt: skip


def rank_correlation(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """Spearman correlation of median throughput with the paper's, over the models that were measured."""
    out = {}
    for protocol in ("a", "b"):
        found = metrics.get(f"throughput_{protocol}", {})
        names = [name for name in PAPER_SPEED if name in found]
        if len(names) >= 3:
            ours = [float(np.median(found[name])) for name in names]
            rho = scipy.stats.spearmanr(ours, [PAPER_SPEED[name][1] for name in names]).statistic
            out[f"protocol_{protocol}"] = [float(rho)]
    return out


# %% tags=["hide-input"]
def gather() -> tuple[dict, dict]:
    """(metrics, arrays) of everything that this run measured."""
    metrics, arrays = dict[str, dict](), dict[str, Any]()
    exact = [unit for unit in checked.values() if unit.done]
    if len(exact) == len(INTEGERS):
        metrics["integers_wrong"] = {"lsnet": [sum(unit["wrong"] for unit in exact)]}
        metrics["fuse_error"] = {"lsnet": [unit["fuse_error"] for unit in exact]}
    for (task, arm, s), unit in trained.items():
        if unit.done:
            metrics.setdefault(f"{task}_accuracy", {}).setdefault(arm, {})[s] = unit["accuracy"]
            name = f"curve/{task}/{arm}"
            curve = unit["loss"][None].astype(np.float16)
            arrays[name] = np.concatenate([arrays[name], curve]) if name in arrays else curve
            arrays[f"size/{task}/{arm}"] = np.array([unit["params"], unit["macs"]])
    if inside.done:
        arrays |= {f"inside/{key}": value for key, value in inside.items()}
    for (protocol, name), unit in nets.items():
        if unit.done:
            metrics.setdefault(f"throughput_{protocol}", {})[name] = unit["samples"].tolist()
            if name == "lsnet_t":  # the same network in each protocol
                metrics.setdefault("lsnet_t_images_s", {})[protocol] = unit["samples"].tolist()
            arrays[f"net/{protocol}/{name}"] = np.array([unit["batch"], unit["gb_s"], unit["folded"]])
            arrays[f"layout/{protocol}/{name}"] = np.array(unit["layout"])
    gather_kernels(metrics, arrays)
    return metrics, arrays


# %% tags=["hide-input"]
def gather_kernels(metrics: dict, arrays: dict) -> None:
    """Add what was measured of SKA."""
    if kernel_check.done:
        arm = "triton" if kernel_check["kernels"] else "reference_path"
        worst = [kernel_check["worst"], *(unit["error"] for unit in timed.values() if unit.done)]
        metrics["ska_error_over_tolerance"] = {arm: [max(worst)]}
    if sanitized.done and sanitized["errors"] is not None:
        metrics["sanitizer_errors"] = {"triton": [sanitized["errors"]]}
    for name, unit in timed.items():
        if unit.done:
            arrays |= {
                f"ska/{name}/{k}": np.asarray(v)
                for k, v in unit.items()
                if k not in ("extra", "kernels", "error")
            }
        if unit.done and unit["kernels"]:  # on a CPU there is no kernel to judge
            for fraction, ms, gb in (("forward", "triton", "forward_gb"), ("train", "train", "train_gb")):
                reached = 1e3 * unit[gb] / unit[ms] / unit["copy"]
                metrics.setdefault(f"ska_{fraction}_fraction", {})[name] = reached.tolist()
            for arm in ("triton", "reference", "compiled"):
                metrics.setdefault("ska_forward_ms", {})[f"{arm}_{name}"] = unit[arm].tolist()
            worst = max([unit["extra"], *metrics.get("ska_extra_memory", {}).get("triton", [])])
            metrics["ska_extra_memory"] = {"triton": [worst]}
        if tuned[name].done and tuned[name]["ms"]:
            table = tuned[name]["ms"]
            arrays[f"tiles/{name}/what"] = np.array(list(table))
            arrays[f"tiles/{name}/ms"] = np.array(list(table.values()))
    if shares.done:
        if shares["ska"] is not None:
            metrics["ska_share"] = {"lsnet_t": [shares["ska"]]}
        arrays["share/what"] = np.array(list(shares["share"])[:10])
        arrays["share/part"] = np.array(list(shares["share"].values())[:10])
    if stepped.done and stepped["kernels"]:
        metrics["training_step_ms"] = {arm: stepped[arm].tolist() for arm in ("triton", "reference")}


metrics, arrays = gather()
here = run.results(metrics=metrics, arrays=arrays)
book = run.recorded()
shown = book or here  # what the GPU figures show

# %% tags=["figure", "hide-input"]
STYLE = plots.arms(["ls", "dw3", "window_attn", "involution", "dw7", "no_ska", "no_lkp"])


def draw_accuracy(results):
    """Top-1 by arm with the 95 % t interval over seeds, D2 and D1."""
    tasks = [task for task in ("d2", "d1") if f"{task}_accuracy" in results.metrics] or ["d2"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.2), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        found = results.metrics.get(f"{task}_accuracy", {})
        order = [arm for arm in (*STYLE, "ls_k3", "ls_k5", "ls_k9") if arm in found]
        for i, arm in enumerate(order):
            values = 100 * np.array(found[arm])
            colour = STYLE.get(arm, STYLE["ls"])["color"]
            ax.barh(i, values.mean(), xerr=plots.t_half(values) or None, color=colour, alpha=0.5, capsize=3)
            ax.plot(values, np.full(len(values), i), "o", markersize=3, color=colour)
        ax.set_yticks(range(len(order)), order)
        ax.invert_yaxis()
        plots.label(ax, "top-1 accuracy (%)", "mixer" if task == "d2" else " ", task.upper())
    return figure


ACCURACY_ALT = (
    "Bars of top-1 accuracy by token mixer at equal multiply-adds, dots are seeds. D2: characters on "
    "photographs. D1, where it was run: the cued ring, with the ablations of LS convolution and its sizes."
)
plots.show(draw_accuracy(here), alt=ACCURACY_ALT, caption=f"This run (profile {here.profile}). Dots: seeds.")

# %% [markdown]
# How far does the gradient of one output position reach? At initialisation, one mixer each, on random
# inputs: LS convolution depends on 7×7 positions, though it mixes 3×3. The bright centre is the mixing, the
# halo around it the looking; the faint rest comes through GroupNorm, whose statistics see the whole map.


# %% tags=["hide-input"]
def effective_field(kind: str, dim: int = 32, resolution: int = 16, images: int = 8) -> np.ndarray:
    """Mean |d centre output / d input|, (resolution, resolution), of a fresh mixer, largest entry 1."""
    torch.manual_seed(0)
    mixer = randomise_(make_mixer(kind, dim, resolution)).eval()
    x = torch.randn(images, dim, resolution, resolution, requires_grad=True)
    at = resolution // 2
    (grad,) = torch.autograd.grad(mixer(x)[:, :, at, at].pow(2).sum(), x)
    field = grad.abs().mean((0, 1)).numpy()
    return field / field.max()


# %% tags=["figure", "hide-input"]
figure, axes = plt.subplots(1, 4, figsize=(8.4, 2.5))
for ax, kind in zip(axes, ("ls", "dw3", "dw7", "window_attn"), strict=True):
    picture = ax.imshow(np.log10(effective_field(kind) + 1e-4), vmin=-4, vmax=0, cmap="cividis")
    plots.label(ax, "column", "row" if kind == "ls" else " ", kind)
    ax.grid(False)
figure.colorbar(picture, ax=axes, label="log10 of |gradient| (1)", shrink=0.8)
plots.show(
    figure,
    alt="Four heat maps of the gradient of the centre output with respect to the input. LS convolution: a "
    "bright 3 by 3 centre in a dimmer 7 by 7 square. dw3: only 3 by 3. dw7: an even 7 by 7. Window "
    "attention: the whole 8 by 8 window, dim, with a bright centre.",
    caption="Effective receptive field of one fresh mixer.",
)


# %% tags=["figure", "hide-input"]
def draw_kernels(results):
    """The image, predicted kernels at six positions, and the fixed kernel of a depthwise convolution."""
    image, kernels = results.arrays["inside/image"], results.arrays["inside/kernels"][-1]
    size, figure = kernels.shape[-1], plt.figure(figsize=(8.4, 2.6))
    grid = figure.add_gridspec(2, 6)
    ax = figure.add_subplot(grid[:, :2])
    ax.imshow(image, extent=(-0.5, size - 0.5, size - 0.5, -0.5))
    spots = [(i, j) for i in (size // 4, 3 * size // 4) for j in (size // 4, size // 2, 3 * size // 4)]
    limit = np.abs(kernels[0].astype(float)).max()
    for n, (i, j) in enumerate(spots):
        ax.text(
            j, i, str(n + 1), color="white", ha="center", va="center", bbox=dict(facecolor="black", pad=1.5)
        )
        small = figure.add_subplot(grid[n // 3, 2 + n % 3])
        small.imshow(kernels[0, :, i, j].reshape(3, 3).astype(float), cmap="PuOr", vmin=-limit, vmax=limit)
        small.set(title=str(n + 1), xticks=[], yticks=[])
        small.grid(False)
    plots.label(ax, "column (positions)", "row (positions)")
    ax.grid(False)
    fixed = figure.add_subplot(grid[:, 5])
    kernel = results.arrays["inside/fixed"].astype(float)
    fixed.imshow(kernel, cmap="PuOr", vmin=-np.abs(kernel).max(), vmax=np.abs(kernel).max())
    fixed.set(title="fixed", xticks=[], yticks=[])
    fixed.grid(False)
    return figure


if "inside/image" in here.arrays:
    plots.show(
        draw_kernels(here),
        alt="A test image with six numbered positions; the 3 by 3 kernel predicted at each, which differ "
        "from each other; and the one fixed kernel of a depthwise convolution of the same network.",
        caption="Kernel 0 of the first LS convolution at six positions; a depthwise kernel is fixed.",
    )

# %% [markdown]
# ## GPU experiment

# %% tags=["hide-input"]
tables.provenance(book) if book else print(
    "The GPU run is not recorded yet; below is what this machine measured."
)

# %% tags=["figure", "hide-input"]
if book:
    plots.show(
        draw_accuracy(book),
        alt=f"Recorded run. {ACCURACY_ALT}",
        caption=f"Profile {book.profile}; bars: 95 % over seeds.",
    )

# %% [markdown]
# ### The operator against the limits
#
# The limit is the copy bandwidth of the same card, measured in the same unit. The reference moves each input
# nine times, the compiled shift-and-add once or twice.


# %% tags=["hide-input"]
def ska_rows(results) -> list[dict]:
    """Achieved, limit and peer of SKA at every shape that was measured."""
    rows, a = [], results.arrays
    for name in [n for n in ("b28", "b14", "b7") if f"ska/{n}/copy" in a]:
        limit, peer = float(a[f"ska/{name}/copy"]), float(np.median(a[f"ska/{name}/reference"]))
        gb = float(a[f"ska/{name}/forward_gb"])
        for arm in ("triton", "compiled", "reference"):
            if f"ska/{name}/{arm}" in a:
                ms = float(np.median(a[f"ska/{name}/{arm}"]))
                arm = "ska" if arm == "triton" else arm
                rows.append(
                    bench.row(
                        f"{name} forward, {arm}", ms, "GB/s", work=gb, limit=limit, peer=1e3 * gb / peer
                    )
                )
        ms, total = float(np.median(a[f"ska/{name}/train"])), float(a[f"ska/{name}/train_gb"])
        rows.append(bench.row(f"{name} forward + backward, ska", ms, "GB/s", work=total, limit=limit))
    return rows


told = "Per shape. On a CPU, 'ska' is the operator's reference path, not the kernel."
tables.grid(ska_rows(shown), told)


# %% tags=["figure", "hide-input"]
def draw_roofline(results):
    """GB/s of SKA forward per shape and form, beside copy bandwidth."""
    figure, ax = plt.subplots(figsize=(7.2, 3.2))
    rows = [r for r in ska_rows(results) if "backward" not in r["name"]]
    forms = plots.arms(["ska", "reference", "compiled"])
    for i, row in enumerate(rows):
        form = row["name"].split(", ")[1]
        ax.barh(i, row["achieved"], color=forms[form]["color"], alpha=0.7)
    ax.set_yticks(range(len(rows)), [r["name"] for r in rows])
    ax.invert_yaxis()
    if rows:
        ax.axvline(rows[0]["limit"], color="#555555", linestyle="--", label="measured copy bandwidth")
        ax.legend()
    plots.label(ax, "least bytes / time (GB/s)", "shape, form")
    return figure


if any(key.endswith("/compiled") for key in shown.arrays):  # on a CPU there are no kernels
    plots.show(
        draw_roofline(shown),
        alt="Bars of achieved bandwidth of SKA forward at each shape: the kernel, the compiled shift-and-add "
        "and the unfold reference, beside a line at the measured copy bandwidth.",
        caption=f"SKA roofline, profile {shown.profile}.",
    )


# %% tags=["hide-input"]
def tile_rows(results) -> list[dict]:
    """Milliseconds of every tile that was tried, a column per shape."""
    rows: dict[str, dict] = {}
    for name in ("b28", "b14", "b7"):
        if f"tiles/{name}/what" in results.arrays:
            pairs = zip(results.arrays[f"tiles/{name}/what"], results.arrays[f"tiles/{name}/ms"], strict=True)
            for what, ms in pairs:
                rows.setdefault(str(what), {"layout, kernel, tile": str(what)})[f"{name} (ms)"] = float(ms)
    return list(rows.values()) or [{"layout, kernel, tile": "tiles are tuned on a GPU only"}]


tables.grid(tile_rows(shown), "Tiles: (positions, kernels, VEC, warps).")


# %% tags=["figure", "hide-input"]
def draw_speed(results):
    """Images per second against GMAC: protocols A and B of these results, hollow: the paper's RTX 3090."""
    figure, ax = plt.subplots(figsize=(8.4, 4.4))
    for i, (protocol, mark) in enumerate((("a", "o"), ("b", "^"), ("compiled", "s"))):
        found = results.metrics.get(f"throughput_{protocol}", {})
        for name, values in found.items():
            ours = name.startswith("lsnet")
            ax.plot(
                PAPER_SPEED[name][0],
                np.median(values),
                mark,
                color=plots.PALETTE[0 if ours else 6],
                alpha=0.8,
            )
            if protocol == "a":
                ax.annotate(name, (PAPER_SPEED[name][0], np.median(values)), fontsize=6, xytext=(3, 2),
                            textcoords="offset points")  # fmt: skip
        ax.plot(
            [], [], mark, color=plots.PALETTE[6], label=["A: float32 eager", "B: bf16 eager", "B compiled"][i]
        )
    for name, (gmac, speed, _) in PAPER_SPEED.items():
        ax.plot(gmac, speed, "D", color=plots.PALETTE[0 if name.startswith("lsnet") else 6], fillstyle="none")
    ax.plot([], [], "D", color=plots.PALETTE[6], fillstyle="none", label="paper, RTX 3090")
    ax.set_yscale("log")
    ax.legend(fontsize=8)
    plots.label(ax, "multiply-adds per image (G, as the paper prints them)", "throughput (images/s)")
    return figure


plots.show(
    draw_speed(shown),
    alt="Throughput on a logarithmic axis against multiply-adds, LSNet blue, peers grey. "
    "Filled marks are measured here in two protocols, hollow diamonds are the paper's on an RTX 3090.",
    caption=f"Speed at 224 pixels, random weights; device: {shown.device}.",
)


# %% tags=["hide-input"]
def speed_table(results) -> list[dict]:
    """One row per network: images per second by protocol, batch, bandwidth, the paper's number."""
    rows = []
    for name in PAPER_SPEED:
        row: dict[str, Any] = {"network": name}
        for protocol in ("a", "b", "compiled"):
            values = results.metrics.get(f"throughput_{protocol}", {}).get(name)
            row[f"{protocol} (img/s)"] = float(np.median(values)) if values else None
        extra = results.arrays.get(f"net/a/{name}")
        if extra is not None:
            folded = "yes" if extra[2] else "in part"
            row |= {"batch": int(extra[0]), "GB/s": float(extra[1]), "folded": folded}
        layout = results.arrays.get(f"layout/b/{name}")
        row |= {
            "layout of b": str(layout) if layout is not None else None,
            "paper (img/s)": PAPER_SPEED[name][1],
        }
        if values := row["a (img/s)"]:
            rows.append(row | {"a / paper": values / PAPER_SPEED[name][1]})
    return rows


tables.grid(speed_table(shown), "GB/s: bytes that the leaf layers read and write, per second, protocol A.")

# %% tags=["hide-input"]
parts = zip(shown.arrays.get("share/what", []), shown.arrays.get("share/part", []), strict=True)
rows = [{"operator": str(k), "share of the time": f"{v:.1%}"} for k, v in parts]
steps = shown.metrics.get("training_step_ms", {})
if steps:
    print("training step (ms):", {k: f"{np.median(v):.1f}" for k, v in steps.items()})
tables.grid(rows or [{"operator": "not measured"}], "Where LSNet-T spends its time.")

# %% [markdown]
# The recorded verdicts beside those of this run:

# %% tags=["hide-input"]
tables.compare_runs(book, here)

# %% [markdown]
# ## Verdicts
#
# Computed by rules that were committed before any number. Intervals over seeds are paired t intervals; over
# timing repeats a bootstrap, which knows nothing of other machines.

# %% tags=["hide-input"]
tables.verdicts(shown)

# %% [markdown]
# ## Play
#
# Walk over the image. Left: the square that the layer looks at and the position; middle: the kernel it
# predicts there; right: the output of that kernel's channels. `look` cuts the trained 7×7 look down: the
# predicted kernel changes although the mixing window stays 3×3.


# %% tags=["widget", "hide-input"]
def draw_position(row: int, column: int, look: int):
    """Perception window, predicted kernel and output at one of 3 × 4 positions."""
    a, which = shown.arrays, S.look_sizes.index(look)
    kernels, size = a["inside/kernels"][which], a["inside/kernels"].shape[-1]
    i, j = (int((v + 0.5) * size / n) for v, n in ((row, 3), (column, 4)))
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.5))
    axes[0].imshow(a["inside/image"], extent=(-0.5, size - 0.5, size - 0.5, -0.5))
    for reach, colour in ((look, "#56B4E9"), (3, "#E69F00")):
        corner = (j - reach / 2, i - reach / 2)
        axes[0].add_patch(plt.Rectangle(corner, reach, reach, fill=False, edgecolor=colour, linewidth=2))
    weights = kernels[0, :, i, j].reshape(3, 3).astype(float)
    limit = np.abs(kernels[0].astype(float)).max()
    axes[1].imshow(weights, cmap="PuOr", vmin=-limit, vmax=limit)
    for (y, x), value in np.ndenumerate(weights):
        axes[1].text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8)
    axes[2].imshow(a["inside/outputs"][which], cmap="cividis")
    axes[2].plot(j, i, "s", color="#D55E00", fillstyle="none")
    for ax, title in zip(axes, ("looks at", "predicts", "output"), strict=True):
        plots.label(ax, "column", "row" if title == "looks at" else " ", title)
        ax.grid(False)
    return figure


def describe(row: int, column: int, look: int) -> str:
    """Alt text of one state."""
    at = S.look_sizes.index(look)
    kernels, size = shown.arrays["inside/kernels"][at], shown.arrays["inside/kernels"].shape[-1]
    i, j = (int((v + 0.5) * size / n) for v, n in ((row, 3), (column, 4)))
    weights = ", ".join(f"{v:.1f}" for v in kernels[0, :, i, j])
    return f"Position row {i}, column {j}, looking at {look} by {look}: predicted kernel {weights}."


GRID = {**S.play, "look": S.look_sizes}
ready = "inside/image" in shown.arrays
if ready:
    picker.live(draw_position, GRID)
picker.picker(
    run, "position", draw_position, GRID, alt=describe,
    caption="The blue square is looked at, the orange one mixed.",
) if ready else print("no trained network in these units")  # fmt: skip

# %% [markdown]
# ## Your own model
#
# The operator works on any model: `ska(x, w)` takes your features and nine weights for each group of
# channels and position, and `LSConv(dim)` is a drop-in token mixer.

# %%
mine = nn.Sequential(nn.Conv2d(3, 32, 4, 4), LSConv(32), nn.Conv2d(32, 10, 1))
print("readers write: from readrun import chapter; ska = chapter('lsnet').ska")
print("a model of your own, output:", tuple(mine(torch.randn(2, 3, 32, 32)).shape))

# %% [markdown]
# `checkpoint` names an LSNet: a hub id (`jameslahm/lsnet_t`), a folder in timm's format (`config.json`,
# `model.safetensors`), or an official file, `.pth` (`{"model": state_dict}`) or `.safetensors`, whose
# variant is recognised by its shapes. The tables of attention biases depend on the resolution;
# `load_official` resizes them on the grid of offsets. Without `checkpoint` the same code runs on a file
# with random weights that is written first.


# %%
def read_state(path: str) -> dict[str, Tensor]:
    """Tensors of an official `.pth`, a `.safetensors` file or a folder with `model.safetensors`.

    Raises ValueError naming `checkpoint`.
    """
    file = Path(path)
    file = file / "model.safetensors" if file.is_dir() else file
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        state = found.get("model", found)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds something other than tensors")
        return dict(state)
    except Exception as error:  # torch, pickle, zip and safetensors raise each their own
        accepted = "an official .pth, .safetensors, or a folder in timm's format"
        raise ValueError(f"checkpoint: {path}: {str(error)[:200]}; accepted: {accepted}") from error


def resize_biases(table: Tensor, resolution: int) -> Tensor:
    """Attention biases (heads, S²) for resolution² offsets, bicubic on the offset grid."""
    side = math.isqrt(table.shape[1])
    grid = F.interpolate(
        table.float().view(1, -1, side, side), (resolution,) * 2, mode="bicubic", align_corners=True
    )
    return grid.view(len(table), -1).to(table.dtype)


# %%
def load_official(model: LSNet, path_or_id: str) -> LSNet:
    """Load an official checkpoint strictly, attention biases of another resolution resized. Returns model.

    Raises ValueError naming `checkpoint` and listing missing, unexpected and misshapen keys.
    """
    state = read_state(path_or_id) if Path(path_or_id).exists() else hub_state(path_or_id)
    own = model.state_dict()
    for key in [k for k in state if k.endswith("attention_bias_idxs")]:
        state[key] = own.get(key, state[key])  # a function of the resolution, not a weight
    for key in [k for k in state if k.endswith("attention_biases") and k in own]:
        if state[key].shape != own[key].shape:
            state[key] = resize_biases(state[key], math.isqrt(own[key].shape[1]))
    faults = {
        "missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(),
        "of another shape": {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape},
    }  # fmt: skip
    told = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:4])}, …)" for what, keys in faults.items() if keys]
    if told:
        raise ValueError(f"checkpoint: {path_or_id} is not of this variant: {'; '.join(told)}")
    model.load_state_dict(state)
    return model


# %%
def hub_state(name: str) -> dict[str, Tensor]:
    """Tensors of an LSNet on the hub, in timm's format; needs the network."""
    from huggingface_hub import hf_hub_download

    return read_state(hf_hub_download(name, "model.safetensors"))


def variant_of(state: dict[str, Tensor]) -> str:
    """The timm name of the network that a state dict belongs to. Raises ValueError naming `checkpoint`."""
    width = {64: "t", 96: "s", 128: "b"}.get(len(state.get("patch_embed.4.c.weight", ())))
    if width is None:
        raise ValueError(
            f"checkpoint: no LSNet (its first keys: {', '.join(list(state)[:3])}); accepted: T, S, B"
        )
    return f"lsnet_{width}" + ("_distill" if "head_dist.l.weight" in state else "")


@torch.no_grad()
def own_model(path: str, size: int = 224) -> dict[str, Any]:
    """Load, fold, classify two photographs: {variant, params, top (class of each), logit (largest)}."""
    state = read_state(path) if Path(path).exists() else hub_state(path)
    name, classes = variant_of(state), len(state["head.l.weight"])
    model = load_official(timm.create_model(name, num_classes=classes, img_size=size), path)
    fuse_(model.eval())
    mean, std = (torch.tensor(CONFIG[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    images = F.interpolate(photographs("test")[:2], (size, size), mode="bicubic", antialias=True)
    logits = model((images - mean) / std)
    params, top = sum(p.numel() for p in model.parameters()), logits.argmax(1).tolist()
    return dict(variant=name, params=params, top=top, logit=logits.max().item())


# %%
if run.checkpoint:
    own = run.unit(own_model, path=run.checkpoint)
else:
    torch.manual_seed(run.parameters["seed"])
    file = run.folder / "lsnet_t_distill.pth"
    torch.save({"model": timm.create_model("lsnet_t_distill", num_classes=10).state_dict()}, file)
    own = own_model(str(file))
    file.unlink()
if not isinstance(own, dict) and not own.done:
    print("own model: not computed")
else:
    print(
        f"{own['variant']}: {own['params']:,} parameters, classes {own['top']}, "
        f"largest logit {own['logit']:.5f}"
    )

# %% [markdown]
# ## Limits
#
# - ImageNet accuracy, detection, segmentation, robustness sets and mobile latency are not measured. D2
#   stands in for ImageNet with real fonts and photographs, but it is small, and its objects are flat.
# - The accuracy experiment changes the stem's stride and trains for minutes, not 300 epochs. Mixers that
#   learn slowly but better would lose here.
# - Speeds are of shapes with random weights on one card. The interval over repeats of one process says how
#   well the median is known, nothing about another card, driver or version.
# - AFFNet, a peer in the paper, is not in timm and is left out; timm's re-implementations may be faster or
#   slower than the original code.
# - GroupNorm in LKP averages over space: the same object gets other kernels in another crop.
#
# **Exercise 1.** The weights cost $9/8$ of an element per output, the input 1. With $C/G'=1$, one kernel per
# channel, how many bytes per output does SKA move in bf16, and how much slower is the best kernel?
#
# :::{dropdown} Solution
# $1 + 9 + 1 = 11$ elements, 22 bytes, against 6.25: 3.5 times as slow when memory-bound. Sharing a kernel
# among eight channels is what makes SKA cheap; the ablation of the paper finds 0.1 points of accuracy in it.
# :::
#
# **Exercise 2.** Why is there no softmax over the nine taps, and what would one forbid?
#
# :::{dropdown} Solution
# Softmax weights are positive and sum to one: every output would be a weighted mean, and a difference between
# neighbours, an edge detector, could not be expressed. GroupNorm only fixes the mean and variance of a
# kernel's taps over the whole image.
# :::
#
# **Exercise 3.** Show that permuting the channels within a residue class modulo $G'$ commutes with SKA, and
# that permuting channels across classes does not.
#
# :::{dropdown} Solution
# Within a class all channels meet the same $w_{n,k}$, and SKA acts on each channel alone; so the permutation
# may come before or after. Across classes the channel would meet another kernel.
# :::
#
# **References.** A. Wang et al., *LSNet: See Large, Focus Small*, CVPR 2025, arXiv 2503.23135.
#
# ```bibtex
# @inproceedings{wang2025lsnet,
#   title     = {{LSNet}: See Large, Focus Small},
#   author    = {Wang, Ao and Chen, Hui and Lin, Zijia and Han, Jungong and Ding, Guiguang},
#   booktitle = {CVPR},
#   year      = {2025}
# }
# ```
