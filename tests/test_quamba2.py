"""Chapter quamba2: oracles for rotation, clustering, scales, packing, GPTQ, mixer, engine, kernels.

The kernel tests run in one child process with TRITON_INTERPRET=1: triton must see it before it is imported.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter
from transformers import MambaConfig, MambaForCausalLM

q = chapter("quamba2")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tiny(seed: int = 0, groups: int = 2, tied: bool = True, width: int = 128, **fields):
    """A random Mamba-2 with perturbed norms, convolution bias and D; 8 heads, of 32 channels by default."""
    config = q.lm.causal_config(
        "mamba2", q.lm.byte_tokenizer(), width=width, depth=2, heads=8, n_groups=groups, state_size=16,
        chunk_size=8, tie_word_embeddings=tied, **fields,
    )  # fmt: skip
    model = q.lm.causal_lm(config, seed).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        if p.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return model


def ids_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def trained():
    return q.trained_lm("small", {}, {}, 0, "cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def texts():
    found = q.corpus.documents("validation")[0].text.encode()[: 6 * 64]
    return torch.tensor(list(found)).view(6, 64)


# ---------------------------------------------------------------- rotation, reordering, scan


@pytest.mark.parametrize("n", [1, 2, 8, 64, 12, 20, 40, 48, 2560, 5120])
def test_hadamard(n: int) -> None:
    made = q.hadamard(n, torch.float32)
    assert torch.equal(made.abs(), torch.full((n, n), 1.0 / n**0.5).to(made))
    rows = made[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64]]
    assert torch.allclose(rows @ made.T @ made, rows, atol=1e-4)
    if n & (n - 1) == 0:
        assert np.allclose(made, scipy.linalg.hadamard(n) / n**0.5)
    with pytest.raises(ValueError, match="accepted: 2"):
        q.hadamard(n * 7)


@pytest.mark.parametrize(("groups", "tied", "width"), [(1, True, 128), (4, False, 128), (2, True, 48)])
def test_rotation_leaves_logits_alone(groups: int, tied: bool, width: int) -> None:
    model, ids = tiny(groups=groups, tied=tied, width=width), ids_of(2, 19)  # H_48 is not symmetric
    before = logits(model, ids)
    made = q.rotate_(copy.deepcopy(model))
    assert gap(logits(made, ids), before) < 1e-4
    assert gap(logits(q.floating_(made), ids), before) < 1e-4  # and the second one in front of out_proj
    assert (
        gap(logits(q.rotate_(copy.deepcopy(model).double()), ids), logits(copy.deepcopy(model).double(), ids))
        < 2e-6
    )
    assert made.lm_head.weight.data_ptr() != made.backbone.embeddings.weight.data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
def test_reordering_leaves_logits_alone(groups: int) -> None:
    model, ids = tiny(groups=groups), ids_of(2, 19)
    before, rng = logits(model, ids), torch.Generator().manual_seed(3)
    for block in model.backbone.layers:
        heads = torch.cat(
            [torch.randperm(8 // groups, generator=rng) + g * 8 // groups for g in range(groups)]
        )
        inside = torch.stack([torch.randperm(32, generator=rng) for _ in range(8)])
        channels = (heads[:, None] * 32 + inside).flatten()
        q.reorder_(block.mixer, q.ReorderPlan(channels, heads, torch.ones(1), torch.ones(1)))
    assert gap(logits(model, ids), before) < 1e-4


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_scan_is_the_recurrence(chunk: int) -> None:
    rng = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    x, dt, A, B, C, D = (
        new(2, 9, 4, 3),
        new(2, 9, 4).abs(),
        -new(4).abs(),
        new(2, 9, 2, 5),
        new(2, 9, 2, 5),
        new(4),
    )
    state = new(2, 4, 3, 5)
    y, states = q.ssd(x, dt, A, B, C, D, chunk, state)
    for t in range(9):
        expected = torch.zeros(2, 4, 3, dtype=torch.float64)
        state = state.clone()
        for h in range(4):
            decay = (dt[:, t, h] * A[h]).exp()[:, None, None]
            grown = dt[:, t, h, None, None] * x[:, t, h, :, None] * B[:, t, h // 2, None]
            state[:, h] = state[:, h] * decay + grown
            expected[:, h] = (state[:, h] * C[:, t, h // 2, None]).sum(-1) + D[h] * x[:, t, h]
        assert torch.allclose(y[:, t], expected, atol=1e-10)
    assert torch.allclose(states[:, -1], state, atol=1e-10)


# ---------------------------------------------------------------- sort and cluster


def test_sort_and_cluster_finds_planted_groups() -> None:
    """Heads of four shapes in each SSD group, channels of four sizes in each head, shuffled: all found."""
    rng = np.random.default_rng(0)
    edges = np.array([[4, 8, 12], [2, 4, 6], [10, 12, 14], [3, 9, 15]])
    levels = np.array([1.0, 10.0, 40.0, 100.0])
    kinds = np.stack([rng.permutation(np.repeat(np.arange(4), 2)) for _ in range(2)]).ravel()
    stat = np.zeros((16, 16))
    for h, kind in enumerate(kinds):
        size = (0.2, 5.0)[h in {int(np.flatnonzero(kinds == kind)[i]) for i in (0, 2)}]  # of the same shape
        profile = levels[np.searchsorted(edges[kind], np.arange(16), side="right")] * size
        stat[h] = rng.permutation(profile)
    plan = q.sort_and_cluster(torch.from_numpy(stat.ravel()), G=2, H=16, P=16)
    assert sorted(plan.idx_c.tolist()) == list(range(256)) and sorted(plan.idx_h.tolist()) == list(range(16))
    assert (plan.idx_c // 16).view(16, 16).eq(plan.idx_h[:, None]).all()  # channels stay in their head
    assert (plan.idx_h[:8] < 8).all() and (plan.head_sizes == 2).all()
    new = stat.ravel()[plan.idx_c].reshape(16, 16)
    assert (np.diff(new, axis=1) >= 0).all()
    groups = plan.group_of().view(16, 16)
    for i in range(0, 16, 2):  # pairs of one kind, cut where it was planted
        assert kinds[plan.idx_h[i]] == kinds[plan.idx_h[i + 1]]
        cuts = np.flatnonzero(np.diff(groups[i])) + 1
        assert cuts.tolist() == edges[kinds[plan.idx_h[i]]].tolist()
    assert groups.min() == 0 and groups.max() == 31 and len(groups.unique()) == 32
    with pytest.raises(ValueError, match="head groups"):
        q.sort_and_cluster(torch.ones(64), G=2, H=4, P=16)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_ranges_are_contiguous_and_near_the_best(seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).lognormal(0, 1.5, (16, 3)), 0)

    def inertia(sizes: np.ndarray) -> float:
        return sum(((part - part.mean(0)) ** 2).sum() for part in np.split(values, np.cumsum(sizes)[:-1]))

    best = min(inertia(np.diff([0, a, b, 16])) for a in range(1, 15) for b in range(a + 1, 16))
    assert inertia(q.best_ranges(values, 3)) == pytest.approx(best)
    sizes = q.rank_ranges(values, 3)
    assert sizes.sum() == 16 and (sizes > 0).all() and inertia(sizes) >= best * (1 - 1e-9)
    assert q.rank_ranges(np.ones((16, 2)), 4).sum() == 16  # nothing to tell apart


def test_statistic_ignores_padding() -> None:
    model, ids = tiny(), ids_of(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0  # right padding: a causal model's other tokens do not see it
    whole = q.channel_stats(model, [dict(input_ids=ids, attention_mask=mask)])
    parts = [q.channel_stats(model, ids[[0, 2]]), q.channel_stats(model, ids[1:2, :7])]
    for got, a, b in zip(whole, *parts, strict=True):
        assert torch.allclose(got, torch.maximum(a, b), rtol=1e-4)
    for bad in ([], [torch.zeros(2, 0, dtype=torch.long)], [dict(input_ids=ids, attention_mask=0 * mask)]):
        with pytest.raises(ValueError, match="calib"):
            q.channel_stats(model, bad)


# ---------------------------------------------------------------- numbers


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 6, 8]))
def test_quant(seed: int, bits: int) -> None:
    a = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    scale = q.absmax_scale(a, bits)
    made = q.quant(a, scale, bits)
    assert ((made.float() * scale - a).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(q.quant(-a, scale, bits), -made)
    assert (made[a.argsort()].diff() >= 0).all()
    assert q.quant(a * 1e9, scale, bits).min() == -(2 ** (bits - 1))


def test_pack_w4_round_trip() -> None:
    values = torch.randint(16, (5, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = q.pack_w4(values)
    assert packed.shape == (5, 128) and torch.equal(q.unpack_w4(packed), values)
    words = packed.view(torch.int32).long() & 0xFFFFFFFF
    assert (
        words[2, 16 + 3] >> 4 * 6 & 15 == values[2, 128 + 16 * 6 + 3]
    )  # nibble j of word i is weight 16 j + i
    w = torch.randn(5, 256)
    packed, scales = q.quant_w4(w)
    step = scales.float().repeat_interleave(128, 1)
    assert ((q.dequant_w4(packed, scales) - w).abs() <= step * 0.5001 + (w / step > 7) * step).all()
    with pytest.raises(ValueError, match="128"):
        q.quant_w4(torch.ones(2, 100))


def test_gptq() -> None:
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(16, 256, generator=rng)
    packed, scales = q.gptq(w, torch.eye(256))
    plain = q.quant_w4(w)
    assert torch.equal(packed, plain[0]) and torch.equal(scales, plain[1])
    x = torch.randn(600, 40, generator=rng) @ torch.randn(40, 256, generator=rng) + 0.1 * torch.randn(
        600, 256, generator=rng
    )
    linear = torch.nn.Linear(256, 16, bias=False)
    linear.weight.data = w.clone()
    q.gptq_(linear, 2 * x.T @ x)
    errors = [((x @ (v - w).T) ** 2).mean().item() for v in (linear.weight.data, q.dequant_w4(*plain))]
    assert errors[0] < 0.3 * errors[1]


def test_integer_products_are_exact() -> None:
    rng = torch.Generator().manual_seed(0)
    for k in (128, 2048):  # float32 suffices, float64 is needed
        x8 = torch.full((3, k), 127, dtype=torch.int8)
        x8[1:] = torch.randint(-128, 128, (2, k), generator=rng)
        x8[2] = torch.randint(100, 128, (k,), generator=rng)
        w = torch.randn(6, k, generator=rng)
        w[3:] = w[3:].abs() / 4 + 2  # sums beyond 2^24
        packed, scales = q.quant_w4(w)
        ratio, s_ch = q.two_level(packed, scales)
        w8 = q.widen_w4(packed, ratio)
        r = ratio.double().repeat_interleave(128, 1)
        assert torch.equal(w8.double(), ((q.unpack_w4(packed).double() - 8) * r).round().clamp(-127, 127))
        sums = q.w4a8_linear(x8, packed, ratio, s_ch, out_dtype=torch.int32)
        assert torch.equal(sums.long(), x8.long() @ w8.long().T)
        assert torch.equal(q.w8a8_linear(x8, w8, 1.0, out_dtype=torch.int32), sums)
        y, exact = (
            q.w4a8_linear(x8, packed, ratio, s_ch, 0.1),
            0.1 * x8.double() @ q.dequant_w4(packed, scales).double().T,
        )
        bound = 0.1 * 0.51 * s_ch.double() * x8.double().abs().sum(1, keepdim=True) + 1e-3 * exact.abs()
        assert ((y.double() - exact).abs() <= bound).all()
        eight = q.w4a8_linear(x8, packed, ratio, s_ch, 0.1, torch.tensor(0.9))
        assert (
            eight.dtype == torch.int8
            and ((eight.float() - y / 0.9).abs()[eight.float().abs() < 127] <= 0.5001).all()
        )
    with pytest.raises(ValueError, match="x: "):
        q.w4a8_linear(x8.float(), packed, ratio, s_ch)
    with pytest.raises(ValueError, match="x: shape"):
        q.w4a16_linear(torch.ones(2, 64), packed, scales)
    with pytest.raises(ValueError, match="w: torch.float32"):
        q.w8a8_linear(x8, w8.float(), 1.0)


def test_scales_are_absmax_of_their_groups(trained, texts) -> None:
    model = q.rotate_(copy.deepcopy(trained))
    plans = []
    for block, stat in zip(model.backbone.layers, q.channel_stats(model, texts), strict=True):
        plans.append(q.sort_and_cluster(stat, 2, 16, 16))
        q.reorder_(block.mixer, plans[-1])
    seen: dict = {}
    q.listen(model, texts, lambda i, xbc, mask: seen.setdefault(i, xbc))
    scales = q.calibrate(q.floating_(model), texts, plans)
    for i, one in enumerate(scales.layers):
        x, bc = (
            seen[i][..., :256].abs().amax((0, 1)),
            seen[i][..., 256:].unflatten(-1, (2, 2, 32)).abs().amax((0, 1, 4)),
        )
        for group in range(32):
            member = plans[i].group_of() == group
            assert one.x[group] * 127 == pytest.approx(x[member].max().item(), rel=1e-4)
        assert torch.allclose(torch.stack([one.b, one.c]) * 127, bc, rtol=1e-4)
        assert one.state.shape == (32, 32) and (one.state > 0).all()
    assert {len(s.x) for s in q.calibrate(model, texts, [None] * 4).layers} == {1}


def test_state_group_acts_only_with_groups(texts) -> None:
    for groups in (1, 2):
        model = tiny(groups=groups)
        made = [
            q.quantize(model, "w8a8", texts[:2, :16], per_state_group=on, sort_cluster=False)
            for on in (True, False)
        ]
        assert torch.equal(*(logits(m, ids_of(1, 12)) for m in made)) == (groups == 1)


# ---------------------------------------------------------------- the mixer, generation, the engine


def test_unquantised_mixer_is_the_library(trained, texts) -> None:
    made = q.quantize(trained, "w16a16", texts)
    assert gap(logits(made, texts), logits(trained, texts)) < 1e-5
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    model = tiny()
    with torch.no_grad():
        a, b = (
            m(ids_of(2, 20), attention_mask=mask).logits[:, -1]
            for m in (model, q.floating_(copy.deepcopy(model)))
        )
    assert gap(b, a) < 1e-5


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", ["w4a8", "w4a16", "w8a8", "w4a8"]])
def test_generate_equals_full_passes(trained, texts, recipe) -> None:
    """With a float state, decoding with a cache is the full pass; an int8 state changes little."""
    made = q.quantize(trained, recipe, texts, state_bits=16)
    prompt = texts[:2, :30]
    new = made.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(12):
        ids = torch.cat([ids, logits(made, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(new, ids)
    eight = q.quantize(trained, recipe, texts)
    engine = q.Engine(eight, 2)
    steps = eight.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    engine.prefill(prompt)
    found = [engine.ids.clone()]
    for _ in range(11):
        engine.decode()
        found.append(engine.ids.clone())
    assert torch.equal(torch.stack(found, 1), steps[:, 30:])
    a, b = q.stepwise_nll(made, texts, 40, 20).mean(), q.stepwise_nll(eight, texts, 40, 20).mean()
    assert abs(a - b) < 0.05


def test_quantised_state_is_within_half_a_step(trained, texts) -> None:
    made = q.quantize(trained, "w4a8", texts)
    with torch.no_grad():
        cache = made(texts[:2], use_cache=True).cache_params
        assert cache.layers[0].recurrent_states[0].dtype == cache.layers[0].conv_states[0].dtype == torch.int8
    scales = made.backbone.layers[0].mixer.scales
    state = torch.randn(2, 16, 16, 32) * q.state_scale(scales, torch.empty(1, 16, 16, 32)) * 40
    back = q.quant_state(state, scales).float() * q.state_scale(scales, state)
    assert ((back - state).abs() <= q.state_scale(scales, state) * 0.5001)[
        state.abs() < 127 * q.state_scale(scales, state)
    ].all()


def test_quality_falls_in_the_right_order(trained) -> None:
    """Coarser numbers cost likelihood; the split of calibration and test is by document."""
    calib, test = q.sample(256, "validation", 6, 128), q.sample(256, "test", 12, 128)
    nll = {name: q.sequence_nll(q.quantize(trained, calib=calib, **options), test, 12).mean()
           for name, options in {"float": dict(recipe="w16a16"), "w8a8": dict(recipe="w8a8"),
                   "w4a8": dict(recipe="w4a8"),
                                 "rough": dict(recipe="w16a16", xbc_bits=4,
                                 sort_cluster=False)}.items()}  # fmt: skip
    assert nll["float"] - 0.002 < nll["w8a8"] < nll["w4a8"] < nll["rough"]
    own = {d.id for d in q.corpus.documents("test")}
    assert not own & {d.id for split in ("train", "validation") for d in q.corpus.documents(split)}
    assert nll["float"] < q.unigram_nll(256, test) - 1


# ---------------------------------------------------------------- bytes, bad inputs, checkpoints


def test_bytes_are_the_papers(trained, texts) -> None:
    for name, fields in q.CONFIGS.items():
        config = q.Mamba2Config(**q.COMMON | fields)
        found = [round(q.model_bytes(config, r)["total"] / 2**20) for r in ("w16a16", "w8a8", "w4a8")]
        assert tuple(found) == q.PAPER_MIB[name]
        with torch.device("meta"):
            whole = sum(p.numel() for p in q.Mamba2ForCausalLM(config).parameters())
        assert q.model_bytes(config)["total"] == 2 * whole
    config = q.Mamba2Config(**q.COMMON | q.TINY | dict(hidden_size=512, num_heads=16, vocab_size=2048))
    made = q.random_quantized(config, "w4a8", "cpu")
    layers = made.backbone.layers
    half = (
        sum(getattr(x.mixer, k).nbytes for x in layers for k in ("conv_weight", "conv_bias", "norm_weight"))
        / 2
    )
    assert q.measured_bytes(made) - half == pytest.approx(q.model_bytes(config, "w4a8")["total"], rel=0.04)


def test_bad_inputs(trained, texts) -> None:
    with pytest.raises(ValueError, match="recipe: 'w2a2'; accepted: w16a16, w8a8, w4a8, w4a16"):
        q.quantize(trained, "w2a2", texts)
    with pytest.raises(ValueError, match="calib"):
        q.quantize(trained, "w4a8", [])
    first = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="Mamba-1"):
        q.quantize(first, "w4a8", texts)
    with pytest.raises(ValueError, match="prefill|ids"):
        q.Engine(q.quantize(trained, "w4a16", texts, gptq=False), 1).prefill(texts[:1, :2])
    with pytest.raises(ValueError, match="dynamic"):
        q.Engine(q.quantize(trained, "w8a8", texts, dynamic=True), 1)


def test_bench_wants_a_gpu(monkeypatch, tmp_path) -> None:
    import readrun

    monkeypatch.setattr(
        q, "run", readrun.start("quamba2", profile="smoke", device="cpu", out=str(tmp_path)), raising=False
    )
    with pytest.raises(ValueError, match="device"):
        q.bench_models(dict(tiny=False))


def test_checkpoint_in_published_layout(trained, tmp_path, monkeypatch) -> None:
    import readrun

    monkeypatch.setattr(
        q,
        "run",
        readrun.start("quamba2", profile="smoke", device="cpu", out=str(tmp_path / "o")),
        raising=False,
    )
    found = []
    for name, model in (("one", trained), ("two", tiny(5, tied=False))):
        model.save_pretrained(tmp_path / name, max_shard_size="300KB")
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
        found.append(q.own_model(str(tmp_path / name)))
    assert found[0]["nll"] != found[1]["nll"] and found[0]["bytes_after"] < 0.5 * found[0]["bytes_before"]
    config = q.lm.causal_config("llama", q.lm.byte_tokenizer(), width=32, depth=1, heads=2)
    config.save_pretrained(tmp_path / "llama")
    for path in ("llama", "nothing"):
        with pytest.raises(ValueError, match="checkpoint"):
            q.load_checkpoint(str(tmp_path / path))


# ---------------------------------------------------------------- kernels, in the interpreter


@functools.cache
def child() -> dict[str, dict[str, float]]:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kernel_that_does_not_run_or_rounds_down_is_an_error(monkeypatch) -> None:
    def broken(*_args):
        raise RuntimeError("out of resource")

    exact = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) * 200 - 100
    assert q.off_by(exact.round().to(torch.int8), exact) <= 1 < q.off_by(exact.floor().to(torch.int8), exact)
    monkeypatch.setattr(q, "one_call", broken)
    found = q.linear_errors("w4a8", dict(in_proj=(8, 128)), [1, 5], dict(tiny=False), "cpu")
    assert list(found.values()) == [1e9, 1e9]


def linear_cases() -> dict[str, float]:
    """Every kind and variant at odd shapes against float64; integer sums must be exact."""
    found = {}
    tiles = {"gemv4": ("gemv", (2, 32, 1), 4, 2), "gemv4 plain": ("gemv", (2, 16, 0), 4, 2),
    "gemm4": ("fused", (16, 16, 32), 4, 2),
             "gemv": ("gemv", (2, 128, 0), 4, 2), "gemm8": ("fused", (16, 16, 64), 4, 2),
             "unpacked": ("unpacked", (16, 16, 64), 4, 2),
             "library": ("library", (), 4, 2)}  # fmt: skip
    for kind, rows, names in (("w4a16", 1, ["gemv4", "gemv4 plain"]), ("w4a16", 3, ["gemm4", "library"]),
            ("w4a8", 1, ["gemv4 plain"]),
                              ("w4a8", 3, ["gemm4", "unpacked"]), ("w8a8", 1, ["gemv"]), ("w8a8", 19,
                              ["gemm8", "library"]),
                              ("w16a16", 1, ["gemv"])):  # fmt: skip
        for name, n, k in (("in_proj", 8 if rows > 16 else 5, 128), ("out_proj", 8, 384)):
            w, sg, scale = q.make_weights(kind, n, k, "cpu")
            x = q.make_input(kind, rows, k, "cpu", True)
            eps = 1e-5 if kind.endswith("a16") and rows == 1 and name != "out_proj" else None
            expected = q.reference_linear(kind, x, w, sg, scale, eps)
            for plan in names:
                out = q.one_call(
                    kind, name, x, w, sg, scale, tiles[plan], q.out_of(kind, name, rows, n, "cpu")
                )
                found[f"{kind} {name} {plan}"] = q.off_by(out, expected)
                if kind.endswith("a8"):
                    sums = q.kernel_linear(kind, x, w, sg, scale, torch.int32, tiles[plan])
                    exact = q.reference_linear(kind, x, w, sg, torch.ones(n), None)
                    found[f"{kind} {name} {plan} sums"] = float(not torch.equal(sums.double(), exact))
    return found


def row_cases() -> dict[str, float]:
    """The second attempt at one row: one plan of a kind, groups that do not divide the inputs."""
    small = {"w4a16": (4, 2), "w4a8": (4, 2), "w8a8": (2, 128), "w16a16": (2, 128)}
    q.onerow.ROW_PLANS = {kind: [("row", tile, 4, 1)] for kind, tile in small.items()}
    shapes = dict(in_proj=(5, 128), out_proj=(8, 384))
    return {k: v for kind in small for k, v in q.row_errors(kind, shapes, "cpu").items()}


def layer_cases() -> dict[str, float]:
    sizes = dict(
        hidden_size=128,
        num_heads=4,
        head_dim=32,
        expand=1,
        n_groups=2,
        state_size=16,
        tie_word_embeddings=False,
    )
    config = q.Mamba2Config(**q.COMMON | sizes)
    return q.layer_errors(config, 2, 19, "cpu")


def test_linear_kernels() -> None:
    pytest.importorskip("triton")
    found = child()["linear"]
    assert len(found) >= 25 and max(found.values()) <= 1.0, {k: v for k, v in found.items() if v > 1}
    assert max(v for k, v in found.items() if k.startswith(("w4a16", "w16a16"))) < 0.01  # float32 inside


def test_row_kernels() -> None:
    pytest.importorskip("triton")
    found = child()["row"]
    assert len(found) == 12 and max(found.values()) <= 1.0, {k: v for k, v in found.items() if v > 1}
    assert max(v for k, v in found.items() if "a16" in k) < 0.01


def test_bench_refuses_without_its_tuning() -> None:
    with pytest.raises(RuntimeError, match="tune_linear/rows=16 has no result"):
        q.plans_from({"16": types.SimpleNamespace(done=False)})


def test_layer_kernels() -> None:
    pytest.importorskip("triton")
    found = child()["layer"]
    assert len(found) == 24 and max(found.values()) <= 1.0, {k: v for k, v in found.items() if v > 1}
    wide = [v for k, v in found.items() if not k.startswith("w4a8")]
    assert max(wide) < 0.01


if __name__ == "__main__" and INTERPRETED:
    torch.manual_seed(0)
    print(json.dumps({"linear": linear_cases(), "layer": layer_cases(), "row": row_cases()}))
