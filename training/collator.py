"""From samples of a data set to a batch with labels."""

from transformers import BatchFeature

from ..processing_smolandfast import SmolAndFastProcessor

FIELDS = ("images", "text", "state", "actions")


class ActionDataCollator:
    """Turns samples into a batch with labels, through the processor.

    A sample is a dictionary with `images` (one a camera), `text` (the task), `state` `(state_dim,)` and `actions`
    `(chunk_size, action_dim)`, in the robot's units.

    Raises:
        ValueError: A sample lacks one of them; the message names the sample and the field.
    """

    def __init__(self, processor: SmolAndFastProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> BatchFeature:
        for i, sample in enumerate(samples):
            for name in FIELDS:
                if name not in sample:
                    raise ValueError(
                        f"samples[{i}] has no {name!r}, only {sorted(sample)}; expected {', '.join(FIELDS)}. Return "
                        "them from the data set, and with another Trainer than AtomicCheckpointTrainer set "
                        "TrainingArguments(remove_unused_columns=False), or it removes them."
                    )
        return self.processor(**{name: [sample[name] for sample in samples] for name in FIELDS})
