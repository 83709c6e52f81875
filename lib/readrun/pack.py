"""Weights small enough for a unit: int8 with one scale per row, a quarter of float32's bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 and, under "<name>.scale", what a row is multiplied by; all else as it is."""
    out = {}
    for name, w in weights.items():
        out[name] = w
        if w.ndim == 2:
            scale = w.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            out |= {name: (w / scale).round().to(torch.int8), f"{name}.scale": scale}
    return out


def unpacked(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights again, in float32, to within half a step of each row's scale."""
    scales = {name.removesuffix(".scale"): w for name, w in saved.items() if name.endswith(".scale")}
    return {n: w.float() * scales.get(n, 1.0) for n, w in saved.items() if not n.endswith(".scale")}
