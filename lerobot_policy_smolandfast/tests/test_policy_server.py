"""LeRobot's asynchronous server with this policy, a simulated robot as its client, and a connection that is cut."""

import importlib
import json
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
CHUNK_SIZE = json.loads((CHECKPOINT / "config.json").read_text())["chunk_size"]
TASK = "Push the T-shaped block onto the T-shaped target."
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "observation.images.top": {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
}


class Client:
    """What LeRobot's `RobotClient` sends and receives, without one of its robots."""

    def __init__(self, address: str, policy: Path, features: dict = FEATURES):
        self.channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(self.channel).result(timeout=120)
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)
        self.stub.Ready(services_pb2.Empty())
        instructions = RemotePolicyConfig("smolandfast", str(policy), features, actions_per_chunk=CHUNK_SIZE)
        self.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(instructions)))

    def chunk(self, observation: dict, step: int) -> np.ndarray:
        x, y = observation["agent_pos"].tolist()
        seen = {"x": x, "y": y, "top": observation["pixels"], "task": TASK}
        message = pickle.dumps(TimedObservation(time.time(), step, seen, must_go=True))
        self.stub.SendObservations(send_bytes_in_chunks(message, services_pb2.Observation, silent=True))
        actions = pickle.loads(self.stub.GetActions(services_pb2.Empty()).data)
        assert [action.get_timestep() for action in actions] == list(range(step, step + CHUNK_SIZE))
        return np.stack([action.get_action().numpy() for action in actions])


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "policy"
    to_lerobot(CHECKPOINT, folder, ["observation.images.top"])
    return folder


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture
def address(tmp_path, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "lerobot_policy_smolandfast.policy_server"
    command = [sys.executable, "-m", module, f"--port={port}", "--fps=12", "--inference_latency=0"]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
    yield f"127.0.0.1:{port}"
    server.terminate()
    server.wait(timeout=30)


def test_a_robot_is_driven_and_goes_on_after_the_connection_was_cut(address, policy):
    model = SmolAndFastForActionPrediction.from_pretrained(CHECKPOINT).eval()
    processor = SmolAndFastProcessor.from_pretrained(CHECKPOINT)
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


def test_images_reach_the_policy_in_the_robots_own_size(address, policy, log):
    model = SmolAndFastForActionPrediction.from_pretrained(CHECKPOINT).eval()
    processor = SmolAndFastProcessor.from_pretrained(CHECKPOINT)
    rng = np.random.default_rng(0)
    image = {"dtype": "image", "shape": (120, 160, 3), "names": ["height", "width", "channels"]}
    client = Client(address, policy, FEATURES | {"observation.images.top": image})
    for step in range(3):
        pixels = rng.integers(0, 256, image["shape"], dtype=np.uint8)
        observation = {"agent_pos": rng.uniform(100, 400, 2).astype(np.float32), "pixels": pixels}
        chunk = client.chunk(observation, step=CHUNK_SIZE * step)
        inputs = processor(pixels, TASK, observation["agent_pos"])
        np.testing.assert_array_equal(chunk, processor.post_process_actions(model.generate(**inputs))[0])
    client.channel.close()
    assert "--fps=12" in log.read_text() and "trained at 10" in log.read_text()


@pytest.fixture
def bound(monkeypatch, tmp_path):
    """Run the server's command without starting it, and return the addresses that it binds to."""
    monkeypatch.chdir(tmp_path)  # LeRobot's module makes a folder for its log when it is imported
    policy_server = importlib.import_module("lerobot_policy_smolandfast.policy_server")

    def run(*arguments: str) -> list[str]:
        addresses = []
        server = SimpleNamespace(
            add_insecure_port=addresses.append,
            add_generic_rpc_handlers=lambda handlers: None,
            add_registered_method_handlers=lambda *handlers: None,
            start=lambda: None,
            wait_for_termination=lambda: None,
        )
        monkeypatch.setattr(policy_server.grpc, "server", lambda pool: server)
        monkeypatch.setattr(sys, "argv", ["policy_server", *arguments])
        policy_server.main()
        return addresses

    return run


@pytest.mark.parametrize("option", ["port=0", "port=65536", "fps=0", "fps=-3"])
def test_numbers_out_of_range_are_an_error_line(option, bound):
    name, value = option.split("=")
    message = f"--fps is {value}, expected" if name == "fps" else f"Port must be between 1 and 65535, got {value}"
    with pytest.raises(SystemExit, match=message):
        bound(f"--{option}")


REACHABLE = ["0.0.0.0", "::", "192.168.0.7", "fe80::1", "robot.local", "localhost.evil.org", "0", ""]


@pytest.mark.parametrize("host", REACHABLE)
@pytest.mark.parametrize("style", ["one_word", "two_words", "file"])
def test_a_host_that_others_reach_is_refused_unless_the_network_is_trusted(bound, host, style, tmp_path):
    (tmp_path / "server.yaml").write_text(f"host: '{host}'\n")
    arguments = {
        "one_word": [f"--host={host}"],
        "two_words": ["--host", host],
        "file": [f"--config_path={tmp_path / 'server.yaml'}"],
    }[style]
    for refused in (arguments, [*arguments, "--trust_network=false"]):
        with pytest.raises(ValueError, match="CVE-2026-25874.*--trust_network=true"):
            bound(*refused)
    [address] = bound(*arguments, "--trust_network=true")
    assert address.endswith(":8080")


@pytest.mark.parametrize(
    "host, address",
    [
        (None, "localhost:8080"),
        ("localhost", "localhost:8080"),
        ("127.0.0.1", "127.0.0.1:8080"),
        ("::1", "[::1]:8080"),
    ],
)
def test_this_machine_is_served(bound, host, address):
    assert bound(*([] if host is None else [f"--host={host}"])) == [address]
