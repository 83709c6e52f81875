"""A sweep over a cluster: jobs start in another folder without our environment, one is killed, and the merged
sweep is what one run with that many seeds gives."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from pathlib import Path

import yaml
from conftest import CHECKOUT, FixtureBook

SUBMIT = """#!/bin/bash
# a scheduler in miniature: starts the job script elsewhere, detached, in an environment of its own
id=job$(date +%s%N)
cd /
env -i PATH=/usr/bin:/bin FIXTURE_SLEEP=0.4 \
    setsid bash -c 'echo $$ > "$1.pid"; bash "$2"; echo $? > "$1.code"' job "{folder}/$id" "$1" \
    >"{folder}/$id.log" 2>&1 </dev/null &
echo $id
"""
STATUS = """#!/bin/bash
job="{folder}/$1"
if [ -f "$job.code" ]; then [ "$(cat "$job.code")" = 0 ] && echo success || echo failed
elif [ ! -f "$job.pid" ] || kill -0 "$(cat "$job.pid")" 2>/dev/null; then echo running
else echo failed; fi
"""


def scheduler(folder: Path) -> Path:
    """Write the scheduler's commands and a Snakemake profile that uses them; return the profile."""
    for name, text in {"submit": SUBMIT, "status": STATUS}.items():
        file = folder / name
        file.write_text(text.replace("{folder}", str(folder)))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    profile = {
        "executor": "cluster-generic", "cluster-generic-submit-cmd": str(folder / "submit"),
        "cluster-generic-status-cmd": str(folder / "status"), "jobs": 2, "retries": 1, "latency-wait": 10,
        "seconds-between-status-checks": 1, "quiet": ["all"],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def kill_one(folder: Path, book: FixtureBook, killed: list[str]) -> None:
    """Kill the first job, with all its processes, once a unit has been saved."""
    deadline = time.monotonic() + 120
    while not book.units("alpha") and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in sorted(folder.glob("*.pid"))[:1]:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
        killed.append(pid.stem)


def test_merged_sweep_equals_one_run(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    swept, single = FixtureBook(tmp_path / "swept"), FixtureBook(tmp_path / "single")
    profile, killed = scheduler(tmp_path / "cluster"), []
    thread = threading.Thread(target=kill_one, args=(profile, swept, killed))
    thread.start()
    done = swept.run(
        "sweep", "--chapters", "alpha", "--profile", "smoke", "--seeds", "3", "--workflow", str(profile)
    )
    thread.join()
    logs = "".join(file.read_text() for file in profile.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    assert len(killed) == 1 and not (profile / f"{killed[0]}.code").exists(), "no job was killed"
    assert len(list(profile.glob("*.pid"))) == 5, "three seeds, the killed one again, and the merged run"
    assert single.run("book", "--chapters", "alpha", "--profile", "smoke", "--seeds", "3").returncode == 0
    metrics = []
    for book in (swept, single):
        (run,) = [name for name in book.statuses("alpha") if name.endswith("-s0n3")]
        results = json.loads((book.build / "alpha" / "smoke" / run / "results.json").read_text())
        metrics.append(json.dumps([results["metrics"], results["claims"], results["code_sha256"]]))
    assert metrics[0] == metrics[1]
    # the merged run found every unit: it saved none after the last single run had ended
    last = max(s["started"] for name, s in swept.statuses("alpha").items() if name.endswith("n1"))
    merged = [s for name, s in swept.statuses("alpha").items() if name.endswith("-s0n3")]
    assert merged[0]["started"] >= last
    assert len(swept.units("alpha")) == 6
    log = swept.build / "alpha" / "smoke" / next(n for n in swept.statuses("alpha") if n.endswith("-s0n3"))
    assert not (log / "units.log").exists(), "the merged run computed units again"


def test_slurm_profile_is_read_and_asks_for_what_the_rule_states() -> None:
    profile = yaml.safe_load((CHECKOUT / "profiles" / "slurm" / "config.yaml").read_text())
    assert profile["executor"] == "slurm" and profile["retries"] >= 1
    local = yaml.safe_load((CHECKOUT / "profiles" / "local" / "config.yaml").read_text())
    assert local["cores"] == 2 and "executor" not in local
