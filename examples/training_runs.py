"""What the training scripts share: data that change with the epoch, output folders, an end by Ctrl-C in one line."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from tqdm import tqdm

from smolandfast.files_smolandfast import SUMS, check_output_dir, read_checksums
from smolandfast.training import find_checkpoints
from smolandfast.training.checkpoints import STATE


class EpochDataset(torch.utils.data.Dataset):
    """A data set whose samples depend on the epoch, which [`pusht_scenes.EpochSetter`] sets.

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
    if not folder.is_dir() or any(path.is_file() for path in folder.rglob("*")):
        check_output_dir(folder, names)
    folder.mkdir(parents=True, exist_ok=True)


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
