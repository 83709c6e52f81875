"""Set-up of a chapter's notebook: parameters, settings per profile, units, results."""

from __future__ import annotations

import fnmatch
import html
import json
import operator
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from readrun import content, paths, units
from readrun.content import PROFILES
from readrun.units import Unit

DEVICES = ("auto", "cpu", "cuda")


class Settings(SimpleNamespace):
    """The active profile's settings; `vars(S)` leaves `seeds` out, so that more seeds keep the saved units."""

    __slots__ = ("_profile", "_table", "seeds")

    def __init__(self, profile: str, table: dict[str, dict[str, Any]], seeds: int) -> None:
        super().__init__(**{k: v for k, v in table[profile].items() if k != "seeds"})
        self._profile, self._table, self.seeds = profile, table, seeds

    def _repr_html_(self) -> str:
        active, table = self._profile, self._table
        names = list(dict.fromkeys(k for p in PROFILES for k in table[p]))
        cell = lambda p, text: f"<td><strong>{text}</strong></td>" if p == active else f"<td>{text}</td>"  # noqa: E731
        head = "".join(f'<th scope="col">{p}{" (this run)" if p == active else ""}</th>' for p in PROFILES)
        rows = "".join(
            f'<tr><th scope="row">{html.escape(n)}</th>'
            + "".join(cell(p, html.escape(str(table[p].get(n, "–")))) for p in PROFILES)
            + "</tr>"
            for n in names
        )
        return f'<table class="readrun-settings"><thead><tr><th>setting</th>{head}</tr></thead>{rows}</table>'


class Run:
    """One execution of a chapter: see `start`."""

    def __init__(self, slug: str, parameters: dict[str, Any], device: str) -> None:
        self.slug, self.parameters, self.device = slug, parameters, device
        self.profile: str = parameters["profile"]
        self.checkpoint: str = parameters["checkpoint"]
        own = paths.build() / slug / self.profile
        out = parameters["out"]
        self.folder = Path(out).expanduser().resolve() if out else own / "live"
        self.media = self.folder / "media"
        self.units: list[Unit] = []
        self._seeds: int = parameters["seeds"]
        self._own = [own / "units"]
        if own.resolve() not in self.folder.parents:  # a folder of the user's gets every unit too
            self._own.append(self.folder / "units")
        extra = [Path(p) for p in os.environ.get("READRUN_UNITS", "").split(os.pathsep) if p]
        self._stores = [*self._own, *extra, *[p / "units" for p in extra]]
        self._started, self._computing = time.perf_counter(), 0.0
        self._here: Any = None
        self.media.mkdir(parents=True, exist_ok=True)

    @property
    def seeds(self) -> list[int]:
        """The seeds of this run: `seeds` of them from `seed` on."""
        if not self._seeds:
            raise ValueError("seeds: 0 means the profile's own number: call run.settings(...) first")
        return list(range(self.parameters["seed"], self.parameters["seed"] + self._seeds))

    def settings(self, smoke: dict[str, Any], cpu: dict[str, Any], gpu: dict[str, Any]) -> Settings:
        """The active profile's settings as attributes; each profile must say `seeds`, and all the same names."""
        table = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
        for name, values in table.items():
            units.plain(values, f"settings of {name}")
            if set(values) != set(smoke) or "seeds" not in values:
                raise ValueError(f"settings: {name} must have `seeds` and the names of smoke: {', '.join(smoke)}")
        self._seeds = self._seeds or _whole("seeds", table[self.profile]["seeds"], 1)
        return Settings(self.profile, table, self._seeds)

    # ------------------------------------------------------------ units

    def unit(self, fn: Callable[..., Mapping[str, Any]], **arguments: Any) -> Unit:
        """`fn(**arguments)`, saved; taken from its saved result where there is one.

        Arguments are JSON data or other units. Not saved and not selected by `only`: a unit with `done` False, which is
        computed when a selected unit needs it. Before `fn` runs, all random streams are seeded from its name and its
        `seed` argument (or, without one, all arguments): arms of one function with the same seed share their stream.
        """
        key = units.unit_key(fn, arguments, self)
        for known in self.units:
            if known.key == key:
                return known
        unit = Unit(fn.__name__, arguments, key, lambda u: self._compute(u, fn))
        self.units.append(unit)
        patterns = self.parameters["only"].split()
        if not self._load(unit):
            if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (unit.id, unit.fn)):
                unit.ensure()
        return unit

    def _load(self, unit: Unit) -> bool:
        name = f"{unit.fn}-{unit.key[:16]}"
        found = units.find(self._stores, name, unit.key)
        if found:
            unit.folder, unit.meta = found
            for store in self._own[1:]:  # a later call's folder is complete too
                if not (store / name).exists():
                    source = found[0]
                    units.publish(store, name, unit.key, lambda to, source=source: shutil.copytree(source, to))
        return found is not None

    def _compute(self, unit: Unit, fn: Callable[..., Mapping[str, Any]]) -> None:
        for needed in units.units_in(unit.arguments):
            needed.ensure()
        began = time.perf_counter()
        about = units.plain({k: v for k, v in unit.arguments.items() if not units.units_in(v)}, unit.id)
        seed = [unit.fn, about["seed"]] if "seed" in about else [unit.fn, about]
        meta = {"schema": 1, "id": unit.id, "key": unit.key, "fn": unit.fn}
        meta["arguments"] = units.plain(unit.arguments, unit.id)
        try:
            with units.seeded(seed, "torch"), units.measured(meta):
                self.torch_setup()
                result = fn(**unit.arguments)
        except Exception as error:
            error.add_note(f"in unit {unit.id}")
            raise
        if not isinstance(result, Mapping) or not all(isinstance(k, str) for k in result):
            raise TypeError(f"unit {unit.id}: {unit.fn} must return a dict with string keys, not {type(result).__name__}")
        meta |= {"device": units.device_name(self.device), "versions": units.versions()}
        meta |= {"commit": units.commit(), "recorded": units.now()}

        def fill(folder: Path) -> None:
            folder.mkdir()
            meta["kinds"] = units.write_values(folder, result)
            meta["files"] = {p.name: paths.file_sha256(p) for p in sorted(folder.iterdir())}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

        units.publish(self._own[0], f"{unit.fn}-{unit.key[:16]}", unit.key, fill)
        if not self._load(unit):  # read back: a fresh result and a saved one are the same
            raise RuntimeError(f"unit {unit.id} was saved in {self._own[0]} but cannot be read back")
        self._computing += time.perf_counter() - began
        with open(self.folder / "units.log", "a", encoding="utf-8") as log:
            log.write(f"{meta['recorded']} {unit.id} {meta['seconds']:.1f} s\n")

    # ------------------------------------------------------------ results

    def results(self, metrics: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> Any:
        """Save {metric: {arm: values}} and named arrays in this run's folder; returns them with their verdicts."""
        from readrun import records

        self._here = records.save_results(self, metrics, dict(arrays or {}))
        return self._here

    def recorded(self) -> Any:
        """The chapter's committed record; in the gpu profile this run's own results; None where there are none."""
        from readrun import records

        return self._here if self.profile == "gpu" else records.load(self.slug)

    @property
    def code_sha256(self) -> str:
        """The chapter's content key under this run's parameters."""
        return content.content_key(self.slug, self.parameters)

    @property
    def render_seconds(self) -> float:
        """Time since `start` that was not spent computing units."""
        return time.perf_counter() - self._started - self._computing

    def torch_setup(self) -> None:
        """Deterministic algorithms where torch runs on the CPU; nothing if torch is not imported."""
        torch = sys.modules.get("torch")
        if torch is not None and self.device == "cpu":
            torch.use_deterministic_algorithms(True)


def start(
    slug: str,
    *,
    profile: str = "",
    seed: int = 0,
    seeds: int = 0,
    device: str = "auto",
    checkpoint: str = "",
    only: str = "",
    out: str = "",
    **own: Any,
) -> Run:
    """Begin a run of the chapter `slug` with the values of its `parameters` cell; `own` are the chapter's own.

    Raises ValueError naming the parameter and the accepted values, before anything is computed. Seeds the random
    streams of python, numpy and (if imported) torch.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ValueError(f"slug: {slug!r}; accepted: lower-case letters, digits and underscores")
    profile = profile or os.environ.get("READRUN_PROFILE") or "cpu"
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r}; accepted: {', '.join(PROFILES)}, or empty for $READRUN_PROFILE or cpu")
    for name, value in {"only": only, "out": out, "checkpoint": checkpoint, "device": device}.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: {value!r}; accepted: a string")
    parameters = {"profile": profile, "seed": _whole("seed", seed, 0), "seeds": _whole("seeds", seeds, 0)}
    parameters |= {"device": device, "checkpoint": _checkpoint(checkpoint), "only": only, "out": out}
    for name, value in own.items():
        try:
            units.plain(value, name)
        except TypeError as error:
            raise ValueError(f"{error}; accepted: JSON data") from None
    run = Run(slug, parameters | own, _device(device, profile, only))
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    run.torch_setup()
    return run


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r}; accepted: a whole number, {least} or more")
    return number


def _checkpoint(value: str) -> str:
    """A hub id unchanged, an existing path made absolute."""
    path = Path(value).expanduser()
    if value and path.exists():
        return str(path.resolve())
    if value and (not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", value) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())):
        raise ValueError(f"checkpoint: {value!r} does not exist; accepted: a folder, a hub id such as org/name, or empty")
    return value


def _device(device: str, profile: str, only: str) -> str:
    device = os.environ.get("READRUN_DEVICE", "auto") if device == "auto" else device
    if device not in DEVICES:
        raise ValueError(f"device: {device!r}; accepted: {', '.join(DEVICES)}")
    driver = any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))
    cuda = False
    if device != "cpu" and ("torch" in sys.modules or driver or device == "cuda"):  # torch takes 2 s to import
        try:
            import torch

            cuda = torch.cuda.is_available()
        except ImportError:
            pass
    if not cuda and (device == "cuda" or (device == "auto" and profile == "gpu" and only != "none")):
        wanted = "device: 'cuda'" if device == "cuda" else "profile: 'gpu'"
        raise ValueError(
            f"{wanted} needs a CUDA GPU and there is none; accepted: device='cpu' (slow in the gpu profile),"
            " profile='smoke' or 'cpu', or only='none' to draw from saved units"
        )
    return "cuda" if cuda else "cpu"
