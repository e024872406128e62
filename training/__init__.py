"""Code for training only. Checkpoints do not include these files."""

from .checkpoints import AtomicCheckpointTrainer, find_checkpoints, last_whole_checkpoint
from .collator import ActionDataCollator
from .data import JoinedChunkDatasets, LeRobotChunkDataset, download_dataset, evenly_spaced, read_info
from .inspection import DatasetReport, action_kind, fit_normalizer, inspect_dataset
from .muon import make_muon
from .optimization import bf16_is_faster, make_optimizer, parameter_groups
from .tiny import make_tiny_model, make_tiny_processor, make_tiny_vision

__all__ = [
    "ActionDataCollator",
    "AtomicCheckpointTrainer",
    "DatasetReport",
    "JoinedChunkDatasets",
    "LeRobotChunkDataset",
    "action_kind",
    "bf16_is_faster",
    "download_dataset",
    "evenly_spaced",
    "find_checkpoints",
    "fit_normalizer",
    "inspect_dataset",
    "last_whole_checkpoint",
    "make_muon",
    "make_optimizer",
    "make_tiny_model",
    "make_tiny_processor",
    "make_tiny_vision",
    "parameter_groups",
    "read_info",
]
