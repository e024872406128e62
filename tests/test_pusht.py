"""The PushT side of the examples, in the real simulator, with stand-ins for the policy."""

import ctypes.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import av
import evaluate
import gymnasium
import numpy as np
import pytest
import torch
from envs import FRAME_SIZE, get_benchmark
from envs.pusht import BENCHMARK as PUSHT
from envs.pusht import TASK
from envs.pusht.simulator import ENV_ID
from failures import kind_of_ending
from PIL import Image
from rollouts import rollout, success_rate, write_contact_sheet, write_video
from transformers import BatchFeature

SEEDS = [1000, 1001, 1002, 1003, 1004]


def hold_still(images, states, texts):
    return np.repeat(states[:, None], 8, axis=1)


def wander(images, states, texts):
    """Targets that look random, yet are a function of each observation alone."""
    rngs = [
        np.random.default_rng([int(np.sum(i, dtype=np.int64)), *s.view(np.uint32)])
        for (i,), s in zip(images, states, strict=True)
    ]
    return np.stack([rng.uniform(0, 512, (8, 2)) for rng in rngs])


def scores(result):
    return result.seeds, result.max_rewards, result.sum_rewards, result.successes, result.lengths


@pytest.fixture(scope="module")
def filmed():
    return rollout(PUSHT, wander, SEEDS, n_action_steps=4, max_steps=12, record=3).recordings


def test_the_same_seeds_give_the_same_result():
    first, second = (rollout(PUSHT, wander, SEEDS, n_action_steps=4, max_steps=20) for _ in range(2))
    assert scores(first) == scores(second)
    assert first.seeds == SEEDS and len(set(first.sum_rewards)) > 1


def test_an_episode_does_not_depend_on_the_others_or_on_num_envs():
    together = rollout(PUSHT, wander, SEEDS, n_action_steps=4, num_envs=5, max_steps=20)
    assert scores(rollout(PUSHT, wander, SEEDS, n_action_steps=4, num_envs=2, max_steps=20)) == scores(together)
    backwards = rollout(PUSHT, wander, SEEDS[::-1], n_action_steps=4, num_envs=3, max_steps=20)
    assert backwards.sum_rewards[::-1] == together.sum_rewards
    assert backwards.max_rewards[::-1] == together.max_rewards


def test_the_policy_sees_and_moves_what_a_plain_gymnasium_loop_would():
    seen = []

    def predict(images, states, texts):
        seen.append((images[0][0], states[0]))
        return wander(images, states, texts)

    result = rollout(PUSHT, predict, [21], n_action_steps=3, max_steps=30)
    env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos", max_episode_steps=30)
    observation, _ = env.reset(seed=21)
    rewards, done = [], False
    for image, state in seen:
        assert image.dtype == np.uint8 and image.shape == (96, 96, 3)
        assert state.dtype == np.float32 and np.array_equal(state, observation["agent_pos"].astype(np.float32))
        assert np.array_equal(image, observation["pixels"])
        for action in wander([[image]], state[None], [TASK])[0, :3].astype(np.float32):
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            done = terminated or truncated
    assert done and len(seen) == 10 and max(rewards) > rewards[-1]
    assert (result.max_rewards, result.sum_rewards, result.lengths) == ([max(rewards)], [sum(rewards)], [30])


def test_holding_still_scores_about_008():
    """The floor of every comparison: 0.079 +- 0.007 over 1,500 seeds. One step is enough, the block does not move."""
    metrics = rollout(PUSHT, hold_still, range(200), n_action_steps=1, max_steps=1).metrics()
    assert 0.05 < metrics["avg_max_reward_low"] < 0.079 < metrics["avg_max_reward_high"] < 0.12
    assert metrics["pc_success"] == 0.0 and metrics["episode_lengths"] == [1] * 200


def test_n_action_steps_are_executed_between_two_predictions():
    """Each chunk commands another far target; the policy is asked again after three steps of the way there."""
    asked = []

    def predict(images, states, texts):
        asked.append(states[0])
        target = np.array([[100.0, 100.0]]) if len(asked) % 2 else np.array([[400.0, 400.0]])
        return np.tile(target, (1, 10, 1))

    result = rollout(PUSHT, predict, [3], n_action_steps=3, max_steps=11)
    assert result.num_chunks == len(asked) == 4  # 3 + 3 + 3 + 2 steps
    env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos")
    observation, _ = env.reset(seed=3)
    for i, state in enumerate(asked):
        assert np.allclose(state, observation["agent_pos"])
        for _ in range(3):
            observation, *_ = env.step(np.full(2, 400.0 if i % 2 else 100.0, dtype=np.float32))


def test_one_batched_call_a_step_asks_for_those_episodes_only_that_need_a_chunk():
    batches = []

    def predict(images, states, texts):
        assert len(images) == len(states)
        batches.append(len(images))
        return hold_still(images, states, texts)

    result = rollout(PUSHT, predict, SEEDS, n_action_steps=4, num_envs=2, max_steps=8)
    assert batches == [2, 2, 2, 2, 1, 1]  # episodes 0 and 1, then 2 and 3, then 4 alone; two chunks each
    assert result.num_chunks == 10


def test_a_solved_episode_ends_and_makes_room_for_the_next_seed(monkeypatch):
    """The bar for success is lowered to what seed 1003 covers without moving, so that its first step solves it."""
    still = rollout(PUSHT, hold_still, [1003, 1001], n_action_steps=1, max_steps=1)
    assert still.max_rewards[0] > 0 and still.successes == [False, False]
    make = gymnasium.make

    def make_easy(*args, **kwargs):
        env = make(*args, **kwargs)
        env.unwrapped.success_threshold = 0.5 * 0.95 * still.max_rewards[0]
        return env

    monkeypatch.setattr(gymnasium, "make", make_easy)
    result = rollout(PUSHT, hold_still, [1003, 1001, 1003], n_action_steps=4, num_envs=2, max_steps=6, record=1)
    assert result.successes == [True, False, True]
    assert result.lengths == [1, 6, 1]
    assert result.max_rewards[0] == 1.0
    assert result.metrics()["pc_success"] == pytest.approx(200 / 3)
    assert len(result.recordings[0].frames) == 2


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 4, 2), (1, 4, 3), (4, 2), (1, 1, 4, 2)])
def test_a_chunk_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(1, at least 4, 2\)"):
        rollout(PUSHT, lambda images, states, texts: np.zeros(shape), [0], n_action_steps=4, max_steps=4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_chunk_that_is_not_finite_is_refused(value):
    chunk = np.zeros((1, 4, 2))
    chunk[0, 3, 1] = value
    with pytest.raises(ValueError, match=r"\[0, 3, 1\] is (nan|inf), expected finite numbers"):
        rollout(PUSHT, lambda images, states, texts: chunk, [0], n_action_steps=4, max_steps=4)


@pytest.mark.parametrize("wrong", [{"n_action_steps": 0}, {"num_envs": 0}, {"max_steps": 0}, {"seeds": []}])
def test_an_argument_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a whole number from 1 to"):
        rollout(PUSHT, hold_still, **{"seeds": [0], "n_action_steps": 4, "max_steps": 4, **wrong})


def test_the_success_interval_has_wilsons_textbook_values():
    for successes, low, high in ((0, 0.0, 27.75), (10, 72.25, 100.0), (6, 31.27, 83.18)):
        found = success_rate([True] * successes + [False] * (10 - successes))
        assert (found["pc_success_low"], found["pc_success_high"]) == pytest.approx((low, high), abs=0.01)
        assert 0 <= found["pc_success_low"] <= found["pc_success"] <= found["pc_success_high"] <= 100


def test_the_metrics_of_one_episode_are_numbers_json_can_hold():
    metrics = rollout(PUSHT, hold_still, [5], n_action_steps=4, max_steps=4).metrics()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert (metrics["avg_max_reward_low"], metrics["avg_max_reward_high"]) == (0.0, 1.0)
    assert metrics["seed"] == 5 and metrics["seeds"] == [5] and metrics["ms_per_chunk"] > 0


def test_the_video_is_h264_with_a_frame_for_each_moment(filmed, tmp_path):
    write_video(tmp_path / "rollouts.mp4", filmed, PUSHT)
    with av.open(str(tmp_path / "rollouts.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == (
            "h264",
            "yuv420p",
            10,
        )
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 13  # the start and 12 steps
    height, width, _ = frames[0].shape
    assert width > 2 * FRAME_SIZE and height > 2 * FRAME_SIZE  # three tiles: two by two
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 100  # something moved


def test_a_video_holds_the_last_frame_of_the_shorter_episode(filmed, tmp_path):
    short = SimpleNamespace(seed=1, success=True, rewards=[1.0], frames=filmed[0].frames[:2])
    write_video(tmp_path / "rollouts.mp4", [short, filmed[1]], PUSHT)
    with av.open(str(tmp_path / "rollouts.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    left = [frame[:, : frame.shape[1] // 2] for frame in frames]
    assert len(frames) == 13
    assert np.abs(left[-1] - left[1]).mean() < 1 < np.abs(left[1] - left[0]).mean()


def test_the_contact_sheet_opens_on_a_white_background(filmed, tmp_path):
    write_contact_sheet(tmp_path / "rollouts.png", filmed, PUSHT, moments=6)
    with Image.open(tmp_path / "rollouts.png") as sheet:
        assert sheet.width / 6 == pytest.approx(sheet.height / 3, rel=0.2)  # six moments wide, three episodes high
        assert sheet.getpixel((0, 0)) == sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)
        assert len(sheet.getcolors(1 << 20)) > 50


class StandInProcessor:
    """Takes and gives what SmolAndFastProcessor does; the ids are the state, the actions hold that position."""

    def __call__(self, images, text, state, return_tensors):
        assert return_tensors == "pt" and all(len(row) == 1 for row in images)
        assert text == [TASK] * len(images) == [TASK] * len(state)
        pixels = torch.from_numpy(np.stack([row[0] for row in images]))
        return BatchFeature({"pixel_values": pixels, "input_ids": torch.as_tensor(state)})

    def post_process_actions(self, ids):
        return ids[:, None].repeat(1, 10, 1).numpy()

    normalizer, image_keys, fps = SimpleNamespace(state_dim=2), ["observation.image"], 10

    def check_model(self, model):
        assert isinstance(model, StandInModel)


class StandInModel:
    device = torch.device("cpu")
    config = SimpleNamespace(chunk_size=10, n_action_steps=5, action_dim=2)

    def __init__(self):
        self.generate_kwargs = []

    def to(self, device):
        return self

    def eval(self):
        return self

    def generate(self, input_ids, pixel_values, **kwargs):
        self.generate_kwargs.append(kwargs)
        return input_ids


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder that looks like a checkpoint; loading it gives the stand-ins."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "smolandfast", "action_dim": 2}')
    model = StandInModel()
    monkeypatch.setattr(evaluate.SmolAndFastForActionPrediction, "from_pretrained", lambda *args, **kwargs: model)
    monkeypatch.setattr(evaluate.SmolAndFastProcessor, "from_pretrained", lambda *_, **__: StandInProcessor())
    monkeypatch.setattr(evaluate, "rollout", lambda *args, **kwargs: rollout(*args, **kwargs, max_steps=10))
    return folder, model


def test_make_predict_lets_a_malformed_string_through():
    class Broken(StandInProcessor):
        def post_process_actions(self, ids):
            raise ValueError("the string stands for 19 coefficients, expected 20")

    predict = evaluate.make_predict(StandInModel(), Broken())
    with pytest.raises(ValueError, match="19 coefficients"):
        rollout(PUSHT, predict, [0], n_action_steps=5, max_steps=5)


def test_an_evaluation_writes_metrics_video_and_sheet(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    output_dir = tmp_path / "new" / "eval"
    arguments = f"--checkpoint {folder} --episodes 3 --seed 40 --record 2 --device cpu --output_dir {output_dir}"
    evaluate.main(arguments.split())
    assert sorted(path.name for path in output_dir.iterdir()) == ["metrics.json", "rollouts.mp4", "rollouts.png"]
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics["seeds"] == [40, 41, 42] and metrics["seed"] == 40 and metrics["n_episodes"] == 3
    assert len(metrics["max_rewards"]) == 3
    assert metrics["n_action_steps"] == 5 and metrics["checkpoint"] == str(folder)
    assert metrics["versions"]["torch"] == version("torch") and metrics["num_threads"] >= 1
    assert model.generate_kwargs == [{"do_sample": False}] * 2  # one batch of three, twice
    assert str(output_dir / "rollouts.mp4") in capsys.readouterr().out


def test_sampling_and_n_action_steps_reach_the_policy(checkpoint, tmp_path):
    folder, model = checkpoint
    arguments = f"--checkpoint {folder} --episodes 1 --record 0 --n_action_steps 10 --do_sample --temperature 0.5"
    evaluate.main([*arguments.split(), "--device", "cpu", "--output_dir", str(tmp_path / "eval")])
    assert model.generate_kwargs == [{"do_sample": True, "temperature": 0.5}]
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "--episodes is 0. Give at least 1."),
        (["--num_envs", "0"], "--num_envs is 0. Give at least 1."),
        (["--record", "-1"], "--record is -1. Give at least 0."),
        (["--n_action_steps", "11"], "--n_action_steps is 11, a chunk has 10 actions. Give at most that."),
        (["--temperature", "0.7"], "--do_sample"),
        (["--do_sample", "--temperature", "0"], "Give a positive number"),
        (["--device", "toaster"], "Try --device cpu."),
        (["--checkpoint", "./missing"], "./missing is not a folder. Give the folder"),
        (["--checkpoint", "{tmp}"], "has no config.json. Give the folder"),
        (["--checkpoint", "{tmp}/other"], "has model_type 'smolvlm', expected 'smolandfast'"),
        (["--checkpoint", "{tmp}/arm"], "has 7 action dimensions, pusht 2"),
        (["--checkpoint", "{tmp}/torn"], "cannot be read"),
        (["--output_dir", "{tmp}/other/config.json"], "Name another one."),
        (["--output_dir", "{tmp}/other"], "exists and holds config.json, which this script did not write"),
    ],
)
def test_a_wrong_argument_is_an_error_line_that_says_how_to_fix_it(checkpoint, tmp_path, capsys, arguments, message):
    contents = {
        "other": '{"model_type": "smolvlm"}',
        "arm": '{"model_type": "smolandfast", "action_dim": 7}',
        "torn": "{",
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    given = ["--checkpoint", str(checkpoint[0]), "--output_dir", str(tmp_path / "eval"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*given, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 30}, "has 30 control steps a second (fps), pusht 10"),
        ({"image_keys": ["a", "b"]}, "has 2 cameras (a, b), pusht 1"),
        ({"normalizer": SimpleNamespace(state_dim=6)}, "has 6 state dimensions, pusht 2"),
    ],
)
def test_a_policy_of_another_robot_or_rate_is_refused_before_it_plays(
    checkpoint, tmp_path, capsys, monkeypatch, changes, message
):
    for name, value in changes.items():
        monkeypatch.setattr(StandInProcessor, name, value)
    monkeypatch.setattr(evaluate, "rollout", None)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--checkpoint", str(checkpoint[0]), "--output_dir", str(tmp_path / "eval"), "--device", "cpu"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_evaluation_replaces_an_earlier_one_and_nothing_else(checkpoint, tmp_path, capsys):
    folder, output_dir = checkpoint[0], tmp_path / "eval"
    arguments = ["--checkpoint", str(folder), "--episodes", "1", "--device", "cpu", "--output_dir", str(output_dir)]
    evaluate.main(arguments)
    evaluate.main([*arguments, "--record", "0"])
    assert [path.name for path in output_dir.iterdir()] == ["metrics.json"]  # no film of other episodes
    (output_dir / "notes.txt").write_text("precious")
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert "holds notes.txt" in capsys.readouterr().err
    assert sorted(path.name for path in output_dir.iterdir()) == ["metrics.json", "notes.txt"]


SCRIPTS = [path for path in sorted(Path(evaluate.__file__).parent.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_ctrl_c_ends_a_script_with_one_line_while_it_imports_its_libraries(script, tmp_path):
    for library in ("numpy", "gradio"):  # the first that a script imports
        (tmp_path / f"{library}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 130 and result.stderr.strip() == "Interrupted."


def test_an_error_of_a_script_is_shown_as_ever():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import interrupt; raise ValueError('a word')"
    command = [sys.executable, "-c", code, str(SCRIPTS[0].parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.rstrip().endswith("ValueError: a word")


WORKERS = """
import sys
sys.path[:0] = sys.argv[1:]
import contextlib
import time
import interrupt

def play(seconds):
    print("playing", flush=True)
    time.sleep(seconds)

def play_in_processes():
    import evaluate  # not in the processes that it starts, to save time

    print("begin", flush=True)
    list(evaluate.map_in_processes(2, play, [600, 600]))

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        play_in_processes()
    play_in_processes()
"""


def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    """The terminal sends it to each of them, whatever they are doing: first they import, then they play."""
    (tmp_path / "workers.py").write_text(WORKERS)
    command = [sys.executable, str(tmp_path / "workers.py"), str(Path(evaluate.__file__).parent)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        lines = iter(process.stdout.readline, "")
        assert next(lines) == "begin\n"
        time.sleep(1)  # they import
        os.killpg(process.pid, signal.SIGINT)
        while next(lines) != "begin\n":
            pass
        assert [next(lines), next(lines)] == ["playing\n"] * 2
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.strip() == "Interrupted."


@pytest.mark.parametrize(
    "success, rewards, speed, kind",
    [
        (True, [0.2, 1.0], 1.0, "solved"),
        (False, [0.2, 0.9], 0.0, "stops near"),
        (False, [0.2, 0.9], 1.0, "corrects near"),
        (False, [0.9, 0.2], 1.0, "pushed away"),
        (False, [0.3, 0.2], 0.0, "stops far"),
        (False, [0.3, 0.2], 1.0, "late"),
    ],
)
def test_an_ending_is_told_by_its_rewards_and_by_whether_the_block_still_moves(success, rewards, speed, kind):
    poses = np.linspace([0, 0, 0], [60 * speed, 0, 0], 60)
    episode = SimpleNamespace(success=success, rewards=rewards, poses=list(poses))
    assert kind_of_ending(episode) == kind


def test_the_blocks_poses_are_the_simulators():
    result = rollout(PUSHT, hold_still, [3], n_action_steps=1, max_steps=5)
    env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos")
    _, info = env.reset(seed=3)
    assert np.shape(result.episodes[0].poses) == (5, 3)
    np.testing.assert_allclose(result.episodes[0].poses[0], info["block_pose"], atol=0.5)


def test_a_benchmark_reaches_other_processes():
    assert pickle.loads(pickle.dumps(PUSHT)) == PUSHT


def test_what_a_simulator_lacks_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    for name in [name for name in sys.modules if name.startswith(("envs.metaworld", "envs.pusht", "envs.rendering"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="apt install libosmesa6") as refused:
        get_benchmark("metaworld")
    assert "pip install" not in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(ValueError, match=r"gym_pusht.*pip install -e '\.\[examples\]'"):
        get_benchmark("pusht")
