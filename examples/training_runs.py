"""What the training scripts share: data that change with the epoch, output folders, an end by Ctrl-C in one line."""

import argparse
import contextlib
import fnmatch
import json
import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from smolandfast.files_smolandfast import SUMS, atomic_write, check_output_dir, read_checksums, read_json
from smolandfast.training import find_checkpoints
from smolandfast.training.checkpoints import STATE

OPTIONS = "options.json"  # what pretraining was begun with, in its output folder


class EpochDataset(torch.utils.data.Dataset):
    """A data set whose samples depend on the epoch, which [`EpochSetter`] sets.

    The number lies in shared memory: workers hold a copy of the data set, and with `dataloader_persistent_workers`
    they keep it from epoch to epoch.
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

    Its random choices can then depend on seed, epoch and index alone, so a resumed run, or one on several processes,
    sees the same samples as an uninterrupted one.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch + 1e-6))  # a resumed run begins inside an epoch


@contextlib.contextmanager
def process_pool(num_processes: int, context: BaseContext | None = None) -> Iterator[ProcessPoolExecutor]:
    """A `ProcessPoolExecutor` whose processes end at once, and silently, at Ctrl-C."""
    silent = (signal.signal, (signal.SIGINT, signal.SIG_DFL))
    with ProcessPoolExecutor(num_processes, context, *silent) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextlib.contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Put the option's name before the message of whatever its value leads to."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error


def make_own_folder(folder: str | Path, names: Sequence[str]) -> None:
    """Make an output folder that a script continues in, if it holds nothing but what the script wrote.

    Args:
        names: See [`check_output_dir`]. Empty folders, which a run that was killed may leave, are let through.

    Raises:
        ValueError: It holds something else.
    """
    folder = Path(folder)
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if not folder.is_dir() or any(not fnmatch.fnmatchcase(name, f".{OPTIONS}.*") for name in found):
        check_output_dir(folder, names)
    folder.mkdir(parents=True, exist_ok=True)


def keep_options(args: argparse.Namespace, free: Sequence[str]) -> None:
    """Write a pretraining's options to its output folder, or compare them with those that it was begun with.

    Args:
        free: Options that may change from run to run.

    Raises:
        ValueError: The message names all that differ.
    """
    options = {name: value for name, value in vars(args).items() if name not in ("output_dir", *free)}
    path = Path(args.output_dir, OPTIONS)
    if not path.exists():
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        return
    begun = read_json(path, "Name a new folder.")
    differing = [
        f"--{name} {begun.get(name)} (now {options.get(name)})"
        for name in sorted({*begun, *options})
        if begun.get(name) != options.get(name)
    ]
    if differing:
        raise ValueError(
            f"{args.output_dir} was begun with {', '.join(differing)}. Continue it with the same options, or name a "
            "new folder."
        )


def check_numbers(args: argparse.Namespace, **limits: tuple[float, float]) -> None:
    """Refuse numbers that are not from the smallest to the largest, and a `learning_rate` that is not above 0."""
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:  # NaN fails, too
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"--{name} is {getattr(args, name)}, expected {expected}.")
    if not 0 < args.learning_rate < math.inf:
        raise ValueError(f"--learning_rate is {args.learning_rate}, expected a number above 0.")


def interruption(output_dir: str | Path, advice: str) -> str:
    """The line that says what an interrupted training keeps; `advice` says how to continue.

    Progress bars are closed, which otherwise write themselves once more behind it.
    """
    for bar in list(tqdm._instances):
        bar.close()
    for checkpoint in reversed(find_checkpoints(Path(output_dir))):
        with contextlib.suppress(OSError):
            if STATE in read_checksums(checkpoint / SUMS):  # else it was being written
                return f"\nInterrupted. {checkpoint} is kept: {advice}\n"
    return f"\nInterrupted before the first checkpoint in {output_dir}, so no weights are kept.\n"
