"""A page on which visitors watch a policy push the T: place the pieces, run, step, stop.

    pip install -e ".[examples,app]"
    python examples/app/app.py --checkpoint checkpoints/pusht-tiny

Each visitor has their own simulator; all share the policy. On a Space, the variable `CHECKPOINT` names the policy's
repository on the Hub.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # examples/
import interrupt  # noqa: F401 - before the slow imports

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from envs.pusht import CONTROL_HZ
from evaluate import find_checkpoint
from session import SEED, Policy, Session, load_page_policy
from views import DRAG_JS, SCENE_CSS

SESSION_SECONDS = 3600  # a visitor who is idle for this long starts a new session


def make_page(policy: Policy) -> gr.Blocks:
    """The page; every visitor's [`Session`] lives in its `gr.State`."""

    def begin(session: Session | None) -> Session:
        """The visitor's session; a run that is in progress stops."""
        session = session or Session(policy)
        session.turn += 1
        return session

    def reset(session: Session | None, seed: int | None) -> list:
        if seed is None:
            raise gr.Error("There is no seed, expected a whole number. Enter one.")
        session = begin(session)
        session.reset(seed)
        return [session, *session.views()]

    def place(session: Session | None, event: gr.EventData) -> list:
        session = begin(session)
        try:
            session.place(getattr(event, "agent", None), getattr(event, "block", None))
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return [session, *session.views()]

    def run(session: Session | None) -> Iterator[list]:
        session = begin(session)
        turn, due = session.turn, time.monotonic()
        while session.turn == turn and not session.done:
            session.step()
            yield [session, *session.views()]
            due = max(due + 1 / CONTROL_HZ, time.monotonic() - 1 / CONTROL_HZ)  # the robot's pace, or the machine's
            time.sleep(max(0.0, due - time.monotonic()))

    def step(session: Session | None) -> list:
        session = begin(session)
        session.step()
        return [session, *session.views()]

    def stop(session: Session | None) -> None:
        if session is not None:
            session.turn += 1

    with gr.Blocks(title="SmolAndFast plays PushT", analytics_enabled=False) as page:
        session = gr.State(time_to_live=SESSION_SECONDS, delete_callback=lambda gone: gone and gone.env.close())
        gr.Markdown(
            "# SmolAndFast plays PushT\n"
            "Drag the blue pusher or the T, turn the T by its handle, or choose a seed. Then let the policy push the "
            "T onto the green target. The orange dots are the predicted actions; the policy executes the bright ones "
            "before it predicts again."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                scene = gr.HTML(js_on_load=DRAG_JS, css_template=SCENE_CSS, elem_id="scene")
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    run_button = gr.Button("Run", variant="primary", elem_id="run", min_width=80)
                    step_button = gr.Button("Step", elem_id="step", min_width=80)
                    stop_button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
                with gr.Row(equal_height=True):
                    limits = {"minimum": 0, "maximum": 2**32 - 1, "precision": 0}
                    seed = gr.Number(SEED, label="Seed", **limits, elem_id="seed", min_width=120)
                    reset_button = gr.Button("Restart", elem_id="reset", min_width=120)
                coverage = gr.HTML()
                with gr.Row():
                    seen = gr.HTML(elem_id="seen", scale=1, min_width=100)
                    tokens = gr.HTML(elem_id="tokens", scale=2, min_width=180)
        outputs = [session, scene, coverage, tokens, seen]
        quick = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        page.load(reset, [session, seed], outputs, **quick)
        gr.on([reset_button.click, seed.submit], reset, [session, seed], outputs, **quick)
        scene.release(place, session, outputs, **quick)
        scene.select(stop, session, None, **quick)  # a piece is grabbed
        run_button.click(run, session, outputs, **quick)
        step_button.click(step, session, outputs, trigger_mode="multiple", **quick)
        stop_button.click(stop, session, None, **quick)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A page on which visitors watch a policy play PushT.")
    parser.add_argument(
        "--checkpoint",
        default=os.environ.get("CHECKPOINT", "checkpoints/pusht-tiny"),
        help="folder, also a deployed policy's, or Hub id (the variable CHECKPOINT, or checkpoints/pusht-tiny)",
    )
    args = parser.parse_args(argv)
    find_checkpoint(parser, args)
    # System fonts: the theme's own are loaded from another site.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        policy = load_page_policy(args.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(f"--checkpoint {args.checkpoint} cannot be played: {error}")
    make_page(policy).launch(theme=theme, footer_links=[])


if __name__ == "__main__":
    main()
