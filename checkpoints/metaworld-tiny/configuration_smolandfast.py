"""Configuration of SmolAndFast: a SmolVLM configuration plus the action side of the policy.

Owns the fields that the model needs and what they may contradict. What a processor alone decides is known here by one
fingerprint.
"""

import re

import numpy as np
import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.specifiers import SpecifierSet
from transformers import SmolVLMConfig
from transformers.utils import logging

from .checks_smolandfast import as_value_error, check_whole

# The releases that the whole test suite passes on, as in pyproject.toml. A checkpoint's code meets any.
TESTED_TRANSFORMERS = ">=5.18,<5.25,!=5.20.*"
if transformers.__version__ not in SpecifierSet(TESTED_TRANSFORMERS, prereleases=True):
    # By one name, since a process may load several copies of this file.
    logging.get_logger("smolandfast").warning_once(
        f"SmolAndFast is tested with transformers {TESTED_TRANSFORMERS}, and this is {transformers.__version__}. Try "
        f"it away from the robot first, or install a tested one: pip install 'transformers{TESTED_TRANSFORMERS}'"
    )

FIX = "Give the field the type that SmolAndFastConfig documents, or take it from the checkpoint this one came from."
# SmolVLM 1 checkpoints call themselves Idefics3; their weights have the same names and shapes.
BACKBONE_MODEL_TYPES = ("smolvlm", "idefics3")
BACKBONE_SIZES = {
    "vision_config": ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    + ("num_attention_heads", "num_channels"),
    "text_config": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    + ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
}


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
        chunk_size (`int`, defaults to 10): Actions predicted at once, the horizon of the FAST tokenizer.
        n_action_steps (`int`, defaults to 5): Actions of a chunk to execute before the next prediction.
        action_dim (`int`, *optional*): Dimensions of one action.
        action_token_base_id (`int`, *optional*):
            Vocabulary id of FAST token 0; token k has id `action_token_base_id - k`.
        fast_token_lengths (`list[int]`, *optional*):
            Coefficients in each token of a fitted FAST tokenizer, in the order of the ids.
        fast_token_bytes (`list[str | None]`, *optional*):
            UTF-8 bytes of each token of a byte-level FAST tokenizer (FAST+), in hexadecimal, in the order of the ids;
            `None` for tokens longer than a chunk.
        processor_fingerprint (`str`, *optional*):
            Names the processor that the model is trained with; [`SmolAndFastProcessor.check_model`] compares it.
        freeze_vision_tower (`bool`, defaults to `False`): Whether the vision tower takes no gradient.
        freeze_connector (`bool`, defaults to `False`): Whether the connector takes no gradient.

    Raises:
        ValueError: Fields that contradict each other; the message says how to fix them.
        StrictDataclassError: A field of another type (of `huggingface_hub.errors`; a ValueError on loading).
    """

    model_type = "smolandfast"

    scale_factor: int = 1
    image_size: int | None = None
    chunk_size: int = 10
    n_action_steps: int = 5
    action_dim: int | None = None
    action_token_base_id: int | None = None
    fast_token_lengths: list[int] | None = None
    fast_token_bytes: list[str | None] | None = None
    processor_fingerprint: str | None = None
    freeze_vision_tower: bool = False
    freeze_connector: bool = False

    def __post_init__(self, **kwargs):
        _check_fields("", {"dtype": self.dtype, "id2label": self.id2label})
        for name in BACKBONE_SIZES:
            if isinstance(part := getattr(self, name), dict):
                _check_fields(f"{name}.", part)
        with as_value_error("The configuration", FIX):
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
        with as_value_error("The configuration", FIX, passing=(ValueError,)):
            result = super().from_dict(config_dict, **kwargs)
        # Transformers sets keyword arguments on the finished object, after `__post_init__`.
        (result[0] if isinstance(result, tuple) else result).check()
        return result

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        with as_value_error("config.json"):
            config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in BACKBONE_MODEL_TYPES:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def check(self) -> None:
        """Refuse contradictions. Called on construction, and by the model again."""
        sizes = {name: getattr(self, name) for name in ("scale_factor", "chunk_size", "n_action_steps")}
        for part, names in BACKBONE_SIZES.items():
            sizes |= {f"{part}.{name}": getattr(getattr(self, part), name, None) for name in names}
        optional = ("num_key_value_heads", "head_dim")
        for name, value in sizes.items():
            if value is not None or not name.endswith(optional):
                check_whole(value, name)
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, more than the chunk_size of {self.chunk_size} actions that "
                "one prediction holds. Execute fewer steps or predict longer chunks."
            )
        vision = self.vision_config
        if self.image_size is not None and not 1 <= self.image_size <= vision.image_size:
            raise ValueError(
                f"image_size is {self.image_size!r}, expected a whole number of pixels, at most the vision tower's "
                f"{vision.image_size}. Leave it out for {vision.image_size}."
            )
        side, unit = self.image_size or vision.image_size, vision.patch_size * self.scale_factor
        if side % unit:
            raise ValueError(
                f"image_size {side} does not divide into patches of {vision.patch_size}, these into squares of "
                f"scale_factor {self.scale_factor}. Make image_size a multiple of {unit}, or change scale_factor."
            )
        if (self.action_dim, self.action_token_base_id, self.fast_token_lengths, self.fast_token_bytes) != (None,) * 4:
            self._check_action_side()

    def _check_action_side(self) -> None:
        tokens = {"fast_token_lengths": self.fast_token_lengths, "fast_token_bytes": self.fast_token_bytes}
        given = [name for name, value in tokens.items() if value]
        if None in (self.action_dim, self.action_token_base_id) or len(given) != 1:
            raise ValueError(
                f"The action side is half filled: action_dim is {self.action_dim}, action_token_base_id "
                f"{self.action_token_base_id}, and of {' and '.join(tokens)} {given} are given, expected one. Take "
                "all of it from SmolAndFastProcessor.model_kwargs()."
            )
        check_whole(self.action_dim, "action_dim")
        if any(length < 1 for length in self.fast_token_lengths or ()):
            raise ValueError(
                "fast_token_lengths holds a token that stands for no coefficient. Take it from token_grammar()."
            )
        if any(
            token is not None and not re.fullmatch("([0-9a-f]{2})+", token) for token in self.fast_token_bytes or ()
        ):
            raise ValueError("fast_token_bytes holds a string that is not hexadecimal. Take it from token_grammar().")
        if self.num_coefficients > self.text_config.max_position_embeddings:
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
    def num_coefficients(self) -> int:
        """FAST coefficients in a chunk."""
        return self.chunk_size * self.action_dim

    @property
    def image_seq_len(self) -> int:
        """Visual tokens of one image (or sub-image)."""
        side = self.image_size or self.vision_config.image_size
        return (side // self.vision_config.patch_size // self.scale_factor) ** 2


def _check_fields(prefix: str, fields: dict) -> None:
    """Name the fields that Transformers would only stumble over."""
    model_type, dtype, labels = (fields.get(name) for name in ("model_type", "dtype", "id2label"))
    if not isinstance(model_type, str | None):
        raise ValueError(f"{prefix}model_type is {model_type!r}, expected a string such as 'llama'.")
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype | None):
        raise ValueError(f"{prefix}dtype is {dtype!r}, expected a type of PyTorch's, such as 'float32'.")
    if labels is not None and not (isinstance(labels, dict) and all(str(key).isdecimal() for key in labels)):
        raise ValueError(f"{prefix}id2label is {labels!r}, expected None, or names by their numbers.")


SmolAndFastConfig.register_for_auto_class("AutoConfig")
