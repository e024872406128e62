"""How well a policy predicts episodes that it was not trained on, next to baselines that see no image.

Not imported by `smolandfast.training`, since it needs matplotlib.
"""

from dataclasses import dataclass
from itertools import pairwise
from textwrap import shorten

import numpy as np
from matplotlib.figure import Figure

from ..modeling_smolandfast import SmolAndFastForActionPrediction
from ..normalization_smolandfast import Normalizer, match_joints
from ..processing_smolandfast import SmolAndFastProcessor
from ..tokenization_fast_action import MAX_FITTED_CHUNKS
from .data import LeRobotChunkDataset, evenly_spaced
from .inspection import DIFFERENCES, TARGETS, action_kind

BATCH_SIZE = 32  # of predictions


@dataclass(frozen=True)
class HeldOutReport:
    """What [`compare_with_baselines`] measured. `str(report)` is the table for the terminal.

    Attributes:
        held_out_episodes: Their indices.
        num_chunks: The number of chunks that were predicted.
        joints: The names of the action's dimensions.
        mean_absolute_error: Of `"policy"`, `"hold still"` (where that is known) and `"mean chunk"`: a number for each
            joint, in the robot's units.
    """

    held_out_episodes: list[int]
    num_chunks: int
    joints: list[str]
    mean_absolute_error: dict[str, list[float]]

    def __str__(self) -> str:
        errors = self.mean_absolute_error
        lines = [
            f"Mean absolute error of {self.num_chunks} chunks of held-out episodes, in the robot's units:",
            f"{'':24}" + "".join(f"{name:>14}" for name in errors),
        ]
        for joint, *values in zip(self.joints, *errors.values(), strict=True):
            lines.append(f"  {joint:22}" + "".join(f"{value:14.3g}" for value in values))
        for baseline in list(errors)[1:]:
            rows = zip(self.joints, errors["policy"], errors[baseline], strict=True)
            if worse := [joint for joint, error, limit in rows if error > limit]:
                names = ", ".join(worse) if len(worse) < len(self.joints) else "every joint"
                fix = 'See "Read the report" in docs/your_robot.md.'
                lines.append(f"WARNING: worse than the baseline {baseline!r} in {names}. {fix}")
        return "\n".join(lines)


def split_episodes(dataset: LeRobotChunkDataset, num_held_out: int | None = None) -> tuple[list[int], list[int]]:
    """Indices of the episodes to train on, and of those to hold out, which are spread over the tasks.

    Args:
        num_held_out: By default a tenth of the episodes; of fewer than thirty 3, but at most a quarter, and at least
            one.

    Raises:
        ValueError: No episode of a task would be left to train on.
    """
    starts = sorted(dataset.episode_starts.tolist(), key=dataset.text)
    others = [start for last, start in pairwise(starts) if dataset.text(start) == dataset.text(last)]
    count, most = len(starts), len(others)  # one episode of each task is trained on
    held = max(min(3, count // 4), count // 10, 1) if num_held_out is None else num_held_out
    if not 0 < held <= most:
        fix = "Hold out fewer." if held <= count and most else "Record more episodes of each task."
        raise ValueError(
            f"held_out_episodes is {held} of {count}, expected 1 to {most}: one of each task is trained on. {fix}"
        )
    chosen = {others[int(i)] for i in (np.arange(held) + 0.5) * most / held}
    parts = (
        [dataset.episode_index[i] for i in starts if (i in chosen) == is_held_out] for is_held_out in (False, True)
    )
    train, held_out = (sorted(map(int, part)) for part in parts)
    return train, held_out


def predict_chunks(
    model: SmolAndFastForActionPrediction, processor: SmolAndFastProcessor, data: LeRobotChunkDataset, rows: np.ndarray
) -> np.ndarray:
    """The policy's chunks at these frames: `(n, chunk_size, action_dim)`, in the robot's units."""
    chunks = []
    for start in range(0, len(rows), BATCH_SIZE):
        samples = [data[int(i)] for i in rows[start : start + BATCH_SIZE]]
        inputs = processor(**{name: [sample[name] for sample in samples] for name in ("images", "text", "state")})
        chunks.append(processor.post_process_actions(model.generate(**inputs.to(model.device))))
    return np.concatenate(chunks)


def compare_with_baselines(
    model: SmolAndFastForActionPrediction,
    processor: SmolAndFastProcessor,
    train: LeRobotChunkDataset,
    held_out: LeRobotChunkDataset,
    num_chunks: int = 256,
) -> HeldOutReport:
    """Measure a policy's error at evenly spaced held-out frames, and that of chunks which need no policy.

    The baselines are to hold still, where it is known which actions do, and the mean of all chunks in `train`, taken
    relative to the state where the policy predicts it so.
    """
    rows = evenly_spaced(len(held_out), num_chunks)
    demonstrated = held_out.action_chunks(rows)
    predicted = {"policy": predict_chunks(model, processor, held_out, rows)}
    predicted |= _baselines(processor.normalizer, train, held_out.states[rows])
    return HeldOutReport(
        np.unique(held_out.episode_index).tolist(),
        len(rows),
        _joints(held_out),
        {name: np.abs(chunks - demonstrated).mean(axis=(0, 1)).tolist() for name, chunks in predicted.items()},
    )


def _baselines(normalizer: Normalizer, train: LeRobotChunkDataset, states: np.ndarray) -> dict[str, np.ndarray]:
    """Chunks `(n, chunk_size, action_dim)` for these states, by name."""
    rows = evenly_spaced(len(train), MAX_FITTED_CHUNKS)
    chunks = normalizer.normalize_actions(train.action_chunks(rows), normalizer.state_bins(train.states[rows]))
    mean = np.repeat(chunks.mean(axis=0, keepdims=True), len(states), axis=0)
    mean = normalizer.unnormalize_actions(mean, normalizer.state_bins(states))
    still, kind = {}, action_kind(train)
    if kind == TARGETS:
        dims = match_joints(train.state_names, train.action_names) or list(range(train.action_dim))
        still = {"hold still": np.broadcast_to(states[:, None, dims], mean.shape)}
    elif kind == DIFFERENCES:
        still = {"hold still": np.zeros_like(mean)}
    return still | {"mean chunk": mean}


def plot_predictions(
    model: SmolAndFastForActionPrediction,
    processor: SmolAndFastProcessor,
    data: LeRobotChunkDataset,
    num_episodes: int = 3,
) -> Figure:
    """A row for each joint: demonstrated actions of some episodes, and the chunks that are predicted along them."""
    steps = model.config.n_action_steps
    starts = data.episode_starts[evenly_spaced(len(data.episode_starts), num_episodes)]
    figure = Figure(figsize=(6 * len(starts), 1.8 * data.action_dim))
    axes = figure.subplots(data.action_dim, len(starts), squeeze=False, sharex="col", sharey="row")
    for column, start in zip(axes.T, starts, strict=True):
        rows = np.arange(start, data.episode_end[start] + 1)
        chunks = predict_chunks(model, processor, data, rows[::steps])
        for i, axis in enumerate(column):
            (demonstrated,) = axis.plot((rows - start) / data.fps, data.actions[rows, i], "k")
            for row, chunk in zip(rows[::steps], chunks, strict=True):
                seconds = (row - start + np.arange(len(chunk))) / data.fps
                (rest,) = axis.plot(seconds, chunk[:, i], "C1", alpha=0.35)
                (executed,) = axis.plot(seconds[:steps], chunk[:steps, i], "C1")
        title = f"episode {data.episode_index[start]}: {data.text(int(start))}"
        column[0].set_title(shorten(title, 60, placeholder=" ..."), parse_math=False)
        column[-1].set_xlabel("seconds")
    for axis, joint in zip(axes[:, 0], _joints(data), strict=True):
        axis.set_ylabel(joint, parse_math=False)
    labels = {"demonstrated": demonstrated, "predicted, executed": executed, "predicted, not executed": rest}
    figure.legend(labels.values(), labels, loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _joints(data: LeRobotChunkDataset) -> list[str]:
    return data.action_names or [f"action {i}" for i in range(data.action_dim)]
