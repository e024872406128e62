"""Train a SmolAndFast policy on a benchmark's demonstrations with `Trainer`.

    python examples/train.py --preset tiny --dataset_root path/to/pusht --output_dir outputs/tiny
    python examples/train.py --preset 256M --output_dir outputs/256m      # lerobot/pusht from the hub
    python examples/train.py --benchmark metaworld --dataset_root outputs/metaworld --output_dir outputs/mt50

Every argument of `TrainingArguments` works too, or is refused by name: `--max_steps`, `--report_to`,
`--per_device_train_batch_size`, ... While training, the policy is played in the simulator at each evaluation; the
checkpoint with the highest success rate is kept, and saved in the output folder at the end. That folder has to be new
or empty; `--resume_from_checkpoint last` continues an earlier training in it.
"""

import math
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import interrupt  # noqa: F401 - before all that takes long
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from envs import Benchmark, get_benchmark
from evaluate import make_predict
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from model_card import CardFacts, write_card
from rollouts import rollout
from safetensors import SafetensorError
from safetensors.torch import load_file
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
from training_runs import EpochDataset, EpochSetter, interruption, naming_option
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from smolandfast import (
    FastActionTokenizer,
    Normalizer,
    SmolAndFastForActionPrediction,
    SmolAndFastProcessor,
    compute_statistics,
)
from smolandfast.files_smolandfast import read_json
from smolandfast.training import (
    ActionDataCollator,
    AtomicCheckpointTrainer,
    JoinedChunkDatasets,
    LeRobotChunkDataset,
    download_dataset,
    find_checkpoints,
    make_muon,
    make_optimizer,
    make_tiny_model,
    make_tiny_processor,
    parameter_groups,
)
from smolandfast.training.checkpoints import STATE, UNFINISHED

MAX_FITTED_CHUNKS = 100_000  # that the FAST tokenizer is fitted to
CHUNKS_AT_ONCE = 20_000  # held in memory while all of a data set are measured
EMBEDDINGS = ("model.text_model.embed_tokens.weight", "lm_head.weight")


class VariedDemonstrations(EpochDataset):
    """Demonstrations turned, shifted and reworded, another way in every epoch; without their last frames.

    Raises:
        ValueError: Options that the data set or the benchmark has no use for.
    """

    def __init__(self, dataset: LeRobotChunkDataset, args: PolicyArguments, seed: int, benchmark: Benchmark):
        super().__init__()
        self.dataset, self.seed, self.wordings = dataset, seed, benchmark.wordings
        lasts = np.flatnonzero(np.diff(dataset.episode_index, append=-1))
        frames_to_come = np.repeat(lasts, np.diff(lasts, prepend=-1)) - np.arange(len(dataset))
        if args.sample_every < 1:
            raise ValueError(f"--sample_every is {args.sample_every}, expected 1 or more. 1 starts at every frame.")
        is_start = dataset.frame_index % args.sample_every == 0
        self.indices = np.flatnonzero(is_start & (frames_to_come >= args.drop_n_last_frames))
        if len(self.indices) == 0:
            raise ValueError(f"--drop_n_last_frames is {args.drop_n_last_frames}, and no episode is longer. Lower it.")
        sentences = _sentences_of_groups(args.oversample or [], benchmark)
        self.indices = np.repeat(self.indices, [1 + (dataset.text(i) in sentences) for i in self.indices.tolist()])
        self.vary, self.options = benchmark.vary, variation_options(args, benchmark)
        sizes, size = list(dataset.image_sizes.values()), benchmark.image_size
        if any(self.options.values()) and sizes != [(size, size)]:
            names = ", ".join(f"--{name}" for name in VARIATIONS)
            raise ValueError(
                f"Only one image of {size}x{size} pixels, {benchmark.name}'s, can be varied; the data set has images "
                f"of {sizes} (height, width). Set {names} to 0."
            )
        self.reword_probability = args.reword_probability
        unknown = [task for task in dataset.tasks if not self.wordings.get(task)]
        if self.reword_probability > 0 and unknown:
            raise ValueError(
                f"--reword_probability is {self.reword_probability}, but {benchmark.name} has no other wordings of "
                f"the data set's task {unknown[0]!r}. Set it to 0."
            )

    def __len__(self) -> int:
        return len(self.indices)

    def text(self, i: int) -> tuple[str, np.random.Generator]:
        """The sentence that a sample is told in this epoch, and its random numbers for what else is varied."""
        i = int(self.indices[i])
        text, rng = self.dataset.text(i), np.random.default_rng((self.seed, self.epoch, i))
        is_reworded = rng.random() < self.reword_probability
        return str(rng.choice(self.wordings[text])) if is_reworded else text, rng

    def __getitem__(self, i: int) -> dict:
        text, rng = self.text(i)
        i = int(self.indices[i])
        sample = {**self.dataset[i], "text": text}
        if not any(self.options.values()):
            return sample
        image, state, actions = self.vary(sample["images"][0], sample["state"], sample["actions"], rng, **self.options)
        return {**sample, "images": [image], "state": state, "actions": actions}


def variation_options(args: PolicyArguments, benchmark: Benchmark) -> dict[str, float]:
    """The options by which the benchmark's demonstrations are varied. Raises `ValueError` for one that it has not."""
    for name in VARIATIONS:
        if getattr(args, name) and name not in benchmark.variations:
            raise ValueError(f"--{name} is {getattr(args, name)}, which {benchmark.name} has no use for. Set it to 0.")
    return {name: getattr(args, name) for name in benchmark.variations}


def _sentences_of_groups(groups: list[str], benchmark: Benchmark) -> set[str]:
    """The instructions of the benchmark's tasks in these groups."""
    known = list(dict.fromkeys(benchmark.groups.values()))
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ValueError(f"--oversample has {unknown[0]!r}, expected some of {benchmark.name}'s groups {known}.")
    return {benchmark.tasks[task] for task, group in benchmark.groups.items() if group in groups}


class GroupedByLength(LengthGroupedSampler):
    """Batches of samples of similar length, so that little is padded; another order in every epoch, also if resumed.

    Args:
        seed: Of the order, by default the data set's.
    """

    def __init__(
        self, dataset: VariedDemonstrations, processor: SmolAndFastProcessor, batch_size: int, seed: int | None = None
    ):
        frames, normalizer, num_tokens = dataset.dataset, processor.normalizer, []
        for start in range(0, len(dataset), CHUNKS_AT_ONCE):
            indices = dataset.indices[start : start + CHUNKS_AT_ONCE]
            bins = normalizer.state_bins(frames.states[indices])
            actions = normalizer.normalize_actions(frames.action_chunks(indices), bins)
            num_tokens += [len(ids) for ids in processor.action_tokenizer.encode_actions(actions)]
        super().__init__(batch_size, lengths=num_tokens)
        self.num_tokens, self.tokenizer, self.dataset = num_tokens, processor.tokenizer, dataset
        self.seed = dataset.seed if seed is None else seed

    def __iter__(self):
        texts = [self.dataset.text(i)[0] for i in range(len(self))]  # of this epoch
        words = {text: len(self.tokenizer(text)["input_ids"]) for text in set(texts)}
        self.lengths = [n + words[text] for n, text in zip(self.num_tokens, texts, strict=True)]
        seed = np.random.SeedSequence((self.seed, self.dataset.epoch)).generate_state(1)[0]
        self.generator = torch.Generator().manual_seed(int(seed))
        return super().__iter__()


class PolicyTrainer(AtomicCheckpointTrainer):
    """A `Trainer` whose evaluation also plays the policy in the simulator, and scores it by that.

    With `push_to_hub`, the model card is ours; `card_options` are arguments of [`model_card.CardFacts`].
    """

    def __init__(
        self,
        *args,
        benchmark: Benchmark,
        eval_tasks: list[str] | None,
        eval_seeds: range,
        card_options: dict,
        batch_by_length: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.batch_by_length = batch_by_length
        self.benchmark, self.eval_tasks, self.eval_seeds = benchmark, eval_tasks, eval_seeds
        self.card_options = card_options

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if not self.batch_by_length:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(self.train_dataset, self.processing_class, self._train_batch_size, seed)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        scores = [None]
        if self.is_world_process_zero():
            policy = self.accelerator.unwrap_model(self.model).eval()
            predict = make_predict(policy, self.processing_class)
            steps = policy.config.n_action_steps
            played = rollout(self.benchmark, predict, self.eval_seeds, steps, self.eval_tasks).metrics()
            names = ("avg_max_reward", "avg_sum_reward", "pc_success", "mean_over_tasks", "mean_over_groups")
            scores = [{f"eval_{name}": played[name] for name in names if played.get(name) is not None}]
            # The reward, at most 1, decides between checkpoints of equal success.
            scores[0]["eval_score"] = played["pc_success"] + played.get("avg_max_reward", 0.0)
        scores = broadcast_object_list(scores)[0]
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
                f"The policy is saved in {folder}, but the upload to {repo_id} broke off: {reason} "
                f"Complete it with `hf upload {repo_id} {folder} --exclude 'checkpoint-*'`."
            ) from error


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step too, which otherwise could not be the best where `eval_steps` does not meet it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class PushCodeFiles(TrainerCallback):
    """Adds the code to what `push_to_hub` uploads during training: `Trainer` copies only weights from a checkpoint."""

    def on_push_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for path in Path(args.output_dir, f"checkpoint-{state.global_step}").glob("*.py"):
                shutil.copyfile(path, Path(args.output_dir, path.name))


def fit_statistics_and_tokenizer(
    dataset: LeRobotChunkDataset, args: PolicyArguments, benchmark: Benchmark
) -> tuple[dict, FastActionTokenizer]:
    """Measure the demonstrations, and their turned copies where training turns them; fit FAST to the result.

    The limits are those of all chunks. Quantiles, and FAST, are of up to `MAX_FITTED_CHUNKS`, evenly spaced. Rotated
    copies stay out of the statistics, whose limits are those of the actions that the robot is sent. With `init_from`,
    both are the earlier policy's.
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

    count = min(len(frames), MAX_FITTED_CHUNKS)
    states, chunks = take(np.linspace(0, len(frames) - 1, count).round().astype(np.int64))
    with naming_option("--dataset_root"):
        statistics = compute_statistics(states, chunks)
    if count < len(frames):
        for start in range(0, len(frames), CHUNKS_AT_ONCE):
            widen(statistics, compute_statistics(*take(np.arange(start, min(start + CHUNKS_AT_ONCE, len(frames))))))
    if args.action_tokenizer is not None:
        with naming_option("--action_tokenizer"):
            return statistics, FastActionTokenizer.from_pretrained(args.action_tokenizer)
    rotations = benchmark.rotations(**options)
    states, chunks = (np.concatenate([x, *(move(x) for move in rotations)]) for x in (states, chunks))
    with naming_option("--use_relative_actions"):
        normalizer = Normalizer(
            statistics, use_relative_actions=args.use_relative_actions, **read_earlier_options(args)
        )
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
    """Statistics and FAST tokenizer of the policy that `--init_from` names, which have to fit the data.

    For another `--chunk_size` the tokenizer is resampled: its chunks still span the same time.
    """
    with naming_option("--init_from"):
        earlier = read_json(Path(args.init_from, "processor_config.json"))
        normalizer = Normalizer(earlier.get("statistics"), **read_earlier_options(args))
        for name, found, expected in (
            ("state_dim", normalizer.state_dim, dataset.states.shape[1]),
            ("action_dim", normalizer.action_dim, dataset.action_dim),
            ("use_relative_actions", earlier.get("use_relative_actions", False), args.use_relative_actions),
        ):
            if found != expected:
                raise ValueError(
                    f"{name} of {args.init_from} is {found}, here it is {expected}. Name a policy of the same kind, "
                    "or measure the data again with --refit."
                )
        tokenizer = FastActionTokenizer.from_pretrained(Path(args.init_from, "action_tokenizer"))
        if tokenizer.horizon not in (None, args.chunk_size):
            frames = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_FITTED_CHUNKS)).round().astype(np.int64)
            bins = normalizer.state_bins(dataset.states[frames])
            chunks = normalizer.normalize_actions(dataset.action_chunks(frames), bins)
            tokenizer = tokenizer.resample(chunks, normalizer.action_scale)
            print_report(tokenizer)
        return earlier["statistics"], tokenizer


def read_earlier_options(args: PolicyArguments) -> dict:
    """How the policy that `--init_from` names reads numbers, where it says so: its weights were learnt with that."""
    if args.init_from is None:
        return {}
    with naming_option("--init_from"):
        earlier = read_json(Path(args.init_from, "processor_config.json"))
    return {name: earlier[name] for name in ("normalization", "n_state_bins") if name in earlier}


def make_policy(
    dataset: LeRobotChunkDataset, args: PolicyArguments, benchmark: Benchmark, **kwargs
) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """The preset's model and processor; kwargs go to `from_pretrained` or the configuration."""
    statistics, action_tokenizer = fit_statistics_and_tokenizer(dataset, args, benchmark)
    wordings = sum(benchmark.wordings.values(), []) if args.reword_probability > 0 else []
    default_task = dataset.tasks[0] if len(dataset.tasks) == 1 else ""
    options = {
        "chunk_size": args.chunk_size,
        "use_relative_actions": args.use_relative_actions,
        "image_keys": dataset.image_keys,
        "fps": dataset.fps,
        "state_names": dataset.state_names,
        "action_names": dataset.action_names,
        "training_tasks": list(dict.fromkeys([*dataset.tasks, *wordings])),
        **read_earlier_options(args),
    }
    frozen = {"freeze_vision_tower": args.freeze_vision_tower, "freeze_connector": args.freeze_connector}
    if args.preset == "256M":
        with naming_option("--vlm"):
            processor = SmolAndFastProcessor.from_vlm(
                args.vlm, action_tokenizer, statistics, args.scale_factor, default_task=default_task, **options
            )
            model = SmolAndFastForActionPrediction.from_pretrained(
                args.vlm,
                **processor.model_kwargs(),
                n_action_steps=args.n_action_steps,
                dtype=torch.float32,
                **frozen,
                **kwargs,
            )
        return model, processor
    processor = make_tiny_processor(
        action_tokenizer,
        statistics,
        default_task,
        options["training_tasks"] if len(dataset.tasks) > 1 else (),
        scale_factor=args.scale_factor,
        image_size=benchmark.image_size,
        split_words=len(dataset.tasks) > 1,
        **options,
    )
    # On a CPU, eager attention trains short sequences faster than the fused kernel.
    model = make_tiny_model(
        processor, args.n_action_steps, benchmark.image_size, attn_implementation="eager", **frozen, **kwargs
    )
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


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Name one that training or pretraining wrote.") from error


def load_weights(
    model: SmolAndFastForActionPrediction, weights: dict[str, torch.Tensor], source: str, needed: str = ""
) -> None:
    """Replace some of the model's weights, at least those whose names begin with `needed`.

    Raises:
        ValueError: weights of another architecture.
    """
    expected = model.state_dict()
    fix = "Start from weights of the tiny preset, for the same image size and --scale_factor."
    for name, tensor in weights.items():
        if name not in expected or tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source} has a weight {name} of shape {tuple(tensor.shape)}, which the tiny policy has not. {fix}"
            )
    missing = [name for name in expected if name.startswith(needed) and name not in (*weights, *EMBEDDINGS)]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of the tiny policy, {missing[0]} first. {fix}")
    model.load_state_dict(weights, strict=False)


def fit_embeddings(
    weights: dict[str, torch.Tensor],
    earlier: tuple[PreTrainedTokenizerFast, FastActionTokenizer],
    new: tuple[PreTrainedTokenizerFast, FastActionTokenizer],
) -> dict[str, torch.Tensor]:
    """Embeddings of an earlier policy for other vocabularies, of text and of actions.

    A new token gets the mean of what the earlier tokenizers would have written in its place.
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


def parse_args(argv: list[str] | None = None) -> tuple[PolicyArguments, TrainingArguments]:
    """Read the command line; whatever is wrong with it ends in an error line."""
    return parse_arguments(argv, __doc__)


def check_output_folder(args: PolicyArguments, training: TrainingArguments) -> None:
    """Refuse a folder whose content a training would replace, and make it otherwise.

    Raises:
        ValueError: It holds anything, and neither `--resume_from_checkpoint` nor `--overwrite_output_dir` allows that.
    """
    folder, resumed = Path(training.output_dir), training.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file, expected a folder. Name another one.")
    if resumed not in (None, "last") and not Path(resumed, STATE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {resumed} is not a checkpoint: it has no {STATE}. Name a checkpoint-* folder, "
            "or say last."
        )
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(path.name for path in folder.iterdir())
    fix = (
        "Name a new --output_dir, continue with --resume_from_checkpoint last, or give --overwrite_output_dir, which "
    )
    fix += "deletes the earlier checkpoints in it and replaces the policy."
    if not found or args.overwrite_output_dir:
        return
    if resumed is None:
        raise ValueError(f"--output_dir {folder} holds {found[0]}: an earlier training may be in it. {fix}")
    checkpoints = [checkpoint.resolve() for checkpoint in find_checkpoints(folder)]
    if resumed != "last" and Path(resumed).resolve() not in checkpoints:
        raise ValueError(
            f"--resume_from_checkpoint {resumed} is not in --output_dir {folder}, which is not empty. {fix}"
        )
    policy = [name for name in found if name.startswith("model") and name.endswith(".safetensors")]
    if not checkpoints and (policy or not {"runs", UNFINISHED} & set(found)):  # a run killed early leaves these
        held = (policy or found)[0]
        raise ValueError(f"--output_dir {folder} holds {held}, but no checkpoint to continue from. {fix}")


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of an earlier training, and say which."""
    for checkpoint in find_checkpoints(folder):
        print(f"--overwrite_output_dir: deleting {checkpoint}")
        if checkpoint.is_symlink():
            checkpoint.unlink()
        else:
            shutil.rmtree(checkpoint)


def read_demonstrations(
    args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark
) -> tuple[LeRobotChunkDataset | JoinedChunkDatasets, LeRobotChunkDataset | None]:
    """The demonstrations to train on and those to evaluate with, which have to be the benchmark's."""
    for root in args.dataset_root or []:
        if not Path(root).expanduser().is_dir():
            raise ValueError(
                f"--dataset_root {root} is not a folder. Name that of a LeRobot v3.0 data set, or leave it out to "
                f"load {benchmark.repo_id} from the Hub."
            )
    root, *more = args.dataset_root or [download_dataset(args.dataset_repo_id or benchmark.repo_id)]
    read = partial(LeRobotChunkDataset, chunk_size=args.chunk_size, frame_stride=args.frame_stride)
    with naming_option(f"--dataset_root {root}"):
        first = read(root, episodes=[0])
        check_kind(first, args, training, benchmark)
        total = first.info.get("total_episodes")
        if not isinstance(total, int) or isinstance(total, bool):
            raise ValueError(f"total_episodes in meta/info.json is {total!r}, expected the number of episodes.")
        num_trained = total - args.held_out_episodes
        if num_trained < 1:
            raise ValueError(
                f"--held_out_episodes is {args.held_out_episodes}, but there are {total} episodes. Lower it, so that "
                "one at least is left to train on."
            )
        train_set = read(root, episodes=range(num_trained))
        eval_set = read(root, episodes=range(num_trained, total)) if num_trained < total else None
    others = []
    for other in more:
        with naming_option(f"--dataset_root {other}"):
            others.append(read(other))
            check_kind(others[-1], args, training, benchmark)
    with naming_option("--dataset_root"):
        return JoinedChunkDatasets([train_set, *others]) if others else train_set, eval_set


def check_kind(
    dataset: LeRobotChunkDataset, args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark
) -> None:
    """Refuse demonstrations of another robot or camera than the one that the policy is played with."""
    fields = {
        "state_dim": (dataset.state_dim, benchmark.state_dim),
        "action_dim": (dataset.action_dim, benchmark.action_dim),
        "number of cameras": (len(dataset.image_keys), 1),
    }
    if args.preset == "tiny" or needs_evaluation(training):
        size = (benchmark.image_size, benchmark.image_size)
        fields["image size (height, width)"] = (tuple(dataset.image_sizes[dataset.image_keys[0]]), size)
    rates = (dataset.fps, dataset.fps / args.frame_stride)  # the demonstrated speed times --frame_stride, or exactly
    if not any(math.isclose(rate, benchmark.fps) for rate in rates):
        fields["fps"] = (dataset.fps, benchmark.fps)
    for name, (found, expected) in fields.items():
        if found != expected:
            raise ValueError(
                f"its {name} is {found}, that of the benchmark {benchmark.name} is {expected}. Name demonstrations of "
                "that simulator, or another --benchmark."
            )


def choose_eval_tasks(
    args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark, tasks: list[str]
) -> list[str]:
    """The tasks to play: those of `--eval_tasks`, or else those whose instruction the demonstrations have."""
    unknown = [task for task in args.eval_tasks or () if task not in benchmark.tasks]
    if unknown:
        raise ValueError(
            f"--eval_tasks has {unknown[0]!r}, expected some of {benchmark.name}'s {', '.join(benchmark.tasks)}."
        )
    chosen = args.eval_tasks or [task for task, sentence in benchmark.tasks.items() if sentence in tasks]
    if needs_evaluation(training) and not chosen:
        raise ValueError(
            f"--dataset_root has none of {benchmark.name}'s tasks, but {tasks[0]!r}. Name the tasks to play with "
            "--eval_tasks, or give --eval_strategy no."
        )
    return chosen


def make_trainer(args: PolicyArguments, training: TrainingArguments) -> PolicyTrainer:
    """Read, check and make everything that the training needs; whatever is wrong with it is a ValueError."""
    if training.process_index == 0:  # others would see what the first has begun to write
        check_output_folder(args, training)
    set_seed(training.seed)
    benchmark = get_benchmark(args.benchmark)
    train_set, eval_set = read_demonstrations(args, training, benchmark)
    eval_tasks = choose_eval_tasks(args, training, benchmark, train_set.tasks)
    samples = VariedDemonstrations(train_set, args, training.seed, benchmark)
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and len(samples) < batch:
        raise ValueError(
            f"--per_device_train_batch_size makes batches of {batch} samples, but there are {len(samples)}, and what "
            "is left of the last batch is dropped. Lower it."
        )
    model, processor = make_policy(train_set, args, benchmark)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {model.dtype}, bf16 autocast: {training.bf16}")
    repo_id = args.dataset_repo_id or benchmark.repo_id
    on_hub = [repo_id] if args.dataset_repo_id or not args.dataset_root else []
    base_model = args.vlm if args.preset == "256M" and not os.path.isdir(args.vlm) else None
    rates = {name: getattr(args, name) for name in PARTS} | {"weight_decay": training.weight_decay}
    if args.preset == "tiny":
        optimizer = make_muon(model, parameter_groups(model, **rates))
    else:
        optimizer = make_optimizer(model, **rates)
    return PolicyTrainer(
        model,
        training,
        data_collator=ActionDataCollator(processor),
        train_dataset=samples,
        eval_dataset=eval_set,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[EpochSetter(), EvaluateLastStep(), PushCodeFiles()],
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
            delete_checkpoints(folder)
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
        advice = "the same command with --resume_from_checkpoint last continues from there."
        parser.exit(130, interruption(folder, advice))


if __name__ == "__main__":
    main()
