"""Small networks on a GPU without waiting for the host: steps as CUDA graphs, draws made ahead by threads.

`Trainer` is `train.Updater` on `graphed.GraphedStep`; `replayed` runs a function of tensors as one CUDA graph
per shape; `ahead` makes what comes next in threads. On a CPU all of it is the plain computation, bit for bit.
READRUN_EAGER=1 captures nothing: for a GPU or a driver that refuses.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import joblib
import torch
from torch import Tensor

from readrun import graphed

Item = TypeVar("Item")


def ahead(make: Callable[[int], Item], count: int, workers: int = 1) -> Iterator[Item]:
    """make(0), make(1), … make(count - 1) in this order, up to four per worker made before they are needed.

    workers: threads. One calls `make` in order, so that it may draw from one random stream; more call it in
    any order; 0 makes each item when it is asked for. `make` must stay on the CPU: another thread's calls
    would break a capture.
    """
    if not workers:
        yield from map(make, range(count))
        return
    waiting: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for i in range(count):
                waiting.append(pool.submit(make, i))
                if len(waiting) == 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def threads(device: str | torch.device, most: int = 1) -> int:
    """Workers of `ahead` for this device: on a CPU the one core computes, so none."""
    return most if torch.device(device).type == "cuda" else 0


def spread(
    function: Callable[[Any], Any], items: Iterable[Any], device: str | torch.device, *,
    backend: str = "loky", patience: float = 90.0,
) -> list[Any]:  # fmt: skip
    """[function(item) for item in items], beside a GPU on several cores.

    backend: "loky", fresh processes (a fork of one that holds a GPU may end it): the function, what it
    reaches, items and results are pickled, so it must reach nothing cached and no tensors; "threading", for
    work in libraries that let other threads run. What fails there, or takes more than `patience` seconds for
    one item, is computed here.
    """
    listed = list(items)
    workers = min(4 if backend == "loky" else 8, len(os.sched_getaffinity(0)), len(listed))
    if torch.device(device).type != "cuda" or workers < 2:
        return [function(item) for item in listed]
    try:
        pool = joblib.Parallel(workers, backend=backend, batch_size=1, timeout=patience)
        return pool(joblib.delayed(function)(item) for item in listed)
    except Exception as error:  # a lost worker, a function that cannot be pickled: its own errors come again
        warnings.warn(f"spread: {type(error).__name__}: {error}: computed in this process", stacklevel=2)
    return [function(item) for item in listed]


def captures(tensor: Tensor) -> bool:
    """Whether what is computed on this tensor is captured."""
    return tensor.is_cuda and not os.environ.get("READRUN_EAGER")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection within: what it frees, in any thread, could be a graph, and end a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def send(batch: Iterable[Tensor], device: str | torch.device) -> list[Tensor]:
    """The tensors on the device. To a GPU they go by pinned memory, so that the host does not wait."""
    if torch.device(device).type != "cuda":
        return list(batch)
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]


class Trainer:
    """`loss = trainer(*batch)`: `train.Updater`'s AdamW, schedule, clipping and average, in a captured step.

    loss_of: (model, *tensors) -> loss; no tensor's value may steer it. `model` owns the weights;
    `network` is what computes: on a GPU a bfloat16 copy that follows the weights, elsewhere `model` itself.
    ema: decay of the averaged copy `average`. Raises FloatingPointError where a loss is not finite: at once
    on a CPU, on a GPU when it looks (every `graphed.CHECK_EVERY` steps, and at `losses`).
    """

    def __init__(
        self, model: torch.nn.Module, loss_of: Callable[..., Tensor], lr: float, *, steps: int,
        warmup: int = 0, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0,
        ema: float = 0.0,
    ) -> None:  # fmt: skip
        learns = [p for p in model.parameters() if p.requires_grad]
        optimizer = graphed.adamw(learns, 1.0, betas=betas, weight_decay=weight_decay)

        def rate(i: int) -> float:
            rise = lr * min(1, (i + 1) / max(warmup, 1))
            return rise * (0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)))

        self.step = graphed.GraphedStep(model, loss_of, [optimizer], rate)
        self.step.graphs = self.step.graphs and captures(learns[0])
        self.model, self.network, self.ema = model, self.step.model, ema
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.found: list[Tensor] = []

    def __call__(self, *batch: Tensor) -> Tensor:
        with uncollected():
            loss = self.step(*batch)
        self.found.append(loss)
        if not loss.is_cuda or len(self.found) % graphed.CHECK_EVERY == 0:
            graphed._check(self.found)
        if self.average is not None:  # normalisation layers with running statistics are not expected
            count = len(self.found)
            means, weights = list(self.average.parameters()), [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(means, weights, 1 - min(self.ema, count / (count + 10)))
        return loss

    def losses(self) -> list[float]:
        """All losses so far. Raises FloatingPointError if the last one is not finite."""
        graphed._check(self.found)
        return torch.stack(self.found).tolist() if self.found else []


def fast(model: Any) -> Any:
    """A frozen bfloat16 copy of a module on a GPU, for sampling; on a CPU the module itself."""
    if next(model.parameters()).device.type != "cuda":
        return model
    return graphed._copy_in(model, torch.bfloat16).requires_grad_(False).eval()


_GRAPHS: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()


@torch.no_grad()
def replayed(owner: Any, name: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), a tensor, without gradients; on a GPU as a CUDA graph, captured once per shape.

    owner: the module whose weights it reads; its graphs live as long as it does, and see weights that are
    changed in place. name: all that steers `function` and is no tensor. The next call overwrites the result.
    """
    if not captures(tensors[0]):
        return function(*tensors)
    known = _GRAPHS.setdefault(owner, {})
    key = name, tuple((t.shape, t.dtype) for t in tensors), next(owner.parameters()).data_ptr()
    if key not in known:
        inputs, here, stream = [t.clone() for t in tensors], torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function(*inputs)  # warms up
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.graph(graph, stream=stream):
            known[key] = graph, inputs, function(*inputs)
    graph, inputs, out = known[key]
    for kept, tensor in zip(inputs, tensors, strict=True):
        kept.copy_(tensor)
    graph.replay()
    return out


def replays(owner: Any, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """function(owner, **given) by `replayed`: the tensors among `given` are its inputs, the rest its name.

    With anything but numbers, text and None beside the tensors nothing is captured.
    """

    def call(**given: Any) -> Tensor:
        tensors = {name: v for name, v in given.items() if isinstance(v, Tensor)}
        others = {name: v for name, v in given.items() if name not in tensors}
        if not all(v is None or isinstance(v, (bool, int, float, str)) for v in others.values()):
            return function(owner, **given)

        def of_tensors(*values: Tensor) -> Tensor:
            return function(owner, **others, **dict(zip(tensors, values, strict=True)))

        name = function.__qualname__, *others.items(), *tensors
        return replayed(owner, name, of_tensors, *tensors.values())

    return call
