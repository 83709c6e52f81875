"""Runs the Triton kernels of the chapter `lsnet` in Triton's interpreter: TRITON_INTERPRET=1 python this.py.

A process of its own, because the interpreter must be chosen before Triton is imported. Prints JSON:
{name: largest error relative to the largest entry}.
"""

from __future__ import annotations

import json
import math

import torch
from readrun import chapter

q = chapter("lsnet")
CASES = [  # channels, kernels, kernel size, images, height, width, layout, dtype
    (8, 1, 3, 1, 1, 1, "nchw", torch.float32),
    (16, 2, 3, 2, 5, 7, "nchw", torch.float32),
    (24, 3, 3, 2, 4, 3, "nhwc", torch.float32),
    (16, 4, 5, 1, 6, 5, "nchw", torch.float32),
    (6, 6, 1, 1, 3, 3, "nchw", torch.float32),
    (2, 1, 3, 1, 29, 31, "nchw", torch.float32),
    (16, 2, 3, 1, 7, 7, "nhwc", torch.float16),
    (8, 1, 3, 1, 5, 4, "nchw", torch.bfloat16),
]


def inputs(channels, kernels, size, images, height, width, layout, dtype):
    generator = torch.Generator().manual_seed(channels * 100 + height)
    last = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(images, channels, height, width, generator=generator).to(dtype, memory_format=last)
    w = q.empty_kernels(x, kernels, size**2)
    w.copy_(torch.randn(w.shape, generator=generator))
    g = torch.randn(x.shape, generator=generator).to(dtype, memory_format=last)
    return x, w, g


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)).item()


def main() -> None:
    out = {}
    for case in CASES:
        x, w, g = inputs(*case)
        a, b, c = (t.double() for t in (x, w, g))
        k = math.isqrt(w.shape[2])
        a.requires_grad_(), b.requires_grad_()
        y = q.ska_reference(a, b)
        gx, gw = torch.autograd.grad(y, (a, b), c)  # autograd of the reference, not the chapter's formulas
        for tile in [None] if case[3] == 1 or case[-1] != torch.float32 else [None, (16, 2, 1, 1)]:
            name = f"{case[:-1]} {str(case[-1])[6:]} {tile}"
            gw_found = q.triton_grad_w(g, x, w.shape[1], k, tile)
            found = (q.triton_ska(x, w, tile), q.triton_grad_x(g, w, tile), gw_found)
            out[name] = max(relative(f, t) for f, t in zip(found, (y.detach(), gx, gw), strict=True))
            assert found[0].stride() == x.stride() and found[2].stride() == w.stride(), name
    x, w, g = inputs(
        *CASES[2]
    )  # kernels of one layout, input of the other: as GroupNorm hands them over on CUDA
    y = q.ska_reference(x.double(), w.double())
    out["mixed layouts"] = relative(q.triton_ska(x, w.contiguous()), y)
    a, b = x[:, :, :, ::2], w.contiguous()[..., ::2]
    out["strided input"] = relative(q.triton_ska(a, b), q.ska_reference(a.double(), b.double()))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
