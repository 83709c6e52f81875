"""One execution of one chapter: papermill in a kernel of our own, a time limit, and always a status file.

A failing chapter is a *result* of `execute`, not an exception: the status says so and the page shows it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from readrun import content, kernel, paths

# Seconds for a whole notebook: about ten times what a chapter may take, so that a slow machine is no
# failure but an endless loop is one.
LIMITS = {"smoke": 240, "cpu": 1200, "gpu": 5400}
RESERVE = 1 << 16  # bytes held from the start for the status, so that a full disk can still be reported


def run_folder(slug: str, profile: str, seed: int = 0, seeds: int = 0) -> Path:
    """Where a run of today's sources belongs: build/<slug>/<profile>/<content>-<render>[-s<seed>n<seeds>]."""
    try:
        keys = content.content_key(slug, {"profile": profile})[:12], content.render_key(slug)[:12]
    except Exception:  # a file that cannot be read fails its chapter, when it is executed, not the book
        keys = "unreadable", paths.file_sha256(paths.notebook(slug))[:12]
    narrowed = f"-s{seed}n{seeds}" if seed or seeds else ""
    return paths.build() / slug / profile / ("-".join(keys) + narrowed)


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status that an execution left in `folder`; None where there is none or it is not whole."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def environment(profile: str, checkpoint: str = "") -> dict[str, str]:
    """Environment of the kernel: one core, no window, fixed hashes; network only for a hub id."""
    one = () if profile == "gpu" else ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    offline = "0" if checkpoint and not Path(checkpoint).exists() else "1"
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return dict.fromkeys(one, "1") | {
        "HF_HUB_OFFLINE": offline, "HF_DATASETS_OFFLINE": offline, "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "READRUN_HEADLESS": "1",
        "READRUN_PROFILE": profile, "PYTHONPATH": os.pathsep.join([str(paths.library().parent), *inherited]),
    }  # fmt: skip


class Watch(threading.Thread):
    """Peak memory (bytes) of this process's children, and their end when `limit` seconds are over."""

    def __init__(self, limit: float) -> None:
        super().__init__(daemon=True)
        self.limit, self.peak, self.expired, self.done = limit, 0, False, threading.Event()

    def run(self) -> None:
        import psutil

        me, start = psutil.Process(), time.monotonic()
        while not self.done.wait(0.2):
            family, total = me.children(recursive=True), 0
            self.expired = time.monotonic() - start > self.limit
            for child in family:
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
                    if self.expired:
                        child.kill()
            self.peak = max(self.peak, total)


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """Send this process's and its children's output to the file `log`, also what crashing C code prints."""
    keep = os.dup(1), os.dup(2)
    with open(log, "ab", buffering=0) as stream:
        try:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            yield
        finally:
            for number, old in enumerate(keep, 1):
                os.dup2(old, number)
                os.close(old)


def _failure(error: BaseException, expired: bool, limit: float) -> dict[str, str]:
    """Name what went wrong: the state, one line, and the traceback without terminal colours."""
    lines = getattr(error, "traceback", None)
    text = "\n".join(lines) if isinstance(lines, list) else "".join(traceback.format_exception(error))
    name = getattr(error, "ename", None) or type(error).__name__
    value, state = str(getattr(error, "evalue", None) or error), "failed"
    if expired:
        state, name, value, text = "timeout", "TimeoutError", f"stopped after {limit:.0f} s", ""
    elif name == "DeadKernelError":
        state, text = "dead_kernel", ""
        value = "the notebook's process ended (out of memory, or a crash in native code)"
    elif getattr(error, "errno", None) == errno.ENOSPC or f"[Errno {errno.ENOSPC}]" in value:
        state = "disk_full"
    elif re.search(r"sha256|checksum|corrupt", value):
        state = "corrupt_data"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    above, chained, _ = text.partition("During handling of the above exception, another exception occurred")
    if chained and (first := re.findall(r"^[\w.]+(?:Error|Exception): .*$", above, re.M)):
        value += f" (while handling {first[-1]})"  # the cause: a broken CUDA capture ends with a second error
    return {"state": state, "error": f"{name}: {value}"[:2000], "traceback": text[-20_000:]}


def _where(executed: Path) -> int | None:
    """Number, from 1, of the code cell that was running: the last that began; None if nothing did."""
    from readrun import publish

    times = [c["metadata"].get("papermill", {}) for c in publish.code_cells(publish.load(executed))]
    return max((i for i, time in enumerate(times, 1) if time.get("start_time")), default=None)


def _engine() -> str:
    """Name of a papermill engine that writes the notebook at most once a second, and when it ends.

    Papermill's own writes it whole at the start and the end of every cell: 4 s of a chapter's smoke run.
    """
    from papermill import engines

    class Sparing(engines.NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **named: Any) -> Any:
            whole, due = nb_man.save, [0.0]

            def save(**changed: Any) -> None:
                if time.monotonic() >= due[0]:
                    whole(**changed)
                    due[0] = time.monotonic() + 1

            nb_man.save = save
            try:
                return super().execute_managed_notebook(nb_man, *arguments, **named)
            finally:
                nb_man.save = whole

    engines.papermill_engines.register("readrun", Sparing)
    return "readrun"


def execute(
    slug: str, *, profile: str, folder: Path, seed: int = 0, seeds: int = 0, only: str = "",
    limit: float | None = None, parameters: dict[str, Any] | None = None, expect: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Execute chapter `slug` in `folder` and return its status, which is also in `folder/status.json`.

    `limit`: seconds, by default those of the profile. `parameters`: more notebook
    parameters. `expect`: the folder name that today's sources should give; where an edit since has changed
    it nothing is executed, because outputs of the new sources do not belong under the old key. The executed
    notebook, whole or partial, is `executed.ipynb`; what cells printed is in `log.txt`.
    """
    from readrun import publish

    os.environ.update(kernel.install(paths.build() / ".jupyter"))
    folder.mkdir(parents=True, exist_ok=True)
    status_file, reserve, executed = (folder / n for n in ("status.json", "status.part", "executed.ipynb"))
    for old in (status_file, executed, folder / "results.json"):  # of an earlier attempt
        old.unlink(missing_ok=True)
    shutil.rmtree(folder / "media", ignore_errors=True)
    limit = limit or LIMITS[profile]
    started, clock, watch = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic(), Watch(limit)
    device = "auto" if profile == "gpu" and only != "none" else "cpu"
    given = dict(profile=profile, seed=seed, seeds=seeds, device=device, only=only, out=str(folder))
    given |= parameters or {}
    outcome: dict[str, Any] = {"state": "ok", "error": "", "traceback": "", "cell": None}
    try:
        reserve.write_bytes(b" " * RESERVE)
        if expect and run_folder(slug, profile, seed, seeds).name != expect:
            raise RuntimeError("the sources changed after this run was planned; run it again")
        notebook = publish.source_notebook(slug)
        notebook["metadata"]["kernelspec"]["name"] = "readrun"
        paths.write_atomic(folder / "input.ipynb", publish.write(notebook))
        watch.start()
        with _into(folder / "log.txt"):
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
            sys.modules.setdefault(kernel.SLOW_IMPORT, None)  # type: ignore[arg-type]
            import papermill

            os.environ.update(environment(profile, str(given.get("checkpoint", ""))))
            papermill.execute_notebook(
                folder / "input.ipynb", executed, given, kernel_name="readrun", engine_name=_engine(),
                progress_bar=False, log_output=True, cwd=paths.notebook(slug).parent,
            )  # fmt: skip
    except Exception as error:  # whatever it was, it belongs to this chapter alone
        outcome |= _failure(error, watch.expired, limit) | {"cell": _where(executed)}
    watch.done.set()
    status = {"slug": slug, "started": started, "seconds": round(time.monotonic() - clock, 2)} | outcome
    status |= {"peak_ram_gib": round(watch.peak / 2**30, 3), "parameters": given}
    with open(reserve, "r+b" if reserve.exists() else "wb") as stream:  # reserved blocks: no new space
        stream.write(json.dumps(status, indent=1).encode())
        stream.truncate()
    reserve.replace(status_file)
    return status
