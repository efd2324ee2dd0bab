"""Files that are there whole or not at all, and work that two processes must not do at once.

What is written goes under another name first, is flushed to the disk, and then takes its place by a rename: after a
kill or a power cut there is the old, the new or nothing, never a half.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Push a file to the disk, or a folder's list of names (which Windows does by itself, and cannot be asked for)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    torso = file.with_name(f".writing-{file.name}")
    try:
        torso.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(torso)
    except BaseException:
        torso.unlink(missing_ok=True)
        raise
    os.replace(torso, file)
    flush(file.parent)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a folder under another name, flush it, then put it in place of what was there."""
    torso = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(torso, ignore_errors=True)
    torso.parent.mkdir(parents=True, exist_ok=True)
    try:
        fill(torso)
        for path in [*torso.rglob("*"), torso]:
            flush(path)
    except BaseException:
        shutil.rmtree(torso, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(torso, folder)
    flush(folder.parent)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(1 << 20):                   # other threads run on meanwhile
            digest.update(piece)
    return digest.hexdigest()


class Claims:
    """Named pieces of work, each held by one process at a time, through locks on the bytes of one file.

    A lock ends with its process, however that ends; on a shared disk it holds between hosts.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(file, "ab")

    def take(self, name: str) -> bool:
        """Whether this piece is now ours. Never waits."""
        try:
            self._lock(name, True)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Wait for a piece, and let go of it afterwards."""
        while not self.take(name):
            time.sleep(0.02)
        try:
            yield
        finally:
            self._lock(name, False)

    def _lock(self, name: str, taken: bool) -> None:
        byte = zlib.crc32(name.encode())                       # of a file that stays empty
        if os.name == "nt":
            import msvcrt

            self.file.seek(byte)
            msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK if taken else msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB if taken else fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        self.file.close()
