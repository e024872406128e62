"""The `tiny` preset: SmolVLM's architecture with a few million parameters and its own small text vocabulary.

It has the classes of the 256M model, and trains on a laptop's CPU.
"""

import json
import math
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessorPil, SmolVLMModel

from ..configuration_smolandfast import SmolAndFastConfig
from ..modeling_smolandfast import SmolAndFastForActionPrediction
from ..processing_smolandfast import SmolAndFastProcessor
from ..prompt_smolandfast import PROMPT
from ..tokenization_fast_action import FastActionTokenizer

IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR = 96, 16, 3  # IMAGE_SIZE and SCALE_FACTOR are defaults
MIN_POSITIONS = 512
SPARE_POSITIONS = 128  # for instructions longer than those of the training
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
TEXT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
SPECIAL_TOKENS = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|im_start|>",
    "pad_token": "<|im_end|>",
    "eos_token": "<end_of_utterance>",
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
}
# SmolVLM's template for one user turn.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# The parts of a prompt, a number or a word with the space before it, any other character.
WORDS = r"User:|Task: |, State:|, Action: |\nAssistant:| ?\d+| ?[^\W\d_]+|\s|[^\w\s]|_"


def make_text_tokenizer(
    tasks: list[str], n_state_bins: int, num_action_tokens: int, split_words: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the prompts themselves, so that a prompt takes few tokens.

    Numbers are split off, so each bin is one token; any other text is encoded as bytes. By default a whole instruction
    becomes one token; with `split_words`, instructions that share words share tokens. The action tokens are the tail
    of the vocabulary.
    """
    prompts = [PROMPT.format(task=task, bins=f"{i} {i}") for task in tasks for i in range(n_state_bins)]
    prompts += ["User:", "\nAssistant:"] * n_state_bins
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated") if split_words else pre_tokenizers.Digits()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<fast_{k}>": len(vocabulary) + i for i, k in enumerate(reversed(range(num_action_tokens)))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: token for name, token in SPECIAL_TOKENS.items() if not name.endswith("image_token")},
        extra_special_tokens={name: token for name, token in SPECIAL_TOKENS.items() if name.endswith("image_token")},
    )


def make_tiny_processor(
    action_tokenizer: FastActionTokenizer,
    statistics: dict,
    task: str,
    other_tasks: Sequence[str] = (),
    scale_factor: int = SCALE_FACTOR,
    image_size: int = IMAGE_SIZE,
    split_words: bool = False,
    **kwargs,
) -> SmolAndFastProcessor:
    """A processor for small square images, its vocabulary fitted to the tasks; kwargs go to `SmolAndFastProcessor`.

    By default, `max_position_embeddings` is 512, or more where a prompt and a chunk need it.

    Args:
        task: The default task; "" for none.
        other_tasks: Further instructions that the vocabulary is fitted to. All others are encoded as bytes.
        scale_factor: Side of the pixel shuffle, a divisor of the patches of 16 pixels along an image's side.
        image_size: Pixels along an image's side, a multiple of 16.
        split_words: See [`make_text_tokenizer`].
    """
    tasks = list(dict.fromkeys([*([task] if task else []), *other_tasks]))
    kwargs.setdefault("training_tasks", tasks)
    n_state_bins = kwargs.setdefault("n_state_bins", 256)
    image_processor = SmolVLMImageProcessorPil(
        do_image_splitting=False, do_resize=False, max_image_size={"longest_edge": image_size}
    )
    processor = SmolAndFastProcessor(
        image_processor,
        make_text_tokenizer(tasks, n_state_bins, len(action_tokenizer), split_words),
        action_tokenizer,
        statistics,
        fast_skip_tokens=0,
        scale_factor=scale_factor,
        patch_size=PATCH_SIZE,
        default_task=task,
        chat_template=CHAT_TEMPLATE,
        **kwargs,
    )
    if processor.max_position_embeddings is None:
        longest = processor.longest_prompt + processor.max_new_tokens + SPARE_POSITIONS
        processor.max_position_embeddings = max(MIN_POSITIONS, 64 * math.ceil(longest / 64))
    return processor


def make_tiny_vision(
    image_size: int = IMAGE_SIZE, scale_factor: int = SCALE_FACTOR
) -> tuple[nn.Module, nn.Module, int]:
    """Vision tower and connector of the tiny model with random weights, and the size of an image's features."""
    config = SmolAndFastConfig(
        vision_config={**VISION, "image_size": image_size, "patch_size": PATCH_SIZE},
        text_config={**TEXT, "model_type": "llama"},
        scale_factor=scale_factor,
        attn_implementation="eager",
    )
    model = SmolVLMModel(config)
    return model.vision_model, model.connector, config.image_seq_len * TEXT["hidden_size"]


def make_tiny_model(processor: SmolAndFastProcessor, n_action_steps: int, **kwargs) -> SmolAndFastForActionPrediction:
    """A model with random weights for the processor; kwargs go to its config."""
    tokenizer, image_size = processor.tokenizer, processor.image_processor.max_image_size["longest_edge"]
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = SmolAndFastConfig(
        vision_config={**VISION, "image_size": image_size, "patch_size": PATCH_SIZE},
        text_config={
            **TEXT,
            "model_type": "llama",
            "num_key_value_heads": TEXT["num_attention_heads"],
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": processor.max_position_embeddings,
            **special_ids,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        n_action_steps=n_action_steps,
        **processor.model_kwargs(),
        **kwargs,
    )
    return SmolAndFastForActionPrediction(config)
