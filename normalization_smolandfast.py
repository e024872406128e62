"""Normalisation of robot units to [-1, 1] and back, and state bins.

Needs only NumPy. Statistics have LeRobot's names: `observation.state` and `action`, each with `min`, `max` and, for
quantile normalisation, `q01`, `q99`.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from .checks_smolandfast import MAX_NORMALIZED, as_numbers, check_whole, in_batches

STATE, ACTION, RELATIVE_ACTION = "observation.state", "action", "relative_action"
BOUNDS = {"min_max": ("min", "max"), "quantiles": ("q01", "q99")}


def compute_statistics(states: np.ndarray, actions: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Measure a data set for [`Normalizer`].

    Args:
        states: `(N, state_dim)`, robot units.
        actions: `(N, chunk_size, action_dim)`, robot units: the chunk that starts at each state.

    Returns:
        `min`, `max`, `q01`, `q99` of each dimension of `observation.state`, `action` and, if the dimensions match,
        `relative_action` (action minus state).
    """
    states = as_numbers(states, "states", ("N", "state_dim"), keep_floats=True)
    actions = as_numbers(actions, "actions", (len(states), "chunk_size", "action_dim"), keep_floats=True)
    for name, values in {"states": states, "actions": actions}.items():
        if values.size == 0:
            raise ValueError(f"{name} is empty, of shape {values.shape}: pass the demonstrations.")
    columns = {STATE: _columns(states), ACTION: _columns(actions)}
    if states.shape[-1] == actions.shape[-1]:
        references = (state[:, None] for state in _columns(states))
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

    Raises:
        ValueError: Statistics that are missing, not finite or of unequal length; relative actions of another dimension
            than the state.
    """

    def __init__(
        self,
        statistics: dict,
        normalization: str = "min_max",
        n_state_bins: int = 256,
        use_relative_actions: bool = False,
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
        if use_relative_actions and self.state_dim != self.action_dim:
            raise ValueError(
                f"use_relative_actions needs a state and an action of equal dimensions, but {STATE!r} has "
                f"{self.state_dim} and {ACTION!r} has {self.action_dim}. Use absolute actions, or make the state the "
                "position that the action commands."
            )
        name = RELATIVE_ACTION if use_relative_actions else ACTION
        self.action_bounds = _read_widest(statistics, name, low, high)
        if len(self.action_bounds[0]) != self.action_dim:
            raise ValueError(
                f"statistics[{name!r}] has {len(self.action_bounds[0])} dimensions, but min and max of "
                f"statistics[{ACTION!r}] have {self.action_dim}. Compute the statistics again."
            )
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
        return centres[:, None]  # (B, D) -> (B, 1, D)


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
