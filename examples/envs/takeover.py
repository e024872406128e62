"""A policy plays the beginning of a demonstration; the expert takes over (Kelly et al. 2019, arXiv 1810.02890)."""

import functools

from evaluate import load_policy, make_predict
from rollouts import Predict

from . import Scene

Player = tuple[Predict, int]  # a policy's `predict` and its `n_action_steps`


@functools.cache
def load_player(checkpoint: str) -> Player:
    model, processor = load_policy(checkpoint)
    return make_predict(model, processor), model.config.n_action_steps


def play(scene: Scene, player: Player, num_steps: int, instruction: str) -> bool:
    """Let the policy play. Returns whether the episode is over."""
    predict, n_action_steps = player
    for start in range(0, num_steps, n_action_steps):
        chunk = predict([scene.images()], scene.state[None], [instruction])[0]
        for action in chunk[: min(n_action_steps, num_steps - start)]:
            _, success, truncated = scene.step(action)
            if success or truncated:
                return True
    return False
