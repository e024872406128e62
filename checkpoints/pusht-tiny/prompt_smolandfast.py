"""What a policy is shown: one sample's or a batch's images, task and state, checked, and the prompt around them.

Needs NumPy and Pillow alone: the processor and a deployed policy (`runtime_smolandfast.py`) refuse the same input, and
write the same prompt.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np

from .checks_smolandfast import as_numbers, as_rgb_images

PROMPT = "Task: {task}, State: {bins}, Action: "
BINS_IN_PROMPT = re.compile(r"State: ([\d ]+), Action: ")


def read_observations(images, text, state, default_task: str) -> tuple[list[list[np.ndarray]], list[str], np.ndarray]:
    """Read the arguments of [`SmolAndFastProcessor.__call__`].

    Returns:
        For each sample its images, uint8 arrays `(H, W, 3)`, one a camera; its task; and the states, float64
        `(batch, state_dim)`.

    Raises:
        ValueError: Input that is missing, of the wrong shape or kind, or not finite.
    """
    if images is None or state is None:
        raise ValueError("The policy needs images and state, images=image, text=task, state=state.")
    state = as_numbers(state, "state")
    if state.ndim not in (1, 2) or state.size == 0:
        raise ValueError(f"state has shape {state.shape}, expected (state_dim,) or (batch, state_dim).")
    if state.ndim == 1:
        state, images = state[None], [images]
    elif not isinstance(images, (list, tuple)) and np.ndim(images) < 4:
        images = [images]
    tasks = text if isinstance(text, (list, tuple)) else [text] * len(state)
    tasks = [default_task if task is None or task == "" else task for task in tasks]
    if len(images) != len(state) or len(tasks) != len(state):
        raise ValueError(
            f"Got {len(images)} samples of images, {len(tasks)} tasks and {len(state)} states, expected one of "
            "each a sample. For one sample, state has shape (state_dim,)."
        )
    return [as_rgb_images(sample, f"images[{i}]") for i, sample in enumerate(images)], tasks, state


def write_prompt(before: str, task: str, bins: Sequence[int], after: str, special_tokens: Collection[str]) -> str:
    """The prompt of one sample, between what stands before and after it: marks of images, turns of the chat."""
    if not isinstance(task, str) or any(token in task for token in special_tokens):
        raise ValueError(f"text is {task!r}, expected a sentence that holds none of the tokenizer's special tokens.")
    return before + PROMPT.format(task=task, bins=" ".join(map(str, bins))) + after


def warning_of_new_tasks(tasks: list[str], training_tasks: list[str] | None) -> str | None:
    """What to tell a user whose policy was not trained on one of these sentences."""
    new = [task for task in tasks if task not in training_tasks] if training_tasks else []
    if not new:
        return None
    more = f" and {len(training_tasks) - 3} more (training_tasks)" if len(training_tasks) > 3 else ""
    return (
        f"The policy is told {new[0]!r}, and was trained on other sentences: "
        f"{', '.join(map(repr, training_tasks[:3]))}{more}. Use one of them, or measure first what it does with this "
        "one."
    )
