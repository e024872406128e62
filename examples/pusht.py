"""The PushT simulator: play a policy in it, score it, film it.

`gym_pusht/PushT-v0` (Chi et al. 2023, "Diffusion Policy"): a round pusher moves a T-shaped block onto its outline. An
action is the point in [0, 512]^2 that the pusher is drawn to for a tenth of a second. The reward is the covered share
of the outline, divided by 0.95 and cut at 1; covering 95 % ends the episode as a success.

The environments are stepped in turn in this process, as by gymnasium's `SyncVectorEnv`. In a plain list, unlike there,
an episode that is over costs nothing, and pixels, most of a step's time, are drawn only when the policy looks at them.
"""

import io
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import av
import gymnasium
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # else importing pygame prints a greeting
import gym_pusht  # noqa: E402, F401  (registers the environment)

ENV_ID = "gym_pusht/PushT-v0"
TASK = "Push the T-shaped block onto the T-shaped target."
MAX_EPISODE_STEPS = 300
CONTROL_HZ = 10
ACTION_DIM = 2
FRAME_SIZE = 384  # pixels a side of a recorded frame; the policy's own images have 96
Z_95 = NormalDist().inv_cdf(0.975)
BLACK, GREY, PALE, GREEN = (30, 30, 30), (110, 110, 110), (210, 210, 210), (20, 130, 50)

# (list of B uint8 images (96, 96, 3), float32 states (B, 2)) -> action chunks (B, H, 2)
Predict = Callable[[list[np.ndarray], np.ndarray], np.ndarray]


class Episode:
    """One episode in an environment of its own, so that nothing but its seed and its actions decides it."""

    def __init__(self, seed: int, max_steps: int, record: bool):
        size = {"visualization_width": FRAME_SIZE, "visualization_height": FRAME_SIZE}
        # The environment checker objects to the observations that `step` leaves undrawn.
        options = {"obs_type": "pixels_agent_pos", "max_episode_steps": max_steps, "disable_env_checker": True}
        self.env = gymnasium.make(ENV_ID, **options, **size)
        self.observation, _ = self.env.reset(seed=seed)
        self.queue: deque[np.ndarray] = deque()  # actions of the current chunk still to execute
        self.seed, self.record, self.success, self.done = seed, record, False, False
        self.rewards: list[float] = []
        self.frames: list[bytes] = []  # the filmed scenes, as PNG files: raw, six episodes would take 800 MB
        self._film()

    def step(self) -> None:
        # The policy looks only at what follows a chunk's last action: no other observation needs its pixels.
        self.env.unwrapped.obs_type = "state" if len(self.queue) > 1 else "pixels_agent_pos"
        self.observation, reward, terminated, truncated, info = self.env.step(self.queue.popleft())
        self.rewards.append(float(reward))
        self.success, self.done = bool(info["is_success"]), bool(terminated or truncated)
        self._film()
        if self.done:
            self.env.close()

    def _film(self) -> None:
        if self.record:
            png = io.BytesIO()
            Image.fromarray(self.env.render()).save(png, "PNG", compress_level=1)
            self.frames.append(png.getvalue())


@dataclass
class RolloutResult:
    """Scores of the episodes, in the order of their seeds."""

    seeds: list[int]
    max_rewards: list[float]
    sum_rewards: list[float]
    successes: list[bool]
    lengths: list[int]
    num_requested: int  # chunks the policy was asked for
    num_chunks: int  # chunks that came back whole and finite
    predict_seconds: float  # wall time inside `predict`
    recordings: list[Episode]  # the filmed ones

    def metrics(self) -> dict[str, float | list]:
        """Plain numbers, for JSON. Intervals are 95 %: Wilson's for the success rate, normal for the reward."""
        num_episodes, mean = len(self.seeds), float(np.mean(self.max_rewards))
        low, high = wilson_interval(sum(self.successes), num_episodes)
        spread = float(np.std(self.max_rewards, ddof=1)) if num_episodes > 1 else 1.0  # one episode: anything goes
        margin = Z_95 * spread / math.sqrt(num_episodes)
        return {
            "avg_max_reward": mean,
            "avg_max_reward_low": max(0.0, mean - margin),
            "avg_max_reward_high": min(1.0, mean + margin),
            "avg_sum_reward": float(np.mean(self.sum_rewards)),
            "pc_success": 100.0 * sum(self.successes) / num_episodes,
            "pc_success_low": 100.0 * low,
            "pc_success_high": 100.0 * high,
            "n_episodes": num_episodes,
            "seed": self.seeds[0],
            "ms_per_chunk": 1000.0 * self.predict_seconds / self.num_chunks,
            "malformed_chunks": self.num_requested - self.num_chunks,
            "seeds": self.seeds,
            "max_rewards": self.max_rewards,
            "sum_rewards": self.sum_rewards,
            "successes": self.successes,
            "episode_lengths": self.lengths,
        }


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a success rate, as fractions: inside [0, 1], and not empty at 0 or 1."""
    z2, failures = Z_95**2, num_trials - num_successes
    centre = (num_successes + z2 / 2) / (num_trials + z2)
    margin = Z_95 * math.sqrt(num_successes * failures / num_trials + z2 / 4) / (num_trials + z2)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def rollout(
    predict: Predict,
    seeds: Sequence[int],
    n_action_steps: int,
    num_envs: int = 16,
    max_steps: int = MAX_EPISODE_STEPS,
    record: int = 0,
    progress: bool = False,
) -> RolloutResult:
    """Play one episode a seed, up to `num_envs` of them side by side; one that ends makes room for the next.

    Args:
        predict: Called at most once a simulation step, with the images (list of uint8 `(96, 96, 3)`) and the states
            (float32 `(B, 2)`, the pusher's position) of those episodes that have executed their chunk. Returns their
            next chunks, `(B, H, 2)` with `H >= n_action_steps`, in the simulator's units; nothing is clipped.
        seeds: Episode i resets its environment with `seeds[i]`.
        n_action_steps: Actions of each chunk that are executed before the next prediction.
        num_envs: Decides how many observations `predict` gets at once, and nothing else.
        max_steps: Steps after which an episode ends unsolved.
        record: The first `record` episodes are filmed.

    Raises:
        ValueError: an argument out of range, or a chunk of the wrong shape or with a value that is not finite.
    """
    if min(counts := (len(seeds), n_action_steps, num_envs, max_steps)) < 1:
        raise ValueError(f"len(seeds), n_action_steps, num_envs, max_steps are {counts}, expected at least 1 each.")
    seeds = [int(seed) for seed in seeds]
    episodes: list[Episode] = []
    running: list[Episode] = []
    num_requested, num_chunks, predict_seconds = 0, 0, 0.0
    with tqdm(total=len(seeds) * max_steps, unit="step", disable=not progress) as bar:
        while running or len(episodes) < len(seeds):
            while len(running) < num_envs and len(episodes) < len(seeds):
                episodes.append(Episode(seeds[len(episodes)], max_steps, record=len(episodes) < record))
                running.append(episodes[-1])

            waiting = [episode for episode in running if not episode.queue]
            if waiting:
                images = [episode.observation["pixels"] for episode in waiting]
                states = np.stack([episode.observation["agent_pos"] for episode in waiting]).astype(np.float32)
                num_requested += len(waiting)
                start = time.perf_counter()
                chunks = predict(images, states)
                predict_seconds += time.perf_counter() - start
                for episode, chunk in zip(waiting, _checked(chunks, len(waiting), n_action_steps), strict=True):
                    episode.queue.extend(chunk[:n_action_steps])
                num_chunks += len(waiting)
            for episode in running:
                episode.step()
            bar.update(sum(1 + episode.done * (max_steps - len(episode.rewards)) for episode in running))
            running = [episode for episode in running if not episode.done]

    return RolloutResult(
        seeds=seeds,
        max_rewards=[max(episode.rewards) for episode in episodes],
        sum_rewards=[sum(episode.rewards) for episode in episodes],
        successes=[episode.success for episode in episodes],
        lengths=[len(episode.rewards) for episode in episodes],
        num_requested=num_requested,
        num_chunks=num_chunks,
        predict_seconds=predict_seconds,
        recordings=episodes[:record],
    )


def _checked(chunks: np.ndarray, num_asked: int, n_action_steps: int) -> np.ndarray:
    """The predicted chunks as float32, the simulator's type, or a ValueError: a robot is never sent garbage."""
    chunks = np.asarray(chunks)
    if chunks.shape[:1] + chunks.shape[2:] != (num_asked, ACTION_DIM) or chunks.shape[1] < n_action_steps:
        raise ValueError(
            f"predict returned chunks of shape {chunks.shape}, expected ({num_asked}, at least {n_action_steps}, "
            f"{ACTION_DIM}). Lower n_action_steps, or use a policy that was trained for PushT."
        )
    chunks = chunks.astype(np.float32)
    if not np.isfinite(chunks).all():
        index = tuple(np.argwhere(~np.isfinite(chunks))[0].tolist())
        raise ValueError(f"predict returned {chunks[index]} at {index}, expected finite numbers. Mend the policy.")
    return chunks


def _tile(episode: Episode, step: int, size: int, title: str) -> Image.Image:
    """The scene at `step` (past the end: the last one), under it `title` on the left and the score on the right."""
    last = len(episode.frames) - 1
    step, solved = min(step, last), episode.success and step >= last
    best = f"best {int(100 * max(episode.rewards[:step])) / 100:.2f}" if step else "start"  # cut: 1.00 is for success
    score = f"solved at {last / CONTROL_HZ:.1f} s" if solved else best
    height = size // 12 + 12
    tile = Image.new("RGB", (size, size + height), "white")
    tile.paste(Image.open(io.BytesIO(episode.frames[step])).resize((size, size), Image.Resampling.LANCZOS))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size // 24 + 8)
    draw.rectangle((0, 0, size - 1, size - 1), outline=GREEN if solved else PALE, width=2)
    draw.text((2, size + height // 2), title, BLACK, font, anchor="lm")
    draw.text((size - 2, size + height // 2), score, GREEN if solved else GREY, font, anchor="rm")
    return tile


def _grid(tiles: list[Image.Image], columns: int, gap: int = 12) -> Image.Image:
    """Tiles of one size on white, row by row; sides are even, as the video codec asks."""
    width, height = tiles[0].width + gap, tiles[0].height + gap
    size = columns * width + gap, math.ceil(len(tiles) / columns) * height + gap
    canvas = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), "white")
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (gap + i % columns * width, gap + i // columns * height))
    return canvas


def write_video(path: str | Path, recordings: Sequence[Episode], fps: int = CONTROL_HZ) -> None:
    """Write an H.264 MP4 that browsers play: all recordings side by side, the shorter ones hold their last frame."""

    def picture(step: int) -> Image.Image:
        tiles = [_tile(episode, step, FRAME_SIZE, f"seed {episode.seed}") for episode in recordings]
        return _grid(tiles, columns=math.ceil(math.sqrt(len(tiles))))

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, pix_fmt="yuv420p", options={"crf": "20"})
        stream.width, stream.height = picture(0).size
        for step in range(max(len(episode.frames) for episode in recordings)):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(step))))
        container.mux(stream.encode(None))


def write_contact_sheet(path: str | Path, recordings: Sequence[Episode], moments: int = 7) -> None:
    """Write one PNG: a row a recording, `moments` scenes from first to last step, labelled with time and score."""
    tiles = []
    for episode in recordings:
        for step in np.linspace(0, len(episode.frames) - 1, moments).round().astype(int).tolist():
            tiles.append(_tile(episode, step, 192, f"{step / CONTROL_HZ:.1f} s" if step else f"seed {episode.seed}"))
    _grid(tiles, columns=moments).save(path)
