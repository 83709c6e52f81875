"""What every paper file and every committed record must keep; a new chapter is held to it at once."""

import json
import subprocess
from datetime import date

import pytest
import yaml
from readrun import claims, paths, records

CHAPTERS = paths.chapters()
RECORDED = [slug for slug in CHAPTERS if paths.results(slug).exists()]
TOP = (
    "schema slug profile parameters metrics claims seconds render_seconds peak_ram_gib peak_gpu_gib device"
    " versions commit code_sha256 claims_sha256 arrays_sha256 nonce recorded"
).split()


class Undecided(Exception):
    """The history at hand cannot say whether the rules came before the record."""


def git(*arguments):
    done = subprocess.run(["git", "-C", str(paths.root()), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def unregistered(slug):
    """Ids of claims whose rule was not in git before the record and has no amendment made since.

    Before: at the commit that the record names or, where history lacks that, at the parent of the commit
    that brought the record (HEAD while it is not committed).
    """
    record, rules = (
        f.relative_to(paths.root()).as_posix() for f in (paths.results(slug), paths.papers(slug))
    )
    if git("rev-parse", "HEAD") is None:
        raise Undecided("no git history here")
    named = records.load(slug).commit
    base = git("rev-parse", "--verify", "-q", f"{named}^{{commit}}") if named else None
    if base is None and (git("status", "--porcelain", "--", record) or not git("log", "-1", "--", record)):
        base = "HEAD"
    if base is None:
        base = git("rev-parse", "--verify", "-q", git("log", "-1", "--format=%H", "--", record) + "^")
    if base is None:
        shallow = git("rev-parse", "--is-shallow-repository") == "true"
        raise Undecided("shallow clone" if shallow else "the history begins with the record")
    text = git("show", f"{base}:{rules}")
    old = claims.parse(text, f"{rules} at {base[:9]}") if text else None
    before, known = (old.rules(), old.amendments) if old else ({}, [])
    today = claims.load(slug)
    fresh = {a.claim for a in today.amendments if a not in known and a.date <= date.today()}
    both = before | today.rules()
    return [i for i in both if before.get(i) != today.rules().get(i) and i not in fresh]


@pytest.mark.parametrize("slug", CHAPTERS)
def test_every_chapter_has_a_paper_file_with_a_headline(slug):
    paper = claims.load(slug)
    assert any(c.headline for c in paper.claims)
    earned = {i for leaf in paper.rubric.leaves() for i in leaf.claims}
    assert {c.id for c in paper.claims if c.headline} <= earned, (
        "a headline earns no result leaf of the rubric"
    )


@pytest.mark.parametrize("slug", RECORDED)
def test_every_record_is_sound_and_its_verdicts_follow_from_its_numbers(slug):
    results = records.validate(slug)
    assert list(json.loads(paths.results(slug).read_text(encoding="utf-8"))) == TOP
    headlines = [c.id for c in claims.load(slug).claims if c.headline]
    assert "not_run" not in {results.claims[i]["verdict"] for i in headlines}
    assert results.device and results.commit and results.versions and results.seconds > 0
    assert len(results.nonce) == 32
    assert str(paths.root()) not in json.dumps(results.record)


@pytest.mark.parametrize("slug", RECORDED)
def test_the_rules_stood_in_git_before_the_record(slug):
    try:
        assert unregistered(slug) == []
    except Undecided as reason:
        pytest.skip(f"the order of rules and record cannot be told: {reason}")


def test_there_is_no_record_without_a_chapter():
    stray = {f.name.split(".")[0] for f in paths.results("x").parent.glob("*.gpu.*")} - set(CHAPTERS)
    assert not stray


def test_the_scoreboard_shows_every_claim_of_every_chapter():
    rows = records.scoreboard_rows()
    assert len(rows) == sum(len(claims.load(slug).claims) for slug in CHAPTERS)
    assert {row["verdict"] for row in rows} <= set(claims.VERDICTS) and not any(row["error"] for row in rows)


# ---- the check itself, on small histories


@pytest.fixture
def history(tmp_path, monkeypatch):
    """A repository; returns commit(margin=…, amended=…, record=…, **more) -> commit id."""
    from test_claims import PAPER, text

    monkeypatch.setenv("READRUN_ROOT", str(tmp_path / "a"))
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test@example.org")
    assert PAPER["claims"][0]["rule"]["margin"] == 0.0
    (tmp_path / "a").mkdir()
    git("init", "-q", "-b", "main")

    def commit(margin=None, amended=(), record=None, drop=False, wording=None):
        def change(paper):
            paper["claims"][0]["rule"]["margin"] = margin
            paper["claims"][0]["statement"] = wording or "Ours gives shorter answers."
            paper["claims"] = paper["claims"][:3] if drop else paper["claims"]
            paper["amendments"] = [
                {"date": date(2026, 1, 2), "claim": i, "what": "the margin", "why": "it was misread"}
                for i in amended
            ]

        if margin is not None:
            paths.papers("demo").parent.mkdir(parents=True, exist_ok=True)
            paths.papers("demo").write_text(text(change))
        if record is not None:
            paths.results("demo").parent.mkdir(parents=True, exist_ok=True)
            paths.results("demo").write_text(json.dumps({"commit": record}))
            monkeypatch.setattr(records, "load", lambda slug: type("Fake", (), {"commit": record}))
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", "step")
        return git("rev-parse", "HEAD")

    return commit


def test_rules_committed_first_are_fine_and_later_ones_are_not(history):
    history(margin=1.0)
    history(record="")
    assert unregistered("demo") == []
    history(margin=1.0, wording="The same rule in other words.")
    assert unregistered("demo") == []
    history(margin=0.5)
    assert unregistered("demo") == ["c1-shorter"]
    history(margin=0.5, amended=["c1b-as-good"])
    assert unregistered("demo") == ["c1-shorter"]
    history(margin=0.5, amended=["c1-shorter"])
    assert unregistered("demo") == []


def test_rules_that_come_with_the_record_are_too_late(history):
    history(margin=1.0)
    history(margin=0.5, record="")
    assert unregistered("demo") == ["c1-shorter"]


def test_a_file_that_comes_with_the_record_registers_nothing(history):
    history()
    history(margin=1.0, record="")
    assert len(unregistered("demo")) == 4


def test_a_dropped_claim_is_noticed(history):
    history(margin=1.0)
    history(record="")
    history(margin=1.0, drop=True)
    assert unregistered("demo") == ["c2-many"]


def test_an_old_amendment_does_not_excuse_a_new_change(history):
    history(margin=1.0, amended=["c1-shorter"])
    history(record="")
    history(margin=0.5, amended=["c1-shorter"])
    assert unregistered("demo") == ["c1-shorter"]


def test_the_commit_that_the_record_names_counts(history):
    first = history(margin=1.0)
    history(margin=0.5)  # changed between the measurement and its record
    history(record=first)
    assert unregistered("demo") == ["c1-shorter"]
    history(record="0" * 40)  # a commit that this history lacks: the one before the record counts
    assert unregistered("demo") == []


def test_a_record_not_yet_committed_is_compared_with_head(history):
    history(margin=1.0)
    history(record="")
    paths.results("demo").write_text('{"commit": "", "more": 1}')
    assert unregistered("demo") == []
    paths.papers("demo").write_text(paths.papers("demo").read_text().replace("margin: 1.0", "margin: 0.1"))
    assert unregistered("demo") == ["c1-shorter"]


def test_a_shallow_clone_and_a_missing_history_are_undecided(history, tmp_path, monkeypatch):
    history(margin=1.0)
    history(record="")
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{tmp_path / 'a'}", str(tmp_path / "b")], check=True
    )
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path / "b"))
    with pytest.raises(Undecided, match="shallow clone"):
        unregistered("demo")
    (tmp_path / "c").mkdir()
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path / "c"))
    with pytest.raises(Undecided, match="no git history"):
        unregistered("demo")


def test_the_template_of_a_paper_file_keeps_the_schema():
    template = paths.library() / "template" / "paper.yml.txt"
    if not template.exists():
        pytest.skip("no template")
    assert set(yaml.safe_load(template.read_text(encoding="utf-8"))) <= set(claims.Paper.model_fields)
