"""Files are written whole or not at all."""

import pytest

from smolandfast.files_smolandfast import read_json, written_whole


def test_what_was_there_stays_until_all_of_the_new_is_written(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(OSError, match="disk is full"), written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another(tmp_path):
    folder = tmp_path / "checkpoint"
    for name in ("old", "new"):
        with written_whole(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / name).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(ValueError, match="half"), written_whole(folder) as unfinished:
        unfinished.mkdir()
        raise ValueError("half a checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"x"', "[" * 100_000])
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(ValueError, match="info.json (is not JSON|holds a .*, expected a JSON object)"):
        read_json(tmp_path / "info.json")
    with pytest.raises(OSError, match="missing.json cannot be read.*Save it again"):
        read_json(tmp_path / "missing.json", "Save it again.")
