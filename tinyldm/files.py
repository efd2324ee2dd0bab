"""Files and folders that are written atomically, and locks for work that two processes must not do at once.

Content is first written under a temporary name, flushed to the disk, and then renamed: after a kill or a power cut the old
content, the new content or nothing is found under the final name, never half of it.
"""

from __future__ import annotations

import errno
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
NO_FOLDER_FLUSH = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EISDIR}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
OUTPUT = ".tinyldm-output"              # an empty file in folders of pictures that the scripts have made


def flush(path: Path) -> None:
    """Flush a file to the disk (fsync), or a folder's list of names (Windows flushes that by itself and offers no call for it).

    Some file systems (network disks, WSL's, object stores) refuse to flush a folder, or to open one for it; that is no error, as in
    PostgreSQL's fsync_fname. Everything else is: a full or broken disk may show itself only here."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    try:
        # Reading is enough on POSIX, where a file may be write-protected or another user's; Windows flushes only what may be written.
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in NO_FOLDER_FLUSH:
            raise


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


def link(file: Path, new: Path) -> None:
    """Give a file a second name; where the disk has no hard links, or forbids them, copy its content (permissions and times can be
    refused there too)."""
    try:
        os.link(file, new)
    except OSError:
        shutil.copyfile(file, new)


def can_link(file: Path, folder: Path) -> bool:
    """Whether link() gives a file a second name in this folder, rather than copy it."""
    probe = folder / ".writing-link"
    try:
        probe.unlink(missing_ok=True)       # of a process that was killed here
        os.link(file, probe)
        probe.unlink()
    except OSError:
        return False
    return True


def make_output_folder(folder: Path) -> None:
    """Make a folder for pictures that a script draws, with a mark, so that it is not read as data where it lies in a folder of
    pictures. A folder that is there already may hold anything and gets no mark."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTPUT).touch()


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(1 << 20):                   # reading and hashing release the GIL: other threads keep running
            digest.update(piece)
    return digest.hexdigest()


class Claims:
    """Named pieces of work, each held by one process at a time, through locks on the bytes of one file.

    The system releases a lock when its process ends, in whatever way; on a shared disk locks also hold between hosts. Some file systems
    have no locks (Lustre mounted without them, mounts of object stores): there one process works with a warning, and several that were
    started together to share the work (processes) are an OSError.
    """

    def __init__(self, file: Path, processes: int = 1):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.processes, self.warned = open(file, "ab"), processes, False

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
        try:
            if os.name == "nt":
                import msvcrt

                self.file.seek(byte)
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK if taken else msvcrt.LK_UNLCK, 1)
            else:
                import fcntl

                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB if taken else fcntl.LOCK_UN, 1, byte)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._go_without(error)

    def _go_without(self, error: OSError) -> None:
        problem = f"{self.file.name}: this file system has no locks ({error.strerror})"
        if self.processes > 1:
            raise OSError(f"{problem}, by which {self.processes} processes share the work: put the folder on another disk, mount this one "
                          "with locks (Lustre: -o flock), or start a single process") from error
        if not self.warned:
            print(f"warning: {problem}: nothing stops a second process, so do not start one that writes here", flush=True)
        self.warned = True

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
