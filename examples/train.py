"""Train a SmolAndFast policy on a benchmark's demonstrations with `Trainer`.

    python examples/train.py --preset tiny --dataset_root path/to/pusht --output_dir outputs/tiny
    python examples/train.py --preset 256M --output_dir outputs/256m      # lerobot/pusht from the hub
    python examples/train.py --benchmark metaworld --dataset_root outputs/metaworld --output_dir outputs/mt50

Every argument of `TrainingArguments` works too, or is refused by name: `--max_steps`, `--report_to`,
`--per_device_train_batch_size`, ... At each evaluation, the policy is played in the simulator; the checkpoint with the
highest success rate is saved in the output folder at the end. That folder has to be new or empty;
`--resume_from_checkpoint last` continues an earlier training in it.
"""

import math
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
import numpy as np
import torch
from accelerate.utils import gather_object
from envs import Benchmark, get_benchmark
from evaluate import make_predict
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from model_card import CardFacts, write_card
from rollouts import RolloutResult, rollout
from torch.utils.data import Sampler
from train_arguments import (
    PARTS,
    VARIATIONS,
    PolicyArguments,
    make_parser,
    needs_evaluation,
    one_line,
    parse_arguments,
)
from training_runs import EpochDataset, EpochSetter, interruption, naming_option, read_weights
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler

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
from smolandfast.training import (
    ActionDataCollator,
    AtomicCheckpointTrainer,
    JoinedChunkDatasets,
    LeRobotChunkDataset,
    download_dataset,
    evenly_spaced,
    find_checkpoints,
    make_muon,
    make_optimizer,
    make_tiny_model,
    make_tiny_processor,
    parameter_groups,
)
from smolandfast.training.checkpoints import STATE, UNFINISHED

CHUNKS_AT_ONCE = 20_000  # in memory, when all chunks of a data set are read
EMBEDDINGS = ("model.text_model.embed_tokens.weight", "lm_head.weight")
parse_args = partial(parse_arguments, description=__doc__)


class VariedDemonstrations(EpochDataset):
    """Demonstrations turned, shifted and reworded, another way in every epoch; without their last frames."""

    def __init__(self, dataset: LeRobotChunkDataset, args: PolicyArguments, seed: int, benchmark: Benchmark):
        super().__init__()
        self.dataset, self.seed, self.wordings = dataset, seed, benchmark.wordings
        is_start = dataset.frame_index % args.sample_every == 0
        remaining_frames = dataset.episode_end - np.arange(len(dataset))
        self.indices = np.flatnonzero(is_start & (remaining_frames >= args.drop_n_last_frames))
        if len(self.indices) == 0:
            raise ValueError(f"--drop_n_last_frames is {args.drop_n_last_frames}, and no episode is longer. Lower it.")
        oversampled = oversampled_instructions(args, benchmark)
        repeats = [2 if dataset.text(i) in oversampled else 1 for i in self.indices.tolist()]
        self.indices = np.repeat(self.indices, repeats)
        self.vary, self.options = benchmark.vary, variation_options(args, benchmark)
        sizes, size = list(dataset.image_sizes.values()), benchmark.image_size
        if any(self.options.values()) and sizes != [(size, size)]:
            reason = f"The data set has images of {sizes} (height, width), and only one of {size}x{size} can be varied"
            raise ValueError(f"{reason}. Set {', '.join('--' + name for name in VARIATIONS)} to 0.")
        self.reword_probability = args.reword_probability
        unknown = [task for task in dataset.tasks if not self.wordings.get(task)]
        if self.reword_probability > 0 and unknown:
            reason = f"{benchmark.name} has no other wordings of the data set's task {unknown[0]!r}"
            raise ValueError(f"--reword_probability is {self.reword_probability}, but {reason}. Set it to 0.")

    def __len__(self) -> int:
        return len(self.indices)

    def text(self, i: int) -> tuple[str, np.random.Generator]:
        """A sample's instruction in this epoch, and the random generator of its other variations."""
        i = int(self.indices[i])
        text, rng = self.dataset.text(i), np.random.default_rng((self.seed, self.epoch, i))
        is_reworded = rng.random() < self.reword_probability
        return str(rng.choice(self.wordings[text])) if is_reworded else text, rng

    def __getitem__(self, i: int) -> dict:
        text, rng = self.text(i)
        sample = {**self.dataset[int(self.indices[i])], "text": text}
        if not any(self.options.values()):
            return sample
        image, state, actions = self.vary(sample["images"][0], sample["state"], sample["actions"], rng, **self.options)
        return {**sample, "images": [image], "state": state, "actions": actions}


def normalized_chunks(dataset: LeRobotChunkDataset, normalizer: Normalizer, indices: np.ndarray) -> np.ndarray:
    bins = normalizer.state_bins(dataset.states[indices])
    return normalizer.normalize_actions(dataset.action_chunks(indices), bins)


def variation_options(args: PolicyArguments, benchmark: Benchmark) -> dict[str, float]:
    """The options by which the benchmark's demonstrations are varied. Raises `ValueError` for an unsupported one."""
    for name in VARIATIONS:
        if getattr(args, name) and name not in benchmark.variations:
            value = getattr(args, name)
            raise ValueError(f"--{name} is {value}, which {benchmark.name} does not support. Set it to 0.")
    return {name: getattr(args, name) for name in benchmark.variations}


def oversampled_instructions(args: PolicyArguments, benchmark: Benchmark) -> set[str]:
    """The instructions of the tasks in the groups of `--oversample`."""
    groups, known = args.oversample or [], list(dict.fromkeys(benchmark.groups.values()))
    for group in groups:
        if group not in known:
            raise ValueError(f"--oversample has {group!r}, expected some of {benchmark.name}'s groups {known}.")
    return {benchmark.tasks[task] for task, group in benchmark.groups.items() if group in groups}


class GroupedByLength(LengthGroupedSampler):
    """Batches of samples of similar length, to pad less; another order in every epoch, also after resuming."""

    def __init__(
        self, dataset: VariedDemonstrations, processor: SmolAndFastProcessor, batch_size: int, seed: int | None = None
    ):
        num_tokens = []
        for start in range(0, len(dataset), CHUNKS_AT_ONCE):
            indices = dataset.indices[start : start + CHUNKS_AT_ONCE]
            actions = normalized_chunks(dataset.dataset, processor.normalizer, indices)
            num_tokens += [len(ids) for ids in processor.action_tokenizer.encode_actions(actions)]
        super().__init__(batch_size, lengths=num_tokens)
        self.num_tokens, self.tokenizer, self.dataset = num_tokens, processor.tokenizer, dataset
        self.seed = dataset.seed if seed is None else seed

    def __iter__(self):
        texts = [self.dataset.text(i)[0] for i in range(len(self))]  # of this epoch
        text_tokens = {text: len(self.tokenizer(text)["input_ids"]) for text in set(texts)}
        self.lengths = [n + text_tokens[text] for n, text in zip(self.num_tokens, texts, strict=True)]
        seed = np.random.SeedSequence((self.seed, self.dataset.epoch)).generate_state(1)[0]
        self.generator = torch.Generator().manual_seed(int(seed))
        return super().__iter__()


class PolicyTrainer(AtomicCheckpointTrainer):
    """A `Trainer` whose evaluation also plays the policy in the simulator, which gives its score.

    `card_options` are arguments of [`model_card.CardFacts`], for the model card of `push_to_hub`; the other new
    arguments are those of [`rollouts.rollout`], and whether [`GroupedByLength`] makes the batches.
    """

    def __init__(self, *args, benchmark, eval_tasks, eval_seeds, card_options, batch_by_length=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.benchmark, self.eval_tasks, self.eval_seeds = benchmark, eval_tasks, eval_seeds
        self.card_options, self.batch_by_length = card_options, batch_by_length

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if not self.batch_by_length:
            return super()._get_train_sampler(train_dataset)
        # Without --data_seed, the data set's seed is that of the training.
        batch_size, seed = self._train_batch_size, self.args.data_seed
        return GroupedByLength(self.train_dataset, self.processing_class, batch_size, seed)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # Each `generate()` would need all processes. (With an optimizer, as here, Trainer refuses both at the start.)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError("FSDP and ZeRO-3 split the weights, so no process can play the policy. Train with DDP.")
        metrics = super().evaluate(*args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model).eval()
        predict, steps = make_predict(policy, self.processing_class), policy.config.n_action_steps
        # Each process plays its share, so none waits longer for the others than that takes (`ddp_timeout`).
        rank, count, tasks, seeds = self.args.process_index, self.args.world_size, self.eval_tasks, self.eval_seeds
        tasks, seeds = (tasks[rank::count], seeds) if len(tasks) >= count else (tasks, seeds[rank::count])
        share = rollout(self.benchmark, predict, seeds, steps, tasks).episodes if len(seeds) else []
        episodes = gather_object(share)
        episodes.sort(key=lambda episode: (self.eval_tasks.index(episode.task), episode.seed))
        # The time of a chunk is not reported.
        played = RolloutResult(self.benchmark, episodes, num_chunks=1, predict_seconds=0.0).metrics()
        names = ("avg_max_reward", "avg_sum_reward", "pc_success", "mean_over_tasks", "mean_over_groups")
        scores = {f"eval_{name}": played[name] for name in names if played.get(name) is not None}
        # The reward, at most 1, ranks checkpoints of equal success.
        scores["eval_score"] = played["pc_success"] + played.get("avg_max_reward", 0.0)
        self.log(scores)
        return metrics | scores

    def create_model_card(self, *args, **kwargs) -> None:
        if not self.is_world_process_zero():
            return
        folder, best = Path(self.args.output_dir), self.state.best_global_step
        has_trained = any("loss" in entry for entry in self.state.log_history)
        facts = CardFacts(
            trainer_state=asdict(self.state) if has_trained else None,
            kept_step=best if self.args.load_best_model_at_end and best else self.state.global_step,
            **self.card_options,
        )
        model, name = self.accelerator.unwrap_model(self.model), self.hub_model_id or folder.name
        write_card(folder, name, self.benchmark, model, self.processing_class, facts)

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)
        except (httpx.HTTPError, RuntimeError) as error:
            folder, repo_id, reason = self.args.output_dir, self.hub_model_id, error.__cause__ or error
            raise OSError(
                f"The policy is saved in {folder}, but the upload to {repo_id} failed: {reason} "
                f"Complete it with `hf upload {repo_id} {folder} --exclude 'checkpoint-*'`."
            ) from error


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step too, so that it can be the best where it is not a multiple of `eval_steps`."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


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


def check_output_folder(args: PolicyArguments, training: TrainingArguments) -> None:
    """Create the output folder, and refuse one with content that the training would replace."""
    folder, resumed = Path(training.output_dir), training.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file, expected a folder. Name another one.")
    if resumed not in (None, "last") and not Path(resumed, STATE).is_file():
        fix = "Name a checkpoint-* folder, or last."
        raise ValueError(f"--resume_from_checkpoint {resumed} is not a checkpoint: it has no {STATE}. {fix}")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    if not names or args.overwrite_output_dir:
        return
    checkpoints = [checkpoint.resolve() for checkpoint in find_checkpoints(folder)]
    policy = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    is_begun = not policy and {"runs", UNFINISHED} & set(names)  # by a run that was killed before its first checkpoint
    if resumed is None:
        reason = f"--output_dir {folder} holds {names[0]}: an earlier training may be in it."
    elif resumed != "last" and Path(resumed).resolve() not in checkpoints:
        reason = f"--resume_from_checkpoint {resumed} is not in --output_dir {folder}, which is not empty."
    elif not checkpoints and not is_begun:
        reason = f"--output_dir {folder} holds {(policy or names)[0]}, but no checkpoint to continue from."
    else:
        return
    raise ValueError(
        f"{reason} Name a new --output_dir, continue with --resume_from_checkpoint last, or give "
        "--overwrite_output_dir, which deletes the earlier checkpoints in it and replaces the policy."
    )


def read_demonstrations(
    args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark
) -> tuple[LeRobotChunkDataset | JoinedChunkDatasets, LeRobotChunkDataset | None]:
    """The demonstrations to train on and those to evaluate with, which are the last of the first data set."""
    repo_id = args.dataset_repo_id or benchmark.repo_id
    if not (args.dataset_root or repo_id):
        raise ValueError(f"--dataset_root is missing, and {benchmark.name} has no data set on the Hub. Name a folder.")
    roots = args.dataset_root or [download_dataset(repo_id)]
    read = partial(LeRobotChunkDataset, chunk_size=args.chunk_size, frame_stride=args.frame_stride)
    if len(benchmark.image_keys) > 1:  # the name of a single camera does not matter
        read = partial(read, image_keys=benchmark.image_keys)
    train_sets, eval_set = [], None
    for root in roots:
        with naming_option(f"--dataset_root {root}"):
            first = read(root, episodes=[0])
            check_kind(first, args, training, benchmark)
            total = int(first.info["total_episodes"])
            num_trained = total if train_sets else total - args.held_out_episodes
            if num_trained < 1:
                reason = f"but there are {total} episodes, and one at least is trained on"
                raise ValueError(f"--held_out_episodes is {args.held_out_episodes}, {reason}. Lower it.")
            train_sets.append(read(root, episodes=range(num_trained)))
            if num_trained < total:
                eval_set = read(root, episodes=range(num_trained, total))
    with naming_option("--dataset_root"):
        return JoinedChunkDatasets(train_sets) if len(train_sets) > 1 else train_sets[0], eval_set


def check_kind(
    dataset: LeRobotChunkDataset, args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark
) -> None:
    """Refuse demonstrations of a robot or camera other than the benchmark's."""
    size = (benchmark.image_size, benchmark.image_size)
    checked = [
        ("state_dim", dataset.state_dim, benchmark.state_dim),
        ("action_dim", dataset.action_dim, benchmark.action_dim),
        ("number of cameras", len(dataset.image_keys), len(benchmark.image_keys)),
    ]
    if args.preset == "tiny" or needs_evaluation(training):
        checked += [(f"size of {key} (height, width)", value, size) for key, value in dataset.image_sizes.items()]
    # The policy plays at the demonstrated speed, or at --frame_stride times that.
    if not any(math.isclose(dataset.fps / stride, benchmark.fps) for stride in (1, args.frame_stride)):
        checked.append(("fps", dataset.fps, benchmark.fps))
    for name, value, expected in checked:
        if value != expected:
            fix = "Name demonstrations of that simulator, or another --benchmark."
            raise ValueError(f"its {name} is {value}, that of the benchmark {benchmark.name} is {expected}. {fix}")


def choose_eval_tasks(
    args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark, tasks: list[str]
) -> list[str]:
    """The tasks to play: those of `--eval_tasks`, or else those of the demonstrations."""
    unknown = [task for task in args.eval_tasks or () if task not in benchmark.tasks]
    if unknown:
        names = ", ".join(benchmark.tasks)
        raise ValueError(f"--eval_tasks has {unknown[0]!r}, expected some of {benchmark.name}'s {names}.")
    chosen = args.eval_tasks or [task for task, instruction in benchmark.tasks.items() if instruction in tasks]
    if needs_evaluation(training) and not chosen:
        fix = "Name the tasks to play with --eval_tasks, or give --eval_strategy no."
        raise ValueError(f"--dataset_root has none of {benchmark.name}'s tasks, but {tasks[0]!r}. {fix}")
    return chosen


def make_trainer(args: PolicyArguments, training: TrainingArguments) -> PolicyTrainer:
    """Read, check and make everything that the training needs; bad input is a ValueError."""
    if training.process_index == 0:  # others would see what the first has begun to write
        check_output_folder(args, training)
    set_seed(training.seed)
    benchmark = get_benchmark(args.benchmark)
    train_set, eval_set = read_demonstrations(args, training, benchmark)
    eval_tasks = choose_eval_tasks(args, training, benchmark, train_set.tasks)
    samples = VariedDemonstrations(train_set, args, training.seed, benchmark)
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and len(samples) < batch:
        reason = f"but there are {len(samples)}, and incomplete batches are dropped"
        raise ValueError(f"--per_device_train_batch_size makes batches of {batch} samples, {reason}. Lower it.")
    model, processor = make_policy(train_set, args, benchmark)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {model.dtype}, bf16 autocast: {training.bf16}")
    is_on_hub = args.dataset_repo_id or not args.dataset_root
    on_hub = [args.dataset_repo_id or benchmark.repo_id] if is_on_hub else []
    base_model = args.vlm if args.preset == "256M" and not os.path.isdir(args.vlm) else None
    rates = {name: getattr(args, name) for name in PARTS} | {"weight_decay": training.weight_decay}
    is_tiny = args.preset == "tiny"
    optimizer = make_muon(model, parameter_groups(model, **rates)) if is_tiny else make_optimizer(model, **rates)
    return PolicyTrainer(
        model,
        training,
        data_collator=ActionDataCollator(processor),
        train_dataset=samples,
        eval_dataset=eval_set,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[EpochSetter(), EvaluateLastStep()],
        benchmark=benchmark,
        eval_tasks=eval_tasks,
        eval_seeds=range(args.eval_seed, args.eval_seed + args.eval_episodes),
        card_options={"datasets": on_hub, "base_model": base_model},
        batch_by_length=args.batch_by_length,
    )


def main(argv: list[str] | None = None) -> None:
    args, training = parse_args(argv)
    parser, folder = make_parser(), Path(training.output_dir)
    try:
        try:
            trainer = make_trainer(args, training)
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # of a library, for --report_to and others
            parser.error(one_line(error))
        if args.overwrite_output_dir and trainer.is_world_process_zero():
            for checkpoint in find_checkpoints(folder):
                print(f"--overwrite_output_dir: deleting {checkpoint}")
                checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
        trainer.accelerator.wait_for_everyone()
        try:
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
            trainer.save_model()
        except ValueError as error:
            parser.error(one_line(error))
        except OSError as error:
            parser.exit(1, f"train.py: error: {one_line(error)}\n")
        if trainer.is_world_process_zero():
            print(f"Best checkpoint: {trainer.state.best_model_checkpoint}, saved in {folder}")
    except KeyboardInterrupt:
        parser.exit(130, interruption(folder, "the same command with --resume_from_checkpoint last"))


if __name__ == "__main__":
    main()
