"""Compare deployed policies with PyTorch: equal chunks, milliseconds, memory, start-up time, size on disk.

    python benchmarks/speed/deployment.py speed
    python benchmarks/speed/deployment.py speed --checkpoint checkpoints/so101-tiny
    python benchmarks/speed/deployment.py speed_256m --rounds 3     # SmolVLM2-256M's shapes, random weights
    python benchmarks/speed/deployment.py equal

Both sides alternate in one process; each figure is a median. Nothing else should run on the machine. Needs
`pip install -e ".[examples,deployment]"`; OpenVINO is measured if it is installed. Writes
`benchmarks/results/deployment_<part>.json` and `.md`, with the name of another `--checkpoint` than the default.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from bench import RESULTS, describe_machine, seconds, write_table
from bench_256m import TEXT, VISION
from evaluate import load_policy, load_predict, make_predict
from releases import collect

from smolandfast import FastActionTokenizer, SmolAndFastConfig, SmolAndFastForActionPrediction, compute_statistics
from smolandfast.deployment.export import export_policy
from smolandfast.deployment.runtime import DeployedPolicy
from smolandfast.training import make_tiny_processor

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "checkpoints/pusht-tiny"
BACKENDS = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
WEIGHTS = ("float32", "int8")
# Run in a new process, which prints the seconds to its first chunk and its peak memory.
START = r"""
import json, re, sys, time
start = time.perf_counter()
import numpy as np
images, state = [np.zeros(({side}, {side}, 3), dtype=np.uint8)] * {cameras}, np.zeros({state_dim})
{load}
{predict}
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())  # Linux
print(json.dumps([seconds, int(peak[1]) / 1000]))
"""
LOAD_TORCH = """
import torch
from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
model = SmolAndFastForActionPrediction.from_pretrained({folder!r})
processor = SmolAndFastProcessor.from_pretrained({folder!r})
"""
PREDICT_TORCH = (
    "processor.post_process_actions(model.generate(**processor(images=images, text={task!r}, state=state)))"
)
LOAD_DEPLOYED = """
sys.path.insert(0, {folder!r})
from smolandfast_runtime import DeployedPolicy
policy = DeployedPolicy({folder!r}, {backend!r})
"""
PREDICT_DEPLOYED = "policy.predict(images, {task!r}, state)"


def make_checkpoint_256m(folder: Path) -> None:
    """Random weights of SmolVLM2-256M's shapes at scale 4, whose chunks take eight tokens."""
    rng = np.random.default_rng(0)
    actions, states = rng.uniform(-1, 1, (500, 4, 2)), rng.uniform(-1, 1, (500, 2))
    few = FastActionTokenizer.fit(actions, scale=10.0, vocab_size=1024)
    symbols = few.max_coefficient - few.min_coefficient + 1  # without merges, a token is one coefficient
    tokenizer = FastActionTokenizer.fit(actions, scale=10.0, vocab_size=symbols)
    processor = make_tiny_processor(
        tokenizer, compute_statistics(states, actions), "Push it.", scale_factor=4, image_size=VISION["image_size"]
    )
    torch.manual_seed(0)
    image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.image_token)
    sizes = {"vision_config": VISION, "text_config": TEXT, "image_token_id": image_token_id, "n_action_steps": 4}
    config = SmolAndFastConfig(**sizes, **processor.model_kwargs())
    SmolAndFastForActionPrediction(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def count_equal(checkpoint: str, policies: dict[str, DeployedPolicy], count: int) -> dict[str, float]:
    """Count the chunks that equal PyTorch's bit for bit, on observations of PushT episodes."""
    seen = collect(checkpoint, range(6000, 6000 + max(2, count // 12)), count)
    model, processor = load_policy(checkpoint, dtype=torch.float32)
    equal, differences = dict.fromkeys(policies, 0), {name: [] for name in policies}
    for image, state in zip(seen["images"], seen["states"], strict=True):
        output = model.generate(
            **processor(images=image, state=state), return_dict_in_generate=True, output_scores=True
        )
        expected, actions = processor.report(output, state), processor.post_process_actions(output)
        for name, policy in policies.items():
            report = policy.report(image, None, state)
            equal[name] += np.array_equal(report["actions"], actions)
            differences[name].append(abs(report["log_probability"] - expected["log_probability"])[0])
    figures = {}
    for name in policies:
        figures[f"{name}: chunks of {count} that are PyTorch's"] = equal[name]
        figures[f"{name}: largest difference of the mean log-probability"] = max(differences[name])
    return figures


def installed_megabytes(*names: str) -> float:
    """Size of installed packages and their dependencies."""
    sizes, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in sizes:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # optional on this platform
        sizes[name] = sum(os.path.getsize(f.locate()) for f in package.files or () if f.locate().is_file())
        requirements = map(Requirement, package.requires or ())
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sum(sizes.values()) / 1e6


def measure_start(code: str) -> tuple[float, float]:
    """Seconds to the first chunk and megabytes of a new process; the second of two runs, with cached files."""
    for _ in range(2):
        printed = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(json.loads(printed.splitlines()[-1]))


def measure_speed(checkpoint: str, folders: dict[str, Path], rounds: int) -> dict[str, float]:
    """Milliseconds of a chunk on one and two threads; start-up time and memory of a new process."""
    kinds = [(backend, weights) for backend in BACKENDS for weights in WEIGHTS]
    model, processor = load_policy(checkpoint, dtype=torch.float32)
    side = processor.image_processor.max_image_size["longest_edge"]
    cameras, rng = len(processor.image_keys), np.random.default_rng(0)
    images = list(rng.integers(0, 256, (cameras, side, side, 3), dtype=np.uint8))
    state = np.mean(processor.normalizer.state_bounds, axis=0)
    task = processor.default_task or processor.training_tasks[0]
    figures = {}
    if processor.fps is not None:
        figures["budget, the actions executed of a chunk: ms"] = 1e3 * model.config.n_action_steps / processor.fps
    for threads in (1, 2):
        torch.set_num_threads(threads)
        predicts = {"PyTorch, float32": make_predict(model, processor)}
        predicts |= {
            f"{backend}, {weights}": load_predict(folders[weights], backend).predict for backend, weights in kinds
        }
        times = seconds(*[lambda p=p: p([images], state[None], [task]) for p in predicts.values()], repeats=rounds)
        for name, duration in zip(predicts, times, strict=True):
            figures[f"{name}, threads {threads}: ms a chunk"] = duration * 1e3
            figures[f"{name}, threads {threads}: times PyTorch float32"] = times[0] / duration
    del predicts, model
    starts = {"PyTorch, float32": (LOAD_TORCH.format(folder=checkpoint), PREDICT_TORCH.format(task=task))}
    for backend, weights in kinds:
        load = LOAD_DEPLOYED.format(folder=str(folders[weights]), backend=backend)
        starts[f"{backend}, {weights}"] = load, PREDICT_DEPLOYED.format(task=task)
    for name, (load, predict) in starts.items():
        code = START.format(load=load, predict=predict, side=side, cameras=cameras, state_dim=len(state))
        figures[f"{name}: s from start to the first chunk"], figures[f"{name}: MB of memory"] = measure_start(code)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "speed_256m", "equal"))
    parser.add_argument("--checkpoint", default=str(DEFAULT))
    parser.add_argument("--observations", type=int, default=1000, help="to compare chunks on (1000)")
    parser.add_argument("--export_dir", type=Path, help="keep the exported policies here, and reuse them")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, exported = args.checkpoint, args.export_dir or Path(temporary)
        if args.part == "speed_256m":
            checkpoint = str(exported / "checkpoint")
            if not (exported / "checkpoint").exists():
                make_checkpoint_256m(exported / "checkpoint")
        folders = {weights: exported / weights for weights in WEIGHTS}
        for weights, folder in folders.items():
            if not folder.exists():
                export_policy(checkpoint, folder, weights)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            figures[f"folder, {weights}: MB"] = size / 1e6
        if args.part == "equal":
            torch.set_num_threads(1)
            policies = {f"{b}, {w}": DeployedPolicy(folders[w], b, 1) for b in BACKENDS for w in WEIGHTS}
            figures |= count_equal(checkpoint, policies, args.observations)
        else:
            figures |= measure_speed(checkpoint, folders, args.rounds)
            stock = "torch", "transformers", "scipy", "pillow"
            figures["installed, PyTorch and Transformers: MB"] = installed_megabytes(*stock)
            for backend in BACKENDS:
                figures[f"installed, {backend}: MB"] = installed_megabytes(backend, "tokenizers", "numpy", "pillow")
    machine = describe_machine() | {name: version(name) for name in BACKENDS} | {"rounds": args.rounds}
    results = {name: float(value) for name, value in figures.items()}
    name = f"deployment_{args.part}"
    if args.checkpoint != str(DEFAULT):
        name += f"_{Path(args.checkpoint).name}"
    write_table(RESULTS / name, machine, results)


if __name__ == "__main__":
    main()
