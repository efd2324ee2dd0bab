"""Tar shards that are truncated, damaged or hostile, and files that are no archives: what is kept, and what is an error."""

import gzip
import io
import random
import tarfile
import tracemalloc

import pytest
from archives import FS, PAIR, TWO, keys, reseal, skips, tar

from tinyldm.data import remote
from tinyldm.data.readers import Damaged, Sample, Skip, read_npz, read_tar
from tinyldm.data.remote import SourceLost


@pytest.mark.parametrize("pack", [lambda data: data, lambda data: gzip.compress(data, 0)], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("cut", [512, 513, 1024, 1500, 2000, 2048, 2200, 2560, 2600, 3072, 3500, 3585])
def test_a_cut_archive_keeps_what_came_before(read, pack, cut):
    extra = len(pack(b"")) if pack(b"") else 0
    out = read(pack(tar(*TWO))[:cut + (extra - 8 if extra else 0)])
    whole = [Sample("a", b"A", {"txt": b"one"}), Sample("b", b"B", {"txt": b"two"})]
    between = cut % 1024 == 0 and not extra
    assert [reason for _, reason in skips(out)] == ["archive has no end mark" if between else "archive cut short"]
    got = [part for part in out if isinstance(part, Sample)]
    full = whole[:1] if cut >= (1024 * 3 if extra else 2048) else []             # in a gzip, the last sample is doubtful
    assert got[:len(full)] == full and all(sample.picture == other.picture for sample, other in zip(got, whole))


def test_a_sample_that_the_cut_runs_through_is_dropped(read):
    out = read(tar(*TWO)[:3 * 1024 + 513])                   # within b.txt
    assert keys(out) == ["a"] and skips(out) == [("b.txt", "archive cut short")]


def test_an_archive_without_its_end_mark_is_read_completely_and_reported(read):
    assert skips(read(tar(*TWO)[:4096])) == [("b", "archive has no end mark")]
    assert skips(read(tar(*PAIR) + tar(*TWO[2:])[:2048])) == [("b", "archive has no end mark")]
    assert skips(read(tar(*TWO)[:4096 + 512])) == [] and keys(read(tar(*TWO)[:4096])) == ["a", "b"]


def test_a_gzip_that_passed_its_checksum_without_an_end_mark_loses_nothing(read):
    out = read(gzip.compress(tar(*TWO)[:4096]))
    assert keys(out) == ["a", "b"] and skips(out) == [("b", "archive has no end mark")]
    data = bytearray(tar(*TWO)[:4096])
    data[1024] ^= 1                                           # before compression, so that the checksum matches
    assert keys(read(gzip.compress(data))) == ["a", "b"]


def test_an_archive_that_ends_in_the_padding_of_a_member_is_truncated_but_its_sample_is_kept(read):
    out = read(tar(*TWO)[:4000])
    assert keys(out) == ["a", "b"] and skips(out) == [("b", "archive cut short")]


def test_a_shard_that_cannot_be_read_is_lost_by_name(tmp_path, monkeypatch):
    for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), FileNotFoundError("gone")):
        for reader in (read_tar, read_npz):
            def fail(*args, error=error, **kwargs):
                raise error

            monkeypatch.setattr(remote, "open_file", fail)
            text = rf"a\.x: cannot be read \({type(error).__name__}: {error.strerror or 'gone'}\)"
            with pytest.raises(SourceLost, match=text):
                list(reader(FS, str(tmp_path / "a.x"), None))


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress], ids=["tar", "tar.gz"])
def test_a_disk_that_fails_within_a_shard_is_a_loss_and_no_cut(tmp_path, monkeypatch, pack):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 600:
                raise OSError(5, "Input/output error")
            return super().read(size)

        def peek(self, size):
            return self.getvalue()[:size]

    data = pack(tar(*(((f"{i}.png", random.Random(i).randbytes(2000)) for i in range(9)))))
    monkeypatch.setattr(remote, "open_file", lambda *args: Failing(data))
    with pytest.raises(SourceLost, match=r"a\.tar: cannot be read \(OSError: Input/output error"):
        list(read_tar(FS, "a.tar", None))


@pytest.mark.parametrize("reader", [read_tar, read_npz])
def test_a_shard_that_is_gone_is_lost_by_name(tmp_path, reader):
    with pytest.raises(SourceLost, match=r"none: cannot be read \(FileNotFoundError"):
        list(reader(FS, str(tmp_path / "none"), None))


def test_members_after_a_damaged_header_are_found_and_the_damage_is_counted_once_per_place(read):
    data = bytearray(tar(*TWO, ("c.png", b"C" * 3000), ("c.txt", b"three"), ("d.png", b"D")))
    data[1024], data[4096] = 1, 1                             # a.txt, c.png
    out = read(bytes(data))
    assert keys(out) == ["a", "b", "d"] and out[0] == Skip("a", "archive damaged", "no header at byte 1024")
    assert [reason for _, reason in skips(out)] == ["archive damaged", "archive damaged", "no picture"]


def test_a_long_name_is_not_given_to_another_file_where_its_own_header_is_damaged(read):
    name = "n" * 200
    data = bytearray(tar((f"{name}.png", b"N"), *PAIR, format=tarfile.GNU_FORMAT))
    data[1024] ^= 1
    assert keys(read(bytes(data))) == ["a"]


def test_archives_in_a_row_are_read_as_one(read):
    assert keys(read(tar(*PAIR) + tar(*TWO[2:]))) == ["a", "b"]
    assert keys(read(gzip.compress(tar(*PAIR)) + gzip.compress(tar(*TWO[2:])) + bytes(100))) == ["a", "b"]


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff" * 5000, bytes(30000), gzip.compress(b"", mtime=0),
                                  gzip.compress(b"text" * 500, mtime=0)],
                         ids=["empty", "text", "bytes", "zeros", "gzip of nothing", "gzip of text"])
def test_a_file_that_is_no_tar_archive_is_an_error_that_names_it(read, data):
    with pytest.raises(ValueError, match=r"a\.tar is not a tar archive"):
        read(data)


def test_an_archive_without_members_is_empty_and_no_error(read):
    assert read(tar()) == [] and read(tar(("read.me", b"x"))) == []


def test_a_wrong_checksum_or_a_wrong_stream_is_raised_after_the_samples(tmp_path):
    for position, byte in ((-8, 1), (-4, 1), (40, 0xff)):
        data = bytearray(gzip.compress(tar(*TWO), mtime=0))
        data[position] ^= byte
        (tmp_path / "a.tgz").write_bytes(data)
        stream, count = read_tar(FS, str(tmp_path / "a.tgz"), None), 0
        with pytest.raises(Damaged, match=r"a\.tgz: the compressed data are damaged"):
            for _ in stream:
                count += 1
        assert count == (1 if position < 0 else 0)            # the last sample is yielded only when the next begins


def test_a_gzip_that_goes_wrong_before_it_ends_early_is_refused_whole(read):
    data = bytearray(tar(*TWO))
    data[1024] ^= 1
    assert keys(read(gzip.compress(data))) == ["a", "b"]      # the checksum matches, as it was computed after the damage
    with pytest.raises(Damaged, match="compressed data are damaged"):
        read(gzip.compress(data, 0)[:3000])


def test_bytes_after_a_gzip_that_passed_its_checksum_are_only_reported(read):
    out = read(gzip.compress(tar(*TWO)) + b"trailing")
    assert keys(out) == ["a", "b"] and [reason for _, reason in skips(out)] == ["archive damaged"]


@pytest.mark.parametrize("size", [b"77777777777\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"0000000001x\0"])
def test_hostile_sizes_neither_hang_nor_fill_the_memory(read, size):
    data = bytearray(tar(*TWO))
    data[2048 + 124:2048 + 136] = size
    reseal(data, 2048)
    out = read(bytes(data))
    huge = size[:1] in b"7\x80"
    assert keys(out) == ["a"] and skips(out) == ([("b.png", "archive cut short")] if huge else [
        ("a", "archive damaged"), ("b", "no picture")])


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_an_extended_header_of_gigabytes_is_damage(read, kind):
    data = bytearray(tar(*TWO))
    data[2048 + 124:2048 + 136], data[2048 + 156:2048 + 157] = b"10000000000\0", kind
    reseal(data, 2048)
    assert skips(read(bytes(data))) == [("a", "archive damaged"), ("b", "no picture")]


def test_memory_does_not_grow_with_the_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(*((f"{i}.png", bytes(100_000)) for i in range(100))))
    tracemalloc.start()
    assert sum(1 for _ in read_tar(FS, str(tmp_path / "a.tar"), None)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000                                   # the archive has 10 MB, and the read buffer alone has 1 MB
