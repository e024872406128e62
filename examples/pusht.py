"""The PushT simulator.

`gym_pusht/PushT-v0` (Chi et al. 2023, "Diffusion Policy"): a round pusher moves a T-shaped block onto its outline. An
action is the point in [0, 512]^2 that the pusher is drawn to for a tenth of a second. The reward is the covered share
of the outline, divided by 0.95 and cut at 1; covering 95 % ends the episode as a success.
"""

import itertools
import os

import gymnasium
import numpy as np
from rollouts import FRAME_SIZE, Benchmark

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # else importing pygame prints a greeting
import gym_pusht  # noqa: E402, F401  (registers the environment)

ENV_ID = "gym_pusht/PushT-v0"
TASK = "Push the T-shaped block onto the T-shaped target."
# Other wordings of the task, for training: a policy that has only ever read one sentence understands no other.
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
MAX_EPISODE_STEPS = 300
CONTROL_HZ = 10
ACTION_DIM = 2
IMAGE_SIZE = 96
WORLD_SIZE = 512  # the simulator's pixels a side
CITATION = """@inproceedings{chi2023diffusionpolicy,
  title     = {Diffusion Policy: Visuomotor Policy Learning via Action Diffusion},
  author    = {Chi, Cheng and Feng, Siyuan and Du, Yilun and Xu, Zhenjia and Cousineau, Eric and Burchfiel, Benjamin
               and Song, Shuran},
  booktitle = {Proceedings of Robotics: Science and Systems (RSS)},
  year      = {2023}
}"""


class PushTScene:
    """PushT as a [`rollouts.Scene`]; the state is the pusher's position, poses are the block's: x, y, angle."""

    def __init__(self, task: str = "pusht"):
        sizes = {"visualization_width": FRAME_SIZE, "visualization_height": FRAME_SIZE}
        self.env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos", disable_env_checker=True, **sizes).unwrapped

    def reset(self, seed: int) -> None:
        self._observation, self._info = self.env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self._observation, reward, terminated, _, self._info = self.env.step(action)
        return float(reward), bool(self._info["is_success"]), bool(terminated)

    def image(self) -> np.ndarray:
        return self._observation["pixels"]

    def film(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    @property
    def state(self) -> np.ndarray:
        return self._observation["agent_pos"].astype(np.float32)

    @property
    def poses(self) -> np.ndarray:
        return self._info["block_pose"]


def hold(state: np.ndarray, last_action: np.ndarray | None) -> np.ndarray:
    """The action that stands still: actions are positions."""
    return state if last_action is None else last_action


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
    wordings={TASK: WORDINGS},
    max_reward=1.0,
    hold=hold,
)
