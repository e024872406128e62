"""An action chunk of the real size against stock Transformers, on random weights of SmolVLM2-256M's shapes.

    python benchmarks/bench_256m.py              # part of `make bench`
    python benchmarks/bench_256m.py --compiled   # ours with compiled layers: fifteen minutes

`bench_training_256m.py` is the other half. Stock is what a user would write without this
repository: `generate()` with a logits processor that masks all but the action tokens and EOS. It runs on the same
weights as ours, alternating with it in one process. Of compiled models only one is in the process, as on a robot: two
take each other's place in the cache. Writes `benchmarks/results/bench_256m.json` and `.md`, or `bench_256m_compiled`.
"""

import argparse
import copy
import time

import torch
from bench import RESULTS, describe_machine, seconds, write_table
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.utils import get_model_size_in_bytes
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


def matmul_tflops(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """The machine's own rate: the best of a few products of two square matrices."""
    matrix = torch.randn(size, size).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def make_stock(model: SmolAndFastForActionPrediction) -> SmolVLMForConditionalGeneration:
    """The stock model on the same tensors, without anything that ours adds to its parts."""
    stock = SmolVLMForConditionalGeneration(model.config)
    stock.load_state_dict(model.state_dict(), assign=True)
    return stock.eval()


def bench_inference(scale_factor: int, rounds: int, compiled: str | None) -> dict[str, float]:
    """Ours as loaded, packed and with int8 weights, or compiled in the named precision, each against stock."""
    torch.compiler.reset()  # what was compiled for other models is looked through at every call
    exact = make_model(scale_factor).eval()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    models = {"stock fp32": make_stock(exact), "stock bf16": make_stock(half)}
    if compiled:
        chosen = {"fp32": exact, "bf16": half}[compiled]
        models |= {f"ours {compiled}, compiled": copy.deepcopy(chosen).pack(compiled=True)}
    else:
        models |= {"ours fp32": exact, "ours bf16 packed": copy.deepcopy(half).pack()}
        models |= {"ours bf16, int8 weights": copy.deepcopy(half)}
        quantize_(models["ours bf16, int8 weights"].model, Int8WeightOnlyConfig())
    one, many = make_batch(scale_factor, 1, False), make_batch(scale_factor, 16, False)
    chunks = {name: stock_chunk if "stock" in name else our_chunk for name in models}
    firsts = {name: timed(our_chunk, models[name], one) for name in models if "compiled" in name}
    times = seconds(*[lambda name=name: chunks[name](models[name], one) for name in models], repeats=rounds)
    prefills = seconds(*[lambda name=name: prefill(models[name], one) for name in models], repeats=rounds)
    rates = {"fp32": matmul_tflops(torch.float32), "bf16": matmul_tflops(torch.bfloat16)}
    scores = prefill(exact, one).logits
    figures = {"bytes read from memory, GB/s": (bandwidth := memory_gb_per_s())}
    for precision, model in {"fp32": exact, "bf16": half}.items():
        layers = sum(weight.nbytes for weight in model.model.text_model.layers.parameters()) / 1e9
        floor = PREFILL_GFLOP[scale_factor] / rates[precision] + (ACTION_TOKENS - 1) * layers / bandwidth * 1e3
        title = f"floor of one chunk, scale {scale_factor}, {precision}"
        figures[f"{title}: matrix products of the prefill, GFLOP"] = PREFILL_GFLOP[scale_factor]
        figures[f"{title}: weights read by each of {ACTION_TOKENS - 1} further tokens, MB"] = layers * 1e3
        figures[f"{title}: ms"] = floor
    for (name, model), found, prefill_time in zip(models.items(), times, prefills, strict=True):
        title, precision = f"one chunk, scale {scale_factor}, {name}", name.split()[1].strip(",")
        rate = PREFILL_GFLOP[scale_factor] / 1e3 / prefill_time
        figures[f"{title}: ms"] = found * 1e3
        if name in firsts:
            figures[f"{title}: s for the first, which compiles"] = firsts[name]
        figures[f"{title}: times stock fp32"] = times[0] / found
        figures[f"{title}, prefill: ms"] = prefill_time * 1e3
        figures[f"{title}, prefill: share of the matrix rate"] = rate / rates[precision]
        if name not in ("stock fp32", "ours fp32"):
            difference = (prefill(model, one).logits - scores).abs().mean() / scores.std()
            figures[f"{title}: mean difference of the first scores from fp32, standard deviations"] = float(difference)
        if name == "ours bf16, int8 weights":
            for part in (half, model):
                kind = "int8" if part is model else "bf16"
                figures[f"weights of the layers, {kind}, MB"] = get_model_size_in_bytes(part.model) / 1e6
        elif scale_factor == 4 and "ours" in name and name != "ours fp32, compiled":
            if "compiled" in name:
                our_chunk(model, many)
            together = timed(our_chunk, model, many) / 16
            stock = times[list(models).index(f"stock {precision}")]
            figures[f"{title}, 16 at once: ms a chunk"] = together * 1e3
            figures[f"{title}, 16 at once: times 16 calls"] = found / together
            figures[f"{title}, 16 at once: times 16 stock calls in the same precision"] = stock / together
    return figures


def memory_gb_per_s(repeats: int = 5) -> float:
    """How fast this machine reads: the best of a few sums over half a gigabyte."""
    numbers = torch.ones(2**27)
    return numbers.nbytes / min(timed(numbers.sum) for _ in range(repeats)) / 1e9


@torch.no_grad()
def prefill(model, inputs):
    return model(**inputs, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="the ways that `make bench` leaves out")
    args = parser.parse_args()
    figures = {}
    for scale_factor in (1, 4):
        for compiled in ("fp32", "bf16") if args.compiled else (None,):
            figures |= bench_inference(scale_factor, args.rounds, compiled)
    path = RESULTS / ("bench_256m_compiled" if args.compiled else "bench_256m")
    write_table(path, describe_machine() | {"rounds": args.rounds}, figures)


if __name__ == "__main__":
    main()
