"""SmolAndFast as a LeRobot policy. Importing this registers `--policy.type=smolandfast`."""

from lerobot_policy_smolandfast.configuration_smolandfast import SMOLANDFASTConfig
from lerobot_policy_smolandfast.modeling_smolandfast import SMOLANDFASTPolicy
from lerobot_policy_smolandfast.processor_smolandfast import make_smolandfast_pre_post_processors

__all__ = ["SMOLANDFASTConfig", "SMOLANDFASTPolicy", "make_smolandfast_pre_post_processors"]
