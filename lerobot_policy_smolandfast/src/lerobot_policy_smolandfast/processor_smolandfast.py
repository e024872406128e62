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
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessorPil

from smolandfast import FastActionTokenizer, Normalizer, SmolAndFastProcessor, compute_statistics
from smolandfast.normalization_smolandfast import RELATIVE_ACTION
from smolandfast.training import make_tiny_processor

from .configuration_smolandfast import TINY, SMOLANDFASTConfig

STATISTICS = ("min", "max", "q01", "q99")
MAX_FITTED_CHUNKS = 100_000  # enough to fit a tokenizer; of a larger data set, evenly spaced frames

# LeRobot looks for this name. Its pipelines do not normalise: `normalization_mapping` is IDENTITY throughout.
make_smolandfast_pre_post_processors = make_default_pre_post_processors


def make_processor(
    config: SMOLANDFASTConfig, dataset_stats: dict[str, dict[str, Any]], dataset_meta: LeRobotDatasetMetadata
) -> SmolAndFastProcessor:
    """The processor of a new policy: the data set's statistics and tasks, and a FAST tokenizer, loaded or fitted."""
    statistics = {
        key: {name: value.tolist() for name, value in dataset_stats.get(key, {}).items() if name in STATISTICS}
        for key in (OBS_STATE, ACTION)
    }
    options = {
        "normalization": config.normalization,
        "n_state_bins": config.n_state_bins,
        "use_relative_actions": config.relative_actions,
    }
    if config.relative_actions or config.action_tokenizer is None:
        states, chunks = read_demonstrations(dataset_meta.root, config.chunk_size)
    if config.relative_actions:
        statistics[RELATIVE_ACTION] = compute_statistics(states, chunks)[RELATIVE_ACTION]
    if config.action_tokenizer is None:
        normalizer = Normalizer(statistics, **options)
        chunks = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
        action_tokenizer = FastActionTokenizer.fit(
            chunks, config.fast_scale, config.fast_vocab_size, normalizer.action_scale
        )
        logging.info("Fitted a FAST tokenizer: %s", action_tokenizer.fit_report)
    else:
        action_tokenizer = FastActionTokenizer.from_pretrained(config.action_tokenizer)
    tasks = list(dataset_meta.tasks.index)
    default_task = tasks[0] if config.default_task is None else config.default_task
    logging.info("An empty task is read as %r", default_task)
    options |= {name: getattr(config, name) for name in ("chunk_size", "scale_factor")}
    options |= {"image_keys": list(config.image_features), "fps": dataset_meta.fps}
    if config.vlm_model_name == TINY:
        return make_tiny_processor(action_tokenizer, statistics, default_task, tasks, **options)
    options |= {"default_task": default_task, "training_tasks": tasks, "do_image_splitting": config.do_image_splitting}
    return SmolAndFastProcessor.from_vlm(config.vlm_model_name, action_tokenizer, statistics, **options)


def read_demonstrations(root: Path, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """States and the action chunks that start at them, from the parquet files of a LeRobot v3.0 data set.

    Past the end of an episode its last action is repeated, as LeRobot's loader does.

    Returns:
        `(N, state_dim)` and `(N, chunk_size, action_dim)`, robot units, of at most 100,000 evenly spaced frames.
    """
    folder = root / "data"
    if not any(folder.rglob("*.parquet")):
        raise ValueError(
            f"{folder} has no parquet files, so no FAST tokenizer can be fitted. Do not stream the data set, or pass "
            "--policy.action_tokenizer=... and leave relative_actions off."
        )
    table = pq.read_table(folder, columns=["index", "episode_index", OBS_STATE, ACTION]).sort_by("index")
    # A vector of one number is stored as a scalar.
    columns = [table[key].combine_chunks() for key in (OBS_STATE, ACTION)]
    columns = [column.flatten() if pa.types.is_nested(column.type) else column for column in columns]
    states, actions = (np.asarray(column).reshape(len(table), -1) for column in columns)
    episodes = table["episode_index"].to_numpy()
    rows = np.linspace(0, len(table) - 1, min(len(table), MAX_FITTED_CHUNKS)).round().astype(int)
    last = np.searchsorted(episodes, episodes[rows], side="right") - 1  # the row where its episode ends
    return states[rows], actions[np.minimum(rows[:, None] + np.arange(chunk_size), last[:, None])]


def processor_options(processor: SmolAndFastProcessor) -> dict[str, Any]:
    """The options of [`SMOLANDFASTConfig`] that a processor decides."""
    return {
        "scale_factor": processor.scale_factor,
        "do_image_splitting": bool(processor.image_processor.do_image_splitting),
        "chunk_size": processor.chunk_size,
        "n_state_bins": processor.n_state_bins,
        "normalization": processor.normalization,
        "relative_actions": processor.use_relative_actions,
    }


def load_processor(folder: Path) -> SmolAndFastProcessor:
    """Load a processor with the installed classes, whatever code is saved beside it."""
    options, _ = SmolAndFastProcessor.get_processor_dict(folder)
    parts = [
        SmolVLMImageProcessorPil.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
        FastActionTokenizer.from_pretrained(folder / "action_tokenizer"),
    ]
    return SmolAndFastProcessor.from_args_and_dict(parts, options)
