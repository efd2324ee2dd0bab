"""Below a folder of pictures lie runs, caches and drawn pictures: they are no data, and a listing does not depend on them."""

import pytest
from archives import fill, keys, pairs, read, refusal, shards

from tinyldm.data.outputs import SIGNS
from tinyldm.files import OUTPUT, make_output_folder

RUN = {"config.json": "{}", "launch": "", "lock": "", "samples/vae.png": "P", "samples/step.png": "P", "evaluation/failures.png": "P",
       "evaluation/prompts.json": '{"prompt": "x"}', "checkpoints/step-1/model/x.json": "{}"}
OLD_RUN = {"config.json": "{}", "log.jsonl": "", "samples/vae.png": "P"}
CACHE = {"settings.json": "{}", "claims": "", "decoded.png": "P", "shards/s/shard.json": "{}"}
MODEL = {"model_index.json": "{}", "unet/config.json": "{}", "assets/a.png": "P", "assets/a.txt": "not this"}
DRAWN = {OUTPUT: "", "0001-5-a-fox.png": "P"}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def listed(spec):
    return [(shard.name, shard.stamp, keys(shard.read())) for shard in shards(spec)]


@pytest.mark.parametrize("place", ["run", "deep/er/run", "0"])      # "0" comes before the pictures, the others among or after them
@pytest.mark.parametrize("files", [RUN, OLD_RUN, CACHE, MODEL, DRAWN])
@pytest.mark.parametrize("captions", ["beside", "table"])
def test_what_this_library_writes_into_a_folder_of_pictures_changes_nothing_in_its_listing(tmp_path, place, files, captions):
    fill(tmp_path, a_png="A", a_txt="one", sub__b_png="B", sub__b_txt="two", z_png="Z", z_txt="three")
    if captions == "table":
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "z.png", "text": "two"}\n')
    before = listed(tmp_path)
    put(tmp_path / place, files)
    assert listed(tmp_path) == before and sum(len(part[2]) for part in before) == 2 + (captions == "beside")
    (tmp_path / "link").symlink_to(tmp_path)
    assert [part[2] for part in listed(tmp_path / "link")] == [part[2] for part in before]


@pytest.mark.parametrize("files", [RUN, CACHE, DRAWN])
def test_a_run_beside_shards_does_not_make_their_folder_one_of_pictures(tmp_path, files):
    fill(tmp_path, a_tar=pairs("a"), b_tar=pairs("b"))
    before = [(shard.name, shard.stamp) for shard in shards(tmp_path)]
    put(tmp_path / "run", files)
    assert [(shard.name, shard.stamp) for shard in shards(tmp_path)] == before and len(before) == 2


@pytest.mark.parametrize("files", [RUN, OLD_RUN, CACHE, MODEL, DRAWN])
def test_a_pattern_of_folders_passes_over_runs(tmp_path, files):
    fill(tmp_path, a__a_png="A", b__b_png="B")
    put(tmp_path / "run", files)
    assert keys(read(f"{tmp_path}/*")) == ["a.png", "b.png"]
    fill(tmp_path / "c", config_json="{}", c_png="C")           # which alone says nothing
    assert keys(read(f"{tmp_path}/*")) == ["a.png", "b.png", "c.png"]


def test_a_folder_that_is_named_itself_is_read_whatever_it_is(tmp_path):
    """Somebody may train on drawn pictures, once they have captions."""
    put(tmp_path / "samples", DRAWN)
    (tmp_path / "samples" / "0001-5-a-fox.txt").write_text("a fox")
    assert keys(read(tmp_path / "samples")) == ["0001-5-a-fox.png"]
    assert "no picture and no shard; samples was written by tinyldm: to read such a folder, name it itself" in refusal(tmp_path)


def test_a_drawn_picture_that_a_table_names_is_read(tmp_path):
    put(tmp_path / "samples", DRAWN)
    (tmp_path / "metadata.csv").write_text("file_name,text\nsamples/0001-5-a-fox.png,a fox\n")
    assert [(part.picture, part.fields["text"]) for part in read(tmp_path)] == [(b"P", "a fox")]


@pytest.mark.parametrize("pattern, first, count", [("", "run", 2), ("/*", "/run", 1)])
def test_folders_that_were_passed_over_are_counted_once_per_process(tmp_path, capsys, pattern, first, count):
    fill(tmp_path, a__a_png="A", z__b_png="B")
    put(tmp_path / "run", RUN | {"latents/settings.json": "{}", "latents/index.json": "{}"})        # a cache inside counts with its run
    put(tmp_path / "z" / "drawn", DRAWN)
    spec = f"{tmp_path}{pattern}"
    shards(spec), shards(spec)
    first = first if not pattern else f"{tmp_path}{first}"
    words = "folders that tinyldm wrote were" if count > 1 else "folder that tinyldm wrote was"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"--data {spec}:")]
    assert said == [f"--data {spec}: {count} {words} passed over (first: {first})"]
    fill(tmp_path, other__a_png="A")
    shards(tmp_path / "other")
    assert capsys.readouterr().out == ""


def test_a_pattern_that_matches_only_what_this_library_wrote_says_so(tmp_path, capsys):
    put(tmp_path / "run", RUN)
    assert f"no shard or folder matches; {tmp_path}/run was written by tinyldm: to read such a folder, name it" in refusal(f"{tmp_path}/*")
    assert "tinyldm" not in refusal(f"{tmp_path}/x*").partition(";")[0] and capsys.readouterr().out == ""


def test_only_folders_that_the_scripts_make_themselves_are_marked(tmp_path):
    make_output_folder(tmp_path / "new" / "samples")
    assert [file.name for file in (tmp_path / "new" / "samples").iterdir()] == [OUTPUT] and not (tmp_path / "new" / OUTPUT).exists()
    make_output_folder(tmp_path / "new")                        # it was there, with who knows what in it
    assert not (tmp_path / "new" / OUTPUT).exists() and {OUTPUT} in SIGNS


def test_a_run_on_another_file_system_is_passed_over_too():
    import fsspec
    files = fsspec.filesystem("memory")
    for name, content in (("a.png", b"A"), ("a.txt", b"one"), ("run/config.json", b"{}"), ("run/launch", b""), ("run/samples/x.png", b"X")):
        files.pipe(f"/outputs/{name}", content)
    assert keys(read("memory://outputs")) == ["a.png"]
