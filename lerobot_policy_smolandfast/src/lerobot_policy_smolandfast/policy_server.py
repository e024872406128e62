"""LeRobot's asynchronous policy server, which otherwise does not know policies that are not its own.

    python -m lerobot_policy_smolandfast.policy_server --host=127.0.0.1 --port=8080 --fps=10

Its options are those of `python -m lerobot.async_inference.policy_server`, and `--trust_network`; LeRobot's robot
client talks to it. LeRobot's protocol is pickle (CVE-2026-25874): whoever reaches the port runs code here. So the
server binds to this machine alone, unless `--trust_network=true`. Reach it from another machine through a tunnel
(`ssh -L`).
"""

import ipaddress
import logging
import sys
from concurrent import futures
from dataclasses import dataclass, field

import draccus
import grpc
from draccus.utils import ParsingError
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.constants import SUPPORTED_POLICIES
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.transport import services_pb2_grpc

from .modeling_smolandfast import SMOLANDFASTPolicy


@dataclass
class SmolAndFastServerConfig(PolicyServerConfig):
    """LeRobot's options of the server, which may not be bound to a network by accident."""

    trust_network: bool = field(
        default=False,
        metadata={"help": "Bind to a host that other machines reach, all of which can then run code on this one"},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}, expected 1 to 65535.")
        if self.fps < 1:
            raise ValueError(f"--fps is {self.fps}, expected 1 or more: the policy's actions a second.")
        super().__post_init__()

    def check_host(self) -> None:
        """Refuse a host that other machines can reach, unless `trust_network`."""
        if not self.trust_network and not _is_loopback(self.host):
            raise ValueError(
                f"host is {self.host!r}, expected localhost, 127.0.0.1 or ::1. LeRobot's server unpickles what it "
                "receives (CVE-2026-25874): whoever reaches its port can run any code on this machine. Keep it on "
                "127.0.0.1 and reach it through a tunnel (ssh -L 8080:127.0.0.1:8080 server), or pass "
                "--trust_network=true on a network where every machine may do so."
            )

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, which may be any machine's
        return False


class SmolAndFastServer(PolicyServer):
    """LeRobot's server, which leaves images as the robot sends them."""

    @property
    def policy_image_features(self) -> dict[str, PolicyFeature]:
        """The sizes that LeRobot resizes to: the robot's own, since the policy's processor resizes by itself."""
        return {
            key: PolicyFeature(FeatureType.VISUAL, (3, *feature["shape"][:2]))
            for key, feature in self.lerobot_features.items()
            if len(feature["shape"]) == 3
        }

    def SendPolicyInstructions(self, request, context):  # noqa: N802
        answer = super().SendPolicyInstructions(request, context)
        fps = getattr(getattr(self.policy, "processor", None), "fps", None)
        if fps is not None and fps != self.config.fps:
            self.logger.warning(
                f"The server runs with --fps={self.config.fps}, the policy was trained at {fps} actions a second. "
                f"Start server and client with --fps={fps:g}, or the arm moves at another speed."
            )
        return answer


@draccus.wrap()
def serve(config: SmolAndFastServerConfig) -> None:
    """Serve policies until the process ends."""
    config.check_host()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(SmolAndFastServer(config), server)
    server.add_insecure_port(config.address)
    server.start()
    logging.info(f"Serving on {config.address}")
    server.wait_for_termination()


def main() -> None:
    # LeRobot 0.6.1 looks policies up in this list, and loads no plugins here: importing this package has done that.
    if SMOLANDFASTPolicy.name not in SUPPORTED_POLICIES:
        SUPPORTED_POLICIES.append(SMOLANDFASTPolicy.name)
    try:
        serve()
    except ParsingError as error:  # its own message does not say which option is wrong
        sys.exit(f"policy_server: error: {error.__cause__ or error}")


if __name__ == "__main__":
    main()
