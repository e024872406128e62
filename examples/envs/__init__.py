"""The benchmarks that the scripts train on and play, a folder each.

A folder has its simulator, its ways to vary demonstrations, what its vision tower is pretrained for, and a
[`Benchmark`] that says it all to the scripts, which know none of them by name.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

BENCHMARKS = ("metaworld", "pusht")
EXTRAS = {"metaworld": "metaworld"}  # of pyproject.toml, beside `examples`
FRAME_SIZE = 384  # pixels along each side of a filmed scene

Move = Callable[[np.ndarray], np.ndarray]


class Scene(Protocol):
    """One task's simulation. `reset` comes first, and after an episode's end."""

    def reset(self, seed: int) -> Any:
        """Place everything as `seed` says."""

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Execute an action `(action_dim,)`; returns reward, success, and whether the episode is over."""

    def image(self) -> np.ndarray:
        """What the policy sees: uint8 `(image_size, image_size, 3)`."""

    def film(self) -> np.ndarray:
        """The same for people: uint8 `(FRAME_SIZE, FRAME_SIZE, 3)`."""

    def close(self) -> None:
        """Free what the simulator holds."""

    @property
    def state(self) -> np.ndarray:
        """The robot's state: float32 `(state_dim,)`."""

    @property
    def poses(self) -> np.ndarray:
        """Where things are, in the simulator's own numbers."""


def no_moves(**options: float) -> list[Move]:
    return []


@dataclass(frozen=True)
class Benchmark:
    """What `train.py` and `evaluate.py` need to know of a simulator."""

    name: str
    repo_id: str  # demonstrations on the Hub
    tasks: dict[str, str]  # the sentence of each task
    groups: dict[str, str]  # the group of each task, for the report; may be empty
    make_scene: Callable[[str], Scene]  # of a task
    fps: int
    max_steps: int  # after which an episode ends unsolved
    state_dim: int
    action_dim: int
    image_size: int
    preset: dict[str, Any]  # of `train.py`'s options, on top of its tiny preset
    packages: tuple[str, ...]  # whose releases results depend on
    card: dict[str, str]  # what a model card says of it: its title, env_id, success and citation
    # (image, state, actions, random generator, options) -> the same of a world that was moved; the options are some of
    # `train.py`'s `VARIATIONS`, by which it can be moved
    vary: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    variations: tuple[str, ...] = ()
    # (options) -> how states and chunks are moved: those that count in the statistics, and those for FAST alone
    symmetries: Callable[..., list[Move]] = no_moves
    rotations: Callable[..., list[Move]] = no_moves
    wordings: dict[str, list[str]] = field(default_factory=dict)  # other wordings of a sentence, for training
    max_reward: float | None = None  # if rewards are comparable between episodes, their best
    film_every: int = 1  # steps from one filmed scene to the next
    has_full_render: bool = False  # `make_scene` takes `full_render`, to draw as the original does
    # (state, last action or None) -> the action that stands still, while a prediction is late
    hold: Callable[[np.ndarray, np.ndarray | None], np.ndarray] | None = None


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: there is none, or its simulator is not installed.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}.")
    try:
        return importlib.import_module(f"envs.{name}").BENCHMARK
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(name, "examples")
        raise ValueError(f"{name} needs {error.name}: run `pip install -e '.[{extra}]'`.") from error
    except ImportError as error:  # a library of the system's; the message says what to install
        raise ValueError(str(error)) from error


def check_policy(
    benchmark: Benchmark, action_dim: int, state_dim: int, image_keys: Sequence[str], fps: float | None
) -> None:
    """Refuse a policy of another robot, or of another control rate (`None`: not known).

    Raises:
        ValueError: The message names what differs.
    """
    for what, found, expected in (
        ("action dimensions", action_dim, benchmark.action_dim),
        ("state dimensions", state_dim, benchmark.state_dim),
        (f"cameras ({', '.join(image_keys)})", len(image_keys), 1),
        ("control steps a second (fps)", fps, benchmark.fps),
    ):
        if found is not None and found != expected:
            raise ValueError(
                f"The policy has {found:g} {what}, {benchmark.name} {expected}. Use one that was trained for "
                f"{benchmark.name}."
            )
