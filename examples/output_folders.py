"""Output folders: what a script did not write itself is never overwritten."""

import argparse
import fnmatch
from collections.abc import Iterable
from pathlib import Path

from smolandfast.files_smolandfast import SUMS, check_file, read_checksums


def check_new_folder(folder: Path) -> None:
    """Raise `FileExistsError` for a file, or a folder that holds anything or is the working directory."""
    is_used = folder.is_dir() and (any(folder.iterdir()) or folder.resolve() == Path.cwd())
    if folder.is_file() or is_used:
        raise FileExistsError(f"{folder} exists and is not an empty folder, so it stays. Name another folder.")


def check_output_dir(folder: Path, names: Iterable[str], sealed: bool = False) -> None:
    """Refuse an output folder that holds anything but an earlier output of the same script.

    Args:
        folder: It may be missing or empty.
        names: What the script writes: patterns of [`fnmatch`] for paths below the folder. The first is a file that it
            always writes, and by which its output is known.
        sealed: Whether the script lists its files in `SHA256SUMS`. Files that are not listed, or were changed since,
            are then somebody else's.

    Raises:
        ValueError: The message names the first file that the script did not write.
    """
    names = list(names)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to write to. Name another one.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    found = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    foreign = [name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]
    if not foreign and not fnmatch.filter(found, names[0]):
        foreign = found or ["folders"]
    if not foreign and sealed:
        try:
            sums = read_checksums(folder / SUMS)
        except OSError:
            sums = {}
        foreign = [name for name in found if name != SUMS and not _is_as_written(folder / name, sums.get(name))]
    if foreign:
        raise ValueError(
            f"{folder} exists and holds {foreign[0]}, which this script did not write, or which has changed since. "
            "Name a new folder, or empty this one yourself."
        )


def make_output_dir(parser: argparse.ArgumentParser, folder: Path, names: list[str]) -> None:
    """Make the folder; stop with an error line if it holds anything but an earlier output of these names."""
    try:
        check_output_dir(folder, names)
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(f"--output_dir: {error}")
    except OSError as error:
        parser.error(f"--output_dir {folder} cannot be created ({error.strerror}). Name another one.")


def _is_as_written(path: Path, expected: str | None) -> bool:
    try:
        check_file(path, expected)
    except OSError:
        return False
    return True
