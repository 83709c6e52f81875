"""Captured training and denoising steps, as far as a CPU can: equal to plain ones; draws and work ahead."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import threading
import types

import pytest
import torch
from readrun import capture, cogvideox, graphed, lm, train


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def loss_of(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def batches(count: int = 12):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(count)
    ]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trainer_is_the_updater_bit_for_bit(frozen: bool) -> None:
    """Schedule, clipping, decay and average; losses, weights and averages are equal, not only close."""
    ours, theirs = net(), net()
    for model in (ours, theirs) if frozen else ():
        model[0].requires_grad_(False)
    options = dict(steps=12, warmup=3, betas=(0.9, 0.99), weight_decay=0.01, ema=0.9)
    trainer, updater = capture.Trainer(ours, loss_of, 0.3, **options), train.Updater(theirs, 0.3, **options)
    for batch in batches():
        trainer(*batch)
    expected = train.fit(updater, batches(), lambda model, batch: loss_of(model, *batch))
    assert trainer.losses() == expected and trainer.network is ours
    for a, b in ((ours, theirs), (trainer.average, updater.average)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(trainer.average[2].weight, ours[2].weight)


def test_nothing_is_collected_in_a_step() -> None:
    """It could free a graph, in any thread, and so end a capture; then it goes on, also after errors."""
    seen: list[bool] = []
    trainer = capture.Trainer(
        net(), lambda model, x, y: (seen.append(gc.isenabled()), loss_of(model, x, y))[1], 0.1, steps=3
    )
    trainer(*batches(1)[0])
    with pytest.raises(RuntimeError):
        trainer(torch.zeros(1, 3), torch.zeros(1, 2))
    assert seen == [False, False] and gc.isenabled()


def test_a_diverged_training_stops() -> None:
    trainer = capture.Trainer(net(), loss_of, 0.1, steps=3)
    x, y = batches(1)[0]
    with pytest.raises(FloatingPointError):
        trainer(x * torch.nan, y)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_made_ahead_comes_in_order(workers: int) -> None:
    """One worker may use one random stream; an error comes where its item would, and threads end."""
    generator, before = torch.Generator().manual_seed(2), threading.active_count()
    make = (
        (lambda i: (i, torch.rand(2, generator=generator))) if workers < 2 else lambda i: (i, torch.zeros(2))
    )
    found = list(capture.ahead(make, 30, workers))
    assert [i for i, _ in found] == list(range(30))
    if workers < 2:
        again = torch.Generator().manual_seed(2)
        assert all(torch.equal(v, torch.rand(2, generator=again)) for _, v in found)
    seen = []
    with pytest.raises(ZeroDivisionError):
        for item in capture.ahead(lambda i: 1 // (5 - i), 30, workers):
            seen.append(item)
    assert len(seen) == 5 and threading.active_count() == before
    assert capture.threads("cpu", 4) == 0 and capture.threads("cuda", 4) == 4


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_spread_work_is_the_plain_work(monkeypatch, backend: str) -> None:
    """In order, elsewhere if there are processes; what cannot be sent is computed here, with its errors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    offset, process = {"value": 7}, os.getpid
    work = lambda i: (i + offset["value"], process())  # noqa: E731
    here, there = (capture.spread(work, range(5), device, backend=backend) for device in ("cpu", "cuda"))
    assert [v for v, _ in here] == [v for v, _ in there] == list(range(7, 12))
    assert {pid for _, pid in here} == {os.getpid()}
    assert (os.getpid() in {pid for _, pid in there}) == (backend == "threading")
    if backend == "loky":
        lock = threading.Lock()  # cannot be pickled
        with pytest.warns(UserWarning, match="computed in this process"):
            assert capture.spread(lambda i: (i, lock.locked()), range(3), "cuda") == [
                (i, False) for i in range(3)
            ]
    with pytest.warns(UserWarning), pytest.raises(ZeroDivisionError):
        capture.spread(lambda i: 1 // i, range(3), "cuda", backend=backend)


@pytest.fixture
def captured(monkeypatch) -> list:
    """A stand-in for CUDA: its graphs note the tensors of the captured call, and compute with them again."""
    graphs, calls, real = [], [], capture.replayed

    class Graph:
        def replay(self) -> None:
            self.out.copy_(self.function(*self.inputs))

    @contextlib.contextmanager
    def graph(one, stream):
        assert not gc.isenabled()
        yield
        one.function, one.inputs, one.out = calls[-1]
        one.out.zero_()  # a capture computes nothing
        graphs.append(one)

    def replayed(owner, name, function, *tensors):
        def noted(*inputs):
            calls.append((function, inputs, function(*inputs).clone()))
            return calls[-1][2]

        return real(owner, name, noted, *tensors)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(current_stream=lambda: stream, Stream=lambda: stream, CUDAGraph=Graph, graph=graph,
                 stream=lambda _: contextlib.nullcontext())  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(capture, "captures", lambda tensor: True)
    monkeypatch.setattr(capture, "replayed", replayed)
    return graphs


def test_a_replay_is_the_function_on_new_inputs(captured) -> None:
    """One capture per shape and name; a replay sees new inputs and weights that changed in place."""
    model = net()
    for i, (x, _) in enumerate(batches(3)):
        for some, name in ((x, "a"), (x[:2], "a"), (x, "b")):
            found = capture.replayed(model, name, model.forward, some)
            assert torch.equal(found, model(some)) and not found.requires_grad
        assert len(captured) == 3, i
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    assert len(capture._GRAPHS[model]) == 3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_captured_sampler_is_the_plain_one(captured, monkeypatch, guidance: float) -> None:
    """Two batches, with condition, offset and both branches of guidance: one capture, equal latents."""
    words = lm.word_tokenizer(["a hand reaches the red disc"], pattern=r"\w+")
    model = cogvideox.build(words, frames=3, height=16, width=16, text_length=6, hidden=64, depth=1, heads=2,
                            text_width=32, condition_channels=48, ofs_embed_dim=64).eval()  # fmt: skip
    found = []
    for captures in (True, False):
        monkeypatch.setattr(capture, "captures", lambda tensor, yes=captures: yes)
        for i, prompts in enumerate((["a red disc", "a hand"], ["the disc", "a"])):
            condition = torch.full((2, *model.shape), 0.1 * i)
            own = dict(ofs=torch.tensor([1.0, 2.0 + i]), generator=torch.Generator().manual_seed(i))
            found.append(cogvideox.sample(model, model.embed(prompts), steps=5, guidance_scale=guidance,
                                          condition=condition, **own))  # fmt: skip
    assert len(captured) == 1
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.allclose(found[0], found[1])


def test_a_bfloat16_network_is_near_the_exact_one() -> None:
    """What a GPU computes with: weights in bfloat16, latents and losses in float32."""
    model = cogvideox.build(None, frames=3, height=16, width=16, text_length=4, text_width=32, hidden=64,
                            depth=2, heads=2)  # fmt: skip
    half = graphed._copy_in(model, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    noisy, embeds = (torch.randn(s, generator=generator) for s in ((2, *model.shape), (2, 4, 32)))
    exact, found = (m(noisy, torch.tensor([10, 900]), embeds) for m in (model, half))
    assert found.dtype == torch.float32 and (found - exact).norm() < 0.03 * exact.norm()
    assert copy.deepcopy(half).transformer.proj_out.weight.dtype == torch.bfloat16
