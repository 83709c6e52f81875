"""Files and text of a job, read without being led astray: nothing is followed, nothing blocks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

NOFOLLOW = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC if hasattr(os, "O_NOFOLLOW") else 0
DEEP = 100  # folders in one another


def printable(data: bytes) -> str:
    """Text for people and pages: invalid UTF-8 replaced, control characters escaped, as are those that
    reorder or hide text."""
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def copy_files(
    source: Path | int,
    target: Path | int | None,
    *,
    max_bytes: int,
    max_files: int,
    own: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Copy the regular files below a folder that may be hostile; nothing is followed and nothing blocks.

    `source`, `target`: folders, or open descriptors of folders; `target=None` only reads. Left out, with the
    reason: links of both kinds, devices, FIFOs, sockets, names that are not UTF-8, hold control characters or
    differ from another only by case, and whatever would pass the limits (a sparse file counts with its full
    size). `own`: the folder is a file system of its own, whose hard links lead nowhere else. Returns
    ({relative path: sha256}, {relative path, escaped: reason}).
    """
    found: dict[str, str] = {}
    skipped: dict[str, str] = {}
    left = {"bytes": max_bytes, "files": max_files}

    def folder(here: int, there: int | None, prefix: str) -> None:
        seen: dict[str, str] = {}
        for entry in sorted(os.listdir(here)):
            path = printable(os.fsencode(prefix + entry)).replace("\n", "\\n").replace("\t", "\\t")
            if left["files"] <= 0:
                skipped["…"] = "too many files"
                return
            left["files"] -= 1
            if path != prefix + entry:
                skipped[path] = "odd name"
            elif (twin := seen.setdefault(entry.casefold(), entry)) != entry:
                skipped[path] = f"differs from {twin} only by case"
            else:
                try:
                    mode = os.stat(entry, dir_fd=here, follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode) and prefix.count("/") >= DEEP:
                        skipped[path] = "too deep"
                    elif stat.S_ISDIR(mode):
                        with _opened(entry, here) as inner:
                            if there is None:
                                folder(inner, None, prefix + entry + "/")
                                continue
                            os.mkdir(entry, 0o755, dir_fd=there)
                            with _opened(entry, there) as into:
                                _hand_over(into, there)
                                folder(inner, into, prefix + entry + "/")
                    elif stat.S_ISREG(mode):
                        file(here, there, entry, path)
                    else:
                        skipped[path] = KINDS.get(stat.S_IFMT(mode), "no regular file")
                except OSError as error:  # it vanished, was swapped, or may not be read
                    skipped[path] = error.strerror or "cannot be read"

    def file(here: int, there: int | None, entry: str, path: str) -> None:
        """What counts is what was opened, not what `stat` saw before."""
        with os.fdopen(os.open(entry, os.O_RDONLY | NOFOLLOW, dir_fd=here), "rb") as source:
            status = os.fstat(source.fileno())
            if not stat.S_ISREG(status.st_mode):
                skipped[path] = "no regular file"
            elif status.st_nlink > 1 and not own:
                skipped[path] = "hard link"
            elif status.st_size > left["bytes"]:
                skipped[path] = "too large"
            else:
                left["bytes"] -= status.st_size
                data = source.read(status.st_size)
                if there is not None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW
                    mode = 0o644 | (status.st_mode & 0o111)
                    with os.fdopen(os.open(entry, flags, mode, dir_fd=there), "wb") as copy:
                        copy.write(data)
                        _hand_over(copy.fileno(), there)
                found[path] = hashlib.sha256(data).hexdigest()

    with contextlib.ExitStack() as stack:
        both = (None if x is None else stack.enter_context(_opened(x)) for x in (source, target))
        here, there = both
        assert here is not None
        folder(here, there, "")
    return found, skipped


KINDS = {stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
KINDS |= {stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


@contextlib.contextmanager
def _opened(folder: Path | str | int, inside: int | None = None) -> Iterator[int]:
    """A descriptor of a folder; of one `inside` another only if it is no link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if inside is None else NOFOLLOW)
    number = os.dup(folder) if isinstance(folder, int) else os.open(folder, flags, dir_fd=inside)
    try:
        yield number
    finally:
        os.close(number)


def _hand_over(fd: int, folder: int) -> None:
    """A file that root makes belongs to whom its folder belongs."""
    if os.geteuid() == 0:
        owner = os.fstat(folder)
        os.fchown(fd, owner.st_uid, owner.st_gid)


def clear(folder: int) -> None:
    """Remove everything in an open folder."""
    for entry in os.listdir(folder):
        if stat.S_ISDIR(os.stat(entry, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(entry, dir_fd=folder)
        else:
            os.unlink(entry, dir_fd=folder)
