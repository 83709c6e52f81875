# mypy: ignore-errors
"""One row times weights of 4, 8 or 16 bits, a second attempt after `readrun.lowbit`.

While one tile of weights is summed, the next one is on its way. A nibble becomes a float in two
instructions instead of three. And with PDL (programmatic dependent launch, Hopper and later) a kernel starts,
and asks for its first weights, while the one in front of it is still at work: all that this one may have
written is read behind `gdc_wait`. Layouts and kinds are those of `lowbit`.
"""

import os
from typing import Any

import torch
from torch import Tensor

from readrun.lowbit import constexpr, jit, nearest, put, tl, triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None

ASM = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter knows no assembler


@jit
def low_nibble(words, j: constexpr, ASM: constexpr):
    """16^(j mod 5) times (nibble j of int32 words minus 8), as float32: and, or in one instruction."""
    i: constexpr = 4 * (j % 5)
    low = words if j < 5 else words >> 20
    if ASM:  # two immediates do not fit into one instruction, and Triton writes two
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [low, 15 << i, 0x4B000000],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        bits = (low & (15 << i)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + (8 << i))


@jit
def row4_kernel(
    x, w, sg, scale, out, N, K: constexpr, eps, A8: constexpr, NORM: constexpr, ADD: constexpr,
    OUT8: constexpr, SUMS: constexpr, BN: constexpr, G: constexpr, ASM: constexpr, PDL: constexpr,
):  # fmt: skip
    """One row times packed weights, BN outputs, G groups of 128 inputs at a time."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    g, i = tl.arange(0, G), tl.arange(0, 16)
    groups: constexpr = K // 128
    row = (n < N)[:, None]
    from_w = w + n[:, None, None] * (groups * 16) + (g[:, None] * 16 + i[None, :])[None, :, :]
    from_s = sg + n[:, None] * groups + g[None, :]
    good = row & (g < groups)[None, :]
    words = tl.load(from_w, mask=good[:, :, None], other=0, eviction_policy="evict_first")
    s = tl.load(from_s, mask=good, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc, squares = tl.zeros([BN, G, 16], tl.float32), tl.zeros([G, 16], tl.float32)
    for start in range(0, groups, G):
        good = row & (start + G + g < groups)[None, :]
        ahead = start + G
        next_words = tl.load(
            from_w + ahead * 16, mask=good[:, :, None], other=0, eviction_policy="evict_first"
        )
        next_s = tl.load(from_s + ahead, mask=good, other=0.0)
        ok = (start + g < groups)[:, None]
        from_x = x + (start + g)[:, None] * 128 + i[None, :]
        r = s.to(tl.float32)[:, :, None]
        part = tl.zeros([BN, G, 16], tl.float32)
        for j in tl.static_range(8):
            v = tl.load(from_x + 16 * j, mask=ok, other=0).to(tl.float32)
            q = low_nibble(words, j, ASM)
            if A8:  # `two_level` leaves nothing to clip: |(q - 8) r| < 127.5
                part += nearest(q * (r * (1.0 / (1 << (4 * (j % 5)))))) * v[None, :, :]
            else:
                part += q * (v * (1.0 / (1 << (4 * (j % 5)))))[None, :, :]
            if NORM:
                squares += v * v
        acc += part if A8 else part * r
        words, s = next_words, next_s
    if A8:  # exact: integers, and a thread adds fewer than a thousand of them
        sums = tl.sum(tl.sum(acc.to(tl.int32), 2), 1)
        if SUMS:
            tl.store(out + n, sums, mask=n < N)
        else:
            y = sums.to(tl.float32) * tl.load(scale + n, mask=n < N, other=0.0)
            put(out, n, y, out, n < N, ADD, OUT8)
    else:
        y = tl.sum(tl.sum(acc, 2), 1)
        if NORM:
            y *= tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
        put(out, n, y, out, n < N, ADD, OUT8)


@jit
def row_kernel(
    x, w, scale, out, N, K: constexpr, eps, A8: constexpr, NORM: constexpr, ADD: constexpr, OUT8: constexpr,
    SUMS: constexpr, BN: constexpr, BK: constexpr, PDL: constexpr,
):  # fmt: skip
    """One row times int8 weights (A8: int8 input, integer sums) or 16-bit weights."""
    n, i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BK)
    from_w, row = w + n[:, None] * K + i[None, :], (n < N)[:, None]
    b = tl.load(from_w, mask=row & (i < K)[None, :], other=0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc, squares = tl.zeros([BN, BK], tl.int32 if A8 else tl.float32), tl.zeros([BK], tl.float32)
    for start in range(0, K, BK):
        good = row & (start + BK + i < K)[None, :]
        next_b = tl.load(from_w + (start + BK), mask=good, other=0, eviction_policy="evict_first")
        v = tl.load(x + start + i, mask=start + i < K, other=0)
        if A8:
            acc += b.to(tl.int32) * v.to(tl.int32)[None, :]
        else:
            v = v.to(tl.float32)
            acc += b.to(tl.float32) * v[None, :]
            if NORM:
                squares += v * v
        b = next_b
    sums = tl.sum(acc, 1)
    if SUMS:
        tl.store(out + n, sums, mask=n < N)
    else:
        y = sums.to(tl.float32)
        if A8:
            y *= tl.load(scale + n, mask=n < N, other=0.0)
        if NORM:
            y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
        put(out, n, y, out, n < N, ADD, OUT8)


ROW_PLANS: dict[str, list[tuple]] = {  # ("row", (outputs, groups or inputs at a time), warps, stages)
    "w4a16": [("row", (16, 8), 8, 1), ("row", (32, 8), 8, 1), ("row", (16, 4), 4, 1), ("row", (32, 4), 4, 1),
              ("row", (32, 2), 2, 1), ("row", (16, 2), 2, 1)],
    "w4a8": [("row", (16, 8), 8, 1), ("row", (32, 8), 8, 1), ("row", (16, 4), 4, 1), ("row", (16, 2), 2, 1)],
    "w8a8": [("row", (4, 1024), 4, 1), ("row", (8, 512), 8, 1), ("row", (2, 2048), 8, 1)],
    "w16a16": [("row", (4, 512), 4, 1), ("row", (8, 512), 8, 1), ("row", (2, 2048), 8, 1),
               ("row", (4, 1024), 8, 1)],
}  # fmt: skip


def row_linear(kind: str, x: Tensor, w: Tensor, sg: Tensor | None, scale: Tensor | None, out: Tensor,
               plan: Any = None, add: bool = False, eps: float | None = None, pdl: bool = False
               ) -> Tensor:  # fmt: skip
    """As `lowbit.kernel_linear` for one row, into `out` (1, N), where int32 asks for the sums themselves.

    pdl: start early; kernels around it that do the same must have a `gdc_wait` of their own.
    """
    (_, depth), n = x.shape, len(w)
    _, tile, warps, _ = plan or ROW_PLANS[kind][0]
    common = dict(
        A8=kind.endswith("a8"), NORM=eps is not None, ADD=add, OUT8=out.dtype == torch.int8,
        SUMS=out.dtype == torch.int32, BN=tile[0], PDL=pdl, num_warps=warps, num_stages=1,
    )  # fmt: skip
    common |= dict(launch_pdl=True) if pdl else {}
    grid, scale = (triton.cdiv(n, tile[0]),), x if scale is None else scale
    if kind.startswith("w4"):
        row4_kernel[grid](x, w.view(torch.int32), sg, scale, out, n, depth, eps or 0.0, G=tile[1], ASM=ASM,
                          **common)  # fmt: skip
    else:
        row_kernel[grid](x, w, scale, out, n, depth, eps or 0.0, BK=tile[1], **common)
    return out
