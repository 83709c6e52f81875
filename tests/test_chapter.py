"""`chapter()`: the definitions of a notebook as a module."""

from __future__ import annotations

import inspect
import linecache
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from readrun import chapter, paths

NOTEBOOK = '''# %% [markdown]
# # Toy

# %%
import math
from collections import Counter as Count

try:
    import a_module_that_is_not_there as rare
except ImportError:
    rare = None

import readrun

run = readrun.start("toy")
print("the experiment runs")

# %%
RATES = {"a": 1}
RATES["b"] = 2
RATES.update(c=3)
LIMIT: int = 10
LOW, HIGH = 1, LIMIT
TABLE = [run.profile]
lower = 3


def area(radius):
    """Of a circle."""
    return math.pi * radius**2


# %%
class Shape:
    corners = LIMIT

    def double(self):
        return 2 * self.corners


def broken(x):
    return 1 / x


def with_default(n=run.seeds):
    return n


# %% tags=["figure"]
assert False, "an experiment cell must not run"
'''


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/toy.py").write_text(NOTEBOOK)
    (tmp_path / "notebooks/_draft.py").write_text("# %%\nX = 1\n")
    yield tmp_path
    sys.modules.pop("readrun.chapters.toy", None)


def test_definitions_only(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q = chapter("toy")
    assert q.area(2.0) == pytest.approx(12.566370614359172)
    assert q.Shape().double() == 20
    assert q.RATES == {"a": 1, "b": 2, "c": 3} and (q.LOW, q.HIGH) == (1, 10)
    assert q.Count is not None and q.rare is None
    assert capsys.readouterr().out == "" and not (book / "build").exists()
    for name in ("run", "lower"):
        with pytest.raises(AttributeError, match=f"chapter toy does not define '{name}'"):
            getattr(q, name)
    for name in ("TABLE", "with_default"):
        with pytest.raises(AttributeError, match=rf"'{name}': line \d+ needs run of the experiment"):
            getattr(q, name)
    assert q.__name__ == "readrun.chapters.toy" and sys.modules[q.__name__] is q


def test_unknown_slug_lists_the_chapters(book: Path) -> None:
    with pytest.raises(ValueError, match=r"chapter: 'nope' is unknown; accepted: toy$"):
        chapter("nope")
    with pytest.raises(ValueError, match="_draft"):
        chapter("_draft")
    with pytest.raises(ModuleNotFoundError):
        __import__("readrun.chapters.nope")


def test_lines_and_sources_are_those_of_the_script(book: Path) -> None:
    q = chapter("toy")
    lines = NOTEBOOK.splitlines()
    assert inspect.getsource(q.area).startswith("def area(radius):")
    assert inspect.getsource(q.Shape).startswith("class Shape:\n    corners = LIMIT")
    assert inspect.getsourcelines(q.area)[1] == lines.index("def area(radius):") + 1
    assert inspect.getsourcefile(q.area) == str(book / "notebooks/toy.py")
    with pytest.raises(ZeroDivisionError) as caught:
        q.broken(0)
    assert traceback.extract_tb(caught.tb)[-1].line == "return 1 / x"


def test_a_changed_script_is_loaded_anew(book: Path) -> None:
    old = chapter("toy")
    assert chapter("toy") is old
    script = book / "notebooks/toy.py"
    stat = script.stat()
    script.write_text(NOTEBOOK.replace("2 * self", "3 * self"))
    os.utime(script, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert chapter("toy").Shape().double() == 30
    linecache.checkcache()


def test_functions_pickle_into_spawned_workers(book: Path) -> None:
    q = chapter("toy")
    assert pickle.loads(pickle.dumps(q.area)) is q.area
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(q.area, [1.0]) == [q.area(1.0)]


def test_a_fresh_process_unpickles_without_asking_for_the_chapter(book: Path) -> None:
    data = pickle.dumps(chapter("toy").Shape())
    program = f"import pickle; print(pickle.loads({data!r}).double())"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "20\n"


def test_installed_package_brings_its_notebooks_and_data(book: Path, tmp_path: Path) -> None:
    """As from a wheel: readrun/_notebooks and readrun/_data beside the modules, no checkout around."""
    site = tmp_path / "site-packages"
    shutil.copytree(paths.library(), site / "readrun", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(book / "notebooks", site / "readrun/_notebooks")
    (site / "readrun/_data/assets/toy").mkdir(parents=True)
    (site / "readrun/_data/assets/toy/a.txt").write_text("x")
    program = (
        "from readrun import chapter, paths\nprint(chapter('toy').area(1.0) > 3, paths.build())\n"
        "paths.write_manifest('toy', 's', 'l', 'h')\nprint(paths.asset('toy/a.txt').read_text())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("READRUN_ROOT", "PYTHONPATH")}
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, cwd=tmp_path / "cwd",
        env=environment | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.stdout.split() == ["True", str(tmp_path / "cwd/build"), "x"], done.stderr
