"""SmolAndFast's processor from a LeRobot data set, and the pipelines that LeRobot expects around a policy."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import (
    ACTION,
    OBS_STATE,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessorPil

from lerobot_policy_smolandfast.configuration_smolandfast import TINY, SMOLANDFASTConfig
from smolandfast import FastActionTokenizer, Normalizer, SmolAndFastProcessor, compute_statistics
from smolandfast.normalization_smolandfast import RELATIVE_ACTION
from smolandfast.tiny_smolandfast import make_tiny_processor

STATISTICS = ("min", "max", "q01", "q99")
MAX_FITTED_CHUNKS = 100_000  # evenly spaced frames of a larger data set say the same


def make_smolandfast_pre_post_processors(
    config: SMOLANDFASTConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """LeRobot's pipelines before and after the policy: names, batch dimension, device.

    Their normalisation steps are there because `lerobot-train` addresses them by name, and change nothing: the policy
    takes and gives robot units, see [`SMOLANDFASTConfig`]. So `dataset_stats` is of no use here.
    """
    features = {**config.input_features, **config.output_features}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features=features, norm_map=config.normalization_mapping),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features, norm_map=config.normalization_mapping),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )


def make_processor(
    config: SMOLANDFASTConfig,
    dataset_stats: dict[str, dict[str, Any]],
    dataset_meta: LeRobotDatasetMetadata,
) -> SmolAndFastProcessor:
    """The processor of a new policy: the data set's statistics and tasks, and a FAST tokenizer loaded or fitted.

    Args:
        config: Options of the policy.
        dataset_stats: `meta/stats.json` of the data set.
        dataset_meta: The data set, with its frames in `dataset_meta.root`: they are read to fit the tokenizer, and to
            measure relative actions.

    Raises:
        ValueError: Statistics that the normalisation needs are missing, or parts that do not fit together.
    """
    statistics = {}
    for key in (OBS_STATE, ACTION):
        found = dataset_stats.get(key, {})
        statistics[key] = {name: np.asarray(found[name]).tolist() for name in STATISTICS if name in found}
    if config.relative_actions or config.action_tokenizer is None:
        states, chunks = read_demonstrations(Path(dataset_meta.root), config.chunk_size)
    if config.relative_actions:
        statistics |= {RELATIVE_ACTION: compute_statistics(states, chunks)[RELATIVE_ACTION]}
    options = {"normalization": config.normalization, "n_state_bins": config.n_state_bins}
    options["use_relative_actions"] = config.relative_actions
    if config.action_tokenizer is None:
        normalizer = Normalizer(statistics, **options)
        normalized = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
        action_tokenizer = FastActionTokenizer.fit(
            normalized, config.fast_scale, config.fast_vocab_size, normalizer.action_scale
        )
        logging.info("Fitted a FAST tokenizer: %s", action_tokenizer.fit_report)
    else:
        action_tokenizer = FastActionTokenizer.from_pretrained(config.action_tokenizer)
    tasks = list(dataset_meta.tasks.index)
    default_task = tasks[0] if config.default_task is None else config.default_task
    logging.info("An empty task is read as %r", default_task)
    options["chunk_size"] = config.chunk_size
    if config.vlm_model_name == TINY:
        if config.scale_factor is not None:
            options["scale_factor"] = config.scale_factor
        return make_tiny_processor(action_tokenizer, statistics, default_task, tasks, **options)
    return SmolAndFastProcessor.from_vlm(
        config.vlm_model_name,
        action_tokenizer,
        statistics,
        1 if config.scale_factor is None else config.scale_factor,
        config.do_image_splitting,
        default_task=default_task,
        training_tasks=tasks,
        **options,
    )


def read_demonstrations(root: Path, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """States and the action chunks that start at them, from the parquet files of a LeRobot v3.0 data set.

    Past an episode's end its last action is repeated, as LeRobot's loader does.

    Args:
        root: Folder of the data set.
        chunk_size: Actions in a chunk.

    Returns:
        `(N, state_dim)` and `(N, chunk_size, action_dim)`, robot units, of at most 100,000 evenly spaced frames.

    Raises:
        ValueError: No frames in the folder (a data set that is streamed).
    """
    folder = root / "data"
    if not any(folder.rglob("*.parquet")):
        raise ValueError(
            f"{folder} has no parquet files, so no FAST tokenizer can be fitted. Do not stream the data set, or pass "
            "--policy.action_tokenizer=... and leave relative_actions off."
        )
    table = pyarrow.dataset.dataset(folder, format="parquet").to_table(
        columns=["index", "episode_index", OBS_STATE, ACTION]
    )
    table = table.sort_by("index")
    episode_index = table["episode_index"].to_numpy()
    states, actions = (_as_matrix(table[key]) for key in (OBS_STATE, ACTION))
    count = len(actions)
    rows = np.linspace(0, count - 1, min(count, MAX_FITTED_CHUNKS)).round().astype(int)
    last = np.searchsorted(episode_index, episode_index[rows], side="right") - 1  # the row where its episode ends
    return states[rows], actions[np.minimum(rows[:, None] + np.arange(chunk_size), last[:, None])]


def _as_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers or of equally long lists: `(N, dim)`."""
    values = column.combine_chunks()
    is_list = not pa.types.is_floating(values.type) and not pa.types.is_integer(values.type)
    return np.asarray(values.flatten() if is_list else values).reshape(len(column), -1)


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


def save_processor(processor: SmolAndFastProcessor, folder: Path) -> None:
    """Save the processor as JSON alone: `push_model_to_hub` uploads nothing else, and no code is needed here."""
    processor.save_pretrained(folder)
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text("utf-8")}))
    for path in (template, *folder.rglob("*.py")):
        path.unlink()


def load_processor(folder: Path) -> SmolAndFastProcessor:
    """Load a processor with the installed classes, whatever code lies beside it."""
    options, _ = SmolAndFastProcessor.get_processor_dict(folder)
    parts = [
        SmolVLMImageProcessorPil.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
        FastActionTokenizer.from_pretrained(folder / "action_tokenizer"),
    ]
    return SmolAndFastProcessor.from_args_and_dict(parts, options)
