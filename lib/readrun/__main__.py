"""The commands: ``python -m readrun book | sweep | execute | record | merge | compare | check | pair | nbval | new``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from readrun import kernel, paths

PART_BYTES, PARTS = 15 << 20, 8  # what `record --tar` may make: a GPU host may return only few, small files


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the build folder's lock, and end what a killed holder left running; the system frees it at death."""
    import fcntl

    paths.build().mkdir(parents=True, exist_ok=True)
    with open(paths.build() / ".lock", "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            print(f"waiting for another run on {paths.build()}: {stream.read().strip()}", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        print(f"process {os.getpid()}: readrun {shlex.join(sys.argv[1:])}", file=stream, flush=True)
        for process in kernel.end_orphans(paths.build()):
            print(f"ended process {process}, left over from a killed run")
        os.environ[kernel.JOB] = str(paths.build())
        yield


def snakemake(folders: Sequence[Path], args: argparse.Namespace) -> None:
    """Have Snakemake execute what belongs into ``folders``; their statuses, not its exit code, say how it went."""
    top = paths.library().parents[1]
    profile = Path(args.workflow) if "/" in args.workflow else top / "profiles" / args.workflow
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(top / "Snakefile"), "--profile", str(profile)]
    # our lock replaces Snakemake's, which outlives a kill; --rerun-incomplete takes up what a kill cut off
    command += ["--directory", str(paths.root()), "--nolock", "--rerun-incomplete", "--keep-going", "--scheduler", "greedy"]
    command += ["--cores", str(args.jobs)] if args.jobs else []
    command += ["--config", f"build={paths.build()}", "--", *(str(folder / "status.json") for folder in folders)]
    subprocess.run(command, preexec_fn=kernel.die_with_parent)


def run_all(folders: Sequence[Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Execute where no good status is; return all statuses. What failed before runs again: it may not hide."""
    from readrun.execute import read_status

    todo = [folder for folder in folders if (read_status(folder) or {}).get("state") != "ok"]
    for folder in todo:
        (folder / "status.json").unlink(missing_ok=True)
    if todo:
        snakemake(todo, args)
    lost = {"state": "lost", "error": "the execution ended without a status (disk full, or killed from outside)"}
    return [read_status(folder) or lost | {"slug": folder.parts[-3], "seconds": 0} for folder in folders]


def summary(statuses: Sequence[Mapping[str, Any]], folders: Sequence[Path | None]) -> int:
    """Print one line per execution; return how many did not end well."""
    for status, folder in zip(statuses, folders, strict=True):
        cost = f"{status.get('seconds', 0):7.1f} s {status.get('peak_ram_gib') or 0:6.2f} GiB"
        where = f"{folder}/log.txt" if folder else ""
        print(f"{status['slug']:18} {status['state']:12} {cost}  {where}")
        if status["state"] != "ok":
            print(f"    {'code cell ' + str(status['cell']) + ': ' if status.get('cell') else ''}{status['error']}")
    return sum(status["state"] != "ok" for status in statuses)


def book(args: argparse.Namespace) -> int:
    """Execute what changed, publish every page, build the HTML; 1 if anything failed."""
    from readrun import execute, publish

    slugs = chosen(args)
    with locked():
        folders = [execute.run_folder(slug, args.profile, args.seed, args.seeds) for slug in slugs]
        statuses = run_all(folders, args) if args.edition == "executed" else []
        shown = {status["slug"]: status for status in statuses}
        for slug in paths.chapters():
            problem = publish.record_problem(slug)
            if problem and shown.get(slug, {}).get("state", "ok") == "ok":
                shown[slug] = {"slug": slug, "state": "bad_record", "error": problem}
        staged = publish.stage_book(args.edition, shown, args.profile, args.seed, args.seeds)
        code = publish.build_html(staged)
        at = dict(zip(slugs, folders, strict=True)) if statuses else {}
        failed = summary(list(shown.values()), [at.get(slug) for slug in shown])
    index = staged.parents[1] / "book" / "_build" / "html" / "index.html"
    print(f"{index}: {failed} chapter(s) failed" + (", and the pages have warnings: see above" if code else ""))
    return int(bool(failed or code))


def sweep(args: argparse.Namespace) -> int:
    """One job per chapter, profile and seed; then one execution per chapter and profile that finds all units."""
    from readrun.execute import run_folder

    slugs, profiles, seeds = chosen(args), args.profile.split(), range(args.seed, args.seed + args.seeds)
    if not seeds:
        raise ValueError("sweep: --seeds must be 1 or more")
    with locked():
        single = [run_folder(slug, p, seed, 1) for slug in slugs for p in profiles for seed in seeds]
        failed = summary(run_all(single, args), single)
        merged = [run_folder(slug, p, args.seed, args.seeds) for slug in slugs for p in profiles]
        failed += summary(run_all(merged, args), merged)
    return int(bool(failed))


def execute(args: argparse.Namespace) -> int:
    """Execute one chapter in a folder. 0 once a status is written, whatever it says."""
    from readrun import execute

    folder = args.folder or execute.run_folder(args.slug, args.profile, args.seed, args.seeds)
    given = {name: json.loads(value) if value[:1] in '0123456789-[{"tf' else value
             for name, _, value in (item.partition("=") for item in args.parameter)}  # fmt: skip
    print(f"{args.slug}: started, log in {folder}/log.txt", flush=True)
    status = execute.execute(
        args.slug, profile=args.profile, folder=folder.resolve(), seed=args.seed, seeds=args.seeds, only=args.only,
        limit=args.limit, parameters=given, expect=args.expect,
    )  # fmt: skip
    print(f"{args.slug}: {status['state']} after {status['seconds']:.0f} s {status['error']}")
    return 0


def record(args: argparse.Namespace) -> int:
    """Compute units in the gpu profile into DIR; several may run at once, on parts of the units or on seeds."""
    from readrun.execute import execute

    out = args.out.resolve()
    folder = out / f"run-{os.getpid()}"
    status = execute(args.slug, profile="gpu", folder=folder, seed=args.seed, seeds=args.seeds, only=args.only,
                     limit=args.limit, parameters={"out": str(out)})  # fmt: skip
    if args.tar:
        pack(out)
    return int(bool(summary([status], [folder])))


def pack(folder: Path) -> None:
    """Pack all files below ``folder`` into ``part<i>.tar`` of at most 16 MiB each, and remove them."""
    size = {f: f.stat().st_size + 1024 for f in folder.rglob("*") if f.is_file() and f.suffix != ".tar"}
    parts: list[list[Path]] = []
    for file in sorted(size, key=lambda file: -size[file]):  # first fit, the largest first
        part = next((part for part in parts if sum(map(size.__getitem__, part)) + size[file] <= PART_BYTES), None)
        if part is None:
            parts.append(part := [])
        part.append(file)
    if len(parts) > PARTS or max(size.values(), default=0) > PART_BYTES:
        raise ValueError(f"{folder}: does not fit into {PARTS} parts of 16 MiB; it is left as it is")
    for number, part in enumerate(parts):
        with tarfile.open(folder / f"part{number}.tar", "w") as tar:
            for file in part:
                tar.add(file, file.relative_to(folder))
    for file in size:
        file.unlink()


def merge(args: argparse.Namespace) -> int:
    """Bring units in, render the chapter from them, write its record, its paired notebook and its media."""
    from readrun import publish, records
    from readrun.execute import execute

    store, folder = paths.build() / args.slug / "gpu" / "units", paths.build() / args.slug / "gpu" / "merge"
    with locked():
        for source in args.sources:
            with tempfile.TemporaryDirectory() as scratch:
                if source.is_file():
                    with tarfile.open(source) as tar:
                        tar.extractall(scratch, filter="data")
                bring(Path(scratch) if source.is_file() else source, store)
        status = execute(args.slug, profile="gpu", folder=folder, seed=args.seed, seeds=args.seeds, only="none")
        if summary([status], [folder]):
            return 1  # the old record stays
        records.write(args.slug, folder)
        text = publish.paired(args.slug, publish.load(folder / "executed.ipynb"))
        paths.write_atomic(paths.notebook(args.slug).with_suffix(".ipynb"), text)
        if (folder / "media").is_dir():
            publish.sync(folder / "media", paths.media(args.slug))
    return 0


def bring(source: Path, store: Path) -> None:
    """Copy the units found anywhere below ``source`` into ``store``: whole or not at all, none twice."""
    store.mkdir(parents=True, exist_ok=True)
    for unit in sorted(meta.parent for meta in source.rglob("meta.json")):
        if not (store / unit.name / "meta.json").exists():
            part = Path(tempfile.mkdtemp(prefix=".bring-", dir=store))
            shutil.copytree(unit, part, dirs_exist_ok=True)
            part.rename(store / unit.name)


def pair(args: argparse.Namespace) -> int:
    """Bring every notebook pair in step; the one that was edited last is followed. With --check only look."""
    import jupytext

    from readrun import content, publish

    wrong = []
    for slug in paths.chapters():
        script, notebook = paths.notebook(slug), paths.notebook(slug).with_suffix(".ipynb")
        old = notebook.read_text(encoding="utf-8") if notebook.exists() else ""
        if old and not args.check and notebook.stat().st_mtime > script.stat().st_mtime:
            cells = [(cell["cell_type"], "".join(cell["source"])) for cell in publish.load(notebook)["cells"]]
            if cells and cells != [(cell.kind, cell.source) for cell in content.cells(slug)]:
                paths.write_atomic(script, jupytext.writes(jupytext.read(notebook), fmt="py:percent"))
                wrong.append(script)
        if publish.paired(slug) != old:
            wrong.append(notebook)
            if not args.check:
                paths.write_atomic(notebook, publish.paired(slug))
    print("\n".join(f"{file}: {'out of step' if args.check else 'brought in step'}" for file in wrong) or "in step")
    return int(bool(wrong))


def nbval(args: argparse.Namespace) -> int:
    """Write notebooks for pytest --nbval-lax to build/nbval: of the outputs only those of worked examples."""
    from readrun import publish

    folder = paths.build() / "nbval"
    shutil.rmtree(folder, ignore_errors=True)
    for slug in chosen(args):
        paths.write_atomic(folder / f"{slug}.ipynb", publish.paired(slug, only_checked=True))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Set a run of one's own beside the record, with intervals."""
    from readrun import execute, records

    folder = args.folder or execute.run_folder(args.slug, args.profile, args.seed, args.seeds)
    for row in records.compare(args.slug, folder):
        print("  ".join(f"{name}: {value}" for name, value in row.items() if value))
    return 0


def check(args: argparse.Namespace) -> int:
    """Validate every paper file and record."""
    from readrun import claims, records

    problems = []
    for slug in chosen(args):
        for step in (claims.load, records.validate):
            try:
                step(slug)
            except Exception as error:
                problems.append(f"{slug}: {error}")
    print("\n".join(problems) or "all paper files and records are valid")
    return int(bool(problems))


def new(args: argparse.Namespace) -> int:
    """Make a chapter from the template."""
    from readrun import new

    print(*new.create(args.slug), sep="\n")
    return 0


def chosen(args: argparse.Namespace) -> list[str]:
    """The chapters named by --chapters, else all. Raises ValueError for an unknown one."""
    wanted = args.chapters.split() or paths.chapters()
    if unknown := sorted(set(wanted) - set(paths.chapters())):
        raise ValueError(f"chapters: unknown {', '.join(unknown)}; accepted: {', '.join(paths.chapters())}")
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; a wrong argument is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="readrun", description=__doc__)
    parser.add_argument("--with-parent", action="store_true", help="end at once when the calling process dies")
    commands = parser.add_subparsers(required=True)
    options: dict[str, dict[str, Any]] = {
        "--chapters": {"default": "", "help": "slugs, separated by spaces (default: all)"},
        "--profile": {"default": os.environ.get("READRUN_PROFILE") or "cpu", "help": "smoke | cpu | gpu"},
        "--seed": {"type": int, "default": 0}, "--seeds": {"type": int, "default": 0},
        "--edition": {"default": "executed", "choices": ("executed", "recorded")},
        "--jobs": {"default": "", "help": "how many chapters at a time (default: the workflow profile's)"},
        "--workflow": {"default": "local", "help": "a folder of profiles/, or a path to a Snakemake profile"},
        "--folder": {"type": Path}, "--out": {"type": Path, "required": True}, "--only": {"default": ""},
        "--limit": {"type": float}, "--expect": {"default": ""}, "--check": {"action": "store_true"},
        "--tar": {"action": "store_true"}, "--parameter": {"action": "append", "default": []},
        "slug": {}, "sources": {"nargs": "*", "type": Path},
    }  # fmt: skip
    seeds = "--seed --seeds"
    for command, takes in {
        book: f"--chapters --profile {seeds} --edition --jobs --workflow",
        sweep: f"--chapters --profile {seeds} --jobs --workflow",
        execute: f"slug --profile {seeds} --folder --only --limit --parameter --expect",
        record: f"slug --out --only {seeds} --limit --tar",
        merge: f"slug sources {seeds}",
        compare: f"slug --profile {seeds} --folder",
        check: "--chapters",
        pair: "--check",
        nbval: "--chapters",
        new: "slug",
    }.items():
        sub = commands.add_parser(command.__name__, help=(command.__doc__ or "").partition("\n")[0])
        for name in takes.split():
            sub.add_argument(name, **options[name])
        sub.set_defaults(run=command)
    args = parser.parse_args(argv)
    if args.with_parent:
        kernel.die_with_parent()
    try:
        if unknown := set(getattr(args, "profile", "cpu").split()) - {"smoke", "cpu", "gpu"}:
            raise ValueError(f"profile: {', '.join(sorted(unknown))}; accepted: smoke, cpu, gpu")
        return args.run(args)
    except ValueError as error:
        print(f"readrun: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
