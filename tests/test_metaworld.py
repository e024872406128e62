"""Meta-World: its scenes are LeRobot's, the experts' demonstrations become a data set, a policy plays many tasks."""

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("envs.metaworld", exc_type=ImportError)  # also without OSMesa
import collect
import evaluate
import metaworld
import mujoco
import pretrain_vision
import train
from conftest import in_this_process
from envs.metaworld import BENCHMARK, DIFFICULTIES, TASKS, MetaworldScene
from envs.metaworld.demonstrations import LEAD_IN, demonstrate
from envs.metaworld.simulator import ARM_MESHES, MT10, shift_image, shift_points
from envs.rendering import simplified
from language import OUTSIDE, UNSEEN
from PIL import Image
from report import kind_of_ending
from rollouts import Episode, rollout

from smolandfast.training import LeRobotChunkDataset


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Two demonstrations each of two tasks, as `collect.py` writes them."""
    root = tmp_path_factory.mktemp("metaworld") / "data"
    options = "--benchmark metaworld --tasks reach drawer-close --episodes 2 --draw_every 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collect.map_in_processes", in_this_process)
        collect.main([*options.split(), "--output_dir", str(root)])
    return root


@pytest.fixture(scope="module")
def drawer():
    """One scene for several tests: loading it takes a second."""
    return MetaworldScene("drawer-close")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_there_are_fifty_tasks_in_four_groups():
    counts = {group: sum(g == group for g in DIFFICULTIES.values()) for group in dict.fromkeys(DIFFICULTIES.values())}
    assert len(TASKS) == 50 and counts == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    assert set(MT10) <= set(TASKS) and len(MT10) == 10
    assert set(BENCHMARK.wordings) == set(TASKS.values()) and len(set(TASKS.values())) == 49


def test_wordings_that_are_evaluated_are_in_no_training_sample():
    trained = set(TASKS.values()).union(*BENCHMARK.wordings.values())
    vocabulary = {word for text in trained for word in re.findall(r"[a-z]+", text.lower())}
    for wordings in (UNSEEN, OUTSIDE):
        assert set(wordings) == set(TASKS) and not trained & set(wordings.values())
    for text in OUTSIDE.values():
        assert not set(re.findall(r"[a-z]+", text.lower())) <= vocabulary


def test_a_scene_is_what_lerobots_wrapper_shows():
    benchmark = metaworld.MT1("push-v3", seed=42)
    env = benchmark.train_classes["push-v3"](render_mode="rgb_array", camera_name="corner2")
    env.set_task(benchmark.train_tasks[0])
    env.model.cam_pos[2] = [0.75, 0.075, 0.7]
    env.reset()
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    env.seed(5)
    observation, _ = env.reset(seed=5)
    ours = MetaworldScene("push", full_render=True)
    ours.reset(5)
    for action in np.random.default_rng(0).uniform(-1.5, 1.5, (5, 4)).astype(np.float32):
        np.testing.assert_array_equal(ours.state, observation[:4].astype(np.float32))
        observation, reward, _, _, _ = env.step(np.clip(action, -1, 1))
        assert ours.step(action)[0] == reward
    theirs = Image.fromarray(np.flip(env.render(), (0, 1))).resize((128, 128), Image.Resampling.BOX)
    np.testing.assert_array_equal(ours.images(), [np.asarray(theirs)])
    coarse = MetaworldScene("push")
    coarse.reset(5)
    assert coarse.images()[0].shape == (128, 128, 3) and coarse.images()[0].dtype == np.uint8


def test_scenes_do_not_disturb_each_others_images():
    first, second = MetaworldScene("reach"), MetaworldScene("drawer-open")
    first.reset(1)
    second.reset(2)
    images = *first.images(), *second.images(), first.film()
    again = *first.images(), *second.images(), first.film()
    second.close()
    for image, same in zip((*images, images[0]), (*again, *first.images()), strict=True):
        np.testing.assert_array_equal(image, same)
    assert not np.array_equal(*images[:2])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task is 'fly', expected one of button-press"):
        MetaworldScene("fly")


def test_a_demonstration_ends_with_success_and_records_the_experts_own_actions(drawer):
    scene = drawer
    tried = ((seed, demonstrate(scene, seed, 250)) for seed in range(1_000_000, 1_000_020))
    seed, episode = next((seed, episode) for seed, episode in tried if episode)
    assert episode["next.success"].tolist() == [False] * (len(episode["action"]) - 1) + [True]
    assert np.abs(episode["action"]).max() <= 1
    scene.reset(seed)
    np.testing.assert_array_equal(scene.expert_action(), episode["action"][0])
    np.testing.assert_array_equal(scene.images()[0], episode["observation.image"][0])


def test_between_new_images_a_demonstration_shows_the_last_one(drawer):
    every, fourth = (demonstrate(drawer, 1_000_003, 250, n) for n in (1, 4))
    np.testing.assert_array_equal(every["action"], fourth["action"])
    np.testing.assert_array_equal(fourth["observation.image"], every["observation.image"][::4])


def test_a_correction_begins_where_the_policy_stopped_and_is_the_experts(drawer):
    scene, asked = drawer, []

    def rise(images, states, texts):
        asked.append((images[0][0].shape, texts))
        return np.tile(np.float32([0, 0, 1, -1]), (1, 12, 1))

    riser = SimpleNamespace(predict=rise, n_action_steps=8)
    seed = next(s for s in range(100) if demonstrate(scene, s, 250, 8, policy=riser))
    asked.clear()
    episode = demonstrate(scene, seed, 250, 8, policy=riser)
    assert len(asked) > 1 and set(map(str, asked)) == {str(((128, 128, 3), [TASKS["drawer-close"]]))}
    scene.reset(seed)
    while not np.array_equal(scene.state, episode["observation.state"][0]):
        scene.step(np.float32([0, 0, 1, -1]))
        assert len(asked) * 8 <= LEAD_IN + 8
    np.testing.assert_array_equal(scene.expert_action(), episode["action"][0])
    # What the policy solves itself needs no correction.
    solver = SimpleNamespace(predict=expert_policy([scene]), n_action_steps=1)
    assert any(demonstrate(scene, s, 250, 8, policy=solver) is None for s in range(3))


def test_a_picture_that_is_moved_shows_points_that_are_moved_with_it():
    scene = MetaworldScene("push")
    scene.reset(3)
    scene.step(np.zeros(4))
    camera = scene.env.data.camera("corner2")
    axes, size = camera.xmat.reshape(3, 3), 128

    def pixel(point):
        x, y, z = axes.T @ (point - camera.xpos)
        focal_length = size / 2 / np.tan(np.deg2rad(scene.env.model.camera("corner2").fovy[0]) / 2)
        return size / 2 + focal_length * np.array([x, -y]) / z  # flipped along both axes, as the image is

    points = scene.poses[[[0, 1, 2], [4, 5, 6], [18, 19, 20]]]
    moved = shift_points(points, 5, -3)
    for point, after in zip(points, moved, strict=True):
        np.testing.assert_allclose(pixel(after) - pixel(point), [5, -3], atol=0.01)
    (image,) = scene.images()
    column, row = pixel(points[2]).astype(int)  # the goal is a green sphere
    assert image[row, column].argmax() == 1
    shifted = shift_image(image, 5, -3)
    np.testing.assert_array_equal(shifted[row - 3, column + 5], image[row, column])
    np.testing.assert_array_equal(shifted[:-3, 5:], image[3:, :-5])


def test_the_arm_that_is_drawn_has_fewer_triangles_and_nothing_else_has():
    scene = MetaworldScene("coffee-pull")
    whole, drawn = scene.env.model, simplified(scene.env.model, ARM_MESHES)
    names = [mujoco.mj_id2name(whole, mujoco.mjtObj.mjOBJ_MESH, i) for i in range(whole.nmesh)]
    for name, before, after in zip(names, whole.mesh_facenum, drawn.mesh_facenum, strict=True):
        assert after < before if name in ARM_MESHES else after == before
    assert set(ARM_MESHES) <= set(names) and drawn.mesh_facenum.sum() < whole.mesh_facenum.sum() / 3


def test_demonstrations_are_a_lerobot_data_set_with_a_sentence_a_task(demonstrations, cache):
    data = LeRobotChunkDataset(demonstrations, chunk_size=12)
    assert data.info["total_episodes"] == 4 and data.info["total_tasks"] == 2 and data.fps == 80
    assert data.tasks == [TASKS["reach"], TASKS["drawer-close"]]
    part = np.load(demonstrations.with_name("data.parts") / "reach-000.npz")
    sample = data[3]
    np.testing.assert_array_equal(sample["state"], part["0/observation.state"][3])
    np.testing.assert_array_equal(sample["actions"][:2], part["0/action"][3:5])
    assert np.abs(sample["images"][0].astype(float) - part["0/observation.image"][3 // 2]).mean() < 3
    poses = data.vectors("observation.environment_state")
    assert poses.shape == (len(data), 21)
    np.testing.assert_array_equal(poses[:, :4], data.states)


def test_collecting_goes_on_where_it_was_stopped(demonstrations, tmp_path, capsys):
    shutil.copytree(demonstrations.parent, tmp_path, dirs_exist_ok=True)
    options = "--benchmark metaworld --tasks reach --episodes 2 --draw_every 2"
    arguments = [*options.split(), "--output_dir", str(tmp_path / "data")]
    part = tmp_path / "data.parts/reach-000.npz"
    written = part.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        collect.main(arguments)
    assert "exists and is not an empty folder" in capsys.readouterr().err
    (tmp_path / "data").rename(tmp_path / "old")
    collect.main(arguments)
    assert part.stat().st_mtime_ns == written
    (tmp_path / "data").rename(tmp_path / "older")
    with pytest.raises(SystemExit):
        collect.main([*arguments, "--draw_every", "4"])
    assert "'draw_every': 2, 'max_steps': 250, 'policy': None}" in capsys.readouterr().err


def test_a_policy_that_cannot_take_part_is_refused_before_anything_is_written(tmp_path, capsys):
    options = f"--benchmark metaworld --tasks reach --episodes 2 --output_dir {tmp_path / 'data'} --policy"
    for policy, message in (
        ("typo/of/it", "--policy .*typo/of/it is not a folder"),
        ("checkpoints/pusht-tiny", "--policy .*pusht-tiny cannot be used: .* 2 action dimensions, metaworld 4"),
    ):
        with pytest.raises(SystemExit):
            collect.main([*options.split(), policy])
        assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def expert_policy(scenes):
    """A `predict` that asks the scenes' experts: chunks of one action."""

    def predict(images, states, texts):
        chosen = []
        for state in states:
            chosen.append(next(s for s in scenes if np.array_equal(s.state, state)).expert_action())
        return np.array(chosen)[:, None]

    return predict


def test_many_tasks_are_played_side_by_side_and_scored_by_task_and_difficulty():
    scenes, tasks = [], ["reach", "drawer-close", "push"]

    def make_scene(task):
        scenes.append(MetaworldScene(task))
        scenes[-1].images = lambda: [np.zeros((128, 128, 3), np.uint8)]  # the expert does not need it
        return scenes[-1]

    benchmark = dataclasses.replace(BENCHMARK, make_scene=make_scene)
    result = rollout(benchmark, expert_policy(scenes), [7, 8], 1, tasks, num_envs=2, max_steps=100)
    assert [(e.task, e.seed) for e in result.episodes] == [(task, seed) for task in tasks for seed in (7, 8)]
    metrics = json.loads(json.dumps(result.metrics()))
    assert metrics["pc_success"] == 100 and metrics["n_episodes"] == 6
    assert {task: rate["pc_success"] for task, rate in metrics["by_task"].items()} == dict.fromkeys(tasks, 100)
    assert {name: rate["n_episodes"] for name, rate in metrics["by_group"].items()} == {"easy": 4, "hard": 2}
    assert metrics["mean_over_tasks"] == metrics["mean_over_groups"] == 100
    assert len(scenes) == 3  # a scene is loaded once for all episodes of its task


def test_failures_are_told_apart_by_what_became_of_the_object():
    still = np.zeros((3, 21), np.float32)
    still[:, :3], still[:, 18:] = [0.3, 0, 0], [0, 0.4, 0]  # the hand is 30 cm from the object, the goal 40

    def kind(task="push", success=False, **columns):
        poses = still.copy()
        for name, value in columns.items():
            first = {"hand": 0, "thing": 4, "goal": 18}[name]
            poses[-1, first : first + 3] = value
        return kind_of_ending(Episode(task, 0, False, poses=list(poses), success=success))

    assert kind(success=True) == "solved"
    assert kind() == "not reached"
    assert kind(hand=[0.04, 0, 0]) == "touched"
    assert kind(hand=[0.1, 0, 0], thing=[0.1, 0, 0]) == "moved elsewhere"
    assert kind(hand=[0, 0.36, 0], thing=[0, 0.36, 0]) == "near its goal"
    assert kind("reach", hand=[0, 0.36, 0]) == "near its goal"


def test_a_stopped_pretraining_says_where_its_scenes_are(demonstrations, cache, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("envs.metaworld.pretraining.map_in_processes", interrupt)
    options = ["--benchmark", "metaworld", "--dataset_root", str(demonstrations)]
    with pytest.raises(SystemExit) as end:
        pretrain_vision.main([*options, "--output_dir", str(tmp_path / "vision")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 130 and line.endswith(f"drawn so far are kept in {tmp_path / 'vision.scenes'}.")


def test_a_policy_is_trained_and_evaluated_on_several_tasks(
    demonstrations, cache, narrow_preset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("evaluate.map_in_processes", in_this_process)
    monkeypatch.setattr("envs.metaworld.BENCHMARK", dataclasses.replace(BENCHMARK, max_steps=12))
    monkeypatch.setattr("envs.metaworld.pretraining.map_in_processes", in_this_process)
    output = tmp_path / "policy"
    vision = tmp_path / "vision"
    drawn = "--benchmark metaworld --tasks reach --num_scenes 4 --max_shift 4 --max_steps 2 --batch_size 4 "
    drawn += f"--dataset_root {demonstrations} --output_dir {vision}"
    pretrain_vision.main(drawn.split())
    options = f"--vision_weights {vision}/vision.safetensors --freeze_vision_tower --reword_probability 0.5 "
    options += "--benchmark metaworld --max_steps 2 --eval_steps 2 --save_steps 2 --warmup_steps 1 --eval_episodes 1 "
    options += "--sample_every 2 --max_shift 3 --oversample hard --batch_by_length "
    options += "--held_out_episodes 1 --per_device_train_batch_size 4 --report_to none --eval_tasks reach"
    train.main([*options.split(), "--dataset_root", str(demonstrations), "--output_dir", str(output)])
    history = json.loads((output / "checkpoint-2/trainer_state.json").read_text())["log_history"]
    logged = {name: value for entry in history for name, value in entry.items()}
    # Among checkpoints that solve nothing, the likelihood decides.
    assert logged["eval_score"] == pytest.approx(logged["eval_pc_success"] + math.exp(-logged["eval_loss"]))
    arguments = "--benchmark metaworld --tasks reach push --episodes 1 --n_action_steps 6 --num_envs 1 --full_render "
    arguments += f"--checkpoint {output} --output_dir"
    evaluate.main([*arguments.split(), str(tmp_path / "eval"), "--record", "1"])
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert list(metrics["by_task"]) == ["reach", "push"]
    assert {"rollouts.png", "rollouts.mp4"} <= {path.name for path in (tmp_path / "eval").iterdir()}
    assert "mean over groups" in capsys.readouterr().out
    evaluate.main([*arguments.split(), str(tmp_path / "processes"), "--num_processes", "2", "--record", "0"])
    both = json.loads((tmp_path / "processes/metrics.json").read_text())
    for name in ("tasks", "seeds", "max_rewards", "episode_lengths"):
        assert both[name] == metrics[name]
    assert metrics["full_render"] is both["full_render"] is True
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", "checkpoints/pusht-tiny", "--full_render"])
    assert "--full_render: pusht has one kind of images" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(output)])
    assert "has 4 action dimensions, pusht 2" in capsys.readouterr().err
