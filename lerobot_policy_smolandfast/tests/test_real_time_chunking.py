"""LeRobot's real-time chunking engine drives a simulated robot, which does not wait for its policy."""

import time
from threading import Event
from types import SimpleNamespace

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import RTCInferenceEngine, supports_rtc_inference
from test_policy_server import CHECKPOINT, FEATURES, TASK

from lerobot_policy_smolandfast import SMOLANDFASTPolicy
from lerobot_policy_smolandfast.convert_checkpoint import to_lerobot

FPS, THRESHOLD, STEPS = 10, 8, 40


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rtc") / "policy"
    to_lerobot(CHECKPOINT, folder, ["observation.images.top"])
    return SMOLANDFASTPolicy.from_pretrained(folder).eval()


def test_the_robot_goes_on_along_one_chunk_while_the_next_is_predicted(policy, monkeypatch):
    chunks, predict = [], policy.predict_action_chunk

    def keep(batch, inference_delay=None, prev_chunk_left_over=None):
        chunks.append(predict(batch, inference_delay, prev_chunk_left_over)[0].numpy())
        return torch.from_numpy(chunks[-1])[None]

    assert supports_rtc_inference(policy)
    monkeypatch.setattr(policy, "predict_action_chunk", keep)
    before, after = make_pre_post_processors(policy.config)
    stop = Event()
    engine = RTCInferenceEngine(
        policy,
        before,
        after,
        SimpleNamespace(robot_type="pusht", action_features={}),
        RTCConfig(execution_horizon=policy.config.chunk_size),
        FEATURES,
        TASK,
        FPS,
        "cpu",
        rtc_queue_threshold=THRESHOLD,
        shutdown_event=stop,
    )
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos").unwrapped
    observation, _ = env.reset(seed=1000)
    engine.start()
    engine.resume()
    executed, due = [], time.monotonic()
    end = due + 60
    try:
        while len(executed) < STEPS and not engine.failed and time.monotonic() < end:
            x, y = observation["agent_pos"].tolist()
            engine.notify_observation({"x": x, "y": y, "top": observation["pixels"]})
            action = engine.get_action(None)
            if action is not None:
                observation, *_ = env.step(action.numpy())
                executed.append(action.numpy())
            due += 1 / FPS
            time.sleep(max(0.0, due - time.monotonic()))
    finally:
        engine.stop()
        env.close()
    assert len(executed) == STEPS and not engine.failed
    assert len(chunks) >= 3
    for action in executed:  # as one of the chunks has it
        assert any((chunk == action).all(axis=1).any() for chunk in chunks)
