"""Recording: what `examples/record_rollouts.py` writes is what happened, and readers of LeRobot data sets open it."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import collect
import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
import record_rollouts
from envs.pusht import BENCHMARK as PUSHT
from envs.pusht import TASK
from envs.pusht.simulator import ENV_ID
from record_rollouts import DATASET, play, write_dataset
from record_rollouts import main as record

from smolandfast.training import LeRobotChunkDataset

ROOT = Path(__file__).parents[1]
RECORDED, RECORDED_SEED = Path(__file__).parent / "data/pusht_rollouts", 1028


def push_right(images, states, texts):
    steps = np.arange(1, 5)[:, None] * np.array([20.0, 5.0])
    return (states[:, None] + steps).astype(np.float32)


@pytest.fixture(scope="module")
def episodes():
    return [play(push_right, seed, n_action_steps=4, max_steps=steps) for seed, steps in ((3, 9), (4, 5), (5, 12))]


@pytest.fixture(scope="module")
def written(episodes, tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded") / "set"
    write_dataset(root, iter(episodes), **DATASET)
    return root


def test_a_frame_holds_what_the_policy_saw_and_did(episodes):
    seen = []

    def predict(images, states, texts):
        seen.append((images[0][0], states[0], push_right(images, states, texts)))
        return seen[-1][2]

    episode = play(predict, seed=3, n_action_steps=4, max_steps=9)
    for i, (image, state, chunk) in enumerate(seen):
        np.testing.assert_array_equal(episode["observation.image"][4 * i], image)
        np.testing.assert_array_equal(episode["observation.state"][4 * i], state)
        np.testing.assert_array_equal(episode["action"][4 * i : 4 * i + 4], chunk[0, : 9 - 4 * i])
    assert len(seen) == 3
    assert episode["next.done"].tolist() == [False] * 8 + [True]


def test_our_reader_gives_back_what_was_recorded(written, episodes, tmp_path):
    dataset = LeRobotChunkDataset(written, chunk_size=4, cache_dir=tmp_path)
    assert len(dataset) == 9 + 5 + 12 and dataset.fps == 10
    np.testing.assert_array_equal(dataset.states, np.concatenate([e["observation.state"] for e in episodes]))
    np.testing.assert_array_equal(dataset.actions, np.concatenate([e["action"] for e in episodes]))
    images = np.concatenate([e["observation.image"] for e in episodes])
    for i in range(len(dataset)):
        difference = [np.abs(dataset[i]["images"][0].astype(int) - image).mean() for image in images]
        assert difference[i] < 1.5 and difference[i] == min(difference)
        assert dataset[i]["text"] == TASK


def test_statistics_are_those_of_the_frames(written, episodes):
    stats = json.loads((written / "meta/stats.json").read_text())
    pixels = np.concatenate([e["observation.image"] for e in episodes]).reshape(-1, 3) / 255
    actions = np.concatenate([e["action"] for e in episodes]).astype(np.float64)
    for name, values in {"observation.image": pixels, "action": actions}.items():
        for kind in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(np.ravel(stats[name][kind]), getattr(values, kind)(axis=0), atol=1e-5)
        np.testing.assert_allclose(np.ravel(stats[name]["q10"]), np.quantile(values, 0.1, axis=0), atol=1e-5)
        assert stats[name]["count"] == [26]


def test_the_layout_is_the_one_of_the_hubs_data_set(written, pusht_root):
    mine, theirs = (json.loads((root / "meta/info.json").read_text()) for root in (written, pusht_root))
    assert mine.keys() == theirs.keys()
    kinds = [{key: (f["dtype"], f["shape"]) for key, f in info["features"].items()} for info in (mine, theirs)]
    assert kinds[0] == kinds[1]
    for path in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        mine, theirs = (pq.read_schema(root / path) for root in (written, pusht_root))
        assert set(mine.names) == set(theirs.names)
        if "episodes" not in path:
            assert all(mine.field(name).type == theirs.field(name).type for name in mine.names)


def test_the_embedded_rollouts_are_three_whole_episodes(tmp_path):
    dataset = LeRobotChunkDataset(RECORDED, chunk_size=16, cache_dir=tmp_path)
    assert dataset[150]["images"][0].shape == (96, 96, 3) and dataset[150]["actions"].shape == (16, 2)
    lengths = np.bincount(dataset.episode_index)
    ends = np.cumsum(lengths) - 1
    assert len(lengths) == 3 and len(set(lengths)) > 1
    table = pq.read_table(RECORDED / "data/chunk-000/file-000.parquet").to_pydict()
    assert np.flatnonzero(table["next.done"]).tolist() == ends.tolist()
    assert np.flatnonzero(table["next.success"]).tolist() == ends[lengths < 300].tolist()


def test_the_embedded_actions_lead_to_the_embedded_states(tmp_path):
    """The simulator is played again; bodies in contact amplify rounding, so only the first episode's start."""
    dataset = LeRobotChunkDataset(RECORDED, chunk_size=16, episodes=[0], cache_dir=tmp_path)
    env = gymnasium.make(ENV_ID, obs_type="state")
    state, _ = env.reset(seed=RECORDED_SEED)
    for i in range(40):
        np.testing.assert_allclose(dataset.states[i], state[:2], atol=0.1)
        state, *_ = env.step(dataset.actions[i])


@pytest.fixture
def counting_policy(monkeypatch):
    """A checkpoint whose chunks are the positions 0, 10, 20, ... along both axes."""

    def make_predict(model, processor):
        chunk = np.repeat(10.0 * np.arange(model.config.chunk_size)[:, None], 2, axis=1)
        return lambda images, states, texts: np.stack([chunk] * len(images))

    monkeypatch.setattr(record_rollouts, "make_predict", make_predict)
    return str(ROOT / "checkpoints/pusht-tiny")


def test_every_second_action_of_a_chunk_is_recorded(counting_policy, tmp_path):
    options = "--episodes 1 --max_steps 6 --action_stride 2 --n_action_steps 3"
    record(["--checkpoint", counting_policy, *options.split(), "--output_dir", str(tmp_path / "set")])
    dataset = LeRobotChunkDataset(tmp_path / "set", chunk_size=1, cache_dir=tmp_path)
    assert dataset.actions[:, 0].tolist() == [0, 20, 40, 0, 20, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--only_successes --max_steps 2", "There is no episode"),
        ("--action_stride 2 --n_action_steps 99", "--n_action_steps is 99"),
        ("--action_stride 0", "--action_stride is 0"),
    ],
)
def test_what_cannot_be_recorded_is_an_error_line(counting_policy, options, message, tmp_path, capsys):
    arguments = ["--checkpoint", counting_policy, "--episodes", "1", *options.split()]
    with pytest.raises(SystemExit):
        record([*arguments, "--output_dir", str(tmp_path / "set")])
    assert message in capsys.readouterr().err.splitlines()[-1] and list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_half_is_left(written, episodes, tmp_path):
    def broken():
        yield episodes[0]
        raise ValueError("the arm fell off")

    before = (written / "meta/info.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="Name another folder"):
        write_dataset(written, iter(episodes), **DATASET)
    assert (written / "meta/info.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="fell off"):
        write_dataset(tmp_path / "set", broken(), **DATASET)
    with pytest.raises(ValueError, match="Record at least one"):
        write_dataset(tmp_path / "set", iter([]), **DATASET)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_one_with_anything_in_it_is_kept(episodes, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", iter(episodes), **DATASET)
    assert len(LeRobotChunkDataset(tmp_path / "empty", chunk_size=4, cache_dir=tmp_path / "cache")) == 26
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/.hidden").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("file", "used", "here"):
        with pytest.raises(FileExistsError, match=rf"{name} exists and is not an empty folder"):
            write_dataset(tmp_path / name, iter(episodes), **DATASET)
    assert (tmp_path / "file").read_text() == (tmp_path / "used/.hidden").read_text() == "mine"


def test_recordings_have_the_names_of_the_hubs_data_set(written, pusht_root):
    mine, theirs = (json.loads((root / "meta/info.json").read_text())["features"] for root in (written, pusht_root))
    for key in ("observation.state", "action"):
        assert mine[key]["names"]["axes"] == theirs[key]["names"]["motors"]


def test_interrupted_recording_ends_in_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    played = []

    def interrupted(*args):
        if played:
            signal.raise_signal(signal.SIGINT)
        return played.append(play(push_right, 3, n_action_steps=4, max_steps=5)) or played[0]

    monkeypatch.setattr(record_rollouts, "play", interrupted)
    with pytest.raises(SystemExit) as ended:
        record(["--checkpoint", str(ROOT / "checkpoints/pusht-tiny"), "--output_dir", str(tmp_path / "set")])
    assert ended.value.code == 130
    error = capsys.readouterr().err
    assert "Interrupted. Nothing was written" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


class StandInDemonstrations:
    """A benchmark's demonstrations without a simulator: part i has i + 1 episodes."""

    dataset = {"fps": 80, "robot_type": "metaworld", "image_size": 32}
    dataset["axes"] = {"observation.state": ["x", "y"], "action": ["x", "y"]}
    defaults, counts = {"draw_every": 2}, {"episodes": 1}
    played = []

    @staticmethod
    def add_options(parser):
        parser.add_argument("--episodes", type=int)

    def __init__(self, args):
        self.parts, self.options = [f"reach-{number}" for number in range(args.episodes)], {}

    def play(self, part):
        self.played.append(part)
        number = int(part[-1])
        frames = {key: np.full((3, 2), number, np.float32) for key in ("observation.state", "action")}
        frames |= {"observation.image": np.full((2, 32, 32, 3), [[[[0]]], [[[200]]]], np.uint8), "task": "Reach."}
        frames |= {"next.reward": np.zeros(3, np.float32), "next.done": np.arange(3) == 2}
        return [frames | {"next.success": np.arange(3) == 2}] * (number + 1)


@pytest.fixture
def collecting(monkeypatch, tmp_path):
    """`examples/collect.py` with stand-ins, its arguments, and the parts that it has played."""
    stand_in = SimpleNamespace(BENCHMARK=PUSHT, Demonstrations=StandInDemonstrations)
    for name in ("envs.metaworld", "envs.metaworld.demonstrations"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(collect, "map_in_processes", lambda num_processes, *work: map(*work))
    monkeypatch.setattr(StandInDemonstrations, "played", [])
    arguments = ["--benchmark", "metaworld", "--output_dir", str(tmp_path / "outputs"), "--episodes"]
    return arguments, StandInDemonstrations.played


def test_collected_demonstrations_are_assembled_and_never_overwritten(collecting, tmp_path, capsys):
    arguments, played = collecting
    collect.main([*arguments, "1"])
    assert "1 demonstrations, 3 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        collect.main([*arguments, "2"])
    assert "exists and is not an empty folder" in capsys.readouterr().err
    (tmp_path / "outputs").rename(tmp_path / "old")
    collect.main([*arguments, "2"])
    assert "3 demonstrations, 9 frames" in capsys.readouterr().out and played == ["reach-0", "reach-1"]
    dataset = LeRobotChunkDataset(tmp_path / "outputs", 1, cache_dir=tmp_path)
    assert dataset.states[:, 0].tolist() == [0] * 3 + [1] * 6
    assert [round(dataset.image(i).mean() / 200) for i in range(9)] == [0, 0, 1] * 3


def test_somebody_elses_folder_is_not_taken_for_parts(collecting, tmp_path, capsys):
    (tmp_path / "outputs.parts").mkdir()
    (tmp_path / "outputs.parts/thesis.tex").write_text("mine")
    with pytest.raises(SystemExit):
        collect.main([*collecting[0], "1"])
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "outputs.parts").iterdir()] == ["thesis.tex"]


def test_parts_of_other_options_are_not_used(collecting, tmp_path, capsys):
    collect.main([*collecting[0], "1"])
    (tmp_path / "outputs").rename(tmp_path / "old")
    with pytest.raises(SystemExit):
        collect.main([*collecting[0], "1", "--draw_every", "1"])
    assert "'draw_every': 2}, now it is {'benchmark': 'metaworld', 'draw_every': 1}" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["playing", "writing"])
def test_interrupted_collecting_ends_in_one_line_and_keeps_its_parts(
    collecting, moment, tmp_path, capsys, monkeypatch
):
    arguments, played = collecting

    def play_and_interrupt(num_processes, write, missing):
        yield write(missing[0])
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        if moment == "playing":
            patch.setattr(collect, "map_in_processes", play_and_interrupt)
        else:
            patch.setattr(collect, "write_dataset", lambda *args, **_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as ended:
            collect.main([*arguments, "2"])
    error = capsys.readouterr().err
    assert ended.value.code == 130 and "Interrupted." in error and "Traceback" not in error
    assert str(tmp_path / "outputs.parts") in error and not (tmp_path / "outputs").exists()
    (tmp_path / "outputs.parts/.reach-1.npz.abc").mkdir()  # what a process that was killed leaves
    collect.main([*arguments, "2"])
    assert played == ["reach-0", "reach-1"]


def test_the_script_records_the_shipped_policy(tmp_path, capsys, monkeypatch):
    arguments = ["--checkpoint", str(ROOT / "checkpoints/pusht-tiny"), "--output_dir", str(tmp_path / "set")]
    record([*arguments, "--episodes", "2", "--max_steps", "10"])
    assert "2 episodes, 20 frames" in capsys.readouterr().out
    dataset = LeRobotChunkDataset(tmp_path / "set", chunk_size=4, cache_dir=tmp_path / "cache")
    assert dataset.actions.min() >= 0 and dataset.actions.max() <= 512
    for wrong, message in ((["--episodes", "0"], "at least 1"), ([], "Name another folder")):
        monkeypatch.setattr(record_rollouts, "load_policy", lambda *args: pytest.fail("nothing may be loaded"))
        with pytest.raises(SystemExit):
            record([*arguments, *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("root", [RECORDED, None], ids=["embedded", "fresh"])
def test_lerobot_opens_a_recording(written, root, tmp_path):
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="LeRobot is not installed")
    root = root or written
    ours = LeRobotChunkDataset(root, chunk_size=4, cache_dir=tmp_path)
    window = {"action": [i / 10 for i in range(4)]}
    theirs = lerobot.LeRobotDataset("local/rollouts", root=root, video_backend="pyav", delta_timestamps=window)
    assert len(theirs) == len(ours)
    for i in (0, len(ours) // 2, len(ours) - 1):
        sample = theirs[i]
        np.testing.assert_array_equal(sample["action"].numpy(), ours[i]["actions"])
        image = sample["observation.image"].permute(1, 2, 0).numpy() * 255  # (3, H, W) -> (H, W, 3)
        np.testing.assert_allclose(image, ours[i]["images"][0], atol=3)
        assert sample["task"] == ours[i]["text"]
