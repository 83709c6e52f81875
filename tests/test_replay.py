"""Timing by replays, on a stand-in for CUDA; units that do not end each other."""

from __future__ import annotations

import contextlib
import types

import pytest
import readrun
import torch
from readrun import attempts, bench, replay


def test_a_replay_makes_every_call_in_turn(monkeypatch) -> None:
    """On a stand-in for CUDA whose capture notes the calls and whose replay makes them."""
    calls: list[str] = []
    recorded: list[str] = []

    class Graph:
        def replay(self) -> None:
            calls.extend(recorded)

    @contextlib.contextmanager
    def capture(graph, stream):
        warm = len(calls)
        assert calls == ["a", "b", "c"]  # each of the inputs has been run
        yield
        recorded.extend(calls[warm:])
        del calls[warm:]

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(current_stream=lambda: stream, Stream=lambda: stream, CUDAGraph=Graph, graph=capture,
                 stream=lambda _: contextlib.nullcontext())  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    again, count = replay.together(calls.append, [("a",), ("b",), ("c",)], least=7)
    assert count == 9 and recorded == ["a", "b", "c"] * 3 and calls == ["a", "b", "c"]
    again()
    assert calls == ["a", "b", "c"] * 4
    monkeypatch.setattr(bench, "time", lambda fn, **how: bench.Timing(60.0, 40.0, 80.0, how["repeat"]))
    calls.clear(), recorded.clear()
    took = replay.time(calls.append, inputs=[("a",), ("b",), ("c",)], repeat=4, warmup=3)
    assert took == bench.Timing(60 / 21, 40 / 21, 80 / 21, 4)


def test_on_a_cpu_it_is_the_ordinary_timing() -> None:
    seen: list[int] = []
    took = replay.time(seen.append, inputs=[(1,), (2,)], repeat=3, warmup=1, device="cpu")
    assert seen == [1, 1, 2, 1] and took.n == 3 and took.median_ms >= 0


def good(value: int) -> dict[str, int]:
    return {"value": value}


def bad(value: int) -> dict[str, int]:
    raise ZeroDivisionError(f"of {value}")


def needs(before: readrun.Unit) -> dict[str, int]:
    return {"value": before["value"]}


def test_a_failing_unit_does_not_end_the_others(tmp_path, capsys) -> None:
    run = readrun.start("dr_grpo", profile="smoke", device="cpu", out=str(tmp_path))
    tries = attempts.Attempts(run)
    first = tries.unit(bad, value=1)
    assert not first.done and first.fn == "bad" and "ZeroDivisionError" in capsys.readouterr().out
    assert not tries.unit(needs, before=first).done and tries.unit(good, value=2)["value"] == 2
    with pytest.raises(
        RuntimeError, match=r"2 units failed: bad/value=1: ZeroDivisionError: of 1; needs: Zero"
    ):
        tries.check()
    with pytest.raises(TypeError, match="function with a name"):
        tries.unit(lambda: {})
    attempts.Attempts(run).check()
