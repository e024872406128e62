"""The model card of a PushT policy, written from what was measured.

Numbers come from the evaluation's `metrics.json`, the trainer's state, the configuration and the processor; the words
around them are in `model_card_template.md`. Pictures lie beside the card.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from PIL import Image
from pusht import ENV_ID

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["robotics", "vision-language-action", "imitation-learning", "fast", "smolvlm", "pusht"]
METRICS = {
    "pc_success": "Success rate, %",
    "avg_max_reward": "Average of the highest reward",
    "avg_sum_reward": "Average of the summed reward",
}
NUMBERS = ("pc_success_low", "pc_success_high", "avg_max_reward_low", "avg_max_reward_high", "ms_per_chunk")
COUNTS = ("n_episodes", "seed", "n_action_steps", "num_threads", "num_envs", "malformed_chunks")
KINDS = (
    dict.fromkeys((*METRICS, *NUMBERS), (int, float))
    | dict.fromkeys(COUNTS, int)
    | {"max_rewards": list, "versions": dict, "do_sample": bool, "dtype": str, "device": str}
)


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the `metrics.json` of an evaluation.

    Raises:
        OSError: the file is missing.
        ValueError: it is not what `eval_pusht.py` writes, or its numbers contradict each other.
    """
    mend = "Give the metrics.json that examples/eval_pusht.py wrote."
    metrics = _read_json(path, mend)
    for name, kind in KINDS.items():
        value = metrics.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} in {path} is {value!r}, expected a {_words(kind)}. {mend}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} in {path} is {value}, expected a finite number. {mend}")
    rewards, mean = metrics["max_rewards"], metrics["avg_max_reward"]
    are_numbers = all(isinstance(reward, (int, float)) for reward in rewards)
    if not are_numbers or len(rewards) != metrics["n_episodes"] or not np.isclose(np.mean(rewards), mean):
        raise ValueError(
            f"avg_max_reward in {path} is {mean} over n_episodes {metrics['n_episodes']}, but max_rewards, "
            f"{len(rewards)} values, says otherwise. {mend}"
        )
    return metrics


def read_trainer_state(path: Path) -> dict[str, Any]:
    """Read a `trainer_state.json`, as `Trainer` puts it into every checkpoint.

    Raises:
        OSError: the file is missing.
        ValueError: it holds no log of a training.
    """
    mend = "Give the trainer_state.json of the training's last checkpoint-* folder."
    state = _read_json(path, mend)
    history = state.get("log_history")
    is_log = isinstance(history, list) and all(isinstance(entry, dict) and "step" in entry for entry in history)
    if not is_log or not any("loss" in entry for entry in history):
        raise ValueError(f"log_history in {path} is no log of a training with its losses. {mend}")
    for name in ("global_step", "epoch", "train_batch_size"):
        if not isinstance(state.get(name), (int, float)):
            raise ValueError(f"{name} in {path} is {state.get(name)!r}, expected a number. {mend}")
    return state


def write_card(
    folder: Path,
    repo_id: str,
    model: Any,
    processor: Any,
    metrics: dict[str, Any] | None = None,
    trainer_state: dict[str, Any] | None = None,
    kept_step: int | None = None,
    contact_sheet: Path | None = None,
    license: str = "apache-2.0",
    datasets: Sequence[str] = ("lerobot/pusht",),
    base_model: str | None = None,
) -> ModelCard:
    """Write `README.md` into a folder, and what it shows: pictures and `evaluation.json`.

    Args:
        folder: A model repository, or a folder that is to become one.
        repo_id: `user/name`, where it will be found.
        model: The policy; its configuration and its number of parameters are read.
        processor: Its processor.
        metrics: See [`read_metrics`]. Without them the card says that the policy has not been evaluated.
        trainer_state: See [`read_trainer_state`].
        kept_step: The training's step whose weights these are.
        contact_sheet: `rollouts.png` of the evaluation.
        license: An identifier of the hub's.
        datasets: Hub ids of the demonstrations.
        base_model: Hub id of the model that training started from; `None` if it started from random weights.

    Raises:
        OSError: the contact sheet is no picture, or the folder cannot be written.
    """
    name, config = repo_id.split("/")[-1], model.config
    results = [] if metrics is None else _eval_results(metrics)
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="robotics",
        license=license,
        datasets=list(datasets),
        base_model=base_model,
        tags=TAGS,
        eval_results=results or None,
    )
    image, state = _first_observation(0 if metrics is None else metrics["seed"])
    image.save(folder / "observation.png")
    if metrics is not None:
        shown = {key: value for key, value in metrics.items() if key != "checkpoint"}  # a path of somebody's machine
        (folder / "evaluation.json").write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    if contact_sheet is not None:
        _copy_picture(contact_sheet, folder / "rollouts.png")
    if trainer_state is not None:
        plot_training(folder / "training_curve.png", trainer_state["log_history"])
    limits = processor.normalizer.action_limits
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        # `card_data` and the fields of `data` are there by themselves.
        num_parameters=_short(sum(parameter.numel() for parameter in model.parameters())),
        image_size=config.image_size or config.vision_config.image_size,
        num_visual_tokens=processor.image_seq_len,
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps if metrics is None else metrics["n_action_steps"],
        actions_shape=(1, config.chunk_size, config.action_dim),
        task=processor.default_task,
        state=state,
        action_low=limits[0].tolist(),
        action_high=limits[1].tolist(),
        metrics=metrics,
        seeds=None if metrics is None else f"{metrics['seed']} to {metrics['seed'] + metrics['n_episodes'] - 1}",
        training=None if trainer_state is None else _training(trainer_state, kept_step),
        contact_sheet=None if contact_sheet is None else "rollouts.png",
    )
    card.save(folder / "README.md")
    return card


def plot_training(path: Path, log_history: list[dict]) -> None:
    """Draw the losses and the scores in the simulator over the training's steps as a PNG."""

    def curve(name: str) -> tuple[list, list]:
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    losses.plot(*curve("loss"), color="tab:blue", linewidth=1, label="training")
    losses.plot(*curve("eval_loss"), "o-", color="tab:orange", label="held-out demonstrations")
    losses.set(xlabel="step", ylabel="loss", title="Loss of the action tokens")
    scores.plot(*curve("eval_avg_max_reward"), "o-", color="tab:green", label="average of the highest reward")
    steps, successes = curve("eval_pc_success")
    scores.plot(steps, [value / 100 for value in successes], "s--", color="tab:red", label="share of successes")
    scores.set(xlabel="step", title="PushT, episodes played while training", ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _eval_results(metrics: dict[str, Any]) -> list[EvalResult]:
    results = []
    for name, title in METRICS.items():
        args = {"n_episodes": metrics["n_episodes"], "first_seed": metrics["seed"]}
        args["last_seed"] = metrics["seed"] + metrics["n_episodes"] - 1
        args["n_action_steps"] = metrics["n_action_steps"]
        if f"{name}_low" in metrics:
            args["interval_95"] = [round(metrics[f"{name}_{end}"], 4) for end in ("low", "high")]
        results.append(
            EvalResult(
                task_type="robotics",
                task_name="Robotics",
                dataset_type="PushT-v0",
                dataset_name=f"PushT ({ENV_ID})",
                metric_type=name,
                metric_name=title,
                metric_value=round(metrics[name], 4),
                metric_args=args,
            )
        )
    return results


def _training(state: dict[str, Any], kept_step: int | None) -> dict[str, Any]:
    """What the template says of the training: every logged evaluation as a row."""
    rows: dict[int, dict[str, str]] = {}
    loss = ""
    for entry in state["log_history"]:
        loss = f"{entry['loss']:.3f}" if "loss" in entry else loss
        if any(name.startswith("eval_") for name in entry):
            row = rows.setdefault(entry["step"], {"step": f"{entry['step']:,}", "loss": loss})
            units = {"eval_loss": "{:.3f}", "eval_avg_max_reward": "{:.3f}", "eval_pc_success": "{:.0f} %"}
            row |= {name: text.format(entry[name]) for name, text in units.items() if name in entry}
    return {
        "num_steps": f"{state['global_step']:,}",
        "kept_step": f"{kept_step or state['global_step']:,}",
        "num_epochs": f"{state['epoch']:.1f}",
        "batch_size": state["train_batch_size"],
        "curve": "training_curve.png",
        "rows": list(rows.values()),
    }


def _first_observation(seed: int) -> tuple[Image.Image, list[float]]:
    """What the policy sees when the simulator is reset with this seed."""
    env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos")
    observation, _ = env.reset(seed=seed)
    env.close()
    return Image.fromarray(observation["pixels"]), observation["agent_pos"].round(2).tolist()


def _copy_picture(path: Path, target: Path) -> None:
    try:
        with Image.open(path) as picture:
            picture.save(target)
    except OSError as error:
        mend = "Give the rollouts.png that examples/eval_pusht.py wrote."
        raise OSError(f"The contact sheet {path} is no picture ({error}). {mend}") from error


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _words(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in kind) if isinstance(kind, tuple) else kind.__name__


def _read_json(path: Path, mend: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}). {mend}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. {mend}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object. {mend}")
    return content
