"""`Trainer` for runs that may be killed at any moment: they resume from the last complete checkpoint.

Transformers writes a checkpoint file by file into its folder, deletes older ones, and resumes from the folder with
the highest number, complete or not. Here `SHA256SUMS` is written last: a checkpoint is complete if that lists the
trainer's state and every listed file is unchanged. Only then are older checkpoints deleted.

`Trainer` also assumes that a model has logits at every position. Given labels, a policy has them only at
[`action_positions`]; label smoothing and the labels of `compute_metrics` are aligned with those here.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..files_smolandfast import SUMS, check_checksums, read_checksums, read_json, write_checksums
from ..modeling_smolandfast import ONE_PROCESS_PER_GPU, action_positions

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"  # missing in the SHA256SUMS that the policy's own `save_pretrained` writes
UNFINISHED = "_unfinished_checkpoint"  # marks what is being written; names with an underscore are not uploaded


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training's `output_dir`, sorted by their steps, complete or not."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint with the highest step whose files are all there and unchanged.

    Args:
        folder: `output_dir` of a training.

    Returns:
        Its folder; `None` where there is no checkpoint yet, or only one that a killed run had begun to write.

    Raises:
        OSError: There are checkpoints, but none is complete.
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
            logger.warning(f"{checkpoint} is not complete and is skipped: {error}")
    if all((folder / UNFINISHED / checkpoint.name).exists() for checkpoint in checkpoints):
        return None
    raise OSError(
        f"None of the {len(checkpoints)} checkpoints in {folder} is complete. Delete them to start again, or name one "
        "to resume from it unchecked (its SHA256SUMS deleted)."
    )


class CopyFilesToPush(TrainerCallback):
    """Copies code and checksums for `push_to_hub` during training: `Trainer` copies only weights from a checkpoint."""

    def on_push_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for path in checkpoint.glob("*.py"):
                shutil.copyfile(path, Path(args.output_dir, path.name))
            sums = checkpoint / SUMS
            if sums.exists() and STATE not in read_checksums(sums):  # else it lists what is not pushed
                shutil.copyfile(sums, Path(args.output_dir, SUMS))


class AtomicCheckpointTrainer(Trainer):
    """`Trainer` that can be killed at any moment, and resumed with `train(resume_from_checkpoint="last")`.

    A save that fails, on a full disk for example, is an `OSError`; earlier checkpoints stay unchanged. Checkpoints
    of an earlier training are never overwritten: `train` refuses an `output_dir` that has any, unless it resumes.

    For a policy, `remove_unused_columns` is False, since its data collator reads columns that the model does not, and
    `compute_metrics` gets the logits of the positions that an action token follows, `(N, positions, vocabulary)`, with
    the labels of the same positions, `(N, positions)`, -100 where a sample has none: compare
    `predictions.argmax(-1)` with `label_ids` without a shift.

    Raises:
        ValueError: An option that would train a policy with another loss than that of the next action token.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self._trains_policy():
            self.add_callback(CopyFilesToPush())
            self.args.remove_unused_columns = False
            self._check_policy_options()

    def _trains_policy(self) -> bool:
        # Not isinstance: under `trust_remote_code` the model may come from a copy of its module, and peft wraps it.
        return getattr(getattr(self.model, "config", None), "model_type", None) == "smolandfast"

    def _check_policy_options(self) -> None:
        args, smoothing = self.args, self.args.label_smoothing_factor
        if args.use_liger_kernel:
            raise ValueError("use_liger_kernel is True, but Liger has no kernels for this policy. Set it to False.")
        for name in ("cp_enabled", "sp_enabled"):
            if getattr(args.parallelism_config, name, False):
                fix = "A policy's loss needs whole sequences: set cp_size and sp_size to 1."
                raise ValueError(f"parallelism_config has {name}, which splits sequences between devices. {fix}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing_factor is {smoothing}, expected 0 or more, below 1.")
        if args.n_gpu > 1:  # Trainer would wrap the policy in nn.DataParallel
            raise ValueError(f"This process has {args.n_gpu} GPUs, expected one. {ONE_PROCESS_PER_GPU}")

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The policy's own loss; with `label_smoothing_factor`, the smoothed loss of the next action token.

        `Trainer` would smooth labels against logits that it does not shift. A `compute_loss_func` gets what `Trainer`
        promises: logits of all positions, and the labels unshifted.
        """
        if self.label_smoother is None or self.compute_loss_func is not None or not self._trains_policy():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def smoothed(**inputs):
            outputs, labels = model(**inputs), inputs["labels"]
            targets = labels[:, action_positions(labels) + 1].flatten().to(outputs["logits"].device)
            scores, epsilon = outputs["logits"].float().flatten(0, 1), self.args.label_smoothing_factor
            loss = cross_entropy(scores, targets, reduction="sum", label_smoothing=epsilon)
            count = inputs.get("num_items_in_batch")
            count = (targets != -100).sum() if count is None else count
            outputs["loss"] = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
            return outputs

        smoother, self.label_smoother = self.label_smoother, None
        try:
            # Trainer's method takes the loss of what it calls, and scales it for several processes.
            return super().compute_loss(smoothed, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """As in `Trainer`, with a policy's labels at the positions of its logits."""
        if not self._trains_policy():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        ignored = ["past_key_values"] if ignore_keys is None else ignore_keys
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        if outputs is None or labels is None:
            return loss, outputs, labels
        logits, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        if ignore_keys is None:
            others = []  # features of the images, which no metric needs
        labels = labels.to(logits.device)
        positions = action_positions(labels)
        if logits.shape[1] == labels.shape[1]:  # a `compute_loss_func` got the logits of all positions
            logits = logits[:, positions]
        return loss, (logits, *others) if others else logits, labels[:, positions + 1]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, from a checkpoint that has been checked.

        Args:
            resume_from_checkpoint: `"last"` or `True`: the last complete checkpoint, or the beginning where there is
                none yet. A folder: that one, checked where it has checksums.

        Raises:
            ValueError: `output_dir` holds checkpoints, and none of them is resumed from: saving and `save_total_limit`
                would delete them. Or the checkpoint was trained on other data, or with other options of its processor.
        """
        folder = Path(self.args.output_dir)
        if resume_from_checkpoint in ("last", True):
            resume_from_checkpoint = last_whole_checkpoint(folder)
        else:
            resumed = Path(resume_from_checkpoint).resolve() if resume_from_checkpoint else None
            if resumed and (resumed / SUMS).is_file():
                check_checksums(resumed)
            checkpoints = find_checkpoints(folder)
            if checkpoints and resumed not in [checkpoint.resolve() for checkpoint in checkpoints]:
                raise ValueError(
                    f"output_dir {folder} holds {checkpoints[-1].name} of an earlier training, which this one would "
                    'replace. Continue that training with resume_from_checkpoint="last", or name another output_dir.'
                )
        if resume_from_checkpoint:
            self._check_same_processor(Path(resume_from_checkpoint, "config.json"))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_same_processor(self, path: Path) -> None:
        """Refuse a checkpoint whose tokens or units differ in meaning from those of this training's samples."""
        expected = getattr(getattr(self.model, "config", None), "processor_fingerprint", None)
        fingerprint = read_json(path).get("processor_fingerprint") if path.is_file() else None
        if None not in (expected, fingerprint) and fingerprint != expected:
            raise ValueError(
                f"{path.parent} was trained with another processor: its processor_fingerprint is {fingerprint}, this "
                f"training's is {expected}. Resume with the same data and options as before, or start a new training "
                "in another folder (train.py: from these weights with --init_from)."
            )

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer would compare the number of steps only after one more.
        if self.state.global_step >= self.state.max_steps:
            logger.warning(
                f"The training is complete at step {self.state.global_step} of {self.state.max_steps}, so nothing is "
                "trained. Raise max_steps to train on."
            )
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        mark, limit = folder.parent / UNFINISHED, self.args.save_total_limit
        try:
            if self.args.should_save:
                (mark / folder.name).mkdir(parents=True, exist_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # of a killed run, or of one that was resumed earlier
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None  # Trainer would delete older checkpoints before this one is complete
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if self.args.should_save:
                names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
                write_checksums(folder, names - {SUMS})
                shutil.rmtree(mark, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(mark, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} cannot be saved in {folder.parent}: {error}. Make "
                "room there, or make it writable, and resume from the last checkpoint; earlier ones are unchanged."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            self._delete_old_checkpoints(folder, limit)

    def _delete_old_checkpoints(self, newest: Path, limit: int) -> None:
        checkpoints, best = find_checkpoints(newest.parent), Path(self.state.best_model_checkpoint or newest).name
        old = [path for path in checkpoints if path.name not in (newest.name, best)]
        old.sort(key=os.path.getmtime)  # those of an earlier run, which may have higher steps, come first
        for checkpoint in old[: max(0, len(checkpoints) - limit)]:
            shutil.rmtree(checkpoint, ignore_errors=True)
