"""`Trainer` for runs that may be killed at any moment: they resume from the last checkpoint that is whole.

Transformers writes a checkpoint file by file into its folder, deletes older ones, and resumes from the folder with
the highest number, half-written or not. Here `SHA256SUMS` comes last: a checkpoint is whole if that lists the
trainer's state and every file that it lists is as it was saved. Only then are older checkpoints deleted.

`Trainer` also assumes that a model has logits at every position. A policy that is given labels has them only at
[`action_positions`], so label smoothing and the labels of `compute_metrics` are aligned with those here.
"""

import os
import shutil
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..files_smolandfast import SUMS, check_checksums, read_checksums, read_json, write_checksums
from ..modeling_smolandfast import action_positions

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


class AtomicCheckpointTrainer(Trainer):
    """`Trainer` that can be killed at any moment, and resumed with `train(resume_from_checkpoint="last")`.

    A save that fails, on a full disk for example, is an `OSError`; earlier checkpoints stay as they are. Checkpoints
    of an earlier training are never overwritten: `train` refuses an `output_dir` that has any, unless it resumes.

    For a policy, `remove_unused_columns` is False, since its data collator reads columns that the model does not, and
    `compute_metrics` gets the logits of the positions that an action token follows, `(N, positions, vocabulary)`, with
    the labels of those same positions, `(N, positions)`, -100 where a sample has none. So `predictions.argmax(-1)` is
    compared with `label_ids` without a shift.

    Raises:
        ValueError: An option that would train a policy on another loss than that of the next action token.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sealer = CheckpointSealer()
        self.add_callback(self.sealer)
        if self._trains_policy():
            self.args.remove_unused_columns = False
            self._check_policy_options()

    def _trains_policy(self) -> bool:
        # Not isinstance: under `trust_remote_code` the model may come from a copy of its module, and peft wraps it.
        return getattr(getattr(self.model, "config", None), "model_type", None) == "smolandfast"

    def _check_policy_options(self) -> None:
        args, parallelism = self.args, self.args.parallelism_config
        if args.use_liger_kernel:
            raise ValueError("use_liger_kernel is True, but Liger has no kernels for this policy. Set it to False.")
        splits = [name for name in ("cp_enabled", "sp_enabled") if getattr(parallelism, name, False)]
        if splits:
            raise ValueError(
                f"parallelism_config has {splits[0]}, which splits sequences between devices; a policy's loss needs "
                "each sequence whole. Set cp_size and sp_size to 1."
            )
        if not 0 <= args.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}, expected 0 or more, below 1.")
        if args.label_smoothing_factor and args.n_gpu > 1:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor} with {args.n_gpu} GPUs in one process. "
                "Start one process for each GPU with `accelerate launch`, or set it to 0."
            )

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The policy's own loss, with `label_smoothing_factor` that of the next action token, smoothed.

        `Trainer` takes the labels away from the model to smooth them itself, with logits that it does not shift: each
        position would learn to repeat its own token. A `compute_loss_func` gets what `Trainer` promises: logits of all
        positions, and the labels unshifted.
        """
        if self.label_smoother is None or self.compute_loss_func is not None or not self._trains_policy():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def smoothed(**inputs):
            outputs, labels = model(**inputs), inputs["labels"]
            targets = labels[:, action_positions(labels) + 1].flatten().to(outputs["logits"].device)
            scores, epsilon = outputs["logits"].float().flatten(0, 1), self.args.label_smoothing_factor
            loss = cross_entropy(scores, targets, reduction="sum", label_smoothing=epsilon)
            count = inputs.get("num_items_in_batch")
            outputs["loss"] = loss / ((targets != -100).sum() if count is None else count)
            return outputs

        smoother, self.label_smoother = self.label_smoother, None
        try:
            # Trainer's method takes the loss of what it calls, and scales it for several processes.
            return super().compute_loss(smoothed, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """`Trainer`'s, with a policy's labels at the positions of its logits."""
        if not self._trains_policy():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        is_default = ignore_keys is None
        ignored = ["past_key_values"] if is_default else ignore_keys
        loss, outputs, found = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        labels = inputs.get("labels")
        if outputs is None or found is None or labels is None:
            return loss, outputs, found
        logits, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        if is_default:
            others = []  # features of the images, which no metric is made of
        labels = labels.to(logits.device)
        kept = action_positions(labels)
        if logits.shape[1] == labels.shape[1]:  # a `compute_loss_func` has had them all
            logits = logits[:, kept]
        return loss, (logits, *others) if others else logits, labels[:, kept + 1]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, from a checkpoint that has been checked.

        Args:
            resume_from_checkpoint: `"last"` or `True`: the last whole checkpoint, or the beginning where there is
                none yet. A folder: that one, checked where it has checksums.

        Raises:
            ValueError: `output_dir` holds checkpoints, and none of them is resumed from: saving and `save_total_limit`
                would delete them. Or the checkpoint was trained on other data, or with other options of its processor.
        """
        is_last, folder = resume_from_checkpoint in ("last", True), Path(self.args.output_dir)
        if is_last:
            resume_from_checkpoint = last_whole_checkpoint(folder)
        elif resume_from_checkpoint and (Path(resume_from_checkpoint) / SUMS).is_file():
            check_checksums(Path(resume_from_checkpoint))
        if not is_last:
            check_earlier_checkpoints(folder, resume_from_checkpoint)
        if resume_from_checkpoint:
            self._check_same_processor(Path(resume_from_checkpoint))
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

    def _check_same_processor(self, checkpoint: Path) -> None:
        """Refuse a checkpoint whose tokens or units mean something else than those of this training's samples."""
        expected = getattr(getattr(self.model, "config", None), "processor_fingerprint", None)
        if expected is None or not (checkpoint / "config.json").is_file():
            return
        found = read_json(checkpoint / "config.json").get("processor_fingerprint")
        if found is not None and found != expected:
            raise ValueError(
                f"{checkpoint} was trained with another processor: its processor_fingerprint is {found}, this "
                f"training's is {expected}. Resume with the same data and options as before, or start a new training "
                "from it: train.py has --init_from for that, with a new --output_dir."
            )

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer would look at the number of steps only after one more.
        if self.state.global_step >= self.state.max_steps:
            logger.warning(
                f"The training is complete at step {self.state.global_step} of {self.state.max_steps}, so nothing is "
                "trained. Raise max_steps to train on."
            )
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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


def check_earlier_checkpoints(folder: str | os.PathLike, resume_from_checkpoint: str | os.PathLike | None) -> None:
    """Refuse to train in a folder that holds checkpoints, unless one of them is resumed from.

    Raises:
        ValueError: The message names the newest of them.
    """
    checkpoints = find_checkpoints(Path(folder))
    resumed = Path(resume_from_checkpoint).resolve() if resume_from_checkpoint else None
    if checkpoints and resumed not in [checkpoint.resolve() for checkpoint in checkpoints]:
        raise ValueError(
            f"output_dir {folder} holds {checkpoints[-1].name} of an earlier training, which this one would replace. "
            'Continue that training with resume_from_checkpoint="last", or name another output_dir.'
        )
