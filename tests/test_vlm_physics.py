"""Oracles and bad inputs of the chapter vlm_physics."""

import numpy as np
import pytest

from readrun import chapter

q = chapter("vlm_physics")


def test_antithetic_points_mirror_each_other():
    points = q.sample("antithetic", 5, np.random.default_rng(1))
    assert points.shape == (10,)
    np.testing.assert_allclose(points[:5] + points[5:], 1)


def test_independent_points_do_not():
    points = q.sample("independent", 5, np.random.default_rng(1))
    assert points.shape == (10,)
    assert np.abs(points[:5] + points[5:] - 1).max() > 0.01


def test_line_is_exact_and_bowl_is_not():
    rng = np.random.default_rng(2)
    assert q.estimate("line", q.sample("antithetic", 1, rng)) == pytest.approx(q.INTEGRALS["line"], abs=1e-12)
    assert abs(q.estimate("bowl", q.sample("antithetic", 1, rng)) - q.INTEGRALS["bowl"]) > 1e-6


def test_integrals_are_those_of_the_functions():
    u = (np.arange(100_000) + 0.5) / 100_000
    for name, truth in q.INTEGRALS.items():
        assert q.estimate(name, u) == pytest.approx(truth, abs=1e-8)


def test_rms_error_by_hand():
    assert q.rms_error(np.array([1.0, 4.0]), 2.0) == pytest.approx(2.5**0.5)


@pytest.mark.parametrize("arm, pairs", [("other", 1), ("antithetic", 0)])
def test_bad_input(arm, pairs):
    with pytest.raises(ValueError):
        q.sample(arm, pairs, np.random.default_rng(0))


def test_checkpoint(tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"coefficients": [1, 2]}')
    bad.write_text("{}")
    assert q.load_polynomial(good).tolist() == [1, 2]
    with pytest.raises(ValueError, match="checkpoint"):
        q.load_polynomial(bad)
