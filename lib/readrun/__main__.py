"""The commands of the book: `python -m readrun COMMAND --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from readrun import kernel, paths

Args = argparse.Namespace


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the build folder's lock, and end what a killed holder left running; the system frees it."""
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


def chosen(args: Args) -> list[str]:
    """The chapters named by --chapters, else all. Raises ValueError for an unknown one."""
    wanted = args.chapters.split() or paths.chapters()
    if unknown := sorted(set(wanted) - set(paths.chapters())):
        raise ValueError(f"chapters: unknown {', '.join(unknown)}; accepted: {', '.join(paths.chapters())}")
    return wanted


def run_all(folders: Sequence[Path], args: Args) -> list[dict[str, Any]]:
    """Have Snakemake execute where no good status is; return all statuses, which say how it went.

    What failed before runs again, touched or not: a failure may not turn into "nothing to be done".
    """
    from readrun.execute import read_status

    todo = [f / "status.json" for f in folders if (read_status(f) or {}).get("state") != "ok"]
    for file in todo:
        file.unlink(missing_ok=True)
    top = paths.library().parents[1]
    profile = args.workflow if "/" in args.workflow else f"{top}/profiles/{args.workflow}"
    command = [sys.executable, "-m", "snakemake", "--snakefile", f"{top}/Snakefile", "--profile", profile]
    # our lock replaces Snakemake's, which outlives a kill; --rerun-incomplete takes up what a kill cut off
    command += ["--nolock", "--rerun-incomplete", "--keep-going", "--scheduler", "greedy"]
    command += ["--directory", str(paths.root()), *(["--cores", args.jobs] if args.jobs else [])]
    command += ["--config", f"build={paths.build()}", "--", *map(str, todo)]
    if todo:
        subprocess.run(command, preexec_fn=kernel.die_with_parent)
    lost = {"state": "lost", "error": "it ended without a status (disk full, or killed from outside)"}
    return [{"slug": f.parts[-3], **(read_status(f) or lost), "folder": str(f)} for f in folders]


def summary(statuses: Sequence[dict[str, Any]]) -> int:
    """Print one line per execution; return how many did not end well."""
    for s in statuses:
        cost = f"{s.get('seconds', 0):7.1f} s {s.get('peak_ram_gib') or 0:6.2f} GiB"
        print(f"{s['slug']:18} {s['state']:12} {cost}  {s.get('folder', '')}")
        if s["state"] != "ok":
            print("   ", f"code cell {s['cell']}:" if s.get("cell") else "", s["error"])
    return sum(s["state"] != "ok" for s in statuses)


def book(args: Args) -> int:
    """Execute what changed, publish every page, build the HTML; 1 if anything failed."""
    from readrun import execute, publish

    slugs, recorded = chosen(args), args.edition == "recorded"
    with locked():
        folders = {s: execute.run_folder(s, args.profile, args.seed, args.seeds) for s in paths.chapters()}
        found = run_all([] if recorded else [folders[slug] for slug in slugs], args)
        statuses = {status["slug"]: status for status in found}
        for slug in folders:
            problem = publish.record_problem(slug)
            if problem and statuses.get(slug, {}).get("state", "ok") == "ok":
                statuses[slug] = {"slug": slug, "state": "bad_record", "error": problem}
        code = publish.build_html(publish.stage_book(statuses, folders, recorded))
        failed = summary(list(statuses.values()))
    index = paths.root() / "book" / "_build" / "html" / "index.html"
    print(f"{index}: {failed} chapter(s) failed" + ", and the pages have warnings: see above" * bool(code))
    return int(bool(failed or code))


def sweep(args: Args) -> int:
    """One job per chapter, profile and seed; then one run per chapter and profile that finds all units."""
    from readrun.execute import run_folder

    pairs = [(slug, profile) for slug in chosen(args) for profile in args.profile.split()]
    if args.seeds < 1:
        raise ValueError("sweep: --seeds must be 1 or more")
    with locked():
        seeds = range(args.seed, args.seed + args.seeds)
        failed = summary(run_all([run_folder(*pair, seed, 1) for pair in pairs for seed in seeds], args))
        failed += summary(run_all([run_folder(*pair, args.seed, args.seeds) for pair in pairs], args))
    return int(bool(failed))


def execute(args: Args) -> int:
    """Execute one chapter in a folder; 0 once a status is written, whatever it says."""
    from readrun import execute

    folder = args.folder or execute.run_folder(args.slug, args.profile, args.seed, args.seeds)
    print(f"{args.slug}: started, log in {folder}/log.txt", flush=True)
    status = execute.execute(
        args.slug, profile=args.profile, folder=folder.resolve(), seed=args.seed, seeds=args.seeds,
        only=args.only, limit=args.limit, expect=args.expect,
    )  # fmt: skip
    print(f"{args.slug}: {status['state']} after {status['seconds']:.0f} s {status['error']}")
    return 0


def record(args: Args) -> int:
    """Compute units in the gpu profile into --out; several calls may run at once, on parts of the units."""
    from readrun.execute import execute

    out = args.out.resolve()
    status = execute(
        args.slug, profile="gpu", folder=out / f"run-{os.getpid()}", seed=args.seed, seeds=args.seeds,
        only=args.only, limit=args.limit, parameters={"out": str(out)},
    )  # fmt: skip
    return int(bool(summary([status])))


def merge(args: Args) -> int:
    """Bring units in, render the chapter from them, write its record, its paired notebook and its media."""
    from readrun import publish, records, units
    from readrun.execute import execute

    own = paths.build() / args.slug / "gpu"
    if lost := [str(source) for source in args.sources if not source.is_dir()]:
        raise ValueError(f"sources: {', '.join(lost)}; accepted: folders that `record` wrote")
    with locked():
        for source in args.sources:
            units.bring(source, own / "units")
        folder, sizes = own / "merge", {"seed": args.seed, "seeds": args.seeds}
        if summary([execute(args.slug, profile="gpu", folder=folder, only="none", **sizes)]):
            return 1  # the old record stays
        records.write(args.slug, folder)
        text = publish.paired(args.slug, publish.load(folder / "executed.ipynb"))
        paths.write_atomic(paths.notebook(args.slug).with_suffix(".ipynb"), text)
        if (folder / "media").is_dir():
            publish.sync(folder / "media", paths.media(args.slug))
    return 0


def pair(args: Args) -> int:
    """Bring notebook pairs in step, following the file edited last; 1 if any was not. --check only looks."""
    from readrun import content, publish

    wrong = []
    for slug in paths.chapters():
        script, notebook = paths.notebook(slug), paths.notebook(slug).with_suffix(".ipynb")
        old = notebook.read_text(encoding="utf-8") if notebook.exists() else ""
        if old and not args.check and notebook.stat().st_mtime > script.stat().st_mtime:
            cells = [(cell["cell_type"], "".join(cell["source"])) for cell in publish.load(notebook)["cells"]]
            if cells and cells != [(cell.kind, cell.source) for cell in content.cells(slug)]:
                import jupytext

                paths.write_atomic(script, jupytext.writes(jupytext.read(notebook), fmt="py:percent"))
                wrong.append(script)
        if (new := publish.paired(slug)) != old:
            wrong.append(notebook)
            if not args.check:
                paths.write_atomic(notebook, new)
    for file in wrong:
        print(f"{file}: {'out of step' if args.check else 'brought in step'}")
    return int(bool(wrong))


def nbval(args: Args) -> int:
    """Write notebooks for pytest --nbval-lax to build/nbval: of the outputs only those of worked examples."""
    from readrun import publish

    shutil.rmtree(paths.build() / "nbval", ignore_errors=True)
    for slug in chosen(args):
        paths.write_atomic(paths.build() / "nbval" / f"{slug}.ipynb", publish.paired(slug, only_checked=True))
    return 0


def compare(args: Args) -> int:
    """Set a run of one's own (the newest, or the one in --folder) beside the record, with intervals."""
    from readrun import records

    here = records.from_folder(args.folder or records.newest(args.slug))
    for row in records.compare(records.load(args.slug), here):
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n    ")
    return 0


def check(args: Args) -> int:
    """Validate every paper file and record; 1 and the reasons if one is wrong."""
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


def grade(args: Args) -> int:
    """Grade every chapter by its rubric. --collect first runs the tests that the rubrics name."""
    from readrun import grading

    slugs = chosen(args)
    for slug in slugs if args.collect else []:
        found = grading.collect(slug)
        bad = [f"{test} ({word})" for test, word in found["tests"].items() if word != "passed"]
        print(f"{slug}: {len(found['tests']) - len(bad)} named tests passed", *bad, sep="\n    ")
    for row in grading.grade_book(slugs):
        share = (
            f"{c} {'–' if row[c] is None else format(100 * row[c], '.0f')} %" for c in grading.CATEGORIES
        )
        notes = f" ({row['error']})" if row["error"] else " (evidence is stale)" if row["stale"] else ""
        print(f"{row['slug']:18} {100 * row['score']:5.1f} %  {', '.join(share)}{notes}")
    return 0


def new(args: Args) -> int:
    """Make a chapter from the template: notebook script, paper file, tests."""
    from readrun import new

    print(*new.create(args.slug), sep="\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; a wrong argument is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="readrun", description=__doc__)
    parser.add_argument("--with-parent", action="store_true", help="end when the calling process dies")
    commands = parser.add_subparsers(required=True)
    profile, only = os.environ.get("READRUN_PROFILE") or "cpu", "train/arm=grpo,seed=[01]*"
    options: dict[str, dict[str, Any]] = {
        "--chapters": dict(default="", help="slugs, separated by spaces (default: all)"),
        "--profile": dict(default=profile, help="smoke | cpu | gpu"),
        "--seed": dict(type=int, default=0, help="the first seed"),
        "--seeds": dict(type=int, default=0, help="how many (default: the profile's own number)"),
        "--edition": dict(default="executed", choices=("executed", "recorded")),
        "--jobs": dict(default="", help="how many chapters at a time (default: the workflow profile's)"),
        "--workflow": dict(default="local", help="a folder of profiles/, or a path to a Snakemake profile"),
        "--folder": dict(type=Path, help="of the run (default: by the keys of today's sources)"),
        "--out": dict(type=Path, required=True, help="folder for units, log and notebook"),
        "--only": dict(default="", help=f'units to compute, as "{only}"; none: only render'),
        "--limit": dict(type=float, help="seconds"),
        "--expect": dict(default="", help="name of the run folder that today's sources must give"),
        "--collect": dict(action="store_true", help="run the named tests and keep their outcomes"),
        "--check": dict(action="store_true", help="change nothing"),
        "slug": {},
        "sources": dict(nargs="*", type=Path, help="folders with units"),
    }
    takes = {
        book: "--chapters --profile --seed --seeds --edition --jobs --workflow",
        sweep: "--chapters --profile --seed --seeds --jobs --workflow",
        execute: "slug --profile --seed --seeds --folder --only --limit --expect",
        record: "slug --out --only --seed --seeds --limit",
        merge: "slug sources --seed --seeds",
        compare: "slug --folder",
        check: "--chapters",
        grade: "--chapters --collect",
        pair: "--check",
        nbval: "--chapters",
        new: "slug",
    }
    for command, names in takes.items():
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        for name in names.split():
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
