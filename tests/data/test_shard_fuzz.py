"""Shards with wrong, missing and repeated bytes: no picture ever gets the caption of another."""

import gzip
import io
import json
import random
import tarfile

import pytest
from archives import DATA, FS, encode, tar
from PIL import Image

from tinyldm.data.readers import Damaged, Sample, Skip, captions, read_tar

ROUNDS = 300


def drawn(count=12):
    """[(name, bytes), ...]: pictures of one colour each, PNG and JPEG in turn, with a .txt and a .json that name it."""
    files = []
    for i in range(count):
        picture = encode(Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 7)), ("png", "jpeg")[i % 2])
        files += [(f"{i:03d}.{('png', 'jpg')[i % 2]}", picture), (f"{i:03d}.txt", f"colour {i}".encode()),
                  (f"{i:03d}.json", json.dumps({"prompt": f"colour {i}"}).encode())]
    return files


def emoji(count=12):
    shard = DATA / "emoji128-000.tar"
    if not shard.exists():
        pytest.skip(f"{shard} does not exist")
    files = []
    with tarfile.open(shard) as archive:
        for member in list(archive)[:3 * count]:
            content = archive.extractfile(member).read()
            if member.name.endswith(".txt"):
                caption = content.decode()
            if member.name.endswith(".json"):
                content = json.dumps(json.loads(content) | {"prompt": caption}).encode()
            files.append((member.name, content))
    return files


def packed(files):
    """The archive, and the range of bytes of each file with its header, but without the padding, in which damage is not noticed."""
    data = tar(*files)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ranges = {member.name: range(member.offset, member.offset_data + member.size) for member in archive}
    return data, ranges


def hurt(data, rng, ways=("flip", "cut", "lose", "repeat")):
    """Damage the bytes in a random way; returns the result, and the ranges of the old bytes that were affected."""
    way, unit = rng.choice(ways), rng.choice([1, 512])          # 512: the block size of disks and of tar
    if way == "flip":
        positions = [rng.randrange(len(data)) for _ in range(rng.randint(1, 4))]
        out = bytearray(data)
        for position in positions:
            out[position] ^= rng.randint(1, 255)
        return bytes(out), [range(position, position + 1) for position in positions]
    first, last = sorted(rng.randrange(len(data) // unit) * unit for _ in range(2))
    if way == "cut":
        return data[:first], [range(first, len(data))]
    if way == "lose":
        return data[:first] + data[last:], [range(first - 1, last + 1)]
    return data[:last] + data[first:], [range(last - 1, last + 1)]


def read_whole(file, data):
    """Samples and skips; None where the reader raises an error about the whole shard."""
    file.write_bytes(data)
    try:
        return list(read_tar(FS, str(file), len(data)))
    except Damaged as error:
        assert file.name in str(error)
    except ValueError as error:
        assert str(error) == f"{file} is not a tar archive"
    return None


def check(out, files, touched):
    """Undamaged pictures and keys must have their own captions; samples whose own bytes were damaged are exempt."""
    original = {name: content for name, content in files}
    keys = {content: name[:name.rindex(".")] for name, content in files if name.endswith((".png", ".jpg"))}
    truth = {name[:-4]: content.decode() for name, content in files if name.endswith(".txt")}
    samples = [sample for sample in out if isinstance(sample, Sample)]
    assert len({sample.key for sample in samples}) == len(samples)
    for sample in samples:
        for end in sample.fields:
            name = f"{sample.key}.{end}"
            if name in touched or name not in original:
                continue
            assert sample.fields[end] == original[name]
            key = keys.get(sample.picture, sample.key)
            if key in truth and not touched & {f"{sample.key}.png", f"{sample.key}.jpg"}:
                assert captions(sample, ["txt" if end == "txt" else "prompt"]) == [(0, truth[key])]
    return len(samples)


def fuzz(tmp_path, files, rounds, seed):
    data, ranges_of = packed(files)
    rng, samples, skips, lost = random.Random(seed), 0, 0, 0
    for _ in range(rounds):
        changed, ranges = hurt(data, rng)
        touched = {name for name, own in ranges_of.items()
                   if any(own.start <= hit.stop and hit.start <= own.stop for hit in ranges)}
        out = read_whole(tmp_path / "a.tar", changed)
        lost += out is None
        samples += check(out or [], files, touched)
        skips += sum(isinstance(part, Skip) for part in out or [])
    assert samples > 5 * rounds and skips > rounds / 5 and lost < rounds / 10


def test_no_damage_to_a_tar_gives_a_picture_the_caption_of_another(tmp_path):
    fuzz(tmp_path, drawn(), ROUNDS, seed=1)


def test_no_damage_gives_a_mask_the_caption_of_its_picture(tmp_path):
    masks = {f"{i:03d}.seg.png": b"mask %d" % i for i in range(12)}
    files = sorted([*drawn(), *masks.items()])
    data, rng, samples = packed(files)[0], random.Random(4), 0
    for _ in range(ROUNDS):
        out = [part for part in read_whole(tmp_path / "a.tar", hurt(data, rng)[0]) or [] if isinstance(part, Sample)]
        samples += len(out)
        assert not any(captions(sample) for sample in out if sample.picture in masks.values())
    assert samples > 5 * ROUNDS


def test_no_damage_to_a_real_tar_gives_a_picture_the_caption_of_another(tmp_path):
    fuzz(tmp_path, emoji(), ROUNDS // 3, seed=2)


@pytest.mark.parametrize("kind", ["drawn", "emoji"])
def test_a_damaged_gzip_is_refused_whole_or_holds_only_what_was_written(tmp_path, kind):
    files = {"drawn": drawn, "emoji": emoji}[kind]()
    data, refused, samples = gzip.compress(packed(files)[0], 6, mtime=0), 0, 0
    rng = random.Random(3)
    for _ in range(ROUNDS):
        out = read_whole(tmp_path / "a.tar.gz", hurt(data, rng)[0])
        refused += out is None
        samples += check(out or [], files, set())
    assert refused > ROUNDS / 3 and samples > ROUNDS / 2


def test_headers_that_are_wrong_in_every_byte_are_reported(tmp_path):
    files = drawn(4)
    data, ranges_of = packed(files)
    start = ranges_of["001.txt"].start
    for byte in range(512):
        changed = bytearray(data)
        changed[start + byte] ^= 1 + byte % 255
        if byte == 155:                                         # an unused byte after the checksum
            continue
        out = read_whole(tmp_path / "a.tar", bytes(changed))
        flaws = [part.reason for part in out if isinstance(part, Skip)]
        assert flaws == ["archive damaged"], (byte, flaws)
        found = {part.key: set(part.fields) for part in out if isinstance(part, Sample)}
        assert found == {"000": {"txt", "json"}, "001": {"json"}, "002": {"txt", "json"}, "003": {"txt", "json"}}
