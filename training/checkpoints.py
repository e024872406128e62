"""`Trainer` for runs that may be killed at any moment: they resume from the last checkpoint that is whole.

Transformers writes a checkpoint file by file into its folder, deletes older ones, and resumes from the folder with
the highest number, half-written or not. Here `SHA256SUMS` comes last: a checkpoint is whole if that lists the
trainer's state and every file that it lists is as it was saved. Only then are older checkpoints deleted.
"""

import os
import shutil
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..files_smolandfast import SUMS, check_checksums, read_checksums, write_checksums

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"  # missing in the SHA256SUMS that the policy's own `save_pretrained` writes
UNFINISHED = "_unfinished_checkpoint"  # marks what is being written; names with an underscore stay out of uploads


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint with the highest step whose files are all there and as they were saved.

    Args:
        folder: `output_dir` of a training.

    Returns:
        Its folder; `None` where there is no checkpoint yet, or only one that a killed run had begun to write.

    Raises:
        OSError: there are checkpoints, but none is whole.
    """
    folder = Path(folder)
    checkpoints = find_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        try:
            if STATE not in read_checksums(checkpoint / SUMS):
                raise OSError(f"its {SUMS} does not list {STATE}, so it was not finished.")
            check_checksums(checkpoint)
            return str(checkpoint)
        except OSError as error:
            logger.warning(f"{checkpoint} is not whole and is passed over: {error}")
    if all((folder / UNFINISHED / checkpoint.name).exists() for checkpoint in checkpoints):
        return None
    raise OSError(
        f"None of the {len(checkpoints)} checkpoints in {folder} is whole. Delete them to start anew, or name one to "
        "resume from it unchecked (its SHA256SUMS deleted)."
    )


class CheckpointSealer(TrainerCallback):
    """Writes `SHA256SUMS` once all processes have written their files, and then deletes the oldest checkpoints."""

    folder: Path | None = None  # the checkpoint that is being written
    save_total_limit: int | None = None

    def begin(self, folder: Path, args) -> None:
        """Clear what a killed run, or one that was resumed from an earlier step, left in the folder."""
        self.folder, self.save_total_limit = folder, args.save_total_limit
        if args.should_save:
            (folder.parent / UNFINISHED / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        PartialState().wait_for_everyone()

    def on_push_begin(self, args, state, control, **kwargs):
        if self.folder is not None and (self.folder / SUMS).is_file():  # the checkpoint's weights are what is pushed
            shutil.copyfile(self.folder / SUMS, Path(args.output_dir, SUMS))

    def on_save(self, args, state, control, **kwargs):
        folder = self.folder
        if folder is None:
            return
        args.save_total_limit = self.save_total_limit
        PartialState().wait_for_everyone()  # each process writes its own random state
        if args.should_save:
            names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            write_checksums(folder, names - {SUMS})
            shutil.rmtree(folder.parent / UNFINISHED, ignore_errors=True)
            if self.save_total_limit:
                checkpoints, best = find_checkpoints(folder.parent), Path(state.best_model_checkpoint or folder).name
                old = [path for path in checkpoints if path.name not in (folder.name, best)]
                old.sort(key=os.path.getmtime)  # those of an earlier run, which may have higher steps, go first
                for checkpoint in old[: max(0, len(checkpoints) - self.save_total_limit)]:
                    shutil.rmtree(checkpoint, ignore_errors=True)
        self.folder = None

    on_train_end = on_save  # `enable_jit_checkpoint` saves without an `on_save`


class WholeCheckpointTrainer(Trainer):
    """`Trainer` that can be killed at any moment, and resumed with `train(resume_from_checkpoint="last")`.

    A save that fails, on a full disk for example, is an `OSError`; earlier checkpoints stay as they are.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sealer = CheckpointSealer()
        self.add_callback(self.sealer)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, from a checkpoint that has been checked.

        Args:
            resume_from_checkpoint: `"last"` or `True`: the last whole checkpoint, or the beginning where there is
                none yet. A folder: that one, checked where it has checksums.
        """
        if resume_from_checkpoint in ("last", True):
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and (Path(resume_from_checkpoint) / SUMS).is_file():
            check_checksums(Path(resume_from_checkpoint))
        limit, self.sealer.folder = self.args.save_total_limit, None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
            folder = self.sealer.folder
            if folder is None:
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(folder.parent / UNFINISHED, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} cannot be saved in {folder.parent}: {error}. Make "
                "room there, or make it writable, and resume from the last checkpoint; earlier ones are untouched."
            ) from error
        finally:
            self.args.save_total_limit = limit

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        is_checkpoint = self.is_in_train and Path(output_dir or "").name == f"checkpoint-{self.state.global_step}"
        if is_checkpoint:
            self.sealer.begin(Path(output_dir), self.args)
        super().save_model(output_dir, *args, **kwargs)
        if is_checkpoint:
            self.args.save_total_limit = None  # else older checkpoints would be deleted before this one is whole


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training's `output_dir`, by their steps, whole or not."""
    found = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path in found if found[path].isdecimal()), key=lambda path: int(found[path]))
