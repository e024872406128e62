"""Input validation of a policy (images, task, state), its pixels, and the prompt.

Needs only NumPy and Pillow, so that a deployed policy (`deployment/runtime.py`) shares it with the processor.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .checks_smolandfast import as_numbers, as_rgb_images

PROMPT = "Task: {task}, State: {bins}, Action: "
CALL = "Pass images=..., text=task, state=..., in this order or by name."
BINS_IN_PROMPT = re.compile(r"State: ([\d ]+), Action: ")


@dataclass(frozen=True)
class ImageResizer:
    """Resizes RGB images to the square that the policy sees, as its processor does.

    Args:
        side: Pixels along each side.
        resample: One of Pillow's filters, see `PIL.Image.Resampling`.
        with_pad: Keep the aspect ratio, and centre the image between black bars. Otherwise it is stretched.
    """

    side: int
    resample: int
    with_pad: bool = False

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 `(H, W, 3) -> (side, side, 3)`."""
        side, (height, width) = self.side, image.shape[:2]
        if height == width == side:
            return image
        if not self.with_pad:
            return np.asarray(Image.fromarray(image).resize((side, side), self.resample))
        scale = side / max(height, width)
        height, width = (max(1, round(length * scale)) for length in (height, width))
        top, left = (side - height) // 2, (side - width) // 2
        square = np.zeros((side, side, 3), dtype=np.uint8)
        resized = Image.fromarray(image).resize((width, height), self.resample)
        square[top : top + height, left : left + width] = np.asarray(resized)
        return square


def pixel_table(rescale_factor: float, image_mean: Sequence[float], image_std: Sequence[float]) -> np.ndarray:
    """Each value of each channel as the vision tower reads it, `(3, 256)` float32: rescaled and normalised."""
    values = (np.arange(256) * rescale_factor).astype(np.float32)
    mean, std = (np.float32(numbers)[:, None] for numbers in (image_mean, image_std))
    return (values - mean) / std


def to_pixel_values(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """uint8 `(side, side, 3) -> (3, side, side)` float32, with the table of [`pixel_table`]."""
    return table[np.arange(3)[:, None, None], image.transpose(2, 0, 1)]


def read_observations(
    images, text, state, default_task: str, image_keys: Sequence[str]
) -> tuple[list[list[np.ndarray]], list[str], np.ndarray]:
    """Read the arguments of [`SmolAndFastProcessor.__call__`].

    Returns:
        For each sample its images, uint8 arrays `(H, W, 3)` in the order of `image_keys`; its task; and the states,
        float64 `(batch, state_dim)`.

    Raises:
        ValueError: Input that is missing, of the wrong shape or kind, or not finite; other cameras than `image_keys`.
    """
    if images is None or state is None:
        raise ValueError(f"The policy needs images and state. {CALL}")
    tasks = _read_text(text)
    if isinstance(images, (str, bytes, os.PathLike)):
        raise ValueError(
            f"images is {images!r:.200}, expected RGB images. {CALL} Open a file with PIL.Image.open(path) first."
        )
    state = as_numbers(state, "state")
    if state.ndim not in (1, 2) or state.size == 0:
        raise ValueError(f"state has shape {state.shape}, expected (state_dim,) or (batch, state_dim). {CALL}")
    if isinstance(images, Mapping):
        columns = _in_order(images, "images", image_keys)
        images = list(columns) if state.ndim == 1 else _as_samples(columns, image_keys, len(state))
    if state.ndim == 1:
        state, images = state[None], [images]
    elif not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) < 4:
        images = [images]
    tasks = tasks if isinstance(tasks, list) else [tasks] * len(state)
    tasks = [default_task if task is None or not task.strip() else task for task in tasks]
    if "" in tasks:
        raise ValueError("text is empty, and the policy has no default_task. Pass the instruction as text=....")
    if len(images) != len(state) or len(tasks) != len(state):
        raise ValueError(
            f"Got {len(images)} samples of images, {len(tasks)} tasks and {len(state)} states, expected one of each "
            "per sample. For one sample, state has shape (state_dim,)."
        )
    samples = []
    for i, sample in enumerate(images):
        name = f"images[{i}]"
        sample = as_rgb_images(_in_order(sample, name, image_keys) if isinstance(sample, Mapping) else sample, name)
        if len(sample) != len(image_keys):
            raise ValueError(
                f"{name} has {len(sample)} images, expected {len(image_keys)}, one of each camera that the policy was "
                f"trained with: {', '.join(image_keys)}. Pass them in this order, or as a dictionary by name."
            )
        samples.append(sample)
    return samples, tasks, state


def _read_text(text) -> str | list[str | None] | None:
    """The instruction, or a list of them; `None` stands for the default task."""
    tasks = text.tolist() if isinstance(text, np.ndarray) and text.dtype.kind in "UO" else text
    tasks = list(tasks) if isinstance(tasks, tuple) else tasks
    for i, task in enumerate(tasks if isinstance(tasks, list) else [tasks]):
        if task is not None and not isinstance(task, str):
            name = f"text[{i}]" if isinstance(tasks, list) else "text"
            raise ValueError(
                f"{name} is {_describe(task)}, expected an instruction, or a list with one for each sample. {CALL}"
            )
    return tasks


def _describe(value) -> str:
    """The shape of an array or tensor, other short values in full."""
    kind = type(value).__name__
    return f"a {kind} of shape {tuple(value.shape)}" if hasattr(value, "shape") else f"{value!r:.200} ({kind})"


def check_names(names: Sequence[str], name: str, size: int | None = None) -> list[str]:
    """Return different names as a list; raise `ValueError` for anything else, or another number of them."""
    is_list = isinstance(names, (list, tuple)) and all(isinstance(item, str) and item for item in names)
    if not is_list or not names or len(set(names)) != len(names) or size not in (None, len(names)):
        count = "a list of" if size is None else size
        raise ValueError(f"{name} is {names!r}, expected {count} different names. Take them from the data set.")
    return list(names)


def _in_order(images: dict, name: str, image_keys: Sequence[str]) -> list:
    """Values by camera name, in the order of the policy's cameras."""
    if set(images) != set(image_keys):
        raise ValueError(
            f"{name} has the cameras {sorted(map(str, images))}, expected {list(image_keys)}, those that the policy "
            "was trained with. Rename or add the others."
        )
    return [images[key] for key in image_keys]


def _as_samples(columns: list, image_keys: Sequence[str], batch: int) -> list[list]:
    """From one batch per camera to one list per sample."""
    for key, column in zip(image_keys, columns, strict=True):
        count = len(column) if hasattr(column, "__len__") else type(column).__name__
        if count != batch:
            raise ValueError(f"images[{key!r}] has {count} images for {batch} states, expected one per state.")
    return [list(sample) for sample in zip(*columns, strict=True)]


def write_prompt(before: str, task: str, bins: Sequence[int], after: str, special_tokens: Collection[str]) -> str:
    """The prompt of one sample, between the chat template's text before (with the images) and after it."""
    is_text = isinstance(task, str) and task.encode(errors="ignore").decode() == task  # no lone surrogates
    if not is_text or any(token in task for token in special_tokens):
        raise ValueError(f"text is {task!r}, expected an instruction in plain words, without special tokens.")
    return before + PROMPT.format(task=task, bins=" ".join(map(str, bins))) + after


def name_tasks(training_tasks: list[str]) -> str:
    """The first three instructions, for a message."""
    more = f" and {len(training_tasks) - 3} more (training_tasks)" if len(training_tasks) > 3 else ""
    return ", ".join(map(repr, training_tasks[:3])) + more


def warning_of_new_tasks(tasks: list[str], training_tasks: list[str] | None) -> str | None:
    """The warning for instructions that are not in `training_tasks`; `None` if there are none."""
    new = [task for task in tasks if task not in training_tasks] if training_tasks else []
    if not new:
        return None
    return (
        f"The instruction {new[0]!r} is not one that the policy was trained on: "
        f"{name_tasks(training_tasks)}. Use one of them, or measure its success on this one first."
    )
