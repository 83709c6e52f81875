"""Where things are: a checkout, a folder named by READRUN_ROOT, or the data of an installed package."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path


def library() -> Path:
    """Folder of the `readrun` package in use."""
    return Path(__file__).resolve().parent


def root() -> Path:
    """The book's folder: $READRUN_ROOT, else the checkout that holds lib/readrun, else (installed) here."""
    if named := os.environ.get("READRUN_ROOT"):
        return Path(named).resolve()
    return library().parents[1] if library().parent.name == "lib" else Path.cwd()


def _content(name: str) -> Path:
    packaged = library() / f"_{name}"
    return packaged if packaged.is_dir() and not os.environ.get("READRUN_ROOT") else root() / name


def data() -> Path:
    """Folder of papers, results, media and assets."""
    return _content("data")


def build() -> Path:
    """Folder of everything that can be made again."""
    return root() / "build"


def notebook(slug: str) -> Path:
    """A chapter's py:percent script."""
    return _content("notebooks") / f"{slug}.py"


def chapters() -> list[str]:
    """Slugs that have a notebook script; a leading underscore hides one."""
    return sorted(p.stem for p in _content("notebooks").glob("*.py") if not p.stem.startswith("_"))


def papers(slug: str) -> Path:
    """A chapter's claims file."""
    return data() / "papers" / f"{slug}.yml"


def results(slug: str, suffix: str = "json") -> Path:
    """A chapter's committed record (`suffix` "json") or its arrays ("npz")."""
    return data() / "results" / f"{slug}.gpu.{suffix}"


def assets(slug: str) -> Path:
    """Folder of a chapter's committed data ("shared" for what several use)."""
    return data() / "assets" / slug


def media(slug: str) -> Path:
    """Folder of a chapter's recorded pictures, clips and sound."""
    return data() / "media" / slug


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: a temporary sibling is renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered while its size and time stamp stay."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, stamp: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def asset_files(path: Path) -> list[Path]:
    """Data files at or below `path`, sorted; manifests and hidden files do not count."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in found if p.name != "MANIFEST.json" and not p.name.startswith(".")]


def _manifest(slug: str) -> dict[str, dict[str, str]]:
    path = assets(slug) / "MANIFEST.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"data/assets/{slug}/MANIFEST.json is not readable: {error}") from error


def asset(name: str) -> Path:
    """Path of the committed file or folder data/assets/`name` ("dr_grpo/base/model.safetensors").

    Each file is checked against data/assets/<slug>/MANIFEST.json {file: {sha256, source, licence, how}}.
    Raises ValueError if the asset is missing, not listed there, or differs from its checksum.
    """
    slug, _, rest = name.strip("/").partition("/")
    path = assets(slug) / rest
    if not slug or ".." in Path(name).parts or not path.exists():
        raise ValueError(f"asset {name!r}: there is no such file or folder in data/assets")
    manifest = _manifest(slug)
    for file in asset_files(path):
        key = file.relative_to(assets(slug)).as_posix()
        if key not in manifest:
            raise ValueError(f"asset {slug}/{key} is not listed in data/assets/{slug}/MANIFEST.json")
        if file_sha256(file) != manifest[key].get("sha256"):
            raise ValueError(f"asset {slug}/{key} differs from its checksum in MANIFEST.json: restore it")
    return path


def write_manifest(slug: str, source: str, licence: str, how: str) -> Path:
    """List every file of data/assets/`slug` with its checksum; what is listed already keeps its texts."""
    old, listed = _manifest(slug), {}
    for file in asset_files(assets(slug)):
        key = file.relative_to(assets(slug)).as_posix()
        about = {"source": source, "licence": licence, "how": how} | old.get(key, {})
        listed[key] = about | {"sha256": file_sha256(file)}
    write_atomic(assets(slug) / "MANIFEST.json", json.dumps(listed, indent=1, sort_keys=True) + "\n")
    return assets(slug) / "MANIFEST.json"
