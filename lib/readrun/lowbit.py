# mypy: ignore-errors
"""Products with 4- and 8-bit weights on a GPU: Triton kernels and their launcher.

A packed matrix (N, K) is uint8 (N, K / 2), read as little-endian 32-bit words of eight nibbles: nibble j
of word i of a group of 128 inputs is input 16 j + i, so that a kernel meets contiguous inputs for each
nibble. A nibble q stands for q - 8. Group scales are fp16 (N, K / 128). Kinds: "w4a16", "w4a8", "w8a8",
"w16a16".
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # no GPU kernels on this platform: the reference path runs
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    triton = tl = constexpr = None


def jit(function: Callable) -> Callable:
    """triton.jit where Triton is installed; else the bare function, which nothing calls."""
    return triton.jit(function) if triton else function


def use_kernels(x: Tensor) -> bool:
    """Whether the kernels run (on a GPU, or interpreted in tests), not their references."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and not PLAIN


PLAIN: list[torch.dtype] = []  # not empty: references everywhere, also on a GPU, computed in this type


@contextlib.contextmanager
def references(kind: torch.dtype = torch.float32) -> Iterator[None]:
    """No kernels inside: references in torch, computed in `kind`."""
    PLAIN.append(kind)
    try:
        yield
    finally:
        PLAIN.pop()


def real(x: Tensor) -> Tensor:
    """x in the type that references compute in."""
    return x.to(PLAIN[-1] if PLAIN else torch.float32)


@jit
def nearest(v):
    """Round float32 of less than 2^22 to the nearest integer, ties to even."""
    return (v + 12582912.0) - 12582912.0


@jit
def nibble(words, j: constexpr):
    """Nibble j of int32 words minus 8, as float32."""
    return (((words >> (4 * j)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@jit
def nibble_times(words, j: constexpr):
    """16^(j mod 5) times (nibble j of int32 words minus 8), as float32: no shift for the nibbles 0 to 4."""
    i: constexpr = 4 * (j % 5)
    low = words if j < 5 else words >> 20
    return ((low & (15 << i)) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (8 << i))


@jit
def put(out, at, y, old, good, ADD: constexpr, OUT8: constexpr):
    """Store y, added to `old` or rounded to int8."""
    if OUT8:
        y = tl.minimum(tl.maximum(nearest(y), -128.0), 127.0)
    if ADD:
        y += tl.load(old + at, mask=good, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=good)


@jit
def gemv4_kernel(
    x, w, sg, scale, out, N, K: constexpr, eps, A8: constexpr, SUMS: constexpr, NORM: constexpr,
    ADD: constexpr,
    OUT8: constexpr, BN: constexpr, BW: constexpr, FOLD: constexpr,
):  # fmt: skip
    """One row times packed weights; FOLD: sum the 16 words of a group before its scale is applied."""
    n, i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BW)
    words: constexpr = K // 8
    across: constexpr = BW // 16 if FOLD else BW
    inside = (n < N)[:, None]
    acc, squares = tl.zeros([BN, across], tl.float32), tl.zeros([BW], tl.float32)
    for start in range(0, words, BW):
        word = start + i
        ok = word < words
        good = inside & ok[None, :]
        bits = tl.load(
            w + n[:, None] * words + word[None, :], mask=good, other=0, eviction_policy="evict_first"
        )
        from_x = x + word // 16 * 128 + word % 16
        part = tl.zeros([BN, BW], tl.float32)
        if A8:
            s = tl.load(sg + n[:, None] * (K // 128) + word[None, :] // 16, mask=good, other=0.0).to(
                tl.float32
            )
        for j in tl.static_range(8):
            v = tl.load(from_x + 16 * j, mask=ok, other=0).to(tl.float32)
            q = nibble_times(bits, j)
            if A8:  # `two_level` leaves nothing to clip: |(q - 8) r| < 127.5
                part += nearest(q * (s * (1.0 / (1 << (4 * (j % 5)))))) * v[None, :]
            else:
                part += q * (v * (1.0 / (1 << (4 * (j % 5)))))[None, :]
            if NORM:
                squares += v * v
        if A8:
            acc += part
        elif FOLD:
            group = start // 16 + tl.arange(0, across)
            more = inside & (group < K // 128)[None, :]
            s = tl.load(sg + n[:, None] * (K // 128) + group[None, :], mask=more, other=0.0).to(tl.float32)
            acc += tl.sum(tl.reshape(part, [BN, across, 16]), 2) * s
        else:
            s = tl.load(sg + n[:, None] * (K // 128) + word[None, :] // 16, mask=good, other=0.0).to(
                tl.float32
            )
            acc += part * s
    if A8:
        sums = tl.sum(acc.to(tl.int32), 1)
        if SUMS:
            tl.store(out + n, sums, mask=n < N)
        else:
            y = sums.to(tl.float32) * tl.load(scale + n, mask=n < N, other=0.0)
            put(out, n, y, out, n < N, ADD, OUT8)
    else:
        y = tl.sum(acc, 1)
        if NORM:
            y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
        put(out, n, y, out, n < N, ADD, OUT8)


@jit
def gemv_kernel(
    x, w, scale, out, N, K: constexpr, eps, A8: constexpr, SUMS: constexpr, NORM: constexpr, ADD: constexpr,
    OUT8: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    """One row times int8 weights (A8: int8 input, integer sums) or 16-bit weights."""
    n, i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc, squares = tl.zeros([BN, BK], tl.int32 if A8 else tl.float32), tl.zeros([BK], tl.float32)
    for start in range(0, K, BK):
        k = start + i
        good = (n < N)[:, None] & (k < K)[None, :]
        b = tl.load(w + n[:, None] * K + k[None, :], mask=good, other=0, eviction_policy="evict_first")
        v = tl.load(x + k, mask=k < K, other=0)
        if A8:
            acc += b.to(tl.int32) * v.to(tl.int32)[None, :]
        else:
            v = v.to(tl.float32)
            acc += b.to(tl.float32) * v[None, :]
            if NORM:
                squares += v * v
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


@jit
def gemm4_kernel(
    x, w, sg, scale, out, M, N, K: constexpr, A8: constexpr, SUMS: constexpr, ADD: constexpr, OUT8: constexpr,
    BM: constexpr, BN: constexpr, BW: constexpr,
):  # fmt: skip
    """x (M, K) times packed weights: eight products per step, one for each nibble plane."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m, i, words = m.to(tl.int64), tl.arange(0, BW), K // 8
    acc = tl.zeros([BM, BN], tl.int32 if A8 else tl.float32)
    for start in range(0, words, BW):
        word = start + i
        ok = word < words
        good = ok[:, None] & (n < N)[None, :]
        bits = tl.load(w + n[None, :] * words + word[:, None], mask=good, other=0)
        at = sg + n[None, :] * (K // 128) + word[:, None] // 16
        s = tl.load(at, mask=good, other=0.0).to(tl.float32)
        from_x = x + m[:, None] * K + (word // 16 * 128 + word % 16)[None, :]
        some = (m < M)[:, None] & ok[None, :]
        for j in tl.static_range(8):
            v = tl.load(from_x + 16 * j, mask=some, other=0)
            q = nibble(bits, j) * s
            if A8:
                q = tl.minimum(tl.maximum(nearest(q), -127.0), 127.0)
                acc = tl.dot(v, q.to(tl.int8), acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(v, q.to(v.dtype), acc, input_precision="ieee")
    at, good = m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    if SUMS:
        tl.store(out + at, acc, mask=good)
    else:
        y = acc.to(tl.float32)
        if A8:
            y *= tl.load(scale + n, mask=n < N, other=0.0)[None, :]
        put(out, at, y, out, good, ADD, OUT8)


@jit
def gemm8_kernel(
    x, w, scale, out, M, N, K: constexpr, SUMS: constexpr, ADD: constexpr, OUT8: constexpr, BM: constexpr,
    BN: constexpr, BK: constexpr, GROUP: constexpr,
):  # fmt: skip
    """x (M, K) int8 times w (N, K) int8 transposed; GROUP rows of tiles share weights in the L2 cache."""
    rows, columns, pid = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.program_id(0)
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    m = (first + pid % (GROUP * columns) % size) * BM + tl.arange(0, BM)
    n = (pid % (GROUP * columns) // size) * BN + tl.arange(0, BN)
    m, n, i = m.to(tl.int64), n.to(tl.int64), tl.arange(0, BK)
    from_x, from_w = x + m[:, None] * K + i[None, :], w + n[None, :] * K + i[:, None]
    acc = tl.zeros([BM, BN], tl.int32)
    for start in range(0, K, BK):
        a = tl.load(from_x + start, mask=(m < M)[:, None] & (start + i < K)[None, :], other=0)
        b = tl.load(from_w + start, mask=(n < N)[None, :] & (start + i < K)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    at, good = m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    if SUMS:
        tl.store(out + at, acc, mask=good)
    else:
        y = acc.to(tl.float32) * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
        put(out, at, y, out, good, ADD, OUT8)


@jit
def unpack4_kernel(w, sg, out, N, K: constexpr, A8: constexpr, BN: constexpr, BW: constexpr):
    """Packed weights to int8 (A8: w8 of the two-level scale) or real values, (N, K)."""
    n, word = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.program_id(1) * BW + tl.arange(0, BW)
    good = (n < N)[:, None] & (word < K // 8)[None, :]
    bits = tl.load(w + n[:, None] * (K // 8) + word[None, :], mask=good, other=0)
    s = tl.load(sg + n[:, None] * (K // 128) + word[None, :] // 16, mask=good, other=0.0).to(tl.float32)
    to = out + n[:, None] * K + (word // 16 * 128 + word % 16)[None, :]
    for j in tl.static_range(8):
        q = nibble(bits, j) * s
        if A8:
            q = tl.minimum(tl.maximum(nearest(q), -127.0), 127.0)
        tl.store(to + 16 * j, q.to(out.dtype.element_ty), mask=good)


@jit
def epilogue_kernel(acc, scale, out, total, N, ADD: constexpr, OUT8: constexpr, BLOCK: constexpr):
    """Integer sums times the scale of their column, stored, added or rounded."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    good = at < total
    y = tl.load(acc + at, mask=good, other=0).to(tl.float32) * tl.load(scale + at % N, mask=good, other=0.0)
    put(out, at, y, out, good, ADD, OUT8)


LINEAR_PLANS: dict[str, list[tuple]] = {  # the first is the default, the tuning unit tries all
    "w4a16/1": [("gemv", (8, 128, 1), 4, 2), ("gemv", (8, 128, 0), 4, 2), ("gemv", (4, 256, 1), 4, 2),
                ("gemv", (4, 256, 0), 4, 2), ("gemv", (16, 128, 1), 8, 2), ("gemv", (16, 64, 1), 4, 2),
                ("gemv", (2, 512, 1), 4, 2), ("fused", (16, 32, 64), 4, 3)],
    "w4a8/1": [("gemv", (8, 128, 0), 4, 2), ("gemv", (4, 256, 0), 4, 2), ("gemv", (8, 64, 0), 4, 2),
               ("gemv", (16, 128, 0), 8, 2), ("gemv", (2, 512, 0), 4, 2), ("fused", (16, 32, 64), 4, 3)],
    "w8a8/1": [("gemv", (4, 1024, 0), 4, 2), ("gemv", (8, 512, 0), 4, 2), ("gemv", (8, 1024, 0), 8, 2),
               ("gemv", (2, 2048, 0), 4, 2), ("gemv", (16, 512, 0), 8, 2)],
    "w16a16/1": [("gemv", (4, 1024, 0), 4, 2), ("gemv", (4, 512, 0), 4, 2), ("gemv", (8, 512, 0), 8, 2),
                 ("gemv", (2, 1024, 0), 4, 2), ("gemv", (2, 2048, 0), 8, 2), ("library", (), 0, 0)],
    "w4a16/16": [("fused", (16, 32, 64), 4, 3), ("fused", (16, 64, 32), 4, 4), ("fused", (16, 32, 32), 4, 4),
                 ("fused", (16, 128, 32), 8, 3)],
    "w4a8/16": [("fused", (16, 32, 64), 4, 3), ("fused", (16, 64, 32), 4, 4), ("fused", (16, 32, 32), 4, 4),
                ("fused", (16, 128, 32), 8, 3)],
    "w8a8/16": [("fused", (16, 32, 256), 4, 4), ("fused", (16, 64, 128), 4, 4),
               ("fused", (16, 32, 512), 4, 3)],
    "w4a16/many": [("library", (), 4, 2), ("fused", (128, 128, 32), 8, 2), ("fused", (64, 128, 32), 4, 3)],
    "w4a8/many": [("library", (), 4, 2), ("unpacked", (128, 256, 128), 8, 3), ("fused", (128, 128, 32), 8,
    3)],
    "w8a8/many": [("fused", (128, 256, 128), 8, 3), ("fused", (128, 128, 128), 8, 3), ("library", (), 4, 2),
                  ("fused", (128, 128, 128), 4, 4), ("fused", (128, 256, 64), 8, 4),
                  ("fused", (64, 256, 128), 4, 3)],
}  # fmt: skip


def rows_key(rows: int) -> str:
    """Which plans serve so many rows: "1", "16" (up to 64) or "many"."""
    return "1" if rows == 1 else "16" if rows <= 64 else "many"


def kernel_linear(kind: str, x: Tensor, w: Tensor, sg: Tensor | None, scale: Tensor | None,
                  out_dtype: torch.dtype, plan: Any = None, out: Tensor | None = None, add: bool = False,
                  eps: float | None = None) -> Tensor:  # fmt: skip
    """x (M, K) times weights (N, K) of a kind ("w4a16", …) by a kernel; into `out`, added to it with `add`.

    w packed uint8, int8 or 16-bit; sg: group scales or ratios; scale (N,): of integer sums; eps: x is
    RMS-normalised (one row, 16-bit kinds). out_dtype int32 gives the sums themselves.
    """
    (rows, depth), n, a8 = x.shape, len(w), kind.endswith("a8")
    variant, tile, warps, stages = plan or LINEAR_PLANS[f"{kind}/{rows_key(rows)}"][0]
    if eps is not None and variant != "gemv":
        x, eps = norm_quant(x, eps), None
    out = torch.empty(rows, n, dtype=out_dtype, device=x.device) if out is None else out
    flags = dict(SUMS=out_dtype == torch.int32, OUT8=out_dtype == torch.int8, ADD=add)
    words = w.view(torch.int32) if kind.startswith("w4") else w
    extra = dict(num_warps=warps or 4, num_stages=stages or 2)
    scale = x if scale is None else scale
    if variant == "gemv":
        one = dict(A8=a8, NORM=eps is not None, **flags, **extra)
        grid = (triton.cdiv(n, tile[0]),)
        if kind.startswith("w4"):
            gemv4_kernel[grid](x, words, sg, scale, out, n, depth, eps or 0.0, BN=tile[0], BW=tile[1],
                               FOLD=bool(tile[2]), **one)  # fmt: skip
        else:
            gemv_kernel[grid](x, words, scale, out, n, depth, eps or 0.0, BN=tile[0], BK=tile[1], **one)
    elif variant == "fused" and kind.startswith("w4"):
        grid = (triton.cdiv(rows, tile[0]), triton.cdiv(n, tile[1]))
        gemm4_kernel[grid](x, words, sg, scale, out, rows, n, depth, A8=a8, BM=tile[0], BN=tile[1],
        BW=tile[2],
                           **flags, **extra)  # fmt: skip
    else:
        library_linear(variant, kind, x, words, sg, scale, out, tile, flags, extra)
    return out


def library_linear(variant: str, kind: str, x: Tensor, w: Tensor, sg: Any, scale: Tensor, out: Tensor,
                   tile: tuple, flags: dict, extra: dict) -> None:  # fmt: skip
    """Variants that unpack four-bit weights into a scratch matrix first, and int8 products."""
    (rows, depth), n, a8 = x.shape, len(w), kind.endswith("a8")
    if kind.startswith("w4"):
        scratch = torch.empty(n, depth, dtype=torch.int8 if a8 else x.dtype, device=x.device)
        grid = (triton.cdiv(n, 16), triton.cdiv(depth // 8, 64))
        unpack4_kernel[grid](w, sg, scratch, n, depth, A8=a8, BN=16, BW=64)
        w = scratch
    if not a8:
        y = F.linear(x, w)
        out.add_(y) if flags["ADD"] else out.copy_(y)
    elif variant == "library":
        acc = torch._int_mm(x, w.t())
        if flags["SUMS"]:
            out.copy_(acc)
            return
        grid = (triton.cdiv(acc.numel(), 4096),)
        epilogue_kernel[grid](acc, scale, out, acc.numel(), n, ADD=flags["ADD"], OUT8=flags["OUT8"],
        BLOCK=4096,
                              num_warps=8)  # fmt: skip
    else:
        grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(n, tile[1]),)
        gemm8_kernel[grid](x, w, scale, out, rows, n, depth, BM=tile[0], BN=tile[1], BK=tile[2], GROUP=8,
                           **flags, **extra)  # fmt: skip


def wide(x: Tensor) -> torch.dtype:
    """The 16-bit type of this device's results: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if x.is_cuda else torch.float32


def quant(a: Tensor, scale: Tensor | float, bits: int = 8) -> Tensor:
    """round(a / scale), clipped to the range of `bits`, int8; scale broadcasts (real value of one step)."""
    top = 2 ** (bits - 1)
    return (a / scale).round().clamp(-top, top - 1).to(torch.int8)


@jit
def norm_kernel(h, out, inv, d, eps, OUT8: constexpr, BLOCK: constexpr):
    """One row: RMSNorm without weight, to int8 or 16 bits."""
    row, i = tl.program_id(0).to(tl.int64) * d, tl.arange(0, BLOCK)
    v = tl.load(h + row + i, mask=i < d, other=0.0).to(tl.float32)
    put(out, row + i, v * tl.rsqrt(tl.sum(v * v, 0) / d + eps) * inv, out, i < d, False, OUT8)


def norm_quant(h: Tensor, eps: float, scale: float | None = None, out: Tensor | None = None) -> Tensor:
    """RMSNorm of h (M, d) without weight: int8 with a static scale, or 16 bits without one."""
    kind = wide(h) if scale is None else torch.int8
    if not use_kernels(h):
        v = real(h) * torch.rsqrt(real(h).square().mean(-1, keepdim=True) + eps)
        return v.to(kind) if scale is None else quant(v, scale)
    out = torch.empty(h.shape, dtype=kind, device=h.device) if out is None else out
    block = triton.next_power_of_2(h.shape[1])
    norm_kernel[(len(h),)](h, out, 1 / (scale or 1.0), h.shape[1], eps, OUT8=scale is not None, BLOCK=block,
                           num_warps=16 if block > 2048 else 4)  # fmt: skip
    return out
