"""What a policy is shown: one sample's or a batch's images, task and state, checked, and the prompt around them.

Needs NumPy and Pillow alone: the processor and a deployed policy (`runtime_smolandfast.py`) refuse the same input, and
write the same prompt.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np

from .checks_smolandfast import as_numbers, as_rgb_images

PROMPT = "Task: {task}, State: {bins}{prefix}, Action: "
PREFIX = ", Next: {bins}"  # of actions that are already committed, one after the other
BINS_IN_PROMPT = re.compile(r"State: ([\d ]+)(?:, Next: [\d ]+)?, Action: ")


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


def read_action_prefixes(action_prefix, batch: int, action_dim: int, max_delay: int) -> list[np.ndarray]:
    """Read `action_prefix` of [`SmolAndFastProcessor.__call__`]: for each sample `(n, action_dim)`, n may be 0.

    Raises:
        ValueError: More actions than the policy is trained for, of another dimension, or not finite.
    """
    none = np.zeros((0, action_dim))
    if not isinstance(action_prefix, (list, tuple)):
        values = [] if action_prefix is None else as_numbers(action_prefix, "action_prefix")
        action_prefix = list(np.atleast_1d(values))
    if len(action_prefix) == 0:
        return [none] * batch
    if batch == 1 and as_numbers(action_prefix[0], "action_prefix[0]").ndim == 1 and len(action_prefix[0]) > 0:
        action_prefix = [action_prefix]
    if len(action_prefix) != batch:
        raise ValueError(f"action_prefix has {len(action_prefix)} samples for {batch} states, expected one a state.")
    prefixes = []
    for i, actions in enumerate(action_prefix):
        name = f"action_prefix[{i}]"
        actions = as_numbers(actions, name)
        actions = none if actions.size == 0 else as_numbers(actions, name, ("n", action_dim))
        if len(actions) > max_delay:
            raise ValueError(
                f"{name} has {len(actions)} actions, expected at most max_delay, {max_delay}, which the policy is "
                "trained for. Pass fewer, or train a policy with a larger max_delay."
            )
        prefixes.append(actions)
    return prefixes


def write_prompt(
    before: str,
    task: str,
    bins: Sequence[int],
    after: str,
    special_tokens: Collection[str],
    prefix_bins: np.ndarray | None = None,
) -> str:
    """The prompt of one sample, between what stands before and after it: marks of images, turns of the chat."""
    if not isinstance(task, str) or any(token in task for token in special_tokens):
        raise ValueError(f"text is {task!r}, expected a sentence that holds none of the tokenizer's special tokens.")
    prefix = "" if prefix_bins is None or len(prefix_bins) == 0 else PREFIX.format(bins=_join(prefix_bins.ravel()))
    return before + PROMPT.format(task=task, bins=_join(bins), prefix=prefix) + after


def _join(bins: Sequence[int]) -> str:
    return " ".join(map(str, bins))


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
