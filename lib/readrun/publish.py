"""From executions to pages: join outputs with today's prose, stage the book's sources, build the HTML.

An output is shown only under a code cell whose source is, character for character, the one that produced it.
Everything is staged into a fresh folder and copied from there where contents differ, so that Sphinx sees new
time stamps only on pages that changed.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from readrun import content, kernel, paths
from readrun.execute import read_status, run_folder

Notebook = Mapping[str, Any]  # as in the file: nbformat 4, a cell's source as text or as lines
Status = Mapping[str, Any]  # of one execution, as in its status.json
WIDGET = "application/vnd.jupyter.widget-view+json"


def source_notebook(slug: str) -> dict[str, Any]:
    """Today's chapter without outputs; cell ids are counted, random ones would never be in step."""
    cells = []
    for number, cell in enumerate(content.cells(slug)):
        made: dict[str, Any] = {"cell_type": cell.kind, "id": f"{slug}-{number}".replace("_", "-")}
        made |= {"source": cell.source, "metadata": {"tags": list(cell.tags)} if cell.tags else {}}
        cells.append(made | ({"execution_count": None, "outputs": []} if cell.kind == "code" else {}))
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": spec, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write(notebook: Notebook) -> str:
    """Text of a notebook file, sources line by line as Jupyter writes them, so that diffs are small."""
    lined = [cell | {"source": _text(cell).splitlines(keepends=True)} for cell in notebook["cells"]]
    return json.dumps({**notebook, "cells": lined}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def load(file: Path) -> dict[str, Any]:
    """A notebook file; an empty notebook where there is none or it is not whole."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"cells": [], "metadata": {}}


def _text(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    """A notebook's code cells without the one that papermill injects."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in code if "injected-parameters" not in cell["metadata"].get("tags", [])]


def join(today: Notebook, executed: Notebook) -> int:
    """Put outputs of `executed` under the equal code cells of `today` without any; return how many stay so.

    Cells with the same source are matched in order. Widget views, which need a kernel, and progress bars are
    left out.
    """
    found = defaultdict(list)
    for cell in code_cells(executed):
        found[_text(cell)].append(cell)
    for cell in code_cells(today):
        match = found[_text(cell)].pop(0) if found[_text(cell)] else {}
        if match.get("execution_count") is not None and cell["execution_count"] is None:
            cell["execution_count"] = match["execution_count"]
            cell["outputs"] = [output for output in match["outputs"] if _keep(output)]
    return sum(cell["execution_count"] is None for cell in code_cells(today))


def _keep(output: Mapping[str, Any]) -> bool:
    bar = output["output_type"] == "stream" and output["name"] == "stderr" and "\r" in "".join(output["text"])
    return not bar and WIDGET not in output.get("data", {})


def paired(slug: str, executed: Notebook | None = None, only_checked: bool = False) -> str:
    """Text of `notebooks/<slug>.ipynb`: today's cells, with the outputs that still belong to them.

    `executed`: take outputs from there instead of from the committed file. Worked examples print the same in
    every profile, so those without an output get it from an execution on this machine. `only_checked`: keep
    the outputs of worked examples alone (what nbval compares).
    """
    notebook = source_notebook(slug)
    join(notebook, executed or load(paths.notebook(slug).with_suffix(".ipynb")))
    for profile in ("cpu", "smoke"):
        run = code_cells(load(run_folder(slug, profile) / "executed.ipynb"))
        join(notebook, {"cells": [cell for cell in run if "NBVAL_CHECK_OUTPUT" in _text(cell)]})
    for cell in code_cells(notebook) if only_checked else []:
        cell["outputs"] = cell["outputs"] if "NBVAL_CHECK_OUTPUT" in _text(cell) else []
    return write(notebook)


@lru_cache
def record_problem(slug: str) -> str:
    """Why the committed record cannot be read; empty where it can, or where there is none."""
    from readrun import records

    try:
        if paths.results(slug).exists():
            records.load(slug)
    except Exception as error:  # a corrupt record is this chapter's problem, not the book's
        return f"{type(error).__name__}: {error}"
    return ""


def _notes(slug: str, status: Status | None, missing: int) -> list[str]:
    """What a reader must know before reading the page: it failed, parts were not run, its record is old."""
    from readrun import records

    notes = []
    if status and status["state"] != "ok":
        texts = [status["error"], status.get("traceback", "").strip()]
        place = f" in code cell {status['cell']}" if status.get("cell") else ""
        title = f"This chapter did not run to its end: {status['state'].replace('_', ' ')}{place}"
        body = "\n\n".join(f"~~~~~~text\n{text}\n~~~~~~" for text in texts if text)
        notes.append(f"``````{{admonition}} {title}\n:class: error\n\n{body}\n``````")
    elif missing:
        since = f"have changed since this chapter was {'executed' if status else 'recorded'}, or never were"
        notes.append(f":::{{warning}}\n{missing} code cells {since}; they show no output.\n:::")
    if not record_problem(slug) and (record := records.load(slug)) and record.stale:
        said = "The recorded GPU results are **stale**: other code than this made them."
        notes.append(f":::{{warning}}\n{said}\n:::")
    return notes


def page(slug: str, folder: Path, status: Status | None, recorded: bool, stage: Path) -> None:
    """Write `chapters/<slug>.ipynb` and its media below `stage`, with the outputs of the run in `folder`.

    `recorded`: with the committed outputs instead.
    """
    from readrun import media

    notebook = source_notebook(slug)
    executed = paths.notebook(slug).with_suffix(".ipynb") if recorded else folder / "executed.ipynb"
    notes = _notes(slug, status, join(notebook, load(executed)))
    for cell in notebook["cells"] if notes else []:
        if cell["cell_type"] == "markdown":  # after its heading, which stays the page's first line
            head, _, rest = cell["source"].partition("\n")
            cell["source"] = "\n\n".join([head, *notes, rest])
            break
    static = stage / "_static" / "media" / slug
    for source in [paths.media(slug)] if recorded else [paths.media(slug), folder / "media"]:
        if source.is_dir():
            shutil.copytree(source, static, dirs_exist_ok=True)
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].replace("readrun-media:", "../_static/media/")
    media.stage(notebook, static / "figures", f"../_static/media/{slug}/figures", "../_static/media")
    paths.write_atomic(stage / "chapters" / f"{slug}.ipynb", write(notebook))


def toc(text: str, slugs: Iterable[str]) -> str:
    """Today's table of contents: `text` of `book/_toc.yml` with those of its chapters that exist.

    `slugs`: the chapters that exist; those that the file does not list come in a last part "More".
    """
    import yaml

    tree, there = yaml.safe_load(text), [f"chapters/{slug}" for slug in slugs]
    listed = {entry["file"] for part in tree["parts"] for entry in part["chapters"]}
    more = [{"file": file} for file in there if file not in listed]
    tree["parts"].append({"caption": "More", "chapters": more})
    for part in tree["parts"]:
        part.pop("part", None)  # Jupyter Book refuses unknown keys
        files = [entry["file"] for entry in part["chapters"]]
        part["chapters"] = [{"file": f} for f in files if f in there or not f.startswith("chapters/")]
    tree["parts"] = [part for part in tree["parts"] if part["chapters"]]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def stage_book(statuses: Mapping[str, Status], folders: Mapping[str, Path], recorded: bool) -> Path:
    """Stage all sources of the book in `build/book` and return that folder.

    `statuses`: {slug: status of this run}, `folders`: {slug: where today's run belongs}. A chapter without a
    status shows what an earlier run of today's sources left in its folder, else, as with `recorded`, its
    committed outputs.
    """
    top, book, fresh = paths.root(), paths.build() / "book", paths.build() / "book.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(top / "book", fresh, ignore=shutil.ignore_patterns("_build", ".*", "__pycache__"))
    shutil.copy(top / "_config.yml", fresh / "_config.yml")
    contents = fresh / "_toc.yml"
    contents.write_text(toc(contents.read_text(encoding="utf-8"), folders), encoding="utf-8")
    shown: list[Status] = []
    for slug, folder in folders.items():
        status = statuses.get(slug) or (None if recorded else read_status(folder))
        shown += [status] if status else []
        page(slug, folder, status, recorded or not status, fresh)
    for file in fresh.glob("*.md"):
        file.write_text(_fill(file.read_text(encoding="utf-8"), shown), encoding="utf-8")
    sync(fresh, book)
    shutil.rmtree(fresh)
    return book


def _fill(text: str, statuses: list[Status]) -> str:
    """Replace the marks of a page by tables computed now."""
    from readrun import records, tables

    for mark in ("chapters", "scoreboard", "statuses", "sandbox"):
        if (line := f"<!-- readrun:{mark} -->") in text:
            if mark == "sandbox":
                table = tables.sandbox()
            else:
                table = getattr(tables, mark)(statuses if mark == "statuses" else records.scoreboard_rows())
            text = text.replace(line, str(getattr(table, "data", table)))
    return text.replace("readrun-media:", "_static/media/")


def sync(source: Path, target: Path) -> None:
    """Make `target` equal to `source`: write what differs, delete what is not there, touch nothing else."""
    names = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    for old in [file for file in target.rglob("*") if file.is_file()]:
        if old.relative_to(target) not in names:
            old.unlink()
    for name in names:
        if not (target / name).is_file() or not filecmp.cmp(source / name, target / name, shallow=False):
            paths.write_atomic(target / name, (source / name).read_bytes())


def tree_key(folder: Path) -> str:
    """Digest of all names and contents below `folder` and of the versions that turn them into pages."""
    makers = [version(name) for name in ("jupyter-book", "sphinx", "sphinx-book-theme")]
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return content.digest([makers, [[str(f.relative_to(folder)), paths.file_sha256(f)] for f in files]])


def build_html(book: Path) -> int:
    """Run Jupyter Book on the staged sources, warnings as errors; nothing if they are as at the last build.

    The key is written last. Where it is missing (a build was killed or failed) pages may be half written
    though newer than their sources, which Sphinx would take for up to date, so everything is built anew;
    likewise when a page has gone, because Sphinx never deletes, and when a style or script has changed,
    because Sphinx copies those only if it also writes a page.
    """
    target = paths.root() / "book" / "_build"
    key_file, key = target / "readrun.json", tree_key(book)
    pages = sorted(str(f.relative_to(book)) for f in book.rglob("*") if f.suffix in (".md", ".ipynb"))
    pages += sorted(
        f"{f.name} {paths.file_sha256(f)}" for f in book.rglob("*") if f.suffix in (".css", ".js")
    )
    last = load(key_file)
    if last.get("key") == key and (target / "html" / "index.html").exists():
        return 0
    if last.get("pages") != pages:
        shutil.rmtree(target, ignore_errors=True)
    key_file.unlink(missing_ok=True)
    start = f"import sys; sys.modules['{kernel.SLOW_IMPORT}'] = None; "
    start += "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", str(book), "--path-output", str(target.parent)]
    command += ["--quiet", "--warningiserror", "--nitpick", "--keep-going"]
    code = subprocess.run(command, preexec_fn=kernel.die_with_parent).returncode
    if code == 0:
        paths.write_atomic(key_file, json.dumps({"key": key, "pages": pages}))
    return code
