"""SmolAndFast, a small vision-language-action policy: SmolVLM2 that writes FAST action tokens."""

from .configuration_smolandfast import SmolAndFastConfig
from .modeling_smolandfast import SmolAndFastForActionPrediction
from .normalization_smolandfast import Normalizer, compute_statistics
from .processing_smolandfast import SmolAndFastProcessor
from .tokenization_fast_action import FastActionTokenizer

__all__ = [
    "FastActionTokenizer",
    "Normalizer",
    "SmolAndFastConfig",
    "SmolAndFastForActionPrediction",
    "SmolAndFastProcessor",
    "compute_statistics",
]
