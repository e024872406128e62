"""LeRobot's asynchronous policy server, which otherwise does not know policies that are not its own.

    python -m lerobot_policy_smolandfast.policy_server --host=127.0.0.1 --port=8080 --fps=10

Its options are those of `python -m lerobot.async_inference.policy_server`; LeRobot's robot client talks to it. The
server unpickles what it receives, so whoever reaches the port runs code here: without `--host` it is bound to this
machine alone. Reach it from another one through a tunnel (ssh -L), or on a network of the robot's own.
"""

from lerobot.async_inference.constants import SUPPORTED_POLICIES
from lerobot.async_inference.policy_server import serve

from .modeling_smolandfast import SMOLANDFASTPolicy


def main() -> None:
    # LeRobot 0.6.1 looks policies up in this list, and loads no plugins here: importing this package has done that.
    if SMOLANDFASTPolicy.name not in SUPPORTED_POLICIES:
        SUPPORTED_POLICIES.append(SMOLANDFASTPolicy.name)
    serve()


if __name__ == "__main__":
    main()
