"""A policy plays the beginning of a demonstration; the expert takes over (Kelly et al. 2019, arXiv 1810.02890)."""

import functools

from evaluate import LoadedPolicy, find_backend, load_predict

from . import Scene


@functools.cache
def load_once(checkpoint: str) -> LoadedPolicy:
    """A checkpoint or a deployed policy."""
    return load_predict(checkpoint, find_backend(checkpoint))


def play_policy(scene: Scene, policy: LoadedPolicy, num_steps: int, instruction: str) -> bool:
    """Let the policy play. Returns whether the episode is over."""
    for start in range(0, num_steps, policy.n_action_steps):
        chunk = policy.predict([scene.images()], scene.state[None], [instruction])[0]
        for action in chunk[: min(policy.n_action_steps, num_steps - start)]:
            _, success, truncated = scene.step(action)
            if success or truncated:
                return True
    return False
