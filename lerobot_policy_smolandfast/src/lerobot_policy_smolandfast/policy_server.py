"""LeRobot's asynchronous policy server for this policy; LeRobot's own does not accept policies of plugins.

    python -m lerobot_policy_smolandfast.policy_server --host=127.0.0.1 --port=8080 --fps=10

Its options are those of `python -m lerobot.async_inference.policy_server`, and `--trust_network`; the client is
LeRobot's robot client. LeRobot's protocol is pickle (CVE-2026-25874): anyone who reaches the port can run code here.
So the server binds only to this machine, unless `--trust_network=true`. Use a tunnel (`ssh -L`) from another machine.
"""

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

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class SmolAndFastServerConfig(PolicyServerConfig):
    """LeRobot's options of the server, and `trust_network`."""

    trust_network: bool = field(
        default=False,
        metadata={"help": "Bind to a host that other machines can reach; all of them can then run code on this one"},
    )

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ValueError(f"--fps is {self.fps}, expected 1 or more: the policy's actions a second.")
        super().__post_init__()


class SmolAndFastServer(PolicyServer):
    """LeRobot's server, without its resizing of images."""

    @property
    def policy_image_features(self) -> dict[str, PolicyFeature]:
        """The sizes that LeRobot resizes to: the robot's own, since the policy's processor resizes."""
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
    if not config.trust_network and config.host not in LOOPBACK:
        raise ValueError(
            f"host is {config.host!r}, expected one of {', '.join(LOOPBACK)}. LeRobot's server unpickles its input "
            "(CVE-2026-25874): anyone who reaches its port can run any code on this machine. Keep it on 127.0.0.1 and "
            "reach it through a tunnel (ssh -L 8080:127.0.0.1:8080 server), or pass --trust_network=true on a network "
            "where every machine may do so."
        )
    address = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(SmolAndFastServer(config), server)
    server.add_insecure_port(address)
    server.start()
    logging.info(f"Serving on {address}")
    server.wait_for_termination()


def main() -> None:
    # LeRobot 0.6.1 accepts only the policies of this list.
    if SMOLANDFASTPolicy.name not in SUPPORTED_POLICIES:
        SUPPORTED_POLICIES.append(SMOLANDFASTPolicy.name)
    try:
        serve()
    except ParsingError as error:  # its cause says which option is wrong
        sys.exit(f"policy_server: error: {error.__cause__ or error}")


if __name__ == "__main__":
    main()
