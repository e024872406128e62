"""Builders the tests share: a made-up data set, a tiny policy for it, real artefacts where they are at hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

from lerobot_policy_smolandfast import SMOLANDFASTConfig, SMOLANDFASTPolicy

SHARED = Path(__file__).parents[3] / "shared"
TASKS = ["Stack the cups.", "Fold the towel."]
CAMERAS = ("observation.images.front", "observation.images.wrist")
STATE_DIM, ACTION_DIM, CHUNK_SIZE = 3, 4, 6
STATE_NAMES, ACTION_NAMES, FPS = ["shoulder.pos", "elbow.pos", "gripper.pos"], ["a", "b", "c", "d"], 20
LENGTHS = (40, 25, 35)  # frames of the episodes


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with `data/pusht`, `assets/smolvlm2_256m` and `assets/fast_plus`."""
    if not SHARED.is_dir():
        pytest.skip("the PushT demonstrations and SmolVLM2's files are not at hand: they are not in the repository")
    return SHARED


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> SimpleNamespace:
    """What the plugin reads of LeRobot's `dataset.meta`, with frames on disk."""
    rng = np.random.default_rng(0)
    states, actions = (rng.normal(0, 0.3, (sum(LENGTHS), dim)).cumsum(0) for dim in (STATE_DIM, ACTION_DIM))
    root = tmp_path_factory.mktemp("dataset")
    (root / "data/chunk-000").mkdir(parents=True)
    columns = {"observation.state": list(states), "action": list(actions), "index": np.arange(sum(LENGTHS))}
    columns["episode_index"] = np.repeat(range(len(LENGTHS)), LENGTHS)
    table = pa.table(columns)
    pq.write_table(table.slice(65), root / "data/chunk-000/file-000.parquet")  # the order of files says nothing
    pq.write_table(table.slice(0, 65), root / "data/chunk-000/file-001.parquet")
    stats = {
        key: {
            "min": values.min(0),
            "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }
        for key, values in (("observation.state", states), ("action", actions))
    }
    image = {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    features = {
        CAMERAS[0]: image,
        "observation.state": {"dtype": "float32", "shape": (STATE_DIM,), "names": STATE_NAMES},
        CAMERAS[1]: image,
        "action": {"dtype": "float32", "shape": (ACTION_DIM,), "names": {"motors": ACTION_NAMES}},
    }
    return SimpleNamespace(
        root=root,
        stats=stats,
        tasks=make_tasks(*TASKS),
        features=features,
        fps=FPS,
        states=states,
        actions=actions,
    )


def make_tasks(*tasks: str) -> pd.DataFrame:
    """A data set's table of tasks."""
    return pd.DataFrame({"task_index": range(len(tasks))}, index=list(tasks))


def make_config(**options) -> SMOLANDFASTConfig:
    options = {
        "vlm_model_name": "tiny",
        "device": "cpu",
        "chunk_size": CHUNK_SIZE,
        "n_action_steps": 4,
        "fast_vocab_size": 256,
        "push_to_hub": False,
    } | options
    return SMOLANDFASTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
            **{key: PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for key in CAMERAS},
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        **options,
    )


def save_checkpoint(policy: SMOLANDFASTPolicy, folder: Path) -> None:
    """Save a policy and its pipelines, as `lerobot-train` does."""
    policy.save_pretrained(folder)
    for pipeline in make_pre_post_processors(policy.config):
        pipeline.save_pretrained(folder)


@pytest.fixture
def make_policy(dataset):
    """A new policy for the made-up data set; keyword arguments are options."""

    def make(**options) -> SMOLANDFASTPolicy:
        torch.manual_seed(0)
        return SMOLANDFASTPolicy(make_config(**options), dataset_stats=dataset.stats, dataset_meta=dataset)

    return make


@pytest.fixture
def batch(dataset) -> dict:
    """What LeRobot's data loader gives for the first three frames."""
    images = torch.randint(0, 256, (len(CAMERAS), 3, 3, 48, 64), generator=torch.manual_seed(0)) / 255
    chunks = np.stack([dataset.actions[i : i + CHUNK_SIZE] for i in range(3)])
    return {
        **dict(zip(CAMERAS, images, strict=True)),
        "observation.state": torch.tensor(dataset.states[:3], dtype=torch.float32),
        "action": torch.tensor(chunks, dtype=torch.float32),
        "task": [TASKS[0], TASKS[1], TASKS[0]],
    }
