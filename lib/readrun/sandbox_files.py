"""Files and text of a job, read without being led astray: nothing is followed, nothing blocks."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
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
    left = [max_bytes, max_files]
    here = os.dup(source) if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    there = None
    try:
        if target is not None:
            there = (
                os.dup(target) if isinstance(target, int) else os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            )
        _copy(here, there, "", found, skipped, left, own)
    finally:
        os.close(here)
        if there is not None:
            os.close(there)
    return found, skipped


def _copy(
    here: int,
    there: int | None,
    prefix: str,
    found: dict[str, str],
    skipped: dict[str, str],
    left: list[int],
    own: bool,
) -> None:
    seen: dict[str, str] = {}
    for entry in sorted(os.listdir(here)):
        path = printable(os.fsencode(prefix + entry)).replace("\n", "\\n").replace("\t", "\\t")
        why = ""
        if left[1] <= 0:
            skipped["…"] = "too many files"
            return
        left[1] -= 1
        if path != prefix + entry:
            why = "odd name"
        elif (twin := seen.setdefault(entry.casefold(), entry)) != entry:
            why = f"differs from {twin} only by case"
        if why:
            skipped[path] = why
            continue
        try:
            status = os.stat(entry, dir_fd=here, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                if prefix.count("/") >= DEEP:
                    skipped[path] = "too deep"
                    continue
                inner = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW, dir_fd=here)
                into = None
                try:
                    if there is not None:
                        os.mkdir(entry, 0o755, dir_fd=there)
                        into = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW, dir_fd=there)
                        _hand_over(into, there)
                    _copy(inner, into, prefix + entry + "/", found, skipped, left, own)
                finally:
                    os.close(inner)
                    if into is not None:
                        os.close(into)
            elif not stat.S_ISREG(status.st_mode):
                skipped[path] = KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            else:
                _copy_file(here, there, entry, path, found, skipped, left, own)
        except OSError as error:  # it vanished, was swapped, or may not be read
            skipped[path] = error.strerror or "cannot be read"


KINDS = {stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
KINDS |= {stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def _copy_file(
    here: int,
    there: int | None,
    entry: str,
    path: str,
    found: dict[str, str],
    skipped: dict[str, str],
    left: list[int],
    own: bool,
) -> None:
    """One file: what counts is what was opened, not what `stat` saw before."""
    with os.fdopen(os.open(entry, os.O_RDONLY | NOFOLLOW, dir_fd=here), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            skipped[path] = "no regular file"
        elif status.st_nlink > 1 and not own:
            skipped[path] = "hard link"
        elif status.st_size > left[0]:
            skipped[path] = "too large"
        else:
            left[0] -= status.st_size
            data = file.read(status.st_size)
            if there is not None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW
                mode = 0o644 | (status.st_mode & 0o111)
                with os.fdopen(os.open(entry, flags, mode, dir_fd=there), "wb") as copy:
                    copy.write(data)
                    _hand_over(copy.fileno(), there)
            found[path] = hashlib.sha256(data).hexdigest()


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
