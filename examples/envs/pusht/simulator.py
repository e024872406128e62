"""The PushT simulator, `gym_pusht/PushT-v0` (Chi et al. 2023, "Diffusion Policy").

A round pusher moves a T-shaped block onto its outline. An action is the point in [0, 512]^2 that the pusher moves
towards for a tenth of a second. The reward is the covered share of the outline, divided by 0.95 and clipped at 1;
covering 95 % ends the episode as a success.
"""

import os

import gymnasium
import numpy as np

from envs import FRAME_SIZE

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # keeps pygame from printing a greeting
import gym_pusht  # noqa: E402, F401  (registers the environment)

ENV_ID = "gym_pusht/PushT-v0"
TASK = "Push the T-shaped block onto the T-shaped target."
MAX_EPISODE_STEPS = 300
CONTROL_HZ = 10
ACTION_DIM = 2
IMAGE_SIZE = 96
WORLD_SIZE = 512  # side of the simulator's coordinates


class PushTScene:
    """A [`envs.Scene`] of PushT. The state is the pusher's position; `poses` is the block's x, y and angle."""

    def __init__(self, task: str = "pusht"):
        sizes = {"visualization_width": FRAME_SIZE, "visualization_height": FRAME_SIZE}
        self.env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos", disable_env_checker=True, **sizes).unwrapped

    def reset(self, seed: int) -> None:
        self._observation, self._info = self.env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self._observation, reward, terminated, _, self._info = self.env.step(action)
        return float(reward), bool(self._info["is_success"]), bool(terminated)

    def images(self) -> list[np.ndarray]:
        return [self._observation["pixels"]]

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
