"""SmolAndFast: SmolVLM that writes action tokens.

The weights and their names are those of `SmolVLMForConditionalGeneration`, so any SmolVLM or SmolVLM2 checkpoint
loads. What is added: the loss over the action tokens alone, and `generate()` that can only write valid action chunks.
"""

from functools import cached_property, wraps

import torch
from safetensors import SafetensorError
from transformers import LogitsProcessorList, SmolVLMForConditionalGeneration, StoppingCriteriaList
from transformers.utils import logging

from .configuration_smolandfast import SmolAndFastConfig
from .generation_smolandfast import ActionGrammar, ActionLogitsProcessor, ChunkIsWhole

logger = logging.get_logger(__name__)

PROJECTION_KEY = "model.connector.modality_projection.proj.weight"


class SmolAndFastForActionPrediction(SmolVLMForConditionalGeneration):
    """SmolVLM with a loss and a `generate()` for FAST action tokens.

    `forward` and its arguments are SmolVLM's, except that with `labels` the head runs on the action span alone.
    """

    config: SmolAndFastConfig
    config_class = SmolAndFastConfig

    def __init__(self, config: SmolAndFastConfig):
        config.check()
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # Transformers reads it off class names it knows
        self.model.connector.register_forward_hook(_in_the_weights_dtype)
        self._freeze()

    def _freeze(self) -> None:
        self.model.vision_model.requires_grad_(not self.config.freeze_vision_tower)
        self.model.connector.requires_grad_(not self.config.freeze_connector)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a SmolAndFast checkpoint, or start from a SmolVLM one.

        Where `scale_factor` differs from the checkpoint's, the connector's projection has another shape: it is
        re-created with random weights, with a warning, and has to be trained.

        Args:
            pretrained_model_name_or_path: Folder or hub id of a SmolAndFast, SmolVLM or SmolVLM2 checkpoint.
            kwargs: Fields of [`SmolAndFastConfig`] to change, and the usual arguments of `from_pretrained`.

        Raises:
            ValueError: A checkpoint of another kind, or one that does not fit the configuration; a connector that had
                to be re-created though `freeze_connector` is set.
            OSError: Files that are missing or damaged.
        """
        kwargs["ignore_mismatched_sizes"] = True
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"model.safetensors of {pretrained_model_name_or_path} is damaged: {error}. Download or save it again."
            ) from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of this model's weights, {missing[0]} first: "
                "it is not a whole SmolAndFast or SmolVLM checkpoint. Download or save it again."
            )
        mismatched = {key: (tuple(found), tuple(expected)) for key, found, expected in info["mismatched_keys"]}
        recreated = mismatched.pop(PROJECTION_KEY, None)
        for key, (found, expected) in mismatched.items():
            raise ValueError(
                f"{key} has shape {found} in {pretrained_model_name_or_path} and {expected} in the configuration. "
                "Only scale_factor may differ from the checkpoint; leave the other sizes as they are."
            )
        if recreated is not None:
            found, expected = recreated
            if model.config.freeze_connector:
                raise ValueError(
                    f"freeze_connector is set, but scale_factor={model.config.scale_factor} differs from the "
                    f"checkpoint's, so the connector's projection was re-created at random ({found} -> {expected}) "
                    "and would never be trained. Unfreeze the connector or keep the checkpoint's scale_factor."
                )
            logger.warning(
                f"scale_factor={model.config.scale_factor} differs from the checkpoint's: the connector's projection "
                f"was re-created with random weights, shape {found} -> {expected}. Train it before use."
            )
        model._freeze()  # loading made new parameters
        return (model, info) if output_loading_info else model

    # `wraps` keeps the signature of the installed Transformers: generate() and Trainer read argument names from it.
    @wraps(SmolVLMForConditionalGeneration.forward)
    def forward(self, *args, labels: torch.LongTensor | None = None, return_dict: bool | None = None, **kwargs):
        if labels is None:
            return super().forward(*args, return_dict=return_dict, **kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        # Position t predicts token t + 1. Only positions that some sample has to predict go through the head; the loss
        # ignores -100 in any case, so it and its gradients are those of the full logits.
        kept = (labels[:, 1:] != -100).any(dim=0).nonzero().squeeze(1)
        if len(kept) == 0:
            raise ValueError(
                "labels has no action token to learn: every entry is -100. Pass actions to the processor."
            )
        outputs = super().forward(*args, logits_to_keep=kept, return_dict=True, **kwargs)
        outputs.loss = self.loss_function(
            logits=outputs.logits,
            labels=None,
            shift_labels=labels[:, kept + 1],
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        return outputs if return_dict is not False else outputs.to_tuple()

    @cached_property
    def action_grammar(self) -> ActionGrammar:
        return ActionGrammar(self.config)

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, relaxed: bool = False, **kwargs):
        """Write one action chunk for each prompt: `GenerationMixin.generate`, greedy, sampled or beam search.

        Whatever the weights, every string decodes to exactly `(chunk_size, action_dim)`; it ends at the last
        coefficient.

        Args:
            inputs: `(batch, length)` prompt ids, left-padded; usually passed as `input_ids` by the processor's output.
            relaxed: Let the model end a string where it likes, as published FAST policies do. It may then hold more
                or fewer coefficients than a chunk: decode it with `post_process_actions(ids, relaxed=True)`.
            kwargs: The processor's other tensors, and options of generation such as `do_sample`, `temperature`,
                `num_beams`.

        Returns:
            `(batch, length + new)` ids, the prompt included, for [`SmolAndFastProcessor.post_process_actions`].

        Raises:
            ValueError: No action tokenizer in the configuration, a length option that would cut a chunk short, or
                scores that are not finite.
        """
        grammar = self.action_grammar
        for name in ("max_new_tokens", "max_length", "max_time", "min_new_tokens", "min_length", "stop_strings"):
            if (value := kwargs.pop(name, None)) is not None:
                raise ValueError(
                    f"{name}={value!r}: an action string ends by itself at its last coefficient. Drop {name}."
                )
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate() needs input_ids: pass the processor's output, model.generate(**inputs).")
        mask = kwargs.get("attention_mask")
        if kwargs.get("labels") is not None or (mask is not None and not mask[:, -1].all()):
            raise ValueError(
                "generate() got a training batch (with labels, or padded on the right). Call the processor without "
                "actions: its prompts end where the policy has to write."
            )
        eos_token_id = self.generation_config.eos_token_id
        eos_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
        if eos_token_id is None or grammar.is_action(eos_token_id):
            raise ValueError(
                f"generation_config.eos_token_id is {eos_token_id}, expected an id outside the action tokens. Set it "
                "to processor.tokenizer.eos_token_id."
            )
        pad_token_id = self.generation_config.pad_token_id
        if pad_token_id is None or pad_token_id >= self.config.text_config.vocab_size:  # SmolVLMConfig's default
            kwargs.setdefault("pad_token_id", self.config.text_config.pad_token_id)
        prompt_length = input_ids.shape[1]
        constraint = ActionLogitsProcessor(grammar, prompt_length, eos_token_id, relaxed)
        ends = [] if relaxed else [ChunkIsWhole(grammar, prompt_length)]
        output = super().generate(
            inputs,
            logits_processor=LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), constraint]),
            stopping_criteria=StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), *ends]),
            max_new_tokens=grammar.max_new_tokens,
            **kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if not relaxed and not grammar.is_whole(sequences[:, prompt_length:]).all():
            raise ValueError(
                "The options given to generate() cut a chunk short or asked for more different chunks than exist. "
                "Keep to do_sample, temperature, top_k, top_p, num_beams and num_return_sequences."
            )
        return output


def _in_the_weights_dtype(connector: torch.nn.Module, args: tuple, visual_tokens: torch.Tensor) -> torch.Tensor:
    """Under autocast, Transformers 5.3 to 5.5 cannot put visual tokens among text tokens of another dtype."""
    return visual_tokens.to(connector.modality_projection.proj.weight.dtype)


SmolAndFastForActionPrediction.register_for_auto_class("AutoModel")
