"""`Trainer` for runs that may be killed at any moment: its checkpoints are whole or not there.

Transformers writes a checkpoint file by file into its final folder, and resumes from the folder with the highest
number, half-written or not. Here a checkpoint is written aside, with the checksum of each of its files, and renamed
when it is whole.
"""

import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from .weights_smolandfast import SUMS, check_checksums, compute_checksums, read_checksums, write_checksums

logger = logging.get_logger(__name__)

PARTIAL = "_partial_checkpoint"  # names with an underscore stay out of uploads to the hub


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint with the highest step whose files are all there and as they were saved.

    Args:
        folder: `output_dir` of a training.

    Returns:
        Its folder; `None` where there is no checkpoint at all.

    Raises:
        OSError: there are checkpoints, but none is whole.
    """
    folder = Path(folder)
    names = [path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = [int(match[1]) for name in names if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name))]
    for step in sorted(steps, reverse=True):
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            check_checksums(checkpoint)
            return str(checkpoint)
        except OSError as error:
            logger.warning(f"{checkpoint} is not whole and is passed over: {error}")
    if steps:
        raise OSError(
            f"None of the {len(steps)} checkpoints in {folder} is whole. Delete them to start anew, or name one to "
            "resume from it unchecked (its SHA256SUMS deleted)."
        )
    return None


class WholeCheckpointTrainer(Trainer):
    """`Trainer` that can be killed at any moment, and resumed with `train(resume_from_checkpoint="last")`.

    A save that fails, on a full disk for example, is an `OSError`; earlier checkpoints stay as they are.
    """

    _is_staging = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: `"last"` or `True`: the last whole checkpoint, or the beginning where there is
                none yet. A folder: that one, checked where it has checksums.
        """
        if resume_from_checkpoint in ("last", True):
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and (Path(resume_from_checkpoint) / SUMS).is_file():
            check_checksums(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, PARTIAL) if self._is_staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._is_staging:
            return  # after the renaming
        if self.args.should_save:  # the weights are copied into `output_dir` and go to the hub from there
            sums = read_checksums(Path(checkpoint_folder) / SUMS)
            weights = {name: checksum for name, checksum in sums.items() if name.endswith(".safetensors")}
            write_checksums(Path(self.args.output_dir), weights)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, final = run_dir / PARTIAL / name, run_dir / name
        try:
            if self.args.should_save:
                shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)  # what a killed run left
            self.accelerator.wait_for_everyone()
            self._is_staging = True
            super()._save_checkpoint(model, trial)
            self._is_staging = False
            self.accelerator.wait_for_everyone()  # each process has written its random state
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                files = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
                write_checksums(written, compute_checksums(written, [file for file in files if file != SUMS]))
                shutil.rmtree(final, ignore_errors=True)  # of a run that was resumed from an earlier step
                os.replace(written, final)
                (run_dir / PARTIAL).rmdir()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
            shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} cannot be saved in {run_dir}: {error}. Make room "
                "there, or make it writable, and resume from the last checkpoint; earlier ones are untouched."
            ) from error
        finally:
            self._is_staging = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
