"""A deployed policy over a websocket, in openpi's messages: chunks come back, and what is wrong is said."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import urllib.request

import numpy as np
import pytest

serve = pytest.importorskip("smolandfast.deployment.serve", reason='needs pip install -e ".[serve]"')
script = pytest.importorskip("serve")
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

IMAGE, STATE = np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3), np.array([200.0, 300.0])
OBSERVATION = {"observation/image": IMAGE, "observation/images/wrist_image": IMAGE[:50]}
OBSERVATION |= {"observation/state": STATE, "prompt": "Push it."}


class StandInPolicy:
    """Remembers what it was asked, and answers with numbers of its own."""

    chunk_size, n_action_steps, action_dim, state_dim, training_tasks = 4, 2, 2, 2, ["Push it."]
    image_keys, fps = ["observation.image", "observation.images.wrist_image"], 10
    state_names = action_names = ["x", "y"]

    def report(self, images, text, state):
        self.asked = images, text, state
        if len(state) != 2:
            raise ValueError(f"state has {len(state)} numbers, expected 2.")
        return {"actions": np.ones((1, 4, 2), np.float32), "log_probability": np.array([-0.5])}


@pytest.fixture
def running():
    policy = StandInPolicy()
    with serve.make_server(policy, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield policy, f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def test_an_observation_becomes_a_chunk(running):
    policy, address = running
    with connect(address, compression=None) as client:
        about = serve.unpack(client.recv())
        assert about["chunk_size"] == 4 and about["training_tasks"] == ["Push it."] and about["fps"] == 10
        assert about["image_keys"] == policy.image_keys and about["message_keys"] == list(OBSERVATION)
        client.send(serve.pack(OBSERVATION))
        reply = serve.unpack(client.recv())
    np.testing.assert_array_equal(reply["actions"], np.ones((4, 2), np.float32))
    assert reply["log_probability"] == -0.5 and reply["server_timing"]["infer_ms"] >= 0
    images, text, state = policy.asked
    np.testing.assert_array_equal(images["observation.image"], IMAGE)
    assert (
        images["observation.images.wrist_image"].shape == (50, 96, 3)
        and text == "Push it."
        and state.tolist() == STATE.tolist()
    )


def test_what_is_wrong_is_said_and_the_connection_stays(running):
    _, address = running
    without = {name: value for name, value in OBSERVATION.items() if name != "observation/state"}
    wrong = {
        serve.pack(
            without
        ): "The observation has the keys ['observation/image', 'observation/images/wrist_image', 'pro",
        serve.pack(OBSERVATION | {"observation/state": np.zeros(3)}): "state has 3 numbers, expected 2",
        serve.pack(OBSERVATION | {"observation/state": np.zeros((2, 2))}): "has shape (2, 2), expected (state_dim,)",
        serve.msgpack.packb([1, 2]): "holds a list, expected a dictionary",
        b"\xc1 no msgpack": "is not openpi's msgpack",
        "text": "is not openpi's msgpack",
        serve.msgpack.packb({"a": {b"__ndarray__": True, b"data": b"123", b"dtype": "<f8", b"shape": [9]}}): "msgpack",
    }
    with connect(address, compression=None) as client:
        client.recv()
        for message, words in wrong.items():
            client.send(message)
            reply = client.recv()
            assert isinstance(reply, str) and words in reply
        client.send(serve.pack(OBSERVATION))
        assert serve.unpack(client.recv())["actions"].shape == (4, 2)


def test_a_client_that_is_cut_off_leaves_the_server_to_others(running):
    _, address = running
    with connect(address, compression=None) as client:
        client.recv()
        client.socket.close()
    with connect(address, compression=None) as client:
        client.recv()
        client.send(serve.pack(OBSERVATION))
        assert serve.unpack(client.recv())["actions"].shape == (4, 2)


def test_a_message_that_is_too_large_ends_the_connection(running, monkeypatch):
    _, address = running
    with connect(address, compression=None) as client, pytest.raises(ConnectionClosed):
        client.recv()
        client.send(bytes(serve.MAX_MESSAGE + 1))
        client.recv()


CAMERAS = {
    ("observation.image",): {"observation/image": 0},
    ("observation.images.front",): {"observation/images/front": 0, "observation/front": 0, "observation/image": 0},
    ("top",): {"observation/top": 0, "observation/image": 0},
    ("observation.images.wrist_image_left", "observation.images.exterior"): {
        "observation/images/wrist_image_left": 0,
        "observation/images/exterior": 1,
        "observation/wrist_image_left": 0,
        "observation/exterior": 1,
    },
    # An alias that another camera has, or might have, is none.
    ("observation.images.front", "observation.front"): {"observation/images/front": 0, "observation/front": 1},
    ("observation.images.image", "observation.b"): {
        "observation/images/image": 0,
        "observation/b": 1,
        "observation/image": 0,
    },
    ("observation.images.state",): {"observation/images/state": 0, "observation/image": 0},
}


@pytest.mark.parametrize("image_keys", CAMERAS)
def test_each_camera_is_found_by_its_name(image_keys):
    keys = serve.camera_keys(image_keys)
    assert keys == {name: image_keys[i] for name, i in CAMERAS[image_keys].items()}
    images = {key: np.full((2, 2, 3), i) for i, key in enumerate(image_keys)}
    for choose in (min, max):  # the alphabet does not matter
        chosen = [choose(name for name in keys if keys[name] == key) for key in image_keys]
        message = {name: images[keys[name]] for name in sorted(chosen, reverse=True)} | {serve.STATE: STATE}
        read = serve.read_observation(message, keys)
        assert {key: int(image[0, 0, 0]) for key, image in read["images"].items()} == dict(
            zip(image_keys, range(9), strict=False)
        )
        assert read["text"] is None


@pytest.mark.parametrize("image_keys", [("observation.state",), ("observation.a.b", "observation.a/b")])
def test_cameras_without_a_key_of_their_own_are_refused(image_keys):
    with pytest.raises(ValueError, match="Rename one"):
        serve.camera_keys(image_keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"observation/wrist_image_left": IMAGE},
        {"observation/wrist_image": IMAGE},  # the same camera a second time
        {"observation/images/wrist_image": None},
        {"observation/image": None},
        {"promt": "Push it."},
        {b"observation/image2": IMAGE},
        {"prompt": ["Push it."]},
        {"prompt": "x" * 5000},
        {"prompt": "\N{PUSHPIN}" * 1500},
    ],
)
def test_other_keys_than_the_policys_and_long_texts_are_refused(changes):
    keys = serve.camera_keys(StandInPolicy.image_keys)
    observation = {name: value for name, value in (OBSERVATION | changes).items() if value is not None}
    with pytest.raises(ValueError) as refused:
        serve.read_observation(observation, keys)
    name = str(next(iter(changes)))
    assert name in str(refused.value) or changes[name] is None
    assert "prompt" in changes or all(key in str(refused.value) for key in StandInPolicy.image_keys)


def array(**changes):
    fields = {"__ndarray__": True, "data": bytes(24), "dtype": "<f8", "shape": [3]} | changes
    return serve.msgpack.packb({"a": {name.encode(): value for name, value in fields.items()}})


@pytest.mark.parametrize(
    "message",
    [
        *[
            array(dtype=dtype)
            for dtype in ("O", "|O", "<U1", "|S8", "|V8", "<c16", "<M8[s]", "f8,f8", "(3,)f8", "<f3", 8, b"<f8")
        ],
        *[array(shape=shape) for shape in ([2**40], [2], [3.0], "3", [0, 2**63], [1] * 100 + [3])],
        array(data=bytes(23)),
        array(data="x" * 24),
        serve.msgpack.packb({"a": {b"__npgeneric__": True, b"data": [0] * 9, b"dtype": "<f8"}}),
        serve.msgpack.packb({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"}}),
        serve.msgpack.packb({"a": [[]] * 2000}),
        serve.msgpack.packb({"a": [[[0] * 100] * 100] * 10}),
        serve.msgpack.packb({i: i for i in range(2000)}),
        serve.msgpack.packb(serve.msgpack.ExtType(1, b"x")),
        b"\xdd\xff\xff\xff\xff",
        b"",
    ],
)
def test_a_message_of_other_kinds_or_sizes_is_refused_before_memory_is_taken(message):
    with pytest.raises(ValueError, match="is not openpi's msgpack"):
        serve.unpack(message)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", ">u2", "float16", "float32", "float64"])
def test_arrays_and_numbers_arrive_as_they_were_sent(dtype):
    sent = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = serve.unpack(serve.pack({"a": sent, "empty": sent[:0], "scalar": sent[0, 0, 0]}))
    assert found["a"].dtype == sent.dtype and found["empty"].shape == (0, 3, 4)
    assert found["scalar"] == sent[0, 0, 0]
    np.testing.assert_array_equal(found["a"], sent)


def test_web_pages_are_refused(running):
    _, address = running
    with pytest.raises(InvalidStatus) as refused:
        connect(address, compression=None, origin="http://example.com")
    assert refused.value.response.status_code == 403


def test_healthz_answers_ok(running):
    _, address = running
    with urllib.request.urlopen(address.replace("ws://", "http://") + "/healthz", timeout=60) as response:
        assert (response.status, response.read()) == (200, b"OK\n")


class DeployedStandIn(StandInPolicy):
    def __init__(self, *args):
        pass


def test_a_port_that_cannot_be_served_is_an_error_line(monkeypatch, capsys):
    monkeypatch.setattr(script, "DeployedPolicy", DeployedStandIn)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in ("99999", "-1", str(taken.getsockname()[1])):
            with pytest.raises(SystemExit) as stop:
                script.main(["--checkpoint", "deployed", "--port", port])
            assert stop.value.code == 2 and f"--port {port.replace('-1', 'is -1')}" in capsys.readouterr().err.replace(
                "--port is 99999", "--port 99999"
            )


def serve_stand_in(write_end):
    sys.stdout = sys.stderr = os.fdopen(write_end, "w", buffering=1)
    script.DeployedPolicy = DeployedStandIn
    script.main(["--checkpoint", "deployed", "--port", "0"])


def test_ctrl_c_ends_the_server_quietly_though_a_client_is_connected():
    read_end, write_end = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=serve_stand_in, args=(write_end,))
    process.start()
    os.close(write_end)
    try:
        with os.fdopen(read_end) as output:
            address = output.readline().split()[3].rstrip(".")
            with connect(address, compression=None) as client:
                client.recv()
                os.kill(process.pid, signal.SIGINT)
                printed = output.read()
        process.join(120)
    finally:
        process.kill()
    assert process.exitcode == 0 and "Stopped." in printed and "Traceback" not in printed


def test_a_folder_that_is_no_deployed_policy_is_an_error_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--checkpoint", str(tmp_path)])
    assert "it is not a deployed policy" in capsys.readouterr().err
