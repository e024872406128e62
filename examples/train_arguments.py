"""The arguments of `train.py` with the presets' values, and which of them contradict each other.

Each argument of `TrainingArguments` either does what Transformers documents or is refused by name.
"""

import argparse
import json
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from envs import BENCHMARKS, Benchmark, get_benchmark
from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.optimization import get_scheduler

from smolandfast.training import bf16_is_faster

COMMON = {
    "eval_strategy": "steps",
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine_with_min_lr",
    "data_seed": 42,  # the order of the samples, whatever the number of processes
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "tensorboard",
    "metric_for_best_model": "eval_score",
    "load_best_model_at_end": True,
    "use_cpu": not torch.cuda.is_available(),
}
PRESETS = {
    "256M": COMMON
    | {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 16,
        "dataloader_num_workers": 4 if torch.cuda.is_available() else 0,  # they read, resize and normalise the images
        "max_steps": 30_000,
        "warmup_steps": 1_000,
        "eval_steps": 1_000,
        "save_steps": 1_000,
        "logging_steps": 10,
    },
    "tiny": COMMON
    | {
        "vision_learning_rate": 5e-4,
        "connector_learning_rate": 3e-4,
        "text_learning_rate": 1e-3,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 96,
        "per_device_eval_batch_size": 128,
        "warmup_steps": 200,
        "logging_steps": 50,
    },
}


@dataclass
class PolicyArguments:
    """What is trained, on what, and how it is evaluated."""

    preset: str = HfArg(default="tiny", help="sets the defaults below", metadata={"choices": sorted(PRESETS)})
    benchmark: str = HfArg(default="pusht", help="simulator of the evaluation", metadata={"choices": BENCHMARKS})
    dataset_root: list[str] | None = HfArg(default=None, help="folder of a data set, or several to train on together")
    dataset_repo_id: str | None = HfArg(
        default=None, help="data set on the Hub, for the card; loaded if there is no dataset_root (the benchmark's)"
    )
    vlm: str = HfArg(
        default="HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        help="SmolVLM checkpoint that the 256M preset starts from: Hub id or folder",
    )
    action_tokenizer: str | None = HfArg(
        default=None, help="FAST tokenizer: Hub id or folder, e.g. physical-intelligence/fast (fitted to the data)"
    )
    fast_scale: float = HfArg(default=10.0, help="scale of a fitted FAST tokenizer")
    fast_vocab_size: int = HfArg(default=1024, help="vocabulary of a fitted FAST tokenizer")
    chunk_size: int = 10
    n_action_steps: int = 5
    scale_factor: int = HfArg(default=1, help="side of the pixel shuffle")
    use_relative_actions: bool = False
    relative_exclude_joints: list[str] | None = HfArg(default=None, help="joints that stay absolute nevertheless")
    freeze_vision_tower: bool = False
    freeze_connector: bool = False
    overwrite_output_dir: bool = HfArg(
        default=False, help="train in an output folder that is not empty; deletes earlier checkpoint-* folders in it"
    )
    init_from: str | None = HfArg(
        default=None, help="folder of an earlier tiny policy to continue, with its FAST tokenizer and its statistics"
    )
    refit: bool = HfArg(default=False, help="with init_from: statistics and FAST tokenizer of this data")
    vision_weights: str | None = HfArg(default=None, help="vision.safetensors of pretrain_vision.py (tiny preset)")
    vision_learning_rate: float = 2e-5
    connector_learning_rate: float = 2e-4
    text_learning_rate: float = 2e-4
    min_lr_rate: float = HfArg(default=0.05, help="floor of cosine_with_min_lr schedules, as a share of the peak")
    frame_stride: int = HfArg(default=1, help="frames between a chunk's actions: 2 doubles the demonstrated speed")
    drop_n_last_frames: int = HfArg(default=0, help="last frames of an episode that no sample starts at")
    sample_every: int = HfArg(default=1, help="frames between the starts of samples: see collect.py")
    mirror_probability: float = HfArg(default=0.0, help="share of samples mirrored about the target's axis")
    turn_probability: float = HfArg(default=0.0, help="share of samples that are turned or mirrored")
    recolor_probability: float = HfArg(default=0.0, help="share of samples in which objects swap their colours")
    max_shift: int = HfArg(default=0, help="largest shift of image, state and actions, in image pixels")
    max_angle: float = HfArg(default=0.0, help="half of the samples are rotated by up to this, degrees")
    reword_probability: float = HfArg(default=0.0, help="share of samples whose instruction is reworded")
    oversample: list[str] | None = HfArg(default=None, help="groups of tasks whose samples come twice in an epoch")
    batch_by_length: bool = HfArg(
        default=False, help="batches of similar length, to pad less; drops a shorter last one"
    )
    held_out_episodes: int = HfArg(default=6, help="last demonstrations, for the evaluation loss")
    eval_episodes: int = HfArg(default=20, help="simulator episodes of each task at each evaluation")
    eval_tasks: list[str] | None = HfArg(default=None, help="tasks to play; by default those of the data set")
    eval_seed: int = HfArg(default=100_000, help="first seed of those episodes")


VARIED_SHARES = ("mirror_probability", "turn_probability", "recolor_probability")
VARIATIONS = (*VARIED_SHARES, "max_shift", "max_angle")  # of the demonstrations
PARTS = ("vision_learning_rate", "connector_learning_rate", "text_learning_rate")
OWN_OPTIMIZER = (
    "this script makes its own optimizer, Muon with AdamW (tiny) or AdamW (256M). Drop it, and set "
    f"{', '.join('--' + name for name in PARTS)} or --weight_decay"
)
NO_LIGER = "Liger has no kernels for this policy. Drop it"
NO_SCRIPT = "this script always trains, and evaluates as --eval_strategy says. Drop it"
# Options of `TrainingArguments` that would be ignored, or fail, and what to do instead.
REFUSED = {
    **dict.fromkeys(("learning_rate", "optim", "optim_args", "optim_target_modules"), OWN_OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), OWN_OPTIMIZER),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), NO_LIGER),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), NO_SCRIPT),
    "length_column_name": "this script groups samples by length with --batch_by_length. Use that",
    "label_names": "the labels are the processor's action tokens. Drop it",
    "remove_unused_columns": "the data collator needs all columns. Drop it",
}
COUNTS = ("chunk_size", "n_action_steps", "scale_factor", "frame_stride", "sample_every", "fast_vocab_size")
COUNTS += ("eval_episodes", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_NEGATIVE = ("drop_n_last_frames", "held_out_episodes", "eval_seed", "max_shift", *PARTS, "weight_decay")
NOT_NEGATIVE += ("max_grad_norm", "warmup_steps", "dataloader_num_workers")
# Which numbers are valid; NaN fails every comparison.
RANGES = [
    (COUNTS, lambda value: 1 <= value < math.inf, "1 or more"),
    (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
    (("fast_scale", "num_train_epochs"), lambda value: 0 < value < math.inf, "a number above 0"),
    (VARIED_SHARES, lambda value: 0 <= value <= 1, "0 to 1"),
    (("reword_probability", "min_lr_rate"), lambda value: 0 <= value <= 1, "0 to 1"),
    (("label_smoothing_factor",), lambda value: 0 <= value < 1, "0 or more, below 1"),
    (("max_angle",), lambda value: 0 <= value <= 180, "0 to 180"),
    (("seed", "data_seed"), lambda value: 0 <= value < 2**32, f"0 to {2**32 - 1}"),
    (("max_steps",), lambda value: value == -1 or value >= 1, "1 or more, or -1 to train for --num_train_epochs"),
]
MIN_LR = (SchedulerType.COSINE_WITH_MIN_LR, SchedulerType.COSINE_WARMUP_WITH_MIN_LR)
BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
WITHOUT_OPTIONS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


def make_parser(description: str | None = None) -> HfArgumentParser:
    usage = "%(prog)s --output_dir FOLDER [--dataset_root FOLDER ...] [options, see --help]"
    parser = HfArgumentParser(
        (PolicyArguments, TrainingArguments), prog="train.py", usage=usage, description=description
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def parse_arguments(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[PolicyArguments, TrainingArguments]:
    """Read the command line; every mistake in it ends in an error line."""
    parser = make_parser(description)
    given = find_given(argv, description)
    preset = PRESETS[given.get("preset", "tiny")]
    try:
        benchmark = get_benchmark(given.get("benchmark", "pusht"))
    except ValueError as error:
        parser.error(f"--benchmark: {error}")
    if given.get("preset", "tiny") == "tiny":
        preset = preset | benchmark.preset
    if "bf16" not in given:
        preset = preset | {"bf16": not given.get("fp16", False) and bf16_is_faster()}
    if "num_train_epochs" in given and "max_steps" not in given:
        preset = preset | {"max_steps": -1}  # the preset's steps would win over the epochs
    if given.get("batch_by_length"):
        preset = preset | {"dataloader_drop_last": True}
    if given.get("eval_strategy") == "no":
        preset = preset | {"load_best_model_at_end": False}  # no checkpoint is the best
    parser.set_defaults(**preset)
    try:
        check_json(given)
        args, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        check_together(args, training, given)
        set_scheduler(args, training, given)
        check_metric(training, benchmark)
    except (ValueError, OSError, ImportError, TypeError) as error:
        parser.error(one_line(error))
    return args, training


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def find_given(argv: list[str] | None, description: str | None) -> dict[str, Any]:
    """The arguments of the command line itself, by name, without any defaults."""
    parser, missing = make_parser(description), object()
    names = [field.name for arguments in (PolicyArguments, TrainingArguments) for field in fields(arguments)]
    parser.set_defaults(**dict.fromkeys(names, missing))
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not missing}


def check_json(given: dict[str, Any]) -> None:
    """Refuse invalid JSON by the option's name, which `TrainingArguments` does not mention."""
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"--{name} is {value!r}, expected a JSON object: {error}.") from error


def check_together(args: PolicyArguments, training: TrainingArguments, given: dict[str, Any]) -> None:
    """Refuse numbers out of range, and options that would be ignored, by their names on the command line."""
    values = vars(training) | vars(args)
    for names, is_valid, expected in RANGES:
        for name in names:
            if values[name] is not None and not is_valid(values[name]):
                raise ValueError(f"--{name} is {values[name]}, expected {expected}.")
    frozen = {"vision_learning_rate": args.freeze_vision_tower, "connector_learning_rate": args.freeze_connector}
    trained = [name for name in PARTS if not frozen.get(name)]
    if not any(values[name] for name in trained):
        raise ValueError(f"{', '.join('--' + name for name in trained)}: all are 0, so nothing is trained. Raise one.")
    if args.n_action_steps > args.chunk_size:
        limit = f"at most --chunk_size {args.chunk_size}, the actions in a chunk"
        raise ValueError(f"--n_action_steps is {args.n_action_steps}, expected {limit}.")
    for name, reason in REFUSED.items():
        if name in given:
            raise ValueError(f"--{name} has no effect here: {reason}.")
    keeps_tokens = args.init_from is not None and not args.refit
    is_fitted = not keeps_tokens and args.action_tokenizer is None
    by_length = args.batch_by_length or training.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    useless = {
        "relative_exclude_joints": not args.use_relative_actions and "actions are not relative",
        "refit": args.init_from is None and "there is no --init_from",
        "action_tokenizer": keeps_tokens and "--init_from keeps that of the earlier policy; see --refit",
        "fast_scale": not is_fitted and "no FAST tokenizer is fitted",
        "fast_vocab_size": not is_fitted and "no FAST tokenizer is fitted",
        "train_sampling_strategy": by_length and "--batch_by_length is the option that groups samples by length",
        "vlm": args.preset == "tiny" and "the tiny preset does not start from a SmolVLM",
        "init_from": args.preset != "tiny" and "it is for the tiny preset",
        "vision_weights": args.preset != "tiny" and "they are for the tiny preset",
        "overwrite_output_dir": training.resume_from_checkpoint is not None
        and "--resume_from_checkpoint continues the training in it",
        "dataloader_persistent_workers": training.dataloader_persistent_workers
        and training.dataloader_num_workers == 0
        and "--dataloader_num_workers is 0",
    }
    for name, reason in useless.items():
        if reason and name in given:
            raise ValueError(f"--{name} has no effect here: {reason}. Drop one of them.")
    if args.held_out_episodes == 0 and needs_evaluation(training):
        raise ValueError("--held_out_episodes is 0, but there is an evaluation. Hold one out, or --eval_strategy no.")


def needs_evaluation(training: TrainingArguments) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start


def set_scheduler(args: PolicyArguments, training: TrainingArguments, given: dict[str, Any]) -> None:
    """Complete `lr_scheduler_kwargs`, and try to make the scheduler."""
    kind, options = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs or {}
    if not isinstance(options, dict):
        example = '{"min_lr_rate": 0.1}'
        raise ValueError(f"--lr_scheduler_kwargs is {options!r}, expected a JSON object such as '{example}'.")
    options = dict(options)
    own_floor = {"min_lr", "min_lr_rate"} & set(options)
    if "min_lr_rate" in given and (kind not in MIN_LR or own_floor):
        reason = f"--lr_scheduler_kwargs has {min(own_floor)}" if own_floor else f"{kind.value} has no such floor"
        raise ValueError(f"--min_lr_rate has no effect here: {reason}. Drop one of them.")
    if options and kind in WITHOUT_OPTIONS:
        raise ValueError(f"--lr_scheduler_kwargs has no effect here: {kind.value} has no options. Drop it.")
    if kind in MIN_LR and not own_floor:
        options["min_lr_rate"] = args.min_lr_rate
    elif kind in BY_METRIC:
        options.setdefault("mode", "max" if training.greater_is_better else "min")
    elif kind == SchedulerType.WARMUP_STABLE_DECAY and training.max_steps > 0:
        options.setdefault("num_decay_steps", max(1, training.max_steps // 10))
    peak = max(getattr(args, name) for name in PARTS)
    try:
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=peak), 1, 10, options)
    except (TypeError, ValueError) as error:
        reason = f"do not fit --lr_scheduler_type {kind.value}: {error}."
        raise ValueError(f"--lr_scheduler_kwargs {options} {reason}") from error
    training.lr_scheduler_kwargs = options


def check_metric(training: TrainingArguments, benchmark: Benchmark) -> None:
    """Refuse a `metric_for_best_model` that no evaluation has; `Trainer` would find out after the first."""
    has_tasks = len(benchmark.tasks) > 1
    optional = {"avg_max_reward": benchmark.max_reward is not None, "mean_over_tasks": has_tasks}
    optional["mean_over_groups"] = has_tasks and bool(benchmark.groups)
    names = ["score", "loss", "pc_success", "avg_sum_reward", *(name for name in optional if optional[name])]
    metric = training.metric_for_best_model
    if needs_evaluation(training) and metric is not None and metric.removeprefix("eval_") not in names:
        raise ValueError(f"--metric_for_best_model is {metric}, expected one of {', '.join(names)}.")
