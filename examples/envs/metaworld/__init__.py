"""Meta-World (Yu et al. 2019): fifty tabletop tasks, each given as a one-sentence instruction."""

import numpy as np

from envs import Benchmark, rendering  # noqa: F401 - sets MUJOCO_GL before MuJoCo is imported

from .simulator import (
    ACTION_DIM,
    CONTROL_HZ,
    DIFFICULTIES,
    IMAGE_SIZE,
    MAX_EPISODE_STEPS,
    STATE_DIM,
    TASKS,
    MetaworldScene,
    vary_demonstration,
)
from .wordings import OTHER_WORDINGS

CITATION = """@inproceedings{yu2019metaworld,
  title     = {Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning},
  author    = {Yu, Tianhe and Quillen, Deirdre and He, Zhanpeng and Julian, Ryan and Hausman, Karol and Finn, Chelsea
               and Levine, Sergey},
  booktitle = {Conference on Robot Learning (CoRL)},
  year      = {2019}
}"""


def hold(state: np.ndarray, last_action: np.ndarray | None) -> np.ndarray:
    """The action that stands still. Actions are velocities and the gripper's force."""
    return np.array([0, 0, 0, 0 if last_action is None else last_action[3]], dtype=np.float32)


BENCHMARK = Benchmark(
    name="metaworld",
    repo_id="lerobot/metaworld_mt50",
    tasks=TASKS,
    groups=DIFFICULTIES,
    make_scene=MetaworldScene,
    fps=CONTROL_HZ,
    max_steps=MAX_EPISODE_STEPS,
    state_dim=STATE_DIM,
    action_dim=ACTION_DIM,
    image_size=IMAGE_SIZE,
    preset={
        "scale_factor": 4,
        "chunk_size": 12,
        "n_action_steps": 8,
        "fast_scale": 4.0,
        "fast_vocab_size": 512,
        "max_steps": 6_000,
        "eval_steps": 2_000,
        "save_steps": 2_000,
        "eval_episodes": 1,
    },
    packages=("metaworld", "mujoco"),
    card={
        "title": "Meta-World",
        "env_id": "Meta-World/MT50",
        "success": "as Meta-World judges, at any step",
        "citation": CITATION,
    },
    vary=vary_demonstration,
    variations=("max_shift",),
    wordings={TASKS[task]: wordings for task, wordings in OTHER_WORDINGS.items()},
    film_every=4,
    has_full_render=True,
    hold=hold,
)
