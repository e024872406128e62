"""Configuration of SmolAndFast: a SmolVLM configuration plus the action side of the policy."""

import re

import transformers
from huggingface_hub.dataclasses import strict
from packaging.specifiers import SpecifierSet
from transformers import SmolVLMConfig
from transformers.utils import logging

from .checks_smolandfast import as_value_error, check_whole

# The releases that pass the whole test suite, as in pyproject.toml. A checkpoint's code may run on any release.
TESTED_TRANSFORMERS = ">=5.18,<5.25,!=5.20.*"
if transformers.__version__ not in SpecifierSet(TESTED_TRANSFORMERS, prereleases=True):
    # One name for all copies of this file that a process may load, so that the warning appears once.
    logging.get_logger("smolandfast").warning_once(
        f"SmolAndFast is tested with transformers {TESTED_TRANSFORMERS}, and this is {transformers.__version__}. Try "
        f"it away from the robot first, or install a tested one: pip install 'transformers{TESTED_TRANSFORMERS}'"
    )

FIX = "Give the field the type that SmolAndFastConfig documents, or take it from the checkpoint this one came from."
# SmolVLM 1 checkpoints call themselves Idefics3; their weights have the same names and shapes.
BACKBONE_MODEL_TYPES = ("smolvlm", "idefics3")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels")


def action_token_map(ids, action_token_base_id: int):
    """Map FAST ids (an integer, array or tensor) to vocabulary ids of the language model, or back.

    FAST token k has vocabulary id `action_token_base_id - k`, at the end of the vocabulary, as in pi0-FAST.
    """
    return action_token_base_id - ids


@strict
class SmolAndFastConfig(SmolVLMConfig):
    r"""
    The fields of [`SmolVLMConfig`], and those that turn the language model into a policy.

    [`SmolAndFastProcessor.model_kwargs`] gives the fields that must agree with the processor:
    `SmolAndFastForActionPrediction.from_pretrained(smolvlm_folder, **processor.model_kwargs())`.

    Args:
        scale_factor (`int`, defaults to 1):
            Side of the pixel shuffle: an image of P x P patches becomes (P / scale_factor)^2 visual tokens. SmolVLM
            has 4; another value re-creates the connector's projection.
        image_size (`int`, *optional*):
            Side in pixels of the square that the processor resizes an image to, at most the vision tower's
            `vision_config.image_size`, the default. The number of visual tokens grows with its square.
        chunk_size (`int`, defaults to 10): Actions per prediction, the horizon of the FAST tokenizer.
        n_action_steps (`int`, defaults to 5): Actions of a chunk to execute before the next prediction.
        action_dim (`int`, *optional*): Dimensions of one action.
        action_token_base_id (`int`, *optional*):
            Vocabulary id of FAST token 0; token k has id `action_token_base_id - k`.
        fast_token_lengths (`list[int]`, *optional*):
            Coefficients in each token of a fitted FAST tokenizer, in the order of the ids.
        fast_token_bytes (`list[str | None]`, *optional*):
            UTF-8 bytes in hexadecimal of each token of a byte-level FAST tokenizer (FAST+), in the order of the ids;
            `None` for tokens longer than a chunk.
        processor_fingerprint (`str`, *optional*):
            Identifies the processor used in training; [`SmolAndFastProcessor.check_model`] compares it.
        freeze_vision_tower (`bool`, defaults to `False`): Whether the vision tower takes no gradient.
        freeze_connector (`bool`, defaults to `False`): Whether the connector takes no gradient.

    Raises:
        ValueError: Fields that contradict each other; the message says how to fix them.
        StrictDataclassError: A field of another type (from `huggingface_hub.errors`; a ValueError on loading).
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
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        with as_value_error("The configuration", FIX, passing=(ValueError,)):
            result = super().from_dict(config_dict, **kwargs)
        # Transformers sets keyword arguments on the finished object, after `__post_init__`.
        (result[0] if isinstance(result, tuple) else result).check()
        return result

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, *BACKBONE_MODEL_TYPES):
            raise ValueError(
                f"This is a checkpoint of model type {model_type!r}, expected 'smolandfast', or 'smolvlm' to start "
                "from. Name a SmolAndFast folder or a SmolVLM one such as HuggingFaceTB/SmolVLM2-256M-Video-Instruct."
            )
        return {**config_dict, "model_type": cls.model_type}, kwargs

    def check(self) -> None:
        """Refuse contradictions. Called on construction, and by the model again."""
        sizes = {name: getattr(self, name) for name in ("scale_factor", "chunk_size", "n_action_steps")}
        for part in ("vision_config", "text_config"):
            sizes |= {f"{part}.{name}": getattr(getattr(self, part), name, None) for name in SIZES}
        for name, value in sizes.items():
            if value is not None:
                check_whole(value, name)
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, more than the chunk_size of {self.chunk_size} actions. "
                "Execute fewer steps or predict longer chunks."
            )
        vision = self.vision_config
        if self.image_size is not None and not 1 <= self.image_size <= vision.image_size:
            raise ValueError(
                f"image_size is {self.image_size!r}, expected a whole number of pixels, at most the vision tower's "
                f"{vision.image_size}."
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
            raise ValueError("fast_token_lengths holds a token of no coefficients. Take it from token_grammar().")
        tokens = [token for token in self.fast_token_bytes or () if token is not None]
        if not all(re.fullmatch("([0-9a-f]{2})+", token) for token in tokens):
            raise ValueError("fast_token_bytes holds a string that is not hexadecimal. Take it from token_grammar().")
        if self.num_coefficients > self.text_config.max_position_embeddings:
            raise ValueError(
                f"chunk_size * action_dim is {self.chunk_size} * {self.action_dim}, more than the language model's "
                f"{self.text_config.max_position_embeddings} positions. Predict shorter chunks."
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
        """Size of the FAST vocabulary, 0 without one."""
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


SmolAndFastConfig.register_for_auto_class("AutoConfig")
