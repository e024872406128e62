"""The files of a checkpoint, found in a folder or on the Hub.

Weights load from safetensors alone, and are compared with `SHA256SUMS` beside them; folders without it, such as
SmolVLM's own, load unchecked.
"""

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from safetensors import SafetensorError, safe_open

from .files_smolandfast import AGAIN, SUMS, check_file, read_checksums, read_json

# Arguments of `from_pretrained` that say where on the Hub a file is, and how to get it.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
CONFIG_FILES = ("config.json", "processor_config.json", "tokenizer_config.json")  # every checkpoint has one of them


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
