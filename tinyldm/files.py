"""Files that are there whole or not at all, and work that two processes must not do at once.

What is written goes under another name first, is flushed to the disk, and then takes its place by a rename: after a
kill or a power cut there is the old, the new or nothing, never a half.
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

INCOMPLETE = "copy or download it again, or export it anew"


def flush(path: Path) -> None:
    """Push a file to the disk, or a folder's list of names (which Windows does by itself, and cannot be asked for)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Push a folder and all that is in it to the disk, files first: after a power cut it is whole, or not there under its name."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
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
    """Let `fill` make a folder under another name, flush it, then put it in place of what was there."""
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


def read_json(file: Path, fix: str) -> dict:
    """A JSON object. ValueError where it is missing (then with `fix`, what to do) or damaged."""
    if not file.exists():
        raise ValueError(f"{file} does not exist: {fix}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {INCOMPLETE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it holds no {{...}}): {INCOMPLETE}")
    return content
