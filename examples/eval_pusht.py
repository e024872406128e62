"""Evaluate a SmolAndFast checkpoint in the PushT simulator.

    python examples/eval_pusht.py --checkpoint checkpoints/pusht-tiny --episodes 50 --output_dir outputs/eval

Writes `metrics.json`, and of the first episodes `rollouts.mp4` and `rollouts.png`, into the output folder. Episode i
resets its environment with seed + i. A run repeats on one machine with the same `--num_envs`: samples of a batch come
from one random stream, and rounding inside the model may depend on the batch.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pusht import ACTION_DIM, TASK, Predict, rollout, write_contact_sheet, write_video
from transformers import AutoModel, AutoProcessor, PreTrainedConfig

MODEL_TYPE = "smolandfast"
PACKAGES = ("torch", "transformers", "gymnasium", "gym_pusht", "pymunk", "numpy")


def load_policy(checkpoint: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """The model, for inference, and the processor of a folder or hub id; kwargs go to `AutoModel.from_pretrained`.

    Raises:
        OSError: Files that are missing or damaged.
        ValueError: A checkpoint of another kind, or a processor of another model.
    """
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, **kwargs)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    processor.check_model(model)
    return model.eval(), processor


def make_predict(model: Any, processor: Any, task: str = TASK, **generate_kwargs: Any) -> Predict:
    """Wrap a model and its processor as the `predict` of [`pusht.rollout`].

    A string of tokens that does not decode to a whole chunk is the processor's ValueError, and is let through.
    """

    def predict(images: list[np.ndarray], states: np.ndarray) -> np.ndarray:
        inputs = processor(images=[[i] for i in images], text=[task] * len(images), state=states, return_tensors="pt")
        ids = model.generate(**inputs.to(model.device), **generate_kwargs)
        return np.asarray(processor.post_process_actions(ids))  # (B, H, D), the robot's units

    return predict


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line and refuse what can be refused before the model is loaded."""
    parser = argparse.ArgumentParser(description="Evaluate a SmolAndFast checkpoint in the PushT simulator.")
    parser.add_argument("--checkpoint", required=True, help="folder that train_pusht.py wrote, or a Hub id")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1000, help="episode i resets its environment with seed + i")
    parser.add_argument("--num_envs", type=int, default=16, help="episodes played side by side (16)")
    parser.add_argument("--n_action_steps", type=int, help="actions executed of each chunk (the checkpoint's own)")
    parser.add_argument("--do_sample", action="store_true", help="sample tokens instead of taking the likeliest")
    parser.add_argument("--temperature", type=float, help="of sampling (1.0)")
    parser.add_argument("--record", type=int, default=6, help="first episodes to film, 0 for none (6)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/eval"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    for name, least in {"episodes": 1, "num_envs": 1, "n_action_steps": 1, "seed": 0, "record": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}. Give at least {least}.")
    if args.temperature is not None and not (args.do_sample and 0 < args.temperature < float("inf")):
        parser.error(f"--temperature is {args.temperature}. Give a positive number, and --do_sample with it.")
    check_checkpoint(parser, args)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} does not work here: {first_line(error)} Try --device cpu.")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output_dir {args.output_dir} cannot be a folder ({error.strerror}). Name another one.")
    return parser, args


def check_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a checkpoint that is missing or of another kind. `org/name` is a Hub id unless `org` is a folder."""
    mend = "Give the folder that examples/train_pusht.py wrote (its --output_dir), or a Hub id."
    folder = Path(args.checkpoint).expanduser()
    if folder.is_dir():
        args.checkpoint = str(folder)
        if not (folder / "config.json").is_file():
            parser.error(f"--checkpoint {folder} holds no config.json. {mend}")
    elif len(folder.parts) != 2 or args.checkpoint[0] in "~./" or folder.parent.is_dir():
        parser.error(f"--checkpoint {args.checkpoint} is not a folder. {mend}")
    try:
        config, _ = PreTrainedConfig.get_config_dict(args.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(f"--checkpoint {args.checkpoint} cannot be read: {first_line(error)} {mend}")
    found, action_dim = config.get("model_type"), config.get("action_dim")
    if found != MODEL_TYPE:
        parser.error(f"--checkpoint {args.checkpoint} has model_type {found!r}, expected {MODEL_TYPE!r}. {mend}")
    if action_dim not in (None, ACTION_DIM):
        parser.error(f"--checkpoint {args.checkpoint} has {action_dim} action dimensions, PushT {ACTION_DIM}. {mend}")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    try:
        model, processor = load_policy(args.checkpoint, dtype=getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        parser.error(f"--checkpoint {args.checkpoint} cannot be loaded: {first_line(error)}")
    model.to(args.device)
    chunk_size, n_action_steps = model.config.chunk_size, args.n_action_steps or model.config.n_action_steps
    if n_action_steps > chunk_size:
        parser.error(f"--n_action_steps is {n_action_steps}, the checkpoint predicts {chunk_size}. Give at most that.")

    sampling = {"do_sample": True, "temperature": args.temperature or 1.0}
    generate_kwargs = sampling if args.do_sample else {"do_sample": False}
    torch.manual_seed(args.seed)
    result = rollout(
        make_predict(model, processor, **generate_kwargs),
        seeds=range(args.seed, args.seed + args.episodes),
        n_action_steps=n_action_steps,
        num_envs=args.num_envs,
        record=args.record,
        progress=True,
    )
    metrics = {
        **{name: getattr(args, name) for name in ("checkpoint", "num_envs", "dtype", "device")},
        "n_action_steps": n_action_steps,
        "num_threads": torch.get_num_threads(),
        **generate_kwargs,
        "versions": installed_versions(),
        **result.metrics(),
    }
    write_json(args.output_dir / "metrics.json", metrics)
    print(summary(metrics, result.num_chunks))
    if args.record:
        write_contact_sheet(args.output_dir / "rollouts.png", result.recordings)
        write_video(args.output_dir / "rollouts.mp4", result.recordings)
        print(f"  video         {args.output_dir / 'rollouts.mp4'}, as a picture {args.output_dir / 'rollouts.png'}")
    print(f"  metrics       {args.output_dir / 'metrics.json'}")


def installed_versions() -> dict[str, str]:
    """The releases that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def summary(metrics: dict[str, Any], num_chunks: int) -> str:
    """The figures to compare, with their 95 % intervals."""
    return (
        "{checkpoint}: {n_episodes} episodes from seed {seed}, {n_action_steps} actions of each chunk executed\n"
        "  success       {pc_success:.1f} %  ({pc_success_low:.1f} to {pc_success_high:.1f})\n"
        "  max reward    {avg_max_reward:.3f}  ({avg_max_reward_low:.3f} to {avg_max_reward_high:.3f})\n"
        "  sum reward    {avg_sum_reward:.1f}\n"
        "  time a chunk  {ms_per_chunk:.1f} ms  (up to {num_envs} at once, {device}, {dtype}, {num_threads} threads)\n"
        "  malformed     {malformed_chunks} of {num_chunks} chunks"
    ).format(**metrics, num_chunks=num_chunks)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of the file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
