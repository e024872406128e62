"""Files are written atomically, and output folders that hold anything else are refused."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from smolandfast import files_smolandfast
from smolandfast.files_smolandfast import SUMS, atomic_write, check_output_dir, read_json, write_checksums


def test_what_was_there_stays_until_all_of_the_new_is_written(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with atomic_write(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(OSError, match="disk is full"), atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another(tmp_path):
    folder = tmp_path / "checkpoint"
    for name in ("old", "new"):
        with atomic_write(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / name).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(ValueError, match="half"), atomic_write(folder) as unfinished:
        unfinished.mkdir()
        raise ValueError("half a checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_writers_of_one_process_do_not_meet(tmp_path, kind):
    both = Barrier(2)

    def write(letter):
        with atomic_write(tmp_path / "out") as unfinished:
            target = unfinished
            if kind == "folder":
                unfinished.mkdir()
                target = unfinished / "content"
            both.wait()
            target.write_text(letter * 10)
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        failures = [future.exception() for future in [pool.submit(write, letter) for letter in "ab"]]
    written = tmp_path / "out" if kind == "file" else tmp_path / "out/content"
    assert failures == [None, None] or kind == "folder"  # the later of two folders may find the other's name taken
    assert written.read_text() in ("a" * 10, "b" * 10) and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_stays_if_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()

    def refuse(*paths):
        raise OSError("no")

    monkeypatch.setattr(files_smolandfast.os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_write(tmp_path / "out") as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_whatever_interrupts_the_swap_the_old_folder_stays(tmp_path, monkeypatch, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()

    def interrupt(*paths):
        raise kind

    monkeypatch.setattr(files_smolandfast.os, "replace", interrupt)
    with pytest.raises(kind), atomic_write(tmp_path / "out") as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    monkeypatch.setattr(files_smolandfast.os, "rename", interrupt_after(os.rename))
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "out") as unfinished:
        unfinished.mkdir()  # the way back is blocked too: the old folder is kept where it is
    assert [path.name for path in tmp_path.rglob("old")] == ["old"]


def interrupt_after(rename):
    """A `rename` that works once."""
    calls = []

    def limited(*paths):
        calls.append(paths)
        if len(calls) > 1:
            raise KeyboardInterrupt
        rename(*paths)

    return limited


@pytest.mark.parametrize("name", ["my notes.txt", "a+b.png", ".hidden", "größe.txt", "deep/x (1).json"])
def test_checksums_cover_files_of_any_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("content")
    write_checksums(tmp_path, [name])
    assert list(files_smolandfast.read_checksums(tmp_path / SUMS)) == [name]
    files_smolandfast.check_checksums(tmp_path)
    (tmp_path / name).write_text("changed")
    with pytest.raises(OSError, match="is not what was saved"):
        files_smolandfast.check_checksums(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "deep/../../outside", ".."])
def test_checksums_of_files_outside_the_folder_are_refused(tmp_path, name):
    (tmp_path / SUMS).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(OSError, match="is damaged"):
        files_smolandfast.read_checksums(tmp_path / SUMS)


def test_what_is_written_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    order, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(files_smolandfast.os, "fsync", lambda file: (order.append("sync"), sync(file)))
    monkeypatch.setattr(files_smolandfast.os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "out") as unfinished:
        unfinished.write_text("content")
    assert order == ["sync", "replace", "sync"]


def test_a_link_and_a_relative_path_lead_to_the_folder_that_is_meant(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for path in (".", "..", tmp_path):
        with pytest.raises(ValueError, match="holds the working directory"), atomic_write(path):
            raise AssertionError
    monkeypatch.chdir(tmp_path)
    for path in ("link", "real", "new/deep"):
        with atomic_write(path) as unfinished:
            unfinished.mkdir()
            (unfinished / "content").write_text(path)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/content").exists()


OURS = ["policy.json", "code/*.py", "SHA256SUMS"]


def write_output(folder):
    (folder / "code").mkdir(parents=True)
    (folder / "policy.json").write_text("{}")
    (folder / "code/a.py").touch()
    write_checksums(folder, ["policy.json", "code/a.py"])


def test_an_output_folder_is_refused_unless_it_holds_only_what_the_script_wrote(tmp_path):
    folder = tmp_path / "out"
    check_output_dir(folder, OURS, sealed=True)  # missing
    folder.mkdir()
    check_output_dir(folder, OURS, sealed=True)  # empty
    folder.rmdir()
    write_output(folder)
    check_output_dir(folder, OURS, sealed=True)
    for name in ("notes.txt", "recordings/episode", ".hidden", "code/b.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        with pytest.raises(ValueError, match=f"out exists and holds {name}"):
            check_output_dir(folder, OURS, sealed=True)
        (folder / name).unlink()
    (folder / "code/b.py").touch()  # a name of ours, which no earlier output lists
    check_output_dir(folder, OURS)
    with pytest.raises(ValueError, match="holds code/b.py"):
        check_output_dir(folder, OURS, sealed=True)
    (folder / "code/b.py").unlink()
    (folder / "code/a.py").write_text("# my own change")
    with pytest.raises(ValueError, match="holds code/a.py"):
        check_output_dir(folder, OURS, sealed=True)
    (folder / "policy.json").unlink()
    with pytest.raises(ValueError, match="out exists and holds"):
        check_output_dir(folder, OURS)
    with pytest.raises(ValueError, match="a.py is a file, expected a folder"):
        check_output_dir(folder / "code/a.py", OURS)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"x"', "[" * 100_000])
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(ValueError, match="info.json (is not JSON|holds a .*, expected a JSON object)"):
        read_json(tmp_path / "info.json")
    with pytest.raises(OSError, match="missing.json cannot be read.*Save it again"):
        read_json(tmp_path / "missing.json", "Save it again.")
