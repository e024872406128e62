"""Behind `app.py`: the policy that all visitors share, and each visitor's own simulator."""

import threading
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from envs import check_policy
from envs.pusht import ACTION_DIM, BENCHMARK, CONTROL_HZ, MAX_EPISODE_STEPS
from envs.pusht.simulator import ENV_ID, WORLD_SIZE
from rollouts import check_chunks
from views import draw_coverage, draw_image, draw_scene, draw_tokens

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.deployment.loop import Schedule
from smolandfast.deployment.runtime import POLICY, DeployedPolicy

SEED = 1000
AGENT_MARGIN, BLOCK_MARGIN = 25, 60  # least distance from the walls at which the pusher and the T may be placed


def load_page_policy(checkpoint: str) -> "Policy | DeployedPagePolicy":
    """The policy that all visitors share: a checkpoint, or what `export_policy.py` wrote.

    Raises:
        OSError: Files are missing or damaged.
        ValueError: A checkpoint of another kind, or a policy of another robot.
    """
    return (DeployedPagePolicy if Path(checkpoint, POLICY).is_file() else Policy)(checkpoint)


class DeployedPagePolicy:
    """A deployed policy, shared by all visitors."""

    def __init__(self, folder: str):
        self.policy = DeployedPolicy(folder)
        robot = (getattr(self.policy, name) for name in ("action_dim", "state_dim", "image_keys", "fps"))
        check_policy(BENCHMARK, *robot)
        self.n_action_steps = self.policy.n_action_steps
        self._one_at_a_time = threading.Lock()

    def predict(self, image: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """See [`Policy.predict`]."""
        with self._one_at_a_time:
            report = self.policy.report(image, None, state)
        chunk = check_chunks(report["actions"], 1, self.n_action_steps, ACTION_DIM)[0]
        lengths = self.policy.token_lengths
        return chunk, [(token, lengths[token] if lengths else 0) for token in report["tokens"][0].tolist()]


class Policy:
    """The model and its processor, shared by all visitors."""

    def __init__(self, checkpoint: str):
        self.model = SmolAndFastForActionPrediction.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor = SmolAndFastProcessor.from_pretrained(checkpoint)
        self.processor.check_model(self.model)
        normalizer = self.processor.normalizer
        check_policy(
            BENCHMARK, normalizer.action_dim, normalizer.state_dim, self.processor.image_keys, self.processor.fps
        )
        self.n_action_steps = self.model.config.n_action_steps
        self._one_at_a_time = threading.Lock()

    def predict(self, image: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The next chunk `(H, 2)`, and its tokens with the number of DCT coefficients of each (0: unknown)."""
        inputs = self.processor(images=image, state=state.astype(np.float32))
        with self._one_at_a_time:
            ids = self.model.generate(**inputs, do_sample=False)
        chunk = check_chunks(self.processor.post_process_actions(ids), 1, self.n_action_steps, ACTION_DIM)[0]
        config = self.model.config
        written = config.action_token_base_id - ids[0, inputs["input_ids"].shape[1] :]  # (length,), with padding
        tokens = [token for token in written.tolist() if 0 <= token < config.num_action_tokens]
        lengths = config.fast_token_lengths or [0] * config.num_action_tokens  # unknown with FAST+
        return chunk, [(token, lengths[token]) for token in tokens]


class Session:
    """One visitor's simulator and what has happened in it.

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
        """Start the episode that an evaluation with this seed plays."""
        with self.lock:
            self.observation, _ = self.env.reset(seed=seed)
            self._start()

    def place(self, agent: Any, block: Any) -> None:
        """Start an episode from a scene that the visitor arranged; positions too close to a wall are moved inwards.

        Args:
            agent: x and y of the pusher.
            block: x, y and angle in radians of the T.

        Raises:
            ValueError: not two and three finite numbers.
        """
        try:
            agent, block = np.asarray(agent, np.float64), np.asarray(block, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"agent is {agent!r}, block is {block!r}, expected numbers.") from error
        if agent.shape != (2,) or block.shape != (3,) or not np.isfinite([*agent, *block]).all():
            raise ValueError(f"agent is {agent}, block is {block}, expected 2 and 3 finite numbers. Drag them again.")
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
        """Execute one action, a tenth of a second; first ask the policy for a chunk if the last is used up."""
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
        """The scene, the coverage, the tokens and what the policy sees, as HTML."""
        with self.lock:
            steps = self.policy.n_action_steps
            scene = draw_scene(self.env, self.path, self.chunk, self.num_executed, steps, self.success)
            threshold, seconds = self.env.success_threshold, MAX_EPISODE_STEPS / CONTROL_HZ
            coverage = draw_coverage(self.coverages, threshold, self.success, CONTROL_HZ, seconds)
            return [scene, coverage, draw_tokens(self.tokens, self.chunk.size), draw_image(self.observation["pixels"])]
