"""The benchmarks that the scripts train and evaluate on, one folder each.

A folder holds the simulator, the ways to vary demonstrations, the pretraining of the vision tower, and a [`Benchmark`]
that describes them to the scripts.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

BENCHMARKS = ("metaworld", "pusht", "so101")
INSTALL = {
    "metaworld": "run `pip install -e '.[metaworld]'`",
    "pusht": "run `pip install -e '.[examples]'`",
    "so101": "run `make demo-so101` and use .venv-so101, since it needs an environment of its own",
}
FRAME_SIZE = 384  # pixels along each side of a filmed scene

Move = Callable[[np.ndarray], np.ndarray]


class Scene(Protocol):
    """The simulation of one task. Call `reset` first, and again after the end of an episode."""

    def reset(self, seed: int) -> Any:
        """Place the robot and the objects at random."""

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Execute an action `(action_dim,)`; returns reward, success, and whether the episode is over."""

    def images(self) -> list[np.ndarray]:
        """The policy's images in the order of `Benchmark.image_keys`: uint8 `(image_size, image_size, 3)` each."""

    def film(self) -> np.ndarray:
        """A larger image, for videos: uint8 `(FRAME_SIZE, FRAME_SIZE, 3)`."""

    def close(self) -> None:
        """Free the simulator's resources."""

    @property
    def state(self) -> np.ndarray:
        """The robot's state: float32 `(state_dim,)`."""

    @property
    def poses(self) -> np.ndarray:
        """Poses of the objects, in the simulator's units."""


def no_moves(**options: float) -> list[Move]:
    return []


def hold_position(state: np.ndarray, last_action: np.ndarray | None) -> np.ndarray:
    """The action that stands still, where actions are positions."""
    return state if last_action is None else last_action


@dataclass(frozen=True)
class Benchmark:
    """What the scripts need to know of a simulator."""

    name: str
    repo_id: str | None  # demonstrations on the Hub
    tasks: dict[str, str]  # task -> instruction
    groups: dict[str, str]  # task -> group, for the report; may be empty
    make_scene: Callable[[str], Scene]  # of a task
    fps: int
    max_steps: int  # an episode ends unsolved after these
    state_dim: int
    action_dim: int
    image_size: int  # pixels along each side of the images
    preset: dict[str, Any]  # options of `train.py`, on top of its tiny preset
    packages: tuple[str, ...]  # their releases are part of the results
    card: dict[str, str]  # for the model card: title, env_id, success, citation
    image_keys: tuple[str, ...] = ("observation.image",)  # the cameras, as data sets name them
    # (sample with images, text, state and actions; random generator, **options) -> that of a varied scene
    vary: Callable[..., dict[str, Any]] | None = None
    variations: tuple[str, ...] = ()  # the options of `train.py` that `vary` takes
    largest_angle: float = 180.0  # that `--max_angle` can have
    # (**options) -> moves of states and chunks: those that the statistics include, and those for fitting FAST alone
    symmetries: Callable[..., list[Move]] = no_moves
    rotations: Callable[..., list[Move]] = no_moves
    wordings: dict[str, list[str]] = field(default_factory=dict)  # instruction -> rephrasings for training
    max_reward: float | None = None  # the best reward, if rewards are comparable between episodes
    film_every: int = 1  # steps from one filmed frame to the next
    has_full_render: bool = False  # whether `make_scene` takes `full_render`, to render as the original does
    # (state, last action or None) -> the action that stands still, while a prediction is late
    hold: Callable[[np.ndarray, np.ndarray | None], np.ndarray] | None = None


def get_benchmark(name: str) -> Benchmark:
    """Import a benchmark.

    Raises:
        ValueError: The name is unknown, or the simulator is not installed.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}.")
    try:
        return importlib.import_module(f"envs.{name}").BENCHMARK
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs {error.name}: {INSTALL[name]}.") from error
    except ImportError as error:  # a system library; the message says what to install
        raise ValueError(str(error)) from error


def check_policy(
    benchmark: Benchmark, action_dim: int, state_dim: int, image_keys: Sequence[str], fps: float | None
) -> None:
    """Raise `ValueError` for a policy of another robot or control rate. An fps of `None` is unknown, and passes.

    The name of a single camera does not matter.
    """
    fix, names = f"Use one that was trained for {benchmark.name}.", ", ".join(image_keys)
    for what, value, expected in (
        ("action dimensions", action_dim, benchmark.action_dim),
        ("state dimensions", state_dim, benchmark.state_dim),
        (f"cameras ({names})", len(image_keys), len(benchmark.image_keys)),
        ("control steps a second (fps)", fps, benchmark.fps),
    ):
        if value is not None and value != expected:
            raise ValueError(f"The policy has {value:g} {what}, {benchmark.name} {expected}. {fix}")
    if len(image_keys) > 1 and tuple(image_keys) != benchmark.image_keys:
        expected = ", ".join(benchmark.image_keys)
        raise ValueError(f"The policy has the cameras {names}, {benchmark.name} {expected}, in this order. {fix}")


def shift_image(image: np.ndarray, right: int, down: int) -> np.ndarray:
    """Move an image `(H, W, 3)` by whole pixels; the gap repeats the edge."""
    height, width, _ = image.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return image[rows[:, None], columns]
