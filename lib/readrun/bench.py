"""Honest timings: warmed up, inputs rotated past the cache, medians with spread, beside measured ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import local_torch_dtype


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, quartiles `low` and `high`, number of samples `n`."""

    median_ms: float
    low: float
    high: float
    n: int


def _on_gpu(device: str | torch.device | None) -> bool:
    return torch.cuda.is_initialized() if device is None else torch.device(device).type == "cuda"


def rotate(*tensors: Tensor, least: int = 4) -> list[tuple[Tensor, ...]]:
    """At least `least` copies of the arguments, over three times the GPU's L2 cache: reads then miss it."""
    device, size = tensors[0].device, sum(tensor.nbytes for tensor in tensors)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [tuple(t.detach().clone() for t in tensors) for _ in range(max(least, -(-3 * cache // size)))]


def time(
    fn: Callable, *, inputs: Sequence[tuple] = ((),), warmup: int = 20, repeat: int = 100,
    device: str | torch.device | None = None,
) -> Timing:  # fmt: skip
    """Time `fn(*arguments)` with the next of `inputs` at every call: by events on a GPU (device None: if this
    process has used one), else by the wall clock.

    Raises ValueError without inputs, for warmup < 1 (a first call compiles and allocates) or repeat < 3.
    """
    if not inputs or warmup < 1 or repeat < 3:
        raise ValueError(f"time: {len(inputs)} inputs, warmup={warmup}, repeat={repeat}; at least 1, 1, 3")
    for i in range(warmup):
        fn(*inputs[i % len(inputs)])
    gpu, marks = _on_gpu(device), []

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True) if gpu else None
        return torch.cuda.current_stream().record_event(event) if event else perf_counter()

    for i in range(repeat):
        start = mark()
        fn(*inputs[i % len(inputs)])
        marks.append((start, mark()))
    if gpu:
        torch.cuda.synchronize()
    samples = [start.elapsed_time(end) if gpu else 1e3 * (end - start) for start, end in marks]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, repeat)


def ceilings(device: str | torch.device, dtype: torch.dtype, *, elements: int = 0, size: int = 0) -> dict:
    """What this machine reaches on random data: {copy_gb_s, matmul_tflop_s}.

    A copy of `elements` values counts bytes read plus bytes written, a `size`³ product 2 size³ operations; 0
    takes sizes that fill the machine.
    """
    gpu = _on_gpu(device)
    elements, size = elements or (2**29 if gpu else 2**23), size or (8192 if gpu else 512)
    options: dict[str, Any] = dict(warmup=5, repeat=20, device=device)
    source = torch.randn(elements, device=device).to(dtype)
    copy = time(torch.empty_like(source).copy_, inputs=[(source,)], **options)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = time(torch.mm, inputs=[(a, b), (b, a)], **options)
    gb_s, tflop_s = 2e-6 * source.nbytes / copy.median_ms, 2e-9 * size**3 / product.median_ms
    return dict(copy_gb_s=gb_s, matmul_tflop_s=tflop_s)


def peak_memory(fn: Callable[[], object], device: str | torch.device | None = None) -> int:
    """Bytes that `fn()` holds at its worst moment beyond those before it; device as for `time`."""
    if _on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        fn()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    changes = [0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]
    return int(torch.tensor(changes).cumsum(0).max())


def random_model(cls: type, config: object, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Build a model of real dimensions with random weights, at once on `device` ("meta": shapes only).

    config: a `transformers` configuration, or a dict of keyword arguments (`diffusers`). Weights are
    N(0, 1 / fan_in) also where the class starts from zeros: a GPU multiplies zeros faster than real numbers.
    """
    with local_torch_dtype(dtype), torch.device(device):
        model = cls(**config) if isinstance(config, dict) else cls(config)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


def row(
    name: str, ms: Timing | float | None, unit: str, *, work: float | None = None,
    achieved: float | None = None, limit: float | None = None, peer: float | None = None,
) -> dict[str, str | float | None]:  # fmt: skip
    """One line of a performance table, {name, ms, achieved, limit, peer, ratio, unit}.

    achieved, limit and peer are in `unit`, ratio is achieved / peer. Instead of `achieved` give the `work`
    of one call, which is divided by its seconds (GB for "GB/s"). Raises ValueError for both or neither.
    """
    ms = ms.median_ms if isinstance(ms, Timing) else ms
    if (achieved is None) == (work is None) or (work is not None and not ms):
        raise ValueError(f"row {name!r} needs achieved=, or work= and a time")
    achieved = 1e3 * work / ms if work is not None and ms else achieved
    ratio = achieved / peer if achieved is not None and peer else None
    return dict(name=name, ms=ms, achieved=achieved, limit=limit, peer=peer, ratio=ratio, unit=unit)
