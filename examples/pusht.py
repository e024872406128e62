"""The PushT simulator: play a policy in it, score it, film it.

`gym_pusht/PushT-v0` (Chi et al. 2023, "Diffusion Policy"): a round pusher moves a T-shaped block onto its outline. An
action is the point in [0, 512]^2 that the pusher is drawn to for a tenth of a second. The reward is the covered share
of the outline, divided by 0.95 and cut at 1; covering 95 % ends the episode as a success.
"""

import contextlib
import io
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import NormalDist

import av
import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

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
WORLD_SIZE = 512  # the simulator's pixels a side
FRAME_SIZE = 384  # pixels along each side of a filmed scene; the policy's own images have 96
Z_95 = NormalDist().inv_cdf(0.975)
BLACK, GREY, PALE, GREEN = (30, 30, 30), (110, 110, 110), (210, 210, 210), (20, 130, 50)

# (list of B uint8 images (96, 96, 3), float32 states (B, 2)) -> action chunks (B, H, 2)
Predict = Callable[[list[np.ndarray], np.ndarray], np.ndarray]
# (the episode after a step, image (96, 96, 3) and state (2,) before it, its action (2,))
OnStep = Callable[["Episode", np.ndarray, np.ndarray, np.ndarray], None]


@dataclass
class Episode:
    """One episode and its scores; if filmed, also its scenes, as PNG: six episodes of raw pixels would take 800 MB."""

    seed: int
    is_filmed: bool
    rewards: list[float] = field(default_factory=list)
    block_poses: list[np.ndarray] = field(default_factory=list)  # x, y in [0, 512], angle in radians, after each step
    success: bool = False
    done: bool = False
    frames: list[bytes] = field(default_factory=list)
    queue: deque[np.ndarray] = field(default_factory=deque)  # actions of the current chunk still to execute

    def film(self, env: gymnasium.Env) -> None:
        if self.is_filmed:
            png = io.BytesIO()
            Image.fromarray(env.render()).save(png, "PNG", compress_level=1)
            self.frames.append(png.getvalue())


@dataclass
class RolloutResult:
    """Scores of the episodes, in the order of the seeds."""

    seeds: list[int]
    max_rewards: list[float]
    sum_rewards: list[float]
    last_rewards: list[float]
    successes: list[bool]
    lengths: list[int]
    block_poses: list[np.ndarray]  # (steps, 3) each: x, y, angle in radians
    num_requested: int  # chunks the policy was asked for
    num_chunks: int  # chunks that came back complete and finite
    predict_seconds: float  # wall time inside `predict`
    recordings: list[Episode]  # the filmed episodes

    def metrics(self) -> dict[str, float | list]:
        """The scores as JSON values. Intervals are 95 %: Wilson's for the success rate, normal for the reward."""
        num_episodes, mean = len(self.seeds), float(np.mean(self.max_rewards))
        low, high = wilson_interval(sum(self.successes), num_episodes)
        # One episode says nothing about the spread: the interval is then all of [0, 1].
        spread = float(np.std(self.max_rewards, ddof=1)) if num_episodes > 1 else 1.0
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
    """The 95 % Wilson score interval of a success rate: within [0, 1], and not empty at 0 or 1."""
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
    on_step: OnStep | None = None,
) -> RolloutResult:
    """Play one episode for each seed, up to `num_envs` side by side; an episode that ends makes room for the next.

    Args:
        predict: Called at most once per simulation step, with the images (list of uint8 `(96, 96, 3)`) and states
            (float32 `(B, 2)`, the pusher's position) of the episodes that have executed their chunk. Returns their
            next chunks, `(B, H, 2)` with `H >= n_action_steps`, in the simulator's units; nothing is clipped.
        seeds: Episode i resets its environment with `seeds[i]`.
        n_action_steps: Actions of each chunk that are executed before the next prediction.
        num_envs: Affects only how many observations `predict` gets at once.
        max_steps: Steps after which an episode ends unsolved.
        record: The first `record` episodes are filmed.
        progress: Show a progress bar.
        on_step: Called after each step of each episode.

    Raises:
        ValueError: an argument out of range, or a chunk of the wrong shape or with a value that is not finite.
    """
    if min(counts := (len(seeds), n_action_steps, num_envs, max_steps)) < 1:
        raise ValueError(f"len(seeds), n_action_steps, num_envs, max_steps are {counts}, expected at least 1 each.")
    episodes = [Episode(int(seed), is_filmed=i < record) for i, seed in enumerate(seeds)]
    idle = Episode(0, is_filmed=False, done=True)
    to_come, playing = deque(episodes), [idle] * min(num_envs, len(episodes))
    sizes = {"visualization_width": FRAME_SIZE, "visualization_height": FRAME_SIZE}
    make = partial(gymnasium.make, ENV_ID, obs_type="pixels_agent_pos", max_episode_steps=max_steps, **sizes)
    envs = SyncVectorEnv([make] * len(playing), autoreset_mode=AutoresetMode.DISABLED)
    num_requested, num_chunks, predict_seconds = 0, 0, 0.0
    with contextlib.closing(envs), tqdm(total=len(episodes), unit="episode", disable=not progress) as bar:
        while to_come or not all(episode.done for episode in playing):
            free = np.array([episode.done for episode in playing])
            if free.any():
                # When no seed is left, a free environment idles: a vector environment steps all of them.
                slots = np.flatnonzero(free).tolist()
                for slot in slots:
                    playing[slot] = to_come.popleft() if to_come else idle
                observations, _ = envs.reset(seed=[e.seed for e in playing], options={"reset_mask": free})
                for slot in slots:
                    playing[slot].film(envs.envs[slot])

            waiting = [slot for slot, episode in enumerate(playing) if not episode.queue and not episode.done]
            if waiting:
                num_requested += len(waiting)
                start = time.perf_counter()
                images, states = observations["pixels"][waiting], observations["agent_pos"][waiting]
                chunks = predict(list(images), states.astype(np.float32))
                predict_seconds += time.perf_counter() - start
                for slot, chunk in zip(waiting, check_chunks(chunks, len(waiting), n_action_steps), strict=True):
                    playing[slot].queue.extend(chunk[:n_action_steps])
                num_chunks += len(waiting)

            rest = np.zeros(ACTION_DIM, dtype=np.float32)
            actions = np.stack([rest if episode.done else episode.queue.popleft() for episode in playing])
            images, states = observations["pixels"], observations["agent_pos"].astype(np.float32)
            observations, rewards, terminated, truncated, infos = envs.step(actions)
            for slot, episode in enumerate(playing):
                if not episode.done:
                    episode.rewards.append(float(rewards[slot]))
                    episode.block_poses.append(infos["block_pose"][slot])
                    episode.success = bool(infos["is_success"][slot])
                    episode.done = bool(terminated[slot] or truncated[slot])
                    episode.film(envs.envs[slot])
                    bar.update(episode.done)
                    if on_step is not None:
                        on_step(episode, images[slot], states[slot], actions[slot])

    return RolloutResult(
        seeds=[episode.seed for episode in episodes],
        max_rewards=[max(episode.rewards) for episode in episodes],
        sum_rewards=[sum(episode.rewards) for episode in episodes],
        last_rewards=[episode.rewards[-1] for episode in episodes],
        successes=[episode.success for episode in episodes],
        lengths=[len(episode.rewards) for episode in episodes],
        block_poses=[np.array(episode.block_poses) for episode in episodes],
        num_requested=num_requested,
        num_chunks=num_chunks,
        predict_seconds=predict_seconds,
        recordings=episodes[:record],
    )


def check_chunks(chunks: np.ndarray, num_asked: int, n_action_steps: int) -> np.ndarray:
    """The predicted chunks as float32, the simulator's type; a ValueError if their shape or a value is wrong."""
    chunks = np.asarray(chunks)
    if chunks.shape[:1] + chunks.shape[2:] != (num_asked, ACTION_DIM) or chunks.shape[1] < n_action_steps:
        raise ValueError(
            f"predict returned chunks of shape {chunks.shape}, expected ({num_asked}, at least {n_action_steps}, "
            f"{ACTION_DIM}). Lower n_action_steps, or use a policy trained for PushT."
        )
    chunks = chunks.astype(np.float32)
    if not np.isfinite(chunks).all():
        index = tuple(np.argwhere(~np.isfinite(chunks))[0].tolist())
        raise ValueError(f"predict returned {chunks[index]} at {index}, expected finite numbers. Fix the policy.")
    return chunks


def _tile(episode: Episode, step: int, size: int, title: str) -> Image.Image:
    """The scene at `step`, or the last one, above `title` on the left and the score on the right."""
    last = len(episode.frames) - 1
    step, solved = min(step, last), episode.success and step >= last
    best = (
        f"best {int(100 * max(episode.rewards[:step])) / 100:.2f}" if step else "start"
    )  # rounded down: only success is 1.00
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
    """Tiles of equal size on white, row by row; width and height are even, as the video codec requires."""
    width, height = tiles[0].width + gap, tiles[0].height + gap
    size = columns * width + gap, math.ceil(len(tiles) / columns) * height + gap
    canvas = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), "white")
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (gap + i % columns * width, gap + i // columns * height))
    return canvas


def write_video(path: str | Path, recordings: Sequence[Episode], fps: int = CONTROL_HZ) -> None:
    """Write an H.264 MP4 that browsers play: all recordings in one picture, shorter ones hold their last frame."""

    def picture(step: int) -> Image.Image:
        tiles = [_tile(episode, step, FRAME_SIZE, f"seed {episode.seed}") for episode in recordings]
        return _grid(tiles, columns=math.ceil(math.sqrt(len(tiles))))

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, pix_fmt="yuv420p", options={"crf": "20"})
        stream.width, stream.height = picture(0).size
        for step in range(max(len(episode.frames) for episode in recordings)):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(step))))
        container.mux(stream.encode(None))


def write_contact_sheet(
    path: str | Path, recordings: Sequence[Episode], moments: int = 7, titles: Sequence[str] | None = None
) -> None:
    """Write one PNG: for each recording a row of `moments` scenes, first to last, labelled with time and score.

    The first scene of a row shows the title, by default the seed.
    """
    tiles = []
    for i, episode in enumerate(recordings):
        title = f"seed {episode.seed}" if titles is None else titles[i]
        for step in np.linspace(0, len(episode.frames) - 1, moments).round().astype(int).tolist():
            tiles.append(_tile(episode, step, 192, f"{step / CONTROL_HZ:.1f} s" if step else title))
    _grid(tiles, columns=moments).save(path)
