"""The files of a checkpoint: found in a folder or on the Hub, checked before use, written atomically.

Neither safetensors nor ONNX has a checksum, so a byte that flips on a disk or on the way would silently become another
weight: `SHA256SUMS` lies beside the files and lists theirs; `sha256sum --check SHA256SUMS` reads it too. Weights load
from safetensors alone; folders without `SHA256SUMS`, such as SmolVLM's own, load unchecked.
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
from functools import partial
from pathlib import Path

SUMS = "SHA256SUMS"
AGAIN = "Download or save the checkpoint again."
# Arguments of `from_pretrained` that say where on the Hub a file is, and how to get it.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
CONFIG_FILES = ("config.json", "processor_config.json", "tokenizer_config.json")  # every checkpoint has one of them


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


def _is_as_written(path: Path, expected: str | None) -> bool:
    try:
        check_file(path, expected)
    except OSError:
        return False
    return True


def find_file(
    name_or_path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs
) -> Path | None:
    """Find a file of a checkpoint; from the Hub it is downloaded, or taken from the cache.

    Args:
        name_or_path: Folder or Hub id.
        subfolder, hub_kwargs: Those of [`HUB_KWARGS`], as in `from_pretrained`.

    Returns:
        Its path; `None` where the checkpoint has no such file.

    Raises:
        OSError: No such folder or repository, no right to read it, or a Hub that cannot be reached.
    """
    # Here, not above: deployed policies read their files with this module, without these libraries.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx  # httpx2 since release 2.0

    name_or_path, subfolder = os.fspath(name_or_path), subfolder or ""
    if os.path.isdir(name_or_path):
        path = Path(name_or_path, subfolder, filename)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name_or_path, filename, subfolder=subfolder, **hub_kwargs))
    except LocalEntryNotFoundError as error:
        place = {name: hub_kwargs.get(name) for name in ("cache_dir", "revision")}
        names = [f"{subfolder}/{name}" if subfolder else name for name in (filename, *CONFIG_FILES)]
        missing, *configs = (try_to_load_from_cache(name_or_path, name, **place) for name in names)
        # The cache remembers that the Hub has no such file, or holds a checkpoint without it.
        if missing is not None or any(isinstance(path, str) for path in configs):
            return None
        raise OSError(
            f"{name_or_path} is not in the cache, and the hub cannot be reached: {error} Connect, or name a folder."
        ) from error
    except EntryNotFoundError:
        return None
    except httpx.HTTPError as error:  # no such repository, no right to read it, a connection that was cut
        raise OSError(f"{filename} of {name_or_path} cannot be downloaded from the hub: {error}") from error
    except ValueError as error:  # not a name that the Hub could have
        raise OSError(
            f"{name_or_path} is neither a folder nor a hub id: {error} Name the folder that save_pretrained wrote."
        ) from error


def find_weights(name_or_path: str | os.PathLike, variant: str | None = None, **hub_kwargs) -> list[Path]:
    """The safetensors files that Transformers would load: one, or the shards that an index lists.

    They are compared with `SHA256SUMS` where the checkpoint has one.

    Args:
        name_or_path: Folder or Hub id.
        hub_kwargs: Those of [`HUB_KWARGS`].

    Raises:
        OSError: No such files, one that is missing, or one that is not what was saved.
        ValueError: A damaged index.
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
    files = {name: find(name) for name in names}
    for name, file in files.items():
        if file is None:
            raise OSError(f"{name_or_path} lacks {name}, one of its {len(names)} weight files. {AGAIN}")
        if sums is not None:
            check_file(file, sums.get(name))
    return list(files.values())


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the headers alone. Raises `OSError` where a file is damaged."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} is damaged: {error}. {AGAIN}") from error
    return shapes


def _read_shard_names(index: Path) -> list[str]:
    content = read_json(index)
    shards = content.get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    are_plain = all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names)  # files of the same folder
    if not names or not are_plain or not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} is damaged: expected metadata, and a weight_map from tensors to files. {AGAIN}")
    return sorted(names)


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
