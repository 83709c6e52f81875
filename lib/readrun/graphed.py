"""A training step as one CUDA graph: bfloat16 on float32 master weights; Muon for all matrices at once.

A small model's step is a thousand short kernels: started one by one they cost the host more than the GPU, and
several processes on one GPU wait for each other. Captured per shape of the batch, a step is one launch.
On a CPU the step is the plain one, in float32.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from readrun import decode, train

CHECK_EVERY = 200  # steps between two looks at "is the loss finite?": each look drains the queue of a GPU


def causal_states(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states (B, T, d) of a Llama for rows that start at position 0, padding on the right only.

    The layers are called without a mask: `transformers` would look at values to find that none is needed,
    which a capture forbids.
    """
    decoder = model.get_decoder()
    x, at = decoder.embed_tokens(ids), torch.arange(ids.shape[1], device=ids.device)[None]
    rope = decoder.rotary_emb(x, position_ids=at)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=at, position_embeddings=rope)
    return decoder.norm(x)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` without weight decay, matrices of one shape orthogonalised as one batch.

    The rate may be a tensor, so that a captured step can be given another. Source: K. Jordan, *Muon*, 2024.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("params: Muon takes matrices only")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape[0], p.shape[1]), []).append(p)
            for (rows, columns), matrices in shapes.items():
                grad, state = torch.stack([p.grad for p in matrices]), self.state[matrices[0]]
                buffer = state.setdefault("momentum_buffers", torch.zeros_like(grad))
                buffer.lerp_(grad, 1 - group["momentum"])
                update = _orthogonal(grad.lerp(buffer, group["momentum"])).to(grad.dtype)
                change = update * (group["lr"] * -math.sqrt(max(1, rows / columns)))
                torch._foreach_add_(matrices, list(change.unbind()))


def _orthogonal(update: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards U V^T of each matrix of a batch, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[1] > update.shape[2]
    x = (update.mT if tall else update).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adamw(params: Iterable[Tensor], lr: float, **options: Any) -> torch.optim.AdamW:
    """AdamW that can be captured; fused where the weights are on a GPU."""
    listed = list(params)
    gpu = listed[0].is_cuda
    return torch.optim.AdamW(listed, lr, fused=gpu, capturable=gpu, **options)


class GraphedStep:
    """`loss = step(*batch)`: forward, backward, clipped gradient, one update of `model`; returns the loss.

    model: float32 weights, which the optimizers own
    loss_of: (model, *batch) -> loss, given the bfloat16 copy on a GPU; the tensors' values must steer nothing
    optimizers: `adamw`, `Muon`, on all weights that learn
    rate: step -> factor of every optimizer's own rate
    dtype: of the copy; None: bfloat16 on a GPU; float32, which is `model` itself, on a CPU
    On a GPU the first batch of a shape is an ordinary step, after which the shape is captured.
    """

    def __init__(
        self, model: Any, loss_of: Callable[..., Tensor], optimizers: Sequence[torch.optim.Optimizer],
        rate: Callable[[int], float], *, clip: float = 1.0, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.masters = [p for p in model.parameters() if p.requires_grad]
        self.device, self.loss_of, self.optimizers = self.masters[0].device, loss_of, optimizers
        self.rate, self.clip, self.count = rate, clip, 0
        self.graphs = self.device.type == "cuda"
        dtype = dtype or (torch.bfloat16 if self.graphs else torch.float32)
        self.model = model if dtype == torch.float32 else _copy_in(model, dtype)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [group for one in optimizers for group in one.param_groups]
        self._rates = [(group, float(group["lr"])) for group in groups]
        for group, lr in self._rates if self.graphs else []:
            group["lr"] = torch.tensor(lr, device=self.device)
        self._captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._pool: Any = None  # one for all shapes: no result outlives a replay
        self._stream: Any = None

    def __call__(self, *batch: Tensor) -> Tensor:
        for group, lr in self._rates:
            value = lr * self.rate(self.count)
            group["lr"].fill_(value) if self.graphs else group.update(lr=value)
        self.count += 1
        if not self.graphs:
            return self._update(*batch)
        key = tuple(tensor.shape for tensor in batch)
        if key not in self._captured:
            return self._capture(key, [tensor.to(self.device, copy=True) for tensor in batch])
        graph, inputs, loss = self._captured[key]
        for kept, tensor in zip(inputs, batch, strict=True):
            kept.copy_(tensor, non_blocking=True)
        graph.replay()
        return loss.clone()

    def _update(self, *batch: Tensor) -> Tensor:
        loss = self.loss_of(self.model, *batch)
        loss.backward()
        if self.weights[0] is not self.masters[0]:
            live = [i for i, weight in enumerate(self.weights) if weight.grad is not None]
            grads = [torch.empty_like(self.masters[i]) for i in live]
            torch._foreach_copy_(grads, [self.weights[i].grad for i in live])
            for i, grad in zip(live, grads, strict=True):
                self.masters[i].grad, self.weights[i].grad = grad, None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for master in self.masters:
            master.grad = None
        if self.weights[0] is not self.masters[0]:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()

    def _capture(self, key: tuple, inputs: list[Tensor]) -> Tensor:
        """An ordinary step, which warms up, then the capture, which runs nothing."""
        here, self._stream = torch.cuda.current_stream(), self._stream or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            first = self._update(*inputs).clone()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = self._update(*inputs)
        self._captured[key] = graph, inputs, loss
        return first

    def fit(self, batches: Iterable[Sequence[Tensor]], name: str = "") -> list[float]:
        """One step per batch. Returns the losses; raises FloatingPointError where they are not finite."""
        losses: list[Tensor] = []
        for batch in train.progress(batches, name):
            losses.append(self(*batch))
            if len(losses) % CHECK_EVERY == 0:
                _check(losses)
        _check(losses)
        return torch.stack(losses).tolist() if losses else []


def _check(losses: list[Tensor]) -> None:
    if losses and not torch.isfinite(losses[-1]):
        raise FloatingPointError(f"loss is {losses[-1].item()} after {len(losses)} steps: training stopped")


def _copy_in(model: Any, dtype: torch.dtype) -> Any:
    """A copy whose weights have another dtype (tables of rotary angles do not), with one-kernel RMSNorms."""
    made = copy.deepcopy(model)
    for weight in made.parameters():
        weight.data = weight.data.to(dtype)
    for norm in [module for module in made.modules() if decode._is_rms_norm(module)]:
        norm.forward = functools.partial(_rms_norm, norm)
    return made


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
