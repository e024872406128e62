"""SmolAndFast: SmolVLM that generates action tokens.

The weights and their names are those of `SmolVLMForConditionalGeneration`, so any SmolVLM or SmolVLM2 checkpoint
loads. New are the loss over the action tokens alone, `generate()` constrained to valid action chunks, and the
log-probability of a chunk.
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
    SmolVLMForConditionalGeneration,
    StoppingCriteriaList,
)
from transformers.utils import logging

from .checks_smolandfast import SHORTEN, check_length, check_whole
from .configuration_smolandfast import SmolAndFastConfig
from .files_smolandfast import AGAIN, HUB_KWARGS, find_file, find_weights, read_json, write_checksums
from .generation_smolandfast import ActionGrammar, ActionLogitsProcessor, ActionReader, ChunkIsComplete

logger = logging.get_logger(__name__)

PROJECTION_KEY = "model.connector.modality_projection.proj.weight"
IMAGE_FEATURES = ("mm_encoder_outputs", "image_hidden_states")  # encoded images: the name since 5.24, and before
# Decided by the processor, so they change only together with its fingerprint.
PROCESSOR_FIELDS = ("chunk_size", "action_dim", "action_token_base_id", "fast_token_lengths", "fast_token_bytes")
PROCESSOR_FIELDS += ("scale_factor", "image_size")
# Options of generate() that would truncate or extend a chunk, or bypass the grammar.
REFUSED_OPTIONS = ("max_length", "min_new_tokens", "min_length", "stop_strings", "assistant_model")
REFUSED_OPTIONS += ("prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
ONE_PROCESS_PER_GPU = (
    "Start one process for each GPU, `torchrun --nproc_per_node=N script.py ...`, or show one alone, "
    "CUDA_VISIBLE_DEVICES=0."
)


# Without `GenerationMixin` as a direct base, `AutoModel` makes a new class at every load, which cannot be pickled.
class SmolAndFastForActionPrediction(SmolVLMForConditionalGeneration, GenerationMixin):
    """SmolVLM with a loss and a `generate()` for FAST action tokens.

    `forward` has SmolVLM's arguments. With `labels`, it computes logits for the action span alone; image tokens
    without images raise a `ValueError`.
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
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a SmolAndFast checkpoint, or start from a SmolVLM one.

        If `scale_factor` differs from the checkpoint's, the connector's projection has another shape: it is re-created
        with random weights, with a warning.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of a SmolAndFast, SmolVLM or SmolVLM2 checkpoint.
            kwargs: Fields of [`SmolAndFastConfig`] to change, and the usual arguments of `from_pretrained`.

        Raises:
            ValueError: A checkpoint of another kind, or one that does not fit the configuration; a re-created
                connector although `freeze_connector` is set.
            OSError: Files that are missing, damaged, or not as `SHA256SUMS` next to them says; weights in another
                format than safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: weights load from safetensors alone. Drop it.")
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        saved_config, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        files = find_weights(pretrained_model_name_or_path, kwargs.get("variant"), **hub_kwargs)
        generation_config = find_file(pretrained_model_name_or_path, "generation_config.json", **hub_kwargs)
        if generation_config is not None:
            read_json(generation_config)  # Transformers ignores a damaged one
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        kwargs["force_download"] = False  # done above
        if kwargs.get("subfolder") and os.path.isdir(pretrained_model_name_or_path):
            # GenerationConfig mistakes "." for the subfolder itself if that lies in the working directory.
            pretrained_model_name_or_path = os.path.abspath(pretrained_model_name_or_path)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            names = ", ".join(map(str, files))
            raise OSError(f"The weights in {names} are damaged: {error}. {AGAIN}") from error
        model._check_processor_fields(pretrained_model_name_or_path, saved_config)
        model._check_loading_info(pretrained_model_name_or_path, info)
        model._freeze()  # loading made new parameters
        if model.dtype == torch.bfloat16 and Version(transformers.__version__) < Version("5.21"):
            logger.warning(
                f"In bf16, transformers {transformers.__version__} rounds the positions of an image's patches, and "
                "actions are wrong (PushT: by 22 pixels of 512 on average). Use 5.21 or newer, or float32."
            )
        return (model, info) if output_loading_info else model

    def _check_processor_fields(self, name: str, saved: dict) -> None:
        """Refuse fields that differ from the checkpoint's although the processor is the same."""
        fingerprint = saved.get("processor_fingerprint")
        if fingerprint is None or fingerprint != self.config.processor_fingerprint:
            return
        for field in PROCESSOR_FIELDS:
            value = getattr(self.config, field)
            if field in saved and value != saved[field]:
                raise ValueError(
                    f"{field} is {value!r}, but {saved[field]!r} in {name}, whose processor decides it. Make a "
                    "processor with the other value, and call from_pretrained(folder, **processor.model_kwargs())."
                )

    def _check_loading_info(self, name: str, info: dict) -> None:
        """Refuse weights that are missing or of another shape, except for the connector's projection."""
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{name} lacks {len(missing)} of this model's weights, such as {missing[0]}: it is not a complete "
                f"SmolAndFast or SmolVLM checkpoint. {AGAIN}"
            )
        for key, saved, expected in sorted(info["mismatched_keys"]):
            change = f"shape {tuple(saved)} -> {tuple(expected)}"
            if key != PROJECTION_KEY:
                raise ValueError(
                    f"{key} of {name} does not fit the configuration, {change}. Only scale_factor may differ."
                )
            scale_factor = f"scale_factor={self.config.scale_factor} differs from the checkpoint's"
            if self.config.freeze_connector:
                raise ValueError(
                    f"freeze_connector is set, but {scale_factor}, so the connector's projection would be random, "
                    f"{change}, and never be trained. Unfreeze the connector or keep the checkpoint's scale_factor."
                )
            logger.warning(
                f"{scale_factor}: the connector's projection was re-created with random weights, {change}. Train it "
                "before use."
            )

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Save as Transformers does, with `SHA256SUMS` next to the weights for [`from_pretrained`] to check.

        Args:
            push_to_hub: Upload afterwards; accepts `repo_id`, by default the folder's name, and the other arguments
                of [`push_to_hub`].

        Raises:
            OSError: The folder cannot be written.
        """
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

    # `wraps` keeps the signature, from which generate() and Trainer read argument names.
    @wraps(SmolVLMForConditionalGeneration.forward)
    def forward(
        self,
        *args,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        return_log_probability: bool = False,
        **kwargs,
    ):
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel cannot run this policy: SmolVLM reads its dtype from parameters, which replicas do "
                f"not have. {ONE_PROCESS_PER_GPU}"
            )
        if labels is None:
            if return_log_probability:
                raise ValueError("return_log_probability needs labels. Pass actions to the processor.")
            self._check_inputs(*args, **kwargs)
            return super().forward(*args, return_dict=return_dict, **kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs, kept = self._forward_to_span(labels, *args, **kwargs)
        if return_log_probability:
            return self._log_probabilities(outputs.logits, kept, labels)
        targets = labels[:, kept + 1].to(outputs.logits.device)
        loss = cross_entropy(outputs.logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        # `Trainer` passes the number of targets in all batches of an optimizer step.
        count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
        outputs = type(outputs)(**{**outputs, "loss": loss})  # a new object, with the loss first
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _check_inputs(self, *args, **kwargs) -> None:
        """Refuse image tokens without images, and more tokens than positions.

        SmolVLM would use the embedding of the image token itself, and drops images of zeros as padding.
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
                f"of {self.config.image_seq_len} tokens each (images of zeros are padding). Pass all outputs of the "
                "processor, model(**inputs)."
            )

    def _forward_to_span(self, labels: torch.LongTensor, *args, **kwargs):
        """The forward pass, with logits only at the positions before a label, which are the second result.

        The loss ignores the others, so loss and gradients are those of the full logits.
        """
        input_ids = FORWARD.bind_partial(self, *args, **kwargs).arguments.get("input_ids")
        if input_ids is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected that of input_ids, {tuple(input_ids.shape)}. Take "
                "both from the processor."
            )
        kept = action_positions(labels)
        self._check_inputs(*args, **kwargs)
        kwargs.setdefault("use_cache", False)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and (mask[:, :-1] >= mask[:, 1:]).all():
            # Padding on the right is invisible to causal attention; without a mask, its fast kernels run.
            kwargs["attention_mask"] = None
        return super().forward(*args, logits_to_keep=kept, return_dict=True, **kwargs), kept

    def log_probability(self, labels: torch.LongTensor, per_token: bool = False, **inputs) -> torch.FloatTensor:
        """Log-probability of action chunks under the constrained policy of `generate()`; differentiable.

        Each token's is among the tokens that the grammar allows there, so the probabilities of all valid strings add
        up to 1. (Several strings may decode to one chunk; this is the probability of the one in the labels.)
        `model.log_probability(**processor(images=..., text=..., state=..., actions=...))`.

        `DistributedDataParallel` and FSDP act only in `forward`. Behind them, call the wrapped model itself:
        `wrapped(**inputs, return_log_probability=True)` returns what `per_token=True` does here.

        Args:
            labels: `(batch, length)`, the processor's labels: -100 outside the action tokens and EOS.
            per_token: Return one value per token instead of their sum.
            inputs: The processor's other tensors.

        Returns:
            `(batch,)` natural logarithms, or `(batch, tokens)` with 0 for EOS and after it; float32.

        Raises:
            ValueError: Labels that do not hold exactly one chunk per row.
        """
        log_probabilities = self(labels=labels, return_log_probability=True, **inputs)
        return log_probabilities if per_token else log_probabilities.sum(dim=1)

    def _log_probabilities(
        self, logits: torch.FloatTensor, kept: torch.LongTensor, labels: torch.LongTensor
    ) -> torch.FloatTensor:
        """Those of the labels' tokens, `(batch, tokens)`, from the logits at the positions `kept`."""
        is_target = (labels != -100).cpu()  # where `kept` is
        steps = torch.arange(int(is_target.sum(dim=1).max()))
        positions = (is_target.int().argmax(dim=1)[:, None] + steps).clamp(1, labels.shape[1] - 1)  # (batch, tokens)
        rows = torch.searchsorted(kept, positions - 1).clamp(max=len(kept) - 1)
        samples = torch.arange(len(labels))[:, None]
        # Layers on several devices: the labels are on the first, the logits on the last.
        scores, action_ids = logits[samples, rows], labels[samples, positions].to(logits.device)
        return self.action_grammar.to(logits.device).log_probabilities(scores, action_ids)

    @cached_property
    def action_grammar(self) -> ActionGrammar:
        return ActionGrammar(self.config)

    def _generation_options(self, generation_config, kwargs: dict, max_new_tokens, max_time) -> dict[str, Any]:
        """The limits, `num_beams` and `top_k` of this call: its arguments, or else those of the configurations."""
        if not isinstance(generation_config, GenerationConfig | None):
            raise ValueError(f"generation_config is {generation_config!r}, expected a GenerationConfig.")
        for name in REFUSED_OPTIONS:
            value = kwargs.pop(name, getattr(generation_config, name, None))
            if value not in (None, 0, False):
                value = value if isinstance(value, int | str | list) else type(value).__name__
                raise ValueError(
                    f"{name}={value!r}: an action string ends at its last coefficient. Drop {name}, or set "
                    "max_new_tokens or max_time."
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
        options["num_beams"] = option("num_beams") or 1
        if (seconds := options["max_time"]) is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise ValueError(f"max_time is {seconds!r}, expected seconds above 0.")
        if option("do_sample") and option("top_k") is None:
            options["top_k"] = 0  # Transformers' default is 50
        return options

    def _check_prompt(self, input_ids: torch.LongTensor | None, inputs: dict, num_new_tokens: int) -> None:
        is_ids = isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and not input_ids.is_floating_point()
        if not is_ids or input_ids.numel() == 0:
            kind = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(
                f"input_ids is {kind}, expected a tensor (batch, length) of ids. Pass the processor's output, "
                "model.generate(**inputs)."
            )
        mask, vocab_size = inputs.get("attention_mask"), self.config.text_config.vocab_size
        if mask is not None and tuple(mask.shape) != tuple(input_ids.shape):
            shapes = f"shape {tuple(mask.shape)}, expected that of input_ids, {tuple(input_ids.shape)}"
            raise ValueError(f"attention_mask has {shapes}. Take both from the processor.")
        if inputs.get("labels") is not None or (mask is not None and not mask[:, -1].all()):
            raise ValueError(
                "generate() got a training batch (with labels, or padded on the right). Call the processor without "
                "actions."
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
        """Generate one action chunk per prompt with `GenerationMixin.generate`: greedy, sampled or beam search.

        Decoding never fails: it is constrained so that every string decodes to exactly `(chunk_size, action_dim)`,
        whatever the weights.

        Args:
            inputs: `(batch, length)` prompt ids, left-padded; usually `input_ids` of the processor's output.
            generation_config: Options as an object. Arguments of this call override it, and it overrides the model's
                own `generation_config`.
            relaxed: Let the model end a string anywhere, as published FAST policies do. A string may then hold more
                or fewer coefficients than a chunk: decode it with `post_process_actions(ids, relaxed=True)`.
            max_new_tokens: Limit per chunk. Low frequencies come first, so a truncated string is a smoother chunk:
                decode it with `relaxed=True` too, which sets the missing coefficients to zero.
            max_time: A limit in seconds, checked after each token. The first token is always written.
            kwargs: The processor's other tensors, and options of generation such as `do_sample`, `temperature`,
                `num_beams`. `top_k` is 0 unless given: samples have the probabilities of [`log_probability`].

        Returns:
            `(batch, length + new)` ids, the prompt included, for [`SmolAndFastProcessor.post_process_actions`].

        Raises:
            ValueError: No action tokenizer in the configuration, missing images, more tokens than the model has
                positions, an invalid limit, an option that would truncate or extend a chunk, or scores that are not
                finite.
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
        reader = ActionReader(grammar.to(input_ids.device), input_ids.shape[1], has_beams=options["num_beams"] != 1)
        constraint, end = ActionLogitsProcessor(reader, eos_token_id, relaxed), ChunkIsComplete(reader)
        ends = [] if relaxed else [end]
        output = super().generate(
            inputs,
            logits_processor=LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), constraint]),
            stopping_criteria=StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), *ends]),
            generation_config=generation_config,
            **kwargs,
        )
        constraint.check()
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if not (relaxed or is_bounded) and not end(sequences, None).all():
            raise ValueError(
                "The options given to generate() truncate a chunk or ask for more different chunks than exist. "
                "Use only do_sample, temperature, top_k, top_p, num_beams and num_return_sequences."
            )
        return output


FORWARD = inspect.signature(SmolVLMForConditionalGeneration.forward)


def action_positions(labels: torch.LongTensor) -> torch.LongTensor:
    """The positions `(kept,)` before a label of any sample; with labels, `forward` returns logits for these alone.

    They are on the CPU, and so index labels and logits on any device.

    Position t predicts token t + 1, so the targets are `labels[:, action_positions(labels) + 1]`.
    """
    kept = (labels[:, 1:] != -100).any(dim=0).cpu().nonzero().squeeze(1)
    if len(kept) == 0:
        raise ValueError("labels has no action token to learn: every entry is -100. Pass actions to the processor.")
    return kept


SmolAndFastForActionPrediction.register_for_auto_class("AutoModel")
