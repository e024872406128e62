"""Train a policy on your own recordings, see how well it predicts held-out episodes, and get it ready for the arm.

    python examples/my_robot.py --dataset you/your-data --check_only
    python examples/my_robot.py --dataset you/your-data --preset tiny --output_dir outputs/mine

The data set is a LeRobot v3.0 one, a folder or a Hub id. `tiny` trains on a CPU from random weights, `256M` starts
from SmolVLM2 and needs a GPU. docs/your_robot.md explains the report. Needs `pip install -e ".[robot]"`.
"""

import json
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
import matplotlib  # noqa: F401 - of the extra `robot`: its absence shows at once
import torch
from training_runs import check_numbers, interruption, keep_options, naming_option
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

from smolandfast import FastActionTokenizer, SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import atomic_write
from smolandfast.training import (
    ActionDataCollator,
    AtomicCheckpointTrainer,
    DatasetReport,
    LeRobotChunkDataset,
    bf16_is_faster,
    download_dataset,
    evenly_spaced,
    find_checkpoints,
    fit_normalizer,
    inspect_dataset,
    make_muon,
    make_optimizer,
    make_tiny_model,
    make_tiny_processor,
    parameter_groups,
    read_info,
)
from smolandfast.training.frames import MAX_CACHED_BYTES
from smolandfast.training.held_out import compare_with_baselines, plot_predictions, split_episodes

CHUNK_SECONDS = 0.64
NUM_COMPARED, NUM_PLOTTED = 256, 3  # held-out chunks that are predicted, and episodes that are plotted
COUNTS = ("held_out_episodes", "chunk_size", "n_action_steps", "max_steps", "batch_size", "save_steps")
FREE = ("resume", "check_only", "max_steps", "save_steps", "num_workers")  # may change when a training is resumed
NEXT = """
The policy is in {policy}. {policy}/trajectories.png shows its predictions for held-out episodes.
Export it, to run without PyTorch (docs/deployment.md):
  pip install -e ".[deployment]"
  python examples/export_policy.py --checkpoint {policy} --output_dir {exported}
Drive a LeRobot arm, with one of the tasks and the --robot options that you recorded with (docs/deployment.md):
  pip install "lerobot[feetech]==0.6.1"    # Python 3.12 or 3.13, PyTorch before 2.12
  python examples/drive.py --policy={exported} --task={task} --look_only=true \\
    --robot.type=... --robot.id=... --robot.port=... --robot.cameras=..."""


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
    resize_with_pad: bool = HfArg(default=False, help="keep the aspect ratio of the images, between black bars")
    max_steps: int | None = HfArg(default=None, help="optimizer steps (tiny: 20 epochs, at most 4000; 256M: 20000)")
    batch_size: int | None = HfArg(default=None, help="samples a step and process (tiny: 64, 256M: 16)")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower")
    num_workers: int | None = HfArg(default=None, help="processes that read images (tiny: 1, 256M: 4)")
    save_steps: int | None = HfArg(default=None, help="steps from one checkpoint to the next (a tenth, 20 or more)")
    resume: bool = HfArg(default=False, help="continue the training in output_dir, with the same options")
    seed: int = 0


def read_and_check(args: Arguments) -> tuple[LeRobotChunkDataset, DatasetReport]:
    """Read all episodes, print what they hold, and choose the options that were not given."""
    root = Path(args.dataset).expanduser()
    if not root.is_dir():
        with naming_option(f"--dataset is {args.dataset}, which is not a folder"):
            root = download_dataset(args.dataset)
    info = read_info(root)
    episodes, excluded = range(info["total_episodes"]), set(args.exclude_episodes or ())
    if not excluded < set(episodes):
        expected = f"some of 0 to {episodes[-1]}, not all"
        raise ValueError(f"--exclude_episodes is {args.exclude_episodes}, expected {expected}.")
    args.chunk_size = args.chunk_size or max(2, round(CHUNK_SECONDS * info["fps"]))
    args.n_action_steps = args.n_action_steps or max(1, args.chunk_size // 2)
    data = LeRobotChunkDataset(root, args.chunk_size, sorted({*episodes} - excluded), cache_dir=False)
    report = inspect_dataset(
        data, args.normalization, args.use_relative_actions, args.relative_exclude_joints, args.fast_scale
    )
    print(report)
    vars(args).update(report.action_options, fast_scale=report.fast_scale)
    is_tiny = args.preset == "tiny"
    if is_tiny and not args.image_size:
        # The largest that is not larger than the recording, and that the reader keeps in its cache.
        side, cameras = min(min(size) for size in data.image_sizes.values()), len(data.image_keys)
        fits = [size for size in (128, 96) if size <= side and cameras * 3 * size**2 <= MAX_CACHED_BYTES]
        args.image_size = (*fits, 64)[0]
    if is_tiny and args.image_size % 32:
        raise ValueError(f"--image_size is {args.image_size}, expected a multiple of 32 for the tiny preset.")
    return data, report


def choose_training(args: Arguments, num_frames: int) -> None:
    """Choose the options of the training that were not given, and print its length."""
    is_tiny = args.preset == "tiny"
    args.batch_size = args.batch_size or (64 if is_tiny else 16)
    args.max_steps = args.max_steps or (
        min(4_000, 20 * math.ceil(num_frames / args.batch_size)) if is_tiny else 20_000
    )
    args.save_steps = args.save_steps or max(20, args.max_steps // 10)
    if args.num_workers is None:
        args.num_workers = 1 if is_tiny else 4
    epochs = args.max_steps * args.batch_size / num_frames
    print(f"Training: {args.max_steps} steps of {args.batch_size} frames, {epochs:.1f} epochs.")


def train(args: Arguments, data: LeRobotChunkDataset, action_options: dict) -> None:
    """Train a policy, save it, and report its errors on held-out episodes."""
    folder, has_gpu = Path(args.output_dir), torch.cuda.is_available()
    set_seed(args.seed)
    parts = split_episodes(data, args.held_out_episodes)
    train_data, held_out = (LeRobotChunkDataset(data.root, args.chunk_size, episodes) for episodes in parts)
    choose_training(args, len(train_data))
    for checkpoint in find_checkpoints(folder)[-1:]:
        if int(checkpoint.name.removeprefix("checkpoint-")) > args.max_steps:
            raise ValueError(f"--max_steps is {args.max_steps}, but {checkpoint} is further. Give more steps.")

    # The FAST tokenizer is fitted to all episodes, so that the limits of its actions are those of all.
    statistics, normalizer, chunks = fit_normalizer(data, **action_options)
    tokenizer = FastActionTokenizer.fit(chunks, args.fast_scale, action_scale=normalizer.action_scale)

    # The processor turns observations of this robot into prompts, and refuses those of another.
    options = action_options | {
        "image_keys": data.image_keys,
        "fps": data.fps,
        "state_names": data.state_names,
        "action_names": data.action_names,
        "image_size": args.image_size,
        "resize_with_pad": args.resize_with_pad,
    }
    default_task = data.tasks[0] if len(data.tasks) == 1 else ""
    if args.preset == "tiny":
        options["scale_factor"] = args.image_size // 32  # 4 visual tokens an image
        options["split_words"] = len(data.tasks) > 1  # instructions that share words share tokens
        processor = make_tiny_processor(tokenizer, statistics, default_task, data.tasks, **options)
        # On a CPU, eager attention trains short sequences faster than the fused kernel.
        attention = "sdpa" if has_gpu else "eager"
        model = make_tiny_model(processor, args.n_action_steps, attn_implementation=attention)
        rates = {"vision_learning_rate": 5e-4, "connector_learning_rate": 3e-4, "text_learning_rate": 1e-3}
        optimizer = make_muon(model, parameter_groups(model, **rates, weight_decay=0.1))
    else:
        options |= {"default_task": default_task, "training_tasks": data.tasks}
        processor = SmolAndFastProcessor.from_vlm(args.vlm, tokenizer, statistics, scale_factor=4, **options)
        options = {**processor.model_kwargs(), "n_action_steps": args.n_action_steps}
        model = SmolAndFastForActionPrediction.from_pretrained(args.vlm, **options, dtype=torch.float32)
        optimizer = make_optimizer(model)  # AdamW, 2e-5 for the vision tower and 2e-4 for the rest
    for part in (train_data, held_out):
        part.resize_images(processor.image_resizer)  # where they are read, in the workers

    training = TrainingArguments(
        args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_checkpointing=args.gradient_checkpointing or None,  # False is deprecated
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
    trainer = AtomicCheckpointTrainer(
        model,
        training,
        data_collator=ActionDataCollator(processor),
        train_dataset=train_data,
        eval_dataset=torch.utils.data.Subset(held_out, evenly_spaced(len(held_out), NUM_COMPARED).tolist()),
        processing_class=processor,
        optimizers=(optimizer, None),
    )
    with naming_option("--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        keep_options(args, FREE)
    disable_progress_bar()  # a line for each save; the training's bar stays
    trainer.train(resume_from_checkpoint="last" if args.resume else None)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    print("\nPredicting held-out episodes ...")
    model.eval()
    report = compare_with_baselines(model, processor, train_data, held_out, NUM_COMPARED)
    print(report)
    with atomic_write(folder / "report.json") as unfinished:
        unfinished.write_text(json.dumps({"options": vars(args), **asdict(report)}, indent=2) + "\n")
    plot_predictions(model, processor, held_out, NUM_PLOTTED).savefig(folder / "trajectories.png", dpi=80)
    policy, exported, task = map(shlex.quote, (args.output_dir, f"{args.output_dir}-exported", data.tasks[0]))
    print(NEXT.format(policy=policy, exported=exported, task=task))


def main(argv: list[str] | None = None) -> None:
    usage = "my_robot.py --dataset FOLDER_OR_HUB_ID [--output_dir FOLDER] [options, see --help]"
    parser = HfArgumentParser(Arguments, prog="my_robot.py", usage=usage, description=__doc__.split("\n")[0])
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        limits = dict.fromkeys(COUNTS, (1, math.inf)) | {"image_size": (32, math.inf), "num_workers": (0, math.inf)}
        limits |= {"fast_scale": (0.1, 1e6), "seed": (0, 2**32 - 1)}
        check_numbers(args, **limits)
        args.output_dir = str(folder := Path(args.output_dir))
        is_begun = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        if is_begun and not (args.resume or args.check_only):
            raise ValueError(f"--output_dir is {folder}, which is not empty. Name another, or continue with --resume.")
        if args.resume and not is_begun:
            raise ValueError(f"--resume: there is no training in --output_dir {folder}. Name its folder.")
        data, report = read_and_check(args)
        if not args.check_only:
            train(args, data, report.action_options)
    except KeyboardInterrupt:
        parser.exit(130, interruption(args.output_dir, "the same command with --resume"))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
