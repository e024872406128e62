"""The processor: what goes into the model, and what comes back to the robot."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import TASK, make_processor, warnings_of
from PIL import Image
from transformers import Idefics3Processor, PreTrainedTokenizerFast

from smolandfast import (
    FastActionTokenizer,
    SmolAndFastConfig,
    SmolAndFastProcessor,
    compute_statistics,
    processing_smolandfast,
)
from smolandfast.training import make_tiny_model


def without_actions(batch):
    return {name: value for name, value in batch.items() if name != "actions"}


@pytest.fixture(scope="module")
def real_processor(smolvlm_assets, demonstrations):
    states, chunks = demonstrations
    tokenizer = FastActionTokenizer.fit(chunks / 256 - 1, 10.0, 256)
    return SmolAndFastProcessor.from_vlm(smolvlm_assets, tokenizer, compute_statistics(states, chunks))


def test_actions_survive_the_way_through_labels(processor, batch):
    inputs = processor(**batch)
    ids = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
    actions = processor.post_process_actions(ids)
    unit = processor.normalizer.action_scale / processor.action_tokenizer.scale
    assert actions.shape == batch["actions"].shape and actions.dtype == np.float32
    assert (np.abs(actions - batch["actions"]) <= 0.5 * np.sqrt(8) * unit + 1e-3).all()


def test_labels_are_the_action_tokens_and_their_eos_alone(processor, batch):
    inputs = processor(**batch)
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
        target = labels[labels != -100]
        assert target[-1] == processor.tokenizer.eos_token_id
        assert processor._is_action(target[:-1].numpy()).all()
        assert torch.equal(ids[labels != -100], target)
        length = int(mask.sum())
        assert mask[:length].all() and labels[length - 1] != -100  # padded on the right, EOS last


def test_prompts_are_padded_on_the_left_to_generate(processor, batch):
    inputs = processor(**without_actions(batch) | {"text": ["x", "a much longer task", "", "y z"]})
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"].all()
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}


def test_an_empty_task_falls_back_to_the_default(processor, batch):
    one = {"images": batch["images"][0], "state": batch["state"][0]}
    expected = processor(**one, text=processor.default_task)["input_ids"]
    for empty in ("", None):
        assert torch.equal(processor(**one, text=empty)["input_ids"], expected)


def test_a_sentence_that_was_not_trained_is_warned_of_once(demonstrations, batch, tmp_path):
    others = [f"Do it in way {i}." for i in range(4)]
    made = make_processor(demonstrations, training_tasks=[TASK, *others])
    made.save_pretrained(tmp_path)
    processor = SmolAndFastProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert processor.training_tasks == made.training_tasks
    one = {"images": batch["images"][0], "state": batch["state"][0]}
    with warnings_of(processing_smolandfast) as messages:
        for text in (TASK, "", None, others[3]):
            processor(**one, text=text)
        processor(**batch | {"text": ["a", "b", TASK, "c"]})  # to train
        assert not messages
        for text in ("Push the block.", "Push it."):
            processor(**one, text=text)
    assert len(messages) == 1
    assert "told 'Push the block.'" in messages[0] and repr(TASK) in messages[0] and "and 2 more" in messages[0]
    with pytest.raises(ValueError, match="training_tasks is 'Push', expected a list"):
        make_processor(demonstrations, training_tasks="Push")


@pytest.mark.parametrize("rows, cols", [(0, 0), (1, 1), (2, 3)])
def test_an_image_is_written_as_smolvlm_writes_it(processor, rows, cols):
    smolvlm = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    if not hasattr(smolvlm, "get_image_prompt_string"):
        pytest.skip("this Transformers writes images elsewhere")
    tokenizer = processor.tokenizer
    tokens = (tokenizer.fake_image_token, tokenizer.image_token, tokenizer.global_image_token)
    expected = smolvlm.get_image_prompt_string(rows, cols, processor.image_seq_len, *tokens)
    assert processor._write_image(rows, cols) == expected


def test_one_sample_and_a_batch_of_one_are_the_same(processor, batch):
    one = processor(images=batch["images"][0], text="push", state=batch["state"][0], actions=batch["actions"][0])
    bare = processor(images=Image.fromarray(batch["images"][0]), text="push", state=batch["state"][:1])
    assert torch.equal(bare["pixel_values"], one["pixel_values"])
    many = processor(images=batch["images"][:1], text=["push"], state=batch["state"][:1], actions=batch["actions"][:1])
    assert all(torch.equal(one[name], many[name]) for name in many)


def test_every_kind_of_image_gives_the_same_pixels(processor, batch):
    image, state = batch["images"][0], batch["state"][0]
    expected = processor(images=image, state=state)["pixel_values"]
    tensor = torch.from_numpy(image)
    for same in (
        Image.fromarray(image),
        image.transpose(2, 0, 1),
        tensor,
        tensor.permute(2, 0, 1),
        tensor.float() / 255,
        image.astype(np.float64) / 255,
        [image],
        Image.fromarray(image).convert("RGBA"),
    ):
        assert torch.equal(processor(images=same, state=state)["pixel_values"], expected)


def test_images_of_any_size_become_the_towers_square(processor, batch):
    for size in ((480, 640, 3), (17, 200, 3), (96, 96, 3)):
        pixels = processor(images=np.zeros(size, np.uint8), state=batch["state"][0])["pixel_values"]
        assert pixels.shape == (1, 1, 3, 96, 96)
        assert (pixels == -1).all()  # black is not zero, which SmolVLM would drop as padding


def test_several_cameras_give_several_images(processor, batch):
    cameras = [batch["images"][:2], batch["images"][2:]]
    inputs = processor(images=cameras, state=batch["state"][:2])
    image_tokens = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert inputs["pixel_values"].shape[:2] == (2, 2)
    assert image_tokens.sum(1).tolist() == [2 * processor.image_seq_len] * 2
    single = processor(images=batch["images"][:2], state=batch["state"][0])
    assert torch.equal(single["pixel_values"][0], inputs["pixel_values"][0])


@pytest.fixture(scope="module", params=[False, True], ids=["absolute", "relative"])
def told(request, demonstrations):
    """A processor of a policy that is told up to three actions which are executed meanwhile."""
    return make_processor(demonstrations, use_relative_actions=request.param, max_delay=3)


def test_actions_to_come_stand_in_the_prompt_and_change_nothing_else(told, batch):
    prefixes = [chunk[:n] for chunk, n in zip(batch["actions"], (0, 1, 3, 0), strict=True)]
    inputs = [told(**without_actions(batch), action_prefix=x) for x in (prefixes, None, [])]
    assert torch.equal(inputs[1]["input_ids"], inputs[2]["input_ids"])
    told_texts, plain_texts = (
        [told.tokenizer.decode(ids[mask == 1]) for ids, mask in zip(x["input_ids"], x["attention_mask"], strict=True)]
        for x in inputs[:2]
    )
    states = told.normalizer.state_bins(batch["state"])
    for text, plain, prefix, state in zip(told_texts, plain_texts, prefixes, states, strict=True):
        bins = told.normalizer.action_bins(prefix, state)
        written = f", Next: {' '.join(map(str, bins.ravel()))}" if len(prefix) else ""
        assert text == plain.replace(", Action: ", f"{written}, Action: ")
    trained = told(**batch, action_prefix=prefixes)
    ids = torch.where(trained["labels"] == -100, trained["input_ids"], trained["labels"])
    plain = told(**batch)["input_ids"]
    np.testing.assert_array_equal(told.post_process_actions(ids), told.post_process_actions(plain))


def test_one_samples_actions_to_come_are_those_of_a_batch_of_one(told, batch):
    one = {"images": batch["images"][0], "text": "x", "state": batch["state"][0]}
    many = {"images": batch["images"][:1], "text": "x", "state": batch["state"][:1]}
    prefix = batch["actions"][0][:2]
    expected = told(**one, action_prefix=prefix)["input_ids"]
    assert expected.shape[1] > told(**one)["input_ids"].shape[1]
    for same in (prefix.tolist(), [prefix], torch.from_numpy(prefix), prefix[None]):
        assert torch.equal(told(**many, action_prefix=same)["input_ids"], expected)


def test_what_is_told_is_part_of_the_meaning(told, demonstrations, tmp_path):
    without = make_processor(demonstrations, use_relative_actions=told.use_relative_actions)
    assert without.max_delay == 0 and told.fingerprint != without.fingerprint
    told.save_pretrained(tmp_path)
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.max_delay == 3 and loaded.fingerprint == told.fingerprint
    with pytest.raises(ValueError, match="max_delay is 8, expected a whole number from 0 to 7"):
        make_processor(demonstrations, max_delay=8)


BAD_PREFIXES = {
    "too many": ([np.zeros((4, 2))] * 4, r"action_prefix\[0\] has 4 actions, expected at most max_delay, 3"),
    "another robot's": ([np.zeros((1, 7))] * 4, r"action_prefix\[0\] has shape \(1, 7\), expected \(n, 2\)"),
    "not one a sample": ([np.zeros((1, 2))] * 3, "action_prefix has 3 samples for 4 states"),
    "NaN": ([np.zeros((1, 2))] * 3 + [[[0, np.nan]]], r"action_prefix\[3\]\[0, 1\] is nan"),
    "a number": (3, "action_prefix has 1 samples for 4 states"),
    "words": ("left", "action_prefix is not an array of numbers"),
}


@pytest.mark.parametrize("prefix, message", BAD_PREFIXES.values(), ids=BAD_PREFIXES)
def test_bad_actions_to_come_are_an_error_that_names_them(told, batch, prefix, message):
    with pytest.raises(ValueError, match=message):
        told(**batch, action_prefix=prefix)


def test_a_policy_that_is_not_trained_for_it_is_told_nothing(processor, batch):
    with pytest.raises(ValueError, match="has 1 actions, expected at most max_delay, 0"):
        processor(**batch, action_prefix=[chunk[:1] for chunk in batch["actions"]])


BAD_INPUTS = {
    "no images": ({"images": None}, "images and state"),
    "no state": ({"state": None}, "images and state"),
    "scalar state": ({"state": 3.0}, r"state has shape \(\)"),
    "empty batch": ({"state": np.zeros((0, 2)), "images": []}, r"state has shape \(0, 2\)"),
    "NaN state": ({"state": np.full((4, 2), np.nan)}, r"state\[0, 0\] is nan"),
    "words as state": ({"state": "left"}, "state is not an array of numbers"),
    "another robot's state": ({"state": np.zeros((4, 7))}, r"state has shape \(4, 7\)"),
    "fewer images than states": ({"images": [np.zeros((9, 9, 3), np.uint8)]}, "1 samples of images"),
    "grey images": ({"images": [np.zeros((96, 96), np.uint8)] * 4}, r"images\[0\] has shape"),
    "normalised images": ({"images": [np.full((9, 9, 3), -1.0)] * 4}, "do not normalise"),
    "NaN image": ({"images": [np.full((9, 9, 3), np.nan)] * 4}, r"expected \[0, 1\]"),
    "wide integers": ({"images": [np.zeros((9, 9, 3), np.int64)] * 4}, "dtype int64"),
    "paths": ({"images": ["front.png"] * 4}, "is a str"),
    "no camera": ({"images": [[]] * 4}, "is empty"),
    "special tokens in the task": ({"text": ["<image>"] * 4}, "special tokens"),
    "a number as task": ({"text": [3] * 4}, "expected a sentence"),
    "short chunk": ({"actions": np.zeros((4, 3, 2))}, r"expected \(4, 8, 2\)"),
    "infinite action": ({"actions": np.full((4, 8, 2), np.inf)}, r"actions\[0, 0, 0\] is inf"),
    "actions of another robot": ({"actions": np.zeros((4, 8, 6))}, "actions has shape"),
    "too few chunks": ({"actions": np.zeros((3, 8, 2))}, r"actions has shape \(3, 8, 2\)"),
    "NumPy asked for": ({"return_tensors": "np"}, "only 'pt'"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_an_error_that_names_it(processor, batch, change, message):
    with pytest.raises(ValueError, match=message):
        processor(**batch | change)


def test_generated_ids_without_any_are_refused(processor):
    with pytest.raises(ValueError, match=r"generated_ids has shape \(1, 0\)"):
        processor.post_process_actions(torch.zeros((1, 0), dtype=torch.int64))


def test_generated_ids_that_are_no_whole_chunk_are_refused(processor, batch):
    prompt = processor(**without_actions(batch))["input_ids"]
    with pytest.raises(ValueError, match="holds 0 coefficients"):
        processor.post_process_actions(prompt)
    with pytest.raises(ValueError, match="expected"):
        processor.post_process_actions(prompt[0])
    inputs = processor(**batch)
    cut = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])[:1]
    end = int((inputs["labels"][0] != -100).nonzero()[-1]) - 1  # without EOS and the last action token
    with pytest.raises(ValueError, match="coefficients, expected horizon"):
        processor.post_process_actions(cut[:, :end])


def test_actions_are_clipped_to_those_of_the_demonstrations(processor, batch):
    low, high = processor.normalizer.action_limits
    far = np.full((4, 8, 2), 5.0, dtype=np.float32)
    bins = processor.normalizer.state_bins(batch["state"])
    assert (processor.normalizer.unnormalize_actions(far, bins) <= high.astype(np.float32)).all()
    assert (processor.normalizer.unnormalize_actions(-far, bins) >= low.astype(np.float32)).all()


def test_parts_that_do_not_fit_are_refused(processor, demonstrations):
    parts = (processor.image_processor, processor.tokenizer, processor.action_tokenizer)
    options = {"statistics": processor.statistics, "chat_template": processor.chat_template}
    with pytest.raises(ValueError, match="chunk_size is 9"):
        SmolAndFastProcessor(*parts, **options, chunk_size=9)
    with pytest.raises(ValueError, match="do not fit into a vocabulary"):
        SmolAndFastProcessor(*parts, **options, fast_skip_tokens=10_000)
    with pytest.raises(ValueError, match="expected a FastActionTokenizer"):
        SmolAndFastProcessor(*parts[:2], processor.tokenizer, **options)
    with pytest.raises(ValueError, match="statistics is None"):
        SmolAndFastProcessor(*parts, chat_template=processor.chat_template)


def test_model_kwargs_make_a_configuration_that_fits(processor):
    config = SmolAndFastConfig(
        vision_config={"image_size": 96, "patch_size": 16},
        text_config={"model_type": "llama", "vocab_size": processor.tokenizer.vocab_size},
        n_action_steps=4,
        **processor.model_kwargs(),
    )
    assert config.image_seq_len == processor.image_seq_len == 4
    assert config.num_action_tokens == len(processor.action_tokenizer)


def test_a_smaller_square_makes_fewer_visual_tokens(real_processor, smolvlm_assets, demonstrations, tmp_path):
    parts = smolvlm_assets, real_processor.action_tokenizer, real_processor.statistics
    processor = SmolAndFastProcessor.from_vlm(*parts, scale_factor=4, image_size=256)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    for made in (processor, SmolAndFastProcessor.from_pretrained(tmp_path, trust_remote_code=True)):
        inputs = made(images=image, text="Push.", state=demonstrations[0][0])
        assert inputs["pixel_values"].shape == (1, 1, 3, 256, 256)
        assert (inputs["input_ids"] == 49190).sum() == made.image_seq_len == 16
    config = SmolAndFastConfig.from_pretrained(smolvlm_assets, **processor.model_kwargs())
    assert config.image_seq_len == 16 and config.vision_config.image_size == 512
    for wrong, message in {
        500: "image_size 500 does not divide into patches of 16.*Make image_size a multiple of 64",
        576: "image_size is 576, expected a whole number of pixels, at most the vision tower's 512",
        0: "image_size is 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            SmolAndFastProcessor.from_vlm(*parts, scale_factor=4, image_size=wrong)


def test_a_smaller_square_is_seen_with_the_position_embeddings_of_its_places(processor, batch):
    """6 x 6 patches in the tower, 3 x 3 in the image: every second row and column of the embeddings."""
    image_processor = copy.deepcopy(processor.image_processor)
    image_processor.max_image_size = {"longest_edge": 48}
    small = SmolAndFastProcessor(
        image_processor,
        processor.tokenizer,
        processor.action_tokenizer,
        processor.statistics,
        use_relative_actions=processor.use_relative_actions,
        fast_skip_tokens=0,
        scale_factor=3,
        chat_template=processor.chat_template,
    )
    model = make_tiny_model(small, n_action_steps=4).eval()
    embeddings = model.model.vision_model.embeddings
    positions = []
    inputs = small(images=batch["images"], text=batch["text"], state=batch["state"])
    patches = embeddings.patch_embedding(inputs["pixel_values"].flatten(0, 1)).flatten(2).mT  # (4, 9, width)
    embeddings.register_forward_hook(lambda module, args, output: positions.append(output - patches))
    assert small.post_process_actions(model.generate(**inputs)).shape == (4, 8, 2)
    grid = embeddings.position_embedding.weight.view(6, 6, -1)
    torch.testing.assert_close(positions[0][0], grid[::2, ::2].flatten(0, 1), rtol=0, atol=1e-5)
    small.check_model(model)
    with pytest.raises(ValueError, match="belongs to another model: image_size, processor_fingerprint differ"):
        processor.check_model(model)


def test_text_ids_equal_smolvlms_conformance_cases(real_processor, smolvlm_assets):
    cases = json.loads((smolvlm_assets / "tokenizer_conformance.json").read_text())["fixtures"]
    assert len(cases) == 128
    for case in cases:
        assert real_processor.tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]


@pytest.mark.parametrize("do_image_splitting", [False, True])
def test_prompt_ids_equal_the_stock_processors(smolvlm_assets, demonstrations, real_processor, do_image_splitting):
    processor = SmolAndFastProcessor.from_vlm(
        smolvlm_assets,
        real_processor.action_tokenizer,
        real_processor.statistics,
        scale_factor=4,
        do_image_splitting=do_image_splitting,
    )
    state, image = demonstrations[0][0], Image.new("RGB", (640, 480))
    inputs = processor(images=[image, image], text="Fold the towel.", state=state)
    stock = Idefics3Processor(
        processor.image_processor,
        PreTrainedTokenizerFast.from_pretrained(smolvlm_assets),
        image_seq_len=64,
        chat_template=json.loads((smolvlm_assets / "chat_template.json").read_text())["chat_template"],
    )
    bins = " ".join(map(str, processor.normalizer.state_bins(state[None])[0]))
    words = {"type": "text", "text": f"Task: Fold the towel., State: {bins}, Action: "}
    content = [{"type": "image"}, {"type": "image"}, words]
    prompt = stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = stock(images=[[image, image]], text=[prompt], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert inputs["pixel_values"].shape[-2:] == (512, 512)
    assert (inputs["pixel_values"].shape[1] > 2) == do_image_splitting


def test_saving_and_loading_keeps_everything(processor, batch, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    expected, inputs = processor(**batch), loaded(**batch)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert loaded.model_kwargs() == processor.model_kwargs()
    assert loaded.statistics == processor.statistics
