"""Roll out a policy in a simulator, score the episodes, and write videos and contact sheets of them."""

import contextlib
import io
import math
import time
from collections import Counter
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

from smolandfast.checks_smolandfast import as_numbers, check_whole
from smolandfast.deployment.loop import Schedule

Z_95 = NormalDist().inv_cdf(0.975)
BLACK, GREY, PALE, GREEN = (30, 30, 30), (110, 110, 110), (210, 210, 210), (20, 130, 50)

# (images of B episodes, states (B, state_dim), B instructions) -> chunks (B, H, action_dim), see `rollout`
Predict = Callable[[list[list[np.ndarray]], np.ndarray, list[str]], np.ndarray]
# (the episode after a step, images and state before it, its action)
OnStep = Callable[["Episode", list[np.ndarray], np.ndarray, np.ndarray], None]


@dataclass
class Episode:
    """The record of one episode."""

    task: str
    seed: int
    is_filmed: bool
    rewards: list[float] = field(default_factory=list)
    poses: list[np.ndarray] = field(default_factory=list)  # after each step, see `Scene.poses`
    success: bool = False
    done: bool = False
    frames: list[bytes] = field(default_factory=list)  # PNG, since raw pixels would take gigabytes
    actions: list[np.ndarray] = field(default_factory=list)  # as commanded
    switches: list[int] = field(default_factory=list)  # steps at which a new chunk replaces another

    def film(self, scene: Scene, every: int) -> None:
        if self.is_filmed and (self.done or len(self.rewards) % every == 0):
            png = io.BytesIO()
            Image.fromarray(scene.film()).save(png, "PNG", compress_level=1)
            self.frames.append(png.getvalue())


@dataclass
class RolloutResult:
    """The episodes, task by task in the order of the seeds, and the cost of the predictions."""

    benchmark: Benchmark
    episodes: list[Episode]
    num_chunks: int
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
    def recordings(self) -> list[Episode]:
        """The filmed episodes."""
        return [episode for episode in self.episodes if episode.is_filmed]

    @property
    def switch_jumps(self) -> np.ndarray:
        """Distances between the last action of a chunk and the first of the next."""
        switches = [(e.actions, step) for e in self.episodes for step in e.switches]
        return np.array([np.linalg.norm(actions[step] - actions[step - 1]) for actions, step in switches])

    def smoothness(self) -> dict[str, float | None]:
        """Distances between consecutive commanded actions; `mean_switch_jump` is None without a switch of chunks."""
        jumps = np.concatenate([np.linalg.norm(np.diff(e.actions, axis=0), axis=1) for e in self.episodes])
        return {
            "mean_jump": float(jumps.mean()),
            "jump_95": float(np.quantile(jumps, 0.95)),
            "mean_switch_jump": float(self.switch_jumps.mean()) if len(self.switch_jumps) else None,
        }

    def metrics(self) -> dict[str, Any]:
        """The scores as JSON values, with 95 % intervals: Wilson's for success rates, normal for the reward.

        More than one task adds the success rates by task and by group, and their means.
        """
        rewards, max_reward = self.max_rewards, self.benchmark.max_reward
        metrics: dict[str, Any] = success_rate(self.successes)
        if max_reward is not None:
            mean = float(np.mean(rewards))
            # One episode says nothing about the spread: the interval is then [0, max_reward].
            spread = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else max_reward
            margin = Z_95 * spread / math.sqrt(len(rewards))
            metrics["avg_max_reward"] = mean
            metrics["avg_max_reward_low"] = max(0.0, mean - margin)
            metrics["avg_max_reward_high"] = min(max_reward, mean + margin)
        metrics["avg_sum_reward"] = float(np.mean(self.sum_rewards))
        metrics["seed"] = self.seeds[0]
        metrics["ms_per_chunk"] = 1000.0 * self.predict_seconds / self.num_chunks
        by_task: dict[str, list[bool]] = {}
        by_group: dict[str, list[bool]] = {}
        for episode in self.episodes:
            by_task.setdefault(episode.task, []).append(episode.success)
            if self.benchmark.groups:
                by_group.setdefault(self.benchmark.groups[episode.task], []).append(episode.success)
        if len(by_task) > 1:
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


def success_rate(successes: Sequence[bool]) -> dict[str, float]:
    """Percent, with the 95 % Wilson score interval."""
    interval = binomtest(sum(successes), len(successes)).proportion_ci(method="wilson")
    return {
        "pc_success": 100.0 * sum(successes) / len(successes),
        "pc_success_low": 100.0 * float(interval.low),
        "pc_success_high": 100.0 * float(interval.high),
        "n_episodes": len(successes),
    }


@dataclass(frozen=True)
class RolloutOptions:
    """Options of [`rollout`].

    Args:
        num_envs: Episodes played side by side, and so the batch size of `predict`.
        max_steps: An episode ends unsolved after these. Defaults to the benchmark's.
        record: The first `record` episodes of each task are filmed.
        progress: Show a progress bar.
        on_step: Called after each step of each episode. The policy's images are then rendered at every step.
        delay: Steps from an observation to the arrival of its chunk.
        strategy: What is executed in the meantime, see [`Schedule`]. Without delay, `switch` and `wait` do the same.
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
    **kwargs: Any,
) -> RolloutResult:
    """Play each task once for each seed.

    Args:
        predict: Called with the images (for each episode a list of uint8 `(image_size, image_size, 3)`, one of each
            camera), states (float32 `(B, state_dim)`) and instructions of the episodes that need a chunk. Returns
            chunks `(B, H, action_dim)` with `H >= n_action_steps` in the simulator's units; nothing is clipped.
        seeds: Of each task's episodes.
        n_action_steps: Actions of each chunk that are executed before the next prediction.
        tasks: Defaults to all.
        kwargs: See [`RolloutOptions`].

    Raises:
        ValueError: An argument out of range, or a chunk of the wrong shape or with a value that is not finite.
    """
    tasks = list(benchmark.tasks if tasks is None else tasks)
    options = RolloutOptions(**kwargs)
    if options.max_steps is None:
        options = replace(options, max_steps=benchmark.max_steps)
    counts = {"len(tasks)": len(tasks), "len(seeds)": len(seeds), "n_action_steps": n_action_steps}
    counts |= {"num_envs": options.num_envs, "max_steps": options.max_steps}
    for name, count in counts.items():
        check_whole(count, name)
    check_whole(options.delay, "delay", 0)
    if options.delay > 0 and benchmark.hold is None:
        raise ValueError(f"delay is {options.delay}, but {benchmark.name} has no action to stand still. Use 0.")
    unknown = [task for task in tasks if task not in benchmark.tasks]
    if unknown:
        raise ValueError(f"tasks has {unknown[0]!r}, expected some of {benchmark.name}'s {list(benchmark.tasks)}.")

    episodes = [Episode(task, int(seed), i < options.record) for task in tasks for i, seed in enumerate(seeds)]
    waiting = list(episodes)
    slots = [_Slot(benchmark, n_action_steps, options) for _ in range(min(options.num_envs, len(episodes)))]
    num_chunks, predict_seconds = 0, 0.0
    bar = tqdm(total=len(episodes), unit="episode", disable=not options.progress)
    with bar, contextlib.ExitStack() as stack:
        for slot in slots:
            stack.callback(slot.close)
        while True:
            for slot in slots:
                if slot.episode is None and waiting:
                    slot.start(_take(waiting, slots, slot.task))
            playing = [slot for slot in slots if slot.episode is not None]
            if not playing:
                break
            due = [slot for slot in playing if slot.chunk is None and slot.schedule.is_due()]
            if due:
                images, states = [slot.scene.images() for slot in due], np.stack([slot.scene.state for slot in due])
                instructions = [benchmark.tasks[slot.task] for slot in due]
                start = time.perf_counter()
                chunks = predict(images, states, instructions)
                predict_seconds += time.perf_counter() - start
                num_chunks += len(due)
                chunks = check_chunks(chunks, len(due), n_action_steps, benchmark.action_dim)
                for slot, chunk in zip(due, chunks, strict=True):
                    slot.chunk = chunk, slot.schedule.step
            for slot in playing:
                slot.advance()
                if slot.episode.done:
                    slot.episode = None
                    bar.update()
    return RolloutResult(benchmark, episodes, num_chunks, predict_seconds)


class _Slot:
    """Plays one episode at a time. It keeps its scene while the task stays the same."""

    def __init__(self, benchmark: Benchmark, n_action_steps: int, options: RolloutOptions):
        self.benchmark, self.n_action_steps, self.options = benchmark, n_action_steps, options
        self.task: str | None = None
        self.scene: Scene | None = None
        self.episode: Episode | None = None

    def start(self, episode: Episode) -> None:
        if episode.task != self.task:
            self.close()
            self.task, self.scene = episode.task, self.benchmark.make_scene(episode.task)
        self.episode = episode
        self.schedule = Schedule(self.n_action_steps, self.options.strategy)
        self.chunk: tuple[np.ndarray, int] | None = None  # a chunk that has not arrived, and its observation's step
        self.scene.reset(episode.seed)
        episode.film(self.scene, self.benchmark.film_every)

    def advance(self) -> None:
        """Execute the next action."""
        scene, episode, options = self.scene, self.episode, self.options
        if self.chunk is not None and self.schedule.step - self.chunk[1] >= options.delay:
            self.schedule.arrive(*self.chunk)
            self.chunk = None
            if episode.actions:
                episode.switches.append(len(episode.actions))
        action = self.schedule.next_action()
        if action is None:
            action = self.benchmark.hold(scene.state, episode.actions[-1] if episode.actions else None)
        episode.actions.append(action)
        before = (scene.images(), scene.state, action) if options.on_step is not None else ()
        reward, episode.success, is_over = scene.step(action)
        episode.rewards.append(reward)
        episode.poses.append(scene.poses)
        episode.done = episode.success or is_over or len(episode.rewards) >= options.max_steps
        episode.film(scene, self.benchmark.film_every)
        if options.on_step is not None:
            options.on_step(episode, *before)

    def close(self) -> None:
        if self.scene is not None:
            self.scene.close()
            self.scene = None


def _take(waiting: list[Episode], slots: list[_Slot], task: str | None) -> Episode:
    """The next episode of `task`, or else of a task that no slot plays: loading a scene takes longer than a reset."""
    counts = Counter(episode.task for episode in waiting)
    if task not in counts:
        playing = [slot.task for slot in slots]
        task = max(counts, key=lambda name: (name not in playing, counts[name]))
    index = next(i for i, episode in enumerate(waiting) if episode.task == task)
    return waiting.pop(index)


def check_chunks(chunks: np.ndarray, batch_size: int, n_action_steps: int, action_dim: int) -> np.ndarray:
    """The predicted chunks as float32; raises `ValueError` if their shape or a value is wrong."""
    chunks = np.asarray(chunks, dtype=np.float32)
    if chunks.shape[:1] + chunks.shape[2:] != (batch_size, action_dim) or chunks.shape[1] < n_action_steps:
        raise ValueError(
            f"predict returned chunks of shape {chunks.shape}, expected ({batch_size}, at least {n_action_steps}, "
            f"{action_dim}). Lower n_action_steps, or use a policy trained for this benchmark."
        )
    return as_numbers(chunks, "predict's chunks").astype(np.float32)


def _score(episode: Episode, steps: int, is_solved: bool, benchmark: Benchmark) -> str:
    if is_solved:
        return f"solved at {len(episode.rewards) / benchmark.fps:.1f} s"
    if steps == 0:
        return "start"
    if benchmark.max_reward is None:
        return ""
    return f"best {int(100 * max(episode.rewards[:steps])) / 100:.2f}"  # rounded down: only success is 1.00


def draw_tile(
    episode: Episode, frame: int, size: int, benchmark: Benchmark, title: str | None = None, score: str | None = None
) -> Image.Image:
    """A filmed frame, or the last one, above a title and a score. Defaults: the time, and the score at that time."""
    last = len(episode.frames) - 1
    frame = min(frame, last)
    steps = min(frame * benchmark.film_every, len(episode.rewards))
    is_solved = episode.success and frame == last
    title = title or f"{steps / benchmark.fps:.1f} s"
    score = _score(episode, steps, is_solved, benchmark) if score is None else score
    height, font_size = size // 12 + 12, size // 24 + 8
    tile = Image.new("RGB", (size, size + height), "white")
    tile.paste(Image.open(io.BytesIO(episode.frames[frame])).resize((size, size), Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, size - 1, size - 1), outline=GREEN if is_solved else PALE, width=2)
    fonts = [ImageFont.load_default(points) for points in range(font_size, 0, -1)]
    title_font = next(font for font in fonts if font.getlength(title) < size)
    draw.text((2, size + height // 2), title, BLACK, title_font, anchor="lm")
    draw.text((size - 2, size + height // 2), score, GREEN if is_solved else GREY, fonts[0], anchor="rm")
    return tile


def draw_grid(tiles: list[Image.Image], columns: int, gap: int = 12) -> Image.Image:
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
    """Write an H.264 MP4 with all recordings side by side; shorter ones hold their last frame."""
    columns = math.ceil(math.sqrt(len(recordings)))
    size = FRAME_SIZE if columns <= 4 else 192

    def image(frame: int) -> Image.Image:
        tiles = [draw_tile(episode, frame, size, benchmark, _title(episode, benchmark)) for episode in recordings]
        return draw_grid(tiles, columns)

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        rate = round(benchmark.fps / benchmark.film_every)
        stream = container.add_stream("libx264", rate=rate, pix_fmt="yuv420p", options={"crf": "20"})
        stream.width, stream.height = image(0).size
        for frame in range(max(len(episode.frames) for episode in recordings)):
            container.mux(stream.encode(av.VideoFrame.from_image(image(frame))))
        container.mux(stream.encode(None))


def write_contact_sheet(
    path: str | Path,
    recordings: Sequence[Episode],
    benchmark: Benchmark,
    moments: int = 7,
    titles: Sequence[str] | None = None,
) -> None:
    """Write a PNG with a row of `moments` frames of each recording, labelled with time and score.

    The first frame of a row has the title instead: by default the task, or the seed if there is only one task.
    """
    tiles = []
    for i, episode in enumerate(recordings):
        first = (_title(episode, benchmark), None) if titles is None else (titles[i], "")
        for frame in np.linspace(0, len(episode.frames) - 1, moments).round().astype(int).tolist():
            labels = first if frame == 0 else ()
            tiles.append(draw_tile(episode, frame, 192, benchmark, *labels))
    draw_grid(tiles, columns=moments).save(path)
