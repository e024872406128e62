"""What `app.py` shows; the pieces of the scene can be dragged.

Coordinates are the simulator's, [0, 512]^2 with y downwards, angles in radians. Only numbers are written into the
HTML, never text from a visitor.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence

import gymnasium
import numpy as np
from envs.pusht import CONTROL_HZ, MAX_EPISODE_STEPS
from envs.pusht.simulator import WORLD_SIZE
from PIL import Image

AGENT, SOLVED = "#4169e1", "#1f9d4d"

SCENE_CSS = """
svg { width: 100%; max-width: 640px; max-height: 80vh; display: block; margin: 0 auto; background: white; }
svg { touch-action: none; user-select: none; }
[data-drag] { cursor: grab; }
[data-drag]:hover { filter: brightness(1.1); }
[data-past] { pointer-events: none; stroke-width: 2; }
.wall { fill: none; stroke: #d3d3d3; stroke-width: 4; }
.solved { stroke: #1f9d4d; stroke-width: 8; }
"""

# Pieces carry their pose in data attributes. Grabbing one triggers "select", which stops the policy; releasing it
# triggers "release" with both poses. The page may redraw the scene in between, so elements are looked up each time.
DRAG_JS = """
let held = null;
const piece = (name) => element.querySelector(`[data-piece=${name}]`);
const pose = (name) => ['x', 'y', 'angle'].map((key) => Number(piece(name).dataset[key]));
const pointer = (event) => {
  const toScreen = element.querySelector('svg').getScreenCTM();
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(toScreen.inverse());
};
const move = (name, x, y, angle) => {
  Object.assign(piece(name).dataset, {x, y, angle});
  piece(name).setAttribute('transform', `translate(${x} ${y}) rotate(${angle * 180 / Math.PI})`);
};
element.addEventListener('pointerdown', (event) => {
  const kind = event.target.closest('[data-drag]')?.dataset.drag;
  if (!kind || held) return;
  event.preventDefault();
  element.setPointerCapture(event.pointerId);
  held = {kind, from: pointer(event), start: pose(kind === 'agent' ? 'agent' : 'block')};
  element.querySelectorAll('[data-past]').forEach((past) => past.remove());
  trigger('select');
});
element.addEventListener('pointermove', (event) => {
  if (!held) return;
  const to = pointer(event), [x, y, angle] = held.start;
  if (held.kind === 'turn') move('block', x, y, Math.atan2(to.y - y, to.x - x) - Math.PI / 2);
  else move(held.kind, x + to.x - held.from.x, y + to.y - held.from.y, angle);
});
element.addEventListener('lostpointercapture', (event) => {
  if (!held || event.target !== element) return;  // touch captures the pointer for every element
  held = null;
  trigger('release', {agent: pose('agent').slice(0, 2), block: pose('block')});
});
"""


def draw_scene(
    env: gymnasium.Env,
    path: Sequence[np.ndarray],
    chunk: np.ndarray,
    num_executed: int,
    n_action_steps: int,
    solved: bool,
) -> str:
    """The simulator's scene as SVG, with the pusher's path and the predicted chunk ahead of it.

    Args:
        path: Positions of the pusher so far.
        chunk: `(H, 2)`; `num_executed` actions are done, those after `n_action_steps` are never executed.
    """
    agent, block = env.agent.position, env.block
    tee = "".join(f'<polygon points="{_points(shape.get_vertices())}"/>' for shape in block.shapes)
    ahead = chunk[num_executed:]
    dots = ""
    for i, (x, y) in enumerate(ahead, num_executed):
        style = 'r="5"' if i < n_action_steps else 'r="3" fill-opacity="0.45"'
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" stroke="none" {style}/>'
    line = _points([agent, *ahead]) if len(ahead) else ""
    return f"""
<svg viewBox="0 0 {WORLD_SIZE} {WORLD_SIZE}" role="img" aria-label="The T, its target and the pusher">
  <rect class="wall {"solved" if solved else ""}" x="5" y="5" width="501" height="501"/>
  <g {_pose(*env.goal_pose)} fill="#90ee90">{tee}</g>
  <g data-piece="block" data-drag="block" {_pose(*block.position, block.angle)} fill="#778899" stroke="#778899">
    {tee}
    <circle data-drag="turn" cy="106" r="9" fill="white" stroke="#333"><title>Turn the T</title></circle>
  </g>
  <g data-past fill="none" stroke="{AGENT}" stroke-opacity="0.35"><polyline points="{_points(path)}"/></g>
  <circle data-piece="agent" data-drag="agent" {_pose(*agent, 0)} r="15" fill="{AGENT}"/>
  <g data-past fill="#ff7f0e" stroke="#ff7f0e"><polyline points="{line}" fill="none"/>{dots}</g>
</svg>"""


def draw_coverage(coverages: Sequence[float], threshold: float, success: bool) -> str:
    """Covered share of the target over time, in words and as SVG: `gr.LinePlot` ignores the updates of a generator."""
    seconds, limit = len(coverages) / CONTROL_HZ, MAX_EPISODE_STEPS / CONTROL_HZ
    if success:
        verdict = f"<b>Solved after {seconds:.1f} s</b>"
    elif seconds >= limit:
        verdict = "<b>Time is up</b>, restart or drag a piece"
    else:
        verdict = f"{seconds:.1f} s of {limit:.0f} s"
    now, best = (f"{math.floor(100 * x)} %" for x in (coverages[-1], max(coverages))) if coverages else ("–", "–")
    curve = _points((i + 1, 100 * (1 - share)) for i, share in enumerate(coverages))
    bar, width = 100 * (1 - threshold), MAX_EPISODE_STEPS
    return f"""
<div id="verdict">{verdict}, covered {now}, best {best}</div>
<svg viewBox="-38 -16 {width + 46} 134" role="img" aria-label="Coverage over time" fill="currentColor" font-size="11">
  <path d="M0 0 V100 H{width}" fill="none" stroke="currentColor" stroke-opacity="0.3"/>
  <text x="-4" y="4" text-anchor="end">100 %</text><text x="-4" y="104" text-anchor="end">0 %</text>
  <text y="115">0 s</text><text x="{width}" y="115" text-anchor="end">{limit:.0f} s</text>
  <path d="M0 {bar} H{width}" stroke="{SOLVED}" stroke-dasharray="5 4"/>
  <text x="{width}" y="-5" text-anchor="end" fill="{SOLVED}">solved above {threshold:.0%}</text>
  <polyline points="{curve}" fill="none" stroke="{AGENT}" stroke-width="2"/>
</svg>"""


def describe_tokens(tokens: Sequence[tuple[int, int]], num_coefficients: int) -> str:
    """The chunk's FAST tokens, each with its number of DCT coefficients (0: unknown), as HTML."""
    if not tokens:
        return "The predicted tokens appear here."
    chips = (f"<code>{token}</code>" + (f"<sub>×{length}</sub>" if length else "") for token, length in tokens)
    return f"{len(tokens)} tokens for {num_coefficients} numbers:<br>{' '.join(chips)}"


def draw_image(pixels: np.ndarray) -> str:
    """The policy's image, `(96, 96, 3)` uint8. Within the page, since `gr.Image` would write a file at each step."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return f'What it sees:<br><img alt="The policy\'s image" src="data:image/png;base64,{data}">'


def _points(points: Iterable) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _pose(x: float, y: float, angle: float) -> str:
    transform = f"translate({x:.2f} {y:.2f}) rotate({math.degrees(angle):.2f})"
    return f'transform="{transform}" data-x="{x:.3f}" data-y="{y:.3f}" data-angle="{angle:.5f}"'
