"""Observations the policy never saw: actions stay inside the limits, and the report says that something is wrong."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASK, make_processor, make_small_model

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.generation_smolandfast import ActionGrammar
from smolandfast.training import LeRobotChunkDataset

ROOT = Path(__file__).parents[1]
WITH_SCORES = {"return_dict_in_generate": True, "output_scores": True}


def prompts(processor, batch):
    return processor(**{name: value for name, value in batch.items() if name != "actions"})


def constrained_log_probabilities(model, inputs, sequences, temperature=1.0):
    """Each chunk's mean, by running the model once over the finished strings."""
    length, grammar = inputs["input_ids"].shape[1], ActionGrammar(model.config)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequences[:, length:])], dim=1)
    images = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
    with torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask, **images).logits
    found = []
    for row in range(len(sequences)):
        total, count = 0.0, 0
        for i in range(length, sequences.shape[1]):
            left, state = grammar.read(sequences[row : row + 1, length:i])
            if left == 0 and state == 0:
                break
            allowed = grammar.allowed(left, state)[0]
            ids = grammar.base_id - torch.arange(len(allowed))[allowed]
            scores = logits[row, i - 1, ids] / temperature
            total += scores.log_softmax(0)[ids == sequences[row, i]].item()
            count += 1
        found.append(total / count)
    return np.array(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 2.0, "top_k": 0},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 3.0},
    ],
    ids=["greedy", "sampled", "beams", "long beams"],
)
def test_log_probabilities_are_those_of_the_constrained_distribution(processor, model, batch, options):
    model.lm_head.weight.data *= 20  # strong preferences, so that strings and beams differ
    inputs = prompts(processor, batch | {"text": ["a", "a longer task", "", "b"]})
    torch.manual_seed(0)
    output = model.generate(**inputs, **options, **WITH_SCORES)
    report = processor.report(output, batch["state"])
    temperature = options.get("temperature", 1.0)
    expected = constrained_log_probabilities(model, inputs, output.sequences, temperature)
    np.testing.assert_allclose(report["log_probability"], expected, rtol=1e-3)
    assert (report["log_probability"] < 0).all() and len(set(report["log_probability"])) == 4


def test_several_sequences_a_prompt_have_a_report_each(processor, model, batch):
    inputs = prompts(processor, batch)
    for options in ({"do_sample": True}, {"num_beams": 2}):
        output = model.generate(**inputs, **options, num_return_sequences=2, **WITH_SCORES)
        report = processor.report(output, np.repeat(batch["state"], 2, axis=0))
        assert all(len(values) == 8 for values in report.values())


def test_clipped_actions_are_counted(processor, batch):
    normalizer = processor.normalizer
    inputs = processor(**batch)
    bins = normalizer.state_bins(batch["state"])
    low, high = normalizer.action_limits
    far = np.repeat(((low + high) / 2)[None, None], 8, axis=1).repeat(4, axis=0)  # (4, 8, 2), inside
    for chunk, beyond in enumerate([0, 1, 5, 16]):
        far[chunk].flat[:beyond] = 1e4
    assert normalizer.count_clipped_actions(normalizer.normalize_actions(far, bins), bins).tolist() == [0, 1, 5, 16]
    assert inputs["labels"].shape[0] == 4


@pytest.mark.parametrize("is_relative", [False, True])
def test_states_out_of_range_are_counted_and_their_actions_stay_inside_the_limits(is_relative, demonstrations, batch):
    processor = make_processor(demonstrations, use_relative_actions=is_relative)
    model = make_small_model(processor)
    limits = np.array(processor.normalizer.action_limits, dtype=np.float32)
    states = np.array([batch["state"][0], [1e9, batch["state"][1][1]], [-1e30, 1e30], [0.0, 1e5]])
    inputs = prompts(processor, batch | {"state": states})
    for options in ({}, {"do_sample": True, "temperature": 5.0}):
        output = model.generate(**inputs, **options, **WITH_SCORES)
        actions, report = processor.post_process_actions(output), processor.report(output, states)
        assert report["clamped_states"].tolist() == [0, 1, 2, 2]
        assert (actions >= limits[0]).all() and (actions <= limits[1]).all()


IMAGES = {
    "black": np.zeros((96, 96, 3), np.uint8),
    "white": np.full((96, 96, 3), 255, np.uint8),
    "grey": np.full((96, 96, 3), 127, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8),
    "another camera's": np.full((1, 4000, 3), 200, np.uint8),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_it_never_saw_gives_actions_inside_the_limits(processor, model, batch, name):
    limits = np.array(processor.normalizer.action_limits, dtype=np.float32)
    inputs = processor(images=IMAGES[name], text=TASK, state=batch["state"][0])
    assert (inputs["pixel_values"] != 0).any()  # SmolVLM drops an image of zeros; black is -1
    actions = processor.post_process_actions(model.generate(**inputs))
    assert (actions >= limits[0]).all() and (actions <= limits[1]).all()


def test_an_image_processor_that_maps_black_to_zeros_is_refused(processor, model, batch):
    other = copy.deepcopy(processor)
    other.image_processor.do_normalize = False
    inputs = other(images=IMAGES["black"], text=TASK, state=batch["state"][0])
    with pytest.raises(ValueError, match="images of zeros are padding"):
        model.generate(**inputs)


def test_a_report_without_scores_or_of_another_state_is_refused(processor, model, batch):
    inputs = prompts(processor, batch)
    output = model.generate(**inputs, **WITH_SCORES)
    for without in (output.sequences, model.generate(**inputs, return_dict_in_generate=True)):
        with pytest.raises(ValueError, match="output holds no scores: call model.generate"):
            processor.report(without, batch["state"])
    for state in (batch["state"][:2], batch["state"][0], batch["state"] + 200):
        with pytest.raises(ValueError, match="is not the state in the prompts"):
            processor.report(output, state)
    output.scores = [torch.full_like(step, -torch.inf) for step in output.scores]
    with pytest.raises(ValueError, match="output.scores gives"):
        processor.report(output, batch["state"])


def test_a_processor_of_another_model_is_refused(processor, model, demonstrations):
    states, chunks = demonstrations
    others = {
        "processor_fingerprint": make_processor((states, chunks * 1.001), use_relative_actions=False),
        "fast_token_lengths": make_processor((states, np.cumsum(chunks, axis=1)), use_relative_actions=True),
        "action_token_base_id": make_processor(demonstrations, n_state_bins=128),  # a smaller vocabulary of words
    }
    processor.check_model(model)
    for field, other in others.items():
        with pytest.raises(ValueError, match=rf"another model: .*{field}.* differ from model.config. Load"):
            other.check_model(model)
    chunk_9 = (states, np.concatenate([chunks, chunks[:, -1:]], axis=1))
    with pytest.raises(ValueError, match="chunk_size"):
        make_processor(chunk_9).check_model(model)


def test_a_model_that_names_no_processor_is_refused(processor, model):
    model.config.processor_fingerprint = None
    with pytest.raises(ValueError, match="another model: processor_fingerprint differ"):
        processor.check_model(model)


def test_the_shipped_policy_is_surer_of_demonstrations_than_of_noise(pusht_root):
    """On average: one chunk alone tells little, as docs/safety.md says."""
    folder = ROOT / "checkpoints/pusht-tiny"
    model = SmolAndFastForActionPrediction.from_pretrained(folder, dtype=torch.float32).eval()
    processor = SmolAndFastProcessor.from_pretrained(folder)
    dataset = LeRobotChunkDataset(pusht_root, 16, episodes=range(200, 206))
    samples = [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, 32)]
    states = np.stack([sample["state"] for sample in samples])
    noise = np.random.default_rng(0).integers(0, 256, (32, 96, 96, 3), dtype=np.uint8)
    means = []
    for images in ([sample["images"][0] for sample in samples], list(noise)):
        inputs = processor(images=images, text=[TASK] * 32, state=states)
        means.append(processor.report(model.generate(**inputs, **WITH_SCORES), states)["log_probability"].mean())
    assert means[0] > means[1]


class Robot:
    def __init__(self, state):
        self.position, self.moves, self.stopped = np.array(state), [], None

    def state(self):
        return self.position

    def camera(self):
        return np.zeros((96, 96, 3), np.uint8)

    def move(self, action):
        self.moves.append(action)

    def stop(self, report):
        self.stopped = report


def test_the_documented_controller_stops_the_arm(processor, model, batch):
    code = re.search(r"```python\n(def control.*?)```", (ROOT / "docs/safety.md").read_text(), re.S)[1]
    exec(code, names := {})
    robot = Robot(batch["state"][0])
    names["control"](model, processor, robot, TASK, lowest=-np.inf, chunks=2)
    assert len(robot.moves) == 2 * model.config.n_action_steps and robot.stopped is None
    robot.position = np.array([1e4, 0.0])
    names["control"](model, processor, robot, TASK, lowest=-np.inf, chunks=2)
    assert robot.stopped["clamped_states"].tolist() == [2]
    robot = Robot(batch["state"][0])
    names["control"](model, processor, robot, TASK, lowest=0.0, chunks=2)
    assert robot.stopped["log_probability"][0] < 0 and not robot.moves
