"""A decode step that reads its cache once: attention of one query per row in Triton, the rest compiled.

Attention kernels are made for many queries a row; fed one, they leave most of a GPU idle. Here one program
per row and key head reads those keys and values that the mask lets it see, once, and nothing else.
"""
# mypy: allow-incomplete-defs, allow-untyped-defs

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the plain version serves
    triton = tl = None


def jit(function: Callable) -> Any:
    """triton.jit where Triton is installed; else the bare function, which nothing calls."""
    return triton.jit(function) if triton else function


@jit
def attend_kernel(
    q, k, v, mask, out, scaling, heads,
    LENGTH: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax over blocks of the cache, rescaled as larger scores appear (online softmax)."""
    # names here are only what Inductor imports where it writes a kernel down again: `tl.constexpr`, no alias
    row = tl.program_id(0)  # of (batch, key heads)
    d, g, step = tl.arange(0, WIDTH), tl.arange(0, QUERIES), tl.arange(0, BLOCK)
    here = (g < GROUP)[:, None] & (d < D)[None, :]
    query = (row * GROUP + g)[:, None] * D + d[None, :]
    asked = tl.load(q + query, mask=here, other=0.0).to(tl.float32) * scaling
    most, total = tl.full([QUERIES], -1e30, tl.float32), tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    base = row.to(tl.int64) * LENGTH * D
    for start in range(0, LENGTH, BLOCK):
        at = start + step
        hidden = tl.load(mask + (row // heads) * LENGTH + at, mask=at < LENGTH, other=-1e30).to(tl.float32)
        seen = hidden > -1e30
        place, read = base + at[:, None] * D + d[None, :], seen[:, None] & (d < D)[None, :]
        keys = tl.load(k + place, mask=read, other=0.0).to(tl.float32)
        scores = tl.sum(asked[:, None, :] * keys[None, :, :], 2) + hidden[None, :]
        scores = tl.where(seen[None, :], scores, -1e30)
        larger = tl.maximum(most, tl.max(scores, 1))
        weights, old = tl.exp(scores - larger[:, None]), tl.exp(most - larger)
        values = tl.load(v + place, mask=read, other=0.0).to(tl.float32)
        mixed = mixed * old[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], 1)
        total, most = total * old + tl.sum(weights, 1), larger
    tl.store(out + query, mixed / total[:, None], mask=here)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Mixed values, (batch, heads, d), of one query per row; sums are in float32 or better.

    query (batch, heads, 1, d); key, value (batch, key heads, length, d); mask (batch, 1, 1, length) is added
    to the scores: what it hides is not read, and each row must see something.
    """
    batch, kv_heads, length, d = key.shape
    group = query.shape[1] // kv_heads
    if triton is None or not (key.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        wide = torch.promote_types(query.dtype, torch.float32)
        asked = query.unflatten(1, (kv_heads, group)).to(wide)  # (batch, key heads, group, 1, d)
        scores = scaling * (asked * key[:, :, None].to(wide)).sum(-1) + mask.to(wide)
        mixed = (scores.softmax(-1)[..., None] * value[:, :, None].to(wide)).sum(-2)
        return mixed.flatten(1, 2).to(value.dtype)
    out = torch.empty(batch, kv_heads * group, d, dtype=value.dtype, device=value.device)
    shape = dict(GROUP=group, QUERIES=triton.next_power_of_2(group), D=d, WIDTH=triton.next_power_of_2(d))
    attend_kernel[(batch * kv_heads,)](
        query.contiguous(), key.contiguous(), value.contiguous(), mask.contiguous(), out, scaling, kv_heads,
        LENGTH=length, BLOCK=32, **shape, num_warps=1,  # one warp: no barriers, many programs
    )  # fmt: skip
    return out


def one_query(module, query, key, value, attention_mask, scaling, **options):
    """`attend` as `transformers` calls attention; more queries per row (prompts) go to SDPA."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return attend(query, key, value, attention_mask, scaling)[:, None], None


def compiled_step(model: Any, backend: str = "inductor") -> Any:
    """A copy of `model` for `readrun.decode.Decoder`: one-token passes are compiled, with `one_query`.

    model: a causal language model of `transformers` whose attention is exchangeable. Prompts run as before.
    """
    AttentionInterface.register("one_query", one_query)
    model = copy.deepcopy(model)
    model.config._attn_implementation = "one_query"
    prompts, step = model.forward, torch.compile(model.forward, dynamic=False, backend=backend)

    def forward(input_ids: Tensor, **given: Any) -> Any:
        # only the step: its second call finds all as the first left it, so capturing compiles nothing
        return (step if input_ids.shape[1] == 1 else prompts)(input_ids=input_ids, **given)

    model.forward = forward
    return model
