"""Batches of samples of a data set."""

from transformers import BatchFeature

from ..processing_smolandfast import SmolAndFastProcessor

FIELDS = ("images", "text", "state", "actions")


class ActionDataCollator:
    """Turns samples into a batch with labels, with the processor.

    A sample is a dictionary with `images` (one per camera), `text` (the task), `state` `(state_dim,)` and `actions`
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
                        "them from the data set. Trainers other than AtomicCheckpointTrainer remove them unless "
                        "TrainingArguments has remove_unused_columns=False."
                    )
        return self.processor(**{name: [sample[name] for sample in samples] for name in FIELDS})
