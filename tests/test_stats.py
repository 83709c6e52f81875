"""Verdict statistics: every rule form and verdict by hand-made numbers, honesty by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import claims, stats

RULES = {
    "lower": {"form": "difference", "direction": "lower", "margin": 2.0},
    "higher": {"form": "difference", "direction": "higher", "margin": 2.0},
    "ratio": {"form": "ratio", "direction": "higher", "margin": 1.5},
    "ratio_lower": {"form": "ratio", "direction": "lower", "margin": 0.5},
    "bound": {"form": "bound", "direction": "higher", "bound": 0.9},
    "bound_lower": {"form": "bound", "direction": "lower", "bound": 0.9},
    "equivalence": {"form": "equivalence", "margin": 1.0},
    "equal_ratio": {"form": "equivalence", "margin": 1.05, "scale": "ratio"},
    "not_worse": {"form": "not_worse", "direction": "higher", "margin": 1.0},
    "not_slower": {"form": "not_worse", "direction": "lower", "margin": 1.1, "scale": "ratio"},
    "equal": {"form": "equal", "value": 3},
    "reported": {"form": "reported"},
}


def claim(rule, over="seed", baseline="b", id="c1-x", metric="m", **more):
    return claims.Claim(
        id=id, kind="quality", evidence="toy", statement="A statement.", metric=metric, over=over,
        arms={"ours": "a", "baseline": baseline}, rule=rule, **more,
    )  # fmt: skip


def judge(rule, ours, base=None, over="seed", others=None, arrays=None, **more):
    metrics = {"m": {"a": list(ours)} | ({"b": list(base)} if base is not None else {})}
    one = claim(rule, over, "b" if base is not None else None, **more)
    return stats.verdict(one, metrics, others or {}, arrays)


def around(centre, half):
    """Three values whose 95 % t interval is centre ± half."""
    step = half * math.sqrt(3) / 4.302652729911275
    return [centre - step, centre, centre + step]


@pytest.mark.parametrize(
    "rule, low, high, expected",
    [
        ("lower", -5, -2.5, "reproduced"),
        ("lower", -5, -1, "weaker"),
        ("lower", -5, 1, "inconclusive"),
        ("lower", 0.5, 3, "contradicted"),
        ("higher", 2.5, 5, "reproduced"),
        ("higher", 1, 5, "weaker"),
        ("higher", -1, 5, "inconclusive"),
        ("higher", -5, -0.1, "contradicted"),
        ("bound", 0.91, 0.99, "reproduced"),
        ("bound", 0.85, 0.99, "inconclusive"),
        ("bound", 0.5, 0.89, "contradicted"),
        ("bound_lower", 0.5, 0.89, "reproduced"),
        ("bound_lower", 0.91, 0.99, "contradicted"),
        ("equivalence", -0.9, 0.8, "reproduced"),
        ("equivalence", -0.5, 1.2, "inconclusive"),
        ("equivalence", -1.2, 0.5, "inconclusive"),
        ("equivalence", 1.1, 1.8, "contradicted"),
        ("equivalence", -1.8, -1.1, "contradicted"),
        ("not_worse", -0.9, 0.5, "reproduced"),
        ("not_worse", -1.1, 0.5, "inconclusive"),
        ("not_worse", -3, -1.1, "contradicted"),
    ],
)
def test_a_verdict_follows_from_where_the_interval_lies(rule, low, high, expected):
    ours = around((low + high) / 2, (high - low) / 2)
    base = None if rule.startswith("bound") else [0.0] * 3
    found = judge(RULES[rule], ours, base)
    assert found.verdict == expected
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 3)
    assert "Student" in found.method
    assert (found.p <= 0.05) == (expected == "reproduced")


@pytest.mark.parametrize(
    "rule, low, high, expected",
    [
        ("ratio", 1.6, 3, "reproduced"),
        ("ratio", 1.1, 3, "weaker"),
        ("ratio", 0.9, 3, "inconclusive"),
        ("ratio", 0.5, 0.9, "contradicted"),
        ("ratio_lower", 0.2, 0.4, "reproduced"),
        ("ratio_lower", 0.2, 0.9, "weaker"),
        ("ratio_lower", 1.1, 1.3, "contradicted"),
        ("equal_ratio", 0.96, 1.04, "reproduced"),
        ("equal_ratio", 0.9, 1.04, "inconclusive"),
        ("equal_ratio", 1.06, 1.2, "contradicted"),
        ("not_slower", 0.8, 1.09, "reproduced"),
        ("not_slower", 0.8, 1.2, "inconclusive"),
        ("not_slower", 1.11, 1.2, "contradicted"),
    ],
)
def test_ratios_are_judged_on_the_log_scale(rule, low, high, expected):
    logs = around((math.log(low) + math.log(high)) / 2, (math.log(high) - math.log(low)) / 2)
    found = judge(RULES[rule], [7 * math.exp(v) for v in logs], [7.0] * 3)
    assert found.verdict == expected
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.effect == pytest.approx(math.sqrt(low * high))


@pytest.mark.parametrize(
    "rule, ours, base, expected",
    [
        ("equal", [3], None, "reproduced"),
        ("equal", [3, 3, 4], None, "contradicted"),
        ("bound", [0.9], None, "reproduced"),
        ("bound", [0.95, 0.89], None, "inconclusive"),
        ("bound", [0.89], None, "contradicted"),
        ("ratio", [3.0], [2.0], "reproduced"),
        ("ratio", [2.9], [2.0], "weaker"),
        ("ratio", [2.0], [2.0], "inconclusive"),
        ("higher", [2.0], [0.0], "reproduced"),
        ("not_worse", [1.0], [2.0], "reproduced"),
        ("reported", [1.0], [2.0], "reported"),
    ],
)
def test_exact_claims_compare_numbers_without_an_interval(rule, ours, base, expected):
    found = judge(RULES[rule], ours, base, over="exact")
    assert (found.verdict, found.p) == (expected, None)
    assert (found.low is None) == (len(ours) == 1)


def test_zero_is_no_effect_even_at_margin_zero():
    assert (
        judge({"form": "difference", "direction": "lower"}, [1.0], [1.0], over="exact").verdict
        == "inconclusive"
    )


def test_one_seed_or_one_item_decides_nothing():
    for over in ("seed", "item"):
        found = judge(RULES["lower"], [0.0], [100.0], over=over)
        assert (found.verdict, found.effect, found.low, found.high) == ("inconclusive", -100, None, None)
        assert "no interval" in found.note


def test_what_was_not_measured_is_not_run():
    assert judge(RULES["lower"], [], [1.0]).verdict == "not_run"
    assert stats.verdict(claim(RULES["lower"]), {}, {}).verdict == "not_run"
    found = stats.verdict(claim(RULES["lower"]), {"m": {"a": [1.0]}}, {})
    assert found.verdict == "not_run" and "m not measured for b" in found.note


def test_seeds_pair_by_number_and_the_others_are_named():
    metrics = {"m": {"a": [1.0, 2.0, 4.0, 50.0], "b": [70.0, 3.0, 4.0, 7.0]}}
    arrays = {"seeds/m/a": np.array([0, 1, 2, 9]), "seeds/m/b": np.array([8, 0, 1, 2])}
    found = stats.verdict(claim(RULES["lower"]), metrics, {}, arrays)
    assert (found.n, found.effect) == (3, pytest.approx(-7 / 3))
    assert "8, 9" in found.note
    arrays["seeds/m/b"] = np.array([10, 11, 12, 13])
    found = stats.verdict(claim(RULES["lower"]), metrics, {}, arrays)
    assert found.verdict == "not_run" and "no seed in common" in found.note


def test_lists_of_seeds_pair_by_position_and_items_must_pair():
    found = judge(RULES["lower"], [1.0, 2.0, 3.0], [4.0, 5.0])
    assert (found.n, found.effect) == (2, -3) and "left out" in found.note
    with pytest.raises(ValueError, match="m: a and b differ in length"):
        judge(RULES["lower"], [1.0, 2.0, 3.0], [4.0, 5.0], over="item")


def test_a_ratio_of_values_that_are_not_positive_is_refused():
    for ours, over in [
        ([-1.0, 9.0, 9.0], "item"),
        ([0.0, 2.0, 3.0], "seed"),
        ([0.0], "exact"),
        ([0.0] * 3, "item"),
    ]:
        with pytest.raises(ValueError, match="m: a ratio needs positive values"):
            judge(RULES["ratio"], ours, [1.0] * len(ours), over=over)
    assert judge(RULES["ratio"], [0.0, 6.0, 9.0], [1.0] * 3, over="item").effect == pytest.approx(5)


def test_clusters_need_labels_and_widen_the_interval():
    rng = np.random.default_rng(0)
    shift = rng.normal(size=40)
    d = (shift[:, None] + 0.1 * rng.normal(size=(40, 25))).ravel()
    rule = {"form": "difference", "direction": "higher"}
    labels = np.repeat([f"run{i}" for i in range(40)], 25)
    with pytest.raises(ValueError, match="needs an array 'cluster/run'"):
        judge(rule, d, 0 * d, over="cluster:run")
    found = judge(rule, d, 0 * d, over="cluster:run", arrays={"cluster/run": labels})
    naive = judge(rule, d, 0 * d, over="item")
    assert (found.n, naive.n) == (40, 1000)
    assert 4 < (found.high - found.low) / (naive.high - naive.low) < 6  # design effect sqrt(25) = 5
    assert "BCa" in found.method and "run clusters" in found.method
    own = judge(
        rule, d, 0 * d, over="cluster:run", arrays={"cluster/run": labels[:3], "cluster/run/m": labels}
    )
    assert own == found


def test_gates_void_and_guards_weaken():
    yes, no = stats.Verdict("reproduced", p=0.01), stats.Verdict("inconclusive", p=0.4)
    ours, base = around(-5, 1), [0.0] * 3
    held = judge(RULES["lower"], ours, base, others={"c2-g": yes}, requires=["c2-g"], gates=["c2-g"])
    assert held.verdict == "reproduced" and held.p >= 0.01  # a conjunction is as sure as its weakest part
    sure = judge(RULES["lower"], [-5.0] * 3, base, others={"c2-g": yes}, requires=["c2-g"])
    assert sure.p == 0.01
    weak = judge(RULES["lower"], ours, base, others={"c2-g": no}, requires=["c2-g"])
    assert weak.verdict == "weaker" and "not met: c2-g is inconclusive" in weak.note
    void = judge(RULES["lower"], ours, base, others={"c2-g": no}, gates=["c2-g"])
    assert void.p is None  # nothing was tested
    assert void.verdict == "void" and "gate failed: c2-g is inconclusive" in void.note
    for word in ("weaker", "contradicted", "void", "not_run"):
        other = {"c2-g": stats.Verdict(word)}
        assert judge(RULES["lower"], ours, base, others=other, requires=["c2-g"]).verdict == "weaker"
        assert judge(RULES["lower"], ours, base, others=other, gates=["c2-g"]).verdict == "void"
    bad = judge(RULES["lower"], around(5, 1), base, others={"c2-g": no}, requires=["c2-g"])
    assert bad.verdict == "contradicted"  # a guard never improves a verdict
    assert judge(RULES["lower"], [], base, others={"c2-g": no}, gates=["c2-g"]).verdict == "not_run"


def test_count_needs_k_of_its_rules():
    metrics = {
        "m": {"a": around(-5, 1), "b": [0.0] * 3}, "weak": {"a": around(-1.5, 1), "b": [0.0] * 3},
        "open": {"a": around(0, 1), "b": [0.0] * 3}, "wrong": {"a": around(5, 1), "b": [0.0] * 3},
    }  # fmt: skip

    def of(k, *names):
        rules = [{"form": "difference", "direction": "lower", "margin": 2, "metric": n} for n in names]
        return stats.verdict(claim({"form": "count", "k": k, "rules": rules}), metrics, {})

    found = of(2, "m", "m", "wrong")
    assert (found.verdict, found.effect, found.high, found.n) == ("reproduced", 2, 2, 3)
    assert of(2, "m", "weak", "wrong").verdict == "weaker"
    assert of(2, "m", "open", "wrong").verdict == "inconclusive"
    assert of(2, "m", "wrong", "wrong").verdict == "contradicted"
    assert of(2, "m", "missing", "wrong").verdict == "not_run"
    assert of(1, "m", "missing", "wrong").verdict == "reproduced"
    assert of(2, "m", "m", "open").p <= 0.05 < of(3, "m", "m", "open").p


def test_yes_no_items_are_not_certain_where_nothing_failed():
    sure = judge({"form": "bound", "direction": "higher", "bound": 0.95}, [1.0] * 40, over="item")
    assert sure.verdict == "inconclusive" and sure.low == pytest.approx(0.025 ** (1 / 40))
    same = judge(
        {"form": "not_worse", "direction": "higher", "margin": 0.01}, [1.0] * 50, [1.0] * 50, over="item"
    )
    assert same.verdict == "inconclusive" and same.low < -0.01
    many = judge(
        {"form": "not_worse", "direction": "higher", "margin": 0.01}, [1.0] * 900, [1.0] * 900, over="item"
    )
    assert many.verdict == "reproduced"


def test_nothing_varies_is_said():
    assert "nothing varies" in judge(RULES["lower"], [1.0] * 4, [9.0] * 4).note


def test_the_interval_is_the_same_at_every_call():
    values = np.random.default_rng(3).normal(size=200)
    rule = {"form": "difference", "direction": "higher"}
    assert judge(rule, values, 0 * values, over="item") == judge(rule, values, 0 * values, over="item")


def test_many_items_take_little_time_and_memory():
    values = np.random.default_rng(3).normal(size=20_000)
    found = judge({"form": "difference", "direction": "higher"}, values, 0 * values, over="item")
    assert "percentile" in found.method
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(20_000), rel=0.05)


def test_holm_steps_down_and_stops_at_the_first_failure():
    assert stats.holm([0.04, None, 0.02]) == [True, False, True]  # 0.02 <= 0.05 / 2, then 0.04 <= 0.05
    assert stats.holm([0.04, None, 0.03]) == [False, False, False]  # 0.03 > 0.05 / 2: the other is not asked
    assert stats.holm([0.9, 0.001, 0.02, 0.012]) == [False, True, True, True]
    assert stats.holm([]) == []


numbers = st.lists(st.floats(-100, 100, allow_nan=False), min_size=2, max_size=6)


@settings(max_examples=80, deadline=None)
@given(numbers, st.floats(0, 5), st.sampled_from(["difference", "not_worse"]))
def test_direction_is_only_a_sign(values, margin, form):
    up = {"form": form, "direction": "higher", "margin": margin}
    base = [0.0] * len(values)
    one = judge(up, values, base)
    two = judge(up | {"direction": "lower"}, [-v for v in values], base)
    assert one.verdict == two.verdict and one.effect == -two.effect and one.p == two.p


@settings(max_examples=80, deadline=None)
@given(numbers, st.floats(0, 5), st.floats(0.1, 5))
def test_a_larger_margin_never_helps_a_difference_and_always_helps_a_guard(values, margin, more):
    base = [0.0] * len(values)
    order = ["contradicted", "inconclusive", "weaker", "reproduced"]
    rank = [
        [
            order.index(judge({"form": form, "direction": "higher", "margin": m}, values, base).verdict)
            for m in ms
        ]
        for form, ms in (("difference", (margin + more, margin)), ("not_worse", (margin, margin + more)))
    ]
    assert all(a <= b for a, b in rank)


# ---- simulation: what intervals and verdicts promise. Bounds: the promise ± 4 binomial standard errors.


def within(hits, trials, low, high):
    slack = 4 * math.sqrt(0.25 * 0.2 / trials)
    assert low - slack <= hits / trials <= high + slack, hits / trials


@pytest.mark.parametrize("n", [3, 5])
def test_coverage_over_seeds(n):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        shared = rng.normal(0, 5, n)  # what pairing removes
        _, low, high, *_ = stats.estimate(
            shared + rng.normal(2, 1, n), shared + rng.normal(0, 1, n), "seed", False
        )
        hits += low <= 2 <= high
    within(hits, 1000, 0.95, 0.95)


def test_coverage_of_a_ratio_over_seeds():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        a, b = np.exp(rng.normal(math.log(3), 0.4, 4)), np.exp(rng.normal(0, 0.4, 4))
        _, low, high, *_ = stats.estimate(a, b, "seed", True)
        hits += low <= math.log(3) <= high
    within(hits, 1000, 0.95, 0.95)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 999)


@pytest.mark.parametrize("n, log", [(12, False), (12, True), (60, False), (60, True)])
def test_coverage_over_skewed_items(n, log, quick):
    rng = np.random.default_rng(3)
    hits, trials = 0, 500
    for _ in range(trials):
        base = rng.gamma(2, 1, n)
        ours = base + rng.gamma(2, 0.5, n)
        _, low, high, *_ = stats.estimate(ours, base, "item", log)
        hits += low <= (math.log(1.5) if log else 1.0) <= high
    within(hits, trials, 0.92, 0.95)


@pytest.mark.parametrize("clusters", [8, 40])
def test_coverage_over_clusters_of_unequal_size(clusters, quick):
    rng = np.random.default_rng(4)
    hits, trials = 0, 400
    for _ in range(trials):
        size = rng.integers(2, 8, clusters)
        labels = np.repeat(np.arange(clusters), size)
        values = rng.normal(0, 1, clusters)[labels] + rng.normal(0, 0.5, len(labels))
        _, low, high, *_ = stats.estimate(values, None, "cluster:run", False, labels)
        hits += low <= 0 <= high
    within(hits, trials, 0.91, 0.96)


@pytest.mark.parametrize("n, p", [(30, 0.02), (60, 0.97)])
def test_coverage_of_rare_yes_no_items(n, p, quick):
    rng = np.random.default_rng(5)
    one = pair = 0
    for _ in range(400):
        a, b = (rng.random((2, n)) < p).astype(float)
        _, low, high, *_ = stats.estimate(a, None, "item", False)
        one += low <= p <= high
        _, low, high, *_ = stats.estimate(a, b, "item", False)
        pair += low <= 0 <= high
    within(one, 400, 0.95, 1.0)
    within(pair, 400, 0.94, 1.0)


SEEDS = 5
# error rates at a true effect of zero, and where a rule's threshold lies elsewhere also at that threshold
BOTH = {"reproduced": 0.025, "contradicted": 0.025}
RATES = [
    ({"form": "difference", "direction": "lower", "margin": 0.0}, 0.0, BOTH),
    ({"form": "difference", "direction": "lower", "margin": 1.0}, 0.0,
     {"reproduced": (0, 0.005), ("reproduced", "weaker"): 0.025, "contradicted": 0.025}),
    ({"form": "difference", "direction": "lower", "margin": 1.0}, -1.0, {"reproduced": 0.025}),
    ({"form": "not_worse", "direction": "higher", "margin": 1.0}, 0.0, {"contradicted": (0, 0.005)}),
    ({"form": "not_worse", "direction": "higher", "margin": 1.0}, -1.0, BOTH),
    ({"form": "equivalence", "margin": 3.0}, 0.0, {"contradicted": (0, 0.002)}),
    ({"form": "equivalence", "margin": 3.0}, 3.0, BOTH),
    ({"form": "bound", "direction": "higher", "bound": 0.0}, 0.0, BOTH),
]  # fmt: skip


@pytest.mark.parametrize("rule, effect, rates", RATES)
def test_error_rate_of_each_verdict(rule, effect, rates):
    rng, trials = np.random.default_rng(6), 1000
    one = claim(rule, baseline=None if rule["form"] == "bound" else "b")
    words = []
    for _ in range(trials):
        base = np.zeros(SEEDS) if rule["form"] == "bound" else rng.normal(0, 3, SEEDS)
        ours = base + rng.normal(effect, 1.0, SEEDS)
        words.append(stats.verdict(one, {"m": {"a": ours, "b": base}}, {}).verdict)
    for which, rate in rates.items():
        low, high = rate if isinstance(rate, tuple) else (rate, rate)
        share = np.isin(words, which).mean()
        slack = 4 * math.sqrt(0.025 * 0.975 / trials)
        assert low - slack <= share <= high + slack, (which, share)


def test_error_rate_of_a_ratio_and_of_a_bootstrap(quick):
    rng, trials = np.random.default_rng(7), 400
    ratio = claim({"form": "ratio", "direction": "higher", "margin": 1.0})
    items = claim({"form": "difference", "direction": "higher"}, over="item")
    words = {"ratio": [], "items": []}
    for _ in range(trials):
        a, b = np.exp(rng.normal(0, 0.5, (2, SEEDS)))
        words["ratio"].append(stats.verdict(ratio, {"m": {"a": a, "b": b}}, {}).verdict)
        a, b = rng.normal(0, 1, (2, 60))
        words["items"].append(stats.verdict(items, {"m": {"a": a, "b": b}}, {}).verdict)
    for found in words.values():
        for word in ("reproduced", "contradicted"):
            assert np.mean(np.array(found) == word) <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / trials)
        assert np.mean(np.array(found) == "inconclusive") >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / trials)


def test_p_values_are_uniform_where_nothing_is_there():
    rng = np.random.default_rng(8)
    one = claim({"form": "difference", "direction": "higher"})
    ps = []
    for _ in range(1000):
        a, b = rng.normal(0, 1, (2, SEEDS))
        ps.append(stats.verdict(one, {"m": {"a": a, "b": b}}, {}).p)
    one_sided = np.sort([p for p in ps if p < 1])  # the other half lies on the far side and is 1
    assert abs(len(one_sided) / 1000 - 0.5) < 0.05
    assert np.abs(one_sided - np.linspace(0, 1, len(one_sided))).max() < 0.07
