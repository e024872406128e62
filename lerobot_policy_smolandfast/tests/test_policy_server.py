"""LeRobot's asynchronous server with this policy, a simulated robot as its client, and a connection that is cut."""

import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
import pytest

from lerobot_policy_smolandfast.convert_checkpoint import to_lerobot
from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor

grpc = pytest.importorskip("grpc", reason='the server needs pip install "lerobot[grpcio-dep]"')
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation  # noqa: E402
from lerobot.transport import services_pb2, services_pb2_grpc  # noqa: E402
from lerobot.transport.utils import send_bytes_in_chunks  # noqa: E402

CHECKPOINT = Path(__file__).parents[2] / "checkpoints/pusht-tiny"
TASK = "Push the T-shaped block onto the T-shaped target."
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "observation.images.top": {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
}


class Client:
    """What LeRobot's `RobotClient` sends and receives, without one of its robots."""

    def __init__(self, address: str, policy: Path):
        self.channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(self.channel).result(timeout=120)
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)
        self.stub.Ready(services_pb2.Empty())
        instructions = RemotePolicyConfig("smolandfast", str(policy), FEATURES, actions_per_chunk=16)
        self.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(instructions)))

    def chunk(self, observation: dict, step: int) -> np.ndarray:
        x, y = observation["agent_pos"].tolist()
        seen = {"x": x, "y": y, "top": observation["pixels"], "task": TASK}
        message = pickle.dumps(TimedObservation(time.time(), step, seen, must_go=True))
        self.stub.SendObservations(send_bytes_in_chunks(message, services_pb2.Observation, silent=True))
        actions = pickle.loads(self.stub.GetActions(services_pb2.Empty()).data)
        assert [action.get_timestep() for action in actions] == list(range(step, step + 16))
        return np.stack([action.get_action().numpy() for action in actions])


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "policy"
    to_lerobot(CHECKPOINT, folder, ["observation.images.top"])
    return folder


@pytest.fixture
def address(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "lerobot_policy_smolandfast.policy_server"
    command = [sys.executable, "-m", module, f"--port={port}", "--fps=10", "--inference_latency=0"]
    server = subprocess.Popen(command, cwd=tmp_path)
    yield f"127.0.0.1:{port}"
    server.terminate()
    server.wait(timeout=30)


def test_a_robot_is_driven_and_goes_on_after_the_connection_was_cut(address, policy):
    model = SmolAndFastForActionPrediction.from_pretrained(CHECKPOINT).eval()
    processor = SmolAndFastProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
    observation, info = env.reset(seed=1003)
    start, client, best = info["block_pose"], Client(address, policy), 0.0
    for number in range(12):
        if number == 3:
            client.channel.close()
            client = Client(address, policy)
        chunk = client.chunk(observation, step=8 * number)
        inputs = processor(observation["pixels"], TASK, observation["agent_pos"])
        np.testing.assert_array_equal(chunk, processor.post_process_actions(model.generate(**inputs))[0])
        for action in chunk[:8]:
            observation, reward, *_, info = env.step(action)
            best = max(best, reward)
    assert np.abs(info["block_pose"] - start).max() > 10 and best > 0.3
    client.channel.close()


def test_it_is_bound_to_this_machine(address, policy):
    Client(address, policy).channel.close()
    with socket.socket() as outside, pytest.raises(OSError):
        outside.settimeout(2)
        outside.connect(("127.0.0.2", int(address.rpartition(":")[2])))  # of this machine too, but not bound to
