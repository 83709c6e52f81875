"""Set-up of a chapter's notebook: parameters, settings per profile, units, results."""

from __future__ import annotations

import fnmatch
import json
import operator
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from readrun import content, paths, units
from readrun.content import PROFILES
from readrun.units import Unit


class Settings(SimpleNamespace):
    """The active profile's settings; `seeds` is this run's, and not in `vars(S)`, so more keep units."""

    __slots__ = ("_profile", "_table", "seeds")

    def __init__(self, profile: str, table: dict[str, dict[str, Any]], seeds: int) -> None:
        super().__init__(**{k: v for k, v in table[profile].items() if k != "seeds"})
        self._profile, self._table, self.seeds = profile, table, seeds

    def _repr_html_(self) -> str:
        from readrun import tables

        names = list(dict.fromkeys(name for settings in self._table.values() for name in settings))
        return tables.html("settings", active=self._profile, table=self._table, names=names).data


class Run:
    """One execution of a chapter's notebook, made by `start`.

    `units` lists what was asked for, files of this run go to `folder` and `media`, `parameters` are the
    values given, `device` is "cpu" or "cuda".
    """

    def __init__(self, slug: str, parameters: dict[str, Any], device: str) -> None:
        self.slug, self.parameters, self.device = slug, parameters, device
        self.profile: str = parameters["profile"]
        self.checkpoint: str = parameters["checkpoint"]
        own = (paths.build() / slug / self.profile).resolve()
        self.folder = Path(parameters["out"]).expanduser().resolve() if parameters["out"] else own / "live"
        self.media = self.folder / "media"
        self.media.mkdir(parents=True, exist_ok=True)
        # a folder elsewhere (of a GPU host, say) gets a copy of every unit
        self._stores = [own / "units"] + ([] if own in self.folder.parents else [self.folder / "units"])
        self.units: list[Unit] = []
        self._seeds: int = parameters["seeds"]
        self._started, self._computing = time.perf_counter(), 0.0
        self._here: Any = None

    @property
    def seeds(self) -> list[int]:
        """The seeds of this run: so many of them, from `seed` on."""
        if not self._seeds:
            raise ValueError("seeds: 0 stands for the profile's own number; call run.settings(...) first")
        return list(range(self.parameters["seed"], self.parameters["seed"] + self._seeds))

    def settings(self, smoke: dict[str, Any], cpu: dict[str, Any], gpu: dict[str, Any]) -> Settings:
        """The active profile's settings as attributes. Raises ValueError where a profile lacks `seeds`."""
        table = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
        own = {p: _whole(f"settings: seeds of {p}", units.plain(table[p], p).get("seeds"), 1) for p in table}
        self._seeds = self.parameters["seeds"] or own[self.profile]
        return Settings(self.profile, table, self._seeds)

    # ------------------------------------------------------------ units

    def unit(self, fn: Callable[..., Mapping[str, Any]], **arguments: Any) -> Unit:
        """`fn(**arguments)`, saved; or its saved result. Arguments are JSON data or units (`fn` reads them).

        Where none is saved and `only` does not select it, the unit has `done` False, and is computed when a
        selected unit needs it. Before `fn` runs, all random streams are seeded with its name and its `seed`
        argument (without one, all arguments but units): the arms of one function share the stream of a seed.
        """
        key = units.unit_key(fn, arguments, self)
        unit = next((unit for unit in self.units if unit.key == key), None)
        if unit is None:
            unit = Unit(fn.__name__, arguments, key, lambda unit: self._compute(unit, fn))
            self.units.append(unit)
        patterns, names = self.parameters["only"].split() or ["*"], [unit.id, unit.fn]
        if not unit.done and not self._load(unit) and any(fnmatch.filter(names, p) for p in patterns):
            unit.ensure()
        return unit

    def _load(self, unit: Unit) -> bool:
        if (found := units.find(self._stores, unit.name, unit.key)) is None:
            return False
        folder, unit.meta = found
        for store in [store for store in self._stores[1:] if not (store / unit.name).exists()]:
            units.publish(store, unit.name, unit.key, lambda to: shutil.copytree(folder, to))
        unit.folder = folder
        return True

    def _compute(self, unit: Unit, fn: Callable[..., Mapping[str, Any]]) -> None:
        for needed in units.units_in(unit.arguments):
            needed.ensure()
        began = time.perf_counter()
        meta: dict[str, Any] = {"schema": 1, "id": unit.id, "key": unit.key, "fn": unit.fn}
        meta["arguments"] = units.plain(unit.arguments, unit.id)
        own = {k: v for k, v in meta["arguments"].items() if not units.units_in(unit.arguments[k])}
        result: Any = None
        loaded = None
        while loaded != ("torch" in sys.modules):  # again if `fn` imported torch: that escaped the seed
            loaded = "torch" in sys.modules
            self.torch_setup()
            try:
                stream = units.seeded([unit.fn, own.get("seed", own)], self.device)
                with units.measured(meta, self.device), stream:
                    result = fn(**unit.arguments)
            except Exception as error:
                error.add_note(f"in unit {unit.id}")
                raise
        named = isinstance(result, Mapping) and all(isinstance(k, str) and k.isidentifier() for k in result)
        if not named:
            what = f"{unit.fn} must return a dict whose keys are identifiers, not {result!r:.80}"
            raise TypeError(f"unit {unit.id}: {what}")
        meta |= units.provenance(self.device)

        def fill(folder: Path) -> None:
            folder.mkdir()
            meta["kinds"] = units.write_values(folder, result)
            meta["files"] = {file.name: paths.file_sha256(file) for file in sorted(folder.iterdir())}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

        units.publish(self._stores[0], unit.name, unit.key, fill)
        if not self._load(unit):  # a fresh result is read back like a saved one, so that they never differ
            raise OSError(f"unit {unit.id} was saved in {self._stores[0]} but cannot be read back")
        self._computing += time.perf_counter() - began
        with suppress(OSError), open(self.folder / "units.log", "a", encoding="utf-8") as log:
            log.write(f"{meta['recorded']} {unit.id} {meta['seconds']:.1f} s\n")

    # ------------------------------------------------------------ results

    def results(self, metrics: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> Any:
        """Save {metric: {arm: values}} and named arrays in this run's folder; returns them with verdicts."""
        from readrun import records

        self._here = records.save_results(self, metrics, dict(arrays or {}))
        return self._here

    def recorded(self) -> Any:
        """The committed record; in the gpu profile this run's own results; None where there are none."""
        from readrun import records

        return self._here if self.profile == "gpu" else records.load(self.slug)

    @property
    def code_sha256(self) -> str:
        """The chapter's content key with this run's parameters."""
        return content.content_key(self.slug, self.parameters)

    @property
    def render_seconds(self) -> float:
        """Time since `start` in which no unit was computed."""
        return time.perf_counter() - self._started - self._computing

    def torch_setup(self) -> None:
        """Deterministic algorithms on the CPU, no cuDNN attention on a GPU; nothing without torch."""
        if "torch" not in sys.modules:
            return
        torch = sys.modules["torch"]
        if self.device == "cpu":
            torch.use_deterministic_algorithms(True)
        else:  # with a mask its bf16 gradients can be nan on Hopper: pytorch/pytorch#196678
            torch.backends.cuda.enable_cudnn_sdp(False)


def start(
    slug: str, *, profile: str = "", seed: int = 0, seeds: int = 0, device: str = "auto",
    checkpoint: str = "", only: str = "", out: str = "", **own: Any,
) -> Run:  # fmt: skip
    """Begin a run of the chapter `slug` with the values of its parameters cell; `own` are the chapter's own.

    Seeds python, numpy and torch. Raises ValueError naming the parameter and the accepted values.
    """
    if not re.fullmatch(r"[a-z]\w*", slug):
        raise ValueError(f"slug: {slug!r}; accepted: a name of lower-case letters, digits and underscores")
    given = dict(profile=profile, device=device, checkpoint=checkpoint, only=only, out=out)
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: {value!r}; accepted: a string")
    profile = profile or os.environ.get("READRUN_PROFILE") or "cpu"
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r}; accepted: {', '.join(PROFILES)}")
    given |= dict(profile=profile, checkpoint=_checkpoint(checkpoint))
    numbers = {"seed": _whole("seed", seed, 0), "seeds": _whole("seeds", seeds, 0)}
    for name, value in own.items():
        try:
            units.plain(value, name)
        except TypeError as error:
            raise ValueError(f"{error}; accepted: JSON data") from None
    run = Run(slug, {**given, **numbers, **own}, _device(device, profile, only))
    # bm25s starts JAX where it is installed, and that takes three quarters of the GPU's memory for itself
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import numpy as np

    random.seed(numbers["seed"])
    np.random.seed(numbers["seed"] % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(numbers["seed"])
    run.torch_setup()
    return run


def _whole(name: str, value: Any, least: int) -> int:
    with suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    raise ValueError(f"{name}: {value!r}; accepted: a whole number, {least} or more")


def _checkpoint(value: str) -> str:
    path = Path(value).expanduser()
    if re.fullmatch(r"openai:.+@https?://.+", value):
        return value  # a model behind an API, for the chapters that only ask questions: readrun.llm
    if not value or path.exists():
        return value and str(path.resolve())
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", value) and not Path(value.partition("/")[0] + "/").is_dir():
        return value
    accepted = "a folder, a hub id (org/name), or empty"
    raise ValueError(f"checkpoint: {value!r} does not exist; accepted: {accepted}")


def _device(device: str, profile: str, only: str) -> str:
    device = os.environ.get("READRUN_DEVICE") or "auto" if device == "auto" else device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: {device!r}; accepted: auto, cpu, cuda")
    cuda = False  # torch needs 2 s to import: only where there may be a GPU
    hint = "torch" in sys.modules or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    if device == "cuda" or device == "auto" and hint:
        with suppress(ImportError):
            import torch

            cuda = torch.cuda.is_available()
    if not cuda and (device == "cuda" or device == "auto" and profile == "gpu" and only != "none"):
        asked = f"device: {device!r}" if device == "cuda" else "profile: 'gpu' with device 'auto'"
        accepted = "device='cpu' (or READRUN_DEVICE=cpu), profile='smoke' or 'cpu', or only='none' to draw"
        raise ValueError(f"{asked} needs a CUDA GPU and there is none; accepted: {accepted} from saved units")
    return "cuda" if cuda else "cpu"
