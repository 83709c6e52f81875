"""Noise warping (Go-with-the-Flow) in three Triton kernels: the state is read once and written once.

Which values meet is a matter of indices: each target keeps a linked list of its sources, threaded in a pass
over the flow, and then collects its own list. Copies of one source need the mean of each other's fresh noise;
it is drawn again from a counter-based generator instead of being communicated. The chapter vlm_physics
explains the algorithm and holds it in plain torch.
"""
# mypy: allow-incomplete-defs, allow-untyped-defs

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no Triton for this machine: the plain version serves
    triton = tl = constexpr = None


def ready(q: Tensor) -> bool:
    """Whether the kernels can run on q."""
    on = q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and on and q.dtype == torch.float32


def jit(function: Callable) -> Any:
    """triton.jit where Triton is installed; else the bare function, which nothing calls."""
    return triton.jit(function) if triton else function


@jit
def link_kernel(step, head, after, uses, outside, n, H: constexpr, W: constexpr, BLOCK: constexpr):
    """Scatter: pixel p heads the list of its target; one that leaves the frame, as p + n, that of p."""
    p, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    live = p < n
    x = p % W + tl.load(step + 2 * b * n + p, mask=live, other=0)
    y = p // W + tl.load(step + (2 * b + 1) * n + p, mask=live, other=0)
    inside = live & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    target, node = tl.where(inside, y * W + x, p), tl.where(inside, p, p + n)
    tl.store(after + b * n + p, tl.atomic_xchg(head + b * n + target, node, mask=live), mask=live)
    tl.store(uses + b * n + p, inside.to(tl.int32), mask=live)
    tl.atomic_add(outside + b, tl.sum((live & (inside == 0)).to(tl.int32), 0))


@jit
def gather_kernel(step, head, turn, uses, outside, n, H: constexpr, W: constexpr, BLOCK: constexpr):
    """A target without a list notes its source s as -2 - s (-1: outside) and which copy of it it takes."""
    p, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    free = (p < n) & (tl.load(head + b * n + p, mask=p < n, other=0) == -1)
    x = p % W - tl.load(step + 2 * b * n + p, mask=free, other=0)
    y = p // W - tl.load(step + (2 * b + 1) * n + p, mask=free, other=0)
    inside = free & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    copy = tl.atomic_add(uses + b * n + y * W + x, 1, mask=inside)
    tl.store(turn + b * n + p, copy, mask=inside)
    tl.store(head + b * n + p, -2 - (y * W + x), mask=inside)
    tl.atomic_add(outside + b, tl.sum((free & (inside == 0)).to(tl.int32), 0))


@jit
def normal(seed, source, copy, channel):
    """N(0, 1) that depends on nothing but the seed and the three numbers (shapes that broadcast)."""
    zero = 0 * (source + copy + channel)
    a, b, _, _ = tl.philox(seed, source + zero, copy + zero, channel + zero, zero)
    z, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    return z


@jit
def collect_kernel(q, w, head, after, turn, uses, outside, seed, q_out, mass_out, n, C: constexpr):
    """Every target walks its list: split and merge in registers; q is read once and written once."""
    p, b = tl.program_id(0) * 32 + tl.arange(0, 32), tl.program_id(1)
    c, live, seed = tl.program_id(2) * 16 + tl.arange(0, 16)[:, None], p < n, tl.load(seed)
    plane = (b * C + c).to(tl.int64) * n
    total, square = tl.zeros([16, 32], tl.float32), tl.zeros([32], tl.float32)
    mass = square
    node, copy = tl.load(head + b * n + p, mask=live, other=-1), tl.load(turn + b * n + p, mask=live, other=0)
    copy, more = tl.where(node >= 0, 0, copy), live
    while tl.max(more.to(tl.int32), 0) > 0:
        listed, blank = node >= 0, (node >= n) | (node == -1)
        s = tl.where(node >= n, node - n, tl.where(listed, node, -2 - node))
        s = tl.where(node == -1, p, s)
        known = more & (blank == 0)
        n_uses = tl.load(uses + b * n + s, mask=known, other=1)
        omega = tl.load(w + b * n + s, mask=known, other=1.0) / n_uses.to(tl.float32)
        omega = tl.where(blank, 1.0 / tl.load(outside + b).to(tl.float32), omega)
        value = tl.load(q + plane + s[None, :], mask=known[None, :] & (c < C), other=0.0)
        value = value / tl.sqrt(n_uses.to(tl.float32))[None, :]
        if tl.max((more & blank).to(tl.int32), 0) > 0:  # copies of one fresh value are fresh values
            value = tl.where(blank[None, :], normal(seed, s[None, :], -1, b * C + c), value)
        most = tl.max(tl.where(known, n_uses, 0), 0)
        if most > 1:
            mean = tl.zeros([16, 32], tl.float32)
            for i in range(most):
                z = normal(seed, s[None, :], i, b * C + c)
                mean += tl.where((i < n_uses)[None, :], z / n_uses.to(tl.float32)[None, :], 0.0)
                value += tl.where((known & (n_uses > 1) & (i == copy))[None, :], z, 0.0)
            value -= tl.where((known & (n_uses > 1))[None, :], mean, 0.0)
        total += tl.where(more[None, :], omega[None, :] * value, 0.0)
        square += tl.where(more, omega * omega, 0.0)
        mass += tl.where(more, omega, 0.0)
        node = tl.load(after + b * n + s, mask=more & listed, other=-1)
        more = more & listed & (node >= 0)
    total = total / tl.sqrt(tl.where(live, square, 1.0))[None, :]
    tl.store(q_out + plane + p[None, :], total, mask=live[None, :] & (c < C))
    tl.store(mass_out + b * n + p, mass, mask=live)


def warp(
    q: Tensor, w: Tensor, flow: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(warped noise, sums of weights): q (B, C, H, W), w (B, 1, H, W) one step along flow (B, 2, H, W).

    float32; flow in px, previous to next, rounded here. Slow where one source fills much of the frame.
    """
    (b, channels, height, width), n = q.shape, q[0, 0].numel()
    q, w, step = q.contiguous(), w.contiguous(), flow.round().int().contiguous()
    head = torch.full((b, n), -1, dtype=torch.int32, device=q.device)
    after, turn, uses = torch.empty(3, b, n, dtype=torch.int32, device=q.device)
    outside, out, mass = head.new_zeros(b), torch.empty_like(q), torch.empty_like(w)
    seed = torch.randint(2**31 - 1, (1,), generator=generator, device=q.device)
    tiles, size = (triton.cdiv(n, 256), b), dict(H=height, W=width, BLOCK=256)
    link_kernel[tiles](step, head, after, uses, outside, n, **size)
    gather_kernel[tiles](step, head, turn, uses, outside, n, **size)
    grid = (triton.cdiv(n, 32), b, triton.cdiv(channels, 16))
    collect_kernel[grid](q, w, head, after, turn, uses, outside, seed, out, mass, n, C=channels)
    return out, mass
