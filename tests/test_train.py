"""The training loop: schedule, clipping, averaging, and refusal of a loss that is not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from readrun.train import Updater, fit


def line(start: float = 0.0) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, start)
    return model


def test_plain_sgd_step_and_clipping() -> None:
    model = line()
    norm = Updater(model, 0.1, optimizer="sgd", clip=1.0)(5 * model.weight.sum())
    assert norm.item() == pytest.approx(5.0)  # the norm before clipping
    assert model.weight.item() == pytest.approx(-0.1, abs=1e-6)


def test_first_adamw_step_has_the_size_of_the_rate() -> None:
    for scale in (1.0, 1e-3):  # Adam does not see the scale of a loss
        model = line()
        Updater(model, 0.1)(scale * model.weight.sum())
        assert model.weight.item() == pytest.approx(-0.1, rel=1e-4)


def test_schedule() -> None:
    updater = Updater(line(), 1.0, steps=10, warmup=4)
    assert [round(updater.rate(i), 3) for i in (0, 1, 3)] == [0.25, 0.488, 0.794]
    assert updater.rate(10) == pytest.approx(0.0)
    assert Updater(line(), 1.0).rate(1000) == 1.0


def test_average_follows_behind() -> None:
    model = line()
    updater = Updater(model, 0.1, ema=0.5)
    for _ in range(3):
        updater(model.weight.sum())
    assert model.weight.item() < updater.average.weight.item() < 0


def test_average_has_the_running_statistics_of_normalisation_layers() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    updater = Updater(model, 0.1, ema=0.9)
    updater(model(torch.randn(8, 2) + 5).sum())
    assert model[0].running_mean.abs().min() > 0.1
    assert torch.equal(updater.average[0].running_mean, model[0].running_mean)


def test_non_finite_loss_stops_before_any_weight_changes() -> None:
    model = line(1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="loss is nan"):
        Updater(model, 0.1)(model.weight.sum() * torch.nan)
    assert torch.equal(model.weight, before["weight"])


def test_fit_learns() -> None:
    model = line()
    x = torch.linspace(-1, 1, 8).double()[:, None]
    losses = fit(Updater(model, 0.1), [x] * 60, lambda m, x: (m(x) - 3 * x).square().mean())
    assert losses[-1] < 0.01 * losses[0] and model.weight.item() == pytest.approx(3, abs=0.2)
