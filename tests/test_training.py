"""Training: what `examples/train.py` does, on made-up demonstrations and on the real ones."""

import dataclasses
import fnmatch
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASK, make_processor
from envs.pusht import BENCHMARK as PUSHT
from envs.pusht.pretraining import make_labels
from envs.pusht.scenes import TARGET_SYMMETRY, render_scenes, turn_image, turn_points, vary_scene
from evaluate import load_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain_vision import OUTPUTS
from pretrain_vision import main as pretrain_vision
from safetensors.torch import load_file, save
from test_checkpoint_safety import write_demonstrations
from train import PolicyTrainer, parse_args
from train import main as train
from train_arguments import PolicyArguments
from train_data import GroupedByLength, VariedDemonstrations
from train_policy import fit_embeddings, make_policy
from train_policy import fit_statistics_and_tokenizer as fit
from training_runs import EpochSetter
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from smolandfast import FastActionTokenizer, SmolAndFastProcessor
from smolandfast.prompt_smolandfast import PROMPT
from smolandfast.training import (
    ActionDataCollator,
    AtomicCheckpointTrainer,
    LeRobotChunkDataset,
    make_muon,
    make_optimizer,
    make_tiny_model,
    parameter_groups,
)
from smolandfast.training.muon import Muon
from smolandfast.training.tiny import make_text_tokenizer

ROOT = Path(__file__).parents[1]
ROLLOUTS = ROOT / "tests/data/pusht_rollouts"
WORDS_TOKENIZER = make_text_tokenizer(["Open a door", "Close a box"], 256, 8, split_words=True)


class Demonstrations(torch.utils.data.Dataset):
    """Made-up samples whose images depend on the epoch, as varied demonstrations do."""

    def __init__(self, states, chunks):
        self.states, self.chunks, self.epoch = states[:24], chunks[:24], 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.states)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.epoch, i))
        image = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        return {"images": [image], "text": TASK, "state": self.states[i], "actions": self.chunks[i]}


def make_trainer(processor, model, demonstrations, folder, optimizer=None, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=5,
        logging_steps=1,
        save_steps=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model,
        arguments,
        data_collator=ActionDataCollator(processor),
        train_dataset=Demonstrations(*demonstrations),
        processing_class=processor,
        optimizers=(optimizer or make_optimizer(model), None),
        callbacks=[EpochSetter()],
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def adamw(model):
    return make_optimizer(model)


def muon(model):
    return make_muon(model, parameter_groups(model))


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(make, processor, model, demonstrations, tmp_path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = make_trainer(processor, model, demonstrations, tmp_path, make(model))
    whole.train()
    model.load_state_dict(weights)
    resumed = make_trainer(processor, model, demonstrations, tmp_path / "again", make(model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(losses(whole)) == {1, 2, 3, 4, 5}
    assert losses(resumed) == losses(whole)
    assert SmolAndFastProcessor.from_pretrained(tmp_path / "checkpoint-4")


def test_gradient_checkpointing_in_trainer_has_the_same_losses(processor, model, demonstrations, tmp_path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for checkpointing in (False, True):
        model.load_state_dict(weights)
        options = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
        trainer = make_trainer(processor, model, demonstrations, tmp_path / str(checkpointing), **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_each_part_has_its_learning_rate_and_frozen_parts_have_none(model):
    model.model.vision_model.requires_grad_(False)
    optimizer = make_optimizer(model, 1e-5, 2e-4, 3e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = None if "vision_model" in name else 2e-4 if "connector" in name else 3e-4
        assert rates.get(id(parameter)) == expected
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_muon_takes_the_layers_matrices_and_follows_the_schedule(model):
    optimizer = muon(model)
    by_muon = {id(p) for group in optimizer.optimizers["muon"].param_groups for p in group["params"]}
    taken = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        assert (id(parameter) in by_muon) == (".layers." in name and parameter.ndim == 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = {name: part.param_groups[0]["lr"] for name, part in optimizer.optimizers.items()}
    optimizer.step()
    schedule.step()
    assert {name: part.param_groups[0]["lr"] for name, part in optimizer.optimizers.items()} == {
        name: rate / 2 for name, rate in before.items()
    }


def test_muon_is_pytorchs_and_in_fp32_much_the_same():
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(16, 48)]
    copies = [[torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(3)]
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [torch.optim.Muon(copies[0], adjust_lr_fn="match_rms_adamw", **options)]
    optimizers += [
        Muon(c, **options, dtype=t) for c, t in zip(copies[1:], (torch.bfloat16, torch.float32), strict=True)
    ]
    for _ in range(3):
        gradients = [torch.randn_like(matrix) for matrix in start]
        for parameters, optimizer in zip(copies, optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for stock, same, exact, before in zip(*copies, start, strict=True):
        if torch.__version__.startswith("2.13."):  # another release may round in another order
            torch.testing.assert_close(same, stock, rtol=0, atol=0)
        for ours in (same, exact):
            assert (ours - stock).norm() < 0.03 * (stock - before).norm()


def test_batches_hold_samples_of_similar_length_another_way_in_every_epoch():
    dataset = LeRobotChunkDataset(ROOT / "tests/data/pusht_rollouts", 16)
    args, _ = parse_args(["--output_dir", "unused", "--reword_probability", "0.5"])
    _, processor = make_policy(dataset, args, PUSHT)
    samples = VariedDemonstrations(dataset, args, 0, PUSHT)
    sampler, order = GroupedByLength(samples, processor, 4), list(range(len(samples)))
    epochs = []
    for epoch in range(2):
        samples.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == order and list(sampler) == epochs[-1]
    assert epochs[0] != epochs[1]

    def padding(order):
        """Of batches of four, as the model sees them, in the epoch that the samples are in."""
        columns = {name: [samples.dataset[i][name] for i in samples.indices[order]] for name in ("state", "actions")}
        texts = [samples.text(i)[0] for i in order]
        assert len(set(texts)) > 1
        inputs = processor(images=[[dataset.image(0)]] * len(order), text=texts, **columns)
        lengths = inputs["attention_mask"].sum(dim=1)[: len(order) // 4 * 4].reshape(-1, 4)
        return (lengths.amax(dim=1, keepdim=True) - lengths).float().mean()

    assert padding(epochs[1]) < padding(order) / 2


def test_an_earlier_policy_is_learnt_on_from_with_its_statistics_and_tokens(tmp_path):
    dataset = LeRobotChunkDataset(ROOT / "tests/data/pusht_rollouts", 16)
    args, _ = parse_args(["--output_dir", "unused", "--init_from", str(ROOT / "checkpoints/pusht-tiny")])
    earlier_model, earlier = load_policy(ROOT / "checkpoints/pusht-tiny", dtype=torch.float32)
    model, processor = make_policy(dataset, args, PUSHT)
    assert processor.statistics == earlier.statistics and processor.image_keys == ["observation.image"]
    assert processor.action_tokenizer.get_vocab() == earlier.action_tokenizer.get_vocab()
    state, images = [dataset.states[0]], [[dataset.image(0)]]
    with torch.no_grad():
        scores = [
            one.eval()(**part(images, [TASK], state)).logits[0, -1, one.action_grammar.band]
            for one, part in ((earlier_model, earlier), (model, processor))
        ]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
    args.chunk_size, args.n_action_steps = earlier.chunk_size // 2, 1
    strided = LeRobotChunkDataset(ROOT / "tests/data/pusht_rollouts", args.chunk_size, frame_stride=2)
    half = make_policy(strided, args, PUSHT)[1]
    assert half.statistics == earlier.statistics
    assert half.action_tokenizer.get_vocab() == earlier.action_tokenizer.get_vocab()
    assert half.action_tokenizer.scale == pytest.approx(earlier.action_tokenizer.scale * 2**0.5)
    assert half.action_tokenizer.fit_report["num_chunks"] == len(strided)
    args.chunk_size, args.scale_factor = 16, 2
    with pytest.raises(ValueError, match="has a weight .* of shape .* which the tiny policy does not have"):
        make_policy(dataset, args, PUSHT)


def test_samples_start_at_every_nth_frame_and_oversampled_groups_come_twice():
    dataset = LeRobotChunkDataset(ROOT / "tests/data/pusht_rollouts", 16)
    samples = VariedDemonstrations(dataset, PolicyArguments(sample_every=4), 0, PUSHT)
    assert set(dataset.frame_index[samples.indices] % 4) == {0}
    groups = dataclasses.replace(PUSHT, tasks={"pusht": dataset.tasks[0]}, groups={"pusht": "hard"})
    twice = VariedDemonstrations(dataset, PolicyArguments(sample_every=4, oversample=["hard"]), 0, groups)
    assert sorted(twice.indices) == sorted([*samples.indices, *samples.indices])
    with pytest.raises(ValueError, match=r"oversample has 'harder', expected some of pusht's groups \['hard'\]"):
        VariedDemonstrations(dataset, PolicyArguments(oversample=["harder"]), 0, groups)


def test_embeddings_move_to_another_vocabulary_token_by_token():
    chunks = np.random.default_rng(0).normal(size=(50, 4, 1)).clip(-1, 1)
    coarse, fine = (FastActionTokenizer.fit(chunks, scale, 64) for scale in (3.0, 4.0))
    earlier = make_text_tokenizer(["Open a door", "Open a window"], 16, len(coarse))
    later = make_text_tokenizer(["Open a door", "Close a box"], 16, len(fine), split_words=True)
    name = "model.text_model.embed_tokens.weight"
    rows = torch.randn(earlier.vocab_size, 3)
    fitted = fit_embeddings({name: rows, "other": rows}, (earlier, coarse), (later, fine))
    assert set(fitted) == {name} and fitted[name].shape == (later.vocab_size, 3)

    def ids_of(tokenizer, *tokens):
        return tokenizer.convert_tokens_to_ids(tokens)

    for token in ("<image>", "o"):
        torch.testing.assert_close(fitted[name][ids_of(later, token)], rows[ids_of(earlier, token)])
    pieces = earlier(" 12")["input_ids"]
    assert len(pieces) == 2 and len(new := later(" 12")["input_ids"]) == 1
    torch.testing.assert_close(fitted[name][new[0]], rows[pieces].mean(dim=0))
    for k in range(len(fine)):  # as the earlier tokenizer writes the same coefficients
        pieces = ids_of(earlier, *(f"<fast_{i}>" for i in coarse.encode_coefficients([fine.token_coefficients(k)])[0]))
        torch.testing.assert_close(fitted[name][ids_of(later, f"<fast_{k}>")[0]], rows[pieces].mean(dim=0))
    same = fit_embeddings({name: rows}, (earlier, coarse), (earlier, coarse))
    assert torch.equal(same[name], rows)


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_a_vocabulary_of_words_reads_any_sentence_and_each_bin_is_a_token(sentence, bins):
    prompt = PROMPT.format(task=sentence, bins=" ".join(map(str, bins)), prefix="")
    ids = WORDS_TOKENIZER(prompt)["input_ids"]
    assert WORDS_TOKENIZER.decode(ids) == prompt
    tail = len(bins) + 2  # the bins with what stands before and behind them
    assert WORDS_TOKENIZER.decode(ids[-tail:]) == f", State: {' '.join(map(str, bins))}, Action: "


def find_agent(image):
    """Where the agent's blue disc is, in the simulator's coordinates."""
    rows, columns = (image[..., 2].astype(int) - image[..., 0] > 100).nonzero()
    return (np.array([columns.mean(), rows.mean()]) + 0.5) * 512 / 96


def test_turning_points_follows_the_image():
    images, points = render_scenes(2, seed=0)
    for symmetry in range(8):
        turned = turn_image(images[0], symmetry)
        assert np.linalg.norm(find_agent(turned) - turn_points(points[0, 0], symmetry)) < 6


def test_a_mirrored_scene_has_the_target_where_it_was():
    images, points = render_scenes(20, seed=2)
    np.testing.assert_allclose(turn_points(points[:, 3:], TARGET_SYMMETRY), points[:, 3:], atol=0.01)
    is_target = [np.abs(image.astype(int) - (144, 238, 144)).max(axis=2) < 8 for image in images]  # light green
    mirrored = [turn_image(mask, TARGET_SYMMETRY) for mask in is_target]
    seen = np.logical_or.reduce(is_target), np.logical_or.reduce(mirrored)  # in some scenes the T lies upon it
    assert (seen[0] & seen[1]).sum() > 0.8 * (seen[0] | seen[1]).sum() > 100

    image, moved = vary_scene(images[0], points[0], np.random.default_rng(0), 0.0, 0, mirror_probability=1.0)
    assert np.linalg.norm(find_agent(image) - moved[0]) < 6 and not np.array_equal(image, images[0])
    np.testing.assert_allclose(moved[3:], points[0, 3:], atol=0.01)


def test_varied_points_follow_the_image():
    images, points = render_scenes(1, seed=0)
    for seed in range(40):
        image, moved = vary_scene(images[0], points[0], np.random.default_rng(seed), 0.5, max_shift=3, max_angle=30)
        assert np.linalg.norm(find_agent(image) - moved[0]) < 6
        # The T and its target stay as large as they are.
        np.testing.assert_allclose(np.linalg.norm(moved[2::2] - moved[1::2], axis=1), 105, atol=0.01)


def test_no_sample_starts_in_the_last_frames_of_an_episode():
    dataset = LeRobotChunkDataset(ROLLOUTS, 16, range(3))
    lengths = np.bincount(dataset.episode_index)
    whole, cut = (VariedDemonstrations(dataset, PolicyArguments(drop_n_last_frames=n), 0, PUSHT) for n in (0, 8))
    assert len(whole) == len(dataset) and len(cut) == len(dataset) - 3 * 8
    first_of_second = lengths[0] - 8
    for i, frame in ((first_of_second - 1, lengths[0] - 9), (first_of_second, lengths[0])):
        np.testing.assert_array_equal(cut[i]["actions"], dataset[frame]["actions"])
    with pytest.raises(ValueError, match="drop_n_last_frames is 9999"):
        VariedDemonstrations(dataset, PolicyArguments(drop_n_last_frames=9999), 0, PUSHT)


def test_labels_hold_the_points_and_the_harmonics_of_the_angle():
    points = np.array([[256, 0], [100, 100], [100, 205], [0, 0], [512, 512]], dtype=np.float32)
    labels = make_labels(points)  # the stem points down: 90 degrees
    np.testing.assert_allclose(labels[:2], [0, -1], atol=1e-6)
    np.testing.assert_allclose(labels[10:], [0, 1, -1, 0, 0, -1, 1, 0], atol=1e-6)


def test_a_scene_without_variation_stays_as_it_is():
    images, points = render_scenes(1, seed=1)
    image, same = vary_scene(images[0], points[0], np.random.default_rng(0), turn_probability=0.0, max_shift=0)
    assert np.array_equal(image, images[0]) and np.array_equal(same, points[0])


def run_training(arguments, processes=1):
    # Without MPI, `accelerate launch --cpu` starts one process only; its multi-GPU launcher starts any number of them.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "examples/train.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def common_arguments(pusht_root, folder, **options):
    options = {
        "preset": "tiny",
        "dataset_root": pusht_root,
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 4,
        "eval_episodes": 1,
        "held_out_episodes": 1,
        "bf16": "False",
        "report_to": "none",
    } | options
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def read_losses(folder):
    state = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    history = json.loads(state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], history


@pytest.mark.slow
def test_the_script_trains_evaluates_and_keeps_the_best(pusht_root, tmp_path):
    train(common_arguments(pusht_root, tmp_path))
    found, history = read_losses(tmp_path)
    assert len(found) == 4 and all(map(math.isfinite, found))
    assert any("eval_pc_success" in entry for entry in history)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "processor_config.json").is_file()


def test_weights_in_bf16_are_refused_as_too_coarse_to_train(model):
    with pytest.raises(ValueError, match="too coarse.*dtype=torch.float32"):
        make_optimizer(model.to(torch.bfloat16))


@pytest.mark.slow
def test_the_256m_preset_starts_from_any_smolvlm_folder(pusht_root, vlm, tmp_path):
    options = {"preset": "256M", "vlm": vlm, "scale_factor": 2, "gradient_accumulation_steps": 1}
    batch = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 8, "max_steps": 2, "save_steps": 2}
    train(common_arguments(pusht_root, tmp_path / "run", **options, **batch, eval_steps=2, warmup_steps=1))
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/model.safetensors").values()} == {torch.float32}
    found, history = read_losses(tmp_path / "run")
    assert len(found) == 2 and all(map(math.isfinite, found))
    assert any("eval_avg_max_reward" in entry for entry in history)


# What the command line says


def refusal(capsys, function, *arguments):
    """The error line that a script's arguments end in."""
    with pytest.raises(SystemExit) as end:
        function([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[-1].startswith("train.py: error: ")
    return lines[-1]


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_scheduler_of_trainer_works(kind, model, tmp_path):
    _, arguments = parse_args(["--output_dir", str(tmp_path), "--lr_scheduler_type", kind, "--bf16", "False"])
    for optimizer in (muon(model), adamw(model)):
        scheduler = get_scheduler(kind, optimizer, 1, 10, arguments.lr_scheduler_kwargs)
        peak = [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step(*([1.0] if kind in ("reduce_lr_on_plateau", "greedy") else []))
        assert len(peak) == len(optimizer.param_groups)
    if kind in ("reduce_lr_on_plateau", "greedy"):
        assert arguments.lr_scheduler_kwargs["mode"] == "max"  # of the score


def test_scheduler_options_are_taken_and_their_contradictions_refused(capsys, tmp_path):
    start = ["--output_dir", str(tmp_path), "--bf16", "False"]
    given = [*start, "--lr_scheduler_kwargs", '{"min_lr_rate": 0.5}']
    assert parse_args(given)[1].lr_scheduler_kwargs == {"min_lr_rate": 0.5}
    assert parse_args([*start, "--min_lr_rate", "0.2"])[1].lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert "--min_lr_rate" in refusal(capsys, parse_args, *given, "--min_lr_rate", 0.1)
    linear = [*start, "--lr_scheduler_type", "linear"]
    assert "--min_lr_rate" in refusal(capsys, parse_args, *linear, "--min_lr_rate", 0.1)
    assert "--lr_scheduler_kwargs" in refusal(capsys, parse_args, *linear, *given[-2:])
    constant = [*start, "--lr_scheduler_type", "constant", *given[-2:]]
    assert "--lr_scheduler_kwargs" in refusal(capsys, parse_args, *constant)


@pytest.mark.parametrize(
    "given",
    [
        "--learning_rate 1e-3",
        "--learning-rate 5e-05",  # the default, but given
        "--optim sgd",
        "--optim_args a=1",
        "--adam_beta1 0.5",
        "--adam_beta2 0.5",
        "--adam_epsilon 1",
        "--use_liger_kernel True",
        "--do_predict True",
        "--train_sampling_strategy group_by_length",
        "--length_column_name size",
        "--label_names labels",
        "--remove_unused_columns True",
        "--vlm somewhere",
        "--refit",
        "--preset 256M --vision_weights a",
        "--preset 256M --init_from a",
        "--init_from a --fast_scale 3",
        "--init_from a --action_tokenizer a",
        "--action_tokenizer a --fast_vocab_size 9",
        "--overwrite_output_dir --resume_from_checkpoint last",
        "--chunk_size 0",
        "--n_action_steps 17",
        "--n_action_steps 0",
        "--frame_stride 0",
        "--sample_every 0",
        "--drop_n_last_frames -1",
        "--mirror_probability 1.5",
        "--reword_probability nan",
        "--max_angle 181",
        "--fast_scale 0",
        "--text_learning_rate inf",
        "--held_out_episodes 0",
        "--eval_episodes 0",
        "--per_device_train_batch_size 0",
        "--seed -1",
        "--data_seed -1",
        "--weight_decay -1",
        "--dataloader_num_workers -1",
        "--dataloader_persistent_workers True",
        "--label_smoothing_factor 2",
        "--label_smoothing_factor 1",
        "--max_steps 0",
        "--max_steps -5",
        "--num_train_epochs 0",
        "--warmup_steps nan",
        "--lr_scheduler_kwargs [1]",
        "--lr_scheduler_kwargs notjson",
        "--lr_scheduler_kwargs {bad",
        "--text_learning_rate 0 --vision_learning_rate 0 --connector_learning_rate 0",
        "--text_learning_rate 0 --freeze_vision_tower --freeze_connector",
        "--metric_for_best_model accuracy",
        "--benchmark chess",
        "--max_delay 8",
        "--eval_strategy no --load_best_model_at_end True",
    ],
)
def test_options_without_effect_or_out_of_range_are_refused_by_name(given, capsys, tmp_path):
    line = refusal(capsys, parse_args, "--output_dir", tmp_path, "--bf16", "False", *given.split())
    named = [word.replace("-", "_").lstrip("_") for word in given.split() if word.startswith("--")]
    assert any(name in line for name in named)


def test_options_that_the_preset_would_override_win(tmp_path):
    start = ["--output_dir", str(tmp_path), "--bf16", "False"]
    assert parse_args([*start, "--num_train_epochs", "2"])[1].max_steps == -1
    assert parse_args([*start, "--num_train_epochs", "2", "--max_steps", "7"])[1].max_steps == 7
    assert parse_args([*start, "--batch_by_length"])[1].dataloader_drop_last is True
    given = [*start, "--batch_by_length", "--dataloader_drop_last", "False"]
    assert parse_args(given)[1].dataloader_drop_last is False


def test_the_best_metric_is_one_that_the_evaluation_has(tmp_path):
    for name in ("eval_score", "loss", "eval_avg_max_reward"):
        arguments = ["--output_dir", str(tmp_path), "--bf16", "False", "--metric_for_best_model", name]
        assert parse_args(arguments)[1].metric_for_best_model == name


def short(dataset, folder, *more):
    """Arguments of a training of one step, without its evaluation."""
    options = "--max_steps 1 --save_steps 1 --per_device_train_batch_size 2 --held_out_episodes 1 --bf16 False "
    options += "--eval_strategy no --report_to none --reword_probability 0"
    paths = ["--dataset_root", str(dataset), "--output_dir", str(folder)]
    return [*paths, *options.split(), *map(str, more)]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_output_folder_that_holds_anything_is_refused(capsys, own_cache, narrow_preset, tmp_path):
    folder, notes = tmp_path / "run", tmp_path / "run/notes.txt"
    train(short(ROLLOUTS, folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    missing = tmp_path / "nowhere"  # the folder is looked at before the data
    line = refusal(capsys, train, *short(missing, folder))
    assert "--output_dir" in line and "--resume_from_checkpoint last" in line and "--overwrite_output_dir" in line
    other = tmp_path / "other/checkpoint-1"
    shutil.copytree(folder / "checkpoint-1", other)
    assert "--resume_from_checkpoint" in refusal(
        capsys, train, *short(missing, folder, "--resume_from_checkpoint", other)
    )
    assert "--resume_from_checkpoint" in refusal(
        capsys, train, *short(missing, folder, "--resume_from_checkpoint", folder)
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    train([*short(ROLLOUTS, folder, "--resume_from_checkpoint", "last"), "--max_steps", "2"])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    notes.write_text("mine")
    (folder / "checkpoint-mine").mkdir()
    refusal(capsys, train, *short(missing, folder, "--overwrite_output_dir"))
    assert (folder / "checkpoint-2").is_dir()  # nothing is deleted for a command that is wrong
    capsys.readouterr()
    train(short(ROLLOUTS, folder, "--overwrite_output_dir"))
    printed = capsys.readouterr().out
    assert f"deleting {folder / 'checkpoint-1'}" in printed and f"deleting {folder / 'checkpoint-2'}" in printed
    assert notes.read_text() == "mine"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-mine"]

    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    line = refusal(capsys, train, *short(missing, folder, "--resume_from_checkpoint", "last"))
    assert "model.safetensors" in line and "no checkpoint" in line
    line = refusal(capsys, train, *short(missing, notes))
    assert "--output_dir" in line and "is a file" in line


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        ({"state_dim": 3}, "", "state_dim is 3"),
        ({"action_dim": 3}, "", "action_dim is 3"),
        ({"cameras": 2}, "", "number of cameras is 2"),
        ({"size": 64}, "", "is (64, 64)"),
        ({"fps": 20}, "", "fps is 20"),
        ({"fps": 30}, "--frame_stride 2", "fps is 30"),
        ({"task": "Stack the cups"}, "--reword_probability 0.5", "--reword_probability"),
        ({"task": "Stack the cups"}, "--eval_strategy steps --eval_steps 1", "--eval_tasks"),
        ({}, "--eval_tasks chess", "--eval_tasks has 'chess'"),
        ({}, "--fast_vocab_size 2", "--fast_vocab_size"),
        ({}, "--fast_scale 1e300", "--fast_scale"),
        ({}, "--held_out_episodes 3", "--held_out_episodes is 3"),
        ({}, "--oversample hard", "--oversample has 'hard'"),
        ({}, "--drop_n_last_frames 20", "--drop_n_last_frames is 20"),
        ({}, "--vision_weights nowhere", "--vision_weights: nowhere"),
        ({}, f"--vision_weights {ROLLOUTS}/meta/info.json", "--vision_weights"),
        ({}, "--init_from nowhere", "--init_from: nowhere"),
        ({}, f"--init_from {ROLLOUTS}", "--init_from"),
        ({}, f"--init_from {ROOT}/checkpoints/metaworld-tiny", "--init_from: state_dim"),
        ({}, f"--init_from {ROOT}/checkpoints/pusht-tiny --use_relative_actions False", "use_relative_actions"),
        ({}, f"--action_tokenizer {ROLLOUTS}", "--action_tokenizer: "),
        ({}, "--dataloader_drop_last True --per_device_train_batch_size 99", "--per_device_train_batch_size"),
        ({}, "--batch_by_length --per_device_train_batch_size 99", "--per_device_train_batch_size"),
        ({}, f"--preset 256M --vlm {ROLLOUTS}", "--vlm: "),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_step(data, options, named, capsys, own_cache, tmp_path):
    dataset = write_demonstrations(tmp_path / "data", **data)
    assert named in refusal(capsys, train, *short(dataset, tmp_path / "run"), *options.split())
    assert list((tmp_path / "run").iterdir()) == []


def test_weights_split_over_processes_are_refused(capsys, own_cache, narrow_preset, model, tmp_path, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def create_sharded(trainer):  # without a GPU, accelerate ignores FSDP
        create(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_sharded)
    assert "FSDP" in refusal(capsys, train, *short(ROLLOUTS, tmp_path / "run"))
    arguments = TrainingArguments(str(tmp_path / "other"), use_cpu=True, report_to="none")
    trainer = PolicyTrainer(
        model, arguments, benchmark=None, eval_tasks=["pusht"], eval_seeds=range(1), card_options={}
    )
    with pytest.raises(ValueError, match="FSDP and ZeRO-3.*Train with DDP"):
        trainer.evaluate(Demonstrations([], []))


def test_data_that_cannot_be_read_are_an_error_line(capsys, own_cache, tmp_path):
    missing = tmp_path / "nowhere"
    line = refusal(capsys, train, *short(missing, tmp_path / "run"))
    assert f"--dataset_root {missing}: root is {missing}, which is not a folder" in line
    (tmp_path / "empty").mkdir()
    assert "--dataset_root" in refusal(capsys, train, *short(tmp_path / "empty", tmp_path / "run"))
    more = ["--dataset_root", ROLLOUTS, missing]
    assert f"--dataset_root {missing}" in refusal(capsys, train, *short(ROLLOUTS, tmp_path / "run"), *more)


def test_several_data_sets_are_trained_on_together(own_cache, narrow_preset, tmp_path):
    dataset = write_demonstrations(tmp_path / "data")
    train(["--dataset_root", str(ROLLOUTS), str(dataset), *short(dataset, tmp_path / "run")[2:]])
    assert len(SmolAndFastProcessor.from_pretrained(tmp_path / "run").action_names) == 2  # those of the first


def test_resuming_with_other_data_or_options_is_refused(capsys, own_cache, narrow_preset, tmp_path):
    folder = tmp_path / "run"
    train(short(ROLLOUTS, folder))
    before = {path: path.read_bytes() for path in folder.rglob("checkpoint-*/*") if path.is_file()}
    more = ["--resume_from_checkpoint", "last", "--max_steps", "2"]
    for other in ("--fast_scale 5", f"--dataset_root {write_demonstrations(tmp_path / 'data')}"):
        line = refusal(capsys, train, *short(ROLLOUTS, folder, *more), *other.split())
        assert "checkpoint-1" in line and "processor_fingerprint" in line and "--init_from" in line
    assert {path: path.read_bytes() for path in folder.rglob("checkpoint-*/*") if path.is_file()} == before


def test_a_complete_training_is_resumed_without_a_step_and_saved(own_cache, narrow_preset, tmp_path):
    folder = tmp_path / "run"
    train(short(ROLLOUTS, folder))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()  # as if killed before the last save
    train(short(ROLLOUTS, folder, "--resume_from_checkpoint", "last"))
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(("content", "is_training"), [("notes.txt", False), ("runs/a", True)])
def test_only_a_folder_of_a_training_is_resumed_from(content, is_training, capsys, own_cache, tmp_path):
    path = tmp_path / "run" / content
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    arguments = short(tmp_path / "nowhere", tmp_path / "run", "--resume_from_checkpoint", "last")
    assert ("--output_dir" in refusal(capsys, train, *arguments)) is not is_training


def test_an_earlier_policys_bins_and_normalization_are_kept(own_cache, tmp_path):
    earlier = shutil.copytree(ROOT / "checkpoints/pusht-tiny", tmp_path / "earlier")
    config = json.loads((earlier / "processor_config.json").read_text())
    assert {"normalization", "n_state_bins"} <= set(config)
    config["normalization"] = "quantiles"
    (earlier / "processor_config.json").write_text(json.dumps(config))
    dataset = LeRobotChunkDataset(ROLLOUTS, 16)
    for refit in ([], ["--refit"]):
        args, _ = parse_args(["--output_dir", "unused", "--bf16", "False", "--init_from", str(earlier), *refit])
        normalizer = make_policy(dataset, args, PUSHT)[1].normalizer
        assert normalizer.normalized_limit == 2 and normalizer.n_state_bins == config["n_state_bins"]


def test_demonstrations_at_twice_the_rate_are_strided(own_cache, narrow_preset, tmp_path):
    dataset = write_demonstrations(tmp_path / "data", fps=20)
    train(short(dataset, tmp_path / "run", "--frame_stride", "2", "--held_out_episodes", "0"))
    assert (tmp_path / "run/model.safetensors").is_file()


def test_an_interrupted_training_says_in_one_line_what_is_kept(
    capsys, monkeypatch, own_cache, narrow_preset, tmp_path
):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for at, kept in (("VariedDemonstrations", "no weights are kept"), ("PolicyTrainer.save_model", "checkpoint-")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            if at == "VariedDemonstrations":
                patch.setattr("train.VariedDemonstrations", interrupt)
            else:
                patch.setattr("train.EvaluateLastStep.on_train_end", interrupt)
            capsys.readouterr()
            train(short(ROLLOUTS, tmp_path / "run"))
        error = capsys.readouterr().err
        assert end.value.code == 130 and "Traceback" not in error and kept in error.splitlines()[-1]
    assert "--resume_from_checkpoint last" in error


def test_persistent_workers_vary_the_samples_in_every_epoch(own_cache):
    dataset = LeRobotChunkDataset(ROLLOUTS, 16, [0])
    arguments = PolicyArguments(sample_every=40, max_shift=8, reword_probability=0.5)
    samples = VariedDemonstrations(dataset, arguments, 0, PUSHT)
    options = {"batch_size": None, "num_workers": 1, "persistent_workers": True}
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(samples, **options, multiprocessing_context=context)
        seen = []
        for epoch in range(2):
            samples.set_epoch(epoch)
            found = list(loader)
            for i, sample in enumerate(found):
                for name in ("images", "actions"):
                    np.testing.assert_array_equal(sample[name], samples[i][name])
            seen.append([sample["actions"] for sample in found])
        assert not np.array_equal(seen[0], seen[1])


def test_statistics_are_of_all_chunks_and_the_tokenizer_is_fitted_to_some(monkeypatch, own_cache):
    dataset = LeRobotChunkDataset(ROLLOUTS, 16)
    args, _ = parse_args(["--output_dir", "unused", "--bf16", "False", "--max_angle", "0"])
    whole, tokenizer = fit(dataset, args, PUSHT)
    sizes, take = [], dataset.action_chunks

    def counted(indices=None):
        sizes.append(len(indices))
        return take(indices)

    dataset.action_chunks = counted
    monkeypatch.setattr("train_policy.MAX_FITTED_CHUNKS", 300)
    for module in ("train_data", "train_policy"):
        monkeypatch.setattr(f"{module}.CHUNKS_AT_ONCE", 100)
    some, fitted = fit(dataset, args, PUSHT)
    for name in ("observation.state", "action", "relative_action"):
        for limit in ("min", "max"):
            assert some[name][limit] == whole[name][limit]
    assert sizes[0] == 300 and max(sizes[1:]) == 100 and sum(sizes[1:]) >= len(dataset)
    assert fitted.get_vocab() != tokenizer.get_vocab()
    _, processor = make_policy(dataset, args, PUSHT)
    sizes.clear()
    samples = VariedDemonstrations(dataset, args, 0, PUSHT)
    lengths = GroupedByLength(samples, processor, 4).num_tokens
    assert max(sizes) == 100 and sum(sizes) == len(samples)
    monkeypatch.undo()
    np.testing.assert_array_equal(GroupedByLength(samples, processor, 4).num_tokens, lengths)


def test_data_seed_is_the_order_of_samples_grouped_by_length(own_cache):
    dataset = LeRobotChunkDataset(ROLLOUTS, 16)
    args, _ = parse_args(["--output_dir", "unused", "--bf16", "False"])
    _, processor = make_policy(dataset, args, PUSHT)
    samples = VariedDemonstrations(dataset, args, 0, PUSHT)
    first, same, other = (list(GroupedByLength(samples, processor, 4, seed)) for seed in (None, 0, 1))
    assert first == same != other


def run_pretraining(monkeypatch, **options):
    """Renders in this process: starting two takes longer. `test_docs.py` runs the command as it is."""
    monkeypatch.setattr("envs.pusht.pretraining.map_in_processes", lambda count, render, seeds: map(render, seeds))
    options = {"num_scenes": 24, "max_steps": 2, "batch_size": 4, **options}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["pretrain_vision.py", *arguments])
    pretrain_vision()


def test_vision_pretraining_writes_weights_that_the_policy_takes(narrow_preset, demonstrations, tmp_path, monkeypatch):
    run_pretraining(monkeypatch, output_dir=tmp_path)
    model = make_tiny_model(make_processor(demonstrations), n_action_steps=4)
    result = model.load_state_dict(load_file(tmp_path / "vision.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert all("text_model" in name or "lm_head" in name for name in result.missing_keys)


def test_vision_pretraining_goes_on_from_its_own_weights_only(narrow_preset, tmp_path, monkeypatch, capsys):
    run_pretraining(monkeypatch, output_dir=tmp_path / "one")
    first = tmp_path / "one/vision.safetensors"
    run_pretraining(monkeypatch, output_dir=tmp_path / "two", vision_weights=first, learning_rate=1e-9)
    second = load_file(tmp_path / "two/vision.safetensors")
    for name, tensor in load_file(first).items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)

    other, cut = save({"model.vision_model.other": torch.zeros(1)}), first.read_bytes()[:1000]
    for content, message in ((other, "is not a vision.safetensors"), (cut, "cannot be read")):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(SystemExit) as end:
            run_pretraining(monkeypatch, output_dir=tmp_path / "three", vision_weights=tmp_path / "bad.safetensors")
        assert end.value.code == 2 and f"bad.safetensors {message}" in capsys.readouterr().err


def test_an_interrupted_pretraining_has_not_written_its_output(narrow_preset, tmp_path, monkeypatch):
    class Interrupted(AtomicCheckpointTrainer):
        def train(self, **kwargs):
            super().train(**kwargs)  # writes the last checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretrain_vision.AtomicCheckpointTrainer", Interrupted)
        with pytest.raises(SystemExit) as end:
            run_pretraining(patch, output_dir=tmp_path)
    assert end.value.code == 130 and (tmp_path / "checkpoint-2").is_dir()
    assert not (tmp_path / "vision.safetensors").exists()  # runs/*.sh take it for finished
    run_pretraining(monkeypatch, output_dir=tmp_path)
    assert (tmp_path / "vision.safetensors").is_file()


def test_pretraining_continues_its_own_folder_and_refuses_any_other(narrow_preset, capsys, tmp_path, monkeypatch):
    run_pretraining(monkeypatch, output_dir=tmp_path / "own")
    written = [str(path.relative_to(tmp_path / "own")) for path in (tmp_path / "own").rglob("*") if path.is_file()]
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in OUTPUTS) for name in written)
    run_pretraining(monkeypatch, output_dir=tmp_path / "own", max_steps=3)
    assert (tmp_path / "own/checkpoint-3").is_dir()
    policy = tmp_path / "policy/checkpoint-7"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    (tmp_path / "own/notes.txt").write_text("mine")
    monkeypatch.setattr("envs.pusht.pretraining.render_scenes", None)  # it is not come to
    for folder, foreign in ((tmp_path / "own", "notes.txt"), (policy.parent, "checkpoint-7/config.json")):
        with pytest.raises(SystemExit) as end:
            run_pretraining(monkeypatch, output_dir=folder)
        assert end.value.code == 2 and foreign in capsys.readouterr().err


def test_pretraining_with_other_options_is_refused_by_their_names(narrow_preset, capsys, tmp_path, monkeypatch):
    run_pretraining(monkeypatch, output_dir=tmp_path / "own")
    before = {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()}
    monkeypatch.setattr("envs.pusht.pretraining.render_scenes", None)  # it is not come to
    with pytest.raises(SystemExit) as end:
        run_pretraining(monkeypatch, output_dir=tmp_path / "own", near_target=0.6, learning_rate=7e-4)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--near_target 0.3" in error and "--learning_rate 0.001" in error
    assert "--seed" not in error.splitlines()[-1]
    assert {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_scenes", 1),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", "nan"),
        ("max_steps", 0),
        ("near_target", 1.5),
        ("near_target", "nan"),
        ("seed", -1),
    ],
)
def test_numbers_of_pretraining_are_checked_before_scenes_are_rendered(name, value, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("envs.pusht.pretraining.render_scenes", None)
    with pytest.raises(SystemExit) as end:
        run_pretraining(monkeypatch, output_dir=tmp_path / "run", **{name: value})
    assert end.value.code == 2 and f"--{name} is {value}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_twice_the_batch(pusht_root, tmp_path):
    """Also where they share the episodes of the evaluation."""
    options = {"eval_episodes": 3, "per_device_eval_batch_size": 4}
    run_training(common_arguments(pusht_root, tmp_path / "one", per_device_train_batch_size=8, **options))
    run_training(common_arguments(pusht_root, tmp_path / "two", per_device_train_batch_size=4, **options), processes=2)
    (one, *histories), (two, other) = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    np.testing.assert_allclose(two, one, rtol=2e-4)
    for name in ("eval_score", "eval_avg_sum_reward"):
        found, expected = ([entry[name] for entry in h if name in entry] for h in (other, *histories))
        assert len(found) == 1 and found == pytest.approx(expected, rel=1e-3), name
