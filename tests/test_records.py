"""Results and records: written whole or not at all, checked when read, never silently replaced by less."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from readrun import claims, paths, records, tables

PAPER = """
slug: {slug}
title: "A title"
authors: "Someone"
arxiv: null
official_code: null
part: reasoning
derived: {{gap: gap}}
claims:
  - id: c1-shorter
    kind: quality
    headline: true
    evidence: toy
    statement: "Ours gives shorter answers."
    paper: {{value: "520 against 1000", where: "Fig. 5"}}
    metric: tokens
    arms: {{ours: ours, baseline: base}}
    rule: {{form: difference, direction: lower, margin: 1.0}}
    over: seed
  - id: c2-items
    kind: quality
    evidence: toy
    statement: "Ours is right more often."
    metric: accuracy
    arms: {{ours: ours, baseline: base}}
    rule: {{form: difference, direction: higher}}
    over: item
  - id: c3-gap
    kind: ablation
    evidence: toy
    statement: "The derived gap is positive."
    metric: gap
    arms: {{ours: ours}}
    rule: {{form: difference, direction: higher}}
    over: seed
  - id: c4-later
    kind: cost
    evidence: real-shapes
    statement: "Nobody measured this."
    metric: speed
    arms: {{ours: ours, baseline: base}}
    rule: {{form: ratio, direction: higher, margin: 2.0}}
    over: item
rubric: {{requirements: all, sub_tasks: [{{requirements: code, weight: 1, kind: code}}]}}
"""
SCRIPT = '''# %% tags=["parameters"]
profile = ""
seeds = 0
# %%
def gap(metrics, arrays):
    """How much shorter ours is, per seed."""
    return {"ours": [b - a for a, b in zip(metrics["tokens"]["ours"], metrics["tokens"]["base"])]}
'''
KEYS = (
    "schema slug profile parameters metrics claims seconds render_seconds peak_ram_gib peak_gpu_gib device"
    " versions commit code_sha256 claims_sha256 arrays_sha256 nonce recorded"
)
META = {
    "seconds": 2.0,
    "peak_ram_gib": 1.5,
    "peak_gpu_gib": 7.0,
    "device": "GPU A",
    "versions": {"python": "3.11"},
    "commit": "abc",
    "recorded": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book with one tiny chapter."""
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    add(tmp_path, "tiny")
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("readrun.chapters.")]:
        del sys.modules[name]


def add(root, slug):
    for folder in ("notebooks", "data/papers", "data/results"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "data/papers" / f"{slug}.yml").write_text(PAPER.format(slug=slug))
    (root / "notebooks" / f"{slug}.py").write_text(SCRIPT)


def run(folder, profile="gpu", units=(META,), slug="tiny"):
    from readrun import content

    parameters = {
        "profile": profile,
        "seed": 0,
        "seeds": 0,
        "device": "auto",
        "checkpoint": "",
        "only": "none",
        "out": str(folder),
    }
    return SimpleNamespace(
        slug=slug,
        profile=profile,
        parameters=parameters,
        folder=Path(folder),
        device="cpu",
        render_seconds=1.0,
        units=[SimpleNamespace(done=True, meta=m) for m in units],
        code_sha256=content.content_key(slug, parameters),
    )


def metrics(seeds=4, items=50):
    rng = np.random.default_rng(0)
    return {
        "tokens": {
            "ours": {s: 20 + s + float(rng.normal()) for s in range(seeds)},
            "base": {s: 40 + s + float(rng.normal()) for s in range(seeds)},
        },
        "accuracy": {"ours": (rng.random(items) < 0.9) * 1.0, "base": (rng.random(items) < 0.3) * 1.0},
    }


def made(book, name="run", profile="gpu", slug="tiny", **size):
    folder = book / "build" / name
    return records.save_results(
        run(folder, profile, slug=slug), metrics(**size), {"curve": np.arange(5)}
    ), folder


def recorded(book, slug="tiny"):
    _, folder = made(book, f"run-{slug}", slug=slug)
    return records.write(slug, folder)


def replace(folder):
    """Make the results in `folder` the record although the old one is broken or has more."""
    paths.results("tiny").unlink()
    return records.write("tiny", folder)


def edit(change, slug="tiny"):
    file = paths.results(slug)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_results_are_saved_read_back_and_judged(book):
    saved, folder = made(book)
    read = records.from_folder(folder)
    assert list(json.loads((folder / "results.json").read_text())) == KEYS.split()
    assert read.record == saved.record
    assert set(read.arrays) == {"curve", "seeds/tokens/ours", "seeds/tokens/base"}
    words = {i: c["verdict"] for i, c in read.claims.items()}
    expected = ["reproduced", "reproduced", "reproduced", "not_run"]
    assert words == dict(zip(["c1-shorter", "c2-items", "c3-gap", "c4-later"], expected, strict=True))
    one = read.claims["c1-shorter"]
    assert (one["n"], one["over"]) == (4, "seed") and one["low"] < one["effect"] < one["high"] < -1
    assert len(read.metrics["gap"]["ours"]) == 4 and read.metrics["accuracy"]["ours"][0] in (0.0, 1.0)
    assert read.slug == "tiny" and not read.stale
    with pytest.raises(AttributeError):
        read.nothing  # noqa: B018


def test_provenance_sums_seconds_and_takes_the_largest_peaks(book):
    later = META | {
        "seconds": 3.5,
        "peak_ram_gib": 1.0,
        "peak_gpu_gib": None,
        "device": "GPU B",
        "commit": "def",
        "versions": {"python": "3.12", "torch": "2.11"},
        "recorded": "2026-01-02T00:00:00+00:00",
    }
    found = records.save_results(run(book / "r", units=(later, META)), metrics())
    assert (found.seconds, found.peak_ram_gib, found.peak_gpu_gib) == (5.5, 1.5, 7.0)
    assert (found.device, found.commit) == ("GPU A + GPU B", "def")
    assert found.versions == {"python": "3.12", "torch": "2.11"}
    assert set(found.parameters) == {"profile", "seed", "seeds", "checkpoint"}  # no path of this machine
    again = records.save_results(run(book / "r", units=(later, META)), metrics())
    assert len(found.nonce) == 32 and found.nonce != again.nonce
    assert found.recorded.endswith("+00:00")
    plain = records.save_results(run(book / "p", units=()), metrics())
    assert plain.seconds == 0 and plain.device and plain.versions["python"]
    assert (plain.peak_ram_gib, plain.peak_gpu_gib) == (None, None)


def test_an_empty_run_gives_not_run_and_says_what_a_derived_metric_lacks(book):
    with pytest.warns(UserWarning, match="derived metric gap lacks 'tokens'"):
        found = records.save_results(run(book / "r", units=()), {})
    assert {c["verdict"] for c in found.claims.values()} == {"not_run"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "many", [1, 2]])
def test_a_value_that_is_no_number_is_refused_by_name(book, bad):
    values = metrics()
    values["tokens"]["base"][2] = bad
    with pytest.raises(ValueError, match="metric 'tokens', arm 'base': value .* of 2 is no finite number"):
        records.save_results(run(book / "r"), values)
    assert not (book / "r" / "results.json").exists()


def test_tensors_are_taken_and_objects_refused(book):
    torch = pytest.importorskip("torch")
    values = metrics() | {"accuracy": {"ours": torch.ones(3), "base": [torch.tensor(0.5)] * 3}}
    found = records.save_results(run(book / "r"), values, {"t": torch.ones(2, requires_grad=True)})
    assert found.metrics["accuracy"] == {"ours": [1.0] * 3, "base": [0.5] * 3}
    assert found.arrays["t"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="array strange"):
        records.save_results(run(book / "r"), values, {"strange": np.array([{}])})


def test_arrays_beyond_half_a_megabyte_are_refused_and_the_old_results_stay(book):
    saved, folder = made(book)
    noise = np.random.default_rng(0).random(100_000)
    with pytest.raises(ValueError, match=r"results.npz: .* at most 500,000; largest: noise"):
        records.save_results(run(folder), metrics(), {"noise": noise})
    assert records.from_folder(folder).nonce == saved.nonce


def test_write_makes_a_record_that_validates(book):
    assert records.load("tiny") is None and records.validate("tiny") is None
    saved, folder = made(book)
    (folder / "status.json").write_text('{"seconds": 12.5}')
    records.write("tiny", folder)
    found = records.validate("tiny")
    assert found.nonce == saved.nonce and found.render_seconds == 12.5 and not found.stale
    assert sorted(p.name for p in paths.results("tiny").parent.iterdir()) == ["tiny.gpu.json", "tiny.gpu.npz"]


def test_only_gpu_results_of_this_chapter_become_its_record(book):
    _, folder = made(book, profile="cpu")
    with pytest.raises(records.RecordError, match="results of tiny in profile cpu"):
        records.write("tiny", folder)
    _, folder = made(book)
    with pytest.raises(records.RecordError, match="a record of other"):
        records.write("other", folder)
    with pytest.raises(records.RecordError, match="results.json is broken"):
        records.write("tiny", book / "nowhere")
    assert records.load("tiny") is None


def test_less_never_replaces_more(book):
    first = recorded(book)
    _, folder = made(book, "less", seeds=3)
    with pytest.raises(records.RecordError, match=r"tokens of ours \(3 instead of 4\)"):
        records.write("tiny", folder)
    assert records.load("tiny").nonce == first.nonce
    replace(folder)
    _, more = made(book, "more", seeds=6)
    assert len(records.write("tiny", more).metrics["tokens"]["ours"]) == 6


def test_a_broken_record_says_so_and_is_not_replaced(book):
    recorded(book)
    _, folder = made(book, "new")
    good = paths.results("tiny").read_text()
    for bad in (
        "",
        good[:100],
        "[]",
        good.replace('"seconds"', '"secs"'),
        good.replace('"schema": 1', '"schema": 2'),
        good.replace('"nonce"', '"extra": 1, "nonce"'),
    ):
        paths.results("tiny").write_text(bad)
        for attempt in (records.load, records.validate, lambda slug: records.write(slug, folder)):
            with pytest.raises(records.RecordError, match="tiny.gpu.json is broken"):
                attempt("tiny")
    replace(folder)
    npz = paths.results("tiny", "npz")
    npz.write_bytes(npz.read_bytes()[:-1] + b"x")
    with pytest.raises(records.RecordError, match="tiny.gpu.npz is missing or differs from its checksum"):
        records.load("tiny")
    npz.unlink()
    with pytest.raises(records.RecordError, match="tiny.gpu.npz is missing"):
        records.load("tiny")


@pytest.mark.parametrize("at", ["npz", "json", "rename"])
def test_a_crash_leaves_the_old_record_or_the_new_one(book, monkeypatch, at):
    first = recorded(book)
    second, folder = made(book, "second", seeds=5)
    whole, replace = paths.write_atomic, os.replace

    def write(path, content):
        if path.suffix == (".json" if at == "json" else ".new") and at != "rename":
            raise OSError(28, "No space left on device")
        whole(path, content)

    def rename(source, target):
        if at == "rename" and str(target).endswith("gpu.npz"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(paths, "write_atomic", write)
    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises((OSError, KeyboardInterrupt)):
        records.write("tiny", folder)
    monkeypatch.undo()
    monkeypatch.setenv("READRUN_ROOT", str(book))
    now = records.validate("tiny")
    assert now.nonce == (second if at == "rename" else first).nonce
    assert records.write("tiny", folder).nonce == second.nonce  # and the next attempt succeeds
    assert records.validate("tiny").nonce == second.nonce


def _write(arguments):
    root, folder = arguments
    os.environ["READRUN_ROOT"] = root
    for _ in range(10):
        records.write("tiny", Path(folder))


def test_two_writers_at_once_leave_one_whole_record(book):
    folders = [made(book, f"w{i}")[1] for i in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_write, [(str(book), str(f)) for f in folders])
    nonces = {records.from_folder(f).nonce for f in folders}
    assert records.load("tiny").nonce in nonces


def test_validation_computes_every_verdict_again(book):
    recorded(book)

    def verdict(data):
        data["claims"]["c4-later"]["verdict"] = "reproduced"

    edit(verdict)
    with pytest.raises(records.RecordError, match="c4-later: recorded reproduced, computed again not run"):
        records.validate("tiny")
    replace(book / "build" / "run-tiny")

    def effect(data):
        data["claims"]["c2-items"]["low"] += 0.3

    edit(effect)
    with pytest.raises(records.RecordError, match="c2-items: recorded"):
        records.validate("tiny")
    replace(book / "build" / "run-tiny")

    def number(data):
        data["metrics"]["tokens"]["ours"][0] += 5

    edit(number)
    with pytest.raises(records.RecordError, match="metric gap is not what the chapter derives.*c1-shorter"):
        records.validate("tiny")
    replace(book / "build" / "run-tiny")

    def dropped(data):
        del data["claims"]["c1-shorter"]

    edit(dropped)
    with pytest.raises(records.RecordError, match="c1-shorter: recorded absent"):
        records.validate("tiny")


def test_validation_notices_a_rule_that_changed_after_the_record(book):
    recorded(book)
    file = paths.papers("tiny")
    file.write_text(file.read_text().replace("margin: 1.0", "margin: 0.5"))
    with pytest.raises(records.RecordError, match="judged by other rules than today's"):
        records.validate("tiny")


def test_a_record_is_stale_once_the_code_changed_and_not_by_a_comment(book):
    recorded(book)
    script = paths.notebook("tiny")
    script.write_text(SCRIPT.replace("# %%\ndef", "# %%\n# a comment\ndef"))
    assert not records.load("tiny").stale
    script.write_text(SCRIPT.replace("b - a", "b - 2 * a"))
    assert records.load("tiny").stale
    script.unlink()
    assert records.load("tiny").stale


def test_compare_sets_the_newest_run_beside_the_record(book):
    with pytest.raises(records.RecordError, match="run the chapter first"):
        records.newest("tiny")
    made(book, "tiny/cpu/old", profile="cpu", seeds=2)
    os.utime(book / "build/tiny/cpu/old/results.json", (1, 1))
    made(book, "tiny/cpu/live", profile="cpu", seeds=2)
    assert records.newest("tiny") == book / "build/tiny/cpu/live"
    here = records.from_folder(book / "build/tiny/cpu/live")
    assert {"claim", "here (cpu)"} == set(records.compare(None, here)[0])
    recorded(book)
    rows = {row["claim"]: row for row in records.compare(records.load("tiny"), here)}
    first = rows["c1-shorter"]
    assert first["book"].startswith("reproduced −") and "[" in first["here (cpu)"]
    assert first["intervals overlap"] == "yes" and rows["c4-later"]["intervals overlap"] == ""
    assert rows["c4-later"]["book"] == "not run"


def test_an_amended_rule_says_so_in_the_chapter_and_on_the_scoreboard(book):
    file = paths.papers("tiny")
    change = "{date: 2026-01-02, claim: c1-shorter, what: the margin is 2, why: it was misread}"
    file.write_text(f"{file.read_text()}amendments: [{change}]\n")
    results = recorded(book)
    said = "rule amended 2026-01-02: the margin is 2 (it was misread)"
    assert said in tables.verdicts(results).data
    assert said in tables._claims(records.scoreboard_rows()).data


def test_the_scoreboard_has_a_row_for_every_claim_and_survives_broken_files(book):
    for slug in ("norecord", "badrecord", "badpaper"):
        add(book, slug)
    recorded(book)
    recorded(book, "badrecord")
    paths.results("badrecord").write_text("{")
    paths.papers("badpaper").write_text("slug: [")
    rows = records.scoreboard_rows()
    by = {(row["slug"], row.get("id")): row for row in rows}
    assert len(rows) == 13
    good = by["tiny", "c1-shorter"]
    assert (good["verdict"], good["seconds"], good["stale"], good["error"]) == ("reproduced", 2.0, False, "")
    assert (good["paper"], good["where"], good["evidence"], good["headline"]) == (
        "520 against 1000",
        "Fig. 5",
        "toy",
        True,
    )
    assert by["tiny", "c2-items"]["badge"] == "one training" and good["survives"]
    assert (
        by["norecord", "c1-shorter"]["verdict"] == "not_run"
        and by["norecord", "c1-shorter"]["seconds"] is None
    )
    assert (
        "broken" in by["badrecord", "c1-shorter"]["error"]
        and by["badrecord", "c1-shorter"]["verdict"] == "not_run"
    )
    assert "YAML" in by["badpaper", None]["error"] and not by["badpaper", None]["survives"]
    summary = records.scoreboard_summary(rows)
    assert (summary["tested"], summary["by_chance"]) == (3, pytest.approx(0.075))
    assert summary["verdicts"] == {"reproduced": 3, "not_run": 10}
    assert "3 of 13 claims" in summary["text"]
    assert records.scoreboard_summary([])["tested"] == 0


def test_a_marginal_result_does_not_survive_holm(book):
    def marginal(data):
        data["claims"]["c1-shorter"]["p"] = 0.04

    add(book, "twin")
    for slug in ("tiny", "twin"):
        recorded(book, slug)
        edit(marginal, slug)
    rows = [row for row in records.scoreboard_rows() if row["verdict"] == "reproduced"]
    assert len(rows) == 6
    assert {row["id"] for row in rows if not row["survives"]} == {"c1-shorter"}  # 0.04 > 0.05 / 2


def test_a_notebook_run_saves_its_results_with_the_provenance_of_its_units(book):
    import readrun

    run = readrun.start("tiny", profile="smoke", out=str(book / "out"))
    run.settings(**{p: {"seeds": 3} for p in ("smoke", "cpu", "gpu")})

    def measure(seed):
        return {"ours": 20.0 + seed % 2, "base": 40.0 + seed}

    found = [run.unit(measure, seed=s) for s in run.seeds]
    tokens = {arm: {u.arguments["seed"]: u[arm] for u in found} for arm in ("ours", "base")}
    here = run.results(metrics={"tokens": tokens})
    assert here.claims["c1-shorter"]["verdict"] == "reproduced" and here.claims["c1-shorter"]["n"] == 3
    assert here.device and here.versions["python"] and here.peak_ram_gib > 0 and not here.stale
    assert records.from_folder(book / "out").nonce == here.nonce and run.recorded() is None


def test_importing_the_package_does_not_import_this(book):
    code = "import sys, readrun; print({'pydantic', 'scipy', 'readrun.records'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_claims_error_reaches_the_reader(book):
    paths.papers("tiny").write_text("slug: tiny\n")
    with pytest.raises(claims.ClaimsError, match="title: Field required"):
        made(book)
