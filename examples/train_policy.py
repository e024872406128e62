"""The policy that `train.py` trains: the preset's model, with statistics and FAST tokenizer of the demonstrations."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from envs import Benchmark
from train_arguments import PolicyArguments
from train_data import CHUNKS_AT_ONCE, normalized_chunks, variation_options
from training_runs import naming_option, read_weights
from transformers import PreTrainedTokenizerFast

from smolandfast import (
    FastActionTokenizer,
    Normalizer,
    SmolAndFastForActionPrediction,
    SmolAndFastProcessor,
    compute_statistics,
    match_joints,
)
from smolandfast.files_smolandfast import read_json
from smolandfast.tokenization_fast_action import MAX_FITTED_CHUNKS
from smolandfast.training import LeRobotChunkDataset, evenly_spaced, make_tiny_model, make_tiny_processor

EMBEDDINGS = ("model.text_model.embed_tokens.weight", "lm_head.weight")


def fit_statistics_and_tokenizer(
    dataset: LeRobotChunkDataset, args: PolicyArguments, benchmark: Benchmark
) -> tuple[dict, FastActionTokenizer]:
    """Statistics of the demonstrations and of their symmetric copies, and a FAST tokenizer fitted to them.

    The limits are those of all chunks; quantiles and FAST use up to `MAX_FITTED_CHUNKS`, evenly spaced. Rotated copies
    count for FAST alone: the statistics limit the actions sent to the robot. With `init_from`, both are those of the
    earlier policy.
    """
    if args.init_from is not None and not args.refit:
        return read_earlier(dataset, args)
    options = variation_options(args, benchmark)
    symmetries = benchmark.symmetries(**options)
    # Each symmetry is applied to every seventh chunk.
    parts = [np.arange(len(dataset)), *(np.arange(i + 1, len(dataset), 7) for i in range(len(symmetries)))]
    symmetry = np.repeat(np.arange(len(parts)), [len(indices) for indices in parts])  # 0: as demonstrated
    frames = np.concatenate(parts)

    def take(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states, chunks = dataset.states[frames[chosen]], dataset.action_chunks(frames[chosen])
        for s in set(symmetry[chosen].tolist()) - {0}:
            turned, move = symmetry[chosen] == s, symmetries[s - 1]
            states[turned], chunks[turned] = move(states[turned]), move(chunks[turned])
        return states, chunks

    states, chunks = take(evenly_spaced(len(frames), MAX_FITTED_CHUNKS))
    normalizer_kwargs = normalizer_options(dataset, args)
    measure = partial(compute_statistics, reference_dims=normalizer_kwargs["reference_dims"])
    with naming_option("--dataset_root"):
        statistics = measure(states, chunks)
    if len(states) < len(frames):
        for start in range(0, len(frames), CHUNKS_AT_ONCE):
            widen(statistics, measure(*take(np.arange(start, min(start + CHUNKS_AT_ONCE, len(frames))))))
    if args.action_tokenizer is not None:
        with naming_option("--action_tokenizer"):
            return statistics, FastActionTokenizer.from_pretrained(args.action_tokenizer)
    rotations = benchmark.rotations(**options)
    states, chunks = (np.concatenate([x, *(move(x) for move in rotations)]) for x in (states, chunks))
    with naming_option("--use_relative_actions"):
        normalizer = Normalizer(statistics, **normalizer_kwargs)
    normalized = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
    with naming_option("--fast_scale, --fast_vocab_size"):
        tokenizer = FastActionTokenizer.fit(normalized, args.fast_scale, args.fast_vocab_size, normalizer.action_scale)
    print_report(tokenizer)
    return statistics, tokenizer


def print_report(tokenizer: FastActionTokenizer) -> None:
    report = {name: " ".join(f"{x:.4g}" for x in np.atleast_1d(value)) for name, value in tokenizer.fit_report.items()}
    print("FAST:", ", ".join(f"{name} {numbers}" for name, numbers in report.items()))


def widen(statistics: dict, other: dict) -> None:
    """Widen the limits in `statistics`, in place, to include those in `other`."""
    for name, numbers in statistics.items():
        numbers["min"] = np.minimum(numbers["min"], other[name]["min"]).tolist()
        numbers["max"] = np.maximum(numbers["max"], other[name]["max"]).tolist()


def read_earlier(dataset: LeRobotChunkDataset, args: PolicyArguments) -> tuple[dict, FastActionTokenizer]:
    """Statistics and FAST tokenizer of `--init_from`, which have to fit the data.

    For another `--chunk_size`, the tokenizer is resampled: its chunks still span the same time.
    """
    with naming_option("--init_from"):
        earlier = read_json(Path(args.init_from, "processor_config.json"))
        normalizer = Normalizer(earlier.get("statistics"), **normalizer_options(dataset, args))
        absolute = earlier.get("relative_exclude_joints", []), args.relative_exclude_joints or []
        for name, value, expected in (
            ("state_dim", normalizer.state_dim, dataset.state_dim),
            ("action_dim", normalizer.action_dim, dataset.action_dim),
            ("use_relative_actions", earlier.get("use_relative_actions", False), args.use_relative_actions),
            ("relative_exclude_joints", *absolute),
        ):
            if value != expected:
                fix = "Name a policy of the same kind, or measure the data again with --refit."
                raise ValueError(f"{name} of {args.init_from} is {value}, here it is {expected}. {fix}")
        tokenizer = FastActionTokenizer.from_pretrained(Path(args.init_from, "action_tokenizer"))
        if tokenizer.horizon not in (None, args.chunk_size):
            chunks = normalized_chunks(dataset, normalizer, evenly_spaced(len(dataset), MAX_FITTED_CHUNKS))
            tokenizer = tokenizer.resample(chunks, normalizer.action_scale)
            print_report(tokenizer)
        return earlier["statistics"], tokenizer


def normalizer_options(dataset: LeRobotChunkDataset, args: PolicyArguments) -> dict:
    """The options of [`Normalizer`]."""
    options = {"use_relative_actions": args.use_relative_actions, "reference_dims": None, **read_earlier_options(args)}
    if args.use_relative_actions:
        with naming_option("--relative_exclude_joints"):
            joints = dataset.state_names, dataset.action_names
            options["reference_dims"] = match_joints(*joints, args.relative_exclude_joints or ())
    return options


def read_earlier_options(args: PolicyArguments) -> dict:
    """Options of `--init_from`'s normalizer that its weights depend on, where it has them."""
    if args.init_from is None:
        return {}
    with naming_option("--init_from"):
        earlier = read_json(Path(args.init_from, "processor_config.json"))
    return {name: earlier[name] for name in ("normalization", "n_state_bins") if name in earlier}


def make_policy(
    dataset: LeRobotChunkDataset, args: PolicyArguments, benchmark: Benchmark
) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """The preset's model and processor."""
    statistics, action_tokenizer = fit_statistics_and_tokenizer(dataset, args, benchmark)
    wordings = sum(benchmark.wordings.values(), []) if args.reword_probability > 0 else []
    has_tasks = len(dataset.tasks) > 1
    default_task = "" if has_tasks else dataset.tasks[0]
    options = {
        "chunk_size": args.chunk_size,
        "use_relative_actions": args.use_relative_actions,
        "relative_exclude_joints": args.relative_exclude_joints or [],
        "image_keys": dataset.image_keys,
        "fps": dataset.fps,
        "state_names": dataset.state_names,
        "action_names": dataset.action_names,
        "training_tasks": list(dict.fromkeys([*dataset.tasks, *wordings])),
        **read_earlier_options(args),
    }
    names = ("n_action_steps", "freeze_vision_tower", "freeze_connector")
    model_options = {name: getattr(args, name) for name in names}
    if args.preset == "256M":
        with naming_option("--vlm"):
            processor = SmolAndFastProcessor.from_vlm(
                args.vlm, action_tokenizer, statistics, args.scale_factor, default_task=default_task, **options
            )
            model = SmolAndFastForActionPrediction.from_pretrained(
                args.vlm, **processor.model_kwargs(), **model_options, dtype=torch.float32
            )
        return model, processor
    processor = make_tiny_processor(
        action_tokenizer,
        statistics,
        default_task,
        options["training_tasks"] if has_tasks else (),
        scale_factor=args.scale_factor,
        image_size=benchmark.image_size,
        split_words=has_tasks,
        **options,
    )
    # On a CPU, eager attention trains short sequences faster than the fused kernel.
    model = make_tiny_model(processor, **model_options, attn_implementation="eager")
    if args.init_from is not None:
        with naming_option("--init_from"):
            weights = read_weights(Path(args.init_from, "model.safetensors"))
            earlier = PreTrainedTokenizerFast.from_pretrained(args.init_from)
            earlier_actions = FastActionTokenizer.from_pretrained(Path(args.init_from, "action_tokenizer"))
            embeddings = fit_embeddings(weights, (earlier, earlier_actions), (processor.tokenizer, action_tokenizer))
            load_weights(model, weights | embeddings, args.init_from)
    if args.vision_weights is not None:
        with naming_option("--vision_weights"):
            load_weights(model, read_weights(args.vision_weights), args.vision_weights, "model.vision_model.")
    return model, processor


def load_weights(
    model: SmolAndFastForActionPrediction, weights: dict[str, torch.Tensor], source: str, needed: str = ""
) -> None:
    """Replace some of the model's weights, at least those whose names begin with `needed`."""
    expected = model.state_dict()
    fix = "Start from weights of the tiny preset, for the same image size and --scale_factor."
    for name, tensor in weights.items():
        if name not in expected or tensor.shape != expected[name].shape:
            weight = f"{name} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{source} has a weight {weight}, which the tiny policy does not have. {fix}")
    missing = [name for name in expected if name.startswith(needed) and name not in (*weights, *EMBEDDINGS)]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of the tiny policy, such as {missing[0]}. {fix}")
    model.load_state_dict(weights, strict=False)


def fit_embeddings(
    weights: dict[str, torch.Tensor],
    earlier: tuple[PreTrainedTokenizerFast, FastActionTokenizer],
    new: tuple[PreTrainedTokenizerFast, FastActionTokenizer],
) -> dict[str, torch.Tensor]:
    """An earlier policy's embeddings, for new vocabularies of text and of actions.

    A new token gets the mean embedding of the earlier tokens for the same text or coefficients.
    """
    (earlier_text, earlier_actions), (text, actions) = earlier, new
    known, rows = earlier_text.get_vocab(), []
    pieces = [[k] for k in range(len(actions))]
    if actions.get_vocab() != earlier_actions.get_vocab():
        pieces = earlier_actions.encode_coefficients([actions.token_coefficients(k) for k in range(len(actions))])
    fast = {f"<fast_{k}>": [known[f"<fast_{i}>"] for i in ids] for k, ids in enumerate(pieces)}
    for token in text.convert_ids_to_tokens(range(text.vocab_size)):
        if token not in fast and token not in known:
            string = text.convert_tokens_to_string([token])
            fast[token] = earlier_text(string, add_special_tokens=False)["input_ids"]
        rows.append(fast.get(token) or [known[token]])
    return {
        name: torch.stack([weights[name][ids].mean(dim=0) for ids in rows]) for name in EMBEDDINGS if name in weights
    }
