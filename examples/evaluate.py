"""Evaluate a SmolAndFast checkpoint in a simulator.

    python examples/evaluate.py --checkpoint checkpoints/pusht-tiny --episodes 50 --output_dir outputs/eval
    python examples/evaluate.py --benchmark metaworld --checkpoint checkpoints/metaworld-tiny --episodes 10
    python examples/evaluate.py --checkpoint deployed --backend openvino    # a folder of export_policy.py

Writes `metrics.json`, and `rollouts.mp4` and `rollouts.png` of the first episodes. Episode i resets its environment
with seed + i. Results are reproducible on one machine, with the same `--num_envs`: the samples of a batch share one
random stream, and rounding inside the model can depend on the batch.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import interrupt  # noqa: F401 - before the slow imports
import numpy as np
import torch
from envs import BENCHMARKS, Benchmark, check_policy, get_benchmark
from rollouts import Predict, RolloutResult, rollout, write_contact_sheet, write_video
from tqdm import tqdm
from transformers import PreTrainedConfig

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.deployment.loop import STRATEGIES
from smolandfast.deployment.runtime import BACKENDS, POLICY, DeployedPolicy
from smolandfast.files_smolandfast import atomic_write, check_output_dir

NAMES = ["metrics.json", "rollouts.mp4", "rollouts.png"]  # the output files
FIND_CHECKPOINT = "Give the folder that examples/train.py wrote (its --output_dir), or a Hub id."


def load_policy(checkpoint: str | Path, **kwargs: Any) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """Load model and processor of a folder or Hub id, with the installed package's code.

    Args:
        kwargs: For the model's `from_pretrained`.

    Raises:
        OSError: Files are missing or damaged.
        ValueError: A checkpoint of another kind, or the processor of another model.
    """
    model = SmolAndFastForActionPrediction.from_pretrained(checkpoint, **kwargs)
    processor = SmolAndFastProcessor.from_pretrained(checkpoint)
    processor.check_model(model)
    return model.eval(), processor


def make_predict(model: Any, processor: Any, **generate_kwargs: Any) -> Predict:
    """The `predict` of [`rollouts.rollout`] for a model and its processor."""

    def predict(images: list[list[np.ndarray]], states: np.ndarray, texts: list[str]) -> np.ndarray:
        inputs = processor(images=images, text=texts, state=states, return_tensors="pt")
        ids = model.generate(**inputs.to(model.device), **generate_kwargs)
        return np.asarray(processor.post_process_actions(ids))  # (B, H, D), the robot's units

    return predict


def find_backend(checkpoint: str | Path) -> str | None:
    """The default backend of a deployed policy; None for a checkpoint."""
    return "onnxruntime" if os.path.isfile(os.path.join(checkpoint, POLICY)) else None


class LoadedPolicy(NamedTuple):
    """A policy's `predict` for [`rollouts.rollout`], its sizes, cameras and control rate."""

    predict: Predict
    chunk_size: int
    n_action_steps: int
    action_dim: int
    state_dim: int
    image_keys: list[str]
    fps: float | None


def load_predict(
    checkpoint: str | Path,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_tokens: int | None = None,
    **options: Any,
) -> LoadedPolicy:
    """Load a checkpoint or a deployed policy.

    Args:
        backend, max_tokens: Of a deployed policy, see [`DeployedPolicy`]; None for a checkpoint.
        options: For `model.generate`.
    """
    if backend is not None:
        policy = DeployedPolicy(checkpoint, backend, torch.get_num_threads())

        def predict(images: list[list[np.ndarray]], states: np.ndarray, texts: list[str]) -> np.ndarray:
            return policy.predict(images, texts, states, max_tokens=max_tokens)

        return LoadedPolicy(predict, *(getattr(policy, name) for name in LoadedPolicy._fields[1:]))
    model, processor = load_policy(checkpoint, dtype=dtype)
    model.to(device)
    config, robot = model.config, (processor.normalizer.state_dim, processor.image_keys, processor.fps)
    predict = make_predict(model, processor, **options)
    return LoadedPolicy(predict, config.chunk_size, config.n_action_steps, config.action_dim, *robot)


def rollout_in_processes(
    num_processes: int,
    checkpoint: str | Path,
    benchmark: Benchmark,
    tasks: Sequence[str],
    load_options: dict[str, Any],
    **options: Any,
) -> RolloutResult:
    """[`rollouts.rollout`] with the tasks divided among single-threaded processes.

    Args:
        load_options: For [`load_predict`]. PyTorch is seeded with the first of the seeds for each task.
        options: For [`rollouts.rollout`].
    """
    play_task = partial(_rollout_task, checkpoint, benchmark, load_options, options)
    results = list(tqdm(map_in_processes(num_processes, play_task, tasks), total=len(tasks), unit="task"))
    episodes = [episode for result in results for episode in result.episodes]
    num_chunks = sum(result.num_chunks for result in results)
    return RolloutResult(benchmark, episodes, num_chunks, sum(result.predict_seconds for result in results))


def _rollout_task(
    checkpoint: str | Path, benchmark: Benchmark, load_options: dict, options: dict, task: str
) -> RolloutResult:
    policy = load_predict(checkpoint, **load_options)
    torch.manual_seed(options["seeds"][0])
    return rollout(benchmark, policy.predict, tasks=[task], **{"n_action_steps": policy.n_action_steps} | options)


def map_in_processes(num_processes: int, function: Callable, items: Sequence) -> Iterator:
    """Yield the results of a function for each item, from new single-threaded processes. Ctrl-C ends them at once."""
    spawn = multiprocessing.get_context("spawn")  # a forked process may hang once threads or a renderer exist
    num_processes = max(1, min(num_processes, len(items)))
    with ProcessPoolExecutor(num_processes, spawn, torch.set_num_threads, (1,)) as pool:
        # The new processes inherit that they ignore Ctrl-C, which the terminal sends to all; this one ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            results = pool.map(function, items)
        finally:
            signal.signal(signal.SIGINT, handler)
        try:
            yield from results
        except (KeyboardInterrupt, GeneratorExit):
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def error_line(parser: argparse.ArgumentParser, what: str = "", fix: str = "") -> Iterator[None]:
    """Turn an exception about bad input into an error line: `what`, the message's first line, `fix`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"{what}{first_line(error)} {fix}".rstrip())


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, **minimums: int) -> None:
    """Stop with an error line if a number is too small."""
    for name, low in minimums.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name} is {value}. Give at least {low}.")


def load_benchmark(parser: argparse.ArgumentParser, name: str) -> Benchmark:
    """[`envs.get_benchmark`], or an error line."""
    with error_line(parser, "--benchmark: "):
        return get_benchmark(name)


def parse_with_part(
    parser: argparse.ArgumentParser, argv: list[str] | None, benchmarks: Sequence[str], part: str
) -> tuple[argparse.Namespace, Benchmark, type]:
    """The arguments, the benchmark, and its class `part`, such as `Pretraining`, which has options and defaults.

    Args:
        parser: Has `--benchmark`, with a default or required.
        benchmarks: Its choices.
        part: Is in `envs/<benchmark>/<part in lower case>.py`.
    """
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--benchmark", default=parser.get_default("benchmark"))
    name = chooser.parse_known_args(argv)[0].benchmark
    if name not in benchmarks:
        parser.parse_args(argv)  # ends with the help, or with an error line
    benchmark = load_benchmark(parser, name)
    chosen = getattr(importlib.import_module(f"envs.{name}.{part.lower()}"), part)
    chosen.add_options(parser)
    parser.set_defaults(**chosen.defaults)
    return parser.parse_args(argv), benchmark, chosen


def find_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace, option: str = "checkpoint") -> None:
    """Stop with an error line unless the option is a Hub id, or the folder of a checkpoint or deployed policy."""
    checkpoint = os.path.expanduser(getattr(args, option))
    setattr(args, option, checkpoint)
    folder = Path(checkpoint)
    # `org/name` is not a Hub id if the folder `org` exists: a mistyped path must not download from the Hub.
    if not folder.is_dir() and (len(folder.parts) != 2 or folder.parent.is_dir()):
        parser.error(f"--{option} {checkpoint} is not a folder. {FIND_CHECKPOINT}")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", POLICY)):
        parser.error(f"--{option} {checkpoint} has no config.json. {FIND_CHECKPOINT}")


def load_checked(
    parser: argparse.ArgumentParser, benchmark: Benchmark, checkpoint: str, option: str = "checkpoint", **options: Any
) -> LoadedPolicy:
    """[`load_predict`] of a policy for this benchmark, or an error line."""
    with error_line(parser, f"--{option} {checkpoint} cannot be used: "):
        policy = load_predict(checkpoint, **options)
        check_policy(benchmark, policy.action_dim, policy.state_dim, policy.image_keys, policy.fps)
    return policy


def check_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace, benchmark: Benchmark) -> None:
    """Stop with an error line if `--checkpoint` is missing or of another kind. Reads only its configuration."""
    find_checkpoint(parser, args)
    name = f"--checkpoint {args.checkpoint}"
    with error_line(parser, f"{name} cannot be read: ", FIND_CHECKPOINT):
        config, _ = PreTrainedConfig.get_config_dict(args.checkpoint)
    model_type, action_dim = config.get("model_type"), config.get("action_dim", benchmark.action_dim)
    if model_type != "smolandfast":
        parser.error(f"{name} has model_type {model_type!r}, expected 'smolandfast'. {FIND_CHECKPOINT}")
    if action_dim != benchmark.action_dim:
        sizes = f"{action_dim} action dimensions, {benchmark.name} {benchmark.action_dim}"
        parser.error(f"{name} has {sizes}. {FIND_CHECKPOINT}")


def make_output_dir(parser: argparse.ArgumentParser, folder: Path, names: list[str]) -> None:
    """Make the folder, or stop with an error line if it holds anything but an earlier output of these names."""
    with error_line(parser, "--output_dir: "):
        check_output_dir(folder, names)
        folder.mkdir(parents=True, exist_ok=True)


def installed_versions(benchmark: Benchmark) -> dict[str, str]:
    """The releases that a result depends on."""
    packages = ("torch", "transformers", *benchmark.packages, "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def summary(metrics: dict[str, Any]) -> str:
    """The scores as text."""
    rate = "{pc_success:.1f} %  ({pc_success_low:.1f} to {pc_success_high:.1f})"
    rows = {group: rate.format(**scores) for group, scores in metrics.get("by_group", {}).items()}
    rows["success"] = rate.format(**metrics)
    for name in ("tasks", "groups"):
        if metrics.get(f"mean_over_{name}") is not None:
            rows[f"mean over {name}"] = f"{metrics[f'mean_over_{name}']:.1f} %"
    if "avg_max_reward" in metrics:
        reward = "{avg_max_reward:.3f}  ({avg_max_reward_low:.3f} to {avg_max_reward_high:.3f})"
        rows["max reward"] = reward.format(**metrics)
    rows["sum reward"] = f"{metrics['avg_sum_reward']:.1f}"
    setting = "{ms_per_chunk:.1f} ms  (up to {num_envs} at once, {device}, {dtype}, {num_threads} threads)"
    rows["time per chunk"] = setting.format(**metrics)
    head = "{checkpoint}: {n_episodes} episodes from seed {seed}, {n_action_steps} actions of each chunk executed"
    lines = [head.format(**metrics)]
    for task, scores in metrics.get("by_task", {}).items():
        lines.append(f"    {task:<28} {scores['pc_success']:.0f} %")
    return "\n".join(lines + [f"  {name:<15} {text}" for name, text in rows.items()])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate a SmolAndFast checkpoint in a simulator.")
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote, or a Hub id")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="pusht", help="the simulator (pusht)")
    parser.add_argument("--tasks", nargs="+", help="tasks of the benchmark (all)")
    parser.add_argument("--episodes", type=int, default=50, help="of each task (50)")
    parser.add_argument("--seed", type=int, default=1000, help="episode i resets its environment with seed + i (1000)")
    parser.add_argument("--num_envs", type=int, default=16, help="episodes played side by side (16)")
    parser.add_argument("--num_processes", type=int, default=1, help="processes that share the tasks (1)")
    parser.add_argument("--full_render", action="store_true", help="metaworld, so101: render as the original does")
    parser.add_argument("--n_action_steps", type=int, help="actions executed of each chunk (the checkpoint's own)")
    parser.add_argument("--do_sample", action="store_true", help="sample tokens (default: the likeliest)")
    parser.add_argument("--temperature", type=float, help="of sampling (1.0)")
    parser.add_argument("--delay", type=int, default=0, help="steps from an observation to its chunk's arrival (0)")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="switch", help="during the delay (switch)")
    parser.add_argument("--record", type=int, default=6, help="first episodes of each task to film, 0 for none (6)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/eval"))
    parser.add_argument("--backend", choices=sorted(BACKENDS), help="runs a deployed policy (onnxruntime)")
    parser.add_argument("--max_tokens", type=int, help="tokens to generate of a chunk, for a deployed policy (all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu or a GPU (for one process the GPU, if there is one)")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Benchmark:
    """Complete the arguments and return the benchmark, or stop with an error line."""
    check_counts(parser, args, episodes=1, num_envs=1, num_processes=1, n_action_steps=1, max_tokens=1)
    check_counts(parser, args, seed=0, record=0, delay=0)
    if args.temperature is not None and not (args.do_sample and 0 < args.temperature < float("inf")):
        parser.error(f"--temperature is {args.temperature}. Give a positive number, and --do_sample with it.")
    benchmark = load_benchmark(parser, args.benchmark)
    if args.full_render:
        if not benchmark.has_full_render:
            parser.error(f"--full_render: {args.benchmark} has one kind of images. Drop it.")
        benchmark = replace(benchmark, make_scene=partial(benchmark.make_scene, full_render=True))
    for task in args.tasks or ():
        if task not in benchmark.tasks:
            parser.error(f"--tasks: {benchmark.name} has no {task}, only {', '.join(benchmark.tasks)}.")
    if (backend := find_backend(args.checkpoint)) is not None:
        args.backend = args.backend or backend
        if args.do_sample or args.dtype != "float32" or args.device is not None:
            parser.error("--checkpoint is a deployed policy, which is greedy. Drop --do_sample, --dtype and --device.")
        args.device = "cpu"
    elif args.backend is not None or args.max_tokens is not None:
        parser.error(f"--checkpoint {args.checkpoint} is not a deployed policy. Drop --backend and --max_tokens.")
    else:
        check_checkpoint(parser, args, benchmark)
    args.device = args.device or ("cuda" if torch.cuda.is_available() and args.num_processes == 1 else "cpu")
    if args.num_processes > 1 and args.device != "cpu":
        parser.error(f"--num_processes is {args.num_processes}, but --device {args.device} has one policy. Give 1.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} does not work here: {first_line(error)} Try --device cpu.")
    return benchmark


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"do_sample": args.do_sample} | ({"temperature": args.temperature or 1.0} if args.do_sample else {})


def load_for(
    parser: argparse.ArgumentParser, args: argparse.Namespace, benchmark: Benchmark
) -> tuple[LoadedPolicy, dict[str, Any]]:
    """The policy, and the options of [`load_predict`] that load it; or an error line."""
    options = {name: getattr(args, name) for name in ("backend", "device", "max_tokens")}
    options |= {"dtype": getattr(torch, args.dtype), **sampling_options(args)}
    policy = load_checked(parser, benchmark, args.checkpoint, **options)
    args.n_action_steps = args.n_action_steps or policy.n_action_steps
    if args.n_action_steps > policy.chunk_size:
        parser.error(
            f"--n_action_steps is {args.n_action_steps}, a chunk has {policy.chunk_size} actions. Give at most that."
        )
    return policy, options


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    benchmark = check_arguments(parser, args)
    make_output_dir(parser, args.output_dir, NAMES)
    policy, load_options = load_for(parser, args, benchmark)
    tasks = args.tasks or list(benchmark.tasks)
    options = {name: getattr(args, name) for name in ("n_action_steps", "num_envs", "record", "delay", "strategy")}
    options["seeds"] = range(args.seed, args.seed + args.episodes)
    if args.num_processes > 1:
        result = rollout_in_processes(args.num_processes, args.checkpoint, benchmark, tasks, load_options, **options)
    else:
        torch.manual_seed(args.seed)
        result = rollout(benchmark, policy.predict, tasks=tasks, progress=True, **options)
    metrics = {
        **{name: getattr(args, name) for name in ("benchmark", "checkpoint", "num_envs", "dtype", "device")},
        **({} if args.backend is None else {"backend": args.backend, "max_tokens": args.max_tokens}),
        **({"full_render": args.full_render} if benchmark.has_full_render else {}),
        **{name: getattr(args, name) for name in ("n_action_steps", "num_processes", "delay", "strategy")},
        "num_threads": torch.get_num_threads() if args.num_processes == 1 else 1,
        **sampling_options(args),
        **result.smoothness(),
        "versions": installed_versions(benchmark),
        **result.metrics(),
    }
    path, video, sheet = (args.output_dir / name for name in NAMES)
    video.unlink(missing_ok=True)  # of an earlier evaluation
    sheet.unlink(missing_ok=True)
    write_json(path, metrics)
    print(summary(metrics))
    if args.record:
        write_contact_sheet(sheet, result.recordings, benchmark)
        write_video(video, result.recordings, benchmark)
        print(f"  video           {video}, as an image {sheet}")
    print(f"  metrics         {path}")


if __name__ == "__main__":
    main()
