"""The samples that `train.py` trains on: which demonstrations, varied how, in which batches."""

import math
from functools import partial

import numpy as np
import torch
from envs import Benchmark
from train_arguments import VARIATIONS, PolicyArguments, needs_evaluation
from training_runs import EpochDataset, naming_option
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from smolandfast import Normalizer, SmolAndFastProcessor
from smolandfast.training import JoinedChunkDatasets, LeRobotChunkDataset, download_dataset

CHUNKS_AT_ONCE = 20_000  # in memory, when all chunks of a data set are read


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
        if any(self.options.values()) and set(sizes) != {(size, size)}:
            reason = f"The data set has images of {sizes} (height, width), and only {size}x{size} can be varied"
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
        return self.vary(sample, rng, **self.options)


def variation_options(args: PolicyArguments, benchmark: Benchmark) -> dict[str, float]:
    """The options by which the benchmark's demonstrations are varied. Raises `ValueError` for an unsupported one."""
    for name in VARIATIONS:
        if getattr(args, name) and name not in benchmark.variations:
            value = getattr(args, name)
            raise ValueError(f"--{name} is {value}, which {benchmark.name} does not support. Set it to 0.")
    if args.max_angle > benchmark.largest_angle:
        expected = f"at most {benchmark.largest_angle:g} for {benchmark.name}"
        raise ValueError(f"--max_angle is {args.max_angle:g}, expected {expected}. Lower it.")
    return {name: getattr(args, name) for name in benchmark.variations}


def oversampled_instructions(args: PolicyArguments, benchmark: Benchmark) -> set[str]:
    """The instructions of the tasks in the groups of `--oversample`."""
    groups, known = args.oversample or [], list(dict.fromkeys(benchmark.groups.values()))
    for group in groups:
        if group not in known:
            raise ValueError(f"--oversample has {group!r}, expected some of {benchmark.name}'s groups {known}.")
    return {benchmark.tasks[task] for task, group in benchmark.groups.items() if group in groups}


def normalized_chunks(dataset: LeRobotChunkDataset, normalizer: Normalizer, indices: np.ndarray) -> np.ndarray:
    bins = normalizer.state_bins(dataset.states[indices])
    return normalizer.normalize_actions(dataset.action_chunks(indices), bins)


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


def read_demonstrations(
    args: PolicyArguments, training: TrainingArguments, benchmark: Benchmark
) -> tuple[LeRobotChunkDataset | JoinedChunkDatasets, LeRobotChunkDataset | None]:
    """The demonstrations to train on and those to evaluate with, which are the last of the first data set."""
    repo_id = args.dataset_repo_id or benchmark.repo_id
    if not (args.dataset_root or repo_id):
        raise ValueError(f"--dataset_root is missing, and {benchmark.name} has no data set on the Hub. Name a folder.")
    roots = args.dataset_root or [download_dataset(repo_id)]
    read = partial(
        LeRobotChunkDataset,
        chunk_size=args.chunk_size,
        frame_stride=args.frame_stride,
        cache_every=args.sample_every,
    )
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
