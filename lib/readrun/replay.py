"""Times of short GPU calls without the host: many calls in one CUDA graph, which is replayed.

To start a kernel costs the host tens of microseconds. A kernel that is shorter leaves the GPU waiting, and
events around one call then measure the host. Here the host starts a graph of many calls, which share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from readrun import bench

LEAST = 20  # calls in a graph


def together(fn: Callable, inputs: Sequence[tuple] = ((),), least: int = LEAST) -> tuple[Callable, int]:
    """(replay, count): a function that makes `count` >= `least` calls `fn(*arguments)`, the inputs in turn.

    `fn` may not wait for the GPU. It runs once with each of the inputs first, to compile and allocate.
    """
    rounds = -(-least // len(inputs))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in inputs:
            fn(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        for arguments in [*inputs] * rounds:
            fn(*arguments)
    return graph.replay, rounds * len(inputs)


def time(
    fn: Callable, *, inputs: Sequence[tuple] = ((),), repeat: int = 5, device: str = "cuda", **more: Any
) -> bench.Timing:
    """`bench.time` of one call of `fn`: on a GPU its share of each of `repeat` replays.

    more: `warmup` of `bench.time`, which measures on a CPU. Raises what it raises.
    """
    if device != "cuda":
        return bench.time(fn, inputs=inputs, repeat=repeat, device=device, **more)
    replay, count = together(fn, inputs)
    took = bench.time(replay, repeat=repeat, device=device, **(more | {"warmup": 1}))
    return bench.Timing(took.median_ms / count, took.low / count, took.high / count, took.n)
