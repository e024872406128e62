"""Train a SmolAndFast policy on a benchmark's demonstrations with `Trainer`.

    python examples/train.py --preset tiny --dataset_root path/to/pusht --output_dir outputs/tiny
    python examples/train.py --preset 256M --output_dir outputs/256m      # lerobot/pusht from the hub
    python examples/train.py --benchmark metaworld --dataset_root outputs/metaworld --output_dir outputs/mt50

Every argument of `TrainingArguments` works too: `--max_steps`, `--per_device_train_batch_size`, `--report_to`,
`--resume_from_checkpoint last`, ... While training, the policy is played in the simulator at each evaluation; the
checkpoint with the highest success rate is kept, and saved in the output folder at the end.
"""

import argparse
import os
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from evaluate import make_predict
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from lerobot_dataset import JoinedChunkDatasets, LeRobotChunkDataset, download_dataset
from model_card import write_card
from muon import make_muon
from pusht_scenes import IMAGE_SIZE, TARGET_SYMMETRY, EpochSetter, rotate_points, turn_points, vary_scene
from rollouts import MODULES, Benchmark, get_benchmark, rollout
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Sampler
from transformers import HfArgumentParser, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments, set_seed

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
    WholeCheckpointTrainer,
    bf16_is_faster,
    make_optimizer,
    make_tiny_model,
    make_tiny_processor,
    parameter_groups,
)

COMMON = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine_with_min_lr",
    "max_grad_norm": 1.0,
    "data_seed": 42,  # the order of the samples, whatever the number of processes
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "report_to": "tensorboard",
    "metric_for_best_model": "eval_score",
    "load_best_model_at_end": True,
    "use_cpu": not torch.cuda.is_available(),
}
PRESETS = {
    "256M": COMMON
    | {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 16,
        "max_steps": 30_000,
        "warmup_steps": 1_000,
        "eval_steps": 1_000,
        "save_steps": 1_000,
        "logging_steps": 10,
    },
    "tiny": COMMON
    | {
        "vision_learning_rate": 5e-4,
        "connector_learning_rate": 3e-4,
        "text_learning_rate": 1e-3,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 96,
        "per_device_eval_batch_size": 128,
        "warmup_steps": 200,
        "logging_steps": 50,
    },
}
EMBEDDINGS = ("model.text_model.embed_tokens.weight", "lm_head.weight")


@dataclass
class PolicyArguments:
    """What is trained, on what, and how it is evaluated."""

    preset: str = field(default="tiny", metadata={"choices": sorted(PRESETS), "help": "defaults for everything below"})
    benchmark: str = field(default="pusht", metadata={"choices": sorted(MODULES), "help": "what is learnt and played"})
    dataset_root: list[str] | None = field(
        default=None, metadata={"help": "folder of a local data set, or several to learn from together"}
    )
    dataset_repo_id: str | None = field(
        default=None,
        metadata={"help": "data set on the hub, for the card; without a root it is loaded (the benchmark's)"},
    )
    vlm: str = field(
        default="HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        metadata={"help": "SmolVLM checkpoint that the 256M preset starts from: hub id or folder"},
    )
    action_tokenizer: str | None = field(
        default=None,
        metadata={"help": "FAST tokenizer: hub id or folder, e.g. physical-intelligence/fast; none: fit one"},
    )
    fast_scale: float = field(default=10.0, metadata={"help": "scale of a fitted FAST tokenizer"})
    fast_vocab_size: int = field(default=1024, metadata={"help": "vocabulary of a fitted FAST tokenizer"})
    chunk_size: int = 10
    n_action_steps: int = 5
    scale_factor: int = field(default=1, metadata={"help": "side of the pixel shuffle"})
    use_relative_actions: bool = False
    freeze_vision_tower: bool = False
    freeze_connector: bool = False
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "folder of an earlier tiny policy to learn on from, with its FAST tokenizer and its statistics, "
            "which the weights were learnt with"
        },
    )
    refit: bool = field(
        default=False,
        metadata={"help": "with init_from: take statistics and FAST tokenizer from this data"},
    )
    vision_weights: str | None = field(
        default=None,
        metadata={"help": "vision.safetensors of pretrain_vision.py or pretrain_metaworld.py, for the tiny preset"},
    )
    vision_learning_rate: float = 2e-5
    connector_learning_rate: float = 2e-4
    text_learning_rate: float = 2e-4
    min_lr_rate: float = field(default=0.05, metadata={"help": "floor of the cosine, as a share of the peak"})
    frame_stride: int = field(
        default=1, metadata={"help": "frames between a chunk's actions: 2 moves at twice the demonstrated speed"}
    )
    drop_n_last_frames: int = field(
        default=0, metadata={"help": "frames at each episode's end that no sample starts from: they teach to stop"}
    )
    sample_every: int = field(
        default=1, metadata={"help": "frames of an episode from one sample's to the next: see collect_metaworld.py"}
    )
    mirror_probability: float = field(
        default=0.0, metadata={"help": "share of samples that are mirrored about the target's axis"}
    )
    turn_probability: float = field(default=0.0, metadata={"help": "share of samples that are turned or mirrored"})
    max_shift: int = field(default=0, metadata={"help": "largest shift of image, state and actions, in image pixels"})
    max_angle: float = field(default=0.0, metadata={"help": "half of the samples are rotated by up to this, degrees"})
    reword_probability: float = field(
        default=0.0, metadata={"help": "share of samples told the task in the benchmark's other words"}
    )
    oversample: list[str] | None = field(
        default=None, metadata={"help": "groups of the benchmark's tasks whose samples come twice in an epoch"}
    )
    batch_by_length: bool = field(
        default=False, metadata={"help": "batches of samples of similar length, so that little is padded"}
    )
    held_out_episodes: int = field(default=6, metadata={"help": "last demonstrations, for the evaluation loss"})
    eval_episodes: int = field(default=20, metadata={"help": "simulator episodes of each task at each evaluation"})
    eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "tasks to play; by default those whose sentences the data set has"}
    )
    eval_seed: int = field(default=100_000, metadata={"help": "first seed of those episodes"})


class VariedDemonstrations(torch.utils.data.Dataset):
    """Demonstrations turned, shifted and reworded, another way in every epoch; without their last frames."""

    def __init__(self, dataset: LeRobotChunkDataset, args: PolicyArguments, seed: int, benchmark: Benchmark):
        self.dataset, self.seed, self.epoch, self.wordings = dataset, seed, 0, benchmark.wordings
        lasts = np.flatnonzero(np.diff(dataset.episode_index, append=-1))
        frames_to_come = np.repeat(lasts, np.diff(lasts, prepend=-1)) - np.arange(len(dataset))
        if args.sample_every < 1:
            raise ValueError(f"sample_every is {args.sample_every}, expected 1 or more. 1 starts at every frame.")
        is_start = dataset.frame_index % args.sample_every == 0
        self.indices = np.flatnonzero(is_start & (frames_to_come >= args.drop_n_last_frames))
        if len(self.indices) == 0:
            raise ValueError(f"drop_n_last_frames is {args.drop_n_last_frames}, and no episode is longer. Lower it.")
        unknown = set(args.oversample or ()) - set(benchmark.groups.values())
        if unknown:
            groups = list(dict.fromkeys(benchmark.groups.values()))
            raise ValueError(f"oversample has {unknown.pop()!r}, expected some of {benchmark.name}'s groups {groups}.")
        often = {benchmark.tasks[task] for task, group in benchmark.groups.items() if group in (args.oversample or ())}
        self.indices = np.repeat(self.indices, [1 + (dataset.text(i) in often) for i in self.indices.tolist()])
        options = ("mirror_probability", "turn_probability", "max_shift", "max_angle")
        self.variation, self.shift = {name: getattr(args, name) for name in options}, benchmark.shift
        if self.shift is not None and any(self.variation[name] for name in options if name != "max_shift"):
            raise ValueError(
                f"{benchmark.name} can only be shifted: set all of {', '.join(options)} but max_shift to 0."
            )
        self.reword_probability = args.reword_probability

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

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
        if not any(self.variation.values()):
            return sample
        if self.shift is not None:
            image, state = self.shift(sample["images"][0], sample["state"], rng, self.variation["max_shift"])
            return {**sample, "images": [image], "state": state}
        if len(sample["images"]) != 1 or sample["images"][0].shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"Only PushT's single 96x96 image can be varied: set {', '.join(self.variation)} to 0.")
        points = np.concatenate([sample["state"][None], sample["actions"]])
        image, points = vary_scene(sample["images"][0], points, rng, **self.variation)
        return {**sample, "images": [image], "state": points[0], "actions": points[1:]}


class GroupedByLength(Sampler):
    """Batches of samples of similar length, in another random order in every epoch, so that little is padded."""

    def __init__(self, dataset: VariedDemonstrations, processor: SmolAndFastProcessor, batch_size: int):
        self.dataset, self.tokenizer, self.batch_size = dataset, processor.tokenizer, batch_size
        frames, indices = dataset.dataset, dataset.indices
        bins = processor.normalizer.state_bins(frames.states[indices])
        actions = processor.normalizer.normalize_actions(frames.action_chunks()[indices], bins)
        self.num_tokens = np.array([len(ids) for ids in processor.action_tokenizer.encode_actions(actions)])

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __iter__(self):
        rng = np.random.default_rng((self.dataset.seed, self.dataset.epoch))
        order, batches = rng.permutation(len(self)), []
        texts = [self.dataset.text(i)[0] for i in range(len(self))]
        words = {text: len(self.tokenizer(text)["input_ids"]) for text in set(texts)}
        lengths = self.num_tokens + [words[text] for text in texts]
        for start in range(0, len(order), 50 * self.batch_size):
            near = order[start : start + 50 * self.batch_size]
            near = near[np.argsort(lengths[near], kind="stable")]
            batches += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        # The one batch that may be shorter stays last, where it is left out.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches := np.array(batches))
        return iter(np.concatenate([*batches, *last]).tolist())


class PolicyTrainer(WholeCheckpointTrainer):
    """A `Trainer` whose evaluation also plays the policy in the simulator, and scores it by that.

    With `push_to_hub`, the model card is ours; `card_options` are arguments of [`model_card.write_card`].
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

    def get_train_dataloader(self) -> DataLoader:
        if not self.batch_by_length:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=GroupedByLength(self.train_dataset, self.processing_class, self.args.train_batch_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

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
        write_card(
            folder,
            self.hub_model_id or folder.name,
            self.benchmark,
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            trainer_state=asdict(self.state) if has_trained else None,
            kept_step=best if self.args.load_best_model_at_end and best else self.state.global_step,
            **self.card_options,
        )

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
    dataset: LeRobotChunkDataset, args: PolicyArguments
) -> tuple[dict, FastActionTokenizer]:
    """Measure the demonstrations, and their turned copies where training turns them; fit FAST to the result.

    Rotated copies stay out of the statistics, whose limits are those of the actions that the robot is sent. With
    `init_from`, both are the earlier policy's.
    """
    if args.init_from is not None and not args.refit:
        folder = Path(args.init_from)
        statistics = read_json(folder / "processor_config.json")["statistics"]
        return statistics, FastActionTokenizer.from_pretrained(folder / "action_tokenizer")
    states, chunks = dataset.states, dataset.action_chunks()
    if args.turn_probability > 0 or args.mirror_probability > 0:
        symmetries = range(1, 8) if args.turn_probability > 0 else [TARGET_SYMMETRY]
        copies = [(turn_points(states[s::7], s), turn_points(chunks[s::7], s)) for s in symmetries]
        states = np.concatenate([states, *(copy[0] for copy in copies)])
        chunks = np.concatenate([chunks, *(copy[1] for copy in copies)])
    statistics = compute_statistics(states, chunks)
    if args.action_tokenizer is not None:
        return statistics, FastActionTokenizer.from_pretrained(args.action_tokenizer)
    if args.max_angle > 0:
        angles = (0.0, -args.max_angle, args.max_angle)
        states, chunks = (np.concatenate([rotate_points(x, angle) for angle in angles]) for x in (states, chunks))
    normalizer = Normalizer(statistics, use_relative_actions=args.use_relative_actions)
    normalized = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
    tokenizer = FastActionTokenizer.fit(normalized, args.fast_scale, args.fast_vocab_size, normalizer.action_scale)
    report = {name: " ".join(f"{x:.4g}" for x in np.atleast_1d(value)) for name, value in tokenizer.fit_report.items()}
    print("FAST:", ", ".join(f"{name} {numbers}" for name, numbers in report.items()))
    return statistics, tokenizer


def make_policy(
    dataset: LeRobotChunkDataset, args: PolicyArguments, benchmark: Benchmark, **kwargs
) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """The preset's model and processor; kwargs go to `from_pretrained` or the configuration."""
    statistics, action_tokenizer = fit_statistics_and_tokenizer(dataset, args)
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
    }
    frozen = {"freeze_vision_tower": args.freeze_vision_tower, "freeze_connector": args.freeze_connector}
    if args.preset == "256M":
        processor = SmolAndFastProcessor.from_vlm(
            args.vlm, action_tokenizer, statistics, args.scale_factor, default_task=default_task, **options
        )
        model = SmolAndFastForActionPrediction.from_pretrained(
            args.vlm,
            **processor.model_kwargs(),
            n_action_steps=args.n_action_steps,
            dtype=torch.float32,
            attn_implementation="bf16_training",
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
        weights = load_file(Path(args.init_from, "model.safetensors"))
        earlier = PreTrainedTokenizerFast.from_pretrained(args.init_from)
        earlier_actions = FastActionTokenizer.from_pretrained(Path(args.init_from, "action_tokenizer"))
        embeddings = fit_embeddings(weights, (earlier, earlier_actions), (processor.tokenizer, action_tokenizer))
        load_weights(model, weights | embeddings, args.init_from)
    if args.vision_weights is not None:
        load_weights(model, load_file(args.vision_weights), args.vision_weights)
    return model, processor


def load_weights(model: SmolAndFastForActionPrediction, weights: dict[str, torch.Tensor], source: str) -> None:
    """Replace some of the model's weights.

    Raises:
        ValueError: weights of another architecture.
    """
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name not in expected or tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source} has a weight {name} of shape {tuple(tensor.shape)}, which the tiny policy has not. Start "
                "from weights of the tiny preset, for the same image_size and scale_factor."
            )
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
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="tiny")
    first.add_argument("--benchmark", default="pusht")
    chosen = first.parse_known_args(argv)[0]
    preset = PRESETS.get(chosen.preset, {})
    if chosen.preset == "tiny" and chosen.benchmark in MODULES:
        preset = preset | get_benchmark(chosen.benchmark).preset
    parser = HfArgumentParser((PolicyArguments, TrainingArguments), description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(**preset, bf16=bf16_is_faster())
    args, training = parser.parse_args_into_dataclasses(argv)
    training.lr_scheduler_kwargs = {"min_lr_rate": args.min_lr_rate}
    return args, training


def main(argv: list[str] | None = None) -> None:
    args, training = parse_args(argv)
    set_seed(training.seed)
    benchmark = get_benchmark(args.benchmark)
    repo_id = args.dataset_repo_id or benchmark.repo_id
    root, *more = args.dataset_root or [download_dataset(repo_id)]
    read = partial(LeRobotChunkDataset, chunk_size=args.chunk_size, frame_stride=args.frame_stride)
    held_out = read(root, episodes=[0]).info["total_episodes"] - args.held_out_episodes
    train_set = read(root, episodes=range(held_out))
    if more:
        train_set = JoinedChunkDatasets([train_set, *map(read, more)])
    model, processor = make_policy(train_set, args, benchmark)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {model.dtype}, bf16 autocast: {training.bf16}")
    on_hub = [repo_id] if args.dataset_repo_id or not args.dataset_root else []
    base_model = args.vlm if args.preset == "256M" and not os.path.isdir(args.vlm) else None
    parts = ("vision_learning_rate", "connector_learning_rate", "text_learning_rate")
    rates = {name: getattr(args, name) for name in parts} | {"weight_decay": training.weight_decay}
    if args.preset == "tiny":
        optimizer = make_muon(model, parameter_groups(model, **rates))
    else:
        optimizer = make_optimizer(model, **rates)
    trainer = PolicyTrainer(
        model,
        training,
        data_collator=ActionDataCollator(processor),
        train_dataset=VariedDemonstrations(train_set, args, training.seed, benchmark),
        eval_dataset=read(root, episodes=range(held_out, held_out + args.held_out_episodes)),
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[EpochSetter(), EvaluateLastStep(), PushCodeFiles()],
        benchmark=benchmark,
        eval_tasks=args.eval_tasks or [t for t, sentence in benchmark.tasks.items() if sentence in train_set.tasks],
        eval_seeds=range(args.eval_seed, args.eval_seed + args.eval_episodes),
        card_options={"datasets": on_hub, "base_model": base_model},
        batch_by_length=args.batch_by_length,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Best checkpoint: {trainer.state.best_model_checkpoint}, saved in {Path(training.output_dir)}")


if __name__ == "__main__":
    main()
