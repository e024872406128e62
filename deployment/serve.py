"""Serve a deployed policy in openpi's websocket protocol, whose client is openpi's `WebsocketClientPolicy`.

The client sends a dictionary with an image of each camera, `observation/state`, and `prompt`, the task. The key of a
camera is its name in `policy.image_keys` with slashes: `observation/images/front` for `observation.images.front`, or
shorter `observation/front`; a single camera may be called `observation/image`. On connect, the server sends the keys
it expects as `message_keys`, with `image_keys`, `fps`, names and sizes.

The answer holds `actions` `(chunk_size, action_dim)` and the rest of the policy's `report`. A wrong observation is
answered with a text that names what is wrong; the client raises it.

Messages are msgpack: nothing that is received can run code. Web pages are refused. `/healthz` answers `OK`. Needs the
extra `serve`.
"""

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from .runtime import DeployedPolicy

STATE, PROMPT, IMAGE = "observation/state", "prompt", "observation/image"
MAX_MESSAGE = 2**26  # bytes: a few cameras' raw images
MAX_PROMPT = 4096  # bytes
MAX_ITEMS = 1024  # of lists and dictionaries, all together
DTYPE = re.compile(r"[<>|=][biuf]\d\d?")


def pack(values: dict[str, Any]) -> bytes:
    """Msgpack with arrays as openpi writes them."""

    def pack_array(value: Any) -> dict[bytes, Any]:
        array = np.asarray(value)
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}

    return msgpack.packb(values, default=pack_array)


def unpack(message: bytes | str) -> dict[str, Any]:
    """What [`pack`] packed, in no more memory than the message has. Raises `ValueError` for anything else."""
    num_items = 0

    def count(items: list | dict) -> Any:
        nonlocal num_items
        num_items += 1 + len(items)
        if num_items > MAX_ITEMS:
            raise ValueError(f"it has more than {MAX_ITEMS} items; send images and state as arrays")
        return _read_array(items) if isinstance(items, dict) else items

    try:
        limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS, "max_ext_len": 0}
        values = msgpack.unpackb(message, object_hook=count, list_hook=count, **limits)
    except Exception as error:  # msgpack and NumPy raise whatever they stumble over
        raise ValueError(f"The message is not openpi's msgpack: {error}. Use openpi-client.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The message holds a {type(values).__name__}, expected a dictionary.")
    return values


def _read_array(value: dict) -> Any:
    """An array or a number that NumPy wrote, in msgpack's dictionaries; others stay as they are."""
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    data, name = value[b"data"], value[b"dtype"]
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        raise ValueError(f"an array has dtype {name!r:.100}, expected booleans, integers or floats")
    dtype = np.dtype(name)
    if b"__npgeneric__" in value:
        if not isinstance(data, (bool, int, float)):
            raise ValueError(f"a number is a {type(data).__name__}")
        return dtype.type(data)
    shape = value[b"shape"]
    if not isinstance(data, bytes) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(
            f"an array has a {type(data).__name__} of shape {shape!r:.100}, expected bytes and whole numbers"
        )
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(
            f"an array has {len(data)} bytes, its shape {shape!r:.100} and dtype {name} need another number"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def camera_keys(image_keys: Sequence[str]) -> dict[str, str]:
    """The camera that each key of a message stands for. Each camera's full key comes first.

    Raises:
        ValueError: Two cameras whose full keys are the same, or one's that is the state's.
    """
    names = [key.removeprefix("observation.").replace(".", "/") for key in image_keys]
    full = {f"observation/{name}": key for name, key in zip(names, image_keys, strict=True)}
    if len(full) < len(image_keys) or STATE in full:
        raise ValueError(
            f"The policy's image_keys {list(image_keys)} have no different keys in a message. Rename one."
        )
    short = [f"observation/{name.removeprefix('images/')}" for name in names]
    aliases = list(zip(short, image_keys, strict=True)) + ([(IMAGE, image_keys[0])] if len(image_keys) == 1 else [])
    num_claims = Counter(alias for alias, _ in dict.fromkeys(aliases))
    unambiguous = {alias: key for alias, key in aliases if num_claims[alias] == 1 and alias != STATE}
    return full | {alias: key for alias, key in unambiguous.items() if alias not in full}


def read_observation(observation: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The arguments of the policy's `report`. Raises `ValueError` for other keys than the policy needs."""
    cameras = list(dict.fromkeys(keys.values()))
    found = sorted(map(str, observation))
    expected = [next(name for name, key in keys.items() if key == camera) for camera in cameras]
    unknown = [name for name in found if name not in (STATE, PROMPT, *keys)]
    given = [keys[name] for name in found if name in keys]
    if unknown or sorted(given) != sorted(cameras) or STATE not in observation:
        others = [name for name in keys if name not in expected]
        or_else = f" (or {', '.join(others)})" if others else ""
        raise ValueError(
            f"The observation has the keys {found}, expected {[*expected, STATE, PROMPT]}{or_else}: one image of "
            f"each of the policy's cameras {cameras}, the state, and the task, which may be missing. Rename or add "
            "what differs."
        )
    prompt = observation.get(PROMPT)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{PROMPT} is a {type(prompt).__name__}, expected a text.")
    if prompt is not None and len(prompt.encode(errors="replace")) > MAX_PROMPT:
        raise ValueError(f"{PROMPT} has more than {MAX_PROMPT} bytes. Use a shorter text.")
    images = {camera: observation[name] for name, camera in keys.items() if name in observation}
    return {"images": images, "text": prompt, "state": observation[STATE]}


def make_server(policy: DeployedPolicy, host: str, port: int, connections: set | None = None) -> Server:
    """A server that is bound, and serves with `serve_forever()` until `shutdown()`.

    Args:
        connections: Holds those that are open.
    """
    is_busy, keys = threading.Lock(), camera_keys(policy.image_keys)
    connections = set() if connections is None else connections
    names = ("chunk_size", "n_action_steps", "action_dim", "state_dim", "image_keys", "fps", "training_tasks")
    names += ("state_names", "action_names")
    metadata = {name: getattr(policy, name) for name in names}
    metadata["message_keys"] = [*list(keys)[: len(policy.image_keys)], STATE, PROMPT]

    def answer(message: bytes | str) -> bytes | str:
        try:
            arguments = read_observation(unpack(message), keys)
            if np.ndim(arguments["state"]) != 1:
                raise ValueError(
                    f"{STATE!r} has shape {np.shape(arguments['state'])}, expected (state_dim,): one sample."
                )
            with is_busy:
                start = time.perf_counter()
                report = policy.report(**arguments)
                milliseconds = (time.perf_counter() - start) * 1e3
        except ValueError as error:
            return str(error)
        return pack({name: value[0] for name, value in report.items()} | {"server_timing": {"infer_ms": milliseconds}})

    def handle(connection: ServerConnection) -> None:
        connections.add(connection)
        try:
            connection.send(pack(metadata))
            for message in connection:
                connection.send(answer(message))
        except ConnectionClosed:
            pass  # the next one is welcome
        finally:
            connections.discard(connection)

    def check_health(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    # Browsers name the page's origin, programs do not.
    limits = {"compression": None, "max_size": MAX_MESSAGE, "origins": [None]}
    return serve(handle, host, port, process_request=check_health, **limits)
