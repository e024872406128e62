"""Images, task and state as a policy takes them, and what it refuses by its name."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASK
from PIL import Image

from smolandfast.checks_smolandfast import as_rgb_images


@pytest.mark.parametrize(
    "text", [3, 1.5, True, b"Push.", {"task": "Push."}, np.array([b"Push."]), np.zeros(3), {"Push."}]
)
def test_a_task_that_is_no_text_is_refused_by_its_name(processor, batch, text):
    one = {"images": batch["images"][0], "state": batch["state"][0]}
    with pytest.raises(ValueError, match=r"text is .*images=..., text=task, state=..."):
        processor(**one, text=text)
    with pytest.raises(ValueError, match=r"text\[1\] is .*images=..., text=task, state=..."):
        processor(images=batch["images"][:2], text=["Push.", text], state=batch["state"][:2])


def test_arguments_in_another_order_are_refused_with_the_right_call(processor, batch):
    for image, text, state in [
        (batch["images"][0], TASK, batch["state"][0]),
        (batch["images"], batch["text"], batch["state"]),
    ]:
        for form in (
            lambda values: values,
            lambda values: values.tolist() if isinstance(values, np.ndarray) else values,
        ):
            for order in itertools.permutations([image, text, form(state)]):
                if order[1] is not text:
                    with pytest.raises(ValueError, match=r"text.* is .*images=..., text=task, state=..."):
                        processor(*order)
        with pytest.raises(ValueError, match=r"state has shape .*images=..., text=task, state=..."):
            processor(state, text, image)


def test_an_array_of_tasks_is_a_list_of_tasks(processor, batch):
    observations = {"images": batch["images"], "state": batch["state"]}
    tasks = ["Push it.", "", "Push it again.", "x"]
    expected = processor(**observations | {"text": tasks})["input_ids"]
    for text in (np.array(tasks), np.array(tasks, dtype=object), tuple(tasks)):
        assert torch.equal(processor(**observations | {"text": text})["input_ids"], expected)
    one = {"images": batch["images"][0], "state": batch["state"][0]}
    expected = processor(**one, text="Push it.")["input_ids"]
    for text in (np.array("Push it."), np.array(["Push it."]), np.str_("Push it.")):
        assert torch.equal(processor(**one, text=text)["input_ids"], expected)


@pytest.mark.parametrize("path", ["front.png", b"front.png", Path("front.png")])
def test_a_path_is_not_an_image(processor, batch, path):
    for images, state in ((path, batch["state"][0]), (path, batch["state"]), ([path] * 4, batch["state"])):
        with pytest.raises(ValueError, match=r"images.* is .*front.png.*PIL.Image.open"):
            processor(images=images, text=TASK, state=state)


EIGHT_BITS = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_images_of_eight_bits_are_converted_to_rgb(mode):
    found = as_rgb_images(Image.new(mode, (5, 4)), "images")
    assert [image.dtype for image in found] == [np.uint8] and found[0].shape == (4, 5, 3)


def test_transparency_is_dropped():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert as_rgb_images(image, "images")[0][0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I", "F", "LAB"])
def test_images_of_more_bits_are_refused_by_their_mode(processor, batch, mode):
    """Pillow would clip depth at 255, which makes a white image of it."""
    image = Image.new(mode, (96, 96))
    with pytest.raises(ValueError, match=rf"images\[0\] is a PIL image of mode '{mode}', expected 8-bit RGB"):
        processor(images=image, text=TASK, state=batch["state"][0])


class LooksLikeAnImage:
    mode, size, ndim, shape, dtype = "RGB", (4, 4), 3, (4, 4, 3), np.uint8

    def convert(self, mode):
        return self

    def detach(self):
        return self


def test_what_only_looks_like_an_image_is_refused(processor, batch):
    empty = Image.new("RGB", (0, 5))
    for image in (LooksLikeAnImage(), memoryview(b"abc"), iter([1]), empty):
        with pytest.raises(ValueError, match=r"images\[0\]"):
            processor(images=image, text=TASK, state=batch["state"][0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.bfloat16])
def test_floats_that_resizing_left_just_outside_one_are_clipped(dtype):
    values = [-1e-3, -1e-8, 0.0, 0.5, 1.0, 1.0000001, 1.001]
    image = torch.tensor(values, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
    image = image.to(dtype) if isinstance(dtype, torch.dtype) else image.numpy().astype(dtype)
    (found,) = as_rgb_images(image, "images")
    assert found[:, 0, 0].tolist() == [0, 0, 0, 128, 255, 255, 255] and found.dtype == np.uint8


@pytest.mark.parametrize("value", [1.01, -0.01, 2.0, 255.0, np.nan, np.inf, -np.inf])
def test_floats_that_are_really_outside_are_refused(value):
    image = np.zeros((4, 4, 3))
    image[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"images has floats from .*expected \[0, 1\]"):
        as_rgb_images(image, "images")
