"""Time an action chunk with SmolVLM2-256M's shapes and random weights against stock Transformers.

    python benchmarks/speed/bench_256m.py     # part of `make bench`

Stock is what a user would write without this repository: `generate()` with a logits processor that masks all but the
action tokens and EOS. Both alternate in one process on the same weights. Takes some minutes on two cores, and 6 GB.
Writes `benchmarks/results/bench_256m.json` and `.md`. See also `bench_training_256m.py`.
"""

import argparse
import copy
import time

import torch
from bench import RESULTS, describe_machine, seconds, write_table
from transformers import LogitsProcessor, LogitsProcessorList, SmolVLMForConditionalGeneration

from smolandfast import SmolAndFastConfig, SmolAndFastForActionPrediction

# config.json of HuggingFaceTB/SmolVLM2-256M-Video-Instruct.
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION |= {"image_size": 512, "patch_size": 16}
TEXT = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
TEXT |= {"num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192, "model_type": "llama"}
TEXT |= {"bos_token_id": 1, "eos_token_id": 49279, "pad_token_id": 2}
IMAGE_TOKEN_ID = 49190
BASE_ID, NUM_ACTION_TOKENS = 48871, 512
CHUNK_SIZE, ACTION_DIM, ACTION_TOKENS = 4, 2, 8  # one coefficient per token, so each chunk takes eight
PROMPT_TOKENS = 60  # without the image


class MaskedBand(LogitsProcessor):
    """Allows only the action tokens and EOS."""

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -torch.inf)
        allowed = [*range(BASE_ID - NUM_ACTION_TOKENS + 1, BASE_ID + 1), TEXT["eos_token_id"]]
        masked[:, allowed] = scores[:, allowed]
        return masked


def make_model(scale_factor: int, chunk_size: int = CHUNK_SIZE) -> SmolAndFastForActionPrediction:
    torch.manual_seed(0)
    return SmolAndFastForActionPrediction(
        SmolAndFastConfig(
            vision_config=VISION,
            text_config=TEXT,
            image_token_id=IMAGE_TOKEN_ID,
            scale_factor=scale_factor,
            chunk_size=chunk_size,
            n_action_steps=chunk_size,
            action_dim=ACTION_DIM,
            action_token_base_id=BASE_ID,
            fast_token_lengths=[1] * NUM_ACTION_TOKENS,
        )
    )


def make_batch(
    scale_factor: int, batch_size: int, with_actions: bool, image_size: int = VISION["image_size"]
) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    visual = (image_size // VISION["patch_size"] // scale_factor) ** 2
    length = visual + PROMPT_TOKENS + (ACTION_TOKENS + 1 if with_actions else 0)
    ids = torch.randint(100, 40_000, (batch_size, length), generator=rng)
    ids[:, 5 : 5 + visual] = IMAGE_TOKEN_ID
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch_size, 1, 3, image_size, image_size, generator=rng),
    }
    if with_actions:
        labels = torch.full_like(ids, -100)
        labels[:, -ACTION_TOKENS - 1 :] = ids[:, -ACTION_TOKENS - 1 :]
        batch["labels"] = labels
    return batch


def stock_chunk(model, inputs):
    return SmolVLMForConditionalGeneration.generate(
        model,
        **inputs,
        logits_processor=LogitsProcessorList([MaskedBand()]),
        max_new_tokens=ACTION_TOKENS + 1,  # it has to write EOS
        do_sample=False,
        pad_token_id=TEXT["pad_token_id"],
    )


def our_chunk(model, inputs):
    return model.generate(**inputs)


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def make_stock(model: SmolAndFastForActionPrediction) -> SmolVLMForConditionalGeneration:
    """The stock model on the same tensors."""
    stock = SmolVLMForConditionalGeneration(model.config)
    stock.load_state_dict(model.state_dict(), assign=True)
    return stock.eval()


def bench_inference(scale_factor: int, rounds: int) -> dict[str, float]:
    exact = make_model(scale_factor).eval()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    models = {"stock fp32": make_stock(exact), "stock bf16": make_stock(half)}
    models |= {"ours fp32": exact, "ours bf16": half}
    one = make_batch(scale_factor, 1, False)
    chunks = {name: stock_chunk if "stock" in name else our_chunk for name in models}
    times = seconds(
        *[lambda name=name, model=model: chunks[name](model, one) for name, model in models.items()], repeats=rounds
    )
    figures = {}
    for name, duration in zip(models, times, strict=True):
        figures[f"one chunk, scale {scale_factor}, {name}: ms"] = duration * 1e3
        figures[f"one chunk, scale {scale_factor}, {name}: times stock fp32"] = times[0] / duration
    for image_size in (256, 384):
        smaller = make_batch(scale_factor, 1, False, image_size)
        (duration,) = seconds(lambda smaller=smaller: our_chunk(half, smaller), repeats=rounds)
        figures[f"one chunk, scale {scale_factor}, ours bf16, {image_size} pixels: ms"] = duration * 1e3
    many = make_batch(scale_factor, 8, False)
    figures[f"8 chunks at once, scale {scale_factor}, ours bf16: ms a chunk"] = timed(our_chunk, half, many) / 8 * 1e3
    return {name: float(value) for name, value in figures.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures = {}
    for scale_factor in (1, 4):
        figures |= bench_inference(scale_factor, args.rounds)
    write_table(RESULTS / "bench_256m", describe_machine() | {"rounds": args.rounds}, figures)


if __name__ == "__main__":
    main()
