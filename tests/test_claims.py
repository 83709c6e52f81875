"""The schema of paper files: what is accepted, and that every fault is refused with its place."""

import copy

import pytest
import yaml
from readrun import claims

PAPER = {
    "slug": "demo",
    "title": "A title",
    "authors": "Someone",
    "arxiv": "2503.20783",
    "official_code": None,
    "part": "reasoning",
    "claims": [
        {
            "id": "c1-shorter",
            "kind": "quality",
            "headline": True,
            "evidence": "toy",
            "statement": "Ours gives shorter answers.",
            "paper": {"value": "520 against 1000", "where": "Fig. 5"},
            "metric": "tokens",
            "arms": {"ours": "ours", "baseline": "base"},
            "rule": {"form": "difference", "direction": "lower", "margin": 0.0},
            "over": "seed",
            "requires": ["c1b-as-good"],
            "gates": ["judge-accuracy"],
        },
        {
            "id": "c1b-as-good",
            "kind": "quality",
            "evidence": "toy",
            "statement": "Ours is as accurate.",
            "metric": "accuracy",
            "arms": {"ours": "ours", "baseline": "base"},
            "rule": {"form": "not_worse", "direction": "higher", "margin": 0.02},
            "over": "seed",
        },
        {
            "id": "judge-accuracy",
            "kind": "sanity",
            "evidence": "toy",
            "statement": "The judge knows the ground truth.",
            "metric": "judge",
            "arms": {"ours": "judge"},
            "rule": {"form": "bound", "direction": "higher", "bound": 0.9},
            "over": "item",
        },
        {
            "id": "c2-many",
            "kind": "ablation",
            "evidence": "toy",
            "statement": "Two of three controls agree.",
            "metric": "tokens",
            "arms": {"ours": "ours", "baseline": "base"},
            "rule": {
                "form": "count",
                "k": 1,
                "rules": [
                    {
                        "form": "ratio",
                        "direction": "lower",
                        "margin": 0.5,
                        "arms": {"ours": "x", "baseline": "y"},
                    },
                    {"form": "equal", "value": 0, "metric": "gap", "over": "exact", "arms": {"ours": "ours"}},
                ],
            },
            "over": "seed",
        },
    ],
    "rubric": {
        "requirements": "All of it",
        "sub_tasks": [
            {"requirements": "Code is right", "weight": 2, "kind": "code"},
            {"requirements": "C1 holds", "weight": 3, "kind": "result", "claims": ["c1-shorter"]},
        ],
    },
}


def text(change=None):
    paper = copy.deepcopy(PAPER)
    if change:
        change(paper)
    return yaml.safe_dump(paper, sort_keys=False)


def test_a_good_file_is_read_and_defaults_are_filled_in():
    paper = claims.parse(text(), "demo.yml")
    first, guard, gate, count = paper.claims
    assert first.headline and not guard.headline and gate.paper.value is None
    assert [leaf.kind for leaf in paper.rubric.leaves()] == ["code", "result"]
    one, two = count.parts()
    assert (one.metric, one.arms.ours, one.over) == ("tokens", "x", "seed")
    assert (two.metric, two.arms.baseline, two.over) == ("gap", None, "exact")
    assert [c.id for c in paper.ordered()].index("c1-shorter") > 1
    assert (gate.caution, first.caution) == ("", "")


def test_items_of_one_toy_training_carry_a_badge_unless_the_file_says_otherwise():
    def items(paper):
        paper["claims"][1]["over"] = "item"

    assert claims.parse(text(items), "x").claims[1].caution == "one training"

    def named(paper):
        items(paper)
        paper["claims"][1]["badge"] = "two trainings"

    assert claims.parse(text(named), "x").claims[1].caution == "two trainings"


def put(path, value):
    def change(paper):
        *way, last = path
        for step in way:
            paper = paper[step]
        if value is None:
            del paper[last]
        else:
            paper[last] = value

    return change


RULE = ("claims", 0, "rule")
BAD = [
    (put(("venue",), "NeurIPS"), "venue: Extra inputs are not permitted"),
    (put(("claims", 0, "margin"), 1), "claims.c1-shorter.margin: Extra inputs"),
    (put((*RULE, "margn"), 1), "claims.c1-shorter.rule.margn: Extra inputs"),
    (put((*RULE, "direction"), None), "claims.c1-shorter.rule: form difference needs direction"),
    (put((*RULE, "bound"), 1), "form difference takes no bound"),
    (
        put((*RULE, "direction"), "down"),
        "claims.c1-shorter.rule.direction: Input should be 'lower' or 'higher'",
    ),
    (put((*RULE, "margin"), -1), "greater than or equal to 0"),
    (put((*RULE, "margin"), float("nan")), "claims.c1-shorter.rule.margin: Input should be"),
    (put(RULE, {"form": "better"}), "form 'better' is none of difference, ratio, bound"),
    (put(RULE, {"form": "ratio", "direction": "higher", "margin": 0.5}), "margin of a ratio"),
    (put(RULE, {"form": "ratio", "direction": "lower", "margin": 1.5}), "margin of a ratio"),
    (put(RULE, {"form": "ratio", "direction": "lower", "margin": 0}), "margin of a ratio"),
    (put(RULE, {"form": "equivalence", "margin": 0}), "margin of an equivalence must be > 0"),
    (put(RULE, {"form": "equivalence", "margin": 0.03, "scale": "ratio"}), "is a factor"),
    (put(RULE, {"form": "bound", "direction": "lower", "bound": 1}), "no arms.baseline"),
    (put(RULE, {"form": "reported"}), "is no headline"),
    (put((*RULE, "metric"), "other"), "metric, arms and over stand beside the rule"),
    (put(("claims", 1, "arms"), {"ours": "ours"}), "claims.c1b-as-good: form not_worse needs arms.baseline"),
    (put(("claims", 3, "rule", "k"), 3), "k is more than there are rules"),
    (
        put(("claims", 3, "rule", "rules", 0), {"form": "reported"}),
        "a sub-rule is neither a count nor reported",
    ),
    (put(("claims", 3, "rule", "rules", 1, "over"), "seed"), "form equal is over: exact"),
    (put(("claims", 0, "over"), "cluster"), "claims.c1-shorter.over: String should match"),
    (put(("claims", 0, "kind"), "sanity"), "is no headline"),
    (put(("claims", 1, "id"), "as-good"), "id must begin with the claim's number"),
    (put(("claims", 1, "id"), "c1"), "id must begin with the claim's number"),
    (put(("claims", 1, "id"), "c1-shorter"), "claim id given twice: c1-shorter"),
    (put(("claims", 0, "requires"), ["c9-none"]), "c1-shorter: requires or gates name 'c9-none'"),
    (put(("claims", 1, "rule"), {"form": "reported"}), "requires or gates name 'c1b-as-good'"),
    (
        put(("amendments",), [{"date": "2026-01-02", "claim": "c9-x", "what": "a" * 12, "why": "b" * 12}]),
        "the amendment of 2026-01-02 names 'c9-x'",
    ),
    (put(("claims", 1, "gates"), ["c1-shorter"]), "requires and gates go in a circle: "),
    (put(("arxiv",), 2503.20783), "arxiv: Input should be a valid string"),
    (
        put(("rubric", "sub_tasks", 0, "weight"), 0),
        "rubric.sub_tasks.0.weight: Input should be greater than 0",
    ),
    (put(("rubric", "sub_tasks", 0, "kind"), "style"), "rubric.sub_tasks.0.kind"),
    (put(("rubric", "sub_tasks", 0, "kind"), None), "either sub_tasks or, as a leaf, a kind"),
    (put(("rubric", "sub_tasks", 0, "claims"), ["c1-shorter"]), "a result leaf, and nothing else"),
    (put(("rubric", "sub_tasks", 1, "claims"), None), "a result leaf, and nothing else"),
    (put(("rubric", "sub_tasks", 1, "claims"), ["c7-x"]), "rubric: 'C1 holds' names 'c7-x'"),
    (put(("rubric", "sub_tasks"), []), "either sub_tasks or, as a leaf, a kind"),
    (
        put(("amendments",), [{"date": "2026", "claim": "c2-many", "what": "a" * 12, "why": "b" * 12}]),
        "amendments.0.date",
    ),
    (put(("claims",), "none"), "claims: Input should be a valid list"),
    (put(("claims", 2), "c3"), "claims.2: Input should be"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_a_fault_is_refused_with_its_place(change, message):
    with pytest.raises(claims.ClaimsError) as caught:
        claims.parse(text(change), "demo.yml")
    assert str(caught.value).startswith("demo.yml") and message in str(caught.value)


def test_all_faults_are_listed_at_once():
    def two(paper):
        paper["venue"] = 1
        paper["claims"][1]["over"] = "seeds"

    with pytest.raises(claims.ClaimsError, match="(?s)c1b-as-good.over.*venue"):
        claims.parse(text(two), "demo.yml")


def test_a_key_given_twice_and_broken_yaml_are_refused():
    with pytest.raises(claims.ClaimsError, match="key given twice: title"):
        claims.parse("title: other\n" + text(), "demo.yml")
    with pytest.raises(claims.ClaimsError, match="not readable as YAML"):
        claims.parse("a: [", "demo.yml")
    with pytest.raises(claims.ClaimsError, match="demo.yml"):
        claims.parse("", "demo.yml")


def test_numbers_without_a_dot_in_the_mantissa_are_numbers():
    assert claims.parse(text().replace("margin: 0.02", "margin: 1e-9"), "x").claims[1].rule.margin == 1e-9


def test_the_digest_covers_what_decides_and_not_the_wording():
    same = claims.parse(text(), "x").claims_sha256

    def digest(*change):
        return claims.parse(text(put(*change)), "x").claims_sha256

    assert digest(("claims", 0, "statement"), "Other words for it.") == same
    assert digest(("claims", 0, "paper"), {"value": "x", "where": "y"}) == same
    assert digest(("claims", 0, "arms"), {"baseline": "base", "ours": "ours"}) == same
    assert digest(("title",), "Another") == same
    for change in [
        ((*RULE, "margin"), 0.1), ((*RULE, "direction"), "higher"), (("claims", 0, "metric"), "other"),
        (("claims", 0, "over"), "item"), (("claims", 0, "requires"), None), (("claims", 0, "gates"), None),
        (("claims", 0, "headline"), False), (("derived",), {"tokens": "chapter_function"}),
        (("claims", 3, "rule", "k"), 2),
    ]:  # fmt: skip
        assert digest(*change) != same, change


def test_load_names_the_missing_and_the_misplaced_file(tmp_path):
    with pytest.raises(claims.ClaimsError, match="chapter 'demo' has no paper file"):
        claims.load("demo", tmp_path / "demo.yml")
    (tmp_path / "demo.yml").write_text(text())
    assert claims.load("demo", tmp_path / "demo.yml").title == "A title"
    with pytest.raises(claims.ClaimsError, match="slug is 'demo', expected 'other'"):
        claims.load("other", tmp_path / "demo.yml")
