"""PushT (Chi et al. 2023): a round pusher moves a T-shaped block onto its outline."""

import itertools

from envs import Benchmark, hold_position

from .scenes import rotations, symmetries, vary_demonstration
from .simulator import ACTION_DIM, CONTROL_HZ, ENV_ID, IMAGE_SIZE, MAX_EPISODE_STEPS, TASK, PushTScene

# Rephrasings of the task, for training: a policy trained on one instruction does not understand any other.
VERBS = ("Push", "Move", "Slide", "Please bring", "Use the pusher to shove", "carefully guide")
BLOCKS = ("the T-shaped block", "the T", "the grey T", "the letter T", "the grey piece")
GOALS = (
    "onto the T-shaped target.",
    "onto the green T",
    "into the green outline.",
    "to the target",
    "until it covers the goal.",
    "to where it belongs",
)
WORDINGS = [" ".join(words) for words in itertools.product(VERBS, BLOCKS, GOALS)]
CITATION = """@inproceedings{chi2023diffusionpolicy,
  title     = {Diffusion Policy: Visuomotor Policy Learning via Action Diffusion},
  author    = {Chi, Cheng and Feng, Siyuan and Du, Yilun and Xu, Zhenjia and Cousineau, Eric and Burchfiel, Benjamin
               and Song, Shuran},
  booktitle = {Proceedings of Robotics: Science and Systems (RSS)},
  year      = {2023}
}"""


BENCHMARK = Benchmark(
    name="pusht",
    repo_id="lerobot/pusht",
    tasks={"pusht": TASK},
    groups={},
    make_scene=PushTScene,
    fps=CONTROL_HZ,
    max_steps=MAX_EPISODE_STEPS,
    state_dim=2,
    action_dim=ACTION_DIM,
    image_size=IMAGE_SIZE,
    preset={
        "scale_factor": 3,
        "chunk_size": 16,
        "n_action_steps": 8,
        "use_relative_actions": True,
        "fast_scale": 30.0,
        "fast_vocab_size": 512,
        "drop_n_last_frames": 8,
        "mirror_probability": 0.5,
        "turn_probability": 0.3,
        "max_shift": 3,
        "max_angle": 15.0,
        "reword_probability": 0.5,
        "max_steps": 5_600,
        "eval_steps": 1_400,
        "save_steps": 1_400,
    },
    packages=("gymnasium", "gym_pusht", "pymunk"),
    card={"title": "PushT", "env_id": ENV_ID, "success": "95 % of the target covered", "citation": CITATION},
    vary=vary_demonstration,
    variations=("mirror_probability", "turn_probability", "max_shift", "max_angle"),
    symmetries=symmetries,
    rotations=rotations,
    wordings={TASK: WORDINGS},
    max_reward=1.0,
    hold=hold_position,
)
