"""Files and folders that are there whole or not at all, and claims that end with their process."""

import errno
import hashlib
import os
import stat
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT

from tinyldm.files import Claims, flush, link, read_json, replace_folder, sha256, write_file


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "a.json", "old")
    monkeypatch.setattr("tinyldm.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == ["a.json"]
    monkeypatch.undo()
    write_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new" and names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_whole_or_left_as_it_was(tmp_path):
    folder = tmp_path / "deep" / "folder"

    def fill(word):
        def make(partial):
            partial.mkdir()
            (partial / "file").write_text(word)
            if word == "broken":
                raise OSError("no room")
        return make

    replace_folder(folder, fill("old"))
    with pytest.raises(OSError, match="no room"):
        replace_folder(folder, fill("broken"))
    assert (folder / "file").read_text() == "old" and names(folder.parent) == ["folder"]
    (folder / "more").write_text("of the old one")
    (folder.parent / ".writing-folder").mkdir()                     # of a process that was killed
    (folder.parent / ".writing-folder" / "junk").touch()
    replace_folder(folder, fill("new"))
    assert (folder / "file").read_text() == "new" and names(folder) == ["file"] and names(folder.parent) == ["folder"]


def test_all_of_a_folder_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("tinyldm.files.flush", lambda path: flushed.append((path.name, (tmp_path / "folder").exists())))

    def fill(partial):
        (partial / "sub").mkdir(parents=True)
        (partial / "sub" / "file").touch()

    replace_folder(tmp_path / "folder", fill)
    assert sorted(flushed[:-1]) == [(".writing-folder", False), ("file", False), ("sub", False)]
    assert flushed[-1] == (tmp_path.name, True)


def test_a_json_file_that_is_missing_damaged_or_no_object_is_named_with_what_to_do(tmp_path):
    file = tmp_path / "a.json"
    for content, expected in ((None, f"{file} does not exist: look elsewhere"), ("{", f"{file} is damaged"), ("[]", f"{file} is damaged"),
                              (b"\xff", f"{file} is damaged")):
        if content is not None:
            write_file(file, content)
        with pytest.raises(ValueError) as error:
            read_json(file, "look elsewhere")
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    write_file(file, '{"a": 1}')
    assert read_json(file, "look elsewhere") == {"a": 1}


def test_the_sha256_of_a_file_is_that_of_all_its_bytes(tmp_path):
    for size in (0, 3, (1 << 20) + 1, 3 << 20):
        (tmp_path / "file").write_bytes(data := b"abc" * (size // 3))
        assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_claim_keeps_other_processes_off_until_its_process_ends(tmp_path):
    def others(name: str) -> str:
        code = "import sys, pathlib, tinyldm.files as f; print(f.Claims(pathlib.Path(sys.argv[1])).take(sys.argv[2]))"
        words = [sys.executable, "-c", code, str(tmp_path / "claims"), name]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT).stdout.strip()

    claims = Claims(tmp_path / "claims")
    assert claims.take("a") and claims.take("b")
    assert (others("a"), others("c"), others("b")) == ("False", "True", "False")
    with claims.held("d"):
        assert others("d") == "False"
    assert others("d") == "True"
    claims.close()
    assert others("a") == "True"


REFUSALS = [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS]


@pytest.mark.parametrize("code", REFUSALS)
def test_a_file_system_that_flushes_no_folders_is_no_error_but_one_that_flushes_no_files_is(tmp_path, monkeypatch, code):
    real = os.fsync

    def fsync(handle):
        if refused(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    refused = stat.S_ISDIR
    write_file(tmp_path / "a", "new")
    replace_folder(tmp_path / "folder", lambda partial: partial.mkdir())
    assert names(tmp_path) == ["a", "folder"]
    refused = stat.S_ISREG
    with pytest.raises(OSError):
        write_file(tmp_path / "b", "new")
    assert names(tmp_path) == ["a", "folder"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_broken_or_full_disk_is_an_error_of_a_folder_too(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(OSError):
        flush(tmp_path)


def test_files_and_folders_are_flushed_without_the_right_to_write_them(tmp_path, monkeypatch):
    """For an administrator, whom permissions do not bind, this is seen in the flags alone."""
    flags, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, how, *more, **named: flags.append(how) or real(path, how, *more, **named))
    (tmp_path / "frozen").write_text("x")
    (tmp_path / "frozen").chmod(0o444)
    flush(tmp_path / "frozen"), flush(tmp_path)
    assert flags == [os.O_RDONLY] * 2 or os.name == "nt"


def test_a_file_gets_a_second_name_or_where_that_is_refused_a_copy_of_its_content_alone(tmp_path, monkeypatch):
    (tmp_path / "one").write_text("x")
    link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").samefile(tmp_path / "one")

    def refuse(*words, **more):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("link", "chmod", "utime"):                        # as mounts of object stores and CIFS refuse them
        monkeypatch.setattr(os, name, refuse)
    link(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").read_text() == "x" and not (tmp_path / "three").samefile(tmp_path / "one")


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as Lustre mounted without them."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_without_locks_one_process_works_and_is_warned_once(tmp_path, no_locks, capsys):
    claims = Claims(tmp_path / "claims")
    with claims.held("settings"):
        assert claims.take("shard") and claims.take("another")
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'claims'}: this file system has no locks (No locks available)")


def test_without_locks_several_processes_do_not_share_work(tmp_path, no_locks):
    claims = Claims(tmp_path / "claims", processes=8)
    with pytest.raises(OSError, match=r"has no locks .*, by which 8 processes share the work: put the folder on another disk"):
        claims.take("shard")
