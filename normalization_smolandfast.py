"""Normalisation of robot units to [-1, 1] and back, and state bins.

Needs only NumPy. Statistics have LeRobot's names: `observation.state` and `action`, each with `min`, `max` and, for
quantile normalisation, `q01`, `q99`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .checks_smolandfast import MAX_NORMALIZED, as_numbers, check_whole, in_batches

STATE, ACTION, RELATIVE_ACTION = "observation.state", "action", "relative_action"
BOUNDS = {"min_max": ("min", "max"), "quantiles": ("q01", "q99")}


def match_joints(
    state_names: Sequence[str] | None, action_names: Sequence[str] | None, exclude: Sequence[str] = ()
) -> list[int | None] | None:
    """The dimension of the state that each dimension of the action is relative to.

    Dimensions match by name, or by position if none of the names does and there are as many.

    Args:
        exclude: Joints that stay absolute: those whose name contains one of these, in upper or lower case, as for
            LeRobot's `relative_exclude_joints`.

    Returns:
        `reference_dims` of [`Normalizer`]; `None` if each dimension is relative to the one at its position.

    Raises:
        ValueError: An excluded joint that no action has, or an action without a state.
    """
    for name, names in (("action_names", action_names), ("state_names", state_names)):
        if exclude and names is None:
            raise ValueError(f"relative_exclude_joints is {list(exclude)}, but there are no {name}. Name the joints.")
    for joint in exclude:
        if not isinstance(joint, str) or not any(joint.lower() in name.lower() for name in action_names):
            raise ValueError(
                f"relative_exclude_joints has {joint!r}, which is in none of action_names, {action_names}. Drop it, "
                "or name one of these."
            )
    if action_names is None or state_names is None:
        return None
    by_position = list(range(len(action_names)))
    is_relative = [not any(joint.lower() in name.lower() for joint in exclude) for name in action_names]
    missing = [name for name, used in zip(action_names, is_relative, strict=True) if used and name not in state_names]
    if not missing:
        dims = [state_names.index(name) if name in state_names else None for name in action_names]
    elif len(state_names) == len(action_names) and not set(state_names) & set(action_names):
        dims = by_position
    else:
        raise ValueError(
            f"action_names has {missing[0]!r}, which state_names has not, {state_names}: relative to what? Keep it "
            f"absolute with relative_exclude_joints={[*exclude, missing[0]]}, or rename the dimensions."
        )
    dims = [dim if used else None for dim, used in zip(dims, is_relative, strict=True)]
    return None if dims == by_position and len(state_names) == len(action_names) else dims


def compute_statistics(
    states: np.ndarray, actions: np.ndarray, reference_dims: Sequence[int | None] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Measure a data set for [`Normalizer`].

    Args:
        states: `(N, state_dim)`, robot units.
        actions: `(N, chunk_size, action_dim)`, robot units: the chunk that starts at each state.
        reference_dims: See [`Normalizer`].

    Returns:
        `min`, `max`, `q01`, `q99` of each dimension of `observation.state`, `action` and, if the dimensions match or
        `reference_dims` is given, `relative_action` (action minus state; absolute dimensions as they are).
    """
    states = as_numbers(states, "states", ("N", "state_dim"), keep_floats=True)
    actions = as_numbers(actions, "actions", (len(states), "chunk_size", "action_dim"), keep_floats=True)
    for name, values in {"states": states, "actions": actions}.items():
        if values.size == 0:
            raise ValueError(f"{name} is empty, of shape {values.shape}: pass the demonstrations.")
    columns = {STATE: _columns(states), ACTION: _columns(actions)}
    if reference_dims is None and states.shape[-1] == actions.shape[-1]:
        reference_dims = range(states.shape[-1])
    if reference_dims is not None:
        dims = _check_reference_dims(reference_dims, states.shape[-1], actions.shape[-1])
        references = (0.0 if i is None else states[:, i, None].astype(np.float64) for i in dims)
        columns[RELATIVE_ACTION] = (x - state for x, state in zip(_columns(actions), references, strict=True))
    statistics = {}
    for name, values in columns.items():
        rows = np.array([[x.min(), x.max(), *np.quantile(x, [0.01, 0.99])] for x in values])
        statistics[name] = dict(zip(("min", "max", "q01", "q99"), rows.T.tolist(), strict=True))
    return statistics


def _columns(values: np.ndarray) -> Iterator[np.ndarray]:
    """One dimension at a time, `(..., D) -> (...)` float64, to save memory."""
    return (values[..., i].astype(np.float64) for i in range(values.shape[-1]))


class Normalizer:
    """Normalises states and actions with the statistics of a data set.

    Relative actions are taken from the centres of the state's bins, which the prompt holds, so that decoding can add
    back exactly what was subtracted.

    Args:
        statistics: See [`compute_statistics`]; `meta/stats.json` of a LeRobot data set has the same layout.
        normalization: `"min_max"` maps [min, max] to [-1, 1]; `"quantiles"` maps [q01, q99] there and clips actions
            to [-2, 2], against outliers.
        n_state_bins: Bins of each state dimension.
        use_relative_actions: Whether actions are taken relative to the state.
        reference_dims: The dimension of the state that each dimension of the action is then relative to, None for an
            absolute one, such as a gripper. By default the one at its position. [`match_joints`] finds them by name.

    Raises:
        ValueError: Statistics that are missing, not finite or of unequal length; relative actions of another dimension
            than the state, without `reference_dims`.
    """

    def __init__(
        self,
        statistics: dict,
        normalization: str = "min_max",
        n_state_bins: int = 256,
        use_relative_actions: bool = False,
        reference_dims: Sequence[int | None] | None = None,
    ):
        if normalization not in list(BOUNDS):
            raise ValueError(f"normalization is {normalization!r}, expected one of {', '.join(BOUNDS)}.")
        if not isinstance(statistics, dict):
            raise ValueError(
                f"statistics is {statistics!r}, expected a dictionary with {STATE!r} and {ACTION!r}. Compute it from "
                "the demonstrations with compute_statistics(states, actions)."
            )
        check_whole(n_state_bins, "n_state_bins")
        if not isinstance(use_relative_actions, bool):
            raise ValueError(f"use_relative_actions is {use_relative_actions!r}, expected True or False.")
        low, high = BOUNDS[normalization]
        self.n_state_bins = n_state_bins
        self.use_relative_actions = use_relative_actions
        self.state_bounds = _read_widest(statistics, STATE, low, high)
        self.action_limits = _read_bounds(statistics, ACTION, "min", "max")
        self.state_dim, self.action_dim = len(self.state_bounds[0]), len(self.action_limits[0])
        self.reference_dims = reference_dims if use_relative_actions else None
        if self.reference_dims is not None:
            self.reference_dims = _check_reference_dims(reference_dims, self.state_dim, self.action_dim)
        elif use_relative_actions and self.state_dim != self.action_dim:
            raise ValueError(
                f"use_relative_actions needs a state and an action of equal dimensions, but {STATE!r} has "
                f"{self.state_dim} and {ACTION!r} has {self.action_dim}. Give state_names and action_names, use "
                "absolute actions, or make the state the position that the action commands."
            )
        name = RELATIVE_ACTION if use_relative_actions else ACTION
        self.action_bounds = _read_widest(statistics, name, low, high)
        if len(self.action_bounds[0]) != self.action_dim:
            raise ValueError(
                f"statistics[{name!r}] has {len(self.action_bounds[0])} dimensions, but min and max of "
                f"statistics[{ACTION!r}] have {self.action_dim}. Compute the statistics again."
            )
        if self.reference_dims is not None:
            pairs = zip(_read_widest(statistics, ACTION, low, high), self.action_bounds, strict=True)
            is_absolute = [i is None for i in self.reference_dims]
            self.action_bounds = tuple(np.where(is_absolute, *pair) for pair in pairs)
        self.normalized_limit = MAX_NORMALIZED if normalization == "quantiles" else np.inf

    @property
    def action_scale(self) -> np.ndarray:
        """Robot units in one normalised unit of action: `(action_dim,)`."""
        return (self.action_bounds[1] - self.action_bounds[0]) / 2

    def state_bins(self, state: ArrayLike) -> np.ndarray:
        """Bins of each state: `(B, state_dim)` robot units `-> (B, state_dim)` in [0, n_state_bins), clamped."""
        state = as_numbers(state, "state", ("batch", self.state_dim))
        positions = np.floor((_to_unit(state, self.state_bounds) + 1) / 2 * self.n_state_bins)
        return np.clip(positions, 0, self.n_state_bins - 1).astype(np.int64)

    def normalize_actions(self, actions: ArrayLike, bins: np.ndarray) -> np.ndarray:
        """Robot units to about [-1, 1], with quantile normalisation clipped to [-2, 2].

        Args:
            actions: `(B, H, action_dim)`, robot units.
            bins: The states' bins, `(B, state_dim)`.

        Returns:
            `(B, H, action_dim)` float32.
        """
        actions = as_numbers(actions, "actions", ("batch", "chunk_size", self.action_dim), keep_floats=True)
        if len(actions) != len(bins):
            raise ValueError(f"actions has {len(actions)} chunks for {len(bins)} states: pass one chunk per state.")
        normalized = np.empty(actions.shape, dtype=np.float32)
        for rows in in_batches(len(actions), actions[:1].size):
            relative = actions[rows].astype(np.float64) - self._reference(bins[rows])
            normalized[rows] = self._clip(_to_unit(relative, self.action_bounds))
        return normalized

    def unnormalize_actions(self, actions: np.ndarray, bins: np.ndarray | None) -> np.ndarray:
        """The inverse of `normalize_actions`, clipped to `min` and `max` of the action's statistics.

        With quantile normalisation the input is first clipped to [-2, 2].
        """
        return np.clip(self._to_robot(actions, bins), *self.action_limits).astype(np.float32)

    def count_clipped_actions(self, actions: np.ndarray, bins: np.ndarray | None) -> np.ndarray:
        """The number of values in each chunk that `unnormalize_actions` clips: `(B,)`."""
        low, high = self.action_limits
        values = self._to_robot(actions, bins)
        is_clipped = (values < low) | (values > high) | (np.abs(actions) > self.normalized_limit)
        return is_clipped.sum(axis=(1, 2))

    def count_clamped_states(self, state: ArrayLike) -> np.ndarray:
        """The number of values in each state that `state_bins` clamps: `(B,)`."""
        state = as_numbers(state, "state", ("batch", self.state_dim))
        low, high = self.state_bounds
        return ((state < low) | (state > high)).sum(axis=1)

    def _to_robot(self, actions: np.ndarray, bins: np.ndarray | None) -> np.ndarray:
        low, high = self.action_bounds
        return (self._clip(actions) + 1) / 2 * (high - low) + low + self._reference(bins)

    def _clip(self, actions: np.ndarray) -> np.ndarray:
        return np.clip(actions, -self.normalized_limit, self.normalized_limit)

    def _reference(self, bins: np.ndarray | None) -> "np.ndarray | float":
        if not self.use_relative_actions:
            return 0.0
        low, high = self.state_bounds
        centres = (bins + 0.5) / self.n_state_bins * (high - low) + low
        if self.reference_dims is not None:
            columns = [0.0 if i is None else centres[:, i] for i in self.reference_dims]
            centres = np.stack(np.broadcast_arrays(*columns, centres[:, 0])[:-1], axis=1)
        return centres[:, None]  # (B, D) -> (B, 1, D)


def _check_reference_dims(dims: Sequence[int | None], state_dim: int, action_dim: int) -> list[int | None]:
    is_known = isinstance(dims, (list, tuple, range)) and all(
        i is None or (type(i) is int and 0 <= i < state_dim) for i in dims
    )
    if not is_known or len(dims) != action_dim or all(i is None for i in dims):
        raise ValueError(
            f"reference_dims is {dims!r}, expected {action_dim} dimensions of the state, 0 to {state_dim - 1}, or "
            "None for absolute actions, at least one of them relative. Leave use_relative_actions off if none is."
        )
    return list(dims)


def _to_unit(values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    low, high = bounds
    width = np.where(high > low, high - low, 1.0)  # a constant dimension becomes 0
    return np.where(high > low, (values - low) / width * 2 - 1, 0.0)


def _read_widest(statistics: dict, name: str, low: str, high: str) -> tuple[np.ndarray, np.ndarray]:
    """The bounds, or min and max for a dimension (a gripper's) whose quantiles are equal."""
    bounds, widest = _read_bounds(statistics, name, low, high), _read_bounds(statistics, name, "min", "max")
    is_flat = bounds[0] == bounds[1]
    return np.where(is_flat, widest[0], bounds[0]), np.where(is_flat, widest[1], bounds[1])


def _read_bounds(statistics: dict, name: str, low: str, high: str) -> tuple[np.ndarray, np.ndarray]:
    values = statistics.get(name)
    if not isinstance(values, dict) or not {low, high} <= set(values):
        raise ValueError(
            f"statistics[{name!r}] is {values!r:.200}, expected a dictionary with {low!r} and {high!r}. "
            "Compute it from the demonstrations with compute_statistics(states, actions)."
        )
    bounds = tuple(as_numbers(values[key], f"statistics[{name!r}][{key!r}]", ("dim",)) for key in (low, high))
    if len(bounds[0]) != len(bounds[1]) or len(bounds[0]) == 0 or (bounds[0] > bounds[1]).any():
        raise ValueError(
            f"statistics[{name!r}]: {low} is {bounds[0].tolist()}, {high} is {bounds[1].tolist()}, expected a number "
            f"for each dimension, {low} <= {high}. Compute it again."
        )
    return bounds
