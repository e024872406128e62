"""`lerobot-rollout` runs the policy on a robot, with each of its engines and options that concern the policy."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import ACTION_DIM, CAMERAS, FPS, STATE_NAMES, TASKS, save_checkpoint
from lerobot.robots import Robot, RobotConfig
from lerobot.rollout import context
from lerobot.scripts.lerobot_rollout import rollout

ACTIONS, SENT, ENOUGH = [f"{i}.pos" for i in range(ACTION_DIM)], [], 12


@RobotConfig.register_subclass("still_arm")
@dataclass(kw_only=True)
class StillArmConfig(RobotConfig):
    """An arm that always reports one state."""

    state: float = 0.0


class StillArm(Robot):
    config_class, name = StillArmConfig, "still_arm"
    is_connected = is_calibrated = True
    action_features = dict.fromkeys(ACTIONS, float)
    observation_features = {**dict.fromkeys(STATE_NAMES, float), "front": (48, 64, 3), "wrist": (48, 64, 3)}

    def __init__(self, config):
        super().__init__(config)
        self.config = config

    def connect(self, calibrate=True): ...
    def calibrate(self): ...
    def configure(self): ...
    def disconnect(self): ...

    def get_observation(self):
        images = {name: np.zeros((48, 64, 3), np.uint8) for name in ("front", "wrist")}
        return {**dict.fromkeys(STATE_NAMES, self.config.state), **images}

    def send_action(self, action):
        SENT.append(action)
        if len(SENT) == ENOUGH:
            raise KeyboardInterrupt  # as a user ends it
        return action


@pytest.fixture
def run(make_policy, tmp_path, monkeypatch):
    save_checkpoint(make_policy(), tmp_path)

    def run(*arguments: str) -> list[dict]:
        SENT.clear()
        command = ["lerobot-rollout", f"--policy.path={tmp_path}", "--robot.type=still_arm", "--duration=60"]
        command += [f"--robot.calibration_dir={tmp_path}"]
        monkeypatch.setattr(context, "make_robot_from_config", StillArm)  # LeRobot would look for it by its module
        monkeypatch.setattr(sys, "argv", [*command, f"--fps={FPS}", "--return_to_initial_position=false", *arguments])
        rollout()
        return list(SENT)

    return run


@pytest.mark.parametrize("engine", ["sync", "rtc"])
@pytest.mark.parametrize("is_compiled", ["false", "true"])
def test_a_robot_is_driven(run, engine, is_compiled):
    # At this rate a chunk lasts for two seconds: in real time, no action is dropped as too late.
    options = [f"--inference.type={engine}", f"--use_torch_compile={is_compiled}", "--fps=3"]
    actions = run(f"--task={TASKS[0]}", *options)
    assert len(actions) == ENOUGH and all(list(action) == ACTIONS for action in actions)


def test_a_robot_without_a_task_stands_still(run):
    with pytest.raises(ValueError, match=f"is empty.*{TASKS[0]}.*{TASKS[1]}"):
        run()
    assert not SENT
    assert run(f"--policy.default_task={TASKS[1]}")


def test_a_robot_in_other_units_is_reported(run, capsys):
    run(f"--task={TASKS[0]}", "--robot.state=1000")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "outside" in line]
    assert all(f"{name} is 1000" in line for name in STATE_NAMES)


def test_cameras_of_other_names_are_mapped(run, monkeypatch):
    features = {**StillArm.observation_features}
    features["top"] = features.pop("front")
    monkeypatch.setattr(StillArm, "observation_features", features)
    observe = StillArm.get_observation
    monkeypatch.setattr(
        StillArm, "get_observation", lambda self: {"top": (seen := observe(self)).pop("front"), **seen}
    )
    assert run(f"--task={TASKS[0]}", f'--rename_map={{"observation.images.top": "{CAMERAS[0]}"}}')
