"""One way to find a file of a checkpoint, in a folder or on the hub."""

import os
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx  # httpx2 since release 2.0

# Arguments of `from_pretrained` that say where on the hub a file is, and how to get it.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
CONFIG_FILES = ("config.json", "processor_config.json", "tokenizer_config.json")  # every checkpoint has one of them


def find_file(
    name_or_path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs
) -> Path | None:
    """Find a file of a checkpoint; from the hub it is downloaded, or taken from the cache.

    Args:
        name_or_path: Folder or hub id.
        subfolder, hub_kwargs: Those of [`HUB_KWARGS`], as in `from_pretrained`.

    Returns:
        Its path; `None` where the checkpoint has no such file.

    Raises:
        OSError: No such folder or repository, no right to read it, or a hub that cannot be reached.
    """
    name_or_path, subfolder = os.fspath(name_or_path), subfolder or ""
    if os.path.isdir(name_or_path):
        path = Path(name_or_path, subfolder, filename)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name_or_path, filename, subfolder=subfolder, **hub_kwargs))
    except LocalEntryNotFoundError as error:
        place = {name: hub_kwargs.get(name) for name in ("cache_dir", "revision")}
        if any(isinstance(try_to_load_from_cache(name_or_path, name, **place), str) for name in CONFIG_FILES):
            return None  # the checkpoint is in the cache, without this file
        raise OSError(
            f"{name_or_path} is not in the cache, and the hub cannot be reached: {error} Connect, or name a folder."
        ) from error
    except EntryNotFoundError:
        return None
    except httpx.HTTPError as error:  # no such repository, no right to read it, a connection that was cut
        raise OSError(f"{filename} of {name_or_path} cannot be had from the hub: {error}") from error
    except ValueError as error:  # not a name that the hub could have
        raise OSError(
            f"{name_or_path} is neither a folder nor a hub id: {error} Name the folder that save_pretrained wrote."
        ) from error
