"""What `app.py` shows, drawn as SVG and HTML; the scene's pieces can be dragged.

Coordinates are the simulator's, [0, 512]^2 with y downwards, angles in radians. Only numbers are written into the
page, so no text that a visitor sends ever gets there.
"""

import base64
import io
import math
from collections.abc import Sequence

import gymnasium
import numpy as np
from envs.pusht.simulator import WORLD_SIZE
from PIL import Image

AGENT_RADIUS, HANDLE = 15, (0, 120)  # the T is turned by a handle at the end of its stem
GOAL, BLOCK, AGENT, AHEAD, SOLVED = "#90ee90", "#778899", "#4169e1", "#ff7f0e", "#1f9d4d"

SCENE_CSS = """
svg { width: 100%; max-width: 640px; max-height: 80vh; display: block; margin: 0 auto; }
svg { touch-action: none; user-select: none; }
[data-drag] { cursor: grab; }
[data-drag]:hover { filter: brightness(1.1); }
"""

# Pieces carry their pose in data attributes. Grabbing one triggers "select", which stops the policy; letting go
# triggers "release" with both poses. The page may redraw the scene in between, so elements are looked up each time.
DRAG_JS = """
let held = null;
const piece = (name) => element.querySelector(`[data-piece=${name}]`);
const pose = (name) => ['x', 'y', 'angle'].map((key) => parseFloat(piece(name).dataset[key]));
const pointer = (event) => {
  const svg = element.querySelector('svg');
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
};
const move = (name, [x, y, angle]) => {
  const moved = piece(name);
  Object.assign(moved.dataset, {x, y, angle});
  moved.setAttribute('transform', `translate(${x} ${y}) rotate(${angle * 180 / Math.PI})`);
};
const clamp = (value, margin) => Math.min(Math.max(value, margin), 512 - margin);
const drag = (event) => {
  const [x, y] = pointer(event);
  if (held.kind === 'turn') {
    const [blockX, blockY] = held.start;
    move('block', [blockX, blockY, Math.atan2(y - blockY, x - blockX) - Math.PI / 2]);
  } else {
    const margin = held.kind === 'agent' ? 25 : 60;
    const place = [clamp(held.start[0] + x - held.from[0], margin), clamp(held.start[1] + y - held.from[1], margin)];
    move(held.kind, [...place, held.start[2]]);
  }
};
const drop = (event) => {
  window.removeEventListener('pointermove', drag);
  window.removeEventListener('pointerup', drop);
  window.removeEventListener('pointercancel', drop);
  held = null;
  trigger('release', {agent: pose('agent').slice(0, 2), block: pose('block')});
};
element.addEventListener('pointerdown', (event) => {
  const grabbed = event.target.closest('[data-drag]');
  if (!grabbed || held) return;
  event.preventDefault();
  const kind = grabbed.dataset.drag;
  held = {kind, from: pointer(event), start: pose(kind === 'agent' ? 'agent' : 'block')};
  element.querySelectorAll('[data-past]').forEach((past) => past.remove());
  trigger('select');
  window.addEventListener('pointermove', drag);
  window.addEventListener('pointerup', drop);
  window.addEventListener('pointercancel', drop);
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
    """The simulator's scene as SVG, with the pusher's path behind it and the predicted chunk ahead of it.

    Args:
        path: Positions of the pusher so far.
        chunk: `(H, 2)`; `num_executed` actions are done, those after `n_action_steps` are never executed.
    """
    agent, block = env.agent.position, (*env.block.position, env.block.angle)
    tee = "".join(f'<polygon points="{_points(shape.get_vertices())}"/>' for shape in env.block.shapes)
    ahead = chunk[num_executed:]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if i < n_action_steps else 3}" fill="{AHEAD}" '
        f'fill-opacity="{1 if i < n_action_steps else 0.45}"/>'
        for i, (x, y) in enumerate(ahead, num_executed)
    )
    line = _points([agent, *ahead]) if len(ahead) else ""
    return (
        f'<svg viewBox="0 0 {WORLD_SIZE} {WORLD_SIZE}" role="img" aria-label="The T, its target and the pusher">'
        f'<rect width="{WORLD_SIZE}" height="{WORLD_SIZE}" fill="white"/>'
        f'<rect x="5" y="5" width="501" height="501" fill="none" stroke="{SOLVED if solved else "#d3d3d3"}" '
        f'stroke-width="{8 if solved else 4}"/>'
        f'<g {_transform(*env.goal_pose)} fill="{GOAL}">{tee}</g>'
        f'<g data-piece="block" data-drag="block" {_pose(*block)} fill="{BLOCK}" stroke="{BLOCK}">{tee}'
        f'<circle data-drag="turn" cx="{HANDLE[0]}" cy="{HANDLE[1] - 14}" r="9" fill="white" stroke="#333" '
        'stroke-width="2"><title>Turn the T</title></circle></g>'
        f'<g data-past pointer-events="none"><polyline points="{_points(path)}" fill="none" stroke="{AGENT}" '
        'stroke-opacity="0.35" stroke-width="2"/></g>'
        f'<circle data-piece="agent" data-drag="agent" {_pose(*agent, 0)} r="{AGENT_RADIUS}" fill="{AGENT}"/>'
        f'<g data-past pointer-events="none"><polyline points="{line}" fill="none" stroke="{AHEAD}" '
        f'stroke-width="2"/>{dots}</g></svg>'
    )


def draw_coverage(
    coverages: Sequence[float], threshold: float, success: bool, steps_per_second: int, seconds: float
) -> str:
    """Covered share of the target over time as a line, and in words."""
    left, top, width, height = 34, 16, 300, 110
    elapsed = len(coverages) / steps_per_second

    def place(second: float, share: float) -> tuple[float, float]:
        return left + second / seconds * width, top + (1 - share) * height

    curve = _points(place((i + 1) / steps_per_second, share) for i, share in enumerate(coverages))
    bar = place(0, threshold)[1]
    ticks = "".join(
        f'<text x="{left - 4}" y="{place(0, share)[1] + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.5, 1)
    )
    ticks += "".join(
        f'<text x="{place(second, 0)[0]:.1f}" y="{top + height + 15}" text-anchor="middle">{second:.0f} s</text>'
        for second in np.linspace(0, seconds, 4)
    )
    now = f"{math.floor(100 * coverages[-1])} %" if coverages else "–"
    best = f"{math.floor(100 * max(coverages))} %" if coverages else "–"
    if success:
        verdict = f'<b style="color:{SOLVED}">Solved after {elapsed:.1f} s</b>'
    elif elapsed >= seconds:
        verdict = "<b>Time is up</b>, restart or drag a piece"
    else:
        verdict = f"{elapsed:.1f} s of {seconds:.0f} s"
    return (
        f'<div id="verdict">{verdict}, covered {now}, best {best}</div>'
        f'<svg viewBox="0 0 350 146" style="width:100%" role="img" aria-label="Covered share of the target over time" '
        'font-size="11" fill="currentColor">'
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="currentColor" '
        f'stroke-opacity="0.3"/>{ticks}'
        f'<line x1="{left}" x2="{left + width}" y1="{bar:.1f}" y2="{bar:.1f}" stroke="{SOLVED}" '
        f'stroke-dasharray="5 4"/><text x="{left + width}" y="{top - 4}" text-anchor="end" fill="{SOLVED}">'
        f"solved above {threshold:.0%}</text>"
        f'<polyline points="{curve}" fill="none" stroke="{AGENT}" stroke-width="2"/></svg>'
    )


def draw_tokens(tokens: Sequence[tuple[int, int]], num_coefficients: int) -> str:
    """The chunk's FAST tokens, each with the number of DCT coefficients it stands for (0: unknown)."""
    if not tokens:
        return "<div>The tokens it writes appear here.</div>"
    chips = "".join(
        '<span style="display:inline-block;margin:2px;padding:1px 7px;border-radius:9px;border:1px solid '
        f'{AHEAD};font-family:monospace">{token}{f"<sub>&nbsp;×{length}</sub>" if length else ""}</span>'
        for token, length in tokens
    )
    return f"<div>It wrote {len(tokens)} tokens for {num_coefficients} numbers:</div><div>{chips}</div>"


def draw_image(pixels: np.ndarray) -> str:
    """What the policy sees, `(96, 96, 3)` uint8."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return (
        '<figure style="margin:0"><img alt="what the policy sees" width="96" height="96" '
        f'style="image-rendering:pixelated;border:1px solid #ccc" src="data:image/png;base64,{data}">'
        "<figcaption>What it sees</figcaption></figure>"
    )


def _points(points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _transform(x: float, y: float, angle: float) -> str:
    return f'transform="translate({x:.2f} {y:.2f}) rotate({math.degrees(angle):.2f})"'


def _pose(x: float, y: float, angle: float) -> str:
    return f'{_transform(x, y, angle)} data-x="{x:.3f}" data-y="{y:.3f}" data-angle="{angle:.5f}"'
