"""Serve a deployed policy to robots whose computer is too slow, in openpi's websocket protocol.

    pip install -e ".[deployment,serve]"
    python examples/export_policy.py --checkpoint checkpoints/pusht-tiny --output_dir deployed
    python examples/serve.py --checkpoint deployed --port 8000

The client is openpi's `WebsocketClientPolicy("127.0.0.1", 8000)` (`pip install openpi-client`). It sends a dictionary
with `observation/image` (and further cameras, `observation/..._image`, in the order of their names),
`observation/state`, and `prompt`, the task. Back come `actions` `(chunk_size, action_dim)` and what the policy's
`report` says of them. A wrong observation is answered by a text that says what is wrong, at which the client raises.

Messages are msgpack: nothing that is received can run. Still anybody who reaches the port can use the policy, so it is
bound to this machine; `--host 0.0.0.0` opens it to the network, without encryption or password.
"""

import argparse
import logging
import threading
import time
from typing import Any

import msgpack
import numpy as np
from evaluate import first_line
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from smolandfast.runtime_smolandfast import BACKENDS, DeployedPolicy

STATE, PROMPT, IMAGE = "observation/state", "prompt", "observation/image"
MAX_MESSAGE = 2**26  # bytes: a few cameras' raw pictures


def pack(values: dict[str, Any]) -> bytes:
    """Msgpack with arrays as openpi writes them."""

    def pack_array(value: Any) -> dict[bytes, Any]:
        array = np.asarray(value)
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}

    return msgpack.packb(values, default=pack_array)


def unpack(message: bytes | str) -> dict[str, Any]:
    """What [`pack`] packed. Raises `ValueError` for anything else."""

    def unpack_array(value: dict) -> Any:
        if b"__ndarray__" in value:
            array = np.frombuffer(value[b"data"], dtype=np.dtype(value[b"dtype"]))
            return array.reshape(value[b"shape"])
        if b"__npgeneric__" in value:
            return np.dtype(value[b"dtype"]).type(value[b"data"])
        return value

    try:
        values = msgpack.unpackb(message, object_hook=unpack_array)
    except Exception as error:  # msgpack and NumPy raise whatever they stumble over
        raise ValueError(f"The message is not openpi's msgpack: {error}. Use openpi-client.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The message holds a {type(values).__name__}, expected a dictionary.")
    return values


def answer(policy: DeployedPolicy, observation: dict[str, Any]) -> dict[str, Any]:
    """Predict for one observation. Raises `ValueError` that says what is wrong with it."""
    for name in (IMAGE, STATE):
        if name not in observation:
            raise ValueError(f"The observation has no {name!r}, only {sorted(map(str, observation))}.")
    others = sorted(name for name in observation if str(name).startswith("observation/") and name.endswith("_image"))
    start = time.perf_counter()
    images = [observation[name] for name in (IMAGE, *others)]
    report = policy.report(images, observation.get(PROMPT), observation[STATE])
    milliseconds = (time.perf_counter() - start) * 1e3
    return {name: value[0] for name, value in report.items()} | {"server_timing": {"infer_ms": milliseconds}}


def make_server(policy: DeployedPolicy, host: str, port: int) -> Server:
    """A server that is bound, and serves with `serve_forever()` until `shutdown()`."""
    busy = threading.Lock()
    names = ("chunk_size", "n_action_steps", "action_dim", "state_dim", "training_tasks")
    about = {name: getattr(policy, name) for name in names}

    def handle(connection: ServerConnection) -> None:
        try:
            connection.send(pack(about))
            for message in connection:
                try:
                    with busy:
                        reply = pack(answer(policy, unpack(message)))
                except ValueError as error:
                    reply = str(error)
                connection.send(reply)
        except ConnectionClosed:
            pass  # the next one is welcome

    return serve(handle, host, port, compression=None, max_size=MAX_MESSAGE)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a deployed policy in openpi's websocket protocol.")
    parser.add_argument("--checkpoint", required=True, help="folder that export_policy.py wrote")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="onnxruntime")
    parser.add_argument("--num_threads", type=int, help="threads that compute (all cores)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        policy = DeployedPolicy(args.checkpoint, args.backend, args.num_threads)
        server = make_server(policy, args.host, args.port)
    except (OSError, ValueError, ImportError) as error:
        parser.error(first_line(error))
    with server:
        print(f"Serving {args.checkpoint} on ws://{args.host}:{args.port}. Stop with Ctrl-C.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped.")


if __name__ == "__main__":
    main()
