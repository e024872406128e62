"""From samples of a data set to a batch with labels."""

from transformers import BatchFeature

from ..processing_smolandfast import SmolAndFastProcessor


class ActionDataCollator:
    """Turns samples into a batch with labels, through the processor.

    A sample is a dictionary with `images` (one a camera), `text` (the task), `state` `(state_dim,)` and `actions`
    `(chunk_size, action_dim)`, in the robot's units.
    """

    def __init__(self, processor: SmolAndFastProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> BatchFeature:
        columns = {name: [sample[name] for sample in samples] for name in ("images", "text", "state", "actions")}
        return self.processor(**columns)
