"""Timings, ceilings and memory against hand-made clocks and allocations of known size."""

import pytest
import torch
from readrun import bench
from transformers import LlamaConfig, LlamaForCausalLM


def test_time_rotates_the_inputs_and_reports_median_and_quartiles(monkeypatch):
    durations, seen, clock = iter([9, 1, 2, 3, 4, 5, 100]), [], [0.0]
    monkeypatch.setattr(bench, "perf_counter", lambda: clock[0])

    def work(name):
        seen.append(name)
        clock[0] += next(durations) / 1e3

    timing = bench.time(work, inputs=[("a",), ("b",), ("c",)], warmup=1, repeat=6, device="cpu")
    assert seen == ["a", "a", "b", "c", "a", "b", "c"]
    assert timing.median_ms == pytest.approx(3.5) and timing.n == 6
    assert (timing.low, timing.high) == (pytest.approx(2.25), pytest.approx(4.75))


@pytest.mark.parametrize("wrong", [{"inputs": []}, {"warmup": 0}, {"repeat": 2}])
def test_time_refuses_measurements_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match="at least 1, 1, 3"):
        bench.time(lambda: None, **wrong)


def test_rotated_copies_are_equal_and_lie_apart():
    x, y = torch.randn(3, 4), torch.arange(5)
    sets = bench.rotate(x, y, least=5)
    assert len(sets) == 5
    assert len({tensor.data_ptr() for pair in sets for tensor in pair} | {x.data_ptr(), y.data_ptr()}) == 12
    assert all(torch.equal(a, x) and torch.equal(b, y) for a, b in sets)


def test_ceilings_count_bytes_twice_and_operations_twice(monkeypatch):
    calls = []

    def fixed(fn, *, inputs, **options):
        calls.append(inputs)
        fn(*inputs[0])
        return bench.Timing(2.0, 2.0, 2.0, 3)

    monkeypatch.setattr(bench, "time", fixed)
    found = bench.ceilings("cpu", torch.bfloat16, elements=1000, size=32)
    assert found["copy_gb_s"] == pytest.approx(2 * 1000 * 2 / 2e-3 / 1e9)
    assert found["matmul_tflop_s"] == pytest.approx(2 * 32**3 / 2e-3 / 1e12)
    assert all(t.dtype == torch.bfloat16 and t.float().std() > 0.5 for inputs in calls for t in inputs[0])


def test_peak_memory_is_the_worst_moment_and_not_the_sum_or_the_end():
    kept = torch.ones(1000)
    n = 250_000  # one megabyte in float32

    def steps():
        a = torch.ones(n)
        b = torch.cat([a, a])  # 3 MB held
        del a, b
        return torch.cat([kept, kept])

    assert 12 * n <= bench.peak_memory(steps, "cpu") < 12 * n + 1000
    assert bench.peak_memory(lambda: None, "cpu") == 0


def test_random_models_have_their_type_and_no_zero_weights():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    model = bench.random_model(LlamaForCausalLM, config, torch.bfloat16, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "angles need full precision"
    assert model.model.layers[0].mlp.down_proj.weight.float().std() == pytest.approx(96**-0.5, rel=0.1)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()

    class Zeros(torch.nn.Linear):
        def reset_parameters(self):
            torch.nn.init.zeros_(self.weight)

    layer = bench.random_model(
        Zeros, dict(in_features=400, out_features=100, bias=False), torch.float32, "cpu"
    )
    assert layer.weight.std() == pytest.approx(0.05, rel=0.05)


def test_the_meta_device_counts_and_the_default_type_comes_back():
    model = bench.random_model(LlamaForCausalLM, LlamaConfig(num_hidden_layers=2), torch.bfloat16, "meta")
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert sum(p.numel() for p in model.parameters()) == 2 * layer + 2 * 32000 * 4096 + 4096
    with pytest.raises(TypeError):
        bench.random_model(torch.nn.Linear, {}, torch.float16, "cpu")
    assert torch.get_default_dtype() == torch.float32


def test_rows_divide_work_by_time_and_compare_with_the_peer():
    timing = bench.Timing(4.0, 3.9, 4.2, 10)
    row = bench.row("copy", timing, "GB/s", work=8.0, limit=3000.0, peer=1000.0)
    assert row == dict(
        name="copy", ms=4.0, achieved=2000.0, limit=3000.0, peer=1000.0, ratio=2.0, unit="GB/s"
    )
    memory = bench.row("peak", None, "GB", achieved=1.5, peer=15.0)
    assert memory["ms"] is None and memory["ratio"] == pytest.approx(0.1)
    for wrong in [dict(), dict(work=1.0, achieved=1.0)]:
        with pytest.raises(ValueError, match="achieved"):
            bench.row("x", timing, "GB/s", **wrong)
    with pytest.raises(ValueError, match="time"):
        bench.row("x", None, "GB/s", work=1.0)
