"""A chapter from the template goes through the whole machine: nothing there is special to the first one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from readrun import new
from site_book import CHECKOUT, SLUG, STEPS, Site, site


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site(tmp_path_factory)


@pytest.mark.parametrize("step", [" ".join(step) for step in STEPS if step != ("pair",)])
def test_every_command_ends_well(made: Site, step: str) -> None:
    code, output = made.log[step]
    assert code == 0, output[-4000:]


def test_record_has_verdicts_from_both_parts(made: Site) -> None:
    record = json.loads((made.root / "data" / "results" / f"{SLUG}.gpu.json").read_text())
    assert {i: c["verdict"] for i, c in record["claims"].items()} == {
        "c1-smaller-error": "reproduced", "c2-exact-on-lines": "reproduced", "c3-not-on-bowls": "reproduced",
    }  # fmt: skip
    assert len(record["metrics"]["rise_error"]["antithetic"]) == 8
    claim = record["claims"]["c3-not-on-bowls"]
    assert claim["low"] > 1.1 and claim["low"] < 2**0.5 < claim["high"] * 1.05  # theory: the variance doubles


def test_page_shows_figure_verdicts_and_picker(made: Site) -> None:
    page = (made.html / "chapters" / f"{SLUG}.html").read_text()
    assert "rr-verdict rr-reproduced" in page and "stale" not in page.lower()
    assert page.count('class="rr-state"') == 6
    pictures = re.findall(r'<img src="(\.\./_static/media/[^"]+)"', page)
    assert len(pictures) >= 7
    for picture in pictures:
        assert (made.html / "chapters" / picture).is_file(), picture
    assert "readrun-media:" not in page
    assert 'alt="The rising curve' in page and "Three antithetic pairs on a rising function." in page


def test_front_page_and_scoreboard_know_it(made: Site) -> None:
    assert f'href="chapters/{SLUG}.html"' in (made.html / "index.html").read_text()
    assert "3 reproduced" in (made.html / "index.html").read_text()
    assert "c3-not-on-bowls" in (made.html / "scoreboard.html").read_text()


def test_its_own_tests_pass(made: Site) -> None:
    done = made.run("-q", f"tests/test_{SLUG}.py", "-p", "no:cacheprovider", module="pytest")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_it_keeps_the_contract_of_chapters(made: Site) -> None:
    """All but the planted faults and the list of the 22 papers, which a new chapter's author adds."""
    contract = str(CHECKOUT / "tests" / "test_contract_chapters.py")
    chosen = f"{SLUG} and not mutants and not listed"
    done = made.run(
        "-q", contract, "-k", chosen, "-p", "no:cacheprovider", "--rootdir", str(made.root), module="pytest"
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[
        -3000:
    ]


@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_it_runs_in_the_small_profiles_without_torch(made: Site, profile: str) -> None:
    no_torch = CHECKOUT / "tests" / "fixture_book" / "no_torch"
    here = Site(made.root)
    here.environment["PYTHONPATH"] += f":{no_torch}"
    folder = made.root / "runs" / profile
    done = here.run("execute", SLUG, "--profile", profile, "--folder", str(folder))
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "ok", (status, done.stdout)
    assert status["seconds"] < 60


def test_new_refuses_a_slug_that_is_there_or_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    files = new.create("tiny")
    assert [f.relative_to(tmp_path).as_posix() for f in files] == [
        "notebooks/tiny.py", "data/papers/tiny.yml", "tests/test_tiny.py",
    ]  # fmt: skip
    assert not [f for f in files if "__slug__" in f.read_text()]
    files[0].unlink()
    with pytest.raises(ValueError, match="already there"):
        new.create("tiny")
    assert not files[0].exists()
    with pytest.raises(ValueError, match="slug"):
        new.create("Tiny-1")


def test_template_is_packaged() -> None:
    assert {"chapter.py.txt", "paper.yml.txt", "test.py.txt", "picker.html"} <= {
        file.name for file in (Path(new.__file__).parent / "template").iterdir()
    }
