"""Behind `app.py`: the policy that all visitors share, and each visitor's own simulator."""

import threading
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from envs import check_policy
from envs.pusht import ACTION_DIM, BENCHMARK, MAX_EPISODE_STEPS
from envs.pusht.simulator import ENV_ID, WORLD_SIZE
from evaluate import load_policy
from rollouts import check_chunks
from views import describe_tokens, draw_coverage, draw_image, draw_scene

from smolandfast.checks_smolandfast import as_numbers
from smolandfast.deployment.loop import Schedule
from smolandfast.deployment.runtime import POLICY, DeployedPolicy

SEED = 1000
AGENT_MARGIN, BLOCK_MARGIN = 25, 60  # least distance from the walls at which the pusher and the T may be placed


class Policy:
    """A checkpoint that all visitors share; it answers one request at a time.

    Raises:
        OSError: Files are missing or damaged.
        ValueError: A checkpoint of another kind, or a policy of another robot.
    """

    def __init__(self, checkpoint: str):
        self._load(checkpoint)
        self._lock = threading.Lock()

    def _load(self, checkpoint: str) -> None:
        self.model, self.processor = load_policy(checkpoint, dtype=torch.float32)
        normalizer, config = self.processor.normalizer, self.model.config
        robot = normalizer.action_dim, normalizer.state_dim, self.processor.image_keys, self.processor.fps
        check_policy(BENCHMARK, *robot)
        self.n_action_steps, self.token_lengths = config.n_action_steps, config.fast_token_lengths

    def _predict(self, image: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, list[int]]:
        inputs, config = self.processor(images=image, state=state.astype(np.float32)), self.model.config
        ids = self.model.generate(**inputs, do_sample=False)
        written = config.action_token_base_id - ids[0, inputs["input_ids"].shape[1] :]  # (length,), with padding
        tokens = [token for token in written.tolist() if 0 <= token < config.num_action_tokens]
        return self.processor.post_process_actions(ids), tokens

    def predict(self, image: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The next chunk `(H, 2)`, and its tokens with the number of DCT coefficients of each (0: unknown)."""
        with self._lock:
            chunks, tokens = self._predict(image, state)
        chunk = check_chunks(chunks, 1, self.n_action_steps, ACTION_DIM)[0]
        return chunk, [(token, self.token_lengths[token] if self.token_lengths else 0) for token in tokens]


class DeployedPagePolicy(Policy):
    """The same for a deployed policy."""

    def _load(self, checkpoint: str) -> None:
        policy = self.policy = DeployedPolicy(checkpoint)
        check_policy(BENCHMARK, policy.action_dim, policy.state_dim, policy.image_keys, policy.fps)
        self.n_action_steps, self.token_lengths = policy.n_action_steps, policy.token_lengths

    def _predict(self, image: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, list[int]]:
        report = self.policy.report(image, None, state)
        return report["actions"], report["tokens"][0].tolist()


def load_page_policy(checkpoint: str) -> Policy:
    """A checkpoint, or a deployed policy; see [`Policy`]."""
    return (DeployedPagePolicy if Path(checkpoint, POLICY).is_file() else Policy)(checkpoint)


class Session:
    """One visitor's simulator and episode.

    Attributes:
        chunk: `(H, 2)`, the chunk that is being executed; empty before the first.
        num_executed: How many of its actions have been executed.
        tokens: Its tokens, see [`Policy.predict`].
        path: Positions of the pusher, including the start.
        coverages: Covered share of the target after each step.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos").unwrapped
        self.lock = threading.Lock()
        self.turn = 0  # the visitor's actions so far; a run ends once this has changed
        self.reset(SEED)

    def reset(self, seed: int) -> None:
        """Start the episode of this seed, the same as in an evaluation."""
        with self.lock:
            self.observation, _ = self.env.reset(seed=seed)
            self._start()

    def place(self, agent: Any, block: Any) -> None:
        """Start an episode from a scene that the visitor arranged; positions too close to a wall are moved inwards.

        Args:
            agent: x and y of the pusher.
            block: x, y and angle in radians of the T.

        Raises:
            ValueError: Not two and three finite numbers.
        """
        agent, block = as_numbers(agent, "agent", (2,)), as_numbers(block, "block", (3,))
        with self.lock:
            self.env.reset()
            self.env.agent.position = tuple(np.clip(agent, AGENT_MARGIN, WORLD_SIZE - AGENT_MARGIN))
            self.env.block.angle = block[2]  # before the position, since the T turns about its centre of gravity
            self.env.block.position = tuple(np.clip(block[:2], BLOCK_MARGIN, WORLD_SIZE - BLOCK_MARGIN))
            for body in (self.env.agent, self.env.block):
                self.env.space.reindex_shapes_for_body(body)
            self.observation = self.env.get_obs()
            self._start()

    def _start(self) -> None:
        self.schedule = Schedule(self.policy.n_action_steps)
        self.chunk, self.num_executed, self.tokens = np.zeros((0, 2)), 0, []
        self.path, self.coverages, self.success = [self.observation["agent_pos"]], [], False

    @property
    def done(self) -> bool:
        return self.success or len(self.coverages) == MAX_EPISODE_STEPS

    def step(self) -> None:
        """Execute one action, a tenth of a second; predict a chunk first if the last is used up."""
        with self.lock:
            if self.done:
                return
            if self.schedule.is_due():
                observation = self.observation
                self.chunk, self.tokens = self.policy.predict(observation["pixels"], observation["agent_pos"])
                self.schedule.arrive(self.chunk, self.schedule.step)
                self.num_executed = 0
            self.observation, _, self.success, _, info = self.env.step(self.schedule.next_action())
            self.num_executed += 1
            self.path.append(self.observation["agent_pos"])
            self.coverages.append(float(info["coverage"]))

    def views(self) -> list[str]:
        """The scene, the coverage, the tokens and the policy's image, as HTML."""
        with self.lock:
            executed = self.num_executed, self.policy.n_action_steps
            return [
                draw_scene(self.env, self.path, self.chunk, *executed, self.success),
                draw_coverage(self.coverages, self.env.success_threshold, self.success),
                describe_tokens(self.tokens, self.chunk.size),
                draw_image(self.observation["pixels"]),
            ]
