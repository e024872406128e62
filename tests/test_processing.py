"""The processor: what goes into the model, and what comes back to the robot."""

import copy
import json
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import TASK, make_processor, warnings_of
from PIL import Image
from transformers import Idefics3Processor, PreTrainedTokenizerFast

from smolandfast import (
    FastActionTokenizer,
    SmolAndFastConfig,
    SmolAndFastForActionPrediction,
    SmolAndFastProcessor,
    compute_statistics,
    processing_smolandfast,
)
from smolandfast.training import make_tiny_model, make_tiny_processor


@pytest.fixture(scope="module", params=[False, True], ids=["absolute", "relative"])
def processor(request, demonstrations):
    return make_processor(demonstrations, use_relative_actions=request.param)


def without_actions(batch):
    return {name: value for name, value in batch.items() if name != "actions"}


TWO_CAMERAS = ["observation.images.front", "observation.images.wrist"]


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
    processor = SmolAndFastProcessor.from_pretrained(tmp_path)
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
    assert "instruction 'Push the block.'" in messages[0] and repr(TASK) in messages[0] and "and 2 more" in messages[0]
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


def test_several_cameras_give_several_images(processor, demonstrations, batch):
    one_camera, options = processor, {"use_relative_actions": processor.use_relative_actions}
    processor = make_processor(demonstrations, image_keys=TWO_CAMERAS, **options)
    cameras = [batch["images"][:2], batch["images"][2:]]
    inputs = processor(images=cameras, state=batch["state"][:2])
    image_tokens = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert inputs["pixel_values"].shape[:2] == (2, 2)
    assert image_tokens.sum(1).tolist() == [2 * processor.image_seq_len] * 2
    single = processor(images=batch["images"][:2], state=batch["state"][0])
    assert torch.equal(single["pixel_values"][0], inputs["pixel_values"][0])
    first = one_camera(images=batch["images"][0], state=batch["state"][0])
    assert torch.equal(first["pixel_values"][0, 0], inputs["pixel_values"][0, 0])


def test_images_by_name_are_those_in_the_policys_order(demonstrations, batch):
    processor = make_processor(demonstrations, image_keys=TWO_CAMERAS)
    front, wrist = batch["images"][:2]
    state = batch["state"][0]
    expected = processor(images=[front, wrist], state=state)["pixel_values"]
    by_name = MappingProxyType({TWO_CAMERAS[1]: wrist, TWO_CAMERAS[0]: front})
    batches = [{key: [image, image] for key, image in by_name.items()}, [by_name, by_name]]
    batches.append({key: np.stack([image, image]) for key, image in by_name.items()})
    assert torch.equal(processor(images=by_name, state=state)["pixel_values"], expected)
    for images in batches:
        found = processor(images=images, state=batch["state"][:2])["pixel_values"]
        assert torch.equal(found, expected.repeat(2, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("one", r"images\[0\] has 1 images, expected 2.*observation.images.front, observation.images.wrist"),
        ("three", r"images\[0\] has 3 images, expected 2"),
        (
            {"front": "image", TWO_CAMERAS[1]: "image"},
            r"images has the cameras \['front', 'observation.images.wrist'\]",
        ),
        ({TWO_CAMERAS[0]: "image"}, r"images has the cameras \['observation.images.front'\], expected"),
        (dict.fromkeys([*TWO_CAMERAS, "depth"], "image"), "images has the cameras .*depth"),
        (dict.fromkeys(TWO_CAMERAS), r"images\[0\]\[0\] is a NoneType, expected an RGB image"),
    ],
)
def test_other_cameras_than_the_policys_are_refused(demonstrations, batch, images, message):
    processor, image = make_processor(demonstrations, image_keys=TWO_CAMERAS), batch["images"][0]
    if isinstance(images, dict):
        images = {key: image if value else None for key, value in images.items()}
    else:
        images = image if images == "one" else [image] * 3
    with pytest.raises(ValueError, match=message):
        processor(images=images, state=batch["state"][0])


def test_a_batch_by_name_has_an_image_of_each_camera_for_each_state(processor, batch):
    for images in (batch["images"][:3], 7):
        with pytest.raises(ValueError, match=r"images\['observation.image'\] has .* images for 4 states"):
            processor(images={"observation.image": images}, state=batch["state"])


def test_cameras_and_control_rate_are_saved_and_part_of_the_meaning(demonstrations, tmp_path):
    options = {"image_keys": TWO_CAMERAS, "fps": 25}
    processor = make_processor(demonstrations, **options)
    processor.save_pretrained(tmp_path)
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path)
    assert (loaded.image_keys, loaded.fps, loaded.fingerprint) == (TWO_CAMERAS, 25, processor.fingerprint)
    others = [{"image_keys": TWO_CAMERAS[::-1]}, {"image_keys": TWO_CAMERAS[:1]}, {"fps": 30}, {"fps": None}]
    fingerprints = {make_processor(demonstrations, **options | other).fingerprint for other in others}
    assert len(fingerprints | {processor.fingerprint}) == 5
    for keys in ([], "front", ["a", "a"], [1], None):
        with pytest.raises(ValueError, match="image_keys is"):
            make_processor(demonstrations, image_keys=keys)
    named = make_processor(demonstrations, state_names=["x", "y"], action_names=("x.pos", "y.pos"))
    named.save_pretrained(tmp_path / "named")
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path / "named")
    assert (loaded.state_names, loaded.action_names) == (["x", "y"], ["x.pos", "y.pos"])
    for names in (["x"], ["x", "x"], "xy", [1, 2]):
        with pytest.raises(ValueError, match="action_names is .*expected .* different names"):
            make_processor(demonstrations, action_names=names)
    for fps in (0, -1, float("nan"), "10", True):
        with pytest.raises(ValueError, match="fps is"):
            make_processor(demonstrations, fps=fps)


def test_a_saved_processor_loads_with_the_packages_own_classes(demonstrations, tmp_path):
    processor = make_processor(demonstrations, image_keys=TWO_CAMERAS, fps=25)
    folder = tmp_path / "repository/deep/policy"
    processor.save_pretrained(folder)
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('code of a checkpoint ran')")
    loaded = [
        SmolAndFastProcessor.from_pretrained(folder),
        SmolAndFastProcessor.from_pretrained(str(folder)),
        SmolAndFastProcessor.from_pretrained(tmp_path / "repository", subfolder="deep/policy"),
    ]
    for other in loaded:
        assert isinstance(other.action_tokenizer, FastActionTokenizer)
        assert other.fingerprint == processor.fingerprint and other.chat_template == processor.chat_template
        assert (other.image_keys, other.fps, other.max_position_embeddings) == (TWO_CAMERAS, 25, 512)
    assert SmolAndFastProcessor.from_pretrained(folder, default_task="Pull it.").default_task == "Pull it."
    with pytest.raises(ValueError, match="from_pretrained got 'default_tsk', expected some of .*default_task"):
        SmolAndFastProcessor.from_pretrained(folder, default_tsk="Pull it.")
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere/at/all"):
        with pytest.raises(OSError, match=missing):
            SmolAndFastProcessor.from_pretrained(tmp_path / missing)


def test_numbers_of_numpy_are_saved_as_plain_ones(demonstrations, tmp_path):
    plain = make_processor(demonstrations, fps=10, n_state_bins=256, chunk_size=8)
    options = {"fps": np.float32(10), "n_state_bins": np.int64(256), "chunk_size": np.int32(8)}
    for processor in (make_processor(demonstrations, **options), make_processor(demonstrations, fps=10.0)):
        processor.save_pretrained(tmp_path)
        assert SmolAndFastProcessor.from_pretrained(tmp_path).fingerprint == plain.fingerprint
    assert make_processor(demonstrations, fps=29.97).fps == 29.97


@pytest.mark.parametrize(
    "options",
    [
        {"n_state_bins": 1},
        {"fast_skip_tokens": -1},
        {"fast_skip_tokens": 1.5},
        {"default_task": None},
        {"default_task": "<image>"},
        {"training_tasks": ["push <image>"]},
    ],
    ids=str,
)
def test_arguments_that_would_fail_at_every_call_are_refused_at_once(processor, options):
    kwargs = {"statistics": processor.statistics, "chat_template": processor.chat_template, "fast_skip_tokens": 0}
    kwargs |= {"scale_factor": processor.scale_factor}
    with pytest.raises(ValueError, match="|".join([*options, "text is"])):
        parts = processor.image_processor, processor.tokenizer, processor.action_tokenizer
        SmolAndFastProcessor(*parts, **kwargs | options)


def test_images_that_are_too_large_and_texts_with_half_a_character_are_refused(processor, batch):
    state = batch["state"][0]
    with pytest.raises(ValueError, match="expected at most 8192 pixels a side"):
        processor(images=np.zeros((1, 9000, 3), np.uint8), state=state)
    with pytest.raises(ValueError, match="text is .*ud800"):
        processor(images=batch["images"][0], text="push \ud800", state=state)


@pytest.mark.parametrize("text", [None, "", "  ", ["Push it.", ""]])
def test_an_empty_task_needs_a_default(demonstrations, batch, text):
    processor = make_processor(demonstrations)
    processor.default_task = ""
    count = 2 if isinstance(text, list) else 1
    observation = {"images": batch["images"][:count], "state": batch["state"][:count], "text": text}
    with pytest.raises(ValueError, match="text is empty, and the policy has no default_task"):
        processor(**observation)
    processor.default_task = "Push it."
    assert len(processor(**observation)["input_ids"]) == count


JOINTS = ["x.pos", "gripper.pos"]


def test_a_gripper_can_stay_absolute_while_joints_are_relative(demonstrations, batch, tmp_path):
    names = {"state_names": JOINTS, "action_names": JOINTS}
    relative = make_processor(demonstrations, use_relative_actions=True, **names)
    processor = make_processor(demonstrations, use_relative_actions=True, relative_exclude_joints=["gripper"], **names)
    assert processor.normalizer.reference_dims == [0, None] and relative.normalizer.reference_dims is None
    assert processor.fingerprint != relative.fingerprint
    processor.save_pretrained(tmp_path)
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path)
    assert (loaded.relative_exclude_joints, loaded.fingerprint) == (["gripper"], processor.fingerprint)
    inputs = loaded(**batch)
    ids = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
    unit = loaded.normalizer.action_scale / loaded.action_tokenizer.scale
    difference = np.abs(loaded.post_process_actions(ids) - batch["actions"])
    assert (difference <= 0.5 * np.sqrt(8) * unit + 1e-3).all()
    with pytest.raises(ValueError, match="relative_exclude_joints is .*no action_names"):
        make_processor(demonstrations, use_relative_actions=True, relative_exclude_joints=["gripper"])


@pytest.mark.parametrize("size", [(48, 96), (96, 40), (480, 640), (97, 95), (1, 300)])
def test_padded_images_keep_their_aspect_ratio_between_black_bars(demonstrations, size):
    processor = make_processor(demonstrations, resize_with_pad=True)
    height, width = size
    pixels = processor(images=np.full((*size, 3), 255, dtype=np.uint8), state=[200.0, 200.0])["pixel_values"][0, 0, 0]
    rows, columns = (torch.nonzero((pixels == 1).any(dim=dim)).squeeze(1) for dim in (1, 0))
    expected = [max(1, round(length * 96 / max(size))) for length in size]
    assert [len(rows), len(columns)] == expected
    assert set(pixels.unique().tolist()) <= {-1.0, 1.0}  # black and white after normalisation
    assert abs((rows[0] + rows[-1]) / 2 - 47.5) <= 0.5 and abs((columns[0] + columns[-1]) / 2 - 47.5) <= 0.5


@pytest.mark.parametrize("resize_with_pad", [False, True])
def test_images_resized_beforehand_give_the_same_pixels(demonstrations, resize_with_pad, tmp_path):
    processor = make_processor(demonstrations, resize_with_pad=resize_with_pad)
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    small = processor.image_resizer(image)
    assert small.shape == (96, 96, 3)
    pixels = [processor(images=x, state=[200.0, 200.0])["pixel_values"] for x in (image, small)]
    assert torch.equal(*pixels)
    plain = make_processor(demonstrations)
    assert (plain.fingerprint == processor.fingerprint) != resize_with_pad
    processor.save_pretrained(tmp_path)
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path)
    assert (loaded.image_resizer, loaded.fingerprint) == (processor.image_resizer, processor.fingerprint)


@pytest.mark.parametrize("size", [(96, 96), (480, 640), (30, 512)])
def test_pixels_are_those_of_smolvlms_image_processor(real_processor, processor, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for ours in (real_processor, processor):
        inputs = ours(images=image, text=TASK, state=[200.0, 200.0])
        expected = ours.image_processor([[image]], return_tensors="pt", input_data_format="channels_last")
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["pixel_attention_mask"], expected["pixel_attention_mask"].bool())


def test_padding_and_splitting_exclude_each_other(real_processor, smolvlm_assets):
    options = real_processor.action_tokenizer, real_processor.statistics
    padded = SmolAndFastProcessor.from_vlm(smolvlm_assets, *options, resize_with_pad=True)
    assert padded.image_resizer.side == 512 and padded.image_resizer.with_pad
    with pytest.raises(ValueError, match="resize_with_pad is set, but do_image_splitting"):
        SmolAndFastProcessor.from_vlm(smolvlm_assets, *options, do_image_splitting=True, resize_with_pad=True)
    with pytest.raises(ValueError, match="resize_with_pad is 'yes'"):
        SmolAndFastProcessor.from_vlm(smolvlm_assets, *options, resize_with_pad="yes")


def test_the_tiny_presets_positions_hold_long_chunks(demonstrations):
    """ALOHA: 14 joints, 50 actions a chunk."""
    rng = np.random.default_rng(0)
    states, chunks = rng.normal(0, 1, (40, 14)), rng.normal(0, 1, (40, 50, 14))
    tokenizer = FastActionTokenizer.fit(chunks / 4, 10.0, 256)
    processor = make_tiny_processor(
        tokenizer, compute_statistics(states, chunks), TASK, image_size=128, scale_factor=4
    )
    assert processor.max_position_embeddings >= 700 + processor.longest_prompt
    model = make_tiny_model(processor, n_action_steps=10)
    processor.check_model(model)
    assert model.config.vision_config.image_size == 128


def test_a_processor_whose_prompts_leave_no_room_for_a_chunk_is_refused(demonstrations):
    options = {"max_position_embeddings": 512}
    make_processor(demonstrations, image_keys=[f"camera{i}" for i in range(9)], **options)
    with pytest.raises(ValueError, match=r"The prompt has \d+ tokens and a chunk up to 16, .* 512 positions"):
        make_processor(demonstrations, image_keys=[f"camera{i}" for i in range(99)], **options)
    with pytest.raises(ValueError, match="more than .* 512 positions"):
        make_processor(demonstrations, training_tasks=["short", "long " * 300], **options)


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
    "paths": ({"images": ["front.png"] * 4}, r"images\[0\] is 'front.png'.*PIL.Image.open"),
    "no camera": ({"images": [[]] * 4}, "is empty"),
    "special tokens in the task": ({"text": ["<image>"] * 4}, "special tokens"),
    "a number as task": ({"text": [3] * 4}, r"text\[0\] is 3 \(int\), expected an instruction"),
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
    for made in (processor, SmolAndFastProcessor.from_pretrained(tmp_path)):
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
        max_position_embeddings=processor.max_position_embeddings,
        chat_template=processor.chat_template,
    )
    config = make_tiny_model(processor, n_action_steps=4).config.to_dict() | small.model_kwargs()
    model = SmolAndFastForActionPrediction(SmolAndFastConfig.from_dict(config)).eval()
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
        image_keys=TWO_CAMERAS,
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
    loaded = SmolAndFastProcessor.from_pretrained(tmp_path)
    expected, inputs = processor(**batch), loaded(**batch)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert loaded.model_kwargs() == processor.model_kwargs()
    assert loaded.statistics == processor.statistics
