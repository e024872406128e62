"""The model card of a benchmark's policy, written from measurements.

The numbers come from the evaluation's `metrics.json`, the trainer's state, the configuration and the processor; the
text is in `model_card_template.md`. Images are saved next to the card.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from envs import Benchmark
from evaluate import write_json
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from PIL import Image

from smolandfast.checks_smolandfast import as_numbers
from smolandfast.files_smolandfast import read_json

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["robotics", "vision-language-action", "imitation-learning", "fast", "smolvlm"]
METRICS = {
    "pc_success": "Success rate, %",
    "mean_over_groups": "Success rate, mean over groups of tasks, %",
    "mean_over_tasks": "Success rate, mean over tasks, %",
    "avg_max_reward": "Average of the highest reward",
    "avg_sum_reward": "Average of the summed reward",
}
# What the card needs of `metrics.json`.
NUMBERS = ("pc_success", "pc_success_low", "pc_success_high", "avg_sum_reward", "ms_per_chunk", "n_episodes", "seed")
NUMBERS += ("n_action_steps", "num_threads", "num_envs")
REWARD = ("avg_max_reward", "avg_max_reward_low", "avg_max_reward_high")
OTHERS = ("versions", "do_sample", "dtype", "device")


def read_metrics(path: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Read the `metrics.json` of an evaluation.

    Raises:
        OSError: The file is missing.
        ValueError: It is not what `evaluate.py` writes for this benchmark, or its numbers contradict each other.
    """
    fix = "Give the metrics.json that examples/evaluate.py wrote."
    metrics = read_json(path, fix)
    if metrics.get("benchmark", benchmark.name) != benchmark.name:
        raise ValueError(f"{path} is of {metrics['benchmark']!r}, expected {benchmark.name!r}. Give its --benchmark.")
    for name in NUMBERS + (() if benchmark.max_reward is None else REWARD):
        value = metrics.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):  # not isinstance: True is an int
            raise ValueError(f"{name} in {path} is {value!r}, expected a finite number. {fix}")
    for name in OTHERS:
        if name not in metrics:
            raise ValueError(f"{path} has no {name}. {fix}")
    sources = {"pc_success": ("successes", 100)}
    if benchmark.max_reward is not None:
        sources["avg_max_reward"] = "max_rewards", 1
    for name, (source, scale) in sources.items():
        mean = scale * as_numbers(metrics.get(source), f"{source} in {path}", (metrics["n_episodes"],)).mean()
        if not np.isclose(mean, metrics[name]):
            raise ValueError(f"{name} in {path} is {metrics[name]}, expected {mean} by its {source}. {fix}")
    return metrics


def read_trainer_state(path: Path) -> dict[str, Any]:
    """Read a `trainer_state.json`, which `Trainer` saves in every checkpoint.

    Raises:
        OSError: The file is missing.
        ValueError: It is not the state of a training run.
    """
    fix = "Give the trainer_state.json of the training's last checkpoint-* folder."
    state = read_json(path, fix)
    history = state.get("log_history")
    is_log = isinstance(history, list) and all(isinstance(entry, dict) and "step" in entry for entry in history)
    if not is_log or not any("loss" in entry for entry in history):
        raise ValueError(f"log_history in {path} is not the log of a training run with its losses. {fix}")
    for name in ("global_step", "epoch", "train_batch_size"):
        if name not in state:
            raise ValueError(f"{path} has no {name}. {fix}")
    return state


@dataclass
class CardFacts:
    """What a card says in addition to the policy's own configuration.

    Args:
        metrics: See [`read_metrics`]. Without them the card says that the policy has not been evaluated.
        trainer_state: See [`read_trainer_state`].
        kept_step: The training step of the weights, by default the last.
        contact_sheet: `rollouts.png` of the evaluation.
        license: The Hub's identifier of the license.
        datasets: Hub ids of the demonstrations.
        base_model: Hub id of the model that training started from; `None` for random weights.
    """

    metrics: dict[str, Any] | None = None
    trainer_state: dict[str, Any] | None = None
    kept_step: int | None = None
    contact_sheet: Path | None = None
    license: str = "apache-2.0"
    datasets: Sequence[str] = ()
    base_model: str | None = None


def write_card(
    folder: Path, repo_id: str, benchmark: Benchmark, model: Any, processor: Any, facts: CardFacts
) -> ModelCard:
    """Write `README.md` and what it refers to, images and `evaluation.json`, into a folder.

    Args:
        repo_id: The repository's `user/name`.

    Raises:
        OSError: The contact sheet is not an image, or the folder cannot be written.
    """
    name, config, metrics = repo_id.split("/")[-1], model.config, facts.metrics
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="robotics",
        license=facts.license,
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        tags=[*TAGS, benchmark.name],
        eval_results=None if metrics is None else _eval_results(metrics, benchmark),
    )
    trained = [task for task, instruction in benchmark.tasks.items() if instruction in processor.training_tasks]
    task = (trained or list(benchmark.tasks))[0]
    scene = benchmark.make_scene(task)
    scene.reset(0 if metrics is None else metrics["seed"])
    keys = benchmark.image_keys
    observations = ["observation.png"] if len(keys) == 1 else [f"{key}.png" for key in keys]
    for name_of_image, image in zip(observations, scene.images(), strict=True):
        Image.fromarray(image).save(folder / name_of_image)
    state = scene.state.astype(float).round(3).tolist()
    scene.close()
    if metrics is not None:
        published = {key: value for key, value in metrics.items() if key != "checkpoint"}  # a local path
        write_json(folder / "evaluation.json", published)
    if facts.contact_sheet is not None:
        try:
            Image.open(facts.contact_sheet).save(folder / "rollouts.png")
        except OSError as error:
            fix = "Give the rollouts.png that examples/evaluate.py wrote."
            raise OSError(f"The contact sheet {facts.contact_sheet} is not an image ({error}). {fix}") from error
    if facts.trainer_state is not None:
        plot_training(folder / "training_curve.png", facts.trainer_state["log_history"], benchmark)
    low, high = processor.normalizer.action_limits
    instruction = processor.default_task or benchmark.tasks[task]
    card = ModelCard.from_template(
        data,  # its fields need not be repeated here
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        num_parameters=f"{model.num_parameters() / 1e6:.1f} M",
        image_size=config.image_size or config.vision_config.image_size,
        num_visual_tokens=processor.image_seq_len,
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps if metrics is None else metrics["n_action_steps"],
        actions_shape=(1, config.chunk_size, config.action_dim),
        benchmark=benchmark,
        num_tasks=max(len(trained), 1),
        task=instruction,
        task_literal=repr(instruction),
        observations=observations,
        state=state,
        action_low=low.tolist(),
        action_high=high.tolist(),
        metrics=metrics,
        seeds=None if metrics is None else "{} to {}".format(*_seeds(metrics)),
        training=None if facts.trainer_state is None else _training(facts.trainer_state, facts.kept_step),
        contact_sheet=None if facts.contact_sheet is None else "rollouts.png",
    )
    card.save(folder / "README.md")
    return card


def plot_training(path: Path, log_history: list[dict], benchmark: Benchmark) -> None:
    """Plot the losses, and the scores in the simulator, over the training steps as a PNG."""

    def curve(name: str) -> np.ndarray:  # (2, N): steps and values
        return np.array([(entry["step"], entry[name]) for entry in log_history if name in entry]).reshape(-1, 2).T

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    losses.plot(*curve("loss"), color="tab:blue", linewidth=1, label="training")
    losses.plot(*curve("eval_loss"), "o-", color="tab:orange", label="held-out demonstrations")
    losses.set(xlabel="step", ylabel="loss", title="Loss of the action tokens")
    if benchmark.max_reward is not None:
        scores.plot(*curve("eval_avg_max_reward"), "o-", color="tab:green", label="average of the highest reward")
    steps, successes = curve("eval_pc_success")
    scores.plot(steps, successes / 100, "s--", color="tab:red", label="share of successes")
    title = f"{benchmark.card['title']}, episodes played while training"
    scores.set(xlabel="step", title=title, ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _seeds(metrics: dict[str, Any]) -> tuple[int, int]:
    """The first and the last seed, the same for each task."""
    return metrics["seed"], metrics["seed"] + metrics["n_episodes"] // len(metrics.get("by_task", [1])) - 1


def _eval_results(metrics: dict[str, Any], benchmark: Benchmark) -> list[EvalResult]:
    env_id, (first, last) = benchmark.card["env_id"], _seeds(metrics)
    evaluation = {
        "task_type": "robotics",
        "task_name": "Robotics",
        "dataset_type": env_id.split("/")[-1],
        "dataset_name": f"{benchmark.card['title']} ({env_id})",
    }
    args = {"n_episodes": metrics["n_episodes"], "first_seed": first, "last_seed": last}
    args["n_action_steps"] = metrics["n_action_steps"]
    results = []
    for name, title in METRICS.items():
        if metrics.get(name) is None:
            continue
        result = {"metric_type": name, "metric_name": title, "metric_value": round(metrics[name], 4)}
        interval = [round(metrics[f"{name}_{end}"], 4) for end in ("low", "high") if f"{name}_{end}" in metrics]
        metric_args = args | ({"interval_95": interval} if interval else {})
        results.append(EvalResult(**evaluation, **result, metric_args=metric_args))
    return results


def _training(state: dict[str, Any], kept_step: int | None) -> dict[str, Any]:
    """What the template shows of the training: a row for each step with an evaluation."""
    formats = {"eval_loss": "{:.3f}", "eval_avg_max_reward": "{:.3f}", "eval_pc_success": "{:.0f} %"}
    rows: dict[int, dict[str, str]] = {}
    loss = ""
    for entry in state["log_history"]:
        loss = f"{entry['loss']:.3f}" if "loss" in entry else loss
        if any(name.startswith("eval_") for name in entry):
            row = rows.setdefault(entry["step"], {"step": f"{entry['step']:,}", "loss": loss})
            row |= {name: text.format(entry[name]) for name, text in formats.items() if name in entry}
    return {
        "num_steps": f"{state['global_step']:,}",
        "kept_step": f"{kept_step or state['global_step']:,}",
        "num_epochs": f"{state['epoch']:.1f}",
        "batch_size": state["train_batch_size"],
        "curve": "training_curve.png",
        "rows": list(rows.values()),
    }
