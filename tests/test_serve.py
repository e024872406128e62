"""A deployed policy over a websocket, in openpi's messages: chunks come back, and what is wrong is said."""

import threading

import numpy as np
import pytest

serve = pytest.importorskip("serve", reason='the server needs pip install -e ".[serve]"')
from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

IMAGE, STATE = np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3), np.array([200.0, 300.0])
OBSERVATION = {"observation/image": IMAGE, "observation/state": STATE, "prompt": "Push it."}


class StandInPolicy:
    """Remembers what it was asked, and answers with numbers of its own."""

    chunk_size, n_action_steps, action_dim, state_dim, training_tasks = 4, 2, 2, 2, ["Push it."]

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
        assert about["chunk_size"] == 4 and about["training_tasks"] == ["Push it."]
        client.send(serve.pack(OBSERVATION | {"observation/wrist_image": IMAGE[:50]}))
        reply = serve.unpack(client.recv())
    np.testing.assert_array_equal(reply["actions"], np.ones((4, 2), np.float32))
    assert reply["log_probability"] == -0.5 and reply["server_timing"]["infer_ms"] >= 0
    images, text, state = policy.asked
    np.testing.assert_array_equal(images[0], IMAGE)
    assert images[1].shape == (50, 96, 3) and text == "Push it." and state.tolist() == STATE.tolist()


def test_what_is_wrong_is_said_and_the_connection_stays(running):
    _, address = running
    without = {name: value for name, value in OBSERVATION.items() if name != "observation/state"}
    wrong = {
        serve.pack(without): "The observation has no 'observation/state', only ['observation/image', 'prompt']",
        serve.pack(OBSERVATION | {"observation/state": np.zeros(3)}): "state has 3 numbers, expected 2",
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


def test_a_folder_that_is_no_deployed_policy_is_an_error_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        serve.main(["--checkpoint", str(tmp_path)])
    assert "it is no deployed policy" in capsys.readouterr().err
