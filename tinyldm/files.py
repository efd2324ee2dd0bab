"""Files and folders that are written atomically, and locks for work that two processes must not do at once.

Content is first written under a temporary name, flushed to the disk, and then renamed: after a kill or a power cut the old
content, the new content or nothing is found under the final name, never half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

INCOMPLETE = "copy or download it again, or export it again"


def flush(path: Path) -> None:
    """Flush a file to the disk (fsync), or a folder's list of names (Windows flushes that by itself and offers no call for it)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Flush a folder and everything in it to the disk, its files first. A folder that is renamed afterwards is complete under its
    new name, or absent, even after a power cut."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file atomically: readers find the old content or the new one, never a part."""
    partial = file.with_name(f".writing-{file.name}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, file)
    flush(file.parent)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a folder under a temporary name, flush it, then rename it to `folder`, whose old content is removed."""
    partial = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        fill(partial)
        flush_folder(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    flush(folder.parent)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(1 << 20):                   # reading and hashing release the GIL: other threads keep running
            digest.update(piece)
    return digest.hexdigest()


class Claims:
    """Named pieces of work, each held by one process at a time, through locks on the bytes of one file.

    The system releases a lock when its process ends, in whatever way; on a shared disk locks also hold between hosts.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(file, "ab")

    def take(self, name: str) -> bool:
        """Try to lock a piece of work, without waiting. -> whether this process now holds it."""
        try:
            self._lock(name, True)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Wait until a piece of work is free and lock it; release it at the end of the block."""
        while not self.take(name):
            time.sleep(0.02)
        try:
            yield
        finally:
            self._lock(name, False)

    def _lock(self, name: str, taken: bool) -> None:
        byte = zlib.crc32(name.encode())                       # the lock's offset; the file itself stays empty
        if os.name == "nt":
            import msvcrt

            self.file.seek(byte)
            msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK if taken else msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB if taken else fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        self.file.close()


def read_json(file: Path, if_missing: str | None, if_damaged: str = INCOMPLETE) -> dict:
    """A JSON object from a file.

    if_missing    advice for the ValueError where there is no such file; None: that is a FileNotFoundError
    if_damaged    advice for the ValueError where the file does not hold a JSON object
    """
    if if_missing is not None and not file.exists():
        raise ValueError(f"{file} does not exist: {if_missing}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {if_damaged}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it holds no {{...}}): {if_damaged}")
    return content
