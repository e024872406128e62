"""Serve a deployed policy to other computers in openpi's websocket protocol.

    pip install -e ".[deployment,serve]"
    python examples/export_policy.py --checkpoint checkpoints/pusht-tiny --output_dir deployed
    python examples/serve.py --checkpoint deployed --port 8000

See `smolandfast.deployment.serve` for the messages. By default only this machine can connect. `--host 0.0.0.0` opens
the port to the network, without encryption or password.
"""

import argparse
import contextlib
import logging
import socket

import interrupt  # noqa: F401 - before the slow imports
from evaluate import error_line
from websockets.sync.server import ServerConnection

from smolandfast.deployment.runtime import BACKENDS, DeployedPolicy
from smolandfast.deployment.serve import make_server


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a deployed policy in openpi's websocket protocol.")
    parser.add_argument("--checkpoint", required=True, help="folder that export_policy.py wrote")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="onnxruntime")
    parser.add_argument("--num_threads", type=int, help="threads for inference (all cores)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port is {args.port}, expected 0 (any free port) to {2**16 - 1}.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    connections: set[ServerConnection] = set()
    with error_line(parser):
        policy = DeployedPolicy(args.checkpoint, args.backend, args.num_threads)
    with error_line(parser, f"--host {args.host} --port {args.port} cannot be used: "):
        server = make_server(policy, args.host, args.port, connections)
    with server:
        port = server.socket.getsockname()[1]
        print(f"Serving {args.checkpoint} on ws://{args.host}:{port}. Stop with Ctrl-C.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nStopped.")
        for connection in list(connections):  # their threads would keep the process alive
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
