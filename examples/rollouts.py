"""Play a policy in a simulator, score it, film it: what all benchmarks share."""

import contextlib
import io
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import av
import numpy as np
from envs import FRAME_SIZE, Benchmark, Scene
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import binomtest
from tqdm import tqdm

from smolandfast.deployment.loop import Schedule

Z_95 = NormalDist().inv_cdf(0.975)
BLACK, GREY, PALE, GREEN = (30, 30, 30), (110, 110, 110), (210, 210, 210), (20, 130, 50)

# (B uint8 images (image_size, image_size, 3), float32 states (B, state_dim), B sentences) -> chunks (B, H, action_dim)
Predict = Callable[[list[np.ndarray], np.ndarray, list[str]], np.ndarray]
# (the episode after a step, image and state before it, its action)
OnStep = Callable[["Episode", np.ndarray, np.ndarray, np.ndarray], None]


@dataclass
class Episode:
    """One episode and its scores; if filmed, also its scenes, as PNG: six episodes of raw pixels would take 800 MB."""

    task: str
    seed: int
    is_filmed: bool
    rewards: list[float] = field(default_factory=list)
    poses: list[np.ndarray] = field(default_factory=list)  # after each step, see `Scene.poses`
    success: bool = False
    done: bool = False
    frames: list[bytes] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)  # as commanded
    schedule: Schedule | None = None
    coming: tuple[np.ndarray, int] | None = None  # a chunk that is still to arrive, and the step it was asked for at
    switches: list[int] = field(default_factory=list)  # steps that the first action of a further chunk is executed at

    def film(self, scene: Scene, every: int) -> None:
        if self.is_filmed and (self.done or len(self.rewards) % every == 0):
            png = io.BytesIO()
            Image.fromarray(scene.film()).save(png, "PNG", compress_level=1)
            self.frames.append(png.getvalue())


@dataclass
class RolloutResult:
    """The episodes, task by task in the order of the seeds, and what the policy did."""

    benchmark: Benchmark
    episodes: list[Episode]
    num_chunks: int  # that the policy predicted
    predict_seconds: float  # wall time inside `predict`

    @property
    def seeds(self) -> list[int]:
        return [episode.seed for episode in self.episodes]

    @property
    def successes(self) -> list[bool]:
        return [episode.success for episode in self.episodes]

    @property
    def lengths(self) -> list[int]:
        return [len(episode.rewards) for episode in self.episodes]

    @property
    def max_rewards(self) -> list[float]:
        return [max(episode.rewards) for episode in self.episodes]

    @property
    def sum_rewards(self) -> list[float]:
        return [sum(episode.rewards) for episode in self.episodes]

    @property
    def jumps(self) -> np.ndarray:
        """Distances of consecutive commanded actions, of all episodes together."""
        return np.concatenate([np.linalg.norm(np.diff(e.actions, axis=0), axis=1) for e in self.episodes])

    @property
    def switch_jumps(self) -> np.ndarray:
        """Those of [`jumps`] that lie where one chunk takes the place of another."""
        switches = [(e.actions, step) for e in self.episodes for step in e.switches]
        return np.array([np.linalg.norm(actions[step] - actions[step - 1]) for actions, step in switches])

    def smoothness(self) -> dict[str, float | None]:
        """The jumps in figures, in the simulator's units; of switches None where one chunk was enough."""
        return {
            "mean_jump": float(self.jumps.mean()),
            "jump_95": float(np.quantile(self.jumps, 0.95)),
            "mean_switch_jump": float(self.switch_jumps.mean()) if len(self.switch_jumps) else None,
        }

    @property
    def recordings(self) -> list[Episode]:
        """The filmed episodes."""
        return [episode for episode in self.episodes if episode.is_filmed]

    def metrics(self) -> dict[str, Any]:
        """The scores as JSON values. Intervals are 95 %: Wilson's for success rates, normal for the reward.

        With more than one task also the success of each task and each group, and the means over them.
        """
        num_episodes, rewards = len(self.episodes), self.max_rewards
        metrics = success_rate(self.successes)
        if self.benchmark.max_reward is not None:
            mean = float(np.mean(rewards))
            # One episode says nothing about the spread: the interval is then all of [0, max_reward].
            spread = float(np.std(rewards, ddof=1)) if num_episodes > 1 else self.benchmark.max_reward
            margin = Z_95 * spread / math.sqrt(num_episodes)
            metrics |= {
                "avg_max_reward": mean,
                "avg_max_reward_low": max(0.0, mean - margin),
                "avg_max_reward_high": min(self.benchmark.max_reward, mean + margin),
            }
        metrics |= {
            "avg_sum_reward": float(np.mean(self.sum_rewards)),
            "seed": self.seeds[0],
            "ms_per_chunk": 1000.0 * self.predict_seconds / self.num_chunks,
        }
        by_task = {task: [e.success for e in self.episodes if e.task == task] for task in self.tasks}
        if len(by_task) > 1:
            groups = {task: self.benchmark.groups[task] for task in by_task if self.benchmark.groups}
            by_group = {
                group: [success for task in by_task if groups[task] == group for success in by_task[task]]
                for group in dict.fromkeys(groups.values())
            }
            metrics["by_task"] = {task: success_rate(successes) for task, successes in by_task.items()}
            metrics["by_group"] = {group: success_rate(successes) for group, successes in by_group.items()}
            for name in ("task", "group"):
                rates = [rate["pc_success"] for rate in metrics[f"by_{name}"].values()]
                metrics[f"mean_over_{name}s"] = float(np.mean(rates)) if rates else None
            metrics["tasks"] = [episode.task for episode in self.episodes]
        return metrics | {
            "seeds": self.seeds,
            "max_rewards": rewards,
            "sum_rewards": self.sum_rewards,
            "successes": self.successes,
            "episode_lengths": self.lengths,
        }

    @property
    def tasks(self) -> list[str]:
        """The tasks that were played."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))


def success_rate(successes: Sequence[bool]) -> dict[str, float]:
    """Percent, with the 95 % Wilson score interval: within [0, 100], and not empty at either end."""
    interval = binomtest(sum(successes), len(successes)).proportion_ci(method="wilson")
    return {
        "pc_success": 100.0 * sum(successes) / len(successes),
        "pc_success_low": 100.0 * float(interval.low),
        "pc_success_high": 100.0 * float(interval.high),
        "n_episodes": len(successes),
    }


@dataclass(frozen=True)
class RolloutOptions:
    """How [`rollout`] plays.

    Args:
        num_envs: Episodes side by side. Affects only how many observations `predict` gets at once.
        max_steps: Steps after which an episode ends unsolved, by default the benchmark's.
        record: The first `record` episodes of each task are filmed.
        progress: Show a progress bar.
        on_step: Called after each step of each episode. Every step is then drawn.
        delay: Steps from an observation to the arrival of its chunk, in which the world goes on.
        strategy: What is executed meanwhile, see [`Schedule`]. Without delay, `switch` and `wait` do the same.
    """

    num_envs: int = 16
    max_steps: int | None = None
    record: int = 0
    progress: bool = False
    on_step: OnStep | None = None
    delay: int = 0
    strategy: str = "switch"


def rollout(
    benchmark: Benchmark,
    predict: Predict,
    seeds: Sequence[int],
    n_action_steps: int,
    tasks: Sequence[str] | None = None,
    **options: Any,
) -> RolloutResult:
    """Play each task once for each seed, some episodes side by side.

    Args:
        benchmark: What is played.
        predict: Called with the images (list of uint8 `(image_size, image_size, 3)`), states (float32
            `(B, state_dim)`) and sentences of the episodes that have executed their chunk. Returns their next chunks,
            `(B, H, action_dim)` with `H >= n_action_steps`, in the simulator's units; nothing is clipped.
        seeds: Of each task's episodes.
        n_action_steps: Actions of each chunk that are executed before the next prediction.
        tasks: All by default.
        options: Those of [`RolloutOptions`].

    Raises:
        ValueError: an argument out of range, or a chunk of the wrong shape or with a value that is not finite.
    """
    tasks = list(benchmark.tasks if tasks is None else tasks)
    how = RolloutOptions(**options)
    if how.max_steps is None:
        how = replace(how, max_steps=benchmark.max_steps)
    _check_arguments(benchmark, seeds, n_action_steps, tasks, how)
    episodes = [Episode(task, int(seed), is_filmed=i < how.record) for task in tasks for i, seed in enumerate(seeds)]
    to_come: dict[str, deque[Episode]] = {}
    for episode in episodes:
        to_come.setdefault(episode.task, deque()).append(episode)
    slots = [_Slot() for _ in range(min(how.num_envs, len(episodes)))]
    num_chunks, predict_seconds = 0, 0.0
    with contextlib.ExitStack() as stack, tqdm(total=len(episodes), unit="episode", disable=not how.progress) as bar:
        for slot in slots:
            stack.callback(slot.close)
        while True:
            for slot in slots:
                if slot.episode is None and to_come:
                    slot.start(_take(to_come, slots, slot.task), benchmark)
                    slot.episode.schedule = Schedule(n_action_steps, how.strategy)
            playing = [slot for slot in slots if slot.episode is not None]
            if not playing:
                break
            waiting = [s for s in playing if s.episode.coming is None and s.episode.schedule.is_due()]
            if waiting:
                predict_seconds += _predict_chunks(waiting, benchmark, predict, n_action_steps)
                num_chunks += len(waiting)
            for slot in playing:
                slot.advance(benchmark, how)
                if slot.episode.done:
                    slot.episode = None
                    bar.update()
    return RolloutResult(benchmark, episodes, num_chunks, predict_seconds)


def _check_arguments(
    benchmark: Benchmark, seeds: Sequence[int], n_action_steps: int, tasks: list[str], how: RolloutOptions
) -> None:
    counts = (len(tasks), len(seeds), n_action_steps, how.num_envs, how.max_steps)
    if min(counts) < 1:
        names = "len(tasks), len(seeds), n_action_steps, num_envs, max_steps"
        raise ValueError(f"{names} are {counts}, expected at least 1 each.")
    if how.delay < 0 or (how.delay > 0 and benchmark.hold is None):
        raise ValueError(
            f"delay is {how.delay}, expected 0 or more; above 0, {benchmark.name} has to know how to stand still."
        )
    unknown = [task for task in tasks if task not in benchmark.tasks]
    if unknown:
        raise ValueError(f"tasks has {unknown[0]!r}, expected some of {benchmark.name}'s {list(benchmark.tasks)}.")


def _predict_chunks(waiting: "list[_Slot]", benchmark: Benchmark, predict: Predict, n_action_steps: int) -> float:
    """Send the slots' episodes their next chunks; returns the seconds in `predict`."""
    images = [slot.scene.image() for slot in waiting]
    states = np.stack([slot.scene.state for slot in waiting])
    sentences = [benchmark.tasks[slot.task] for slot in waiting]
    start = time.perf_counter()
    chunks = predict(images, states, sentences)
    seconds = time.perf_counter() - start
    chunks = check_chunks(chunks, len(waiting), n_action_steps, benchmark.action_dim)
    for slot, chunk in zip(waiting, chunks, strict=True):
        slot.episode.coming = chunk, slot.episode.schedule.step
    return seconds


class _Slot:
    """A place for one episode at a time; it keeps its scene while the task stays the same."""

    def __init__(self):
        self.task: str | None = None
        self.scene: Scene | None = None
        self.episode: Episode | None = None

    def start(self, episode: Episode, benchmark: Benchmark) -> None:
        if episode.task != self.task:
            self.close()
            self.task, self.scene = episode.task, benchmark.make_scene(episode.task)
        self.episode = episode
        self.scene.reset(episode.seed)
        episode.film(self.scene, benchmark.film_every)

    def advance(self, benchmark: Benchmark, how: RolloutOptions) -> None:
        """One step of the simulation, with the episode's next action."""
        scene, episode = self.scene, self.episode
        if episode.coming is not None and episode.schedule.step - episode.coming[1] >= how.delay:
            episode.schedule.arrive(*episode.coming)
            if episode.actions:
                episode.switches.append(len(episode.actions))
            episode.coming = None
        action = episode.schedule.next_action()
        if action is None:
            action = benchmark.hold(scene.state, episode.actions[-1] if episode.actions else None)
        episode.actions.append(action)
        before = (scene.image(), scene.state, action) if how.on_step is not None else ()
        reward, episode.success, over = scene.step(action)
        episode.rewards.append(reward)
        episode.poses.append(scene.poses)
        episode.done = episode.success or over or len(episode.rewards) >= how.max_steps
        episode.film(scene, benchmark.film_every)
        if how.on_step is not None:
            how.on_step(episode, *before)

    def close(self) -> None:
        if self.scene is not None:
            self.scene.close()
            self.scene = None


def _take(to_come: dict[str, deque[Episode]], slots: list[_Slot], task: str | None) -> Episode:
    """The next episode of `task`, or else of one that nobody plays yet: loading a scene takes longer than a reset."""
    if task not in to_come:
        playing = [slot.task for slot in slots]
        task = max(to_come, key=lambda name: (name not in playing, len(to_come[name])))
    episode = to_come[task].popleft()
    if not to_come[task]:
        del to_come[task]
    return episode


def check_chunks(chunks: np.ndarray, num_asked: int, n_action_steps: int, action_dim: int) -> np.ndarray:
    """The predicted chunks as float32, the simulator's type; a ValueError if their shape or a value is wrong."""
    chunks = np.asarray(chunks)
    if chunks.shape[:1] + chunks.shape[2:] != (num_asked, action_dim) or chunks.shape[1] < n_action_steps:
        raise ValueError(
            f"predict returned chunks of shape {chunks.shape}, expected ({num_asked}, at least {n_action_steps}, "
            f"{action_dim}). Lower n_action_steps, or use a policy trained for this benchmark."
        )
    chunks = chunks.astype(np.float32)
    if not np.isfinite(chunks).all():
        index = tuple(np.argwhere(~np.isfinite(chunks))[0].tolist())
        raise ValueError(f"predict returned {chunks[index]} at {index}, expected finite numbers. Fix the policy.")
    return chunks


def _tile(
    episode: Episode, frame: int, size: int, benchmark: Benchmark, title: str | None = None, score: str | None = None
) -> Image.Image:
    """A filmed scene, or the last one, above a title, by default the time, and the score, by default its own."""
    last = len(episode.frames) - 1
    frame, steps = min(frame, last), min(frame * benchmark.film_every, len(episode.rewards))
    solved = episode.success and frame == last
    if score is None:
        score = f"solved at {len(episode.rewards) / benchmark.fps:.1f} s" if solved else "" if steps else "start"
        if benchmark.max_reward is not None and steps and not solved:
            score = f"best {int(100 * max(episode.rewards[:steps])) / 100:.2f}"  # rounded down: only success is 1.00
    height = size // 12 + 12
    tile = Image.new("RGB", (size, size + height), "white")
    tile.paste(Image.open(io.BytesIO(episode.frames[frame])).resize((size, size), Image.Resampling.LANCZOS))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size // 24 + 8)
    draw.rectangle((0, 0, size - 1, size - 1), outline=GREEN if solved else PALE, width=2)
    title = title or f"{steps / benchmark.fps:.1f} s"
    fitting = next(f for f in map(ImageFont.load_default, range(size // 24 + 8, 0, -1)) if f.getlength(title) < size)
    draw.text((2, size + height // 2), title, BLACK, fitting, anchor="lm")
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


def _title(episode: Episode, benchmark: Benchmark) -> str:
    return f"seed {episode.seed}" if len(benchmark.tasks) == 1 else episode.task


def write_video(path: str | Path, recordings: Sequence[Episode], benchmark: Benchmark) -> None:
    """Write an H.264 MP4 that browsers play: all recordings in one image, shorter ones hold their last frame."""
    columns = math.ceil(math.sqrt(len(recordings)))
    size = FRAME_SIZE if columns <= 4 else 192

    def image(frame: int) -> Image.Image:
        tiles = [_tile(episode, frame, size, benchmark, _title(episode, benchmark)) for episode in recordings]
        return _grid(tiles, columns)

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        rate = round(benchmark.fps / benchmark.film_every)
        stream = container.add_stream("libx264", rate=rate, pix_fmt="yuv420p", options={"crf": "20"})
        stream.width, stream.height = image(0).size
        for frame in range(max(len(episode.frames) for episode in recordings)):
            container.mux(stream.encode(av.VideoFrame.from_image(image(frame))))
        container.mux(stream.encode(None))


def write_end_sheet(
    path: str | Path, recordings: Sequence[Episode], benchmark: Benchmark, scores: dict[str, str], columns: int = 10
) -> None:
    """Write one PNG: the last scene of each recording, labelled with its task and that task's score."""
    tiles = []
    for episode in recordings:
        title = f"{_title(episode, benchmark)}  {scores[episode.task]}"
        tiles.append(_tile(episode, len(episode.frames) - 1, 256, benchmark, title, ""))
    _grid(tiles, columns).save(path)


def write_contact_sheet(
    path: str | Path,
    recordings: Sequence[Episode],
    benchmark: Benchmark,
    moments: int = 7,
    titles: Sequence[str] | None = None,
) -> None:
    """Write one PNG: for each recording a row of `moments` scenes, first to last, labelled with time and score.

    The first scene of a row shows the title alone, or by default the task, or the seed where there is only one task.
    """
    tiles = []
    for i, episode in enumerate(recordings):
        first = (_title(episode, benchmark), None) if titles is None else (titles[i], "")
        for frame in np.linspace(0, len(episode.frames) - 1, moments).round().astype(int).tolist():
            tiles.append(_tile(episode, frame, 192, benchmark, *(() if frame else first)))
    _grid(tiles, columns=moments).save(path)
