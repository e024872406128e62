"""Evaluate a SmolAndFast checkpoint in a simulator.

    python examples/evaluate.py --checkpoint checkpoints/pusht-tiny --episodes 50 --output_dir outputs/eval
    python examples/evaluate.py --benchmark metaworld --checkpoint checkpoints/metaworld-tiny --episodes 10
    python examples/evaluate.py --checkpoint deployed --backend openvino    # what export_policy.py wrote

Writes `metrics.json`, and `rollouts.mp4` and `rollouts.png` of the first episodes, into the output folder. Episode i
resets its environment with seed + i. On one machine, the same command gives the same result; another `--num_envs` may
not, since samples of a batch share one random stream, and rounding inside the model can depend on the batch. An output
folder that holds anything else is refused.
"""

import argparse
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

import interrupt  # noqa: F401 - before all that takes long
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

NAMES = ["metrics.json", "rollouts.mp4", "rollouts.png"]  # all that is written


def load_policy(checkpoint: str | Path, **kwargs: Any) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """The model, for inference, and the processor of a folder or Hub id; kwargs go to the model's `from_pretrained`.

    The code is the installed package's: none that lies beside the weights is run.

    Raises:
        OSError: files are missing or damaged.
        ValueError: a checkpoint of another kind, or the processor of another model.
    """
    model = SmolAndFastForActionPrediction.from_pretrained(checkpoint, **kwargs)
    processor = SmolAndFastProcessor.from_pretrained(checkpoint)
    processor.check_model(model)
    return model.eval(), processor


def make_predict(model: Any, processor: Any, task: str | None = None, **generate_kwargs: Any) -> Predict:
    """Wrap a model and its processor as the `predict` of [`rollouts.rollout`]; `task` stands in for every sentence.

    The processor's ValueError for tokens that do not decode to one whole chunk is passed on.
    """

    def predict(images: list[np.ndarray], states: np.ndarray, texts: list[str]) -> np.ndarray:
        texts = texts if task is None else [task] * len(texts)
        images = [[image] for image in images]
        inputs = processor(images=images, text=texts, state=states, return_tensors="pt")
        ids = model.generate(**inputs.to(model.device), **generate_kwargs)
        return np.asarray(processor.post_process_actions(ids))  # (B, H, D), the robot's units

    return predict


def find_backend(checkpoint: str | Path) -> str | None:
    """What runs a deployed policy by default; None for a checkpoint."""
    return "onnxruntime" if os.path.isfile(os.path.join(checkpoint, POLICY)) else None


class LoadedPolicy(NamedTuple):
    """What [`rollouts.rollout`] and [`envs.check_policy`] need of a policy."""

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
    """A checkpoint's or a deployed policy's `predict`, its sizes, cameras and control rate.

    Args:
        backend, max_tokens: Of a deployed policy, see [`DeployedPolicy`]; None for a checkpoint.
        options: For `model.generate`.
    """
    if backend is not None:
        policy = DeployedPolicy(checkpoint, backend, torch.get_num_threads())

        def predict(images: list[np.ndarray], states: np.ndarray, texts: list[str]) -> np.ndarray:
            return policy.predict(images, texts, states, max_tokens=max_tokens)

        return LoadedPolicy(predict, *(getattr(policy, name) for name in LoadedPolicy._fields[1:]))
    model, processor = load_policy(checkpoint, dtype=dtype)
    model.to(device)
    sizes = (getattr(model.config, name) for name in ("chunk_size", "n_action_steps", "action_dim"))
    robot = processor.normalizer.state_dim, processor.image_keys, processor.fps
    return LoadedPolicy(make_predict(model, processor, **options), *sizes, *robot)


def rollout_in_processes(
    num_processes: int,
    checkpoint: str | Path,
    benchmark: Benchmark,
    tasks: Sequence[str],
    load_options: dict[str, Any],
    **options: Any,
) -> RolloutResult:
    """[`rollouts.rollout`] with a checkpoint's policy, the tasks divided among processes of one thread each.

    Args:
        load_options: For [`load_predict`]. Random choices start anew with each task, from the first of the seeds.
        options: For [`rollouts.rollout`].
    """
    one = partial(_rollout_task, checkpoint, benchmark, load_options, options)
    results = list(tqdm(map_in_processes(num_processes, one, tasks), total=len(tasks), unit="task"))
    counts = ("num_chunks", "predict_seconds")
    episodes = [episode for result in results for episode in result.episodes]
    return RolloutResult(benchmark, episodes, *(sum(getattr(r, name) for r in results) for name in counts))


def map_in_processes(num_processes: int, function: Callable, items: Sequence) -> Iterator:
    """The results of a function for each item, in new processes of one thread each. Ctrl-C ends them all at once."""
    spawn = multiprocessing.get_context("spawn")  # a forked copy of a process that has drawn or computed may hang
    with ProcessPoolExecutor(min(num_processes, len(items)), spawn, torch.set_num_threads, (1,)) as pool:
        # Ctrl-C reaches all processes at once. The new ones inherit that they ignore it, and are ended by this one.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            results = pool.map(function, items)
        finally:
            signal.signal(signal.SIGINT, handler)
        try:
            yield from results
        except (KeyboardInterrupt, GeneratorExit):  # do not wait for what they have begun
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _rollout_task(
    checkpoint: str | Path, benchmark: Benchmark, load_options: dict, options: dict, task: str
) -> RolloutResult:
    policy = load_predict(checkpoint, **load_options)
    torch.manual_seed(options["seeds"][0])
    return rollout(benchmark, policy.predict, tasks=[task], **{"n_action_steps": policy.n_action_steps} | options)


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, **minimums: int) -> None:
    """Stop with an error line if a number is too small."""
    for name, low in minimums.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name} is {value}. Give at least {low}.")


def load_benchmark(parser: argparse.ArgumentParser, name: str) -> Benchmark:
    """[`envs.get_benchmark`]; its exception becomes an error line."""
    try:
        return get_benchmark(name)
    except ValueError as error:
        parser.error(f"--benchmark: {error}")


FIND_CHECKPOINT = "Give the folder that examples/train.py wrote (its --output_dir), or a Hub id."


def find_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with an error line unless `--checkpoint` is a checkpoint's or an exported policy's folder, or a Hub id."""
    args.checkpoint = os.path.expanduser(args.checkpoint)
    folder, fix = Path(args.checkpoint), FIND_CHECKPOINT
    # `org/name` is a Hub id unless `org` is a folder: a mistyped path must not fetch somebody's code from the Hub.
    if not folder.is_dir() and (len(folder.parts) != 2 or folder.parent.is_dir()):
        parser.error(f"--checkpoint {args.checkpoint} is not a folder. {fix}")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", POLICY)):
        parser.error(f"--checkpoint {args.checkpoint} holds no config.json. {fix}")


def check_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace, benchmark: Benchmark) -> None:
    """Stop with an error line if `--checkpoint` is missing or of another kind; reads only its configuration."""
    find_checkpoint(parser, args)
    fix = FIND_CHECKPOINT
    try:
        config, _ = PreTrainedConfig.get_config_dict(args.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(f"--checkpoint {args.checkpoint} cannot be read: {first_line(error)} {fix}")
    found, action_dim = config.get("model_type"), config.get("action_dim", benchmark.action_dim)
    if found != "smolandfast":
        parser.error(f"--checkpoint {args.checkpoint} has model_type {found!r}, expected 'smolandfast'. {fix}")
    if action_dim != benchmark.action_dim:
        parser.error(
            f"--checkpoint {args.checkpoint} has {action_dim} action dimensions, {benchmark.name} "
            f"{benchmark.action_dim}. {fix}"
        )


def load_checkpoint(
    parser: argparse.ArgumentParser, args: argparse.Namespace, load: Callable = load_policy, **kwargs: Any
) -> tuple:
    """[`load_policy`], or another `load`, of `--checkpoint`; its exceptions become an error line."""
    try:
        return load(args.checkpoint, **kwargs)
    except (OSError, ValueError) as error:
        parser.error(f"--checkpoint {args.checkpoint} cannot be loaded: {first_line(error)}")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def make_output_dir(parser: argparse.ArgumentParser, folder: Path, names: list[str]) -> None:
    """Make the folder; stop with an error line if it holds anything but an earlier output of these names."""
    try:
        check_output_dir(folder, names)
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(f"--output_dir: {error}")
    except OSError as error:
        parser.error(f"--output_dir {folder} cannot be created ({error.strerror}). Name another one.")


def installed_versions(benchmark: Benchmark) -> dict[str, str]:
    """The releases that a result depends on."""
    packages = ("torch", "transformers", *benchmark.packages, "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of the file or none of it."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def summary(metrics: dict[str, Any]) -> str:
    """The scores for people."""

    def line(name: str, text: str) -> str:
        return f"  {name:<15} {text}"

    def rate(scores: dict[str, float]) -> str:
        return f"{scores['pc_success']:.1f} %  ({scores['pc_success_low']:.1f} to {scores['pc_success_high']:.1f})"

    head = "{checkpoint}: {n_episodes} episodes from seed {seed}, {n_action_steps} actions of each chunk executed"
    lines = [head.format(**metrics)]
    for task, scores in metrics.get("by_task", {}).items():
        lines.append(f"    {task:<28} {scores['pc_success']:.0f} %")
    for group, scores in metrics.get("by_group", {}).items():
        lines.append(line(group, rate(scores)))
    lines.append(line("success", rate(metrics)))
    for name in ("tasks", "groups"):
        if metrics.get(f"mean_over_{name}") is not None:
            lines.append(line(f"mean over {name}", f"{metrics[f'mean_over_{name}']:.1f} %"))
    if "avg_max_reward" in metrics:
        reward = "{avg_max_reward:.3f}  ({avg_max_reward_low:.3f} to {avg_max_reward_high:.3f})"
        lines.append(line("max reward", reward.format(**metrics)))
    lines.append(line("sum reward", f"{metrics['avg_sum_reward']:.1f}"))
    setting = "{ms_per_chunk:.1f} ms  (up to {num_envs} at once, {device}, {dtype}, {num_threads} threads)"
    lines.append(line("time per chunk", setting.format(**metrics)))
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate a SmolAndFast checkpoint in a simulator.")
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote, or a Hub id")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="pusht", help="the simulator (pusht)")
    parser.add_argument("--tasks", nargs="+", help="tasks of the benchmark (all)")
    parser.add_argument("--episodes", type=int, default=50, help="of each task (50)")
    parser.add_argument("--seed", type=int, default=1000, help="episode i resets its environment with seed + i")
    parser.add_argument("--num_envs", type=int, default=16, help="episodes played side by side (16)")
    parser.add_argument("--num_processes", type=int, default=1, help="among which the tasks are divided (1)")
    parser.add_argument("--full_render", action="store_true", help="metaworld: the images that LeRobot draws")
    parser.add_argument("--n_action_steps", type=int, help="actions executed of each chunk (the checkpoint's own)")
    parser.add_argument("--do_sample", action="store_true", help="sample tokens instead of taking the likeliest")
    parser.add_argument("--temperature", type=float, help="of sampling (1.0)")
    parser.add_argument("--delay", type=int, default=0, help="steps that the world goes on while a chunk is predicted")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="switch", help="what is executed meanwhile")
    parser.add_argument("--record", type=int, default=6, help="first episodes of each task to film, 0 for none (6)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/eval"))
    parser.add_argument("--backend", choices=sorted(BACKENDS), help="what runs a deployed policy (onnxruntime)")
    parser.add_argument("--max_tokens", type=int, help="tokens to write of a chunk, of a deployed policy (all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu, or a GPU (which is taken where there is one)")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Benchmark:
    """Complete the arguments, or stop with an error line; returns the benchmark."""
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
        parser.error(f"--checkpoint {args.checkpoint} is no deployed policy. Drop --backend and --max_tokens.")
    else:
        check_checkpoint(parser, args, benchmark)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
    """The policy of a benchmark, and the options of [`load_predict`] that load it; or an error line."""
    options = {name: getattr(args, name) for name in ("backend", "device", "max_tokens")}
    options |= {"dtype": getattr(torch, args.dtype), **sampling_options(args)}
    policy = load_checkpoint(parser, args, load_predict, **options)
    try:
        check_policy(benchmark, policy.action_dim, policy.state_dim, policy.image_keys, policy.fps)
    except ValueError as error:
        parser.error(f"--checkpoint {args.checkpoint}: {error}")
    args.n_action_steps = args.n_action_steps or policy.n_action_steps
    if args.n_action_steps > policy.chunk_size:
        parser.error(
            f"--n_action_steps is {args.n_action_steps}, a chunk has {policy.chunk_size} actions. Give at most that."
        )
    return policy, options


def play(
    args: argparse.Namespace, benchmark: Benchmark, policy: LoadedPolicy, load_options: dict[str, Any]
) -> RolloutResult:
    names = ("n_action_steps", "num_envs", "record", "delay", "strategy")
    options = {"seeds": range(args.seed, args.seed + args.episodes), **{name: getattr(args, name) for name in names}}
    tasks = args.tasks or list(benchmark.tasks)
    if args.num_processes > 1:
        return rollout_in_processes(args.num_processes, args.checkpoint, benchmark, tasks, load_options, **options)
    torch.manual_seed(args.seed)
    return rollout(benchmark, policy.predict, tasks=tasks, progress=True, **options)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    benchmark = check_arguments(parser, args)
    make_output_dir(parser, args.output_dir, NAMES)
    policy, load_options = load_for(parser, args, benchmark)
    result = play(args, benchmark, policy, load_options)
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
    for name in NAMES[1:]:  # of an earlier evaluation
        (args.output_dir / name).unlink(missing_ok=True)
    write_json(args.output_dir / "metrics.json", metrics)
    print(summary(metrics))
    if args.record:
        write_contact_sheet(args.output_dir / "rollouts.png", result.recordings, benchmark)
        write_video(args.output_dir / "rollouts.mp4", result.recordings, benchmark)
        print(f"  video           {args.output_dir / 'rollouts.mp4'}, as an image {args.output_dir / 'rollouts.png'}")
    print(f"  metrics         {args.output_dir / 'metrics.json'}")


if __name__ == "__main__":
    main()
