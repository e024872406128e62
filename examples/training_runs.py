"""Shared by the training scripts: data that depend on the epoch, output folders, the message after Ctrl-C."""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import TrainerCallback

from smolandfast.files_smolandfast import SUMS, atomic_write, check_output_dir, read_checksums, read_json
from smolandfast.training import find_checkpoints
from smolandfast.training.checkpoints import STATE

OPTIONS = "options.json"  # of a pretraining, in its output folder


class EpochDataset(torch.utils.data.Dataset):
    """A data set whose samples depend on the epoch, which [`EpochSetter`] sets.

    The epoch is in shared memory, since persistent workers keep their copy of the data set.
    """

    def __init__(self):
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)


class EpochSetter(TrainerCallback):
    """Calls the training set's `set_epoch` at the start of each epoch.

    Random choices that depend on seed, epoch and index alone are the same in a resumed run, or on several processes.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch + 1e-6))  # a resumed run begins inside an epoch


@contextlib.contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Put the option's name before the message of an error that its value causes."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises `ValueError` where it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Name one that training or pretraining wrote.") from error


def make_own_folder(folder: str | Path, names: Sequence[str]) -> None:
    """Create an output folder, or accept one without files other than those of [`check_output_dir`]'s `names`."""
    folder = Path(folder)
    if not folder.is_dir() or any(path.is_file() for path in folder.rglob("*")):
        check_output_dir(folder, names)
    folder.mkdir(parents=True, exist_ok=True)


def keep_options(args: argparse.Namespace, free: Sequence[str]) -> None:
    """Write a pretraining's options to its output folder, or refuse others than the earlier run's, except `free`."""
    options = {name: value for name, value in vars(args).items() if name not in ("output_dir", *free)}
    path = Path(args.output_dir, OPTIONS)
    if not path.exists():
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        return
    earlier = read_json(path, "Name a new folder.")
    names = [name for name in sorted({*earlier, *options}) if earlier.get(name) != options.get(name)]
    if names:
        differing = ", ".join(f"--{name} {earlier.get(name)} (now {options.get(name)})" for name in names)
        fix = "Continue it with the same options, or name a new folder."
        raise ValueError(f"{args.output_dir} was begun with {differing}. {fix}")


def check_numbers(args: Any, **limits: tuple[float, float]) -> None:
    """Refuse numbers outside of their limits. `None` stands for a default."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # NaN fails, too
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"--{name} is {value}, expected {expected}.")


def check_learning_rate(args: Any) -> None:
    if not 0 < args.learning_rate < math.inf:
        raise ValueError(f"--learning_rate is {args.learning_rate}, expected a number above 0.")


def interruption(output_dir: str | Path, command: str, addition: str = "") -> str:
    """The line that says what an interrupted training keeps; `command` continues from a checkpoint."""
    for bar in list(tqdm._instances):
        bar.close()  # else it prints itself again, after the line
    line = f"Interrupted before the first checkpoint in {output_dir}, so no weights are kept: {command} starts again."
    for checkpoint in find_checkpoints(Path(output_dir)):
        with contextlib.suppress(OSError):
            if STATE in read_checksums(checkpoint / SUMS):  # else it was being written
                line = f"Interrupted. {checkpoint} is kept: {command} continues from there."
    return f"\n{line} {addition}".rstrip(" ") + "\n"
