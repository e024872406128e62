"""SO-101 (so101-nexus): a six-joint arm picks up the cube that the instruction names."""

from envs import Benchmark, hold_position, rendering  # noqa: F401 - sets MUJOCO_GL before MuJoCo is imported

from .simulator import (
    ACTION_DIM,
    CONTROL_HZ,
    IMAGE_KEYS,
    IMAGE_SIZE,
    MAX_EPISODE_STEPS,
    STATE_DIM,
    TASKS,
    SO101Scene,
)
from .variation import MAX_ANGLE, RECOLOR_PROBABILITY, turns, vary_demonstration

CITATION = """@software{so101nexus,
  title = {SO101-Nexus},
  url   = {https://pypi.org/project/so101-nexus/0.10.0/}
}"""

BENCHMARK = Benchmark(
    name="so101",
    repo_id=None,
    tasks=TASKS,
    groups={},
    make_scene=SO101Scene,
    fps=CONTROL_HZ,
    max_steps=MAX_EPISODE_STEPS,
    state_dim=STATE_DIM,
    action_dim=ACTION_DIM,
    image_keys=IMAGE_KEYS,
    image_size=IMAGE_SIZE,
    preset={
        "scale_factor": 2,
        "chunk_size": 16,
        "n_action_steps": 8,
        "use_relative_actions": True,
        "relative_exclude_joints": ["gripper.pos"],
        "fast_scale": 20.0,
        "fast_vocab_size": 1024,
        "max_angle": MAX_ANGLE,
        "recolor_probability": RECOLOR_PROBABILITY,
        "max_steps": 6_000,
        "eval_steps": 2_000,
        "save_steps": 2_000,
    },
    packages=("so101-nexus", "mujoco"),
    card={
        "title": "SO-101, pick up the named cube",
        "env_id": "so101-nexus/PickLift",
        "success": "the named cube held 5 cm above its start",
        "citation": CITATION,
    },
    vary=vary_demonstration,
    variations=("max_angle", "recolor_probability"),
    largest_angle=60.0,  # demonstrations pan by up to 45 degrees, and the arm cannot pan beyond 110
    symmetries=turns,
    film_every=2,
    has_full_render=True,
    hold=hold_position,
)
