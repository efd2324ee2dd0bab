"""Files and folders that are there whole or not at all, and claims that end with their process."""

import hashlib
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT

from tinyldm.files import Claims, read_json, replace_folder, sha256, write_file


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
