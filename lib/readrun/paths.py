"""Where things are: a checkout, a folder named by READRUN_ROOT, or the data of an installed package."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

_verified: dict[str, tuple[int, int, str]] = {}


def library() -> Path:
    """Folder of the `readrun` package in use."""
    return Path(__file__).resolve().parent


def root() -> Path:
    """The book's folder: $READRUN_ROOT, else the checkout that holds lib/readrun, else (installed) the cwd."""
    named = os.environ.get("READRUN_ROOT")
    if named:
        return Path(named).resolve()
    return library().parents[1] if library().parent.name == "lib" else Path.cwd()


def _content(name: str) -> Path:
    packaged = library() / f"_{name}"
    return packaged if packaged.is_dir() and "READRUN_ROOT" not in os.environ else root() / name


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
    known = _verified.get(str(path))
    if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
        known = (stat.st_size, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        _verified[str(path)] = known
    return known[2]


def asset_files(folder: Path) -> list[Path]:
    """Data files at or below `folder`, sorted; the manifest and hidden files do not count."""
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    return [p for p in found if p.name != "MANIFEST.json" and not p.name.startswith(".")]


def asset(name: str) -> Path:
    """Path of the committed file or folder data/assets/`name` ("dr_grpo/base/model.safetensors").

    Every file is checked against data/assets/<slug>/MANIFEST.json first. Raises ValueError if the asset is
    missing, not listed there, or differs from its checksum.
    """
    slug, _, rest = name.strip("/").partition("/")
    top = assets(slug)
    path = top / rest
    if ".." in Path(name).parts or not slug or not path.exists():
        raise ValueError(f"asset {name!r}: no such file under data/assets")
    try:
        listed = json.loads((top / "MANIFEST.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"asset {name!r}: data/assets/{slug}/MANIFEST.json is not readable: {error}") from error
    for file in asset_files(path):
        key = file.relative_to(top).as_posix()
        if key not in listed:
            raise ValueError(f"asset {slug}/{key} is not listed in data/assets/{slug}/MANIFEST.json")
        if file_sha256(file) != listed[key].get("sha256"):
            raise ValueError(f"asset {slug}/{key} differs from the checksum in its MANIFEST.json: restore the file")
    return path


def write_manifest(slug: str, source: str, licence: str, how: str) -> Path:
    """List every file of data/assets/`slug` with its checksum; files already listed keep their texts."""
    top = assets(slug)
    path = top / "MANIFEST.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    listed = {}
    for file in asset_files(top):
        key = file.relative_to(top).as_posix()
        about = {"source": source, "licence": licence, "how": how} | old.get(key, {})
        listed[key] = about | {"sha256": file_sha256(file)}
    write_atomic(path, json.dumps(listed, indent=1, sort_keys=True) + "\n")
    return path
