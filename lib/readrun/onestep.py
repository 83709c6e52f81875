"""One step of a transformer behind a text, on a static cache and captured; times of single calls.

A step of one token does so little arithmetic that launching its hundreds of kernels costs more than reading
the weights: on a GPU it is one graph. It writes its key at a slot that is a tensor, behind the text, and can
be replayed as often as one likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from readrun import decode


def slot_layer(layer: Any, length: int, slot: Tensor) -> decode._Layer:
    """Keys and values that a layer holds of a text, in a buffer of `length`; a step writes at `slot` (1,)."""
    made = decode._Layer(SimpleNamespace(length=length, copies=1, slot=slot))
    pad = (0, 0, 0, length - layer.keys.shape[2])
    made.keys, made.values = (torch.nn.functional.pad(x, pad) for x in (layer.keys, layer.values))
    made.is_initialized = True
    return made


class CachedStep:
    """The state at a token after a text of `ids` (1, T), by one step on a static cache; captured on a GPU.

    model: without a head (`AutoModel`), with full attention.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, device, kind = model, ids.device, next(model.parameters()).dtype
        length = -(-(ids.shape[1] + 1) // 8) * 8  # attention kernels want masks of a multiple of 8
        self.slot, text = torch.tensor([ids.shape[1]], device=device), DynamicCache()
        model(input_ids=ids, past_key_values=text, use_cache=True)
        self.cache = Cache(layers=[slot_layer(layer, length, self.slot) for layer in text.layers])
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        hidden = (torch.arange(length, device=device) > self.slot).view(1, 1, 1, length)
        self.mask = torch.zeros(hidden.shape, dtype=kind, device=device)
        self.mask.masked_fill_(hidden, torch.finfo(kind).min)
        self.graph: Any = None
        if device.type == "cuda":
            self._capture()

    def _step(self) -> Tensor:
        out = self.model(
            input_ids=self.token, position_ids=self.slot[None], attention_mask=self.mask,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        return out.last_hidden_state[0, -1]

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.state = self._step()

    @torch.no_grad()
    def __call__(self, token: int) -> Tensor:
        """The post-norm state (d,) at `token`, which stands behind the text."""
        self.token.fill_(token)
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.state


def samples_ms(function: Callable, repeats: int, device: str) -> np.ndarray:
    """Milliseconds of single calls, the GPU's queue drained before and after; two more warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    out = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        function()
        wait()
        out.append(1e3 * (time.perf_counter() - start))
    return np.array(out[2:])
