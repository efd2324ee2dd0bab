"""Links to folders: pictures behind them are read, each once, and circles end."""

import os

import pytest
from archives import fill, pairs, read, refusal, shards

from tinyldm.data.links import LinkedFileSystem
from tinyldm.data.readers import Sample, captions

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def found(spec) -> list[str]:
    return [f"{part.key}={part.picture.decode()}" if isinstance(part, Sample) else f"{part.key}! {part.reason}" for part in read(spec)]


def test_linked_folders_at_any_depth_are_read_with_their_captions_and_tables(tmp_path):
    fill(tmp_path, set__a_png="A", set__a_txt="one", far__b_png="B", far__b_txt="two", far__deep__c_png="C", table__d_png="D",
         table__metadata_csv="file_name,text\nd.png,four\n", further__e_png="E")
    link(tmp_path / "set/sub/linked", "../../far")                  # a relative link
    link(tmp_path / "set/table", tmp_path / "table")                # an absolute one
    link(tmp_path / "far/deep/more", "../../further")               # one inside a linked folder
    out = {part.picture: (part.key, captions(part)) for part in read(tmp_path / "set")}
    assert out == {b"A": ("a.png", [(0, "one")]), b"B": ("sub/linked/b.png", [(0, "two")]), b"C": ("sub/linked/deep/c.png", []),
                   b"D": ("table/metadata.csv:1 d.png", [(0, "four")]), b"E": ("sub/linked/deep/more/e.png", [])}


def test_circles_end_and_lead_nowhere_outside(tmp_path):
    fill(tmp_path, outside_png="O", set__a_png="A", set__deep__b_png="B", other__c_png="C")
    link(tmp_path / "set/self", ".")
    link(tmp_path / "set/deep/up", "..")
    link(tmp_path / "set/deep/above", tmp_path)                     # it holds the folder that is read
    link(tmp_path / "set/other", "../other")
    link(tmp_path / "other/back", "../set")                         # two folders that lead to each other
    link(tmp_path / "other/above", "..")
    link(tmp_path / "set/round.png", "round.png")                   # a link to itself
    assert found(tmp_path / "set") == ["a.png=A", "deep/b.png=B", "other/c.png=C", "round.png! unreadable"]
    fill(tmp_path, up__not_png="N", up__root__a_png="A", far__away__b_png="B")
    link(tmp_path / "up/root/far", tmp_path / "far/away")
    link(tmp_path / "far/away/up", tmp_path / "up")                 # what holds the root, seen from a folder that is linked
    assert found(tmp_path / "up/root") == ["a.png=A", "far/b.png=B"]


def test_a_folder_to_which_several_paths_lead_is_read_once_under_the_most_direct_one(tmp_path):
    fill(tmp_path, set__z__a_png="A", far__b_png="B", far__in__c_png="C")
    link(tmp_path / "set/a", "z")                                   # to a folder that is read anyway, though it comes first
    link(tmp_path / "set/b", "../far/in")
    link(tmp_path / "set/c", "../far")                              # the rest of far: its `in` has been read
    link(tmp_path / "set/d", "../far")
    assert found(tmp_path / "set") == ["b/c.png=C", "c/b.png=B", "z/a.png=A"]


def test_a_linked_folder_may_be_the_root_or_a_match_of_a_glob(tmp_path):
    fill(tmp_path, real__a_png="A", real__sub__b_png="B", tars__x_tar=pairs("x"))
    link(tmp_path / "root", "real")
    link(tmp_path / "globbed/one", "../real")
    assert found(tmp_path / "root") == found(tmp_path / "globbed/*") == found(tmp_path / "globbed/one") == ["a.png=A", "sub/b.png=B"]
    link(tmp_path / "globbed/two", "../real/sub")                   # again, through a second link
    fill(tmp_path, globbed__own__c_png="C")
    link(tmp_path / "globbed/three", "own")
    assert sorted(found(tmp_path / "globbed/*")) == ["a.png=A", "c.png=C", "sub/b.png=B"]
    assert sorted(found(tmp_path / "globbed/t*")) == ["b.png=B", "c.png=C"]       # what it leaves out is not what it names


def test_tars_are_found_through_links_by_folder_and_by_glob_and_once(tmp_path):
    fill(tmp_path, set__000_tar=pairs("a"), far__001_tar=pairs("b"), far__deep__002_tar=pairs("c"))
    link(tmp_path / "set/far", "../far")
    link(tmp_path / "set/again", "../far/deep")
    for spec, expected in (("set", "abc"), ("set/**/*.tar", "abc"), ("set/*/*.tar", "bc"), ("set/far/*.tar", "b"), ("s?t/far/*", "bc"),
                           ("set/f*/*.tar", "b"), ("set/ag*/*.tar", "c"), ("set/{far,far}/001.tar", "b")):
        assert "".join(sorted(part.key for part in read(tmp_path / spec))) == expected, spec


def test_folders_without_links_keep_their_names_and_stamps(tmp_path):
    fill(tmp_path, a_png="A", a_txt="one", sub__b_png="B", b_tar="")
    (tmp_path / "b.tar").unlink()
    fs = LinkedFileSystem()
    plain = super(LinkedFileSystem, fs)
    before = [(shard.name, shard.stamp) for shard in shards(tmp_path)]
    walked = dict(sorted((folder, (set(dirs), set(files))) for folder, dirs, files in fs.walk(str(tmp_path), detail=True)))
    assert walked == {folder: (set(dirs), set(files)) for folder, dirs, files in os.walk(tmp_path)}
    assert fs.info(str(tmp_path / "a.png")) == plain.info(str(tmp_path / "a.png"))
    link(tmp_path / "circle", ".")
    assert [(shard.name, shard.stamp) for shard in shards(tmp_path)] == before


def test_a_link_that_leads_nowhere_is_counted_where_a_picture_should_be(tmp_path):
    fill(tmp_path, a_png="A", a_txt="one", c_png="C")
    for name in ("b.jpg", "c.txt", "folder", "notes.md"):           # as git-annex leaves them where contents were not fetched
        link(tmp_path / name, ".git/annex/objects/none")
    assert found(tmp_path) == ["a.png=A", "b.jpg! picture file missing", "c.png! picture file missing"]
    (tmp_path / "only").mkdir()
    link(tmp_path / "only/folder", "nowhere")
    assert "holds 1 files, but no picture" in refusal(tmp_path / "only")
