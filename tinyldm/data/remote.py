"""Files on any file system that fsspec knows, read over unreliable connections.

Notable: a reader sees one continuous stream. After a failure (a reset, a timeout, a body that ends early, a server that is
unreachable for a while) the file is opened again after a pause and read from the same byte. If it fails repeatedly, one error
says how far reading came.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tinyldm.data.links import LinkedFileSystem

BUFFER = 4 << 20            # bytes per request: large enough that its latency is negligible
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
            "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko"}


class SourceLost(OSError):
    """A source cannot be reached, even after retries where a retry could help."""


def classify(error: BaseException) -> type[OSError]:
    """The meaning of an error of a file system: FileNotFoundError, PermissionError, or SourceLost for all others.

    Its class alone does not tell: fsspec's http and the hub's cache raise "not found" when there is no network.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # late: the package is slow to import

    status = status_of(error)
    if status is not None:
        return PermissionError if status in (401, 403) else FileNotFoundError if status in (404, 410) else SourceLost
    if isinstance(error, LocalEntryNotFoundError):
        return SourceLost
    if isinstance(error, (FileNotFoundError, NotADirectoryError, EntryNotFoundError)):
        cause = error.__cause__             # a failed look-up or an invalid name as its cause has nothing to do with the network
        return classify(cause) if cause and not isinstance(cause, (LookupError, ValueError)) else FileNotFoundError
    return PermissionError if isinstance(error, PermissionError) else SourceLost


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, the hub, or Azure's, Google's or Amazon's libraries; None if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata")
        found = [response.get("HTTPStatusCode")] if isinstance(response, dict) else []
    else:
        found = [getattr(holder, name, None) for holder in (error, response) for name in ("status", "status_code", "code")]
    return next((status for status in found if isinstance(status, int) and 400 <= status < 600), None)


class RetryingFile(io.RawIOBase):
    """A seekable file for reading that reconnects when its connection breaks.

    size: in bytes, None where the file system does not say. If the file ends earlier, that counts as a broken connection.
    tries: attempts in a row that may fail to read a single byte; the pauses between them are 1, 2, 4, ... seconds.
    sleep: called with seconds; for tests.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, size: int | None = None, *, tries: int = 6,
                 sleep: Callable[[float], None] | None = None):
        super().__init__()
        self.fs, self.path, self.size, self.tries, self.sleep = fs, path, size, tries, sleep or time.sleep
        self.at = 0                         # position of the next byte to return
        self.stream = None

    def readinto(self, buffer) -> int:
        """Up to len(buffer) bytes; 0 at the end. Raises SourceLost after the last try."""
        wanted = len(buffer) if self.size is None else min(len(buffer), self.size - self.at)
        if wanted <= 0:
            return 0
        for attempt in range(self.tries):
            if attempt:
                self.sleep(2 ** (attempt - 1))
            try:
                self.stream = self.stream or self.reopen()
                data = self.stream.read(wanted)
                if data or self.size is None:
                    buffer[:len(data)] = data
                    self.at += len(data)
                    return len(data)
                reason = "the connection ended early"
            except Exception as error:      # file systems pass on their libraries' exceptions, of which few are OSErrors
                if isinstance(error, FileNotFoundError) and classify(error) is FileNotFoundError:
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.drop()
        raise SourceLost(f"{address(self.fs, self.path)}: stopped at byte {self.at} of {self.size or 'an unknown number'} "
                         f"after {self.tries} tries ({reason}): check the network and run the same command again; "
                         "finished shards are kept")

    def reopen(self) -> BinaryIO:
        stream = self.fs.open(self.path, "rb", cache_type="none")       # a cache has no use: every byte is read once, in large pieces
        try:
            if self.at:
                stream.seek(self.at)
        except ValueError:                  # the server does not support ranges: read and discard up to the position
            left = self.at
            while left:
                data = stream.read(min(left, BUFFER))
                if not data:
                    raise EOFError(f"the file ends {left} bytes before byte {self.at}") from None
                left -= len(data)
        return stream

    def drop(self) -> None:
        stream, self.stream = self.stream, None
        try:
            if stream is not None:
                stream.close()
        except Exception:                   # the connection is broken already
            pass

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self.size is None:
            raise io.UnsupportedOperation(f"{address(self.fs, self.path)}: its size is not known")
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"cannot seek to byte {position}")
        if position != self.at:
            self.drop()
            self.at = position
        return position

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.drop()
        super().close()


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def open_file(fs: AbstractFileSystem, path: str, size: int | None = None) -> BinaryIO:
    """A buffered, seekable stream of a file, local or remote. size: what the file system's listing gives."""
    if is_local(fs):
        return open(path, "rb", buffering=1 << 20)
    return io.BufferedReader(RetryingFile(fs, path, size), BUFFER)


@contextmanager
def reading(fs: AbstractFileSystem, path: str, size: int | None = None) -> Iterator[BinaryIO]:
    """open_file() for a shard: every error that keeps it from being read becomes a SourceLost that names the shard."""
    try:
        with open_file(fs, path, size) as file:
            yield file
    except SourceLost:
        raise
    except OSError as error:
        raise SourceLost(f"{address(fs, path)}: cannot be read ({type(error).__name__}: {error.strerror or error}): check "
                         "that it exists and may be read, and run the same command again; finished shards are kept") from error


def address(fs: AbstractFileSystem, path: str) -> str:
    """The name of a file in messages: its path, or its URL."""
    return path if is_local(fs) else fs.unstrip_protocol(path)


def find_fs(spec: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it. ValueError where its package is not installed."""
    protocol = spec.partition("://")[0].split("::")[-1]
    try:
        fs, path = url_to_fs(spec)
        return (LinkedFileSystem() if type(fs) is LocalFileSystem else fs), path
    except ImportError as error:
        package = PACKAGES.get(protocol)
        how = f"pip install {package}" if package else "install it with pip"
        raise ValueError(f"--data {spec}: {protocol}:// needs a package that is not installed ({error}): {how}") from None
    except ValueError as error:
        raise ValueError(f"--data {spec}: {error}; expected a path, or a URL such as hf://datasets/OWNER/NAME") from None
