"""One action at every control step while predictions take time: for a robot, and for a simulator that does not wait.

Chunks are timestamped by their observation: one that arrives k steps late has its first k
actions dropped.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from numbers import Real
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np

from ..checks_smolandfast import as_numbers, check_fps, check_whole

logger = logging.getLogger("smolandfast")

# What happens between the request for a chunk and its arrival, and then.
STRATEGIES = {
    "wait": "execute all n_action_steps, request a chunk, stand still until it arrives, begin with its first action",
    "switch": "continue the previous chunk; when the new one arrives, drop its past actions and switch to it",
    "blend": "the same, but where both chunks have an action, take NEW_SHARE of the new and the rest of the old",
}
MAX_TIMEOUT = 3600  # seconds
NEW_SHARE = 0.7  # LeRobot's `weighted_average` of its asynchronous inference (release 0.6.1)


class Schedule:
    """Which action to execute at each control step, without threads or a clock.

    At each step, request a chunk if [`is_due`], pass one that has arrived to [`arrive`], execute [`next_action`].

    Args:
        n_action_steps: Steps from one observation to the next.
        strategy: A key of `STRATEGIES`.

    Attributes:
        step: The current control step, 0 at first.
    """

    def __init__(self, n_action_steps: int, strategy: str = "switch"):
        check_whole(n_action_steps, "n_action_steps")
        if strategy not in list(STRATEGIES):
            raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}.")
        self.n_action_steps, self.strategy, self.step = n_action_steps, strategy, 0
        self._plan: deque[np.ndarray] = deque()  # actions of this step and those after it
        self._next_observation = 0

    def is_due(self) -> bool:
        """Whether to request a chunk now, unless one is still to arrive."""
        return not self._plan if self.strategy == "wait" else self.step >= self._next_observation

    def arrive(self, chunk: np.ndarray, observed_at: int) -> None:
        """Accept a chunk `(H, action_dim)` whose observation was made at step `observed_at`."""
        self._next_observation = observed_at + self.n_action_steps
        if self.strategy == "wait":
            self._plan = deque(chunk[: self.n_action_steps])
            return
        new = chunk[max(0, self.step - observed_at) :]
        if self.strategy == "blend":
            both = min(len(new), len(self._plan))
            old = np.array(self._plan)[:both].reshape(both, new.shape[1])
            new = np.concatenate([NEW_SHARE * new[:both] + (1 - NEW_SHARE) * old, new[both:]])
        self._plan = deque(new)

    def next_action(self) -> np.ndarray | None:
        """The action of this step `(action_dim,)`, or None to stand still. Then the next step begins."""
        self.step += 1
        return self._plan.popleft() if self._plan else None


class ControlLoop:
    """Drives a robot with a policy: an action every 1 / fps seconds, while a thread observes and predicts.

    `observe` and `act` never overlap, since most robots have one connection for both. At each step `act` comes first.
    If `observe` takes longer than the rest of the step, `act` waits until the end of its own step, which is then
    skipped. While `observe` blocks, nothing can be sent to the robot: give your cameras a time-out below 1 / fps.

    Only actions of a complete, finite chunk are sent. If a chunk is late, the robot continues along the previous one
    (not with the strategy "wait"), and stands still at its end. An observation or a prediction that raises, or takes
    longer than `timeout`, is a failure; `max_failures` in a row end the loop, which raises the last of them.

    However the loop ends, `hold` is the last action that the robot gets.

    Args:
        observe: Returns the input of `predict`; called in the thread.
        predict: Observation `-> (H, action_dim)`, or a batch of one, in the robot's units; called in the thread.
        act: Sends an action `(action_dim,)` to the robot; must not wait for it to be reached.
        fps: Control steps a second.
        n_action_steps, strategy: See [`Schedule`].
        hold: The action that stands still, for a robot whose actions are velocities. By default the last action is
            sent again, which holds a position, and nothing before the first chunk or at the end.
        max_failures: Failures in a row that end the loop.
        policy_fps: Control steps a second of the demonstrations, `policy.fps`; `None` if unknown.
        allow_other_fps: Whether `fps` may differ from `policy_fps`. The robot then moves at another speed than in the
            demonstrations.
        timeout: Seconds that an observation and its prediction may take together. Each further `timeout` is another
            failure. The chunk is still used when it arrives.
        now, wait, executor: For tests: the clock, in seconds; how to wait for an event, with a time-out in seconds;
            where predictions run.

    Attributes:
        num_late: Steps that stood still after the first chunk, because the next was late.
        num_skipped: Steps at which no action was sent, because `act` or `observe` took too long.
        failures: The exceptions of observations and predictions, and a `TimeoutError` for each that took too long.

    Raises:
        ValueError: An argument out of range, or another control rate than that of the demonstrations.
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
        *,
        policy_fps: float | None,
        allow_other_fps: bool = False,
        timeout: float = 5.0,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[Event, float], bool] = Event.wait,
        executor: Executor | None = None,
    ):
        check_fps(fps)
        is_other = policy_fps is not None and not math.isclose(fps, check_fps(policy_fps, "policy_fps"))
        if is_other and not allow_other_fps:
            raise ValueError(
                f"fps is {fps:g}, but the demonstrations have policy_fps={policy_fps:g} control steps a second: the "
                f"robot would move {fps / policy_fps:.3g} times as fast. Pass fps={policy_fps:g}, or "
                "allow_other_fps=True if this is what you want."
            )
        check_whole(max_failures, "max_failures")
        if not isinstance(timeout, Real) or not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(f"timeout is {timeout!r}, expected seconds, above 0 and at most {MAX_TIMEOUT}.")
        self.schedule = Schedule(n_action_steps, strategy)
        self.observe, self.predict, self.act, self.fps, self.timeout = observe, predict, act, fps, timeout
        self.hold = None if hold is None else as_numbers(hold, "hold", ("action_dim",))
        self.max_failures, self.failures, self.num_late, self.num_skipped = max_failures, [], 0, 0
        self._now, self._wait, self._stopped = now, wait, Event()
        self._executor = executor
        self._robot = Lock()  # held while `observe` or `act` uses the robot
        self._waiting_for = "observe"

    def stop(self) -> None:
        """Send no further action but `hold`; can be called from any thread, also from within `act`.

        [`run`] returns within 1 / fps, or as soon as the current observation is finished.
        """
        self._stopped.set()

    def run(self, max_steps: int | None = None) -> int:
        """Drive until [`stop`] is called, or for `max_steps`; returns the number of steps, skipped ones included.

        Each run begins with an observation. A stopped loop cannot run again: make a new one. After the return, no
        `observe` or `act` is running, and none will begin.

        Raises:
            Exception: What `act` raises, or the last of too many failures.
            TimeoutError: Observations or predictions took too long; or an observation had not returned `timeout`
                seconds after the end, so that `hold` was not sent.
        """
        if max_steps is not None:
            check_whole(max_steps, "max_steps", 0, 2**53)
        # The rest of a chunk from an earlier run is out of date.
        self.schedule = Schedule(self.schedule.n_action_steps, self.schedule.strategy)
        executor, is_over = self._executor or _DaemonExecutor(), Event()
        try:
            self._drive(executor, max_steps, is_over)
        except BaseException as error:
            try:
                self._leave_robot(is_over)
            except Exception as at_end:
                logger.error(f"At the end of the loop: {type(at_end).__name__}: {at_end}")
                if isinstance(error, TimeoutError):
                    raise TimeoutError(f"{error} {at_end}") from error
                raise error from at_end
            raise
        else:
            self._leave_robot(is_over)
        finally:
            if self._executor is None:
                executor.close()
        return self.schedule.step

    def _drive(self, executor: Executor, max_steps: int | None, is_over: Event) -> None:
        begin, last = self._now(), None
        request, requested_at, num_timeouts, num_failed = None, 0.0, 0, 0
        while not self._stopped.is_set() and (max_steps is None or self.schedule.step < max_steps):
            step = self.schedule.step
            due = begin + (step + 1) / self.fps
            if request is not None and request.done():
                if not self._take(request):
                    num_failed += 1
                elif num_timeouts == 0:
                    num_failed = 0
                request = None
            elif request is not None and self._now() - requested_at >= (num_timeouts + 1) * self.timeout:
                num_timeouts, num_failed = num_timeouts + 1, num_failed + 1
                waited = f"{num_timeouts * self.timeout:g} s after an observation was due (timeout={self.timeout:g})"
                fix = "Check the camera and the load of this computer, or raise timeout."
                self._note(TimeoutError(f"{self._waiting_for} has not returned, {waited}. {fix}"))
            if num_failed >= self.max_failures:
                raise self.failures[-1]
            is_due = request is None and self.schedule.is_due()
            action = self.schedule.next_action()
            is_late = action is None
            if is_late:
                action = last if self.hold is None else self.hold
            if action is not None:
                if self._robot.acquire(timeout=max(0.0, due - self._now())):
                    try:
                        self.act(action.copy())  # it may work in place
                    finally:
                        self._robot.release()
                    self.num_late += is_late and last is not None
                    last = last if is_late else action
                else:
                    self.num_skipped += 1
            if self._stopped.is_set():
                break
            if is_due:
                requested_at, num_timeouts = self._now(), 0
                request = executor.submit(self._observe_and_predict, begin, is_over)
            # Skip the steps that have passed while `act` was running.
            num_past = int(max(0.0, self._now() - due) * self.fps)
            if max_steps is not None:
                num_past = min(num_past, max_steps - step - 1)
            for _ in range(num_past):
                self.schedule.next_action()
            self.num_skipped += num_past
            self._wait(self._stopped, max(0.0, due + num_past / self.fps - self._now()))

    def _observe_and_predict(self, begin: float, is_over: Event) -> tuple[np.ndarray, int] | None:
        self._waiting_for = "observe"
        with self._robot:
            if is_over.is_set():
                return None
            observation = self.observe()
        observed_at = int((self._now() - begin) * self.fps + 1e-6)  # a clock is not exact
        self._waiting_for = "predict"
        chunk = np.asarray(self.predict(observation))
        chunk = chunk[0] if chunk.ndim == 3 and len(chunk) == 1 else chunk
        chunk = as_numbers(chunk, "chunk", ("H", "action_dim" if self.hold is None else len(self.hold)))
        steps = self.schedule.n_action_steps
        if len(chunk) < steps:
            raise ValueError(f"predict returned {len(chunk)} actions, expected at least n_action_steps, {steps}.")
        return chunk, observed_at

    def _take(self, request: Future) -> bool:
        """Whether the request has succeeded."""
        try:
            self.schedule.arrive(*request.result())
        except Exception as error:
            self._note(error)
            return False
        return True

    def _note(self, error: Exception) -> None:
        self.failures.append(error)
        logger.warning(f"No chunk: {type(error).__name__}: {error}")

    def _leave_robot(self, is_over: Event) -> None:
        """Let the current observation finish, begin no other, and send `hold`."""
        is_over.set()
        if not self._robot.acquire(timeout=self.timeout):
            unsent = "it still uses the robot" if self.hold is None else "hold was not sent, the robot may move on"
            raise TimeoutError(
                f"The loop has ended, but observe has not returned for {self.timeout:g} s: {unsent}. Use the robot's "
                "own stop, and give the camera a time-out."
            )
        try:
            if self.hold is not None:
                self.act(self.hold.copy())
        finally:
            self._robot.release()


class _DaemonExecutor:
    """Runs calls in one daemon thread, which does not keep the interpreter alive as `ThreadPoolExecutor`'s does."""

    def __init__(self):
        self._calls: SimpleQueue = SimpleQueue()
        Thread(target=self._work, name="smolandfast policy", daemon=True).start()

    def submit(self, function: Callable, *args: Any) -> Future:
        future: Future = Future()
        self._calls.put((future, function, args))
        return future

    def close(self) -> None:
        """End the thread after the submitted calls."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, args = call
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
