"""Draw the README's figures: the architecture, and the shipped policy at work.

    python benchmarks/pusht/figures.py

Writes `assets/architecture.png`; `assets/pusht.gif`, three episodes at twice the simulator's speed; and
`assets/delay.gif`, one episode in which each chunk takes 0.4 seconds: the pusher waits for it, or keeps moving.
"""

import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from envs.pusht import BENCHMARK as PUSHT  # noqa: E402
from envs.pusht import CONTROL_HZ  # noqa: E402
from evaluate import load_policy, make_predict  # noqa: E402
from rollouts import Episode, rollout  # noqa: E402

SEEDS = range(1000, 1003)
DELAY, DELAY_SEED = 4, 8000  # control steps
TILE, GAP = 224, 8  # pixels
# Left, centre y, width, text, colour.
HEIGHT, INPUT, LEARNT, FIXED = 0.95, "#e8e8e8", "#cfe3ff", "#ffe3c2"
BOXES = [
    (0.1, 2.6, 2.0, "image", INPUT),
    (0.1, 1.1, 2.0, "instruction,\nrobot's state", INPUT),
    (2.6, 2.6, 2.3, "SigLIP, pixel shuffle,\nlinear layer", LEARNT),
    (2.6, 1.1, 2.3, "state in bins,\nchat template", FIXED),
    (6.2, 1.85, 1.5, "SmolLM2", LEARNT),
    (8.3, 1.85, 2.2, "FAST tokens: only\nthose that still fit", FIXED),
    (11.1, 1.85, 2.0, "integers,\ninverse DCT", FIXED),
    (13.7, 1.85, 1.6, "action chunk\n(H, D)", INPUT),
]
ARROWS = [(0, 2), (1, 3), (2, 4), (3, 4), (4, 5), (5, 6), (6, 7)]


def draw_architecture(path: Path) -> None:
    figure = Figure(figsize=(12.4, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 15.4), ylim=(0.3, 3.4), aspect="equal")
    axes.axis("off")
    for left, y, width, text, colour in BOXES:
        corner, style = (left, y - HEIGHT / 2), "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, style, facecolor=colour, edgecolor="#444444"))
        axes.text(left + width / 2, y, text, ha="center", va="center", fontsize=10, linespacing=1.5)
    for source, target in ARROWS:
        (left, y, width, *_), (next_left, next_y, *_) = BOXES[source], BOXES[target]
        axes.annotate("", (next_left, next_y), (left + width, y), arrowprops={"arrowstyle": "->", "color": "#444444"})
    axes.text(5.5, 2.5, "visual tokens", fontsize=9)
    axes.text(5.5, 1.1, "text tokens", fontsize=9)
    back = {"arrowstyle": "->", "color": "#444444", "connectionstyle": "arc3,rad=-0.35"}
    axes.annotate("", (7.1, 1.35), (9.2, 1.35), arrowprops=back)
    axes.text(8.15, 0.62, "one by one", ha="center", fontsize=9)
    figure.savefig(path, dpi=110)


def film(folder: Path) -> None:
    model, processor = load_policy(str(ROOT / "checkpoints/pusht-tiny"))
    predict, n_action_steps = make_predict(model, processor), model.config.n_action_steps
    result = rollout(PUSHT, predict, SEEDS, n_action_steps, record=len(SEEDS))
    write_gif(folder / "pusht.gif", result.recordings, speed=2)
    titles = {"wait": "stands still during inference", "switch": "keeps moving during inference"}
    options = {"record": 1, "delay": DELAY}
    results = [rollout(PUSHT, predict, [DELAY_SEED], n_action_steps, strategy=name, **options) for name in titles]
    write_gif(folder / "delay.gif", [result.recordings[0] for result in results], titles=list(titles.values()))


def write_gif(path: Path, episodes: list[Episode], speed: int = 1, titles: list[str] | None = None) -> None:
    """Write episodes side by side, with every second control step; shorter ones hold their last frame."""
    top = 24 if titles else 0
    images = []
    for step in range(0, max(len(episode.frames) for episode in episodes) + 10, 2):
        image = Image.new("RGB", (len(episodes) * (TILE + GAP) - GAP, TILE + top), "white")
        for i, episode in enumerate(episodes):
            scene = Image.open(io.BytesIO(episode.frames[min(step, len(episode.frames) - 1)]))
            image.paste(scene.resize((TILE, TILE), Image.Resampling.LANCZOS), (i * (TILE + GAP), top))
            if titles:
                done = ": solved" if episode.success and step >= len(episode.frames) else ""
                position = (i * (TILE + GAP), 4)
                ImageDraw.Draw(image).text(position, titles[i] + done, "black", ImageFont.load_default(14))
        images.append(image.quantize(48, dither=Image.Dither.NONE))
    duration = 2 * 1000 // CONTROL_HZ // speed
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)
    print(path, [f"seed {e.seed}: {'solved' if e.success else 'not solved'}" for e in episodes])


if __name__ == "__main__":
    draw_architecture(ROOT / "assets/architecture.png")
    film(ROOT / "assets")
