"""Look at a data set before training on it: what it holds, what looks wrong, and which options fit it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..normalization_smolandfast import Normalizer, compute_statistics, match_joints
from ..tokenization_fast_action import MAX_FITTED_CHUNKS, FastActionTokenizer, coefficient_range
from .data import LeRobotChunkDataset, evenly_spaced

SCALES = (5, 10, 20, 40, 80)  # of the FAST tokenizers that are compared
NUM_CHUNKS = 2_000  # evenly spaced, on which their merges are fitted
TOLERANCE = 0.005  # of a joint's range: the largest root mean square error of the recommended tokenizer
LAG = 0.1  # seconds after which a joint has followed its target
MIN_EPISODES = 20  # of a task
TARGETS, DIFFERENCES, UNKNOWN = "targets of the state", "differences", "unknown"


@dataclass(frozen=True)
class DatasetReport:
    """What [`inspect_dataset`] found. `str(report)` is the text for the terminal.

    Attributes:
        lines: The text without its warnings.
        warnings: A line each, which ends with what to do.
        action_kind: `"targets of the state"`, `"differences"` or `"unknown"`.
        action_options: `normalization`, `use_relative_actions` and `relative_exclude_joints` as given, or else as
            recommended: arguments of [`fit_normalizer`] and of the processor.
        fast_scale: The scale of the FAST tokenizer, likewise.
    """

    lines: list[str]
    warnings: list[str]
    action_kind: str
    action_options: dict
    fast_scale: float

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def inspect_dataset(
    dataset: LeRobotChunkDataset,
    normalization: str = "min_max",
    use_relative_actions: bool | None = None,
    relative_exclude_joints: Sequence[str] | None = None,
    fast_scale: float | None = None,
    vocab_size: int = 1024,
) -> DatasetReport:
    """Describe a data set, warn of what often goes wrong, and recommend options.

    Args:
        dataset: With the `chunk_size` of the policy.
        normalization, vocab_size: As for the processor and the FAST tokenizer.
        use_relative_actions: By default, whether the actions are positions that the state follows.
        relative_exclude_joints: By default `["gripper"]` where a joint has such a name.
        fast_scale: By default the smallest of [`SCALES`] whose root mean square error is at most 0.5 % of each joint's
            range, or else the largest that the vocabulary allows.

    Raises:
        ValueError: Options that do not fit the data; images that cannot be read.
    """
    lines, warnings = _describe(dataset)
    lines += _describe_cameras(dataset, warnings)
    kind = action_kind(dataset)
    if use_relative_actions is None:
        use_relative_actions = kind == TARGETS
    if relative_exclude_joints is None:
        is_gripper = ["gripper" in name.lower() for name in dataset.action_names or ()]
        stays_absolute = use_relative_actions and dataset.state_names and any(is_gripper) and not all(is_gripper)
        relative_exclude_joints = ["gripper"] if stays_absolute else []
    if kind == DIFFERENCES and use_relative_actions:
        warnings.append(
            "The actions look like differences already, which would be taken relative to the state once more. Leave "
            "use_relative_actions off."
        )
    options = {
        "normalization": normalization,
        "use_relative_actions": use_relative_actions,
        "relative_exclude_joints": list(relative_exclude_joints),
    }
    _, normalizer, normalized = fit_normalizer(dataset, **options)
    clipped = (np.abs(normalized) >= normalizer.normalized_limit).mean(axis=(0, 1))  # (action_dim,)
    lines += _describe_dimensions(dataset, clipped, normalization, warnings)
    ending = f", except {', '.join(relative_exclude_joints)}" if relative_exclude_joints else ""
    advice = f"relative to the state{ending}" if use_relative_actions else "as they are"
    lines.append(f"Actions: {kind}; predicted {advice}.")
    scales = SCALES if fast_scale is None else (fast_scale,)
    comparison, fitting = _compare_tokenizers(dataset, normalized, normalizer.action_scale, scales, vocab_size)
    if fast_scale is None:
        fast_scale = fitting
        comparison.append(f"  recommended: scale {fast_scale:g}")
    return DatasetReport(lines + comparison, warnings, kind, options, float(fast_scale))


def fit_normalizer(
    dataset: LeRobotChunkDataset,
    normalization: str = "min_max",
    use_relative_actions: bool = False,
    relative_exclude_joints: Sequence[str] = (),
) -> tuple[dict, Normalizer, np.ndarray]:
    """Measure a data set for a processor, and normalise its chunks for a FAST tokenizer.

    Args:
        normalization, use_relative_actions, relative_exclude_joints: As for the processor.

    Returns:
        The statistics, their normalizer, and the normalised chunks `(n, chunk_size, action_dim)` of up to
        [`MAX_FITTED_CHUNKS`] frames, evenly spaced.

    Raises:
        ValueError: Options that do not fit the data.
    """
    dims = None
    if use_relative_actions:
        dims = match_joints(dataset.state_names, dataset.action_names, relative_exclude_joints)
    rows = evenly_spaced(len(dataset), MAX_FITTED_CHUNKS)
    states, chunks = dataset.states[rows], dataset.action_chunks(rows)
    statistics = compute_statistics(states, chunks, dims)
    options = {"use_relative_actions": use_relative_actions, "reference_dims": dims}
    normalizer = Normalizer(statistics, normalization, **options)
    return statistics, normalizer, normalizer.normalize_actions(chunks, normalizer.state_bins(states))


def _compare_tokenizers(
    dataset: LeRobotChunkDataset,
    chunks: np.ndarray,
    action_scale: np.ndarray,
    scales: Sequence[float],
    vocab_size: int,
) -> tuple[list[str], float]:
    """A line for each scale, and the recommended one."""
    low, q01, q99, high = np.quantile(dataset.actions, [0, 0.01, 0.99, 1], axis=0)
    span = np.where(q99 > q01, q99 - q01, high - low)  # without outliers
    few = chunks[evenly_spaced(len(chunks), NUM_CHUNKS)]
    names, fitting = dataset.action_names or [f"action {i}" for i in range(dataset.action_dim)], []
    lines = [
        f"FAST tokenizers for chunks of {dataset.chunk_size} actions ({_seconds(dataset):.2f} s), and the errors that "
        "they add, in the robot's units:",
        f"  {'scale':8}{'tokens':>8}{'most':>6}{'largest error':>16}  typical error (root mean square), worst joint",
    ]
    for scale in scales:
        try:
            coefficient_range(chunks, scale, vocab_size)
            report = FastActionTokenizer.fit(few, scale, vocab_size, action_scale).fit_report
        except ValueError:  # more symbols than the vocabulary has
            if not fitting:
                raise
            lines.append(f"  scale {scale:g} and above need a larger vocabulary than {vocab_size}")
            break
        errors = np.array(report["rmse_by_dim"])
        worst = int((errors / np.where(span > 0, span, np.inf)).argmax())
        lines.append(
            f"  {scale:<8g}{report['tokens_mean']:8.1f}{report['tokens_max']:6}{report['max_error']:16.3g}  "
            f"{errors[worst]:.3g}, {names[worst]}"
        )
        fitting.append(scale)
        if (errors <= TOLERANCE * span).all():
            lines.append(f"  With {scale:g}, the typical error is at most {TOLERANCE:.1%} of each joint's range.")
            break
    return lines, fitting[-1]


def action_kind(dataset: LeRobotChunkDataset) -> str:
    """Whether actions are positions that the state follows, or differences (velocities), by their correlations.

    An action is compared with the state a tenth of a second later, and with the state's change until then, in each
    dimension that [`match_joints`] finds and that moves; the medians decide.
    """
    try:
        dims = match_joints(dataset.state_names, dataset.action_names)
    except ValueError:
        return UNKNOWN
    if dims is None and dataset.state_dim != dataset.action_dim:
        return UNKNOWN
    lag = max(1, round(LAG * dataset.fps))
    rows = np.arange(len(dataset) - lag)
    rows = rows[rows + lag <= dataset.episode_end[rows]]
    pairs = []
    for i, j in enumerate(range(dataset.action_dim) if dims is None else dims):
        action, state = dataset.actions[rows, i].astype(np.float64), dataset.states[:, j].astype(np.float64)
        later, change = state[rows + lag], state[rows + lag] - state[rows]
        if len(rows) > 2 and min(action.std(), later.std(), change.std()) > 0:
            pairs.append([abs(np.corrcoef(action, values)[0, 1]) for values in (later, change)])
    if not pairs:
        return UNKNOWN
    with_state, with_change = np.median(pairs, axis=0)
    if with_change > with_state and with_change > 0.3:
        return DIFFERENCES
    return TARGETS if with_state > 0.8 else UNKNOWN


def _seconds(dataset: LeRobotChunkDataset) -> float:
    return dataset.chunk_size * dataset.frame_stride / dataset.fps


def _describe(dataset: LeRobotChunkDataset) -> tuple[list[str], list[str]]:
    """Size, tasks and timing, and the warnings about them."""
    warnings, starts = [], dataset.episode_starts
    lengths = dataset.episode_end[starts] - starts + 1
    counts = Counter(dataset.text(int(i)) for i in starts)
    lines = [
        f"{len(starts)} episodes of {lengths.min()} to {lengths.max()} frames, {len(dataset)} frames, "
        f"{len(dataset) / dataset.fps / 60:.1f} minutes at {dataset.fps:g} Hz",
        *(f"  {count} x {task!r}" for task, count in counts.most_common(10)),
    ]
    if len(counts) > 10:
        lines.append(f"  and {len(counts) - 10} more tasks")
    if empty := sum(count for task, count in counts.items() if not task.strip()):
        warnings.append(f"{empty} episodes have no instruction. Write one into the data set.")
    if marked := [task for task in counts if re.search("<[^<>]+>", task)]:
        warnings.append(f"The task {marked[0]!r} holds what may be a special token. Write it in plain words.")
    rare = [task for task, count in counts.items() if count < MIN_EPISODES]
    if rare:
        warnings.append(
            f"{len(rare)} of {len(counts)} tasks have fewer than {MIN_EPISODES} episodes, such as {rare[0]!r}. Record "
            "50 or more of each, with the objects at other positions."
        )
    num_short = int((lengths < dataset.chunk_size * dataset.frame_stride).sum())
    if num_short:
        warnings.append(
            f"{num_short} of {len(starts)} episodes are shorter than a chunk of {dataset.chunk_size} actions, which "
            "then repeats the last one. Choose a smaller chunk_size."
        )
    if "timestamp" in dataset.info["features"]:
        is_inside = np.arange(len(dataset) - 1) < dataset.episode_end[:-1]
        steps = np.diff(dataset.vectors("timestamp")[:, 0].astype(np.float64))[is_inside] * dataset.fps
        share = (np.abs(steps - 1) > 0.1).mean() if len(steps) else 0
        if share > 0.01:
            warnings.append(
                f"{share:.0%} of the time steps differ from 1 / fps by more than a tenth. Record at a rate that the "
                "computer can keep."
            )
    return lines, warnings


def _describe_cameras(dataset: LeRobotChunkDataset, warnings: list[str]) -> list[str]:
    """Sizes of the images. A few of each camera are decoded, to find a covered or a frozen one."""
    rows = evenly_spaced(len(dataset), 6).tolist()
    for key in dataset.image_keys:
        images = [dataset.image(i, key) for i in rows]
        if max(image.std() for image in images) < 3:
            warnings.append(f"{key} shows a plain surface. Look at its video: is the camera covered?")
        elif len(images) > 1 and all(np.array_equal(images[0], image) for image in images[1:]):
            warnings.append(f"{key} shows the same image everywhere. Look at its video: has the camera stopped?")
    sizes = (f"{key} {width}x{height}" for key, (height, width) in dataset.image_sizes.items())
    is_square = all(height == width for height, width in dataset.image_sizes.values())
    note = "" if is_square else "; stretched to squares, unless resize_with_pad is set"
    return [f"Cameras: {', '.join(sizes)}{note}"]


def _describe_dimensions(
    dataset: LeRobotChunkDataset, clipped: np.ndarray, normalization: str, warnings: list[str]
) -> list[str]:
    """A table of the dimensions of state and action. `clipped` is the share of clipped values, `(action_dim,)`."""
    lines = [f"{'':32}{'min':>10}{'1 %':>10}{'99 %':>10}{'max':>10}  clipped"]
    parts = (("state", dataset.state_names, dataset.states), ("action", dataset.action_names, dataset.actions))
    for part, names, values in parts:
        if names is None:
            warnings.append(
                f"The dimensions of the {part} have no names, so they cannot be matched with a robot's joints. Name "
                "them in meta/info.json, as LeRobot does."
            )
        for i, column in enumerate(values.T.astype(np.float64)):
            name = f"{part} {names[i] if names else i}"
            low, q01, q99, high = np.quantile(column, [0, 0.01, 0.99, 1])
            share = f"{clipped[i]:.1%}" if part == "action" else ""
            note, is_rare = "", q99 - q01 < 0.2 * (high - low)
            if low == high:
                note = "constant"
            elif is_rare and q99 == q01:
                note = "nearly constant"
            elif is_rare:
                note = "outliers"
            lines.append(f"  {name:30}{low:10.4g}{q01:10.4g}{q99:10.4g}{high:10.4g}  {share:7}{note}".rstrip())
            if part == "action" and note == "constant":
                warnings.append(f"{name} never changes, and the policy will not move it. Record episodes that do.")
            elif part == "action" and note == "nearly constant":
                warnings.append(
                    f"{name} moves in fewer than 2 % of the frames. If it matters, record it more often, and keep "
                    "normalization min_max, which does not clip it."
                )
            elif note == "outliers" and normalization == "min_max":
                is_far = (column < q01 - (q99 - q01)) | (column > q99 + (q99 - q01))
                episodes = np.unique(dataset.episode_index[is_far])[:5].tolist()
                warnings.append(
                    f"{name} has outliers: 98 % of its values lie in {(q99 - q01) / (high - low):.0%} of its range. "
                    f"Choose normalization quantiles, or leave out the episodes, such as {episodes}."
                )
            if part == "action" and clipped[i] > 0.02:
                warnings.append(
                    f"{name} is clipped in {clipped[i]:.1%} of the actions. Choose normalization min_max if the "
                    "policy must reach them."
                )
    return lines
