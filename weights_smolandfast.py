"""The weight files of a checkpoint: safetensors alone, whole, and as they were saved.

Safetensors has no checksum, so a byte that flips on a disk or on the way would silently become another weight.
`SHA256SUMS` lies beside the weights and lists theirs; `sha256sum --check SHA256SUMS` reads it too. Folders without
it, such as SmolVLM's own, load unchecked.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .hub_smolandfast import find_file

SUMS = "SHA256SUMS"
AGAIN = "Download or save the checkpoint again."


def compute_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of these files of the folder."""
    return {name: _sha256(folder / name) for name in names}


def write_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Write `SHA256SUMS` into the folder, at once: another process sees all of it or none."""
    partial = folder / f"{SUMS}.partial"
    lines = [f"{checksum}  {name}\n" for name, checksum in sorted(checksums.items())]
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, folder / SUMS)


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
    """Compare every file that `SHA256SUMS` of the folder lists.

    Raises:
        OSError: there is no `SHA256SUMS`, or a file is missing or differs; the message names it.
    """
    for name, expected in read_checksums(folder / SUMS).items():
        _check_file(folder / name, expected)


def find_weights(name_or_path: str | os.PathLike, variant: str | None = None, **hub_kwargs) -> list[Path]:
    """The safetensors files that Transformers would load: one, or the shards that an index lists.

    They are compared with `SHA256SUMS` where the checkpoint has one.

    Args:
        name_or_path: Folder or hub id.
        hub_kwargs: Those of [`HUB_KWARGS`].

    Raises:
        OSError: no such files, one that is missing, or one that is not what was saved.
    """
    find = partial(find_file, name_or_path, **hub_kwargs)
    suffix = f".{variant}" if variant else ""
    names = [f"model{suffix}.safetensors"]
    if find(names[0]) is None:
        index = find(f"model.safetensors.index{suffix}.json")
        if index is None:
            raise OSError(
                f"{name_or_path} has no {names[0]}. Weights load from safetensors alone, since loading other formats "
                "(pytorch_model.bin) can run code. Convert them with save_pretrained of the model's own class, or "
                "name another checkpoint."
            )
        names = _read_shard_names(index)
    sums_file = find(SUMS)
    sums = None if sums_file is None else read_checksums(sums_file)
    files = []
    for name in names:
        file = find(name)
        if file is None:
            raise OSError(f"{name_or_path} lacks {name}, one of its {len(names)} weight files. {AGAIN}")
        if sums is not None:
            _check_file(file, sums.get(name))
        files.append(file)
    return files


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the headers alone.

    Raises:
        OSError: a file is damaged.
    """
    shapes = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} is damaged: {error}. {AGAIN}") from error
    return shapes


def _read_shard_names(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_bytes())
        names = set(content["weight_map"].values())
        is_index = isinstance(content["metadata"], dict) and all(_is_plain(name) for name in names) and names
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise OSError(f"{index} is damaged: {type(error).__name__}: {error}. {AGAIN}") from error
    if not is_index:
        raise OSError(f"{index} is damaged: expected metadata, and a weight_map from tensors to files. {AGAIN}")
    return sorted(names)


def _is_plain(name: object) -> bool:
    """Whether this names a safetensors file in the same folder."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name) is not None


def _check_file(path: Path, expected: str | None) -> None:
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
