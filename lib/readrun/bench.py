"""Honest timings: warmed up, inputs rotated past the cache, medians with spread, beside measured ceilings.

The same calls run on a CPU with small shapes, where they only show that the code works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


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
    """Copies of the arguments, at least `least` and together over three times the L2 cache of their GPU.

    Calls on one buffer again and again are served from the cache; calls on the next copy are not.
    """
    device, size = tensors[0].device, sum(tensor.nbytes for tensor in tensors)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [tuple(t.detach().clone() for t in tensors) for _ in range(max(least, -(-3 * cache // size)))]


def time(
    fn: Callable, *, inputs: Sequence[tuple] = ((),), warmup: int = 20, repeat: int = 100,
    graph: bool = False, device: str | torch.device | None = None,
) -> Timing:  # fmt: skip
    """Time `fn(*arguments)` with the next of `inputs` at every call.

    On a GPU (device None: if this process has used one) each call stands between two events. graph=True
    captures one pass over all inputs in a CUDA graph: a sample is then the mean over a replay, without the
    launch gaps that hide the time of small kernels. On a CPU the wall clock is read; `graph` changes nothing.
    Raises ValueError without inputs, for warmup < 1 (a first call compiles and allocates) or repeat < 3.
    """
    if not inputs or warmup < 1 or repeat < 3:
        raise ValueError(f"time: {len(inputs)} inputs, warmup={warmup}, repeat={repeat}; at least 1, 1, 3")

    def once(i: int) -> object:
        return fn(*inputs[i % len(inputs)])

    for i in range(warmup):
        once(i)
    samples: list[float] = []
    if not _on_gpu(device):
        for i in range(repeat):
            start = perf_counter()
            once(i)
            samples.append(1e3 * (perf_counter() - start))
    else:
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                for i in range(len(inputs)):
                    once(i)
            captured.replay()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
        for i, (start, end) in enumerate(marks):
            start.record()
            captured.replay() if graph else once(i)
            end.record()
        torch.cuda.synchronize()
        samples = [start.elapsed_time(end) / (len(inputs) if graph else 1) for start, end in marks]
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(quartiles).tolist()
    return Timing(median, low, high, repeat)


def ceilings(
    device: str | torch.device, dtype: torch.dtype, *, elements: int = 0, size: int = 0
) -> dict[str, float]:
    """What this machine reaches on random data: {copy_gb_s, matmul_tflop_s}.

    A copy of `elements` values counts bytes read plus bytes written, a `size`³ product 2 size³ operations; 0
    takes sizes that fill the machine.
    """
    elements = elements or (2**29 if _on_gpu(device) else 2**23)
    size = size or (8192 if _on_gpu(device) else 512)
    options: dict[str, Any] = dict(warmup=5, repeat=20, device=device)
    source = torch.randn(elements, device=device).to(dtype)
    copy = time(torch.empty_like(source).copy_, inputs=[(source,)], **options)
    gigabytes = 2e-9 * source.nbytes
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = time(torch.mm, inputs=[(a, b), (b, a)], **options)
    seconds, product_seconds = copy.median_ms / 1e3, product.median_ms / 1e3
    return dict(copy_gb_s=gigabytes / seconds, matmul_tflop_s=2e-12 * size**3 / product_seconds)


def peak_memory(fn: Callable[[], object], device: str | torch.device | None = None) -> int:
    """Bytes that `fn()` holds at its worst moment, beyond what was allocated before it.

    On a GPU (device as for `time`) the CUDA allocator is asked, on a CPU torch's allocations are recorded.
    """
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
    """Build a model of real dimensions with random weights, at once on `device` and in `dtype`.

    config: a `transformers` configuration, or a dict of keyword arguments (`diffusers`). Weights are
    N(0, 1 / fan_in) also where the class starts from zeros: a GPU multiplies zeros faster than real numbers.
    Device "meta" makes shapes only, for counts of models that fit nowhere.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(**config) if isinstance(config, dict) else cls(config)
    finally:
        torch.set_default_dtype(before)
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
    if achieved is None and work is not None and ms:
        achieved, work = 1e3 * work / ms, None
    if achieved is None or work is not None:
        raise ValueError(f"row {name!r} needs achieved=, or work= and a time")
    ratio = achieved / peer if peer else None
    return dict(name=name, ms=ms, achieved=achieved, limit=limit, peer=peer, ratio=ratio, unit=unit)
