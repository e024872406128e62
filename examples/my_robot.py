"""Train a policy on your own recordings, see how well it predicts held-out episodes, and get it ready for the arm.

    python examples/my_robot.py --dataset you/your-data --check_only
    python examples/my_robot.py --dataset you/your-data --preset tiny --output_dir outputs/mine

The data set is a LeRobot v3.0 one, a folder or a Hub id. `tiny` trains on a CPU from random weights, `256M` starts
from SmolVLM2 and needs a GPU. docs/your_robot.md explains the report. Needs `pip install -e ".[robot]"`.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import interrupt  # noqa: F401 - before the slow imports
import matplotlib
import numpy as np
import torch
from training_runs import check_numbers, interruption, keep_options, naming_option
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from smolandfast import (
    FastActionTokenizer,
    SmolAndFastForActionPrediction,
    SmolAndFastProcessor,
    match_joints,
)
from smolandfast.files_smolandfast import atomic_write
from smolandfast.tokenization_fast_action import MAX_FITTED_CHUNKS
from smolandfast.training import (
    DIFFERENCES,
    TARGETS,
    ActionDataCollator,
    AtomicCheckpointTrainer,
    LeRobotChunkDataset,
    bf16_is_faster,
    download_dataset,
    evenly_spaced,
    fit_normalizer,
    inspect_dataset,
    make_muon,
    make_optimizer,
    make_tiny_model,
    make_tiny_processor,
    parameter_groups,
)
from smolandfast.training.frames import MAX_CACHED_BYTES

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a backend without a screen

CHUNK_SECONDS = 0.64
NUM_COMPARED, NUM_PLOTTED = 256, 3  # held-out chunks that are predicted, and episodes that are plotted
TINY_IMAGES = ((128, 4), (96, 3), (64, 2))  # image_size and scale_factor: 4 visual tokens an image
COUNTS = ("held_out_episodes", "chunk_size", "n_action_steps", "image_size", "scale_factor", "max_steps", "batch_size")
COUNTS += ("gradient_accumulation_steps", "save_steps")
FREE = ("resume", "check_only", "max_steps", "save_steps", "num_workers")  # may change when a training is resumed
RATES = {
    "tiny": {"vision_learning_rate": 5e-4, "connector_learning_rate": 3e-4, "text_learning_rate": 1e-3},
    "256M": {"vision_learning_rate": 2e-5, "connector_learning_rate": 2e-4, "text_learning_rate": 2e-4},
}


@dataclass
class Arguments:
    dataset: str = HfArg(help="LeRobot v3.0 data set: a folder or a Hub id")
    preset: str = HfArg(default="tiny", help="model size", metadata={"choices": ["tiny", "256M"]})
    output_dir: str = HfArg(default="outputs/mine", help="folder of the policy")
    check_only: bool = HfArg(default=False, help="look at the data and stop")
    vlm: str = HfArg(
        default="HuggingFaceTB/SmolVLM2-256M-Video-Instruct", help="where 256M starts from: Hub id or folder"
    )
    exclude_episodes: list[int] | None = HfArg(default=None, help="indices of episodes that are not used at all")
    held_out_episodes: int | None = HfArg(default=None, help="not trained on, but compared with (a tenth, at least 3)")
    chunk_size: int | None = HfArg(default=None, help="actions predicted at once (0.64 seconds)")
    n_action_steps: int | None = HfArg(default=None, help="actions executed of them (half)")
    normalization: str = HfArg(default="min_max", help="or quantiles", metadata={"choices": ["min_max", "quantiles"]})
    use_relative_actions: bool | None = HfArg(default=None, help="relative to the state (if they are its targets)")
    relative_exclude_joints: list[str] | None = HfArg(default=None, help="joints that stay absolute (gripper)")
    fast_scale: float | None = HfArg(default=None, help="scale of the FAST tokenizer (as the check recommends)")
    image_size: int | None = HfArg(default=None, help="side of the policy's images, pixels (tiny: 128, 256M: 512)")
    scale_factor: int | None = HfArg(default=None, help="side of the pixel shuffle (tiny: 4, 256M: 4)")
    resize_with_pad: bool = HfArg(default=False, help="keep the aspect ratio of the images, between black bars")
    max_steps: int | None = HfArg(default=None, help="optimizer steps (tiny: 20 epochs, at most 4000; 256M: 20000)")
    batch_size: int | None = HfArg(default=None, help="samples a step and process (tiny: 64, 256M: 16)")
    gradient_accumulation_steps: int = HfArg(default=1, help="batches a step")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower")
    num_workers: int | None = HfArg(default=None, help="processes that read images (tiny: 1, 256M: 4)")
    save_steps: int | None = HfArg(default=None, help="steps from one checkpoint to the next (a tenth of all)")
    resume: bool = HfArg(default=False, help="continue from the last checkpoint in output_dir, with the same options")
    seed: int = 0


def read_data(args: Arguments) -> LeRobotChunkDataset:
    """All episodes, without a cache: for their numbers."""
    root = Path(args.dataset).expanduser()
    if not root.is_dir():
        if root.is_absolute() or args.dataset.count("/") != 1 or args.dataset.startswith("."):
            raise ValueError(
                f"--dataset is {args.dataset}, expected an existing folder, or a Hub id like you/your-data."
            )
        root = download_dataset(args.dataset)
    excluded = set(args.exclude_episodes or ())
    first = next(e for e in range(len(excluded) + 1) if e not in excluded)
    one = LeRobotChunkDataset(root, 1, [first], cache_dir=False)
    args.chunk_size = args.chunk_size or max(2, round(CHUNK_SECONDS * one.fps))
    args.n_action_steps = args.n_action_steps or max(1, args.chunk_size // 2)
    numbers = range(one.info["total_episodes"])
    if not excluded <= set(numbers):
        raise ValueError(f"--exclude_episodes is {args.exclude_episodes}, expected some of 0 to {numbers[-1]}.")
    episodes = [e for e in numbers if e not in excluded]
    return LeRobotChunkDataset(root, args.chunk_size, episodes, cache_dir=False)


def split(args: Arguments, whole: LeRobotChunkDataset) -> list[LeRobotChunkDataset]:
    """The episodes for training, and the held-out ones, some of each task."""
    starts = whole.episode_starts.tolist()
    by_task = sorted(starts, key=whole.text)
    count, held = len(starts), args.held_out_episodes
    if held is None:
        held = max(min(3, count // 4), count // 10, 1)
    if not held < count:
        raise ValueError(f"--held_out_episodes is {held} of {count}, expected fewer. Record at least two episodes.")
    held_out = {by_task[int(i)] for i in (np.arange(held) + 0.5) * count / held}
    parts = ([i for i in starts if (i in held_out) == is_held_out] for is_held_out in (False, True))
    return [LeRobotChunkDataset(whole.root, args.chunk_size, whole.episode_index[part]) for part in parts]


def choose_options(args: Arguments, whole: LeRobotChunkDataset) -> None:
    """Choose by preset and data what was not given."""
    report = inspect_dataset(
        whole, args.normalization, args.use_relative_actions, args.relative_exclude_joints, args.fast_scale
    )
    print(report)
    args.use_relative_actions, args.fast_scale = report.use_relative_actions, report.fast_scale
    args.relative_exclude_joints, args.action_kind = report.relative_exclude_joints, report.action_kind
    is_tiny, side = args.preset == "tiny", min(min(size) for size in whole.image_sizes.values())
    if is_tiny and args.image_size is None and args.scale_factor is None:
        # The largest that is not larger than the recording, and that the reader keeps in its cache.
        fits = [x for x in TINY_IMAGES if x[0] <= side and len(whole.image_keys) * 3 * x[0] ** 2 <= MAX_CACHED_BYTES]
        args.image_size, args.scale_factor = (fits or TINY_IMAGES[-1:])[0]
    args.scale_factor = args.scale_factor or 4
    args.image_size = args.image_size or (128 if is_tiny else None)
    args.batch_size = args.batch_size or (64 if is_tiny else 16)
    args.num_workers = (1 if is_tiny else 4) if args.num_workers is None else args.num_workers
    args.max_steps = args.max_steps or (min(4_000, 20 * -(-len(whole) // args.batch_size)) if is_tiny else 20_000)
    args.save_steps = args.save_steps or max(1, args.max_steps // 10)
    batch = args.batch_size * args.gradient_accumulation_steps
    print(f"Training: {args.max_steps} steps of {batch} frames, {args.max_steps * batch / len(whole):.1f} epochs.")


def make_policy(
    args: Arguments, data: LeRobotChunkDataset
) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """Fit the FAST tokenizer, and make processor and model for this robot."""
    names = ("normalization", "use_relative_actions", "relative_exclude_joints")
    options = {name: getattr(args, name) for name in names}
    statistics, normalizer, chunks = fit_normalizer(data, **options)
    tokenizer = FastActionTokenizer.fit(chunks, args.fast_scale, action_scale=normalizer.action_scale)
    options |= {name: getattr(data, name) for name in ("image_keys", "fps", "state_names", "action_names")}
    options |= {name: getattr(args, name) for name in ("resize_with_pad", "image_size", "scale_factor")}
    default_task = data.tasks[0] if len(data.tasks) == 1 else ""
    if args.preset == "tiny":
        options["split_words"] = len(data.tasks) > 1  # instructions that share words share tokens
        processor = make_tiny_processor(tokenizer, statistics, default_task, data.tasks, **options)
        # On a CPU, eager attention trains short sequences faster than the fused kernel.
        attention = "sdpa" if torch.cuda.is_available() else "eager"
        return make_tiny_model(processor, args.n_action_steps, attn_implementation=attention), processor
    options |= {"default_task": default_task, "training_tasks": data.tasks}
    processor = SmolAndFastProcessor.from_vlm(args.vlm, tokenizer, statistics, **options)
    options = {**processor.model_kwargs(), "n_action_steps": args.n_action_steps}
    return SmolAndFastForActionPrediction.from_pretrained(args.vlm, **options, dtype=torch.float32), processor


def make_trainer(args: Arguments, whole: LeRobotChunkDataset) -> AtomicCheckpointTrainer:
    set_seed(args.seed)
    model, processor = make_policy(args, whole)  # the limits of its actions are those of all episodes
    train, held_out = split(args, whole)
    for data in (train, held_out):
        data.resize_images(processor.image_resizer)  # where they are read, in the workers
    has_gpu = torch.cuda.is_available()
    training = TrainingArguments(
        args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        **({"gradient_checkpointing": True} if args.gradient_checkpointing else {}),
        warmup_steps=min(200, args.max_steps // 10),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        bf16=bf16_is_faster(),
        use_cpu=not has_gpu,
        dataloader_num_workers=args.num_workers,
        dataloader_persistent_workers=args.num_workers > 0,
        dataloader_pin_memory=has_gpu,
        eval_strategy="steps",  # the loss on held-out chunks; the last weights are kept, whatever it is
        eval_steps=args.save_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        logging_steps=20,
        report_to="tensorboard",
        seed=args.seed,
    )
    rates = RATES[args.preset]
    if args.preset == "tiny":
        optimizer = make_muon(model, parameter_groups(model, **rates, weight_decay=0.1))
    else:
        optimizer = make_optimizer(model, **rates)
    return AtomicCheckpointTrainer(
        model,
        training,
        data_collator=ActionDataCollator(processor),
        train_dataset=train,
        eval_dataset=torch.utils.data.Subset(held_out, evenly_spaced(len(held_out), NUM_COMPARED).tolist()),
        processing_class=processor,
        optimizers=(optimizer, None),
    )


def predict(
    model: SmolAndFastForActionPrediction, processor: SmolAndFastProcessor, data: LeRobotChunkDataset, rows: np.ndarray
) -> np.ndarray:
    """The policy's chunks at these frames: `(n, chunk_size, action_dim)`, in the robot's units."""
    chunks = []
    for start in range(0, len(rows), 32):
        samples = [data[int(i)] for i in rows[start : start + 32]]
        inputs = processor(**{name: [sample[name] for sample in samples] for name in ("images", "text", "state")})
        chunks.append(processor.post_process_actions(model.generate(**inputs.to(model.device))))
    return np.concatenate(chunks)


def baselines(
    args: Arguments, processor: SmolAndFastProcessor, train: LeRobotChunkDataset, states: np.ndarray
) -> dict[str, np.ndarray]:
    """Chunks that need no policy: to hold still, and the mean of all demonstrated chunks."""
    normalizer, rows = processor.normalizer, evenly_spaced(len(train), MAX_FITTED_CHUNKS)
    chunks = normalizer.normalize_actions(train.action_chunks(rows), normalizer.state_bins(train.states[rows]))
    mean = np.repeat(chunks.mean(axis=0, keepdims=True), len(states), axis=0)
    mean = normalizer.unnormalize_actions(mean, normalizer.state_bins(states))
    if args.action_kind == TARGETS:
        dims = match_joints(train.state_names, train.action_names) or list(range(train.action_dim))
        return {"hold still": np.broadcast_to(states[:, None, dims], mean.shape), "mean chunk": mean}
    if args.action_kind == DIFFERENCES:
        return {"hold still": np.zeros_like(mean), "mean chunk": mean}
    return {"mean chunk": mean}


def report_errors(args: Arguments, trainer: AtomicCheckpointTrainer) -> None:
    """Print and save the mean absolute error on held-out episodes, by joint, in the robot's units."""
    processor, held_out = trainer.processing_class, trainer.eval_dataset.dataset
    rows = evenly_spaced(len(held_out), NUM_COMPARED)
    demonstrated = held_out.action_chunks(rows)
    predicted = {"policy": predict(trainer.model, processor, held_out, rows)}
    predicted |= baselines(args, processor, trainer.train_dataset, held_out.states[rows])
    names = held_out.action_names or [f"action {i}" for i in range(held_out.action_dim)]
    errors = {name: np.abs(chunks - demonstrated).mean(axis=(0, 1)) for name, chunks in predicted.items()}
    print(f"\nMean absolute error of {len(rows)} chunks of held-out episodes, in the robot's units:")
    print(f"{'':24}" + "".join(f"{name:>14}" for name in errors))
    for i, name in enumerate(names):
        print(f"  {name:22}" + "".join(f"{values[i]:14.3g}" for values in errors.values()))
    for baseline in list(errors)[1:]:
        worse = errors["policy"] > errors[baseline]
        if worse.any():
            joints = ", ".join(np.array(names)[worse])
            print(f"WARNING: worse than the baseline {baseline!r} in {joints}. See docs/your_robot.md.")
    episodes = np.unique(held_out.episode_index).tolist()
    content = {"options": vars(args), "held_out_episodes": episodes, "joints": names, "num_chunks": len(rows)}
    content["mean_absolute_error"] = {name: values.tolist() for name, values in errors.items()}
    with atomic_write(Path(args.output_dir, "report.json")) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plot_episodes(args: Arguments, trainer: AtomicCheckpointTrainer) -> Path:
    """Demonstrated actions of three held-out episodes, and the chunks that the policy predicts along them."""
    held_out = trainer.eval_dataset.dataset
    starts = held_out.episode_starts
    starts = starts[evenly_spaced(len(starts), NUM_PLOTTED)]
    names, dim = held_out.action_names, held_out.action_dim
    figure, axes = plt.subplots(dim, len(starts), figsize=(6 * len(starts), 1.8 * dim), squeeze=False, sharey="row")
    for column, start in zip(axes.T, starts, strict=True):
        rows = np.arange(start, held_out.episode_end[start] + 1)
        predicted_at = rows[:: args.n_action_steps]
        chunks = predict(trainer.model, trainer.processing_class, held_out, predicted_at)
        for i, axis in enumerate(column):
            axis.plot((rows - start) / held_out.fps, held_out.actions[rows, i], "k")
            for row, chunk in zip(predicted_at, chunks, strict=True):
                seconds = (row - start + np.arange(len(chunk))) / held_out.fps
                axis.plot(seconds, chunk[:, i], "C1", alpha=0.35)
                axis.plot(seconds[: args.n_action_steps], chunk[: args.n_action_steps, i], "C1")
            axis.set_ylabel(names[i] if names else f"action {i}", parse_math=False)
        title = f"episode {held_out.episode_index[start]}: {held_out.text(int(start))}"
        column[0].set_title(shorten(title, 60, placeholder=" ..."), parse_math=False)
        column[-1].set_xlabel("seconds")
    lines = [plt.Line2D([], [], color=color, alpha=alpha) for color, alpha in (("k", 1), ("C1", 1), ("C1", 0.35))]
    figure.legend(
        lines, ("demonstrated", "predicted, executed", "predicted, not executed"), loc="upper center", ncols=3
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    path = Path(args.output_dir, "trajectories.png")
    figure.savefig(path, dpi=80)
    return path


def print_next(args: Arguments, whole: LeRobotChunkDataset) -> None:
    """The commands that follow the training."""
    policy, exported, task = map(shlex.quote, (args.output_dir, args.output_dir + "-exported", whole.tasks[0]))
    print(f"""
Export it, to run without PyTorch (docs/deployment.md):
  pip install -e ".[deployment]"
  python examples/export_policy.py --checkpoint {policy} --output_dir {exported}
Drive a LeRobot arm, with one of the tasks and the --robot options that you recorded with (docs/deployment.md):
  pip install "lerobot[feetech]==0.6.1"    # Python 3.12 or 3.13
  python examples/drive.py --policy={exported} --task={task} --robot.type=... --look_only=true""")


def main(argv: list[str] | None = None) -> None:
    usage = "my_robot.py --dataset FOLDER_OR_HUB_ID [--output_dir FOLDER] [options, see --help]"
    parser = HfArgumentParser(Arguments, prog="my_robot.py", usage=usage, description=__doc__.split("\n")[0])
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        check_numbers(args, **dict.fromkeys(COUNTS, (1, math.inf)), num_workers=(0, math.inf))
        args.output_dir = str(Path(args.output_dir))
        whole = read_data(args)
        choose_options(args, whole)
        if args.check_only:
            return
        folder = Path(args.output_dir)
        if not args.resume and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
            raise ValueError(f"--output_dir is {folder}, which is not empty. Name another, or continue with --resume.")
        trainer = make_trainer(args, whole)
        with naming_option("--output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            keep_options(args, FREE)
        trainer.train(resume_from_checkpoint="last" if args.resume else None)
        trainer.save_model()
        if trainer.is_world_process_zero():
            trainer.model.eval()
            report_errors(args, trainer)
            path = plot_episodes(args, trainer)
            print(f"\nThe policy is in {folder}. {path} shows its predictions for held-out episodes.")
            print_next(args, whole)
    except KeyboardInterrupt:
        advice = "the same command with --resume continues from there."
        parser.exit(130, interruption(args.output_dir, advice, "--resume also starts from the beginning."))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
