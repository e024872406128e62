"""LeRobot's real-time chunking engine drives a simulated robot, which does not wait for its policy."""

import time
from threading import Event
from types import SimpleNamespace

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import RTCInferenceEngine
from test_policy_server import CHECKPOINT, FEATURES, TASK

from lerobot_policy_smolandfast import SMOLANDFASTPolicy
from lerobot_policy_smolandfast.convert_checkpoint import to_lerobot
from smolandfast import SmolAndFastProcessor

FPS, THRESHOLD, STEPS = 10, 8, 40


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The shipped policy, told what it has not learnt to be told: here only what LeRobot says counts."""
    folder = tmp_path_factory.mktemp("rtc") / "policy"
    to_lerobot(CHECKPOINT, folder, ["observation.images.top"])
    policy = SMOLANDFASTPolicy.from_pretrained(folder)
    policy.config.max_delay = policy.processor.max_delay = THRESHOLD
    return policy.eval()


def test_the_robot_goes_on_and_the_policy_is_told_what_it_executes(policy, monkeypatch):
    told, chunks, process, predict = [], [], SmolAndFastProcessor.__call__, policy.predict_action_chunk

    def listen(processor, *args, action_prefix=None, **kwargs):
        told.append(np.zeros((0, 2)) if action_prefix is None else action_prefix[0].numpy())
        return process(processor, *args, action_prefix=action_prefix, **kwargs)

    def keep(batch, inference_delay=None, prev_chunk_left_over=None):
        chunks.append(predict(batch, inference_delay, prev_chunk_left_over)[0].numpy())
        return torch.from_numpy(chunks[-1])[None]

    monkeypatch.setattr(SmolAndFastProcessor, "__call__", listen)
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
    assert len(told[0]) == 0 and max(map(len, told)) >= 1
    for actions, chunk in zip(told[1:], chunks, strict=False):  # what is coming is what is left of the chunk before
        places = [i for i in range(len(chunk)) if np.array_equal(chunk[i : i + len(actions)], actions)]
        assert places and len(actions) <= policy.config.max_delay
