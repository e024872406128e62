"""Drive a LeRobot robot with a deployed policy.

    pip install -e ".[deployment]" "lerobot[feetech]==0.6.1"
    python examples/drive.py --policy=deployed --robot.type=so101_follower --robot.id=black --robot.port=/dev/ttyACM0 \
        --robot.cameras="{front: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}" \
        --task="Pick up the red cube." --look_only=true

The `--robot` options are LeRobot's own, as for `lerobot-record`. Nothing moves if a camera or joint is missing, if the
task or position is not one of the demonstrations', or with `--look_only=true`. Otherwise the arm moves until the end
of `--duration`, Ctrl-C or an error, then it goes back to where it began, and its torque is switched off. A second
Ctrl-C skips the way back. See `docs/deployment.md`.
"""

import contextlib
import io
import math
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
import numpy as np
from draccus.utils import ParsingError
from lerobot.configs import parser
from lerobot.robots import Robot, RobotConfig, make_robot_from_config
from lerobot.utils.errors import DeviceNotConnectedError
from lerobot.utils.import_utils import register_third_party_plugins
from PIL import Image

from smolandfast.deployment.loop import ControlLoop
from smolandfast.deployment.runtime import DeployedPolicy

RETURN_SECONDS, RETURN_FPS = 3.0, 50  # the way back, as in lerobot-rollout
SAME_PRESS = 0.3  # seconds
# Shares of a joint's demonstrated range: how far outside of it the arm may start, and its first action may be away.
MARGIN, FIRST_STEP = 0.05, 0.25


@dataclass
class DriveConfig:
    """Drive a LeRobot robot with a deployed policy."""

    robot: RobotConfig  # the robot and its cameras, as for lerobot-record
    policy: str  # folder that export_policy.py wrote
    task: str = ""  # the instruction; by default the policy's default task
    duration: float = 60.0  # seconds, 0: until Ctrl-C
    fps: float | None = None  # control rate, needed only if the policy does not know that of its demonstrations
    look_only: bool = False  # connect, predict once, print, save the images, and do not move
    allow_unknown_task: bool = False  # go on with a task that the policy was not trained on
    allow_other_start: bool = False  # go on from a position outside the demonstrated range
    max_first_step: float | None = None  # robot units that a joint's first action may be away (a quarter of its range)
    lowest: float | None = None  # end after three chunks in a row with a lower log-probability (docs/safety.md)
    strategy: str = "switch"  # how chunks follow each other: switch, blend or wait (docs/deployment.md)
    num_threads: int = 1  # threads for inference


class Refusal(ValueError):
    """Why the arm does not move."""


class Arm:
    """A robot under the policy's names, and what was measured while it was driven."""

    def __init__(self, robot: Robot, policy: DeployedPolicy, config: DriveConfig):
        self.robot, self.policy, self.config = robot, policy, config
        self.position: dict[str, float] = {}  # at the last observation
        self.sent: dict[str, float] | None = None  # the last action
        self.times, self.log_probabilities = [], []  # of actions, seconds; of chunks
        self.task = config.task.strip() or policy.default_task
        tasks, self.fps = policy.training_tasks or [], config.fps if policy.fps is None else policy.fps
        if not self.task or (tasks and self.task not in tasks and not config.allow_unknown_task):
            known = f"{tasks[:5]}" + (" and others" if len(tasks) > 5 else "") if tasks else "unknown tasks"
            fix = "Pass one of these, or --allow_unknown_task=true."
            raise Refusal(f"--task is {self.task!r}, the policy was trained on {known}. {fix}")
        if self.fps is None or config.fps not in (None, self.fps):
            raise Refusal(f"--fps is {config.fps}, the demonstrations have {self.fps}. Pass their control rate.")
        if not 0 <= config.duration < 1e6:
            raise Refusal(f"--duration is {config.duration}, expected seconds, or 0 to drive until Ctrl-C.")
        if config.max_first_step is not None and not config.max_first_step > 0:
            raise Refusal(f"--max_first_step is {config.max_first_step}, expected a number above 0.")
        self._match_names()

    def _match_names(self) -> None:
        observed, commanded = self.robot.observation_features, self.robot.action_features
        states, actions = self.policy.state_names, self.policy.action_names
        if states is None or actions is None:
            raise Refusal("The policy has no state_names or action_names. Train it on data with names, as LeRobot's.")
        keys = self.policy.image_keys
        self.cameras = {key: key.removeprefix("observation.").removeprefix("images.") for key in keys}
        cameras = [name for name, feature in observed.items() if isinstance(feature, tuple)]
        joints = [name for name in observed if name not in cameras]
        for what, expected, found in (
            ("cameras", list(self.cameras.values()), cameras),
            ("joints", list(dict.fromkeys(states + actions)), joints),
            ("actions", actions, list(commanded)),
        ):
            if missing := [name for name in expected if name not in found]:
                raise Refusal(
                    f"The robot has no {what} {', '.join(missing)}; the policy needs {', '.join(expected)}, the robot "
                    f"has {', '.join(found) or 'none'}. Give its parts the names that they had in the demonstrations."
                )
        if extra := [name for name in commanded if name not in actions]:
            raise Refusal(f"The robot also expects the actions {', '.join(extra)}, which the policy does not predict.")
        if other := [name for name in actions if not name.endswith(".pos")]:
            raise Refusal(f"The actions {', '.join(other)} are not positions (.pos): no way back could be sent.")

    def observe(self) -> dict:
        observation = self.robot.get_observation()
        self.position = {name: float(observation[name]) for name in self.policy.action_names}
        return observation

    def report(self, observation: dict) -> dict:
        """See [`DeployedPolicy.report`]."""
        images = {key: observation[name] for key, name in self.cameras.items()}
        return self.policy.report(images, self.task, [observation[name] for name in self.policy.state_names])

    def predict(self, observation: dict) -> np.ndarray:
        report = self.report(observation)
        self.log_probabilities.append(log_probability := float(report["log_probability"][0]))
        if (lowest := self.config.lowest) is not None and not log_probability >= lowest:
            raise RuntimeError(f"log-probability {log_probability:.2f} is below --lowest={lowest:g}")
        return report["actions"]

    def act(self, values: np.ndarray) -> None:
        action = dict(zip(self.policy.action_names, values.tolist(), strict=True))
        if self.sent is None:
            self.check_first_step(action)
        self.sent = action
        self.sent = action | (self.robot.send_action(action) or {})  # with --robot.max_relative_target, less
        self.times.append(time.monotonic())

    def check_first_step(self, action: dict[str, float]) -> None:
        limits = FIRST_STEP * _width(*self.policy.normalizer.action_limits)
        if self.config.max_first_step is not None:
            limits = [self.config.max_first_step] * len(action)
        far = [
            f"{name} from {self.position[name]:.4g} to {value:.4g}, at most {limit:.4g} away"
            for (name, value), limit in zip(action.items(), limits, strict=True)
            if not abs(value - self.position[name]) <= limit
        ]
        if far:
            fix = "Begin nearer to where the demonstrations begin, or raise --max_first_step."
            raise Refusal(f"The first action is far away: {'; '.join(far)}. {fix}")

    def look(self) -> None:
        """Observe, predict once, print, and check both."""
        observation, outside = self.observe(), []
        report = self.report(observation)
        action = dict(zip(self.policy.action_names, report["actions"][0, 0].tolist(), strict=True))
        print(f"Task: {self.task}\nCameras: {', '.join(self.cameras.values())}\nControl rate: {self.fps:g}")
        print(f"{'':24}{'position':>10}{'demonstrated':>24}{'first action':>14}")
        low, high = self.policy.normalizer.state_bounds
        margins = MARGIN * _width(low, high)
        for name, least, most, margin in zip(self.policy.state_names, low, high, margins, strict=True):
            value, bounds = observation[name], f"{least:.2f} to {most:.2f}"
            print(f"{name:24}{value:10.2f}{bounds:>24}" + (f"{action[name]:14.2f}" if name in action else ""))
            if not least - margin <= value <= most + margin:
                outside.append(f"{name} is {value:.4g}, demonstrated {bounds}")
        print(f"Log-probability {report['log_probability'][0]:.2f}", flush=True)
        if self.config.look_only:
            folder = Path(tempfile.mkdtemp(prefix="look-"))
            for name in self.cameras.values():
                Image.fromarray(np.asarray(observation[name])).save(folder / f"{name}.png")
            print(f"Images: {folder}")
        if outside and not self.config.allow_other_start:
            fix = "Move the arm by hand, check its calibration and units, or pass --allow_other_start=true."
            raise Refusal(f"Not a position of the demonstrations: {'; '.join(outside)}. {fix}")
        self.check_first_step(action)

    def go_back(self, start: dict[str, float], presses: list) -> None:
        """From the last action to `start`; Ctrl-C ends it, the second if the first has ended the loop."""
        last, steps, allowed = self.sent, round(RETURN_SECONDS * RETURN_FPS), min(len(presses), 1)
        for t in np.arange(1, steps + 1) / steps:
            begin, share = time.monotonic(), float(t * t * (3 - 2 * t))
            if len(presses) > allowed:
                break
            self.robot.send_action({name: (1 - share) * last[name] + share * start[name] for name in start})
            time.sleep(max(0.0, 1 / RETURN_FPS - (time.monotonic() - begin)))

    def print_summary(self, loop: ControlLoop) -> None:
        gaps = np.diff(self.times)
        rate = f", {1 / gaps.mean():.1f} of {self.fps:g} a second, longest gap {gaps.max():.3f} s" if len(gaps) else ""
        print(f"{len(self.times)} actions{rate}; {loop.num_late} late, {loop.num_skipped} skipped")
        found = self.log_probabilities
        scores = f", log-probability {np.mean(found):.2f} on average, {min(found):.2f} at least" if found else ""
        print(f"{len(found)} chunks{scores}; {len(loop.failures)} failed observations or predictions", flush=True)


def _width(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Each joint's range; of one that hardly moved, a tenth of the widest."""
    return np.maximum(high - low, 0.1 * (high - low).max())


def drive(config: DriveConfig) -> int:
    """Connect, look, drive, go back, disconnect; returns the exit status."""
    policy, robot = DeployedPolicy(config.policy, num_threads=config.num_threads), make_robot_from_config(config.robot)
    arm = Arm(robot, policy, config)
    steps = policy.n_action_steps
    loop = ControlLoop(arm.observe, arm.predict, arm.act, arm.fps, steps, config.strategy, policy_fps=policy.fps)
    status, presses, was_connected = 0, [], False

    def on_interrupt(*_) -> None:
        # To raise within a message to the robot would break its connection: LeRobot's bus then refuses all others.
        if presses and time.monotonic() - presses[-1] < SAME_PRESS:
            return  # a wrapper such as `timeout` sends it once more
        presses.append(time.monotonic())
        threading.Thread(target=loop.stop).start()  # this thread may hold the lock that it takes
        if len(presses) > 2:
            raise KeyboardInterrupt

    previous = signal.getsignal(signal.SIGINT)
    try:
        robot.connect()
        was_connected = True
        signal.signal(signal.SIGINT, on_interrupt)
        arm.look()
        start = arm.position
        if not config.look_only:
            try:
                loop.run(math.ceil(config.duration * arm.fps) or None)
            except Exception as error:
                status = fail(error)
            arm.print_summary(loop)
        if arm.sent is not None:
            print(f"Going back, {RETURN_SECONDS:g} s. Ctrl-C skips it.", flush=True)
            arm.go_back(start, presses)
    except KeyboardInterrupt:
        presses.append(time.monotonic())
    except Exception as error:
        status = fail(error)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the torque is off
        try:
            robot.disconnect()
        except Exception as error:
            if was_connected or not isinstance(error, DeviceNotConnectedError):
                status = fail(error, "The robot is not disconnected, and may still hold its position: ")
        signal.signal(signal.SIGINT, previous)
    return 130 if presses and status == 0 else status


def fail(error: Exception, what: str = "") -> int:
    """Print an error as one line; returns the exit status."""
    is_input = isinstance(error, Refusal)
    name = "" if is_input else f"{type(error).__name__}: "
    print(f"drive.py: error: {what}{name}{' '.join(str(error).split())}", file=sys.stderr)
    return 2 if is_input else 1


@parser.wrap()
def parse(config: DriveConfig) -> DriveConfig:
    return config


def main() -> None:
    messages = io.StringIO()
    try:
        for package in ("lerobot.robots", "lerobot.cameras"):
            parser.load_plugin(package)
        register_third_party_plugins()
        with contextlib.redirect_stderr(messages):  # of errors it writes a page, with the options of all robots
            config = parse()
        status = drive(config)
    except SystemExit as end:
        if not end.code:
            raise
        status = fail(Refusal(messages.getvalue().rpartition("error: ")[2]))
    except (ValueError, OSError, ImportError, ParsingError, parser.PluginLoadError) as error:
        status = fail(Refusal(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
