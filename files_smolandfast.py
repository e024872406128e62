"""Files that are checked before use, and written whole or not at all.

Neither safetensors nor ONNX has a checksum, so a byte that flips on a disk or on the way would silently become another
weight: `SHA256SUMS` lies beside the files and lists theirs; `sha256sum --check SHA256SUMS` reads it too. Knows nothing
of what the files mean, and needs nothing but Python.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
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
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; what stands there takes `path`'s place in the end.

    Another process sees all of it or none. If the block raises, `path` stays as it is.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write `SHA256SUMS` of these files into their folder."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    with written_whole(folder / SUMS) as path:
        path.write_text("".join(lines), encoding="utf-8")


def read_checksums(path: Path) -> dict[str, str]:
    """What a `SHA256SUMS` says, by the files' names. Raises `OSError` where it is missing or damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"{path} cannot be read: {error}. {AGAIN}") from error
    matches = [re.fullmatch(r"([0-9a-f]{64})  ((?:\w[\w.-]*/)*\w[\w.-]*)", line) for line in lines]
    if not matches or None in matches:
        raise OSError(f"{path} is damaged: expected lines of a SHA-256, two spaces and a file's name. {AGAIN}")
    return {match[2]: match[1] for match in matches}


def check_checksums(folder: Path) -> None:
    """Compare every file that the folder's `SHA256SUMS` lists. Raises `OSError` that names the first that differs."""
    for name, expected in read_checksums(folder / SUMS).items():
        check_file(folder / name, expected)


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
