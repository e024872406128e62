"""From samples of a data set to a batch with labels."""

from collections.abc import Sequence

import torch
from transformers import BatchFeature

from ..processing_smolandfast import SmolAndFastProcessor


class ActionDataCollator:
    """Turns samples into a batch with labels, through the processor.

    A sample is a dictionary with `images` (one a camera), `text` (the task), `state` `(state_dim,)` and `actions`
    `(chunk_size, action_dim)`, in the robot's units.

    If the processor has a `max_delay`, every second batch is told its chunks' first actions, 1 to `max_delay` of them,
    as they are on a robot that does not wait (training-time action conditioning, arXiv 2512.05964). One number for a
    batch, so that little is padded; drawn from PyTorch's random numbers, which `Trainer` seeds. A sample may have a
    smaller `max_delay` of its own: near its demonstration's end, where what is executed after it would be padding.
    """

    def __init__(self, processor: SmolAndFastProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> BatchFeature:
        columns = {name: [sample[name] for sample in samples] for name in ("images", "text", "state", "actions")}
        max_delay = self.processor.max_delay
        limits = [sample.get("max_delay", max_delay) for sample in samples]
        columns["action_prefix"] = draw_action_prefixes(columns["actions"], max_delay, limits)
        return self.processor(**columns)


def draw_action_prefixes(actions: Sequence, max_delay: int, limits: Sequence[int]) -> list:
    """The first actions of each chunk `(chunk_size, action_dim)`: none, or as often 1 to `max_delay` of each.

    Of chunk i at most `limits[i]`.
    """
    is_told = max_delay > 0 and torch.rand(()) < 0.5
    delay = int(torch.randint(1, max_delay + 1, ())) if is_told else 0
    return [chunk[: min(delay, limit)] for chunk, limit in zip(actions, limits, strict=True)]
