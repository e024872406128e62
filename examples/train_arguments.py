"""The arguments of `train.py`: what they are, which of them belong together, and the presets' values.

Each of `TrainingArguments` either does what Transformers documents or is refused by name.
"""

import argparse
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from envs import BENCHMARKS, Benchmark, get_benchmark
from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.optimization import get_scheduler

from smolandfast.training import bf16_is_faster

COMMON = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine_with_min_lr",
    "max_grad_norm": 1.0,
    "data_seed": 42,  # the order of the samples, whatever the number of processes
    "dataloader_pin_memory": False,
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

    preset: str = field(default="tiny", metadata={"choices": sorted(PRESETS), "help": "defaults for everything below"})
    benchmark: str = field(default="pusht", metadata={"choices": BENCHMARKS, "help": "what is learnt and played"})
    dataset_root: list[str] | None = field(
        default=None, metadata={"help": "folder of a local data set, or several to learn from together"}
    )
    dataset_repo_id: str | None = field(
        default=None,
        metadata={"help": "data set on the hub, for the card; without a root it is loaded (the benchmark's)"},
    )
    vlm: str = field(
        default="HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        metadata={"help": "SmolVLM checkpoint that the 256M preset starts from: hub id or folder"},
    )
    action_tokenizer: str | None = field(
        default=None,
        metadata={"help": "FAST tokenizer: hub id or folder, e.g. physical-intelligence/fast; none: fit one"},
    )
    fast_scale: float = field(default=10.0, metadata={"help": "scale of a fitted FAST tokenizer"})
    fast_vocab_size: int = field(default=1024, metadata={"help": "vocabulary of a fitted FAST tokenizer"})
    chunk_size: int = 10
    n_action_steps: int = 5
    scale_factor: int = field(default=1, metadata={"help": "side of the pixel shuffle"})
    use_relative_actions: bool = False
    freeze_vision_tower: bool = False
    freeze_connector: bool = False
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "train in an output folder that is not empty; deletes earlier checkpoint-* folders in it"},
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "folder of an earlier tiny policy to learn on from, with its FAST tokenizer and its statistics, "
            "which the weights were learnt with"
        },
    )
    refit: bool = field(
        default=False,
        metadata={"help": "with init_from: take statistics and FAST tokenizer from this data"},
    )
    vision_weights: str | None = field(
        default=None,
        metadata={"help": "vision.safetensors of pretrain_vision.py, for the tiny preset"},
    )
    vision_learning_rate: float = 2e-5
    connector_learning_rate: float = 2e-4
    text_learning_rate: float = 2e-4
    min_lr_rate: float = field(
        default=0.05, metadata={"help": "floor of the cosine_with_min_lr schedules, as a share of the peak"}
    )
    frame_stride: int = field(
        default=1, metadata={"help": "frames between a chunk's actions: 2 moves at twice the demonstrated speed"}
    )
    drop_n_last_frames: int = field(
        default=0, metadata={"help": "frames at each episode's end that no sample starts from: they teach to stop"}
    )
    sample_every: int = field(
        default=1, metadata={"help": "frames of an episode from one sample's to the next: see collect_metaworld.py"}
    )
    mirror_probability: float = field(
        default=0.0, metadata={"help": "share of samples that are mirrored about the target's axis"}
    )
    turn_probability: float = field(default=0.0, metadata={"help": "share of samples that are turned or mirrored"})
    max_shift: int = field(default=0, metadata={"help": "largest shift of image, state and actions, in image pixels"})
    max_angle: float = field(default=0.0, metadata={"help": "half of the samples are rotated by up to this, degrees"})
    reword_probability: float = field(
        default=0.0, metadata={"help": "share of samples told the task in the benchmark's other words"}
    )
    oversample: list[str] | None = field(
        default=None, metadata={"help": "groups of the benchmark's tasks whose samples come twice in an epoch"}
    )
    batch_by_length: bool = field(
        default=False,
        metadata={"help": "batches of samples of similar length, so that little is padded; drops a shorter last one"},
    )
    held_out_episodes: int = field(default=6, metadata={"help": "last demonstrations, for the evaluation loss"})
    eval_episodes: int = field(default=20, metadata={"help": "simulator episodes of each task at each evaluation"})
    eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "tasks to play; by default those whose sentences the data set has"}
    )
    eval_seed: int = field(default=100_000, metadata={"help": "first seed of those episodes"})


VARIATIONS = ("mirror_probability", "turn_probability", "max_shift", "max_angle")  # of the demonstrations
PARTS = ("vision_learning_rate", "connector_learning_rate", "text_learning_rate")
OWN_OPTIMIZER = (
    "this script makes its own optimizer, Muon with AdamW (tiny) or AdamW (256M). Drop it, and set "
    f"{', '.join('--' + name for name in PARTS)} or --weight_decay"
)
NO_LIGER = "Liger has no kernels for this policy. Drop it"
NO_SCRIPT = "this script always trains, and --eval_strategy says when it evaluates. Drop it"
BY_LENGTH = "this script groups samples by length with --batch_by_length. Use that"
# Options of `TrainingArguments` that would be ignored, or fail, and what to do instead.
REFUSED = {
    **dict.fromkeys(("learning_rate", "optim", "optim_args", "optim_target_modules"), OWN_OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), OWN_OPTIMIZER),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), NO_LIGER),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), NO_SCRIPT),
    "length_column_name": BY_LENGTH,
    "label_names": "the labels are the processor's action tokens. Drop it",
    "remove_unused_columns": "the data collator needs all columns. Drop it",
}
# Smallest and largest value of each number; None is no limit.
LIMITS = {
    **dict.fromkeys(("chunk_size", "n_action_steps", "scale_factor", "frame_stride", "sample_every"), (1, None)),
    **dict.fromkeys(("fast_vocab_size", "eval_episodes"), (1, None)),
    **dict.fromkeys(("drop_n_last_frames", "held_out_episodes", "eval_seed", "max_shift"), (0, None)),
    **dict.fromkeys(PARTS, (0, None)),
    **dict.fromkeys(("mirror_probability", "turn_probability", "reword_probability", "min_lr_rate"), (0, 1)),
    "max_angle": (0, 180),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, None)),
    "gradient_accumulation_steps": (1, None),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"), (0, None)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
}
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


def parse_arguments(argv: list[str] | None, description: str | None) -> tuple[PolicyArguments, TrainingArguments]:
    """Read the command line; whatever is wrong with it ends in an error line."""
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
    """The arguments that the command line itself has, by name, without any defaults."""
    parser, missing = make_parser(description), object()
    names = [field.name for arguments in (PolicyArguments, TrainingArguments) for field in fields(arguments)]
    parser.set_defaults(**dict.fromkeys(names, missing))
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not missing}


def check_json(given: dict[str, Any]) -> None:
    """Refuse what begins as a JSON object and is none; `TrainingArguments` would not say which option has it."""
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"--{name} is {value!r}, expected a JSON object: {error}.") from error


def check_together(args: PolicyArguments, training: TrainingArguments, given: dict[str, Any]) -> None:
    """Refuse numbers out of range, and options that would be ignored, by the names that they are given by."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args if hasattr(args, name) else training, name)
        if value is not None and not (
            value >= low and (value <= high if high is not None else value < math.inf)
        ):  # NaN fails, too
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"--{name} is {value}, expected {limits}.")
    if training.dataloader_persistent_workers and training.dataloader_num_workers == 0:
        raise ValueError(
            "--dataloader_persistent_workers has no effect here: give --dataloader_num_workers 1 or more."
        )
    for name, value in (("fast_scale", args.fast_scale), ("num_train_epochs", training.num_train_epochs)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}, expected a number above 0.")
    if training.max_steps < 1 and training.max_steps != -1:
        raise ValueError(
            f"--max_steps is {training.max_steps}, expected 1 or more, or -1 to train for --num_train_epochs."
        )
    if not 0 <= training.label_smoothing_factor < 1:
        raise ValueError(
            f"--label_smoothing_factor is {training.label_smoothing_factor}, expected 0 or more, below 1."
        )
    frozen = {"vision_learning_rate": args.freeze_vision_tower, "connector_learning_rate": args.freeze_connector}
    trained = [name for name in PARTS if not frozen.get(name)]
    if not any(getattr(args, name) for name in trained):
        raise ValueError(f"{', '.join('--' + name for name in trained)}: all are 0, so nothing is trained. Raise one.")
    if args.n_action_steps > args.chunk_size:
        raise ValueError(
            f"--n_action_steps is {args.n_action_steps}, but a chunk has --chunk_size {args.chunk_size} actions. "
            "Give at most that."
        )
    for name, reason in REFUSED.items():
        if name in given:
            raise ValueError(f"--{name} has no effect here: {reason}.")
    if training.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(f"--train_sampling_strategy is {training.train_sampling_strategy}: {BY_LENGTH}.")
    keeps_tokens = args.init_from is not None and not args.refit
    useless = {
        "refit": args.init_from is None and "there is no --init_from",
        "action_tokenizer": keeps_tokens and "--init_from keeps that of the earlier policy; see --refit",
        "train_sampling_strategy": args.batch_by_length and "--batch_by_length orders the samples",
        "vlm": args.preset == "tiny" and "the tiny preset starts from no SmolVLM",
        "init_from": args.preset != "tiny" and "it is for the tiny preset",
        "vision_weights": args.preset != "tiny" and "they are for the tiny preset",
        "overwrite_output_dir": training.resume_from_checkpoint is not None
        and "--resume_from_checkpoint continues what is there",
        **dict.fromkeys(
            ("fast_scale", "fast_vocab_size"),
            (keeps_tokens or args.action_tokenizer is not None) and "no FAST tokenizer is fitted",
        ),
    }
    for name, reason in useless.items():
        if reason and name in given:
            raise ValueError(f"--{name} has no effect here: {reason}. Drop one of them.")
    if args.held_out_episodes == 0 and needs_evaluation(training):
        raise ValueError("--held_out_episodes is 0, but there is an evaluation. Hold one out, or --eval_strategy no.")


def needs_evaluation(training: TrainingArguments) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start


def set_scheduler(args: PolicyArguments, training: TrainingArguments, given: dict[str, Any]) -> None:
    """Complete `lr_scheduler_kwargs`, and try them."""
    kind, options = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs or {}
    if not isinstance(options, dict):
        raise ValueError(
            f"--lr_scheduler_kwargs is {options!r}, expected a JSON object such as '{{\"min_lr_rate\": 0.1}}'."
        )
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
    elif kind == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in options:
        if training.max_steps < 0:
            raise ValueError(
                "--lr_scheduler_type warmup_stable_decay: give --lr_scheduler_kwargs its num_decay_steps."
            )
        options["num_decay_steps"] = max(1, training.max_steps // 10)
    peak = max(getattr(args, name) for name in PARTS)
    try:
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=peak), 1, 10, options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_kwargs {options} do not fit --lr_scheduler_type {kind.value}: {error}."
        ) from error
    training.lr_scheduler_kwargs = options


def check_metric(training: TrainingArguments, benchmark: Benchmark) -> None:
    """Refuse a `metric_for_best_model` that no evaluation has; `Trainer` would find out after the first."""
    names = ["score", "loss", "pc_success", "avg_sum_reward"]
    names += ["avg_max_reward"] if benchmark.max_reward is not None else []
    names += ["mean_over_tasks"] if len(benchmark.tasks) > 1 else []
    names += ["mean_over_groups"] if len(benchmark.tasks) > 1 and benchmark.groups else []
    metric = training.metric_for_best_model
    if needs_evaluation(training) and metric is not None and metric.removeprefix("eval_") not in names:
        raise ValueError(f"--metric_for_best_model is {metric}, expected one of {', '.join(names)}.")
