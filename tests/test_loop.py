"""Chunks that take time become one action a control step: on a simulated clock, and for moments on the real one."""

import heapq
import itertools
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from envs import get_benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import rollout

from smolandfast.deployment.loop import NEW_SHARE, STRATEGIES, ControlLoop, Schedule

FPS, HORIZON, N_ACTION_STEPS = 10, 8, 4


class SimulatedTime:
    """A clock that moves only when somebody waits, and an executor whose work is done `delays[i]` seconds later."""

    def __init__(self, delays=(0.0,)):
        self.time, self.delays, self.work, self.count = 100.0, itertools.cycle(delays), [], 0

    def now(self):
        return self.time

    def wait(self, event, seconds):
        until = self.time + seconds
        while self.work and self.work[0][0] <= until + 1e-9:
            self.time, _, future, result = heapq.heappop(self.work)
            finish(future, result)
        self.time = max(self.time, until)
        return event.is_set()

    def submit(self, function, *args):
        future, self.count = Future(), self.count + 1
        try:
            result = function(*args)
        except Exception as error:
            result = error
        delay = next(self.delays)
        if delay == 0:
            finish(future, result)
        else:
            heapq.heappush(self.work, (self.time + delay, self.count, future, result))
        return future


def finish(future, result):
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def make_loop(clock, sent, predict=None, **options):
    """A robot whose n-th chunk holds the numbers 100 n + its observation's step, + 1, ..."""
    chunks = itertools.count(1)

    def number(observation):
        return (100.0 * next(chunks) + np.arange(HORIZON))[:, None]

    return ControlLoop(
        lambda: None,
        predict or number,
        lambda action: sent.append(action.item()),
        FPS,
        N_ACTION_STEPS,
        **{"policy_fps": FPS, "now": clock.now, "wait": clock.wait, "executor": clock} | options,
    )


def test_a_second_run_begins_with_an_observation_not_with_the_rest_of_an_old_chunk():
    sent, clock = [], SimulatedTime([0.2])
    loop = make_loop(clock, sent)
    assert loop.run(6) == 6
    num_sent = len(sent)
    assert loop.run(4) == 4
    assert all(action >= 200 for action in sent[num_sent:]) and len(sent) > num_sent


@pytest.mark.parametrize("hold", [None, [8.0]])
def test_a_robot_that_converts_units_in_place_changes_no_plan(hold):
    sent = []

    def act(action):
        sent.append(action.item())
        action *= 0.5

    chunk = np.full((HORIZON, 1), 4.0)
    loop = ControlLoop(lambda: None, lambda seen: chunk, act, 100, N_ACTION_STEPS, policy_fps=None, hold=hold)
    loop.run(20)
    assert set(sent) <= {4.0, 8.0} and (chunk == 4).all()
    assert hold is None or sent[-1] == 8


def test_blending_takes_a_share_of_both_chunks_where_they_overlap():
    sent = []
    make_loop(SimulatedTime([0.2]), sent, strategy="blend").run(max_steps=10)
    both = [NEW_SHARE * new + (1 - NEW_SHARE) * old for new, old in ((202, 106), (203, 107))]
    assert sent == pytest.approx([102, 103, 104, 105, *both, 204, 205])


def test_switching_drops_what_is_past_and_leaves_no_gap():
    sent = []
    loop = make_loop(SimulatedTime([0.2]), sent)
    assert loop.run(max_steps=12) == 12
    # Nothing for two steps; asked for again at steps 4 and 8, the chunks are there two steps later.
    assert sent == [102, 103, 104, 105, 202, 203, 204, 205, 302, 303]
    assert loop.num_late == 0


def test_waiting_stands_still_and_begins_at_the_first_action():
    sent = []
    loop = make_loop(SimulatedTime([0.2]), sent, strategy="wait")
    loop.run(max_steps=12)
    assert sent == [100, 101, 102, 103, 103, 103, 200, 201, 202, 203]  # a position is held by sending it again
    assert loop.num_late == 2


def test_velocities_are_held_by_the_action_for_it_from_the_first_step():
    sent = []
    make_loop(SimulatedTime([0.2]), sent, strategy="wait", hold=[-1.0]).run(max_steps=8)
    assert sent == [-1, -1, 100, 101, 102, 103, -1, -1, -1]  # the last at the end


def test_a_chunk_that_is_late_is_waited_for_along_the_one_before_then_standing_still():
    sent = []
    loop = make_loop(SimulatedTime([0.1, 0.7, 0.1]), sent)
    loop.run(max_steps=14)
    assert sent == [*range(101, 108), 107, 107, 107, 207, 301, 302]  # of the second chunk, one action was not past
    assert loop.num_late == 3


def test_a_prediction_that_raises_is_a_late_chunk_and_too_many_in_a_row_end_the_loop():
    def fail_twice(observation, calls=itertools.count()):  # noqa: B008
        if next(calls) in (1, 2):
            raise OSError("the camera is gone")
        return np.arange(HORIZON)[:, None]

    sent = []
    loop = make_loop(SimulatedTime(), sent, fail_twice)
    loop.run(max_steps=8)
    assert sent == [1, 2, 3, 4, 5, 6, 1] and [str(e) for e in loop.failures] == ["the camera is gone"] * 2

    def fail(observation):
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="the camera is gone"):
        make_loop(SimulatedTime(), sent, fail, max_failures=2).run(max_steps=8)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (np.full((HORIZON, 1), np.nan), "expected finite numbers"),
        (np.zeros((2, 1)), "returned 2 actions, expected at least n_action_steps, 4"),
        (np.zeros((2, HORIZON, 1)), r"has shape \(2, 8, 1\)"),
        ("no numbers", "not an array of numbers"),
    ],
)
def test_no_action_is_sent_that_is_not_of_a_whole_chunk(chunk, words):
    sent = []
    with pytest.raises(ValueError, match=words):
        make_loop(SimulatedTime(), sent, lambda observation: chunk).run(max_steps=8)
    assert sent == []


def test_stop_ends_the_loop_before_another_action():
    clock, sent = SimulatedTime(), []
    loop = make_loop(clock, sent)
    act = loop.act
    loop.act = lambda action: (act(action), loop.stop() if len(sent) == 3 else None)
    assert loop.run() == 4 and len(sent) == 3
    assert clock.time <= 100 + 4 / FPS + 1e-9


def test_steps_that_the_robot_took_too_long_for_are_left_out():
    clock, sent = SimulatedTime(), []
    loop = make_loop(clock, sent)
    act = loop.act

    def slow(action):
        act(action)
        if len(sent) == 2:
            clock.time += 0.25

    loop.act = slow
    assert loop.run(max_steps=7) == 7
    assert sent == [101, 102, 104, 201, 202] and loop.num_skipped == 1  # step 3 was missed


@pytest.mark.parametrize("seconds", [0.0, 0.04, 0.1, 0.13, 0.35, 2.0])
@pytest.mark.parametrize("max_steps", [0, 1, 2, 7, 51])
def test_the_loop_drives_exactly_max_steps_and_counts_those_that_are_skipped(seconds, max_steps):
    clock, times = SimulatedTime(), []

    def act(action):
        times.append(clock.time)
        clock.time += seconds

    loop = make_loop(clock, [])
    loop.act = act
    assert loop.run(max_steps) == max_steps
    assert len(times) + loop.num_skipped == max(0, max_steps - 1)  # the first step has no chunk yet
    assert seconds <= 1 / FPS or loop.num_skipped > 0 or max_steps <= 2


@settings(max_examples=200, deadline=None)
@given(
    delays=st.lists(st.sampled_from([0.0, 0.03, 0.1, 0.35, 0.8, 1.2]), min_size=1, max_size=6),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    n_action_steps=st.integers(1, HORIZON),
)
def test_whatever_the_delays_an_action_belongs_to_its_step(delays, strategy, n_action_steps):
    """Chunks that say which step their actions are for: what is sent at a step is for this step, or is held."""
    clock, sent = SimulatedTime(delays), []
    loop = ControlLoop(
        clock.now,
        lambda seen: (round((seen - 100) * FPS) + np.arange(HORIZON, dtype=float))[:, None],
        lambda action: sent.append((round((clock.now() - 100) * FPS), action.item())),
        FPS,
        n_action_steps,
        strategy,
        policy_fps=FPS,
        now=clock.now,
        wait=clock.wait,
        executor=clock,
    )
    loop.run(max_steps=40)
    steps = [step for step, _ in sent]
    assert steps == list(range(steps[0], 40)) if steps else True  # from the first chunk on, one action a step
    if strategy == "wait":
        assert all(action <= step for step, action in sent)  # stale while it waited, never ahead of time
    else:
        held = 0
        for (step, action), (_, before) in zip(sent[1:], sent, strict=False):
            assert action == pytest.approx(step) or action == before
            held += action == before
        assert held == loop.num_late


def test_one_thread_observes_in_a_whole_run():
    """A camera or a renderer may belong to the thread that opened it."""
    threads = []

    def observe():
        threads.append(threading.current_thread())
        return 0

    predict = lambda observation: np.zeros((4, 1))  # noqa: E731
    loop = ControlLoop(observe, predict, lambda action: None, 100, 2, policy_fps=100)
    loop.run(8)
    assert len(threads) > 1 and len(set(threads)) == 1


def test_a_thread_predicts_while_the_loop_goes_on():
    """The real clock and a real thread, for a fifth of a second."""
    sent = []
    predict = lambda seen: np.zeros((1, HORIZON, 1))  # noqa: E731
    loop = ControlLoop(lambda: None, predict, sent.append, 100, N_ACTION_STEPS, policy_fps=None)
    assert loop.run(max_steps=20) == 20 and len(sent) >= 15 and not loop.failures


class Robot:
    """One connection for everything: it remembers what was sent, and whether two calls ever overlapped."""

    def __init__(self, observe_seconds=0.0, act_seconds=0.0):
        self.seconds, self.sent, self.overlapped = (observe_seconds, act_seconds), [], False
        self.connection = threading.Lock()

    def use(self, seconds):
        if not self.connection.acquire(blocking=False):
            self.overlapped = True
            raise OSError("Port is in use!")
        time.sleep(seconds)
        self.connection.release()

    def observe(self):
        self.use(self.seconds[0])

    def act(self, action):
        self.use(self.seconds[1])
        self.sent.append(action.item())


def drive(robot, predict=None, fps=200, **options):
    """A loop on the real clock."""
    predict = predict or (lambda seen: np.ones((HORIZON, 1)))
    return ControlLoop(robot.observe, predict, robot.act, fps, N_ACTION_STEPS, policy_fps=None, **options)


@pytest.mark.parametrize(("observe_seconds", "act_seconds"), [(0.002, 0.001), (0.012, 0.001), (0.001, 0.012)])
def test_observing_and_acting_never_overlap(observe_seconds, act_seconds):
    robot = Robot(observe_seconds, act_seconds)
    loop = drive(robot, strategy="switch", hold=[0.0])
    assert loop.run(60) == 60
    assert not robot.overlapped and not loop.failures and robot.sent[-1] == 0
    assert len(robot.sent) - 1 + loop.num_skipped == 60
    assert loop.num_skipped > 0 or max(observe_seconds, act_seconds) < 1 / 200


def fail_to_observe():
    raise OSError("the camera is gone")


@pytest.mark.parametrize("ending", ["max_steps", "stop", "failures", "act", "KeyboardInterrupt", "SystemExit"])
def test_hold_is_the_last_action_however_the_loop_ends(ending):
    clock, sent, tries = SimulatedTime(), [], []
    loop = make_loop(clock, sent, hold=[-1.0])
    act, error = loop.act, {"act": OSError, "failures": OSError}.get(ending, ValueError)
    error = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}.get(ending, error)

    def break_down(action):
        tries.append(action.item())
        if len(tries) == 3 and ending == "stop":
            loop.stop()
        elif len(tries) == 3 and ending not in ("max_steps", "failures"):
            raise error(ending)
        act(action)

    loop.act = break_down
    if ending == "failures":
        loop.observe = fail_to_observe
    if ending in ("max_steps", "stop"):
        assert loop.run(max_steps=5) == (3 if ending == "stop" else 5)
    else:
        with pytest.raises(error):
            loop.run(max_steps=5)
    assert sent[-1] == tries[-1] == -1
    assert len(tries) == {"max_steps": 6, "failures": 4}.get(ending, 4)


def test_hold_is_tried_once_on_a_robot_that_is_gone():
    tries = []

    def act(action):
        tries.append(action.item())
        raise ConnectionError(f"{len(tries)}")

    loop = make_loop(SimulatedTime(), [], hold=[-1.0])
    loop.act = act
    with pytest.raises(ConnectionError, match="1") as raised:
        loop.run(max_steps=5)
    assert tries == [-1, -1] and str(raised.value.__cause__) == "2"


def test_velocities_of_another_size_than_hold_are_refused():
    loop, sent = make_loop(SimulatedTime(), [], hold=[-1.0, -1.0], max_failures=1), []
    loop.act = lambda action: sent.append(action.tolist())
    with pytest.raises(ValueError, match=r"expected \(H, 2\)"):
        loop.run(max_steps=5)
    assert sent == [[-1, -1]] * 2


@pytest.fixture
def blocked():
    """Blocks whoever waits for it, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_camera_that_blocks_ends_the_loop_with_an_error_that_says_so(blocked):
    robot, start = Robot(), time.monotonic()
    robot.observe = blocked.wait
    loop = drive(robot, hold=[0.0], timeout=0.1, max_failures=2)
    with pytest.raises(TimeoutError, match="observe has not returned, 0.2 s.*hold was not sent"):
        loop.run()
    assert time.monotonic() - start < 2 and len(loop.failures) == 2 and loop.num_skipped > 10
    # Another run waits for the same camera.
    with pytest.raises(TimeoutError):
        loop.run()
    assert not robot.overlapped


def test_a_camera_that_blocks_does_not_keep_a_loop_that_has_ended(blocked):
    for options in ({}, {"hold": [0.0]}):
        robot = Robot()
        robot.observe = lambda: loop.stop() or blocked.wait()  # noqa: B023 - the loop of this round
        loop = drive(robot, timeout=0.1, **options)
        with pytest.raises(TimeoutError, match="The loop has ended, but observe has not returned for 0.1 s"):
            loop.run()


def test_a_prediction_that_blocks_ends_the_loop_and_hold_is_sent(blocked):
    robot = Robot()
    loop = drive(robot, lambda seen: blocked.wait(), hold=[0.0], timeout=0.05, max_failures=3)
    with pytest.raises(TimeoutError, match="predict has not returned, 0.15 s"):
        loop.run()
    assert len(loop.failures) == 3 and set(robot.sent) == {0.0} and not robot.overlapped


def test_predictions_that_take_too_long_are_failures_though_their_chunks_are_used():
    sent = []
    loop = make_loop(SimulatedTime([0.4]), sent, strategy="wait", timeout=0.25, max_failures=3)
    with pytest.raises(TimeoutError, match="0.25 s"):
        loop.run(max_steps=100)
    assert [type(error) for error in loop.failures] == [TimeoutError] * 3 and sent[0] == 100 and 203 in sent
    loop = make_loop(SimulatedTime([0.4, 0.1]), [], timeout=0.25, max_failures=2)
    assert loop.run(max_steps=100) == 100 and len(loop.failures) > 5  # never two in a row


def test_no_observation_begins_once_the_loop_has_ended():
    robot = Robot(observe_seconds=0.03)
    loop = drive(robot, fps=100)
    loop.run(2)
    assert robot.connection.acquire(blocking=False)  # nobody uses it, and nobody will
    time.sleep(0.05)
    assert not robot.overlapped


BLOCKED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from smolandfast_runtime.deployment.loop import ControlLoop
loop = ControlLoop(lambda: time.sleep(600), None, print, 100, 4, policy_fps=None, timeout=0.1, max_failures=1)
try:
    loop.run()
except TimeoutError as error:
    print(error)
"""


def test_a_camera_that_blocks_does_not_keep_the_interpreter_from_exiting(tmp_path):
    package = tmp_path / "smolandfast_runtime"
    (package / "deployment").mkdir(parents=True)
    for folder in (package, package / "deployment"):
        (folder / "__init__.py").touch()
    for name in ("deployment/loop.py", "checks_smolandfast.py"):
        shutil.copyfile(Path(__file__).parents[1] / name, package / name)
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "observe has not returned" in result.stdout


def test_a_robot_is_not_driven_at_another_rate_than_that_of_the_demonstrations():
    for fps, policy_fps in ((30, 10), (10, 30), (10, 9.9)):
        with pytest.raises(ValueError, match=f"fps is {fps}.*policy_fps={policy_fps}.*allow_other_fps=True"):
            ControlLoop(None, None, None, fps, 4, policy_fps=policy_fps)
        assert ControlLoop(None, None, None, fps, 4, policy_fps=policy_fps, allow_other_fps=True).fps == fps
    for policy_fps in (None, 10, 10.0, np.float64(10)):
        assert ControlLoop(None, None, None, 10, 4, policy_fps=policy_fps).fps == 10
    with pytest.raises(TypeError, match="policy_fps"):
        ControlLoop(None, None, None, 10, 4)
    for allow in (False, True):
        with pytest.raises(ValueError, match="policy_fps is nan"):
            ControlLoop(None, None, None, 10, 4, policy_fps=float("nan"), allow_other_fps=allow)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="strategy is 'guess', expected one of wait, switch, blend"):
        Schedule(4, "guess")
    with pytest.raises(ValueError, match="n_action_steps is 0"):
        Schedule(0)
    with pytest.raises(ValueError, match="fps is 0"):
        ControlLoop(None, None, None, 0, 4, policy_fps=None)
    for timeout in (0, -1, float("nan"), float("inf"), "5", None):
        with pytest.raises(ValueError, match="timeout is"):
            ControlLoop(None, None, None, 10, 4, policy_fps=None, timeout=timeout)
    for max_steps in (-1, 1.5, "10"):
        with pytest.raises(ValueError, match="max_steps is"):
            make_loop(SimulatedTime(), []).run(max_steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_simulator_that_does_not_wait_executes_what_the_loop_would(strategy):
    """PushT with a policy that always says where the pusher was seen, plus 10, 20, ... to the right."""
    benchmark = get_benchmark("pusht")

    def predict(images, states, texts):
        offsets = np.stack([10.0 * np.arange(HORIZON), np.zeros(HORIZON)], axis=1)
        return states[:, None] + offsets

    options = {"seeds": range(3), "n_action_steps": 4, "max_steps": 20, "num_envs": 2, "strategy": strategy}
    result = rollout(benchmark, predict, delay=2, **options)
    for episode in result.episodes:
        actions = np.array(episode.actions)
        assert len(actions) == 20
        np.testing.assert_array_equal(actions[0], actions[1])  # nothing to execute yet: it stands where it is
        assert episode.switches == ([2, 8, 14] if strategy == "wait" else [2, 6, 10, 14, 18])
        pause = actions[6:8] if strategy == "wait" else actions[:2]
        np.testing.assert_array_equal(pause[0], pause[1])
    steps = [np.linalg.norm(e.actions[i] - e.actions[i - 1]) for e in result.episodes for i in e.switches]
    np.testing.assert_allclose(result.switch_jumps, steps)
    undelayed = [np.array(e.actions) for e in rollout(benchmark, predict, **options).episodes]
    expected = [np.array(e.actions) for e in rollout(benchmark, predict, **options | {"strategy": "wait"}).episodes]
    if strategy != "blend":
        np.testing.assert_array_equal(undelayed, expected)
    with pytest.raises(ValueError, match="delay is -1"):
        rollout(benchmark, predict, delay=-1, **options)
