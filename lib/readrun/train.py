"""One training loop for all chapters: AdamW, warm-up, cosine, clipping, EMA, bf16 on a GPU, `accelerate`."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch


def autocast(device: str | torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast on a GPU; nothing on the CPU, where float32 keeps runs repeatable bit for bit."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if kind == "cuda" else contextlib.nullcontext()


class Updater:
    """`norm = updater(loss)`: backward, clip the gradient norm (returned, before clipping), step, average.

    lr rises linearly over `warmup` steps; with `steps` it then falls to 0 along a cosine. ema: decay of the
    averaged copy `updater.average` (0: none). optimizer: "adamw" or "sgd" (plain). accelerator: an
    `accelerate.Accelerator` that has prepared the model. Raises FloatingPointError before any weight changes.
    """

    def __init__(self, model: torch.nn.Module, lr: float, *, steps: int | None = None, warmup: int = 0,
                 betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0, clip: float = 1.0,
                 ema: float = 0.0, optimizer: str = "adamw", accelerator: Any = None) -> None:  # fmt: skip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        adam = dict(betas=betas, weight_decay=weight_decay, fused=self.parameters[0].is_cuda)
        self.optimizer = (torch.optim.SGD(self.parameters, lr) if optimizer == "sgd" else
                          torch.optim.AdamW(self.parameters, lr, **adam))  # fmt: skip
        self.model, self.clip, self.ema, self.accelerator, self.count = model, clip, ema, accelerator, 0
        self.rate = lambda i: lr * min(1, (i + 1) / max(warmup, 1)) * (
            1.0 if steps is None else 0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)))  # fmt: skip
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        self.optimizer.param_groups[0]["lr"] = self.rate(self.count)
        self.accelerator.backward(loss) if self.accelerator else loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        if not torch.isfinite(norm):
            values = f"loss is {loss.item()}, gradient norm {norm.item()}"
            raise FloatingPointError(f"{values} at update {self.count}: training stopped, weights left alone")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        if self.average is not None:
            for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(p.detach(), 1 - min(self.ema, self.count / (self.count + 10)))
            for copied, own in zip(self.average.buffers(), self.model.buffers(), strict=True):
                copied.copy_(own)  # running statistics of normalisation layers
        return norm


def progress(items: Iterable, name: str = "") -> Any:
    """A tqdm bar for somebody who watches; nothing where READRUN_HEADLESS is set."""
    from tqdm.auto import tqdm

    hidden = bool(os.environ.get("READRUN_HEADLESS"))
    return tqdm(items, desc=name, leave=False, mininterval=1, disable=hidden)


def fit(
    updater: Updater, batches: Iterable, loss_of: Callable[..., torch.Tensor], name: str = ""
) -> list[float]:
    """Train on every batch: `loss_of(model, batch)` is minimised, under `autocast`. Returns the losses."""
    losses = []
    for batch in progress(batches, name):
        with autocast(updater.parameters[0].device):
            loss = loss_of(updater.model, batch)
        updater(loss)
        losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []
