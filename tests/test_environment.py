"""One set of versions for pip, conda, Binder and CI; set-up with clear messages; the wheel; habits."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import yaml
from conftest import CHECKOUT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def constraints() -> dict[str, str]:
    """{normalised name: exact version} of constraints.txt."""
    lines = [
        line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.!+-]+)", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    return {name_of(pin[1]): pin[2] for pin in pins if pin}


def direct() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group if not text.startswith("readrun[")]


def test_every_direct_dependency_has_a_floor_that_the_constraint_meets() -> None:
    pins = constraints()
    for need in direct():
        assert any(part.operator == ">=" for part in need.specifier), f"{need} has no floor"
        assert need.specifier.contains(pins[name_of(need.name)]), f"{need}: {pins[name_of(need.name)]}"


def test_all_extra_has_every_extra() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"all"}
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == extras


def test_constraints_are_complete_and_are_what_is_installed() -> None:
    pins, seen, todo, wrong = constraints(), set(), direct(), []
    while todo:
        need = todo.pop()
        name = name_of(need.name)
        if (name, *sorted(need.extras)) in seen:
            continue
        seen.add((name, *sorted(need.extras)))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        if sys.version_info[:2] == (
            3,
            11,
        ):  # the tested set is that of 3.11; others may need a backport more or less
            installed = found.version.partition("+")[0]  # 2.14.1+cpu is the 2.14.1 that is asked for
            wrong += (
                [] if pins.get(name) == installed else [f"{name}: {installed}, constraint {pins.get(name)}"]
            )
        for text in found.requires or []:
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in (*need.extras, "")):
                todo.append(more)
    assert not wrong, wrong
    assert len(seen) > 100, "the walk over dependencies found next to nothing"


def test_conda_and_pip_users_get_the_same() -> None:
    conda = yaml.safe_load((CHECKOUT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[all]"]
    assert '-c constraints.txt -e ".[all]"' in (CHECKOUT / "Makefile").read_text()
    (python,) = [entry for entry in conda if str(entry).startswith("python=")]
    assert PROJECT["requires-python"] == ">=3.11" and python == "python=3.11"


def test_installed_torch_of_another_build_satisfies_the_pin() -> None:
    assert Requirement(f"torch=={constraints()['torch']}").specifier.contains(f"{constraints()['torch']}+cpu")


def test_wheel_carries_scripts_papers_and_templates(tmp_path: Path) -> None:
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in names.split("\n"):
        if (
            name.startswith(("lib/", "notebooks/", "data/", "pyproject", "README", "LICENSE"))
            and (CHECKOUT / name).is_file()
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((CHECKOUT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("readrun-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert "readrun/__main__.py" in inside and any(name.startswith("readrun/template/") for name in inside)
    for script in (source / "notebooks").glob("*.py"):
        assert f"readrun/_notebooks/{script.name}" in inside
    for paper in (source / "data" / "papers").glob("*.yml"):
        assert f"readrun/_data/papers/{paper.name}" in inside
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    listed = subprocess.run(
        [sys.executable, "-c", "from readrun import paths; print(*paths.chapters())"], cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "PATH": os.environ["PATH"]}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert listed.split() == sorted(s.stem for s in (source / "notebooks").glob("*.py") if s.stem[0] != "_")


def make(tmp_path: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make with a stand-in for Python that is a shell script with the body ``python``."""
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{python}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    command = [
        "make",
        "--no-print-directory",
        "setup",
        f"PYTHON={file}",
        f"VENV={tmp_path / 'venv'}",
        *arguments,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)


def test_old_python_and_missing_ensurepip_are_named(tmp_path: Path) -> None:
    old = make(tmp_path, 'case "$2" in *version_info*) exit 1;; esac')
    assert old.returncode and "older than Python 3.11" in old.stderr
    bare = make(tmp_path, 'case "$2" in *ensurepip*) exit 1;; esac')
    assert bare.returncode and "ensurepip" in bare.stderr and "python3-venv" in bare.stderr
    none = make(tmp_path, "", "PYTHON=")
    assert none.returncode and "Python 3.11 or newer; none was found" in none.stderr
    assert not (tmp_path / "venv").exists()


def test_hooks_are_local_and_ci_is_a_valid_script() -> None:
    hooks = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks[0]["hooks"])
    ci = CHECKOUT / ".ci" / "run"
    assert ci.stat().st_mode & stat.S_IXUSR and "set -euo pipefail" in ci.read_text()
    assert subprocess.run(["bash", "-n", str(ci)]).returncode == 0


def test_generated_folders_are_ignored_and_sources_are_not() -> None:
    ask = lambda *names: subprocess.run(  # noqa: E731
        ["git", "check-ignore", "--no-index", *names], cwd=CHECKOUT, capture_output=True, text=True
    ).stdout.split()
    made = ["build/x", "book/_build/html/index.html", ".venv/bin/python", ".snakemake/log/x"]
    assert ask(*made) == made
    assert (
        ask(
            "book/index.md", "notebooks/alpha.ipynb", "data/results/alpha.gpu.json", "data/media/alpha/x.webp"
        )
        == []
    )
