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


@pytest.mark.parametrize("pattern, keys", [("**/*.tar", "0123456"), ("*/**/*.tar", "0123456"), ("*/*/*/*/*/*/*.tar", "0123456"),
                                           ("0/*/*.tar", "123456"), ("**/3/*.tar", "3"), ("*/**", "0123456")])
def test_folders_that_link_to_each_other_are_listed_once_for_each_part_of_a_pattern(tmp_path, monkeypatch, pattern, keys):
    """Between 7 folders there are 13,699 paths without a circle."""
    for i in range(7):
        fill(tmp_path / "set" / str(i), x_tar=pairs(str(i)))
        for other in {*range(7)} - {i}:
            link(tmp_path / "set" / str(i) / str(other), f"../{other}")
    names, ls = [], LinkedFileSystem.ls
    monkeypatch.setattr(LinkedFileSystem, "ls", lambda self, path, **kwargs: names.append(path) or ls(self, path, **kwargs))
    found = LinkedFileSystem().glob(str(tmp_path / "set" / pattern), detail=True)
    assert len(names) <= 8 * (pattern.count("/") + 2)
    tars = [name for name in found if name.endswith(".tar")]
    assert sorted(os.path.realpath(name) for name in tars) == [str(tmp_path / f"set/{key}/x.tar") for key in keys]


def test_a_pattern_reaches_a_folder_through_the_link_that_it_names_though_it_has_another_name_in_the_tree(tmp_path):
    fill(tmp_path, a__x_tar=pairs("x"), b__y_tar=pairs("y"))
    link(tmp_path / "b" / "c", "../a")
    link(tmp_path / "b" / "up", "..")
    for spec, expected in (("b*/**/*.tar", "xy"), ("**/c/*.tar", "x"), ("b/*/*.tar", "x"), ("b/**", "xy"), ("**/b/**/x.tar", "x"),
                           ("**/*.tar", "xy")):
        assert "".join(sorted(part.key for part in read(tmp_path / spec))) == expected, spec


@pytest.mark.parametrize("pattern", ["*", "*/*", "**", "**/*", "*/**", "a/**/*.tar", "**/a/**", "?/*.tar", "[ab]/*", "a/*", "no/*",
                                     "**/**/x*"])
def test_without_links_a_pattern_matches_what_fsspec_finds(tmp_path, pattern):
    fill(tmp_path, a__x_tar="", a__a__x_tar="", b__y_tar="", z_tar="", b__deep__er__x_tar="")
    fs, path = LinkedFileSystem(), str(tmp_path / pattern)
    assert sorted(fs.glob(path)) == sorted(super(LinkedFileSystem, fs).glob(path))


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
