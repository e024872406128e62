"""SmolAndFast's processor from a LeRobot data set, and the pipelines that LeRobot expects around a policy."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.processor import make_default_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

from smolandfast import FastActionTokenizer, Normalizer, SmolAndFastProcessor
from smolandfast.checks_smolandfast import as_numbers
from smolandfast.normalization_smolandfast import RELATIVE_ACTION
from smolandfast.tokenization_fast_action import MAX_FITTED_CHUNKS
from smolandfast.training import make_tiny_processor

from .configuration_smolandfast import TINY, SMOLANDFASTConfig

STATISTICS = ("min", "max", "q01", "q99")
MAX_FITTED_VALUES = 20_000_000  # chunk_size * action_dim a chunk; fitting takes about 150 bytes a value

# LeRobot looks for this name. Its pipelines do not normalise: `normalization_mapping` is IDENTITY throughout.
make_smolandfast_pre_post_processors = make_default_pre_post_processors


def make_processor(
    config: SMOLANDFASTConfig, dataset_stats: dict[str, dict[str, Any]], dataset_meta: LeRobotDatasetMetadata
) -> SmolAndFastProcessor:
    """The processor of a new policy: the data set's statistics and tasks, and a FAST tokenizer, loaded or fitted."""
    tasks, default_task = choose_tasks(list(dataset_meta.tasks.index), config.default_task)
    statistics = {
        key: {name: value.tolist() for name, value in dataset_stats.get(key, {}).items() if name in STATISTICS}
        for key in (OBS_STATE, ACTION)
    }
    options = {
        "normalization": config.normalization,
        "n_state_bins": config.n_state_bins,
        "use_relative_actions": config.relative_actions,
    }
    if config.relative_actions:
        statistics[RELATIVE_ACTION] = relative_statistics(*read_frames(dataset_meta.root), config.chunk_size)
    if config.action_tokenizer is None:
        normalizer = Normalizer(statistics, **options)
        states, chunks = read_demonstrations(dataset_meta.root, config.chunk_size)
        chunks = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
        action_tokenizer = FastActionTokenizer.fit(
            chunks, config.fast_scale, config.fast_vocab_size, normalizer.action_scale
        )
        logging.info("Fitted a FAST tokenizer: %s", action_tokenizer.fit_report)
    else:
        action_tokenizer = FastActionTokenizer.from_pretrained(config.action_tokenizer)
    options |= {name: getattr(config, name) for name in ("chunk_size", "scale_factor", "state_names", "action_names")}
    options |= {"image_keys": list(config.image_features), "fps": dataset_meta.fps}
    if config.vlm_model_name == TINY:
        return make_tiny_processor(action_tokenizer, statistics, default_task, tasks, **options)
    options |= {"default_task": default_task, "training_tasks": tasks, "do_image_splitting": config.do_image_splitting}
    return SmolAndFastProcessor.from_vlm(config.vlm_model_name, action_tokenizer, statistics, **options)


def choose_tasks(tasks: list[str], default_task: str | None) -> tuple[list[str], str]:
    """The tasks of a data set that a policy learns, and the one that replaces an empty task ("" for none)."""
    named = [task for task in tasks if not is_blank(task)]
    if default_task is None:
        default_task = named[0] if len(tasks) == len(named) == 1 else ""
    if len(named) < len(tasks) and not default_task:
        raise ValueError(
            f"The data set has an empty task next to {named}, and there is no default_task to replace it. Name "
            "the task with --policy.default_task=..., or write it into the data set."
        )
    logging.info("An empty task is %s", f"read as {default_task!r}" if default_task else "refused")
    return named, default_task


def learn_tasks(processor: SmolAndFastProcessor, config: SMOLANDFASTConfig, tasks: list[str]) -> None:
    """Add the tasks of a data set to a loaded policy, and choose its default task among them.

    A default task that was set on the command line, or that the data set has, stays.
    """
    default_task = config.default_task
    if default_task in (None, processor.default_task):
        default_task = processor.default_task if processor.default_task in tasks else None
    named, config.default_task = choose_tasks(tasks, default_task)
    if processor.training_tasks is not None:
        processor.training_tasks = list(dict.fromkeys([*processor.training_tasks, *named]))


def is_blank(task: object) -> bool:
    """Whether a task is missing or empty."""
    return task is None or (isinstance(task, str) and not task.strip())


def read_frames(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All frames of a LeRobot v3.0 data set, from its parquet files, in the order of their index.

    Returns:
        States `(N, state_dim)`, actions `(N, action_dim)`, both float64 in robot units, and the row of the last frame
        of each frame's episode, `(N,)`.
    """
    folder = root / "data"
    if not any(folder.rglob("*.parquet")):
        raise ValueError(
            f"{folder} has no parquet files, so no FAST tokenizer can be fitted. Do not stream the data set, or pass "
            "--policy.action_tokenizer=... and leave relative_actions off."
        )
    table = pq.read_table(folder, columns=["index", "episode_index", OBS_STATE, ACTION]).sort_by("index")
    # A vector of one number is stored as a scalar.
    columns = {key: table[key].combine_chunks() for key in (OBS_STATE, ACTION)}
    columns = {key: x.flatten() if pa.types.is_nested(x.type) else x for key, x in columns.items()}
    states, actions = (as_numbers(np.asarray(x).reshape(len(table), -1), key) for key, x in columns.items())
    episodes = table["episode_index"].to_numpy()
    return states, actions, np.searchsorted(episodes, episodes, side="right") - 1


def read_demonstrations(root: Path, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """States and the action chunks that start at them, to fit a FAST tokenizer.

    Past the end of an episode its last action is repeated, as LeRobot's loader does.

    Returns:
        `(N, state_dim)` and `(N, chunk_size, action_dim)`, robot units: all frames, or evenly spaced ones within
        `MAX_FITTED_CHUNKS` and `MAX_FITTED_VALUES`.
    """
    states, actions, last = read_frames(root)
    size = min(len(states), MAX_FITTED_CHUNKS, max(1, MAX_FITTED_VALUES // (chunk_size * actions.shape[1])))
    rows = np.linspace(0, len(states) - 1, size).round().astype(int)
    return states[rows], actions[np.minimum(rows[:, None] + np.arange(chunk_size), last[rows, None])]


def relative_statistics(
    states: np.ndarray, actions: np.ndarray, last: np.ndarray, chunk_size: int
) -> dict[str, list[float]]:
    """The statistics of `relative_action`, see [`compute_statistics`], over all frames, one dimension at a time."""
    rows, columns = np.arange(len(states)), []
    differences = np.empty((len(states), chunk_size))  # the only large array
    for state, action in zip(states.T, actions.T, strict=True):
        for step in range(chunk_size):
            differences[:, step] = action[np.minimum(rows + step, last)] - state
        low, high = differences.min(), differences.max()
        columns.append([low, high, *np.quantile(differences, [0.01, 0.99], overwrite_input=True)])
    return dict(zip(STATISTICS, np.array(columns).T.tolist(), strict=True))


def processor_options(processor: SmolAndFastProcessor) -> dict[str, Any]:
    """The options of [`SMOLANDFASTConfig`] that the processor fixes."""
    return {
        "scale_factor": processor.scale_factor,
        "do_image_splitting": bool(processor.image_processor.do_image_splitting),
        "chunk_size": processor.chunk_size,
        "n_state_bins": processor.n_state_bins,
        "normalization": processor.normalization,
        "relative_actions": processor.use_relative_actions,
    }
