"""An action chunk of the real size against stock Transformers, on random weights of SmolVLM2-256M's shapes.

    python benchmarks/bench_256m.py

Part of `make bench`; `bench_training_256m.py` is the other half. Stock is what a user would write without this
repository: `generate()` with a logits processor that masks all but the action tokens and EOS. It runs on the same
weights as ours, alternating with it in one process. Writes `benchmarks/results/bench_256m.json` and `.md`.
"""

import argparse
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
CHUNK_SIZE, ACTION_DIM, ACTION_TOKENS = 4, 2, 8  # one coefficient a token, so every chunk takes eight
PROMPT_TOKENS = 60  # besides the image
# Forward pass of one sample, matrix products alone, in GFLOP (DESIGN: 539, 298, 251 for scale 1, 2, 4).
PREFILL_GFLOP = {1: 539, 4: 251}


class MaskedBand(LogitsProcessor):
    """Leaves the action tokens and EOS, at any time."""

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -torch.inf)
        allowed = [*range(BASE_ID - NUM_ACTION_TOKENS + 1, BASE_ID + 1), TEXT["eos_token_id"]]
        masked[:, allowed] = scores[:, allowed]
        return masked


def make_model(scale_factor: int) -> SmolAndFastForActionPrediction:
    torch.manual_seed(0)
    return SmolAndFastForActionPrediction(
        SmolAndFastConfig(
            vision_config=VISION,
            text_config=TEXT,
            image_token_id=IMAGE_TOKEN_ID,
            scale_factor=scale_factor,
            chunk_size=CHUNK_SIZE,
            n_action_steps=CHUNK_SIZE,
            action_dim=ACTION_DIM,
            action_token_base_id=BASE_ID,
            fast_token_lengths=[1] * NUM_ACTION_TOKENS,
        )
    )


def make_batch(scale_factor: int, batch_size: int, with_actions: bool) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    visual = 1024 // scale_factor**2
    length = visual + PROMPT_TOKENS + (ACTION_TOKENS + 1 if with_actions else 0)
    ids = torch.randint(100, 40_000, (batch_size, length), generator=rng)
    ids[:, 5 : 5 + visual] = IMAGE_TOKEN_ID
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch_size, 1, 3, 512, 512, generator=rng),
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


def matmul_tflops(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """The machine's own rate: the best of a few products of two square matrices."""
    matrix = torch.randn(size, size).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


def bench_inference(scale_factor: int, rounds: int) -> dict[str, float]:
    figures = {}
    for precision, dtype in {"fp32": torch.float32, "bf16 weights": torch.bfloat16}.items():
        model = make_model(scale_factor).to(dtype).eval()
        inputs = make_batch(scale_factor, 1, False)
        many = make_batch(scale_factor, 16, False) if scale_factor == 4 else None
        cases = {
            "stock": lambda m=model, i=inputs: stock_chunk(m, i),
            "ours": lambda m=model, i=inputs: our_chunk(m, i),
        }
        if many is not None:
            cases["16 at once"] = lambda m=model, i=many: our_chunk(m, i)
        found = dict(zip(cases, seconds(*cases.values(), repeats=rounds), strict=True))
        title = f"one chunk, scale {scale_factor}, {precision}"
        figures[f"{title}, stock: ms"] = found["stock"] * 1e3
        figures[f"{title}, ours: ms"] = found["ours"] * 1e3
        if many is not None:
            figures[f"{title}, 16 at once: times 16 calls"] = 16 * found["ours"] / found["16 at once"]
    return figures


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
