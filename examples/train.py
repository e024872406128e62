"""Train a SmolAndFast policy on a benchmark's demonstrations with `Trainer`.

    python examples/train.py --preset tiny --dataset_root path/to/pusht --output_dir outputs/tiny
    python examples/train.py --preset 256M --output_dir outputs/256m      # lerobot/pusht from the hub
    python examples/train.py --benchmark metaworld --dataset_root outputs/metaworld --output_dir outputs/mt50

Every argument of `TrainingArguments` works too, or is refused by name: `--max_steps`, `--report_to`,
`--per_device_train_batch_size`, ... At each evaluation, the policy is played in the simulator; the checkpoint with the
highest success rate is saved in the output folder at the end. That folder has to be new or empty;
`--resume_from_checkpoint last` continues an earlier training in it.
"""

import math
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
from accelerate.utils import gather_object
from envs import get_benchmark
from evaluate import make_predict
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from model_card import CardFacts, write_card
from rollouts import RolloutResult, rollout
from torch.utils.data import DataLoader, Sampler
from train_arguments import PARTS, PolicyArguments, make_parser, one_line, parse_arguments
from train_data import GroupedByLength, VariedDemonstrations, choose_eval_tasks, read_demonstrations
from train_policy import make_policy
from training_runs import EpochSetter, interruption
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from smolandfast.training import (
    ActionDataCollator,
    AtomicCheckpointTrainer,
    find_checkpoints,
    make_muon,
    make_optimizer,
    parameter_groups,
)
from smolandfast.training.checkpoints import STATE, UNFINISHED

parse_args = partial(parse_arguments, description=__doc__)


class PolicyTrainer(AtomicCheckpointTrainer):
    """A `Trainer` whose evaluation also plays the policy in the simulator, which gives its score.

    `card_options` are arguments of [`model_card.CardFacts`], for the model card of `push_to_hub`; the other new
    arguments are those of [`rollouts.rollout`], and whether [`GroupedByLength`] makes the batches.
    """

    def __init__(self, *args, benchmark, eval_tasks, eval_seeds, card_options, batch_by_length=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.benchmark, self.eval_tasks, self.eval_seeds = benchmark, eval_tasks, eval_seeds
        self.card_options, self.batch_by_length = card_options, batch_by_length

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if not self.batch_by_length:
            return super()._get_train_sampler(train_dataset)
        # Without --data_seed, the data set's seed is that of the training.
        batch_size, seed = self._train_batch_size, self.args.data_seed
        return GroupedByLength(self.train_dataset, self.processing_class, batch_size, seed)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # of the training's batches
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # Each `generate()` would need all processes. (With an optimizer, as here, Trainer refuses both at the start.)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError("FSDP and ZeRO-3 split the weights, so no process can play the policy. Train with DDP.")
        metrics = super().evaluate(*args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model).eval()
        predict, steps = make_predict(policy, self.processing_class), policy.config.n_action_steps
        # Each process plays its share, so none waits longer for the others than that takes (`ddp_timeout`).
        rank, count, tasks, seeds = self.args.process_index, self.args.world_size, self.eval_tasks, self.eval_seeds
        tasks, seeds = (tasks[rank::count], seeds) if len(tasks) >= count else (tasks, seeds[rank::count])
        share = rollout(self.benchmark, predict, seeds, steps, tasks).episodes if len(seeds) else []
        episodes = gather_object(share)
        episodes.sort(key=lambda episode: (self.eval_tasks.index(episode.task), episode.seed))
        # The time of a chunk is not reported.
        played = RolloutResult(self.benchmark, episodes, num_chunks=1, predict_seconds=0.0).metrics()
        names = ("avg_max_reward", "avg_sum_reward", "pc_success", "mean_over_tasks", "mean_over_groups")
        scores = {f"eval_{name}": played[name] for name in names if played.get(name) is not None}
        # Ranks checkpoints of equal success, at most 1: the reward where it is comparable, or else the likelihood.
        tie = played.get("avg_max_reward", math.exp(-metrics["eval_loss"]))
        scores["eval_score"] = played["pc_success"] + tie
        self.log(scores)
        return metrics | scores

    def create_model_card(self, *args, **kwargs) -> None:
        if not self.is_world_process_zero():
            return
        folder, best = Path(self.args.output_dir), self.state.best_global_step
        has_trained = any("loss" in entry for entry in self.state.log_history)
        facts = CardFacts(
            trainer_state=asdict(self.state) if has_trained else None,
            kept_step=best if self.args.load_best_model_at_end and best else self.state.global_step,
            **self.card_options,
        )
        model, name = self.accelerator.unwrap_model(self.model), self.hub_model_id or folder.name
        write_card(folder, name, self.benchmark, model, self.processing_class, facts)

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)
        except (httpx.HTTPError, RuntimeError) as error:
            folder, repo_id, reason = self.args.output_dir, self.hub_model_id, error.__cause__ or error
            raise OSError(
                f"The policy is saved in {folder}, but the upload to {repo_id} failed: {reason} "
                f"Complete it with `hf upload {repo_id} {folder} --exclude 'checkpoint-*'`."
            ) from error


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step too, so that it can be the best where it is not a multiple of `eval_steps`."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


def check_output_folder(args: PolicyArguments, training: TrainingArguments) -> None:
    """Create the output folder, and refuse one with content that the training would replace."""
    folder, resumed = Path(training.output_dir), training.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file, expected a folder. Name another one.")
    if resumed not in (None, "last") and not Path(resumed, STATE).is_file():
        fix = "Name a checkpoint-* folder, or last."
        raise ValueError(f"--resume_from_checkpoint {resumed} is not a checkpoint: it has no {STATE}. {fix}")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    if not names or args.overwrite_output_dir:
        return
    checkpoints = [checkpoint.resolve() for checkpoint in find_checkpoints(folder)]
    policy = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    is_begun = not policy and {"runs", UNFINISHED} & set(names)  # by a run that was killed before its first checkpoint
    if resumed is None:
        reason = f"--output_dir {folder} holds {names[0]}: an earlier training may be in it."
    elif resumed != "last" and Path(resumed).resolve() not in checkpoints:
        reason = f"--resume_from_checkpoint {resumed} is not in --output_dir {folder}, which is not empty."
    elif not checkpoints and not is_begun:
        reason = f"--output_dir {folder} holds {(policy or names)[0]}, but no checkpoint to continue from."
    else:
        return
    raise ValueError(
        f"{reason} Name a new --output_dir, continue with --resume_from_checkpoint last, or give "
        "--overwrite_output_dir, which deletes the earlier checkpoints in it and replaces the policy."
    )


def make_trainer(args: PolicyArguments, training: TrainingArguments) -> PolicyTrainer:
    """Read, check and make everything that the training needs; bad input is a ValueError."""
    if training.process_index == 0:  # others would see what the first has begun to write
        check_output_folder(args, training)
    set_seed(training.seed)
    benchmark = get_benchmark(args.benchmark)
    train_set, eval_set = read_demonstrations(args, training, benchmark)
    eval_tasks = choose_eval_tasks(args, training, benchmark, train_set.tasks)
    samples = VariedDemonstrations(train_set, args, training.seed, benchmark)
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and len(samples) < batch:
        reason = f"but there are {len(samples)}, and incomplete batches are dropped"
        raise ValueError(f"--per_device_train_batch_size makes batches of {batch} samples, {reason}. Lower it.")
    model, processor = make_policy(train_set, args, benchmark)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {model.dtype}, bf16 autocast: {training.bf16}")
    is_on_hub = args.dataset_repo_id or not args.dataset_root
    on_hub = [args.dataset_repo_id or benchmark.repo_id] if is_on_hub else []
    base_model = args.vlm if args.preset == "256M" and not os.path.isdir(args.vlm) else None
    rates = {name: getattr(args, name) for name in PARTS} | {"weight_decay": training.weight_decay}
    is_tiny = args.preset == "tiny"
    optimizer = make_muon(model, parameter_groups(model, **rates)) if is_tiny else make_optimizer(model, **rates)
    return PolicyTrainer(
        model,
        training,
        data_collator=ActionDataCollator(processor),
        train_dataset=samples,
        eval_dataset=eval_set,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[EpochSetter(), EvaluateLastStep()],
        benchmark=benchmark,
        eval_tasks=eval_tasks,
        eval_seeds=range(args.eval_seed, args.eval_seed + args.eval_episodes),
        card_options={"datasets": on_hub, "base_model": base_model},
        batch_by_length=args.batch_by_length,
    )


def main(argv: list[str] | None = None) -> None:
    args, training = parse_args(argv)
    parser, folder = make_parser(), Path(training.output_dir)
    try:
        try:
            trainer = make_trainer(args, training)
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # of a library, for --report_to and others
            parser.error(one_line(error))
        if args.overwrite_output_dir and trainer.is_world_process_zero():
            for checkpoint in find_checkpoints(folder):
                print(f"--overwrite_output_dir: deleting {checkpoint}")
                checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
        trainer.accelerator.wait_for_everyone()
        try:
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
            trainer.save_model()
        except ValueError as error:
            parser.error(one_line(error))
        except OSError as error:
            parser.exit(1, f"train.py: error: {one_line(error)}\n")
        if trainer.is_world_process_zero():
            best = trainer.state.best_model_checkpoint
            print(f"Best checkpoint: {best}, saved in {folder}" if best else f"The last step is saved in {folder}")
    except KeyboardInterrupt:
        parser.exit(130, interruption(folder, "the same command with --resume_from_checkpoint last"))


if __name__ == "__main__":
    main()
