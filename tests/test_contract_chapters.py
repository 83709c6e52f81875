"""What every chapter must keep. The tests walk over all chapters, so a new one needs no new code here."""

from __future__ import annotations

import ast
import getpass
import json
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from readrun import claims, content, paths

MEGA = 1_000_000
ASSETS = {"megatts3": 8, "verifiagent": 8, "scholar_copilot": 8, "dash": 6, "cma": 4, "animegamer": 4,
          "dreamactor_m1": 4, "akd": 4}  # fmt: skip
ANATOMY = {
    "a picture of the idea": r"picture|idea|figure",
    "set-up": r"set-?up|setting",
    "the algorithm": r"algorithm|method",
    "corrections": r"correction|wrong",
    "the experiment": r"^(the )?experiment|on the cpu",
    "the GPU experiment": r"gpu",
    "verdicts": r"verdict",
    "play": r"play|interact",
    "your own model": r"your own|own model|checkpoint",
    "limits": r"limit",
}
PARAMETERS = {"profile": "", "seed": 0, "seeds": 0, "device": "auto", "checkpoint": "", "only": "", "out": ""}
each = pytest.mark.parametrize("slug", paths.chapters())


@cache
def code(slug: str) -> list[content.Cell]:
    return [cell for cell in content.cells(slug) if cell.kind == "code"]


@cache
def prose(slug: str) -> str:
    return "\n\n".join(cell.source for cell in content.cells(slug) if cell.kind == "markdown")


@cache
def tree(slug: str) -> ast.Module:
    return ast.parse("\n".join(cell.source for cell in code(slug)))


@cache
def body(file: str) -> list[ast.stmt]:
    return ast.parse((paths.root() / file).read_text(encoding="utf-8")).body


@cache
def paired(slug: str) -> dict[str, Any]:
    file = paths.notebook(slug).with_suffix(".ipynb")
    assert file.is_file(), f"{file.name} is missing: make pair"
    return json.loads(file.read_text(encoding="utf-8"))


def outputs(slug: str) -> list[dict[str, Any]]:
    return [output for cell in paired(slug)["cells"] for output in cell.get("outputs", [])]


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """Calls of `name` or `anything.name` below `node`."""
    found = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [call for call in found if name in (getattr(call.func, "id", ""), getattr(call.func, "attr", ""))]


def waiting() -> list[str]:
    """Chapters whose GPU run is still to come."""
    return yaml.safe_load((paths.data() / "chapters.yml").read_text(encoding="utf-8"))["unrecorded"]


def listed() -> dict[str, dict[str, Any]]:
    parts = yaml.safe_load((paths.data() / "chapters.yml").read_text(encoding="utf-8"))["parts"]
    return {one["slug"]: {**one, "part": part["part"]} for part in parts for one in part["chapters"]}


@each
def test_parameters_cell_comes_first(slug: str) -> None:
    first = code(slug)[0]
    assert "parameters" in first.tags
    assert sum("parameters" in cell.tags for cell in code(slug)) == 1
    found: dict[str, Any] = {}
    for node in ast.parse(first.source).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign), "the parameters cell holds assignments only"
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        found[target.id] = ast.literal_eval(node.value)
    assert {name: found.get(name) for name in PARAMETERS} == PARAMETERS


@each
def test_chapter_has_all_its_parts_in_order(slug: str) -> None:
    assert len(re.findall(r"^# \S", prose(slug), re.M)) == 1, "one title"
    headings = re.findall(r"^## (.+)$", prose(slug), re.M)
    at = -1
    for part, pattern in ANATOMY.items():
        later = [i for i, text in enumerate(headings) if i > at and re.search(pattern, text, re.I)]
        # picture and set-up may stand under the title, before the first heading
        if not later and part in ("a picture of the idea", "set-up"):
            continue
        assert later, f"no section for {part} after {headings[at] if at >= 0 else 'the title'!r}: {headings}"
        at = later[0]
    assert ":::{admonition}" in prose(slug) or "```{admonition}" in prose(slug)
    assert re.search(r"exercise", prose(slug), re.I)
    assert re.search(r"(?m)^:+\{dropdown\}", prose(slug)), "solutions and derivations are folded"


@each
def test_three_worked_examples_call_the_chapter(slug: str) -> None:
    defined = {node.name for node in tree(slug).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    reexported = {
        alias.asname or alias.name
        for node in tree(slug).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("readrun.")
        for alias in node.names
    }  # fmt: skip
    examples = [cell for cell in code(slug) if "# NBVAL_CHECK_OUTPUT" in cell.source]
    assert len(examples) >= 3
    for cell in examples:
        used = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
        assert used & (defined | reexported), f"line {cell.first_line}: a worked example calls a definition"


@each
def test_notebook_pair_is_in_step(slug: str) -> None:
    cells = [("".join(c["source"]), c["cell_type"]) for c in paired(slug)["cells"]]
    assert cells == [(c.source, c.kind) for c in content.cells(slug)], "make pair brings them in step"
    names = {"injected-parameters"} & {
        tag for c in paired(slug)["cells"] for tag in c["metadata"].get("tags", [])
    }
    assert not names and "widgets" not in paired(slug)["metadata"]


@each
def test_paper_file_is_valid_with_a_headline(slug: str) -> None:
    paper = claims.load(slug)
    assert any(claim.headline for claim in paper.claims)
    assert {leaf.kind for leaf in paper.rubric.leaves()} == {"code", "execution", "result"}


@each
def test_no_leaf_is_earned_for_nothing(slug: str) -> None:
    """Tests that a rubric names assert something; headline claims stand in leaves, so that failing costs."""
    leaves = claims.load(slug).rubric.leaves()
    for file, _, name in (test.partition("::") for leaf in leaves for test in leaf.tests):
        (test,) = (node for node in body(file) if isinstance(node, ast.FunctionDef) and node.name == name)
        calls = [ast.unparse(node.func) for node in ast.walk(test) if isinstance(node, ast.Call)]
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(test))
        assert asserts or any("assert" in call or call == "pytest.raises" for call in calls), (
            f"{file}::{name}"
        )
    paid = {claim for leaf in leaves for claim in leaf.claims}
    assert {claim.id for claim in claims.load(slug).claims if claim.headline} <= paid


@each
def test_chapter_is_listed_among_the_papers(slug: str) -> None:
    paper, row = claims.load(slug), listed().get(slug)
    assert row, f"{slug} is not in data/chapters.yml"
    assert (row["title"], row["arxiv"], row["part"]) == (paper.title, paper.arxiv, paper.part)


@each
def test_chapter_has_tests(slug: str) -> None:
    top = paths.root()
    assert top
    tests = ast.parse((top / "tests" / f"test_{slug}.py").read_text(encoding="utf-8"))
    assert sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(tests)) >= 5


@each
def test_chapter_has_five_mutants(slug: str) -> None:
    top = paths.root()
    assert top
    assert len(list((top / "tests" / "mutants" / slug).glob("*.patch"))) >= 5


@each
def test_sizes(slug: str) -> None:
    def size(*folders: Path) -> int:
        return sum(
            f.stat().st_size
            for folder in folders
            if folder.exists()
            for f in folder.rglob("*")
            if f.is_file()
        )

    assert paths.notebook(slug).with_suffix(".ipynb").stat().st_size <= MEGA
    assert size(paths.media(slug)) <= 1.5 * MEGA
    assert size(paths.assets(slug)) <= ASSETS.get(slug, 3) * MEGA
    if paths.results(slug, "npz").exists():
        assert paths.results(slug, "npz").stat().st_size <= 0.5 * MEGA


@each
def test_cells_are_short(slug: str) -> None:
    long = {cell.first_line: n for cell in code(slug) if (n := len(cell.source.splitlines())) > 45}
    assert not long, f"cells of more than about 40 lines: {long}"


@each
def test_no_traces_of_a_machine(slug: str) -> None:
    own = {str(paths.root()), str(Path.home()), socket.gethostname(), getpass.getuser()} - {
        "/",
        "/root",
        "root",
        "None",
    }
    own = {trace for trace in own if len(trace) > 3}
    pattern = "|".join([r"/(?:home|Users|root|tmp)/", r"\w:\\\\?Users", *map(re.escape, sorted(own))])
    files = [
        paths.notebook(slug),
        paths.notebook(slug).with_suffix(".ipynb"),
        paths.papers(slug),
        paths.results(slug),
    ]
    for file in (file for file in files if file.exists()):
        found = re.search(rf".{{0,40}}({pattern}).{{0,40}}", file.read_text(encoding="utf-8"))
        assert not found, f"{file.name}: {found[0]!r}"


@each
def test_figures_have_alt_text_and_axes(slug: str) -> None:
    for call in calls(tree(slug), "show"):
        owner = getattr(call.func, "value", None)
        assert getattr(owner, "id", "") != "plt", "plots.show, not plt.show: it carries the alt text"
        assert {"alt", "caption"} <= {k.arg for k in call.keywords} or len(call.args) > 1, ast.unparse(call)[
            :80
        ]
    for name in ("picker", "picture", "clip", "audio"):
        for call in calls(tree(slug), name):
            ours = getattr(getattr(call.func, "value", None), "id", "media") in ("media", "picker")
            assert not ours or "alt" in {k.arg for k in call.keywords}, ast.unparse(call)[:80]
    if calls(tree(slug), "subplots"):
        assert calls(tree(slug), "label") or calls(tree(slug), "set_xlabel"), "axes are labelled"
    for output in outputs(slug):
        if "image/png" in output.get("data", {}):
            assert output["metadata"].get("image/png", {}).get("alt"), "a figure was shown without plots.show"
        for image in re.findall(r"<img [^>]*>", "".join(output.get("data", {}).get("text/html", ""))):
            assert re.search(r'alt="[^"]+"', image), image[:100]


@each
def test_definitions_are_documented(slug: str) -> None:
    public = [
        n
        for n in tree(slug).body
        if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]
    assert public, "the chapter holds the paper's algorithm"
    missing = [node.name for node in public if not ast.get_docstring(node)]
    for owner in (node for node in public if isinstance(node, ast.ClassDef)):
        long = [n for n in owner.body if isinstance(n, ast.FunctionDef) and len(n.body) > 1]
        named = [n for n in long if not n.name.startswith("_") and n.name not in ("forward", "backward")]
        missing += [f"{owner.name}.{n.name}" for n in named if not ast.get_docstring(n)]
    assert not missing


@each
def test_terms_stand_in_the_glossary(slug: str) -> None:
    top = paths.root()
    assert top
    entries = {
        line.lower()
        for line in (top / "book" / "glossary.md").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith((" ", ":", "#"))
    }
    used = {re.sub(r"(?s).*<(.+)>$", r"\1", t) for t in re.findall(r"\{term\}`([^`]+)`", prose(slug))}
    assert not {term for term in used if " ".join(term.lower().split()) not in entries}


@each
def test_interaction_is_live_and_drawn_for_every_state(slug: str) -> None:
    widget = [ast.parse(cell.source) for cell in code(slug) if "widget" in cell.tags]
    assert any(calls(cell, "live") for cell in widget), "picker.live: the controls of a live notebook"
    assert any(calls(cell, "picker") for cell in widget), "picker.picker: every state, for the page"


@each
def test_committed_data_have_source_licence_and_checksum(slug: str) -> None:
    folder = paths.assets(slug)
    files = paths.asset_files(folder) if folder.exists() else []
    if not files:
        return
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    assert {file.relative_to(folder).as_posix() for file in files} == set(manifest)
    for name, about in manifest.items():
        assert all(about.get(key) for key in ("sha256", "source", "licence", "how")), name
        assert paths.file_sha256(folder / name) == about["sha256"], name
        assert Path(name).suffix not in (".pt", ".pth", ".pkl", ".bin"), f"{name}: weights are safetensors"


@each
def test_record_is_there_and_decides_the_headlines(slug: str) -> None:
    from readrun import records

    record = records.load(slug)  # that its verdicts follow is test_contract_records'
    if slug in waiting():  # said on its page, the front page and the scoreboard
        assert record is None, f"{slug} has a record: take it off `unrecorded` in data/chapters.yml"
        return
    assert record is not None, (
        f"no record: python -m readrun record {slug} --out DIR; python -m readrun merge {slug} DIR"
    )
    assert record.profile == "gpu"
    open_ones = [
        c.id for c in claims.load(slug).claims if c.headline and record.claims[c.id]["verdict"] == "not_run"
    ]
    assert not open_ones


def test_list_of_chapters_table_of_contents_and_bibliography_agree() -> None:
    top = paths.root()
    assert top
    rows = listed()
    assert len(rows) == 22
    assert set(waiting()) <= set(paths.chapters())
    toc = yaml.safe_load((top / "book" / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    in_toc = [
        Path(e["file"]).name for part in toc for e in part["chapters"] if e["file"].startswith("chapters/")
    ]
    assert in_toc == list(rows)
    assert {e["file"]: p["part"] for p in toc if "part" in p for e in p["chapters"]} == {
        f"chapters/{slug}": row["part"] for slug, row in rows.items()
    }
    cited = set(
        re.findall(r"eprint = \{([\d.]+)\}", (top / "book" / "references.bib").read_text(encoding="utf-8"))
    )
    assert {row["arxiv"] for row in rows.values()} <= cited


def test_vendored_scripts_are_unchanged() -> None:
    top = paths.root()
    assert top
    folder = top / "book" / "_static" / "vendor" / "mathjax"
    source = json.loads((folder / "SOURCE.json").read_text())
    found = {f.relative_to(folder).as_posix(): paths.file_sha256(f) for f in folder.rglob("*.js")}
    assert found == source["sha256"] and (folder / "LICENSE").is_file()
    assert (top / "book" / "_static" / "picker.js").stat().st_size <= 3072
