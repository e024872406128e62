"""Serve a deployed policy in openpi's websocket protocol, whose client is openpi's `WebsocketClientPolicy`.

The client sends a dictionary with an image of each camera, `observation/state`, and `prompt`, the task. The key of a
camera is its name in `policy.image_keys` with slashes: `observation/images/front` for `observation.images.front`, or
shorter `observation/front`; a single camera may be called `observation/image`. On connect, the server sends the keys
it expects as `message_keys`, with `image_keys`, `fps`, names and sizes.

The answer holds `actions` `(chunk_size, action_dim)` and the rest of the policy's `report`. The answer to an invalid
observation is a text that says how to fix it; the client raises it.

Messages are msgpack, so nothing that is received can run code. Web pages are refused. `/healthz` answers `OK`. Needs
the extra `serve`.
"""

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
MAX_MESSAGE = 2**26  # bytes: raw images of a few cameras
MAX_PROMPT = 4096  # bytes
MAX_ITEMS = 1024  # in all lists and dictionaries together
DTYPE = re.compile(r"[<>|=][biuf]\d\d?")
# What the server sends on connect.
METADATA = ("chunk_size", "n_action_steps", "action_dim", "state_dim", "image_keys", "fps", "training_tasks")
METADATA += ("state_names", "action_names")


def pack(values: dict[str, Any]) -> bytes:
    """Msgpack with arrays in openpi's format."""

    def pack_array(value: Any) -> dict[bytes, Any]:
        array = np.asarray(value)
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}

    return msgpack.packb(values, default=pack_array)


def unpack(message: bytes | str) -> dict[str, Any]:
    """The inverse of [`pack`], in no more memory than the message has. Raises `ValueError` for any other message."""
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
    except Exception as error:  # msgpack and NumPy raise many types
        raise ValueError(f"The message is not openpi's msgpack: {error}. Use openpi-client.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The message holds a {type(values).__name__}, expected a dictionary.")
    return values


def _read_array(value: dict) -> Any:
    """An array or a NumPy scalar from its dictionary; other dictionaries stay as they are."""
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    dtype = value[b"dtype"]
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise ValueError(f"an array has dtype {dtype!r:.100}, expected booleans, integers or floats")
    if b"__npgeneric__" in value:
        if not isinstance(value[b"data"], (bool, int, float)):
            raise ValueError(f"a number is a {type(value[b'data']).__name__}")
        return np.dtype(dtype).type(value[b"data"])
    return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])


def camera_keys(image_keys: Sequence[str]) -> dict[str, str]:
    """The camera of each key of a message. The full key of each camera comes first.

    Raises:
        ValueError: Two cameras with the same full key, or one with the state's.
    """
    names = [key.removeprefix("observation.").replace(".", "/") for key in image_keys]
    full = {f"observation/{name}": key for name, key in zip(names, image_keys, strict=True)}
    if len(full) < len(image_keys) or STATE in full:
        raise ValueError(
            f"Two of the policy's image_keys {list(image_keys)}, or one and the state, have one key in a message. "
            "Rename one."
        )
    short = [f"observation/{name.removeprefix('images/')}" for name in names]
    ambiguous = {STATE, *(key for key, number in Counter(short).items() if number > 1)}
    aliases = {alias: key for alias, key in zip(short, image_keys, strict=True) if alias not in ambiguous}
    if len(image_keys) == 1:
        aliases[IMAGE] = image_keys[0]
    return full | {alias: key for alias, key in aliases.items() if alias not in full}


def read_observation(observation: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The arguments of the policy's `report`. Raises `ValueError` unless the keys are those of the policy."""
    cameras = list(dict.fromkeys(keys.values()))
    image_names = [name for name in observation if name in keys]
    images = {keys[name]: observation[name] for name in image_names}
    is_known = all(name in keys or name in (STATE, PROMPT) for name in observation)
    if not is_known or not len(image_names) == len(images) == len(cameras) or STATE not in observation:
        raise ValueError(
            f"The observation has the keys {sorted(map(str, observation))}, expected one image of each of the "
            f"policy's cameras, {STATE!r} and, optionally, {PROMPT!r}. The keys of the cameras are {keys}. Rename or "
            "add what differs."
        )
    prompt = observation.get(PROMPT)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{PROMPT} is a {type(prompt).__name__}, expected a text.")
    if prompt is not None and len(prompt.encode(errors="replace")) > MAX_PROMPT:
        raise ValueError(f"{PROMPT} has more than {MAX_PROMPT} bytes. Use a shorter text.")
    return {"images": images, "text": prompt, "state": observation[STATE]}


def make_server(policy: DeployedPolicy, host: str, port: int, connections: set | None = None) -> Server:
    """A server that is bound, and serves with `serve_forever()` until `shutdown()`.

    Args:
        connections: Receives the open connections.
    """
    is_busy, keys = threading.Lock(), camera_keys(policy.image_keys)
    connections = set() if connections is None else connections
    metadata = {name: getattr(policy, name) for name in METADATA}
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
            pass
        finally:
            connections.discard(connection)

    def check_health(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    # Browsers send the page's origin, programs do not.
    limits = {"compression": None, "max_size": MAX_MESSAGE, "origins": [None]}
    return serve(handle, host, port, process_request=check_health, **limits)
