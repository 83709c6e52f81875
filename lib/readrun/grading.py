"""How this book's chapters are graded: by `readrun.rubric`, on evidence that no chapter writes itself.

Grading reads committed files only: `data/papers/<slug>.yml` (what is asked), `data/results/<slug>.gpu.json`
(the verdicts) and `<slug>.evidence.json` (outcomes of the named tests and of the last smoke and cpu runs,
written by `python -m readrun grade --collect`). The same files give the same grades on any machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from readrun import claims, content, paths, records
from readrun.rubric import (
    CATEGORIES,
    KINDS,
    Grade,
    GradedNode,
    RubricNode,
    by_category,
    code_dev,
    grade,
    where,
)
from readrun.rubric import Path as Place


def of_paper(paper: claims.Paper) -> tuple[RubricNode, dict[Place, claims.Task]]:
    """A chapter's rubric in the official format, and beside it {path of a leaf: its checks}."""
    checks: dict[Place, claims.Task] = {}

    def node(task: claims.Task, path: Place) -> RubricNode:
        if task.kind:
            checks[path] = task
        tasks = tuple(node(t, (*path, i)) for i, t in enumerate(task.sub_tasks))
        name = task.id or f"{paper.slug}{where(path)}"
        return RubricNode(
            name, task.requirements, task.weight, tasks, KINDS[task.kind] if task.kind else None
        )

    return node(paper.rubric, ()), checks


def compare(found: Any, op: str, value: Any) -> bool:
    """Whether `found op value` holds; a number that is not finite never does. Raises TypeError for others."""
    if op == "exists":
        return found is not None
    if op == "len>=":
        return isinstance(found, Sequence) and len(found) >= value
    if op == "==" and (isinstance(found, str | bool) or isinstance(value, str | bool)):
        return type(found) is type(value) and found == value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"{found!r:.40} is no number")
    holds = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}
    return math.isfinite(found) and bool(holds[op](found, value))


def lookup(document: Any, pointer: str) -> Any:
    """The value at a JSON pointer, None where there is none."""
    for key in pointer.removeprefix("/").split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(document, Mapping):
            document = document.get(key)
        elif isinstance(document, Sequence) and not isinstance(document, str) and key.isdigit():
            document = document[int(key)] if int(key) < len(document) else None
        else:
            return None
    return document


def leaf_of_book(task: claims.Task, documents: Mapping[str, Any]) -> Grade:
    """Grade one leaf of a chapter from {"tests": {id: outcome}, "record"|"smoke"|"cpu": JSON or None}."""
    missed = []
    for test in task.tests:
        outcome = documents["tests"].get(test, "no result")
        missed += [] if outcome == "passed" else [f"{test.partition('::')[2]}: {outcome}"]
    for check in task.checks:
        document = documents.get(check.file)
        found = lookup(document, check.pointer)
        if document is None or (found is None and check.op != "exists"):
            missed.append(f"{check.file}: " + ("not run" if document is None else f"no {check.pointer}"))
        elif not compare(found, check.op, check.value):
            shown = f"{len(found)} entries" if check.op == "len>=" else f"{found!r:.40}"
            missed.append(f"{check.file}{check.pointer} {check.op} {check.value}: {shown}")
    verdicts = (documents["record"] or {}).get("claims", {})
    for claim in task.claims:
        word = verdicts.get(claim, {}).get("verdict", "not_run")
        missed += [] if word == "reproduced" else [f"{claim}: {word.replace('_', ' ')}"]
    named = len(task.tests) + len(task.checks) + len(task.claims)
    if not named:
        return 0.0, True, "names no test or check"
    return float(not missed), True, "; ".join(missed) or f"{named} of {named} hold"


def grade_chapter(slug: str) -> GradedNode:
    """Grade a chapter from its committed files. Raises ClaimsError; a broken record makes leaves invalid."""
    paper, evidence = claims.load(slug), load_evidence(slug)
    rubric, checks = of_paper(paper)
    runs = evidence.get("runs", {})
    documents: dict[str, Any] = {"tests": evidence.get("tests", {}), "record": None}
    documents |= {"smoke": runs.get("smoke"), "cpu": runs.get("cpu")}
    broken = ""
    try:
        documents["record"] = results.record if (results := records.load(slug)) else None
    except records.RecordError as error:
        broken = str(error)

    def leaf(path: Place, node: RubricNode) -> Grade:
        task = checks[path]
        if broken and (task.claims or any(c.file == "record" for c in task.checks)):
            return 0.0, False, broken
        return leaf_of_book(task, documents)

    return grade(rubric, leaf)


def _evidence_file(slug: str) -> Path:
    return paths.data() / "results" / f"{slug}.evidence.json"


def load_evidence(slug: str) -> dict[str, Any]:
    """What `readrun grade --collect` left of a chapter: outcomes of its named tests, its executions."""
    file = _evidence_file(slug)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def grade_book(slugs: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row per chapter: score, shares by category, invalid leaves, claims that passed and failed, tree.

    `error` stands where a file is broken. A chapter without a record has `recorded` False.
    """
    rows = []
    for slug in paths.chapters() if slugs is None else slugs:
        row: dict[str, Any] = {"slug": slug, "score": 0.0, "error": "", "graded": None, "recorded": False}
        row |= dict.fromkeys(CATEGORIES) | {
            "code_dev": None,
            "invalid": 0,
            "passed": 0,
            "failed": 0,
            "stale": False,
        }
        rows.append(row)
        try:
            graded = grade_chapter(slug)
            row |= {"graded": graded, "score": graded.score, "code_dev": code_dev(graded)}
            row |= by_category(graded)
            row["invalid"] = sum(not leaf.valid_score for _, leaf in graded.leaves())
            row["stale"] = evidence_is_stale(slug)
            if (results := records.load(slug)) is not None:
                words = [c["verdict"] for c in results.claims.values() if c["verdict"] != "reported"]
                row |= {"recorded": True, "passed": words.count("reproduced")}
                row["failed"] = len(words) - row["passed"] - words.count("not_run")
        except claims.ClaimsError as error:
            row["error"] = str(error)
        except records.RecordError as error:
            row["error"] = str(error)
    return rows


# ---------------------------------------------------------------- evidence


def sources_sha256(slug: str) -> str:
    """Digest of the chapter and of the files of its named tests: evidence of other sources is stale."""
    tests = {test for leaf in claims.load(slug).rubric.leaves() for test in leaf.tests}
    names = sorted({test.partition("::")[0] for test in tests})
    files = [[name, paths.file_sha256(file)] for name in names if (file := paths.root() / name).is_file()]
    return content.digest([content.content_key(slug, {"profile": "smoke"}), files])


def evidence_is_stale(slug: str) -> bool:
    """Whether the chapter or its named tests have changed since their outcomes were collected."""
    found = load_evidence(slug)
    return bool(found) and found["sources_sha256"] != sources_sha256(slug)


def run_tests(tests: Sequence[str]) -> dict[str, str]:
    """{test: passed | failed | skipped | missing} of one pytest run.

    A parametrised test failed if any of its cases did, and passed if some did and the rest were skipped.
    The report goes to a new folder outside the checkout, named only to pytest: an old one cannot count.
    """
    order, outcomes = ("skipped", "passed", "failed"), dict.fromkeys(tests, "missing")
    there = [t for t in tests if _defines(t)]
    if not there:
        return outcomes
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *there], cwd=paths.root(), env=environment, stdout=subprocess.DEVNULL)
        cases = ElementTree.parse(report).iter("testcase") if report.is_file() else []
        for case in cases:
            file = case.get("classname", "").replace(".", "/") + ".py"
            name = f"{file}::{case.get('name', '').partition('[')[0]}"
            bad = case.find("failure") is not None or case.find("error") is not None
            word = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            if name in outcomes:
                known = outcomes[name]
                outcomes[name] = word if known == "missing" else max(known, word, key=order.index)
    return outcomes


def _defines(test: str) -> bool:
    file, _, name = test.partition("::")
    path = paths.root() / file
    return path.is_file() and bool(re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M))


def collect(slug: str) -> dict[str, Any]:
    """Run the tests that a chapter's rubric names, note its newest smoke and cpu executions, and save both.

    An execution counts only if it was of today's sources and with default parameters; else the leaf is
    "not run". Returns what was written to data/results/<slug>.evidence.json.
    """
    from readrun import execute

    paper = claims.load(slug)
    tests = sorted({test for leaf in paper.rubric.leaves() for test in leaf.tests})
    found: dict[str, Any] = {"schema": 1, "slug": slug, "sources_sha256": sources_sha256(slug)}
    found |= {"nonce": secrets.token_hex(16), "tests": run_tests(tests), "runs": {}}
    for profile in ("smoke", "cpu"):
        folder = execute.run_folder(slug, profile)
        if status := execute.read_status(folder):
            found["runs"][profile] = {k: status[k] for k in ("state", "seconds", "peak_ram_gib")}
        with contextlib.suppress(records.RecordError):  # it failed before it had results
            effects = {i: claim["effect"] for i, claim in records.from_folder(folder).claims.items()}
            found["runs"].get(profile, {})["effects"] = effects
    paths.write_atomic(_evidence_file(slug), json.dumps(found, indent=1) + "\n")
    return found
