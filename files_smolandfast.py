"""Locating checkpoint files; checksums and atomic writes.

Neither safetensors nor ONNX has a checksum, so a flipped byte would silently change a weight: `SHA256SUMS` next to the
files lists theirs, and `sha256sum --check SHA256SUMS` reads it too. Folders without one, such as SmolVLM's, load
unchecked.
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
# Arguments of `from_pretrained` that locate a file on the Hub and say how to download it.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def read_json(path: Path, fix: str = AGAIN) -> dict:
    """The JSON object in a file. Raises `OSError` if it cannot be read, `ValueError` if it holds anything else."""
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

    If the block raises, `path` stays as it is. The content is on the disk before the name changes, so a power cut
    leaves a file's old content or the new. A replaced folder is renamed first and deleted last: a power cut in between
    leaves both in a hidden folder `.name.*` next to it.

    Raises:
        OSError: `path` cannot be written.
        ValueError: `path` is a folder that holds the working directory.
    """
    path = Path(path).resolve()  # writes to the target of a link
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
        except BaseException:  # also an interrupt
            if replaced.exists() and not path.exists():
                os.rename(replaced, path)
            raise
        _sync(path.parent)
    finally:
        if path.exists() or not replaced.exists():  # else `replaced` is the only copy
            shutil.rmtree(scratch, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raise `FileExistsError` for a file, or a folder that holds anything or is the working directory."""
    is_used = folder.is_dir() and (any(folder.iterdir()) or folder.resolve() == Path.cwd())
    if folder.is_file() or is_used:
        raise FileExistsError(f"{folder} exists and is not an empty folder, so it stays. Name another folder.")


def check_output_dir(folder: Path, names: Iterable[str], sealed: bool = False) -> None:
    """Refuse an output folder that holds anything but an earlier output of the same script.

    Args:
        folder: It may be missing or empty.
        names: Patterns of [`fnmatch`] for the paths that the script writes. It always writes the first.
        sealed: Whether the script lists its files in `SHA256SUMS`, so that other or changed files are not its own.

    Raises:
        ValueError: The message names the first file that the script did not write.
    """
    names = list(names)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to write to. Name another one.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    written = sorted(path.relative_to(folder).as_posix() for path in paths)
    foreign = [name for name in written if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]
    if not foreign and not fnmatch.filter(written, names[0]):
        foreign = written or ["folders"]
    if not foreign and sealed:
        sums = {}
        with contextlib.suppress(OSError):
            sums = read_checksums(folder / SUMS)
        foreign = [name for name in written if name != SUMS and not _is_unchanged(folder / name, sums.get(name))]
    if foreign:
        raise ValueError(
            f"{folder} exists and holds {foreign[0]}, which this script did not write, or which has changed since. "
            "Name a new folder, or empty this one yourself."
        )


def _is_unchanged(path: Path, expected: str | None) -> bool:
    with contextlib.suppress(OSError):
        check_file(path, expected)
        return True
    return False


def find_file(name_or_path: str | os.PathLike, filename: str, **hub_kwargs) -> Path | None:
    """The path of a file in a folder, in the cache or, after a download, from the Hub; `None` if there is none.

    `hub_kwargs` are those of [`HUB_KWARGS`]. Raises `OSError` if there is no such repository, no right to read it, or
    the download fails.
    """
    # Imported here, since deployed policies use this module without these libraries.
    from huggingface_hub.utils import httpx  # httpx2 since release 2.0
    from transformers.utils import cached_file

    try:
        path = cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    except httpx.HTTPError as error:
        raise OSError(f"{filename} of {name_or_path} cannot be downloaded from the Hub: {error}") from error
    except OSError as error:
        if isinstance(error.__cause__, ValueError):  # not a name that the Hub allows
            fix = "Name the folder that save_pretrained wrote."
            raise OSError(f"{name_or_path} is neither a folder nor a Hub id. {fix}") from error
        raise
    return None if path is None else Path(path)


def find_weights(name_or_path: str | os.PathLike, variant: str | None = None, **hub_kwargs) -> list[Path]:
    """The safetensors files that Transformers loads, one or the shards of an index, checked against `SHA256SUMS`.

    Raises:
        OSError: No such files, one that is missing, or one that is not what was saved.
        ValueError: A damaged index.
    """
    suffix = f".{variant}" if variant else ""
    names = [f"model{suffix}.safetensors"]
    if find_file(name_or_path, names[0], **hub_kwargs) is None:
        index = find_file(name_or_path, f"model.safetensors.index{suffix}.json", **hub_kwargs)
        if index is None:
            raise OSError(
                f"{name_or_path} has no {names[0]} (offline: none in the cache). Only safetensors files are loaded, "
                "since loading other formats (pytorch_model.bin) can run code. Convert them with save_pretrained of "
                "the model's own class, or name another checkpoint."
            )
        content = read_json(index)
        shards = content.get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        # Transformers would unpickle a shard with another suffix.
        are_safe = all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names)
        if not names or not are_safe or not isinstance(content.get("metadata"), dict):
            raise ValueError(
                f"{index} is damaged: expected metadata, and a weight_map from tensors to safetensors files. {AGAIN}"
            )
    sums_file = find_file(name_or_path, SUMS, **hub_kwargs)
    sums = None if sums_file is None else read_checksums(sums_file)
    files = []
    for name in names:
        file = find_file(name_or_path, name, **hub_kwargs)
        if file is None:
            raise OSError(f"{name_or_path} lacks {name}, one of its {len(names)} weight files. {AGAIN}")
        if sums is not None:
            check_file(file, sums.get(name))
        files.append(file)
    return files


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write `SHA256SUMS` of these files into their folder."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    with atomic_write(folder / SUMS) as path:
        path.write_text("".join(lines), encoding="utf-8")


def read_checksums(path: Path) -> dict[str, str]:
    """The checksums in a `SHA256SUMS`, by file name. Raises `OSError` if it is missing or damaged."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"{path} cannot be read: {error}. {AGAIN}") from error
    matches = [re.fullmatch(r"([0-9a-f]{64})  ((?:(?!\.\.?/)[^/]+/)*(?!\.\.?$)[^/]+)", line) for line in lines]
    if not matches or None in matches:
        raise OSError(f"{path} is damaged: expected lines of a SHA-256, two spaces and a file's name. {AGAIN}")
    return {match[2]: match[1] for match in matches}


def check_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare these files, by default all listed ones, with the folder's `SHA256SUMS`. Raises `OSError`."""
    sums = read_checksums(folder / SUMS)
    for name in sums if names is None else names:
        check_file(folder / name, sums.get(name))


def check_file(path: Path, expected: str | None) -> None:
    """Raise `OSError` unless the file has this SHA-256."""
    try:
        digest = _sha256(path)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}. {AGAIN}") from error
    if digest != expected:
        raise OSError(
            f"{path} is not what was saved: its SHA-256 is {digest}, {SUMS} next to it says {expected or 'nothing'}. "
            f"{AGAIN} If you changed it on purpose, delete {SUMS}."
        )


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
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
