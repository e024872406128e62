"""SmolAndFast: SmolVLM that writes action tokens.

The weights and their names are those of `SmolVLMForConditionalGeneration`, so any SmolVLM or SmolVLM2 checkpoint
loads. What is added: the loss over the action tokens alone, `generate()` that can only write valid action chunks, and
the log-probability of a chunk. Takes what the processor makes; knows no images' sizes, no prompt and no robot.
"""

import copy
import inspect
import os
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    SmolVLMForConditionalGeneration,
    StoppingCriteriaList,
)
from transformers.utils import logging

from .checks_smolandfast import SHORTEN, as_value_error, check_length, check_whole
from .configuration_smolandfast import SmolAndFastConfig
from .files_smolandfast import (
    AGAIN,
    HUB_KWARGS,
    find_file,
    find_weights,
    read_json,
    read_shapes,
    write_checksums,
)
from .generation_smolandfast import ActionGrammar, ActionLogitsProcessor, ActionReader, ChunkIsComplete

logger = logging.get_logger(__name__)

PROJECTION_KEY = "model.connector.modality_projection.proj.weight"
HEAD_KEY = "lm_head.weight"


IMAGE_FEATURES = ("mm_encoder_outputs", "image_hidden_states")  # in place of pixels; the name since 5.24, and before
# What the processor decides. In a checkpoint with a fingerprint it cannot change alone.
PROCESSOR_FIELDS = ("chunk_size", "action_dim", "action_token_base_id", "fast_token_lengths", "fast_token_bytes")
PROCESSOR_FIELDS += ("scale_factor", "image_size")
# Options of generate() that would cut or stretch a chunk, or write it without the grammar.
REFUSED_OPTIONS = ("max_length", "min_new_tokens", "min_length", "stop_strings", "assistant_model")
REFUSED_OPTIONS += ("prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")


# Unless `GenerationMixin` is a direct base, `AutoModel` makes a new class at every load, which cannot be pickled.
class SmolAndFastForActionPrediction(SmolVLMForConditionalGeneration, GenerationMixin):
    """SmolVLM with a loss and a `generate()` for FAST action tokens.

    `forward` and its arguments are SmolVLM's, except that with `labels` the head runs on the action span alone, and
    that image tokens without their images are a `ValueError`.
    """

    config: SmolAndFastConfig
    config_class = SmolAndFastConfig

    def __init__(self, config: SmolAndFastConfig):
        config.check()
        super().__init__(config)
        self._freeze()

    def _freeze(self) -> None:
        self.model.vision_model.requires_grad_(not self.config.freeze_vision_tower)
        self.model.connector.requires_grad_(not self.config.freeze_connector)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a SmolAndFast checkpoint, or start from a SmolVLM one.

        Where `scale_factor` differs from the checkpoint's, the connector's projection has another shape: it is
        re-created with random weights, with a warning, and has to be trained.

        Args:
            pretrained_model_name_or_path: Folder or hub id of a SmolAndFast, SmolVLM or SmolVLM2 checkpoint.
            kwargs: Fields of [`SmolAndFastConfig`] to change, and the usual arguments of `from_pretrained`.

        Raises:
            ValueError: A checkpoint of another kind, or one that does not fit the configuration; a connector that had
                to be re-created though `freeze_connector` is set.
            OSError: Files that are missing, damaged, or not what `SHA256SUMS` beside them says; weights in another
                format than safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: weights load from safetensors alone. Drop it.")
        kwargs["use_safetensors"] = True
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            fields = {key: value for key, value in kwargs.items() if key != "config"}
            config, _ = cls.config_class.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **fields
            )
        cls._check_processor_fields(pretrained_model_name_or_path, config, hub_kwargs)
        files = find_weights(pretrained_model_name_or_path, kwargs.get("variant"), **hub_kwargs)
        found = find_file(pretrained_model_name_or_path, "generation_config.json", **hub_kwargs)
        if found is not None:  # Transformers goes on without one that is damaged
            _check_generation_config(found)
        is_recreated = cls._check_shapes(pretrained_model_name_or_path, config, read_shapes(files))
        kwargs |= {"ignore_mismatched_sizes": is_recreated, "force_download": False}  # everything has come by now
        if kwargs.get("subfolder") and os.path.isdir(pretrained_model_name_or_path):
            # GenerationConfig takes "." for the subfolder itself where that lies in the working directory.
            pretrained_model_name_or_path = os.path.abspath(pretrained_model_name_or_path)
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model._freeze()  # loading made new parameters
        if model.dtype == torch.bfloat16 and Version(transformers.__version__) < Version("5.21"):
            logger.warning(
                f"In bf16, transformers {transformers.__version__} rounds the places of an image's patches, and "
                "actions are wrong (PushT: by 22 pixels of 512 on average). Use 5.21 or newer, or float32."
            )
        return result

    @classmethod
    def _check_processor_fields(cls, name: str, config: SmolAndFastConfig, hub_kwargs: dict) -> None:
        """Refuse fields that were changed without the processor that decides them."""
        saved, _ = cls.config_class.get_config_dict(name, **hub_kwargs)
        fingerprint = saved.get("processor_fingerprint")
        if fingerprint is None or fingerprint != config.processor_fingerprint:
            return
        for field in PROCESSOR_FIELDS:
            if field in saved and getattr(config, field) != saved[field]:
                raise ValueError(
                    f"{field} is {getattr(config, field)!r}, but {saved[field]!r} in {name}, whose processor decides "
                    "it. Make a processor with the other value, and pass all of its fields: from_pretrained(folder, "
                    "**processor.model_kwargs())."
                )

    @classmethod
    def _check_shapes(cls, name: str, config: SmolAndFastConfig, found: dict[str, tuple[int, ...]]) -> bool:
        """Compare a checkpoint's shapes with the configuration's, before either takes memory.

        Returns:
            Whether the connector's projection has to be re-created.
        """
        with as_value_error(f"The configuration of {name}"), torch.device("meta"):
            model = cls(config)
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        tied = (HEAD_KEY,) if config.tie_word_embeddings else ()
        missing = sorted(key for key in expected if key not in found and key not in tied)
        if missing:
            raise ValueError(
                f"{name} lacks {len(missing)} of this model's weights, {missing[0]} first: it is not a whole "
                "SmolAndFast or SmolVLM checkpoint. Download or save it again."
            )
        differing = [key for key in expected if key in found and found[key] != expected[key]]
        for key in differing:
            if key != PROJECTION_KEY:
                raise ValueError(
                    f"{key} has shape {found[key]} in {name} and {expected[key]} in the configuration. "
                    "Only scale_factor may differ from the checkpoint; leave the other sizes as they are."
                )
        if not differing:
            return False
        change = f"re-created with random weights, shape {found[PROJECTION_KEY]} -> {expected[PROJECTION_KEY]}"
        if config.freeze_connector:
            raise ValueError(
                f"freeze_connector is set, but scale_factor={config.scale_factor} differs from the checkpoint's, so "
                f"the connector's projection would be {change}, and never be trained. Unfreeze the connector or keep "
                "the checkpoint's scale_factor."
            )
        logger.warning(
            f"scale_factor={config.scale_factor} differs from the checkpoint's: the connector's projection was "
            f"{change}. Train it before use."
        )
        return True

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save like any Transformers model, with `SHA256SUMS` beside the weights for [`from_pretrained`] to check.

        Args:
            push_to_hub: Upload afterwards; `repo_id`, by default the folder's name, and the other arguments of
                [`push_to_hub`] may then follow.

        Raises:
            OSError: The folder cannot be written.
        """
        if os.path.isfile(save_directory):
            raise OSError(f"{save_directory} is a file, expected a folder to save the model in. Name another one.")
        names = inspect.signature(self.push_to_hub).parameters if push_to_hub else ()
        hub_kwargs = {name: kwargs.pop(name) for name in names if name in kwargs}
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            if is_main_process:
                folder = Path(save_directory)
                write_checksums(folder, [path.name for path in folder.glob("model*.safetensors")])
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The model cannot be saved in {save_directory}: {error}. Make room there, or name another folder."
            ) from error
        if push_to_hub and is_main_process:
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

    # `wraps` keeps the signature of the installed Transformers: generate() and Trainer read argument names from it.
    @wraps(SmolVLMForConditionalGeneration.forward)
    def forward(self, *args, labels: torch.LongTensor | None = None, return_dict: bool | None = None, **kwargs):
        if labels is None:
            self._check_inputs(*args, **kwargs)
            return super().forward(*args, return_dict=return_dict, **kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs, kept = self._forward_to_span(labels, *args, **kwargs)
        targets = labels[:, kept + 1].to(outputs.logits.device)
        loss = cross_entropy(outputs.logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        # `Trainer` passes the number of targets in all batches of an optimizer's step.
        loss = loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        outputs = type(outputs)(**{**outputs, "loss": loss})  # a new one, so that the loss is the first of its values
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _check_inputs(self, *args, **kwargs) -> None:
        """Refuse image tokens without their images, and more tokens than the model has positions.

        SmolVLM would read the embedding of the image token itself, and leaves out images of zeros as padding.
        """
        inputs = FORWARD.bind_partial(self, *args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        cache = inputs.get("cache", inputs.get("past_key_values"))  # its name since 5.24, and before
        input_ids, is_continued = inputs.get("input_ids"), cache is not None and cache.get_seq_length() > 0
        if input_ids is None or is_continued or torch.compiler.is_compiling():
            return
        if input_ids.shape[-1] > (limit := self.config.text_config.max_position_embeddings):
            raise ValueError(
                f"input_ids has {input_ids.shape[-1]} tokens, more than the model's {limit} positions "
                f"(max_position_embeddings). {SHORTEN}"
            )
        if all(inputs.get(name) is None for name in IMAGE_FEATURES):
            self._check_images(input_ids, inputs)

    def _check_images(self, input_ids: torch.LongTensor, inputs: dict[str, Any]) -> None:
        pixel_values, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        num_tokens = (input_ids == self.config.image_token_id).sum(dim=1)  # (batch,)
        num_images = torch.zeros_like(num_tokens)
        if pixel_values is not None:
            side = self.config.image_size or self.config.vision_config.image_size
            if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != (3, side, side):
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, num_images, 3, {side}, "
                    f"{side}). Pass what the processor returns."
                )
            is_shown = (pixel_values != 0).flatten(2).any(dim=2)  # (batch, num_images)
            if mask is not None and mask.shape[:2] == is_shown.shape:
                is_shown &= mask.flatten(2).any(dim=2)
            num_images = is_shown.sum(dim=1).to(num_tokens.device)
        if len(num_images) != len(num_tokens) or (num_images * self.config.image_seq_len != num_tokens).any():
            raise ValueError(
                f"input_ids has {num_tokens.tolist()} image tokens, and pixel_values has {num_images.tolist()} images "
                f"(those of zeros are padding) of {self.config.image_seq_len} tokens each. Pass everything that the "
                "processor returns, model(**inputs)."
            )

    def _forward_to_span(self, labels: torch.LongTensor, *args, **kwargs):
        """The forward pass, with logits only at those positions (the second result) that some sample's label follows.

        The loss ignores the others, so it and its gradients are those of the full logits.
        """
        input_ids = FORWARD.bind_partial(self, *args, **kwargs).arguments.get("input_ids")
        if input_ids is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected that of input_ids, {tuple(input_ids.shape)}: one "
                "for each token, as the processor makes them."
            )
        kept = action_positions(labels)
        self._check_inputs(*args, **kwargs)
        kwargs.setdefault("use_cache", False)  # nothing reads keys and values again
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and (mask[:, :-1] >= mask[:, 1:]).all():
            # No token sees what is padded to the right of it: without a mask, attention takes its fast kernels.
            kwargs["attention_mask"] = None
        return super().forward(*args, logits_to_keep=kept, return_dict=True, **kwargs), kept

    def log_probability(self, labels: torch.LongTensor, per_token: bool = False, **inputs) -> torch.FloatTensor:
        """Log-probability of action chunks under the policy, differentiable: of `generate()`'s own distribution.

        Each token's is among the tokens that the grammar allows there, so the probabilities of all strings that are
        whole chunks add up to 1. (A chunk may be spelled by several strings; this is that of the one in the labels.)
        `model.log_probability(**processor(images=..., text=..., state=..., actions=...))`.

        Args:
            labels: `(batch, length)` as the processor makes them of actions: -100 outside the action tokens and EOS.
            per_token: Return one for each token instead of their sum.
            inputs: The processor's other tensors.

        Returns:
            `(batch,)` natural logarithms, or `(batch, tokens)` with 0 for EOS and behind it; float32.

        Raises:
            ValueError: Labels that hold something else than one whole chunk a row.
        """
        outputs, kept = self._forward_to_span(labels, **inputs)
        is_target = labels != -100
        places = torch.arange(int(is_target.sum(dim=1).max()), device=labels.device)
        positions = (is_target.int().argmax(dim=1)[:, None] + places).clamp(1, labels.shape[1] - 1)  # (batch, tokens)
        rows = torch.searchsorted(kept, positions - 1).clamp(max=len(kept) - 1)
        scores = outputs.logits[torch.arange(len(labels), device=labels.device)[:, None], rows]
        found = self.action_grammar.log_probabilities(scores, labels.gather(1, positions))
        return found if per_token else found.sum(dim=1)

    @cached_property
    def action_grammar(self) -> ActionGrammar:
        return ActionGrammar(self.config)

    def _generation_options(
        self,
        generation_config: GenerationConfig | None,
        kwargs: dict,
        max_new_tokens: int | None,
        max_time: float | None,
    ) -> dict[str, Any]:
        """The limits and `top_k` that hold for this call: its own, or else those of the configurations."""
        if not isinstance(generation_config, GenerationConfig | None):
            raise ValueError(f"generation_config is {generation_config!r}, expected a GenerationConfig.")
        for name in REFUSED_OPTIONS:
            value = kwargs.pop(name, getattr(generation_config, name, None))
            if value not in (None, 0, False):
                value = value if isinstance(value, int | str | list) else type(value).__name__
                raise ValueError(
                    f"{name}={value!r}: an action string ends by itself at its last coefficient. Drop {name}, or "
                    "bound it with max_new_tokens or max_time."
                )

        def option(name: str, value=None):
            configs = (generation_config, self.generation_config)
            values = (value, kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        options, longest = {"max_time": option("max_time", max_time)}, self.action_grammar.max_new_tokens
        limit = option("max_new_tokens", max_new_tokens)
        if limit is not None:
            check_whole(limit, "max_new_tokens")
        options["max_new_tokens"] = min(limit or longest, longest)
        if (seconds := options["max_time"]) is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise ValueError(f"max_time is {seconds!r}, expected seconds, above 0.")
        if option("do_sample") and option("top_k") is None:
            options["top_k"] = 0  # Transformers' default is 50
        return options

    def _check_prompt(self, input_ids: torch.LongTensor | None, inputs: dict, num_new_tokens: int) -> None:
        if input_ids is None:
            raise ValueError("generate() needs input_ids: pass the processor's output, model.generate(**inputs).")
        is_ids = isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and not input_ids.is_floating_point()
        if not is_ids or input_ids.numel() == 0:
            found = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids is {found}, expected a tensor (batch, length) of ids. Call the processor.")
        mask, vocab_size = inputs.get("attention_mask"), self.config.text_config.vocab_size
        if mask is not None and tuple(mask.shape) != tuple(input_ids.shape):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected that of input_ids, {tuple(input_ids.shape)}."
            )
        if inputs.get("labels") is not None or (mask is not None and not mask[:, -1].all()):
            raise ValueError(
                "generate() got a training batch (with labels, or padded on the right). Call the processor without "
                "actions: its prompts end where the policy has to write."
            )
        check_length(input_ids.shape[1], num_new_tokens, self.config.text_config.max_position_embeddings)
        if input_ids.min() < 0 or input_ids.max() >= vocab_size:
            raise ValueError(
                f"input_ids holds {input_ids.max()}, expected ids in [0, {vocab_size}), the model's vocabulary. Load "
                "processor and model from one folder."
            )
        if all(inputs.get(name) is None for name in IMAGE_FEATURES):
            self._check_images(input_ids, inputs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        relaxed: bool = False,
        max_new_tokens: int | None = None,
        max_time: float | None = None,
        **kwargs,
    ):
        """Write one action chunk for each prompt: `GenerationMixin.generate`, greedy, sampled or beam search.

        Whatever the weights, every string decodes to exactly `(chunk_size, action_dim)`; it ends at the last
        coefficient.

        Args:
            inputs: `(batch, length)` prompt ids, left-padded; usually passed as `input_ids` by the processor's output.
            generation_config: Options as an object. Arguments of this call come before it, and it before the model's
                own `generation_config`.
            relaxed: Let the model end a string where it likes, as published FAST policies do. It may then hold more
                or fewer coefficients than a chunk: decode it with `post_process_actions(ids, relaxed=True)`.
            max_new_tokens: Most tokens to write of a chunk. Low frequencies come first, so a string that is cut short
                is a smoother chunk: decode it with `relaxed=True` too, which fills what is missing with zeros.
            max_time: The same after so many seconds, measured by Transformers after each token. The first is always
                written: vision and prompt are not cut short.
            kwargs: The processor's other tensors, and options of generation such as `do_sample`, `temperature`,
                `num_beams`. `top_k` is 0 unless given: samples are those of [`log_probability`].

        Returns:
            `(batch, length + new)` ids, the prompt included, for [`SmolAndFastProcessor.post_process_actions`].

        Raises:
            ValueError: No action tokenizer in the configuration, images that are missing, more tokens than the model
                has positions, an invalid limit, an option that would truncate or extend a chunk, or scores that are
                not finite.
        """
        grammar = self.action_grammar
        options = self._generation_options(generation_config, kwargs, max_new_tokens, max_time)
        is_bounded = options["max_time"] is not None or options["max_new_tokens"] < grammar.max_new_tokens
        if generation_config is None:
            kwargs |= options
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**options)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        self._check_prompt(input_ids, kwargs, options["max_new_tokens"])
        eos_token_id, vocab_size = self.generation_config.eos_token_id, self.config.text_config.vocab_size
        eos_token_id = next(iter(eos_token_id), None) if isinstance(eos_token_id, list) else eos_token_id
        if eos_token_id is None or not 0 <= eos_token_id < vocab_size or grammar.is_action(eos_token_id):
            raise ValueError(
                f"generation_config.eos_token_id is {eos_token_id}, expected an id outside the action tokens, below "
                f"{vocab_size}. Set it to processor.tokenizer.eos_token_id."
            )
        pad_token_id = self.generation_config.pad_token_id
        if pad_token_id is None or not 0 <= pad_token_id < vocab_size:  # SmolVLMConfig's default
            kwargs.setdefault("pad_token_id", self.config.text_config.pad_token_id)
        reader = ActionReader(grammar, prompt_length=input_ids.shape[1])
        constraint, end = ActionLogitsProcessor(reader, eos_token_id, relaxed), ChunkIsComplete(reader)
        ends = [] if relaxed else [end]
        output = super().generate(
            inputs,
            logits_processor=LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), constraint]),
            stopping_criteria=StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), *ends]),
            generation_config=generation_config,
            **kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if not (relaxed or is_bounded) and not end(sequences, None).all():
            raise ValueError(
                "The options given to generate() cut a chunk short or asked for more different chunks than exist. "
                "Keep to do_sample, temperature, top_k, top_p, num_beams and num_return_sequences."
            )
        return output


FORWARD = inspect.signature(SmolVLMForConditionalGeneration.forward)


def action_positions(labels: torch.LongTensor) -> torch.LongTensor:
    """The positions that some sample's label follows: `(kept,)`. With labels, logits are those of these alone.

    Position t predicts token t + 1, so the logits' targets are `labels[:, action_positions(labels) + 1]`.
    """
    kept = (labels[:, 1:] != -100).any(dim=0).nonzero().squeeze(1)
    if len(kept) == 0:
        raise ValueError("labels has no action token to learn: every entry is -100. Pass actions to the processor.")
    return kept


def _check_generation_config(file: Path) -> None:
    """Refuse what Transformers would ignore, or only stumble over while generating."""
    content = read_json(file)
    for name, value in content.items():
        ids = value if isinstance(value, list) else [value]
        fits = isinstance(value, bool) or not name.startswith("output_")
        fits &= not name.endswith("_token_id") or all(type(i) is int and abs(i) < 2**31 for i in ids)
        if value is not None and not fits:
            raise ValueError(f"{name} in {file} is {value!r}, expected an id, or for output_* True or False. {AGAIN}")
    with as_value_error(file):
        GenerationConfig.from_dict(content)


SmolAndFastForActionPrediction.register_for_auto_class("AutoModel")
