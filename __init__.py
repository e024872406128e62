"""SmolAndFast, a small vision-language-action policy: SmolVLM2 that generates FAST action tokens."""

from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from .configuration_smolandfast import SmolAndFastConfig
from .modeling_smolandfast import SmolAndFastForActionPrediction
from .normalization_smolandfast import Normalizer, compute_statistics, match_joints
from .processing_smolandfast import SmolAndFastProcessor
from .tokenization_fast_action import FastActionTokenizer

__all__ = [
    "FastActionTokenizer",
    "Normalizer",
    "SmolAndFastConfig",
    "SmolAndFastForActionPrediction",
    "SmolAndFastProcessor",
    "compute_statistics",
    "match_joints",
]

# Where this package is installed, the Auto classes use it and run no code of a checkpoint.
AutoConfig.register("smolandfast", SmolAndFastConfig)
AutoModel.register(SmolAndFastConfig, SmolAndFastForActionPrediction)
AutoProcessor.register(SmolAndFastConfig, SmolAndFastProcessor)
AutoTokenizer.register(SmolAndFastConfig, fast_tokenizer_class=FastActionTokenizer)
