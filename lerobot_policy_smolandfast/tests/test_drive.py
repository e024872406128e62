"""`examples/drive.py` drives LeRobot's robots: one that is made up, and LeRobot's own SO-101 with made-up servos."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import IMAGES, NAMES, FakeArm, FakeCamera, FakeServos, calibration
from lerobot.utils.errors import DeviceNotConnectedError
from PIL import Image

from smolandfast import FastActionTokenizer, Normalizer, SmolAndFastForActionPrediction, compute_statistics
from smolandfast.deployment.export import export_policy
from smolandfast.deployment.runtime import FILES, DeployedPolicy
from smolandfast.files_smolandfast import write_checksums
from smolandfast.training import make_tiny_model, make_tiny_processor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
import drive  # noqa: E402

TASKS, FPS, REACH = ["Stack the cups.", "Fold the towel."], 25, 40.0
CAMERAS = ["observation.images.front", "observation.images.wrist"]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Path:
    """A policy with random weights for two cameras and six joints, whose chunks begin near the state."""
    rng = np.random.default_rng(0)
    states = rng.uniform(-REACH, REACH, (64, 6))
    chunks = states[:, None] + rng.normal(0, 0.5, (64, 16, 6)).cumsum(1)
    statistics = compute_statistics(states, chunks)
    normalizer = Normalizer(statistics, use_relative_actions=True)
    normalized = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
    tokenizer = FastActionTokenizer.fit(normalized, 10.0, 128, normalizer.action_scale)
    names = {"image_keys": CAMERAS, "state_names": NAMES, "action_names": NAMES, "fps": FPS}
    processor = make_tiny_processor(tokenizer, statistics, "", TASKS, use_relative_actions=True, **names)
    with torch.device("meta"):
        config = make_tiny_model(processor, n_action_steps=8).config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    SmolAndFastForActionPrediction(config).save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    export_policy(folder / "checkpoint", folder / "deployed")
    return folder / "deployed"


@pytest.fixture
def changed(deployed, tmp_path):
    """A copy of the policy with other fields."""

    def change(**fields) -> Path:
        folder = shutil.copytree(deployed, tmp_path / "changed")
        metadata = json.loads((folder / "policy.json").read_text()) | fields
        (folder / "policy.json").write_text(json.dumps(metadata))
        write_checksums(folder, FILES)
        return folder

    return change


@pytest.fixture
def run(deployed, tmp_path, monkeypatch, capsys):
    """Run the script on the made-up arm; further `--options` replace those for one second of driving."""
    monkeypatch.setattr(FakeArm, "calls", [])
    monkeypatch.setattr(drive, "RETURN_SECONDS", 0.1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(*arguments: str, robot: str = "fake_arm") -> SimpleNamespace:
        options = {"policy": deployed, "robot.type": robot, "robot.calibration_dir": tmp_path}
        options |= {"task": TASKS[0], "duration": 0.8}
        options |= dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        monkeypatch.setattr(sys, "argv", ["drive.py", *(f"--{name}={value}" for name, value in options.items())])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            drive.main()
        printed, calls = capsys.readouterr(), FakeArm.calls
        errors = [line for line in printed.err.splitlines() if line.startswith("drive.py: error: ")]
        actions = [call[1] for call in calls if call[0] == "act"]
        return SimpleNamespace(
            status=end.value.code, out=printed.out, errors=errors, calls=[call[0] for call in calls], actions=actions
        )

    return run


def first_actions(out: str) -> dict[str, float]:
    return {line.split()[0]: float(line.split()[-1]) for line in out.splitlines() if ".pos" in line}


def is_at(action: dict, position: list[float]) -> bool:
    return np.allclose([action[name] for name in NAMES], position, atol=1e-6)


START = [10.0, -20.0, 30.0, 5.0, -5.0, 0.5]
AT_START = f"--robot.start={START}"


def test_an_arm_is_driven_and_goes_back(run):
    ended = run(AT_START)
    assert (ended.status, ended.errors) == (0, []) and ended.calls[0] == "connect" and ended.calls[-1] == "disconnect"
    assert ended.calls.count("disconnect") == 1 and ended.calls.count("observe") >= 3
    num_driven = int(re.search(r"^(\d+) actions", ended.out, re.MULTILINE)[1])
    driven, back = ended.actions[:num_driven], ended.actions[num_driven:]
    assert num_driven > 8 and all(sorted(action) == sorted(NAMES) for action in ended.actions)
    assert not is_at(driven[-1], START) and len(back) == 5 and is_at(back[-1], START)
    assert re.search(r"a second, longest gap \d+\.\d+ s; \d+ late, \d+ skipped\n\d+ chunks, log-prob.* -\d", ended.out)
    assert "0 failed" in ended.out


def test_cameras_and_joints_are_matched_by_name(run, deployed):
    ended = run(AT_START, "--look_only=true")
    policy = DeployedPolicy(deployed)
    images = {f"observation.images.{name}": IMAGES[name] for name in ("wrist", "front")}
    report = policy.report(images, TASKS[0], START)
    expected = dict(zip(NAMES, report["actions"][0, 0], strict=True))
    assert first_actions(ended.out) == pytest.approx(expected, abs=0.01)
    assert f"Log-probability {report['log_probability'][0]:.2f}" in ended.out
    folder = Path(ended.out.partition("Images: ")[2].strip())
    assert sorted(path.name for path in folder.iterdir()) == ["front.png", "wrist.png"]
    for name in ("wrist", "front"):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{name}.png")), IMAGES[name])
    swapped = policy.report([IMAGES["wrist"], IMAGES["front"]], TASKS[0], START)
    assert not np.array_equal(swapped["log_probability"], report["log_probability"])  # the cameras matter


def test_looking_does_not_move(run):
    ended = run("--look_only=true")
    assert (ended.status, ended.errors) == (0, [])
    assert ended.calls == ["connect", "observe", "disconnect"]


NOWHERE = ["connect", "observe", "disconnect"]


@pytest.mark.parametrize(
    "option, calls, words",
    [
        ("--task=Sing.", [], ["'Sing.'", *TASKS, "--allow_unknown_task"]),
        ("--task=", [], ["''", *TASKS]),
        ("--fps=30", [], ["30", "25"]),
        ("--duration=nan", [], ["duration", "nan"]),
        ("--duration=-1", [], ["duration", "-1"]),
        ("--strategy=hop", [], ["'hop'", "switch"]),
        ("--num_threads=0", [], ["num_threads", "0"]),
        ("--robot.views=[front, top]", [], ["cameras wrist", "front, wrist", "front, top"]),
        ("--robot.views=[]", [], ["cameras front, wrist"]),
        (f"--robot.names={NAMES[:5]}", [], ["joints gripper.pos"]),
        (f"--robot.names={[*NAMES, 'lift.pos']}", [], ["actions lift.pos"]),
        ("--robot.start=[0, 0, 0, 0, 0, 90]", NOWHERE, ["gripper.pos is 90", "39.", "--allow_other_start"]),
        ("--max_first_step=0.0001", NOWHERE, ["first action", "shoulder_pan.pos from 0 to", "at most 0.0001 away"]),
        ("--policy=/nowhere", [], ["/nowhere", "export_policy.py"]),
        ("--robot.type=nothing", [], ["'nothing'", "so101_follower"]),
        ("--robot.color=red", [], ["--robot.color=red"]),
        ("--duration=long", [], ["duration", "'long'"]),
        ("--robot.discover_packages_path=nothing_here", [], ["nothing_here"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_anything_moves(run, option, calls, words):
    ended = run(option)
    assert ended.status == 2 and not ended.actions and ended.calls == calls
    [line] = ended.errors
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"state_names": None}, "state_names"),
        ({"action_names": None}, "action_names"),
        ({"fps": None}, "--fps is None"),
        ({"action_names": ["x.vel", *NAMES[1:]]}, "joints x.vel"),
    ],
)
def test_a_policy_without_names_or_rate_is_refused(run, changed, fields, word):
    ended = run(f"--policy={changed(**fields)}")
    assert (ended.status, ended.calls) == (2, []) and word in ended.errors[0]


def test_a_policy_that_commands_speeds_is_refused(run, changed, monkeypatch):
    names = [name.replace(".pos", ".vel") for name in NAMES]
    ended = run(f"--policy={changed(state_names=names, action_names=names)}", f"--robot.names={names}")
    assert (ended.status, ended.calls) == (2, []) and "shoulder_pan.vel" in ended.errors[0]


def test_what_was_refused_can_be_allowed(run, changed):
    assert run("--task=Sing.", "--allow_unknown_task=true").status == 0
    assert run(f"--policy={changed(fps=None)}", "--fps=20").status == 0
    # Relative actions end at the demonstrations' range, so they are far from a position far outside of it.
    outside = "--robot.start=[0, 0, 0, 0, 0, 90]"
    ended = run(outside, "--allow_other_start=true")
    assert ended.status == 2 and re.search(r"gripper.pos from 90 to [34]\d.*, at most 2\d", ended.errors[0])
    ended = run(outside, "--allow_other_start=true", "--max_first_step=100")
    assert ended.status == 0 and ended.actions


def test_a_position_at_the_edge_of_the_demonstrations_is_one_of_theirs(run):
    assert run(f"--robot.start=[{REACH + 1}, 0, 0, 0, 0, 0]", "--look_only=true").status == 0


def test_an_arm_that_was_moved_after_the_look_is_not_sent_back_at_once(run, monkeypatch):
    observe = FakeArm.get_observation

    def moved(self):
        observation = observe(self)
        self.position["gripper.pos"] = 90.0
        return observation

    monkeypatch.setattr(FakeArm, "get_observation", moved)
    ended = run()
    assert (ended.status, ended.actions) == (2, []) and "gripper.pos from 90 to" in ended.errors[0]
    assert ended.calls.count("observe") == 2 and ended.calls[-1] == "disconnect"


def test_a_scene_that_the_policy_does_not_know_ends_the_drive(run):
    ended = run("--lowest=-0.0001", "--duration=60")
    assert (ended.status, ended.actions) == (1, []) and ended.calls[-1] == "disconnect"
    assert "--lowest=-0.0001" in ended.errors[0] and "3 failed" in ended.out


@pytest.fixture
def servos(tmp_path) -> FakeServos:
    (tmp_path / "arm.json").write_text(json.dumps({name: asdict(motor) for name, motor in calibration().items()}))
    return FakeServos()


def so101_options(servos: FakeServos) -> list[str]:
    cameras = ", ".join(
        f"{name}: {{type: fake_camera, image: {name}, width: 64, height: 48, fps: 30}}" for name in ("wrist", "front")
    )
    return ["--robot.id=arm", f"--robot.port={servos.port}", f"--robot.cameras={{{cameras}}}"]


@pytest.fixture
def at_action(monkeypatch):
    """Do something within the action of this number, as often as it is counted."""

    def install(numbers, what, kind=FakeArm):
        send_action, count = kind.send_action, iter(range(10**6))

        def send(self, action):
            if next(count) in numbers:
                what()
            return send_action(self, action)

        monkeypatch.setattr(kind, "send_action", send)

    return install


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_the_loop_and_the_arm_goes_back_in_three_seconds(run, at_action, monkeypatch):
    monkeypatch.setattr(drive, "RETURN_SECONDS", 3.0)
    handler = signal.getsignal(signal.SIGINT)
    at_action([10], ctrl_c)
    ended = run(AT_START, "--duration=0")
    assert (ended.status, ended.errors) == (130, []) and ended.calls[-1] == "disconnect"
    times = [call[2] for call in FakeArm.calls if call[0] == "act"]
    back = ended.actions[11:]
    assert len(back) == 150 and times[-1] - times[11] >= 2.95 and is_at(back[-1], START)
    path = np.array([[action[name] for name in NAMES] for action in ended.actions[10:]])
    assert np.abs(np.diff(path, axis=0)).max() < np.abs(path[0] - START).max() / 75 + 1e-6  # smooth
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_ctrl_c_that_arrives_twice_counts_once(run, at_action):
    at_action([10, 11], ctrl_c)  # as a wrapper such as `timeout` sends it
    ended = run(AT_START, "--duration=0")
    assert ended.status == 130 and len(ended.actions) == 16 and is_at(ended.actions[-1], START)


def test_a_second_ctrl_c_skips_the_way_back(run, at_action, monkeypatch):
    monkeypatch.setattr(drive, "RETURN_SECONDS", 60.0)
    at_action([10, 60], ctrl_c)
    ended = run(AT_START, "--duration=0")
    assert ended.status == 130 and ended.calls[-1] == "disconnect"
    assert len(ended.actions) == 61 and not is_at(ended.actions[-1], START)


def test_after_the_duration_one_ctrl_c_skips_the_way_back(run, at_action, monkeypatch):
    monkeypatch.setattr(drive, "RETURN_SECONDS", 60.0)
    at_action([30], ctrl_c)
    ended = run(AT_START)
    assert ended.status == 130 and ended.calls[-1] == "disconnect" and len(ended.actions) == 31


def fail(*_, **__):
    raise ConnectionError("There is no\nstatus packet!")


def test_an_error_of_the_robot_ends_the_loop_and_the_arm_goes_back(run, at_action):
    at_action([10], fail)
    ended = run(AT_START)
    assert ended.status == 1 and ended.calls[-1] == "disconnect" and is_at(ended.actions[-1], START)
    assert ended.errors == ["drive.py: error: ConnectionError: There is no status packet!"]


def test_a_robot_that_does_not_answer_any_more_is_disconnected(run, at_action):
    at_action(range(10, 1000), fail)
    ended = run()
    assert ended.status == 1 and ended.calls[-1] == "disconnect" and len(ended.errors) == 2


@pytest.mark.parametrize("method", ["connect", "get_observation"])
def test_a_robot_that_cannot_be_used_is_disconnected(run, monkeypatch, method):
    monkeypatch.setattr(FakeArm, method, fail)
    ended = run()
    assert ended.status == 1 and ended.calls[-1] == "disconnect" and not ended.actions
    assert ended.errors == ["drive.py: error: ConnectionError: There is no status packet!"]


def test_a_robot_of_which_a_part_cannot_be_connected_is_one_line(run, servos, monkeypatch):
    monkeypatch.setattr(FakeCamera, "connect", fail)
    ended = run(*so101_options(servos), robot="so101_follower")
    assert (ended.status, ended.errors) == (1, ["drive.py: error: ConnectionError: There is no status packet!"])
    assert servos.read(FakeServos.TORQUE)[0] & 0xFF == 0 and not servos.goals


def test_ctrl_c_while_connecting_disconnects(run, monkeypatch):
    monkeypatch.setattr(FakeArm, "connect", lambda self: signal.default_int_handler(2, None))
    ended = run()
    assert (ended.status, ended.errors, ended.calls) == (130, [], ["disconnect"])


@pytest.mark.parametrize("error", [ConnectionError, DeviceNotConnectedError])  # the latter if a camera is gone
def test_a_robot_that_stays_connected_is_reported(run, monkeypatch, error):
    def disconnect(self):
        raise error

    monkeypatch.setattr(FakeArm, "disconnect", disconnect)
    ended = run()
    assert ended.status == 1 and "may still hold its position" in ended.errors[0]


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_lerobots_so101_is_driven_goes_back_and_drops_its_torque(run, servos, is_interrupted):
    if is_interrupted:  # while LeRobot writes to the port, or right after
        write = servos._move
        servos._move = lambda: (len(servos.goals) == 20 and os.kill(os.getpid(), signal.SIGINT), write())
    ended = run(*so101_options(servos), "--duration=2", robot="so101_follower")
    assert (ended.status, ended.errors) == (130 if is_interrupted else 0, []), ended.errors
    assert servos.num_damaged == 0
    num_driven = int(re.search(r"^(\d+) actions", ended.out, re.MULTILINE)[1])
    assert len(servos.goals) == num_driven + 5 and (20 <= num_driven < 25 if is_interrupted else num_driven > 25)
    assert any(goal != servos.START for goal in servos.goals)
    assert np.abs(np.subtract(servos.goals[-1], servos.START)).max() <= 2  # LeRobot rounds
    assert [registers[FakeServos.TORQUE] for registers in servos.memory.values()] == [0] * 6


def test_lerobots_own_limit_of_each_action_holds_on_both_ways(run, servos, monkeypatch):
    monkeypatch.setattr(drive, "RETURN_SECONDS", 1.0)
    ended = run(*so101_options(servos), "--robot.max_relative_target=1", robot="so101_follower")
    assert (ended.status, ended.errors) == (0, [])
    # A degree is 11 steps of a servo, and one percent of the gripper 20.
    position = np.array(servos.START)
    for goal in servos.goals:
        assert np.abs(goal - position).max() <= 22
        position = (position + goal) // 2
    assert np.abs(servos.goals[-1] - np.array(servos.START)).max() <= 2


def test_lerobots_so101_that_is_not_there_is_one_line(run):
    ended = run("--robot.port=/dev/nowhere", "--robot.cameras={}", robot="so101_follower")
    assert ended.status == 2 and "cameras front, wrist" in ended.errors[0]
