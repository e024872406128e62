"""SmolAndFast as a LeRobot policy. Importing this registers `--policy.type=smolandfast`."""

from .configuration_smolandfast import SMOLANDFASTConfig
from .modeling_smolandfast import SMOLANDFASTPolicy
from .processor_smolandfast import make_smolandfast_pre_post_processors

__all__ = ["SMOLANDFASTConfig", "SMOLANDFASTPolicy", "make_smolandfast_pre_post_processors"]
