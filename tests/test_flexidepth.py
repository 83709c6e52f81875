"""Chapter flexidepth: oracles for the layer, the runtime, the kernels, the tasks; bad inputs; checkpoints.

The kernel tests run in one child process with TRITON_INTERPRET=1: triton must see it before it is imported.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter
from whole_script import run_script

q = chapter("flexidepth")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tiny(seed: int = 0, **fields):
    """A random Llama of odd sizes, and the same with decisive random routers in layers 2 and 3."""
    sizes = dict(vocab_size=40, hidden_size=48, intermediate_size=80, num_hidden_layers=4)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=64)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = q.LlamaConfig(**(sizes | heads | ends | fields))
    plain = q.lm.causal_lm(config, seed).eval()
    flexi = q.convert(copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in q.routed(flexi):
        for p in layer.router.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        layer.router.router_norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    return plain, flexi


@pytest.fixture(autouse=True)
def own_run(tmp_path_factory, monkeypatch) -> None:
    """The experiment's `run`, which some definitions read: a CPU in smoke."""
    import readrun

    folder = str(tmp_path_factory.mktemp("run"))
    run = readrun.start("flexidepth", profile="smoke", device="cpu", out=folder)
    monkeypatch.setattr(q, "run", run, raising=False)


def ids_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the layer


def test_all_run_equals_llama_bit_for_bit() -> None:
    plain, flexi = tiny()
    ids = ids_of(3, 9)
    for layer in q.routed(flexi):
        layer.force_mask, layer.force_gate = q.constant_mask(True), True
    with torch.no_grad():
        assert torch.equal(flexi(ids).logits, plain(ids).logits)
        for layer in q.routed(flexi):
            layer.force_mask = q.constant_mask(False)
        assert not torch.allclose(flexi(ids).logits, plain(ids).logits, atol=1e-3)


def test_layer_follows_the_formula() -> None:
    """Token by token, head by head, in float64."""
    _, flexi = tiny()
    layer = q.routed(flexi)[0].double()
    x = torch.randn(1, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cos, sin = (t.double() for t in flexi.model.rotary_emb(x.float(), torch.arange(5)[None]))
    with torch.no_grad():
        got = layer(x, position_embeddings=(cos, sin))[0]
        norm = lambda v, w: v / (v.square().mean() + 1e-6) ** 0.5 * w  # noqa: E731
        n = torch.stack([norm(row, layer.input_layernorm.weight) for row in x[0]])

        def turn(v, t):
            return v * cos[0, t] + torch.cat([-v[5:], v[:5]]) * sin[0, t]

        a = layer.self_attn
        assert 0 < layer.last_mask.sum() < 5, "this seed has tokens of both kinds"
        for t in range(5):
            router = layer.router
            u = torch.tanh(norm(router.router_enc.weight @ n[t], router.router_norm.weight))
            g = torch.sigmoid(router.router_head.weight @ (router.router_dec.weight @ u))[0]
            h = x[0, t].clone()
            if g > 0.5:
                heads = []
                for head in range(6):
                    query = turn((a.q_proj.weight @ n[t])[10 * head : 10 * head + 10], t)
                    at = 10 * (head // 3)
                    keys = [turn((a.k_proj.weight @ n[s])[at : at + 10], s) for s in range(t + 1)]
                    values = [(a.v_proj.weight @ n[s])[at : at + 10] for s in range(t + 1)]
                    p = torch.stack([query @ k for k in keys]).div(10**0.5).softmax(0)
                    heads.append(sum(w * v for w, v in zip(p, values, strict=True)))
                h = h + a.o_proj.weight @ torch.cat(heads)
            y = norm(h, layer.post_attention_layernorm.weight)
            m, s = layer.mlp, layer.router_proj
            if g > 0.5:
                out = h + g * m.down_proj.weight @ (F.silu(m.gate_proj.weight @ y) * (m.up_proj.weight @ y))
            else:
                inner = F.silu(s.gate_proj.weight @ y) * (s.down_proj.weight @ y)
                out = h + (1 - g) * s.up_proj.weight @ inner
            # transformers' norm works in float32
            torch.testing.assert_close(got[t], out, rtol=1e-5, atol=1e-5)


def test_gradient_paths() -> None:
    """With all tokens running, the router learns through the factor g alone: dL/dg = dL/dx' . FFN(y)."""
    _, flexi = tiny()
    layer = q.routed(flexi)[0]
    layer.force_mask = q.constant_mask(True)
    x = torch.randn(1, 4, 48)
    cos, sin = flexi.model.rotary_emb(x, torch.arange(4)[None])
    out = layer(x, position_embeddings=(cos, sin))
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad(
        (out * direction).sum(), layer.last_gate, retain_graph=True, allow_unused=True
    )
    n = layer.input_layernorm(x)
    h = x + layer.self_attn(hidden_states=n, position_embeddings=(cos, sin), attention_mask=None)[0]
    ffn = layer.mlp(layer.post_attention_layernorm(h))
    weights = [p for name, p in layer.named_parameters() if name == "router.router_enc.weight"]
    through = torch.autograd.grad((out * direction).sum(), weights)[0]
    gate = torch.sigmoid(layer.router(n))
    expected = torch.autograd.grad((gate * (ffn * direction).sum(-1, keepdim=True).detach()).sum(), weights)[
        0
    ]
    torch.testing.assert_close(through, expected, rtol=1e-4, atol=1e-5)
    assert got is None  # last_gate is a view beside the graph's own tensor
    assert all(p.requires_grad == (".router" in name) for name, p in flexi.named_parameters())


def test_router_collapses() -> None:
    router = q.Router(64, 16).double()
    u = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(router.router_head(router.router_dec(u))[:, 0], u @ router.collapse())


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_skip_loss_against_a_double_loop(seed) -> None:
    rng = np.random.default_rng(seed)
    gates, mask = rng.random((3, 2, 4)), rng.random((2, 4)) < 0.7
    mask[0, 0] = True
    total = [
        sum(gates[layer, b, t] for layer in range(3)) ** 2 for b in range(2) for t in range(4) if mask[b, t]
    ]
    got = q.skip_loss(torch.from_numpy(gates), torch.from_numpy(mask)).item()
    assert got == pytest.approx(sum(total) / len(total), rel=1e-5)
    used = q.layers_used(torch.from_numpy(gates), 0.4)
    assert used.tolist() == [
        [sum(gates[layer, b, t] > 0.4 for layer in range(3)) for t in range(4)] for b in range(2)
    ]


def test_hidden_keys_by_brute_force() -> None:
    """no_kv: the layer's attention equals one over the explicitly visible tokens."""
    _, flexi = tiny()
    layer = q.routed(flexi)[0]
    layer.hide_skipped = True
    mask = torch.tensor([[True, False, True, False, True, True]])
    layer.force_mask = mask
    x = torch.randn(1, 6, 48)
    cos, sin = flexi.model.rotary_emb(x, torch.arange(6)[None])
    with torch.no_grad():
        got = layer(x, position_embeddings=(cos, sin))
        for t in torch.nonzero(mask[0])[:, 0].tolist():
            seen = [s for s in range(t + 1) if mask[0, s]]
            layer.hide_skipped, layer.force_mask = False, torch.ones(1, len(seen), dtype=torch.bool)
            alone = layer(x[:, seen], position_embeddings=(cos[:, seen], sin[:, seen]))
            layer.hide_skipped, layer.force_mask = True, mask
            torch.testing.assert_close(got[0, t], alone[0, -1], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="use_cache"):
            flexi(ids_of(1, 6), use_cache=True)


def test_left_padding_and_cache_change_nothing() -> None:
    _, flexi = tiny()
    rows = [[3, 4, 5, 6], [7, 8]]
    ids, seen = q.decode.left_pad(rows, 0)
    with torch.no_grad():
        position = (seen.cumsum(1) - 1).clamp_min(0)
        both = flexi(ids, attention_mask=seen, position_ids=position).logits[:, -1]
        for row, logits in zip(rows, both, strict=True):
            torch.testing.assert_close(logits, flexi(torch.tensor([row])).logits[0, -1], rtol=1e-4, atol=1e-5)
        whole = flexi(ids[:1]).logits
        first = flexi(ids[:1, :3], use_cache=True)
        then = flexi(ids[:1, 3:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(then.logits[0, -1], whole[0, -1], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- baselines


def small_batch(count: int = 6) -> q.Batch:
    items = [i for task in q.TASKS for i in q.make_items(task, "validation", count // 3, 0, q.SMALL["shape"])]
    return q.encode(items, q.make_tokenizer())


def test_static_skip_removes_least_influential() -> None:
    model = q.base_model(q.SMALL["size"], 0).eval()
    batch = small_batch()
    for i in (5, 6):  # make two layers do almost nothing
        layer = model.model.layers[i]
        layer.self_attn.o_proj.weight.data *= 1e-3
        layer.mlp.down_proj.weight.data *= 1e-3
    influence = q.block_influence(model, batch)
    states: list = []
    hooks = [v.register_forward_hook(lambda m, i, o: states.append((i[0], o))) for v in model.model.layers]
    with torch.no_grad():
        model(batch.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    a, b = states[6]
    cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    assert influence[6].item() == pytest.approx((1 - cosine)[batch.real].mean().item(), abs=1e-5)
    assert q.least_influential(model, 2, batch) == [5, 6]
    short = q.static_skip(model, 2, batch)
    assert len(short.model.layers) == 6 and len(model.model.layers) == 8
    with torch.no_grad():
        torch.testing.assert_close(short(batch.ids).logits, model(batch.ids).logits, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="k=5"):
        q.least_influential(model, 5, batch)


def test_adapter_baselines_route_as_they_say() -> None:
    batch = small_batch()
    static = q.prepare(q.base_model(q.SMALL["size"], 0), "static_adapter", 16, 2.7, batch)
    seen = q.trace(static, batch)
    assert sorted(seen.masks.flatten(1).float().mean(1).tolist()) == [0.0, 0.0, 1.0, 1.0]
    torch.manual_seed(0)
    loose = q.trace(q.prepare(q.base_model(q.SMALL["size"], 0), "random_adapter", 16, 2.7, batch), batch)
    assert abs(q.mean_skip(loose) - 2.7) < 0.25
    assert torch.equal(loose.gates > 0.5, loose.masks) and set(loose.gates.unique().tolist()) == {0.0, 1.0}
    plain = q.prepare(q.base_model(q.SMALL["size"], 0), "no_adapter", 16, 0.0, batch)
    assert (
        all(layer.router_proj is None for layer in q.routed(plain))
        and torch.isfinite(q.trace(plain, batch).nll).all()
    )
    linear = q.prepare(q.base_model(q.SMALL["size"], 0), "linear_router", 16, 0.0, batch)
    assert all(isinstance(layer.router, q.LinearRouter) for layer in q.routed(linear))
    with pytest.raises(ValueError, match="arm="):
        q.prepare(q.base_model(q.SMALL["size"], 0), "magic", 16, 0.0, batch)


def test_training_moves_only_routers_and_adapters() -> None:
    pool = small_batch()
    model = q.prepare(q.base_model(q.SMALL["size"], 0), "flexidepth", 16, 0.0, pool)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    q.fit_routers(model, 0.02, dict(steps=3, batch=8, lr=1e-2), pool, 0)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(".router" in k for k in changed)
    assert {k.split(".")[3] for k in changed} == {"router", "router_proj"}


def test_threshold_is_tuned_to_a_skip() -> None:
    batch = small_batch(12)
    model = q.prepare(q.base_model(q.SMALL["size"], 0), "flexidepth", 16, 0.0, batch)
    tau, skip = q.tune_tau(model, batch, 1.5)
    assert abs(skip - 1.5) < 0.15 and all(layer.tau == tau for layer in q.routed(model))
    assert q.mean_skip(q.trace(model, batch)) == pytest.approx(skip)


# ---------------------------------------------------------------- the runtime


@given(
    st.sampled_from(["random", "all", "none", "one"]),
    st.integers(0, 1000),
    st.sampled_from(["masked", "compact", "predicated"]),
)
@settings(deadline=None, max_examples=16)
def test_modes_agree(kind, seed, mode) -> None:
    _, flexi = tiny()
    ids = ids_of(3, 7, seed)
    force = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(seed)) < 0.5
    if kind != "random":
        force = torch.full_like(force, kind == "all")
        force[:, 0, 3] |= kind == "one"
    for layer, mask in zip(q.routed(flexi), force, strict=True):
        layer.force_mask = mask
    with torch.no_grad():
        expected = flexi(ids).logits
    rt = q.FlexiRuntime(flexi, 3, 7, mode)
    got = rt.prefill(ids, force.to(torch.int8), last=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.stack(rt.last_masks).bool(), force)


def test_modes_agree_in_bfloat16_and_with_own_routes() -> None:
    _, flexi = tiny()
    ids = ids_of(4, 12)
    for kind, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model = copy.deepcopy(flexi).to(kind)
        rt = q.FlexiRuntime(model, 4, 12, "masked")
        a, masks = rt.prefill(ids, last=False).float(), torch.stack(rt.last_masks)
        rt.mode = "compact"
        b = rt.prefill(ids, last=False).float()
        assert torch.equal(masks, torch.stack(rt.last_masks))
        assert (a - b).norm() / a.norm() < limit


@pytest.mark.parametrize("batch", [1, 3, 10])
@pytest.mark.parametrize("prefix", ["masked", "compact"])
@pytest.mark.parametrize("mode", ["masked", "compact", "predicated"])
def test_decode_continues_any_prefix(batch, prefix, mode) -> None:
    """Skipped tokens write keys and values: prefix in one mode, steps in another, as one full pass."""
    _, flexi = tiny()
    ids = ids_of(batch, 9)
    force = (torch.rand(2, batch, 9, generator=torch.Generator().manual_seed(1)) < 0.5).to(torch.int8)
    for layer, mask in zip(q.routed(flexi), force, strict=True):
        layer.force_mask = mask.bool()
    with torch.no_grad():
        expected = flexi(ids).logits
    rt = q.FlexiRuntime(flexi, 10, 12, prefix)
    rt.prefill(ids[:, :3], force[:, :, :3])
    rt.extend(ids[:, 3:5], force[:, :, 3:5])
    rt.mode = mode
    for t in range(5, 9):
        got = rt.decode(ids[:, t], force[:, :, t].contiguous())
        torch.testing.assert_close(got, expected[:, t], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        rt.mode = "dense"  # without routers: the plain Llama, also on a converted model
        plain, _ = tiny()
        torch.testing.assert_close(rt.prefill(ids, last=False), plain(ids).logits, rtol=1e-4, atol=1e-5)
        rt.prefill(ids[:, :8])
        torch.testing.assert_close(rt.decode(ids[:, 8]), plain(ids).logits[:, 8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "predicated"])
def test_products_in_cublas_give_the_same(mode) -> None:
    """The rival of R1: the same step with all products outside of our kernels."""
    _, flexi = tiny()
    ids, force = ids_of(2, 5), torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)
    logits = []
    for rows in (8, 0):
        rt = q.FlexiRuntime(flexi, 2, 6, mode)
        rt.prefill(ids[:, :4], None)
        rt.kernel_rows = rows
        logits.append(rt.decode(ids[:, 4], force if mode == "predicated" else None))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_runtime_shares_weights_and_refuses_what_does_not_fit() -> None:
    _, flexi = tiny()
    rt = q.FlexiRuntime(flexi, 2, 8)
    pointer = flexi.model.layers[3].self_attn.q_proj.weight.data_ptr()
    assert pointer == rt.layers[3].qkve.data_ptr() and rt.cache.shape == (4, 2, 2, 2, 8, 10)
    for bad in (ids_of(3, 2), ids_of(1, 9), ids_of(1, 4)[0]):
        with pytest.raises(ValueError, match="static cache holds 2 sequences of 8"):
            rt.prefill(bad)
    rt.prefill(ids_of(2, 8))
    with pytest.raises(ValueError, match="static cache"):
        rt.decode(ids_of(2, 1)[:, 0])
    rt.mode = "sparse"
    with pytest.raises(ValueError, match="mode='sparse'.*predicated"):
        rt.prefill(ids_of(1, 2))
    linear = q.prepare(q.base_model(q.SMALL["size"], 0), "linear_router", 16, 0.0, small_batch())
    with pytest.raises(ValueError, match="router"):
        q.FlexiRuntime(linear, 1, 8)


@pytest.mark.parametrize("skip", [0.0, 0.5, 1.0])
def test_flops_equal_the_formula(skip) -> None:
    found = q.count_flops(2, 24, skip, seed=1)
    assert found["counted"] == pytest.approx(found["formula"], rel=0.01)


def test_cost_model_counts_every_byte() -> None:
    """Against a sum over the parameters of a real small model."""
    _, flexi = tiny(num_attention_heads=6, head_dim=8)
    c, sizes = flexi.config, {k: v.numel() for k, v in flexi.named_parameters()}
    dense = sum(v for k, v in sizes.items() if v > 48 and ".router" not in k and "embed" not in k)
    dense += 0 if "lm_head.weight" in sizes else 40 * 48
    kv = 4 * 5 * 2 * 2 * 8  # layers, context, keys and values, heads, width
    assert q.cost_model(c, "dense", 1, 5, 0, 1e12, 1e30) == pytest.approx(2e3 * (dense + kv) / 1e12)
    saved = sum(
        v
        for k, v in sizes.items()
        if k.startswith("model.layers.3.") and ("q_proj" in k or "o_proj" in k or ".mlp." in k)
    )
    adapters = sum(v for k, v in sizes.items() if "layers.3.router_proj" in k)
    router = sum(v for k, v in sizes.items() if "router_enc" in k)
    all_skip = dense - 2 * saved + 2 * adapters + router
    got = q.cost_model(c, "predicated", 1, 5, 2, 1e12, 1e30)
    assert got == pytest.approx(2e3 * (all_skip + kv / 2) / 1e12)
    two = dense - 2 * saved / 4 + 2 * adapters * 3 / 4 + router  # p = 1/2, two sequences: 1/4 stays unread
    assert q.cost_model(c, "predicated", 2, 0, 1, 1e12, 1e30) == pytest.approx(2e3 * two / 1e12)
    batches = [q.cost_model(c, "predicated", b, 5, 1, 1e12, 1e30) for b in (1, 2, 8)]
    assert batches[0] < batches[1] < batches[2]
    with pytest.raises(ValueError, match="mode="):
        q.cost_model(c, "sparse", 1, 5, 0, 1e12, 1e12)


def test_compact_keeps_order() -> None:
    mask = torch.rand(101, generator=torch.Generator().manual_seed(0)) < 0.3
    run, skip = q.compact(mask)
    assert run.tolist() == [i for i in range(101) if mask[i]] and skip.tolist() == [
        i for i in range(101) if not mask[i]
    ]
    assert [len(part) for part in q.compact(torch.zeros(4, dtype=torch.bool))] == [0, 4]
    with pytest.raises(ValueError, match="mask"):
        q.compact(torch.zeros(2, 2, dtype=torch.bool))


# ---------------------------------------------------------------- kernels, in the interpreter


@functools.cache
def child() -> str:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-k",
        "kernel",
        __file__,
    ]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300).stdout


def interpreted(test):
    """Run a kernel test here if this is the child process, else read there whether it passed."""

    @functools.wraps(test)
    def wrapper():
        if INTERPRETED:
            return test()
        pytest.importorskip("triton")
        text = child()
        assert f"PASSED tests/test_flexidepth.py::{test.__name__}" in text or any(
            line.startswith("PASSED") and line.endswith(f"::{test.__name__}") for line in text.splitlines()
        ), text[-3000:]

    return wrapper


@interpreted
def test_gemv_kernel() -> None:
    """Odd sizes, one and several rows, mask patterns; float64 reference; untouched canaries."""
    rng = torch.Generator().manual_seed(0)
    for rows, n, k in ((1, 11, 37), (3, 19, 70)):
        x, w = torch.randn(rows, k, generator=rng), torch.randn(n, k, generator=rng)
        norm = torch.rand(k, generator=rng) + 0.5
        for pattern in ((torch.arange(rows) % 2 == 0), torch.zeros(rows, dtype=torch.bool)):
            out = torch.full((rows, n + 3), 7.0)
            q.gemv_pred(x, w, pattern.to(torch.int8), out[:, :n], norm=norm, eps=1e-5, add=True)
            xd = x.double()
            y = (xd / (xd.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm) @ w.double().T + 7
            expected = torch.where(pattern[:, None], y, torch.full_like(y, 7.0)).float()
            torch.testing.assert_close(out[:, :n], expected, rtol=1e-5, atol=1e-5)
            assert (out[:, n:] == 7).all() and (out[~pattern] == 7).all()
            fresh = q.gemv_pred(x, w, pattern.to(torch.int8), torch.full((rows, n), 7.0))
            plain = torch.where(pattern[:, None], (xd @ w.double().T).float(), torch.full((rows, n), 7.0))
            torch.testing.assert_close(fresh, plain, rtol=1e-5, atol=1e-5)


@interpreted
def test_ffn_or_adapter_kernel() -> None:
    rng = torch.Generator().manual_seed(1)
    for rows in (1, 4):
        d, f, a = 24, 40, 5
        w_in, w_out = torch.randn(2 * f + 2 * a, d, generator=rng), torch.randn(d, f + a, generator=rng)
        norm, h = torch.rand(d, generator=rng), torch.randn(rows, d, generator=rng)
        for bits in range(2 if rows == 1 else 4):
            mask = torch.tensor([(bits + 3 * b) >> (b % 2) & 1 for b in range(rows)], dtype=torch.int8)
            gate = torch.rand(rows, generator=rng)
            y = h.double() / (h.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * norm
            up = w_in.double() @ y.T
            ffn = w_out[:, :f].double() @ (F.silu(up[:f]) * up[f : 2 * f])
            small = w_out[:, f:].double() @ (F.silu(up[2 * f : 2 * f + a]) * up[2 * f + a :])
            part = torch.where(mask.bool(), gate * ffn, (1 - gate) * small).T
            got = q.ffn_or_adapter(
                h.clone(), torch.full((rows, f + a), 9.0), w_in, w_out, norm, mask, gate, f, 1e-5
            )
            torch.testing.assert_close(got, (h.double() + part).float(), rtol=1e-4, atol=1e-4)
        every, full = torch.ones(rows, dtype=torch.int8), torch.ones(rows)  # the dense mode: no adapter
        w_half = w_in[: 2 * f], w_out[:, :f]
        got = q.ffn_or_adapter(h.clone(), torch.empty(rows, f), *w_half, norm, every, full, f, 1e-5)
        torch.testing.assert_close(got, (h.double() + ffn.T).float(), rtol=1e-4, atol=1e-4)


@interpreted
def test_tuned_products_are_kernel_launches_of_a_layer() -> None:
    """What `tune_kernels` times: norm, SwiGLU, gate and residual ride along, without an adapter's half."""
    rng = torch.Generator().manual_seed(4)
    x, norm = torch.randn(1, 24, generator=rng), torch.rand(24, generator=rng)
    others = torch.ones(1, dtype=torch.int8), torch.full((1,), 0.25), norm
    y = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * norm
    for name, n in (("kv", 8), ("o", 24), ("in", 20), ("out", 10)):
        w, out = torch.randn(n, 24, generator=rng), torch.ones(1, n // 2 if name == "in" else n)
        q.product(name, x, out, others, (4, 16, 1, 1), w)
        plain, normed = x.double() @ w.double().T, y @ w.double().T
        gated = F.silu(normed[:, : n // 2]) * normed[:, n // 2 :]
        wanted = {"kv": normed, "o": 1 + plain, "in": gated, "out": 1 + 0.25 * plain}[name]
        torch.testing.assert_close(out, wanted.float(), rtol=1e-4, atol=1e-4)


@interpreted
def test_router_kernel() -> None:
    rng = torch.Generator().manual_seed(2)
    wide = torch.randn(5, 17, generator=rng)
    z, weight, w = wide[:, 6:], torch.rand(11, generator=rng), torch.randn(11, generator=rng)
    u = torch.tanh(z.double() / (z.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight)
    expected = torch.sigmoid(u @ w.double()).float()
    gate, mask = q.router_finish(z, weight, w, 1e-5)
    torch.testing.assert_close(gate, expected, rtol=1e-5, atol=1e-6)
    assert mask.tolist() == (expected > 0.5).int().tolist()
    forced = 1 - mask
    again, other = q.router_finish(z, weight, w, 1e-5, forced=forced)
    assert torch.equal(again, gate) and torch.equal(other, forced)


@interpreted
def test_attention_kernel() -> None:
    """Ragged lengths over several chunks, odd head width, inactive rows; float64 reference."""
    rng = torch.Generator().manual_seed(3)
    size, heads, group, dim, slots = 3, 2, 3, 10, 45
    cache = torch.randn(2, size, heads, slots, dim, generator=rng)
    angle = torch.rand(slots, dim // 2, generator=rng).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    lengths = torch.tensor([0, 31, 44], dtype=torch.int32)
    active = torch.tensor([1, 0, 1], dtype=torch.int8)
    query = torch.randn(size, heads * group, dim, generator=rng)
    key, value = torch.randn(2, size, heads, dim, generator=rng)
    before = cache.clone()
    q.write_kv(key, value, cache, lengths, cos, sin)
    out = q.decode_attn_pred(
        query, cache, lengths, active, cos, sin, torch.full((size, 60), 7.0), None, 16, 32
    )
    half = dim // 2
    for b, at in enumerate(lengths.tolist()):
        turn = lambda v, at=at: v * cos[at] + torch.cat([-v[..., half:], v[..., :half]], -1) * sin[at]  # noqa: E731
        torch.testing.assert_close(cache[0, b, :, at], turn(key[b]))
        assert torch.equal(cache[1, b, :, at], value[b])
        for head in range(heads * group):
            if active[b]:
                k, v = cache[:, b, head // group, : at + 1].double()
                p = (k @ turn(query[b, head]).double() / dim**0.5).softmax(0)
                torch.testing.assert_close(
                    out[b, 10 * head : 10 * head + 10], (p @ v).float(), rtol=1e-4, atol=1e-5
                )
    assert (out[1] == 7).all()
    cache[:, torch.arange(3), :, lengths.long()] = before[:, torch.arange(3), :, lengths.long()]
    assert torch.equal(cache, before), "nothing else was written"


@interpreted
def test_kernels_carry_a_whole_step() -> None:
    small = dict(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    _, flexi = tiny(num_hidden_layers=2, **small)
    ids = ids_of(1, 4)
    with torch.no_grad():
        expected = flexi(ids).logits[:, -1]
    rt = q.FlexiRuntime(flexi, 1, 6, "compact")
    rt.prefill(ids[:, :3])
    rt.mode = "predicated"
    torch.testing.assert_close(rt.decode(ids[:, 3]), expected, rtol=1e-4, atol=1e-5)


def test_references_leave_inactive_rows_alone() -> None:
    x, w, out = torch.randn(3, 5), torch.randn(4, 5), torch.full((3, 4), 7.0)
    q.gemv_pred(x, w, torch.tensor([0, 1, 0], dtype=torch.int8), out)
    assert (out[[0, 2]] == 7).all() and torch.allclose(out[1], w @ x[1], atol=1e-5)
    with pytest.raises(ValueError, match="9 rows"):
        q.gemv_pred(torch.zeros(9, 5), w, torch.ones(9), torch.zeros(9, 4))


# ---------------------------------------------------------------- tasks and scores


def test_items_are_disjoint_and_labelled() -> None:
    shape = q.SMALL["shape"]
    for task in q.TASKS[:-1]:
        count = 40
        rows = {s: q.make_items(task, s, count, 0, shape) for s in ("train", "validation", "test")}
        prompts = {s: {i.prompt for i in items} for s, items in rows.items()}
        assert not prompts["train"] & prompts["test"] and not prompts["validation"] & prompts["test"]
        assert len(prompts["test"]) == count
        for item in rows["test"]:
            assert len(item.kinds) == len(item.answer)
            given = item.prompt[2:-1]
            right = {
                "repeat": lambda g: g,
                "copy": lambda g: g,
                "phrase": lambda g: f"Dear {g}, thank you.",
                "max": lambda g: str(max(map(int, g.split()))),
                "add": lambda g: str(sum(map(int, g.split("+")))),
                "mul": lambda g: str(int(g.split("*")[0]) * int(g.split("*")[1])),
            }[task](given)
            assert item.answer == right
            copied = "".join(a for a, k in zip(item.answer, item.kinds, strict=True) if k == "c")
            assert copied == (given if task in ("repeat", "copy", "phrase") else "")
    train, test = q.prose_of("train"), q.prose_of("test")
    assert test[1000:1400] not in train
    with pytest.raises(ValueError, match="different test items"):
        q.make_items("mul", "test", 30, 0, shape | {"digits": 1})
    with pytest.raises(ValueError, match="task='divide'"):
        q.make_items("divide", "test", 5, 0, shape)


def test_two_widths_change_the_padding_only() -> None:
    """The same rows kept apart by length, with one text that holds a special token; the same loss."""
    items = [q.Item("add", "a 1+2=", "3", "m"), q.Item("copy", "c abc=", "abc<unk>", "ccc"),
             q.Item("mul", "x 12*3=", "36", "mm"), q.Item("repeat", "r 1 2 34=", "1 2 34", "")]  # fmt: skip
    tokenizer, model = q.make_tokenizer(), q.base_model(q.SMALL["size"], 0)
    pool = q.encode(items, tokenizer, 24)
    for item, ids, real in zip(items, pool.ids, pool.real, strict=True):
        expected = tokenizer(item.prompt + item.answer, add_special_tokens=False).input_ids
        assert ids[real].tolist() == [*expected, tokenizer.eos_token_id]
    (few, a), (many, b) = q.by_length(pool, 10, 4)
    assert (a, b) == (2, 2) and few.ids.shape == (2, 10) and many.ids.shape == (2, 24)
    assert torch.equal(few.ids, pool.ids[[0, 2], :10]) and torch.equal(many.target, pool.target[[1, 3]])
    mixed = q.mixed_loss(model, *few, *many)
    assert mixed.item() == pytest.approx(q.answer_loss(model(pool.ids).logits, pool).item(), rel=1e-5)


def test_rows_and_loss_see_answers_only() -> None:
    tokenizer = q.make_tokenizer()
    items = [q.Item("add", "a 1+2=", "3", "m"), q.Item("copy", "c abc=", "abc", "ccc")]
    batch = q.encode(items, tokenizer, 12)
    assert tokenizer.decode(batch.ids[0][batch.target[0]]) == "3<eos>" and batch.target.sum(1).tolist() == [
        2,
        4,
    ]
    assert batch.real.sum(1).tolist() == [8, 10]
    logits = torch.randn(2, 12, len(tokenizer))
    pieces = [
        -logits[r, t - 1].log_softmax(-1)[batch.ids[r, t]]
        for r in range(2)
        for t in range(12)
        if batch.target[r, t]
    ]
    assert q.answer_loss(logits, batch).item() == pytest.approx(torch.stack(pieces).mean().item(), rel=1e-5)
    assert q.kinds_of(items, 11)[0].tolist() == [""] * 5 + ["m"] + [""] * 5
    with pytest.raises(ValueError, match="length=5"):
        q.encode(items, tokenizer, 5)


def test_scores_come_from_generation(monkeypatch) -> None:
    """A model's greedy text decides; the cached and the uncached path write the same."""
    model = q.convert(q.base_model(q.SMALL["size"], 0).eval())
    items = [i for t in q.TASKS for i in q.make_items(t, "test", 2, 0, q.SMALL["shape"])]
    asked = [i for i in items if i.task != "prose"]
    assert q.generate_answers(model, asked, 5) == q.generate_answers(model, asked, 5, cached=False)
    said = [i.answer + "<eos>" for i in asked]
    said[0], said[3] = said[0][:-5], "x" + said[3]
    monkeypatch.setattr(q, "generate_answers", lambda *a, **k: said)
    found = q.score_model(model, items, 24)
    assert found["exact"].tolist() == [[0, 1], [1, 0]] + [[1, 1]] * 4
    scores = q.task_scores(found["exact"], found["nll"])
    assert scores[:2].tolist() == [0.5, 0.5] and scores[-1] == pytest.approx(np.exp(-found["nll"].mean()))
    assert q.retained(scores, scores) == 1 and q.retained(np.array([0.5, 0.9]), np.array([1.0, 0.05])) == 0.5
    with pytest.raises(ValueError, match="every task"):
        q.retained(np.array([0.0]), np.array([0.01]))


def test_layer_use_is_that_of_the_producing_pass() -> None:
    items = [q.Item("copy", "c ab=", "ab", "cc"), q.Item("phrase", "p ab=", "Dear ab", "fffffcc")]
    used = np.zeros((2, 11))
    used[0, 4:6] = (3, 5)  # the pass over "=" made "a", the one over "a" made "b"
    used[1, 4:9], used[1, 9:] = 2, 100  # copied characters of a phrase do not count
    assert q.layers_per_item(used, items).tolist() == [4.0, 2.0]


def test_partial_correlation_removes_entropy_and_position() -> None:
    rng = np.random.default_rng(0)
    items = [
        q.Item("copy", "c ab=", "abc", "ccc") if r % 2 else q.Item("add", "a 1+=", "123", "mmm")
        for r in range(200)
    ]
    entropy = rng.random((200, 8)) + (np.arange(200) % 2 == 0)[:, None]
    place = np.arange(8) * 1.0
    assert abs(q.partial_correlation(3 * entropy + place, entropy, items)) < 1e-6
    label = (np.arange(200) % 2 == 0)[:, None] * 1.0
    assert q.partial_correlation(label + entropy, entropy, items) > 0.99


def test_tuned_choices_reach_the_runtime() -> None:
    _, flexi = tiny()
    rt = q.FlexiRuntime(flexi, 1, 4)
    tuned = {"blocks": {"one/q": [4, 64, 1, 1], "few/q": [8, 64, 1, 1]}}
    tuned["attention"] = dict(block=32, chunk=64, warps=2)
    q.use_tuned(rt, tuned, 1)
    assert (rt.blocks, rt.attention, rt.chunk) == ({"q": (4, 64, 1, 1)}, {}, 256)
    q.use_tuned(rt, tuned, 64)
    assert (rt.blocks, rt.attention, rt.chunk) == ({"q": (8, 64, 1, 1)}, dict(block=32, warps=2), 64)
    times, errors = {(1,): 3.0, (2,): 2.0, (3,): 2.5}, {}
    ms_of = lambda v: times[v] if v in times else 1 / 0  # noqa: E731
    assert q.fastest(ms_of, [(1,), (2,), (3,), (4,)], errors, "x") == (2,) and list(errors) == ["x(4,)"]
    with pytest.raises(RuntimeError, match="no variant of x"):
        q.fastest(ms_of, [(4,)], {}, "x")


def test_choices_and_derived_metrics() -> None:
    assert q.choose_alpha({1e-3: 1.0, 4e-3: 4.2, 16e-3: 6.0}, 4.0) == 4e-3
    assert q.choose_alpha({1e-3: 1.0, 4e-3: 2.0}, 4.0) == 4e-3
    found = q.skip_mismatch({"validation_skip": {"full": [4.0], "no_kv": [4.1]}}, {})
    assert found == {"no_kv": [pytest.approx(0.025)]}
    assert q.skip_mismatch({}, {}) == {}


# ---------------------------------------------------------------- bad input, checkpoints


def test_convert_refuses() -> None:
    plain, flexi = tiny()
    for bad, word in (([4], "0 to 3"), ([1, 1], "different"), ([-1], "0 to 3")):
        with pytest.raises(ValueError, match=word):
            q.convert(copy.deepcopy(plain), bad)
    for reduction in (7, 0, 32):
        with pytest.raises(ValueError, match=f"reduction={reduction}"):
            q.convert(copy.deepcopy(plain), None, reduction)
    with pytest.raises(ValueError, match="converted already"):
        q.convert(flexi)
    with pytest.raises(ValueError, match=r"\(L, B, T\)"):
        q.skip_loss(torch.zeros(2, 3, 4), torch.ones(3, 5))
    q.routed(flexi)[0].force_mask = torch.ones(2, 2)
    with pytest.raises(ValueError, match="force_mask has shape"):
        flexi(ids_of(1, 3))


def test_bench_refuses_a_cpu(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="device: bench measures a GPU"):
        q.bench(1, 16, dict(tiny=False))
    with pytest.raises(ValueError, match="device: bench measures a GPU"):
        q.bench_prefill(1, 16, dict(tiny=False))


def save(folder: Path, seed: int, flexi: bool) -> Path:
    """A small checkpoint in the released layout: config extras, tensor names, weights in several files."""
    model = q.lm.causal_lm(
        q.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        ),
        seed,
    )
    if flexi:
        q.convert(model, [1, 3])
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_released_format_loads(tmp_path, monkeypatch) -> None:
    from safetensors import safe_open

    folder = save(tmp_path / "flexi", 0, True)
    assert (folder / "model.safetensors.index.json").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert (config["routing_layers"], config["router_reduction_factor"], config["proj_reduction_factor"]) == (
        [1, 3],
        16,
        16,
    )
    names: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as part:
            names |= {k: part.get_tensor(k) for k in part.keys() if "router" in k}  # noqa: SIM118
    parts = ["router.router_enc", "router.router_norm", "router.router_dec", "router.router_head"]
    parts += ["router_proj.gate_proj", "router_proj.down_proj", "router_proj.up_proj"]
    assert set(names) == {f"model.layers.{i}.{p}.weight" for i in (1, 3) for p in parts}
    del config["routing_layers"]  # then the tensor names say which layers are routed
    (folder / "config.json").write_text(json.dumps(config))
    model = q.load_checkpoint(str(folder))
    assert model.config.routing_layers == [1, 3]
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in names.items())
    assert q.load_checkpoint(str(save(tmp_path / "plain", 1, False))).config.routing_layers == [2, 3]


def test_missing_router_tensors_are_named(tmp_path, monkeypatch) -> None:
    folder = save(tmp_path / "lost", 1, False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"routing_layers": [2], "router_reduction_factor": 16})
    )
    with pytest.raises(ValueError, match=r"checkpoint:.*model.layers.2.router.router_dec.weight"):
        q.load_checkpoint(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="checkpoint:"):
        q.load_checkpoint(str(tmp_path / "empty"))


def test_checkpoint_path(tmp_path, capsys, monkeypatch) -> None:
    """The whole notebook on a plain and on a FlexiDepth checkpoint: different numbers, modes agree."""
    said = []
    for i in (0, 1):
        folder = save(tmp_path / f"m{i}", i, bool(i))
        out = str(tmp_path / f"run{i}")
        how = dict(profile="smoke", out=out, only="own_model*", checkpoint=str(folder))
        run_script("flexidepth", monkeypatch, figures=False, **how)
        text = capsys.readouterr().out
        layers, depth, nll = re.search(r"([\d.]+) of (\d) layers.*likelihood ([\d.]+)", text).groups()
        gap = float(re.search(r"relative difference (\S+)", text)[1])
        assert depth == "4" and 2 <= float(layers) <= 4 and gap < 1e-5
        said.append(nll)
    assert said[0] != said[1]


def test_committed_base_is_competent(tmp_path, monkeypatch) -> None:
    """The base model of smoke and cpu copies and repeats almost without error, and computes sometimes."""
    items = [i for t in q.TASKS for i in q.make_items(t, "test", 24, 0, q.SMALL["shape"])]
    found = q.score_model(q.load_base("small", q.SMALL["size"]), items, 24)
    score = dict(zip(q.TASKS, q.task_scores(found["exact"], found["nll"]), strict=True))
    assert score["repeat"] > 0.7 and score["phrase"] > 0.7, score
    assert found["skip"] == 0


@interpreted
def test_kernel_errors_are_those_of_rounding() -> None:
    assert max(q.kernel_errors(32, 48, 4, 2, 20, 2, "cpu").values()) < 1e-5
