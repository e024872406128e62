"""Configuration of SmolAndFast: a SmolVLM configuration plus the action side of the policy."""

import re

import numpy as np
import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.specifiers import SpecifierSet
from transformers import SmolVLMConfig
from transformers.utils import logging

from .errors_smolandfast import naming

# The releases that the whole test suite passes on, as in pyproject.toml. A checkpoint's code meets any.
TESTED_TRANSFORMERS = ">=5.18,<5.25,!=5.20.*"
if transformers.__version__ not in SpecifierSet(TESTED_TRANSFORMERS, prereleases=True):
    # By one name, since a process may load several copies of this file.
    logging.get_logger("smolandfast").warning_once(
        f"SmolAndFast is tested with transformers {TESTED_TRANSFORMERS}, and this is {transformers.__version__}. Try "
        f"it away from the robot first, or install a tested one: pip install 'transformers{TESTED_TRANSFORMERS}'"
    )

MAX_SIZE = 2**20  # no size in a configuration is larger
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_channels",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
MEND = "Give the field the type that SmolAndFastConfig documents, or take it from the checkpoint this one came from."
# SmolVLM 1 checkpoints call themselves Idefics3; their weights have the same names and shapes.
BACKBONE_MODEL_TYPES = ("smolvlm", "idefics3")

# What a processor and a model must agree on: `SmolAndFastProcessor.model_kwargs` without what follows from it.
SHARED_FIELDS = (
    "scale_factor",
    "do_image_splitting",
    "chunk_size",
    "action_dim",
    "n_state_bins",
    "fast_skip_tokens",
    "action_token_base_id",
    "fast_token_lengths",
    "fast_token_bytes",
    "normalization_fingerprint",
)


def action_token_map(
    ids: "int | np.ndarray | torch.Tensor", action_token_base_id: int
) -> "int | np.ndarray | torch.Tensor":
    """Map FAST ids to vocabulary ids of the language model, or back: the map is its own inverse.

    FAST token k is vocabulary id `action_token_base_id - k`: the action tokens take the tail of the vocabulary, last
    one first, as pi0-FAST does.
    """
    return action_token_base_id - ids


@strict
class SmolAndFastConfig(SmolVLMConfig):
    r"""
    Everything of [`SmolVLMConfig`], and what turns the language model into a policy.

    [`SmolAndFastProcessor.model_kwargs`] gives the fields that must agree with the processor, so that each choice is
    stated once: `SmolAndFastForActionPrediction.from_pretrained(smolvlm_folder, **processor.model_kwargs())`.

    Args:
        scale_factor (`int`, defaults to 1):
            Side of the pixel shuffle: an image of P x P patches becomes (P / scale_factor)^2 visual tokens. SmolVLM's
            own checkpoints have 4; another value re-creates the connector's projection.
        image_size (`int`, *optional*):
            Side of the square that the processor makes of an image, in pixels, at most the vision tower's
            `vision_config.image_size`, which stands in for `None`. Smaller is cheaper: visual tokens go with its
            square. SmolVLM takes for each patch the position embedding at its place in the whole image.
        do_image_splitting (`bool`, defaults to `False`):
            Whether the processor cuts large images into sub-images beside the whole one.
        chunk_size (`int`, defaults to 10): Actions predicted at once, the horizon of the FAST tokenizer.
        n_action_steps (`int`, defaults to 5): Actions of a chunk to execute before the next prediction.
        action_dim (`int`, *optional*): Dimensions of one action.
        n_state_bins (`int`, defaults to 256): Bins of each state dimension in the prompt.
        fast_skip_tokens (`int`, defaults to 280): Ids at the end of the text vocabulary that stay text.
        action_token_base_id (`int`, *optional*):
            Vocabulary id of FAST token 0; token k has id `action_token_base_id - k`.
        fast_token_lengths (`list[int]`, *optional*):
            Coefficients in each token of a fitted FAST tokenizer, in the order of the ids.
        fast_token_bytes (`list[str | None]`, *optional*):
            UTF-8 bytes of each token of a byte-level FAST tokenizer (FAST+), in hexadecimal, in the order of the ids;
            `None` for tokens longer than a chunk.
        fast_chunk_shape (`list[int]`, *optional*):
            `[chunk_size, action_dim]` that the FAST tokenizer was chosen for; a configuration that differs is refused.
        normalization_fingerprint (`str`, *optional*):
            Names the statistics that the actions were normalised with; [`SmolAndFastProcessor.check_model`] compares
            it.
        freeze_vision_tower (`bool`, defaults to `False`): Whether the vision tower takes no gradient.
        freeze_connector (`bool`, defaults to `False`): Whether the connector takes no gradient.

    Raises:
        ValueError: Fields that contradict each other; the message says how to fix them.
        StrictDataclassError: A field of another type (of `huggingface_hub.errors`; a ValueError on loading).
    """

    model_type = "smolandfast"

    scale_factor: int = 1
    image_size: int | None = None
    do_image_splitting: bool = False
    chunk_size: int = 10
    n_action_steps: int = 5
    action_dim: int | None = None
    n_state_bins: int = 256
    fast_skip_tokens: int = 280
    action_token_base_id: int | None = None
    fast_token_lengths: list[int] | None = None
    fast_token_bytes: list[str | None] | None = None
    fast_chunk_shape: list[int] | None = None
    normalization_fingerprint: str | None = None
    freeze_vision_tower: bool = False
    freeze_connector: bool = False

    def __post_init__(self, **kwargs):
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype) and self.dtype is not None:
            raise ValueError(f"dtype is {self.dtype!r}, expected a type of PyTorch's, such as 'float32'.")
        for name in ("vision_config", "text_config"):
            part = getattr(self, name)
            if isinstance(part, dict) and not isinstance(part.get("model_type", ""), str):
                raise ValueError(f"{name}.model_type is {part['model_type']!r}, expected a string such as 'llama'.")
            if isinstance(part, dict):
                _check_labels(part.get("id2label"), f"{name}.id2label")
        _check_labels(self.id2label, "id2label")
        with naming("The configuration", MEND, passing=(ValueError,)):
            super().__post_init__(**kwargs)
            self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if not isinstance(config_dict, dict):
            raise ValueError(f"config.json holds a {type(config_dict).__name__}, expected an object with fields.")
        found = config_dict.get("model_type", cls.model_type)
        if found not in (cls.model_type, *BACKBONE_MODEL_TYPES):
            raise ValueError(
                f"This is a checkpoint of model type {found!r}, expected 'smolandfast', or 'smolvlm' to start from. "
                "Name a SmolAndFast folder or a SmolVLM one such as HuggingFaceTB/SmolVLM2-256M-Video-Instruct."
            )
        with naming("The configuration", MEND, passing=(ValueError,)):
            result = super().from_dict(config_dict, **kwargs)
        # Transformers sets keyword arguments on the finished object, after `__post_init__`.
        (result[0] if isinstance(result, tuple) else result).check()
        return result

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        with naming("config.json"):
            config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in BACKBONE_MODEL_TYPES:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def check(self) -> None:
        """Refuse contradictions. Called on construction, and by the model again."""
        positive = ("scale_factor", "chunk_size", "n_action_steps", "n_state_bins")
        for name in (*positive, *(("action_dim",) if self.action_dim is not None else ())):
            _check_size(getattr(self, name), name)
        for part in ("vision_config", "text_config"):
            for name in SIZES:
                if (value := getattr(getattr(self, part), name, None)) is not None:
                    _check_size(value, f"{part}.{name}")
        if self.fast_skip_tokens < 0:
            raise ValueError(f"fast_skip_tokens is {self.fast_skip_tokens!r}, expected a whole number of at least 0.")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, more than the chunk_size of {self.chunk_size} actions that "
                "one prediction holds. Execute fewer steps or predict longer chunks."
            )
        vision = self.vision_config
        for name in ("image_size", "patch_size"):
            value = getattr(vision, name)
            if not _is_whole(value) or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"vision_config.{name} is {value!r}, expected one number of pixels: squares only.")
        if self.image_size is not None and not 1 <= self.image_size <= vision.image_size:
            raise ValueError(
                f"image_size is {self.image_size!r}, expected a whole number of pixels, at most the vision tower's "
                f"{vision.image_size}. Leave it out for {vision.image_size}."
            )
        side = self.image_size or vision.image_size
        if side % (vision.patch_size * self.scale_factor):
            name = "vision_config.image_size" if self.image_size is None else "image_size"
            raise ValueError(
                f"An image of {side} pixels does not divide into patches of {vision.patch_size}, these into squares "
                f"of scale_factor {self.scale_factor}. Make {name} a multiple of "
                f"{vision.patch_size * self.scale_factor}, or change scale_factor."
            )
        if self.fast_token_lengths is not None and self.fast_token_bytes is not None:
            raise ValueError(
                "Both fast_token_lengths and fast_token_bytes are given; a fitted tokenizer has the first, FAST+ the "
                "second. Take both from one tokenizer with FastActionTokenizer.token_grammar()."
            )
        self._check_action_tokens()

    def _check_action_tokens(self) -> None:
        fields = {
            "action_dim": self.action_dim,
            "action_token_base_id": self.action_token_base_id,
            "fast_token_lengths or fast_token_bytes": self.fast_token_lengths or self.fast_token_bytes or None,
        }
        missing = [name for name, value in fields.items() if value is None]
        if len(missing) == len(fields):
            return  # a backbone that no action tokenizer has been chosen for yet
        if missing:
            raise ValueError(
                f"The action side is half filled: {', '.join(missing)} missing beside "
                f"{', '.join(name for name in fields if name not in missing)}. Take all of it from "
                "SmolAndFastProcessor.model_kwargs()."
            )
        lengths, hexes = self.fast_token_lengths or (), self.fast_token_bytes or ()
        if any(n < 1 for n in lengths):
            raise ValueError("fast_token_lengths holds a token of no coefficient. Take it from token_grammar().")
        if any(token is not None and not re.fullmatch("([0-9a-f]{2})+", token) for token in hexes):
            raise ValueError("fast_token_bytes holds what is no hexadecimal. Take it from token_grammar().")
        if self.fast_chunk_shape not in (None, [self.chunk_size, self.action_dim]):
            raise ValueError(
                f"chunk_size and action_dim are {self.chunk_size} and {self.action_dim}, the FAST tokenizer is for "
                f"chunks of {self.fast_chunk_shape} (fast_chunk_shape). Fit one for these chunks and take its fields "
                "from SmolAndFastProcessor.model_kwargs()."
            )
        if self.chunk_size * self.action_dim > self.text_config.max_position_embeddings:
            raise ValueError(
                f"A chunk holds chunk_size * action_dim = {self.chunk_size} * {self.action_dim} coefficients, that is "
                f"more than text_config.max_position_embeddings, {self.text_config.max_position_embeddings}, so not "
                "every one can be written. Predict shorter chunks."
            )
        first_id = self.action_token_base_id - self.num_action_tokens + 1
        if first_id < 0 or self.action_token_base_id >= self.text_config.vocab_size:
            raise ValueError(
                f"{self.num_action_tokens} action tokens that end at id {self.action_token_base_id} do not fit into a "
                f"vocabulary of {self.text_config.vocab_size}. Fit a smaller FAST vocabulary, or take "
                "action_token_base_id from the tokenizer of this checkpoint."
            )

    @property
    def num_action_tokens(self) -> int:
        """Size of the FAST vocabulary, 0 where none is chosen."""
        return len(self.fast_token_lengths or self.fast_token_bytes or ())

    @property
    def image_seq_len(self) -> int:
        """Visual tokens of one image (or sub-image)."""
        side = self.image_size or self.vision_config.image_size
        return (side // self.vision_config.patch_size // self.scale_factor) ** 2


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_labels(labels: object, name: str) -> None:
    if labels is not None and not (isinstance(labels, dict) and all(str(key).isdecimal() for key in labels)):
        raise ValueError(f"{name} is {labels!r}, expected None, or names by their numbers.")


def _check_size(value: object, name: str) -> None:
    if not _is_whole(value) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1, and {MAX_SIZE} at most.")


SmolAndFastConfig.register_for_auto_class("AutoConfig")
