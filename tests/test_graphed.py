"""The captured training step, as far as a CPU can: its plain logic, its bfloat16 copy, Muon."""

from __future__ import annotations

import contextlib
import copy
import types

import pytest
import torch
from readrun import graphed, lm, train

CONFIG = lm.causal_config("llama", lm.char_tokenizer("abcdefgh"), width=32, depth=2, heads=4,
                          num_key_value_heads=2, context=32)  # fmt: skip


def tiny(seed: int = 0):
    return lm.causal_lm(CONFIG, seed)


def loss_of(model, ids, keep):
    logits = model.get_output_embeddings()(graphed.causal_states(model, ids)[:, :-1]).float()
    wanted = ids[:, 1:].masked_fill(~keep[:, 1:], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def batches(count: int = 6):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        shape = (3, 9 + i % 2)
        yield torch.randint(11, shape, generator=generator), torch.rand(shape, generator=generator) < 0.7


def test_states_are_those_of_the_model() -> None:
    model, (ids, _) = tiny(), next(batches())
    expected = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(graphed.causal_states(model, ids), expected)


def test_muon_is_that_of_torch() -> None:
    """Matrices of three shapes, tall and wide, two of a shape; one never gets a gradient."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (16, 8), (8, 8), (8, 16), (5, 3))]
    theirs = copy.deepcopy(ours)
    one, other = graphed.Muon(ours, 0.03), torch.optim.Muon(theirs, 0.03, weight_decay=0.0)
    for step in range(4):
        for a, b in list(zip(ours, theirs, strict=True))[:4]:
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.param_groups[0]["lr"] = torch.tensor(0.03 / (step + 1))  # a tensor, as in a capture
        other.param_groups[0]["lr"] = 0.03 / (step + 1)
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-3)  # products of bfloat16 in another order
    moved = (ours[1] - theirs[1]).norm() / (ours[1] - tiny_start(1)).norm()
    assert moved < 0.02
    with pytest.raises(ValueError, match="params"):
        graphed.Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


def tiny_start(which: int) -> torch.Tensor:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((8, 8), (16, 8))][which]


def test_the_plain_step_is_the_updaters() -> None:
    """AdamW with warm-up, cosine and clipping as in `train`, losses and weights to rounding."""
    ours, theirs = tiny(), tiny()
    updater = train.Updater(theirs, 1e-2, steps=6, warmup=2, weight_decay=0.1, clip=0.5)
    expected = train.fit(updater, batches(), lambda m, b: loss_of(m, *b))
    optimizer = graphed.adamw(ours.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    step = graphed.GraphedStep(ours, loss_of, [optimizer], lambda i: updater.rate(i) / 1e-2, clip=0.5)
    assert step.model is ours
    assert step.fit(batches()) == pytest.approx(expected, rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_bfloat16_copy_follows_its_masters() -> None:
    """The copy has the masters' weights after every step, frozen ones included; angles stay exact."""
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    learns = [p for p in model.parameters() if p.requires_grad]
    before = copy.deepcopy(model.state_dict())
    optimizer = graphed.adamw(learns, 1e-2)
    step = graphed.GraphedStep(model, loss_of, [optimizer], lambda i: 1.0, dtype=torch.bfloat16)
    losses = step.fit(list(batches(1)) * 12)
    assert losses[-1] < 0.8 * losses[0]
    assert step.model is not model and step.model.lm_head.weight is step.model.model.embed_tokens.weight
    pairs = list(zip(model.named_parameters(), step.model.parameters(), strict=True))
    assert all(p.dtype == torch.float32 and w.dtype == torch.bfloat16 for (_, p), w in pairs)
    assert all(torch.equal(p.bfloat16(), w) for (_, p), w in pairs)
    assert all(torch.equal(p, before[n]) == ("layers.0." in n) for (n, p), _ in pairs)
    assert torch.equal(step.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    plain = tiny()
    plain.model.layers[0].requires_grad_(False)
    exact = graphed.GraphedStep(
        plain, loss_of, [graphed.adamw((p for p in plain.parameters() if p.requires_grad), 1e-2)], lambda i: 1
    )
    assert losses == pytest.approx(exact.fit(list(batches(1)) * 12), rel=0.03)


def test_captures_and_replays_are_the_plain_steps(monkeypatch) -> None:
    """On a stand-in for CUDA whose capture runs nothing and whose replay runs the step on the kept inputs."""

    def trained(captured: bool):
        model = tiny()
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
        optimizers = [graphed.Muon(matrices, 0.02), graphed.adamw(others, 0.005)]
        step = graphed.GraphedStep(model, loss_of, optimizers, lambda i: 1 / (1 + i), dtype=torch.bfloat16)
        step.graphs, update, kept = captured, step._update, []
        for group, lr in step._rates if captured else []:
            group["lr"] = torch.tensor(lr)

        class Graph:
            def replay(self) -> None:
                self.loss.copy_(update(*self.inputs))

        @contextlib.contextmanager
        def capture(graph, pool, stream):
            graph.loss = torch.zeros(())
            step._update = lambda *inputs: vars(graph).update(inputs=inputs) or graph.loss
            yield
            step._update = update
            kept.append(graph)

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fakes = dict(current_stream=lambda: stream, Stream=lambda: stream, CUDAGraph=Graph, graph=capture,
                     graph_pool_handle=lambda: 1, stream=lambda _: contextlib.nullcontext())  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        losses = step.fit(batches(8))
        assert len(kept) == 2 * captured  # two shapes
        return losses, list(model.parameters())

    plain, captured = trained(False), trained(True)
    assert captured[0] == pytest.approx(plain[0], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain[1], captured[1], strict=True))


def test_a_diverged_run_is_stopped() -> None:
    model = tiny()
    model.model.norm.weight.data[0] = torch.nan
    step = graphed.GraphedStep(model, loss_of, [graphed.adamw(model.parameters(), 1e-2)], lambda i: 1.0)
    with pytest.raises(FloatingPointError, match="nan"):
        step.fit(batches())
