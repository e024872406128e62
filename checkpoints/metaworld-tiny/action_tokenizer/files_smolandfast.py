"""Files that are checked before use and written atomically.

Neither safetensors nor ONNX has a checksum, so a byte that flips on a disk or on the way would silently become another
weight: `SHA256SUMS` lies beside the files and lists theirs; `sha256sum --check SHA256SUMS` reads it too. Knows nothing
of what the files mean, and needs nothing but Python.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SUMS = "SHA256SUMS"
AGAIN = "Download or save the checkpoint again."


def read_json(path: Path, fix: str = AGAIN) -> dict:
    """The JSON object in a file. Raises `OSError` where it is missing, and `ValueError` where it is something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}. {fix}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. {fix}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object. {fix}")
    return content


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder, for a file or a folder; on success it replaces `path` atomically.

    If the block raises, `path` stays as it is. What it writes is on the disk before the name changes, so a power cut
    leaves a file's old content or the new. A folder that is replaced is renamed aside first and deleted last: a power
    cut between the two leaves both in a hidden folder `.name.*` next to it.

    Raises:
        OSError: `path` cannot be written.
        ValueError: It is a folder with the working directory in it, which would be gone.
    """
    path = Path(path).resolve()  # a link keeps pointing where it did
    if path.is_dir() and Path.cwd().is_relative_to(path):
        raise ValueError(f"{path} holds the working directory, so it cannot be replaced. Name a folder inside it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    unfinished, replaced = scratch / path.name, scratch / "replaced"
    try:
        yield unfinished
        for written in [unfinished, *unfinished.rglob("*")]:
            _sync(written)
        try:
            if path.is_dir():
                os.rename(path, replaced)
            os.replace(unfinished, path)
        except BaseException:  # an interrupt too
            if replaced.exists() and not path.exists():
                os.rename(replaced, path)
            raise
        _sync(path.parent)
    finally:
        if path.exists() or not replaced.exists():  # else `replaced` is the only copy
            shutil.rmtree(scratch, ignore_errors=True)


def check_output_dir(folder: str | os.PathLike, names: Iterable[str], sealed: bool = False) -> None:
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
    folder, names = Path(folder), list(names)
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
        foreign = [name for name in found if name != SUMS and _sha256(folder / name) != sums.get(name)]
    if foreign:
        raise ValueError(
            f"{folder} exists and holds {foreign[0]}, which this script did not write, or which has changed since. "
            "Name a new folder, or empty this one yourself."
        )


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write `SHA256SUMS` of these files into their folder."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    with atomic_write(folder / SUMS) as path:
        path.write_text("".join(lines), encoding="utf-8")


def read_checksums(path: Path) -> dict[str, str]:
    """What a `SHA256SUMS` says, by the files' names. Raises `OSError` where it is missing or damaged."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"{path} cannot be read: {error}. {AGAIN}") from error
    matches = [re.fullmatch(r"([0-9a-f]{64})  ((?:(?!\.\.?/)[^/]+/)*(?!\.\.?$)[^/]+)", line) for line in lines]
    if not matches or None in matches:
        raise OSError(f"{path} is damaged: expected lines of a SHA-256, two spaces and a file's name. {AGAIN}")
    return {match[2]: match[1] for match in matches}


def check_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare these files, by default all, with the folder's `SHA256SUMS`.

    Raises:
        OSError: The message names the first file that differs, or is not listed.
    """
    sums = read_checksums(folder / SUMS)
    for name in sums if names is None else names:
        check_file(folder / name, sums.get(name))


def check_file(path: Path, expected: str | None) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}. {AGAIN}") from error
    if found != expected:
        raise OSError(
            f"{path} is not what was saved: its SHA-256 is {found}, {SUMS} beside it says {expected or 'nothing'}. "
            f"{AGAIN} If it was changed on purpose, delete {SUMS}."
        )


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    with contextlib.suppress(PermissionError):  # Windows cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
