"""From chunks that take time to an action at every control step: for a robot, and for a simulator that does not wait.

Needs NumPy alone. A chunk begins at the moment of its observation; when it arrives some steps later, as many of its
actions are past.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np

from .checks_smolandfast import as_numbers, check_whole

logger = logging.getLogger("smolandfast")

# What happens between asking for a chunk and its arrival, and then.
STRATEGIES = {
    "wait": "execute all n_action_steps, ask, stand still until the chunk is there, and begin with its first action",
    "switch": "go on with the chunk before; then drop what is past of the new one, and switch to it",
    "blend": "the same, but where both chunks have an action, take NEW_SHARE of the new one and the rest of the old",
}
NEW_SHARE = 0.7  # LeRobot's `weighted_average` of its asynchronous inference (release 0.6.1)


class Schedule:
    """Which action to execute at each control step. Without threads and clock: whoever calls it counts the steps.

    At each step: ask for a chunk if [`is_due`], hand over with [`arrive`] what has arrived, execute [`next_action`].

    Args:
        n_action_steps: Steps from one observation to the next.
        strategy: A key of `STRATEGIES`.

    Attributes:
        step: The current control step, 0 at first.
    """

    def __init__(self, n_action_steps: int, strategy: str = "switch"):
        check_whole(n_action_steps, "n_action_steps")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}.")
        self.n_action_steps, self.strategy, self.step = n_action_steps, strategy, 0
        self._plan: deque[np.ndarray] = deque()  # actions of this step and those after it
        self._next_observation = 0

    def is_due(self) -> bool:
        """Whether a chunk should be asked for now, unless one is still to arrive."""
        return not self._plan if self.strategy == "wait" else self.step >= self._next_observation

    def arrive(self, chunk: np.ndarray, observed_at: int) -> None:
        """Take over a chunk `(H, action_dim)` whose observation was made at step `observed_at`."""
        self._next_observation = observed_at + self.n_action_steps
        if self.strategy == "wait":
            self._plan = deque(chunk[: self.n_action_steps])
            return
        new = chunk[max(0, self.step - observed_at) :]
        if self.strategy == "blend":
            both = min(len(new), len(self._plan))
            old = np.array([self._plan[i] for i in range(both)]).reshape(both, new.shape[1])
            new = np.concatenate([NEW_SHARE * new[:both] + (1 - NEW_SHARE) * old, new[both:]])
        self._plan = deque(new)

    def next_action(self) -> np.ndarray | None:
        """The action of this step `(action_dim,)`, or None: stand still. Then the next step begins."""
        self.step += 1
        return self._plan.popleft() if self._plan else None


class ControlLoop:
    """Drives a robot with a policy: an action every 1 / fps seconds, predictions beside it in a thread.

    An action is sent only if it is of a whole, finite chunk. If a chunk is late, the robot goes on along the one
    before (not with the strategy "wait"), and stands still where that ends. A camera that stalls, or a prediction that
    raises, is a chunk that is late; after `max_failures` in a row the loop ends, and raises what was raised last.

    Args:
        observe: Returns what `predict` takes; called in the thread, so a camera may take its time.
        predict: Observation `-> (H, action_dim)`, or a batch of one, in the robot's units.
        act: Sends an action `(action_dim,)` to the robot; must not wait for it to be reached.
        fps: Control steps a second, those of the demonstrations.
        n_action_steps, strategy: See [`Schedule`].
        hold: The action that stands still, for a robot whose actions are velocities. By default the last action is
            sent again, as befits positions, and nothing before the first chunk.
        max_failures: Predictions that may fail one after the other.
        now, wait, executor: The clock, in seconds; how to wait for an event, with a time-out in seconds; where
            predictions run. Tests bring their own.

    Attributes:
        num_late: Steps that stood still after the first chunk, because the next was late.
        failures: What observations and predictions have raised.
    """

    def __init__(
        self,
        observe: Callable[[], Any],
        predict: Callable[..., np.ndarray],
        act: Callable[[np.ndarray], None],
        fps: float,
        n_action_steps: int,
        strategy: str = "switch",
        hold: np.ndarray | None = None,
        max_failures: int = 3,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[Event, float], bool] = Event.wait,
        executor: Executor | None = None,
    ):
        if not 0 < fps < float("inf"):
            raise ValueError(f"fps is {fps!r}, expected a number above 0: the control steps a second.")
        check_whole(max_failures, "max_failures")
        self.schedule = Schedule(n_action_steps, strategy)
        self.observe, self.predict, self.act, self.fps = observe, predict, act, fps
        self.hold = None if hold is None else as_numbers(hold, "hold", ("action_dim",))
        self.max_failures, self.failures, self.num_late = max_failures, [], 0
        self._now, self._wait, self._executor, self._stopped = now, wait, executor, Event()

    def stop(self) -> None:
        """Send no further action: from any thread, and from within `act` too. [`run`] returns within 1 / fps."""
        self._stopped.set()

    def run(self, max_steps: int | None = None) -> int:
        """Drive until [`stop`] is called, or for `max_steps`; returns how many steps were driven.

        Raises:
            Exception: What `act` raises, and at last what observations and predictions do.
        """
        executor = self._executor or ThreadPoolExecutor(1, "policy")
        begin, first, coming, failed, last = self._now(), self.schedule.step, None, 0, None
        try:
            while not self._stopped.is_set():
                step = self.schedule.step - first
                if max_steps is not None and step >= max_steps:
                    break
                if coming is not None and coming.done():
                    failed = 0 if self._take(coming) else failed + 1
                    coming = None
                    if failed >= self.max_failures:
                        raise self.failures[-1]
                if coming is None and self.schedule.is_due():
                    coming = executor.submit(self._look_and_predict, begin, first)
                action = self.schedule.next_action()
                if action is None:
                    self.num_late += last is not None
                    action = last if self.hold is None else self.hold
                if action is not None:
                    self.act(action)
                    last = action
                # Steps that were missed, since `act` took long, are left out.
                due = begin + (step + 1) / self.fps
                late = int(max(0.0, self._now() - due) * self.fps)
                for _ in range(late):
                    self.schedule.next_action()
                self._wait(self._stopped, max(0.0, due + late / self.fps - self._now()))
        finally:
            if self._executor is None:
                executor.shutdown(wait=False, cancel_futures=True)
        return self.schedule.step - first

    def _look_and_predict(self, begin: float, first: int) -> tuple[np.ndarray, int]:
        observation = self.observe()
        observed_at = int((self._now() - begin) * self.fps + 1e-6)  # a clock is not exact
        chunk = np.asarray(self.predict(observation))
        chunk = as_numbers(chunk[0] if chunk.ndim == 3 and len(chunk) == 1 else chunk, "chunk", ("H", "action_dim"))
        if len(chunk) < (needed := self.schedule.n_action_steps):
            raise ValueError(f"predict returned {len(chunk)} actions, expected at least n_action_steps, {needed}.")
        return chunk, first + observed_at

    def _take(self, coming: Future) -> bool:
        try:
            chunk, observed_at = coming.result()
            self.schedule.arrive(chunk, observed_at)
            return True
        except Exception as error:
            self.failures.append(error)
            logger.warning(f"No chunk: {type(error).__name__}: {error}")
            return False
