"""SmolAndFast's processor from a LeRobot data set, and on LeRobot's batches, in the pipelines around a policy."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import (
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from transformers import BatchFeature

from smolandfast import FastActionTokenizer, Normalizer, SmolAndFastProcessor
from smolandfast.checks_smolandfast import as_numbers
from smolandfast.normalization_smolandfast import RELATIVE_ACTION
from smolandfast.prompt_smolandfast import name_tasks
from smolandfast.tokenization_fast_action import MAX_FITTED_CHUNKS
from smolandfast.training import evenly_spaced, make_tiny_processor

from .configuration_smolandfast import TINY, SMOLANDFASTConfig

STATISTICS = ("min", "max", "q01", "q99")
MAX_FITTED_VALUES = 20_000_000  # chunk_size * action_dim a chunk; fitting takes about 150 bytes a value

# The readers of this process's policies, by fingerprint. LeRobot rebuilds a saved step from its JSON only.
READERS: WeakValueDictionary[str, "BatchReader"] = WeakValueDictionary()


class BatchReader:
    """Turns LeRobot's batches into model inputs, for one policy.

    Args:
        processor: Of the policy.
        config: Of the policy; its `state_names` are for messages.
        fingerprint: The `processor_fingerprint` of the policy's model, by which a [`SmolAndFastProcessorStep`] finds
            this reader.
    """

    def __init__(self, processor: SmolAndFastProcessor, config: SMOLANDFASTConfig, fingerprint: str):
        self.processor = processor
        self.config = config
        self._joints_warned_of: set[str] = set()
        READERS[fingerprint] = self

    def __call__(self, batch: dict[str, Any], with_actions: bool = False) -> BatchFeature:
        """The output of the processor, on the CPU.

        Args:
            batch: For each camera `(B, 3, H, W)` floats in [0, 1], `observation.state` `(B, state_dim)` and `task`, B
                instructions; the default task replaces an empty one.
            with_actions: For training: also read `action`, `(B, chunk_size, action_dim)`, for `labels`.

        Raises:
            ValueError: Features are missing, or a task is empty and there is no default task.
        """
        cameras = self.processor.image_keys
        missing = [key for key in (*cameras, OBS_STATE) if key not in batch]
        if missing:
            raise ValueError(
                f"The batch has no {', '.join(missing)}, only {sorted(batch)}. Rename features with --rename_map, or "
                "train a policy for these."
            )
        if with_actions and batch.get(ACTION) is None:
            raise ValueError(
                f"The batch has no {ACTION}, only {sorted(batch)}. Training needs the demonstrated actions; use "
                "predict_action_chunk to predict some."
            )
        self._warn_of_unseen_states(batch[OBS_STATE])
        return self.processor(
            images={key: read_images(batch[key]) for key in cameras},
            text=self._read_tasks(batch),
            state=batch[OBS_STATE],
            actions=batch[ACTION] if with_actions else None,
        )

    def _read_tasks(self, batch: dict[str, Any]) -> str | list[str] | None:
        """The tasks, of which the processor replaces empty ones by the default task."""
        tasks = batch.get("task")
        is_empty = any(map(is_blank, [tasks] if tasks is None or isinstance(tasks, str) else tasks))
        if is_empty and is_blank(self.processor.default_task):
            raise ValueError(
                "The task is empty, and the policy has no default_task. Pass one of the tasks of the training "
                f"(lerobot-rollout --task=...): {name_tasks(self.processor.training_tasks or [])}. Or choose one with "
                "--policy.default_task=...."
            )
        return tasks

    def _warn_of_unseen_states(self, states: Tensor) -> None:
        """Warn once for each joint outside the range of the data, a sign of a robot that reports other units."""
        statistics = self.processor.statistics[OBS_STATE]
        low, high = (np.asarray(statistics[name], np.float32) for name in ("min", "max"))
        states = states.detach().float().cpu().numpy()
        if states.shape[1:] != low.shape:
            return  # the processor refuses it
        warned = []
        for joint in np.flatnonzero(((states < low) | (states > high)).any(axis=0)):
            name = self.config.state_names[joint] if self.config.state_names else f"{OBS_STATE}[{joint}]"
            if name not in self._joints_warned_of:
                self._joints_warned_of.add(name)
                values = states[:, joint]
                value = values[np.argmax(np.maximum(low[joint] - values, values - high[joint]))]
                warned.append(f"{name} is {value:.6g}, the data has {low[joint]:.6g} to {high[joint]:.6g}")
        if warned:
            logging.warning(
                "The robot's state is outside the range of the training data, and is clamped: %s. If this concerns "
                "many joints, check the robot's units (degrees or percent) and its calibration.",
                "; ".join(warned),
            )


def read_images(images: Tensor) -> list[Tensor]:
    """A camera's batch `(B, 3, H, W)` as the processor reads it: uint8 instead of floats in [0, 1], on the CPU."""
    size = 1 if images.device.type == "cpu" else len(images)  # a CPU's cache holds one image
    return [image for part in images.detach().split(size) for image in quantize(part).cpu()]


def quantize(images: Tensor) -> Tensor:
    """Round `(B, 3, H, W)` on their device, so that a GPU sends a quarter of the bytes.

    The result is stored pixel by pixel, as PIL reads it. Values outside [0, 1] are left to the processor.
    """
    if images.is_floating_point() and images.numel() > 0:
        low, high = images.aminmax()
        if low >= 0 and high <= 1:
            images = (images.float() * 255).round_().to(torch.uint8)
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


@ProcessorStepRegistry.register("smolandfast_processor")
class SmolAndFastProcessorStep(ProcessorStep):
    """Turns a training batch into the model's inputs, with the processor of the policy in training.

    An observation without an action passes as it is: LeRobot calls the pipeline for each action, but the policy needs
    inputs only once for each chunk, and prepares them itself.

    Args:
        fingerprint: Of the policy's processor. The policy must exist in this process, as in all of LeRobot's commands.
    """

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint
        self._reader = READERS.get(fingerprint)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        if transition.get(TransitionKey.ACTION) is None:
            return transition
        self._reader = self._reader or READERS.get(self.fingerprint)
        if self._reader is None:
            raise ValueError(
                f"No policy with processor_fingerprint {self.fingerprint!r} is loaded, and it has the processor of "
                "this pipeline. Load the policy of the same folder first."
            )
        observation = transition.get(TransitionKey.OBSERVATION) or {}
        batch = {**observation, **(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {})}
        inputs = self._reader({**batch, ACTION: transition[TransitionKey.ACTION]}, with_actions=True)
        return {**transition, TransitionKey.OBSERVATION: {**observation, **inputs}}

    def get_config(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def make_smolandfast_pre_post_processors(
    config: SMOLANDFASTConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The pipelines before and after a policy; LeRobot looks for this name.

    LeRobot's own steps do not normalise, since `normalization_mapping` is IDENTITY throughout. They are kept because
    LeRobot's commands override their options.

    Args:
        config: That of a policy: `policy.config`, after the policy is made or loaded.
    """
    if config.processor_fingerprint is None:
        raise ValueError("config belongs to no policy. Make or load the policy first, and pass policy.config.")
    steps = make_default_policy_processor_steps(config, dataset_stats)
    step = SmolAndFastProcessorStep(config.processor_fingerprint)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, step, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )


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
    dims = config.reference_dims if config.relative_actions else None
    if config.relative_actions:
        statistics[RELATIVE_ACTION] = relative_statistics(*read_frames(dataset_meta.root), config.chunk_size, dims)
    if config.action_tokenizer is None:
        normalizer = Normalizer(statistics, **options, reference_dims=dims)
        states, chunks = read_demonstrations(dataset_meta.root, config.chunk_size)
        chunks = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
        action_tokenizer = FastActionTokenizer.fit(
            chunks, config.fast_scale, config.fast_vocab_size, normalizer.action_scale
        )
        logging.info("Fitted a FAST tokenizer: %s", action_tokenizer.fit_report)
    else:
        action_tokenizer = FastActionTokenizer.from_pretrained(config.action_tokenizer)
    names = ("chunk_size", "scale_factor", "state_names", "action_names", "relative_exclude_joints", "resize_with_pad")
    options |= {name: getattr(config, name) for name in names}
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
    rows = evenly_spaced(len(states), size)
    return states[rows], actions[np.minimum(rows[:, None] + np.arange(chunk_size), last[rows, None])]


def relative_statistics(
    states: np.ndarray,
    actions: np.ndarray,
    last: np.ndarray,
    chunk_size: int,
    reference_dims: Sequence[int | None] | None = None,
) -> dict[str, list[float]]:
    """The statistics of `relative_action`, see [`compute_statistics`], over all frames, one dimension at a time.

    Args:
        states, actions, last: Those of [`read_frames`].
        reference_dims: See [`Normalizer`].
    """
    rows, columns = np.arange(len(states)), []
    differences = np.empty((len(states), chunk_size))  # the only large array
    dims = range(actions.shape[1]) if reference_dims is None else reference_dims
    for action, dim in zip(actions.T, dims, strict=True):
        for step in range(chunk_size):
            differences[:, step] = action[np.minimum(rows + step, last)] - (0.0 if dim is None else states[:, dim])
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
        "relative_exclude_joints": processor.relative_exclude_joints if processor.use_relative_actions else [],
        "resize_with_pad": processor.resize_with_pad,
    }
