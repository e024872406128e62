"""The page: what its sessions do without a browser, and in headless Chromium what a visitor does."""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from envs.pusht import BENCHMARK as PUSHT
from evaluate import make_predict
from PIL import Image
from rollouts import rollout
from session import Policy, Session, load_page_policy
from views import draw_coverage

from smolandfast import SmolAndFastProcessor

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/pusht-tiny"


@pytest.fixture(scope="module")
def policy():
    return Policy(str(CHECKPOINT))


def test_a_session_plays_what_an_evaluation_plays(policy):
    session = Session(policy)
    session.reset(1003)
    for _ in range(20):
        session.step()
    predict = make_predict(policy.model, policy.processor)
    result = rollout(PUSHT, predict, [1003], policy.n_action_steps, max_steps=20)
    assert sum(coverage / 0.95 for coverage in session.coverages) == pytest.approx(result.sum_rewards[0], rel=1e-4)
    assert sum(length for _, length in session.tokens) == 2 * policy.model.config.chunk_size


def test_visitors_do_not_meet(policy):
    alone, first, second = Session(policy), Session(policy), Session(policy)
    for session in (alone, first):
        session.reset(7)
    for _ in range(10):
        alone.step()
    for _ in range(10):
        first.step()
        second.step()
    np.testing.assert_allclose(first.path, alone.path)
    assert np.abs(np.array(second.path) - alone.path).max() > 1


def test_a_policy_of_another_control_rate_is_an_error_line(tmp_path, capsys):
    app = pytest.importorskip("app", reason="the page needs pip install -e '.[app]'")
    folder = shutil.copytree(CHECKPOINT, tmp_path / "policy")
    processor = SmolAndFastProcessor.from_pretrained(folder)
    processor.fps = 30
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"processor_fingerprint": processor.fingerprint}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        app.main(["--checkpoint", str(folder)])
    assert stop.value.code == 2 and "has 30 control steps a second (fps), pusht 10" in capsys.readouterr().err


def test_pieces_stand_where_they_were_put(policy):
    session = Session(policy)
    session.step()
    session.place([100, 120.5], [300, 200, 1.25])
    assert session.coverages == [] and session.tokens == [] and len(session.path) == 1
    assert tuple(session.env.agent.position) == (100, 120.5)
    assert (*session.env.block.position, session.env.block.angle) == pytest.approx((300, 200, 1.25))
    pixels = session.observation["pixels"].astype(int)
    rows, columns = np.nonzero(pixels[..., 2] - pixels[..., 0] > 100)  # what is blue: the pusher
    assert np.mean([columns, rows], axis=1) * 512 / 96 == pytest.approx([100, 120.5], abs=6)
    session.place([-1000, 1000], [1000, -1000, 0])
    assert tuple(session.env.agent.position) == (25, 487) and tuple(session.env.block.position) == (452, 60)
    for _ in range(policy.n_action_steps + 1):
        session.step()
    assert np.isfinite(session.path).all()


@pytest.mark.parametrize(
    ("agent", "block"),
    [
        (None, None),
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2], [1, 2]),
        ([1, math.nan], [1, 2, 3]),
        ([1, 2], [1, 2, math.inf]),
        ("<b>", {}),
        ([[1], [2, 3]], [1, 2, 3]),
    ],
)
def test_a_scene_that_is_none_is_refused(policy, agent, block):
    session = Session(policy)
    with pytest.raises(ValueError, match="agent|block"):
        session.place(agent, block)


def test_a_solved_episode_says_so_and_ends(policy):
    session = Session(policy)
    session.place([60, 60], [256, 256, math.pi / 4])  # the T on its target
    session.step()
    assert session.success and session.done
    steps = len(session.coverages)
    session.step()
    assert len(session.coverages) == steps
    assert "Solved after 0.1 s" in session.views()[1]
    assert "Time is up" in draw_coverage([0.5] * 300, 0.95, False)


def test_the_page_has_its_events_and_no_analytics(policy):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[app]'")
    from app import make_page

    page = make_page(policy)
    assert page.analytics_enabled is False
    events = {event for function in page.fns.values() for _, event in function.targets}
    assert events >= {"load", "click", "release", "select", "submit"}


def copy_space(folder):
    """The files of a Space, as `docs/publishing.md` names them."""
    shutil.copytree(ROOT / "examples", folder, dirs_exist_ok=True)
    (folder / "smolandfast").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder / "smolandfast")
    for name in ("deployment", "training"):
        shutil.copytree(ROOT / name, folder / "smolandfast" / name)


def is_ours(path: str) -> bool:
    return Path(path).is_relative_to(ROOT) and "site-packages" not in path


def play_in_space(folder, results):
    """In a new process, in which nothing of the repository is imported or found."""
    torch.set_num_threads(1)  # more hang after a fork
    for name, module in list(sys.modules.items()):
        if is_ours(getattr(module, "__file__", None) or ""):
            del sys.modules[name]
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
    os.chdir(folder)
    sys.path = [str(folder / "app"), str(folder), *(path for path in sys.path if not is_ours(path))]
    import app

    import smolandfast

    session = app.Session(app.load_page_policy(str(CHECKPOINT)))
    session.step()
    results.put((smolandfast.__file__, len(session.tokens)))


def test_a_space_has_all_files_that_it_needs(tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[app]'")
    copy_space(tmp_path)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=play_in_space, args=(tmp_path, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    file, num_predictions = results.get(timeout=10)
    assert Path(file) == tmp_path / "smolandfast/__init__.py" and num_predictions > 0


def test_the_page_plays_a_deployed_policy(saved_policy, deployed):
    sessions = [Session(load_page_policy(str(folder))) for folder in (saved_policy, deployed)]
    for _ in range(10):
        for session in sessions:
            session.step()
    assert sessions[0].tokens == sessions[1].tokens
    np.testing.assert_array_equal(sessions[0].path, sessions[1].path)


@pytest.fixture
def space(tmp_path):
    """The page as a Space runs it, in a folder of its own."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[app]'")
    copy_space(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"CHECKPOINT": str(CHECKPOINT), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "app/app.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    wait(lambda: b"Running on" in (tmp_path / "log").read_bytes() or process.poll() is not None, 120)
    assert process.poll() is None, (tmp_path / "log").read_text()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


class Visitor:
    """A browser of its own on the page."""

    def __init__(self, url: str, folder: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for switch in ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
            options.add_argument(f"--{switch}")
        for switch in ("headless=new", "disable-component-update", "disable-sync", "window-size=1200,900"):
            options.add_argument(f"--{switch}")
        options.add_argument(f"--user-data-dir={folder}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.browser.get(url)
        wait(lambda: self.all("#scene svg"), 60)

    def all(self, css: str) -> list:
        return self.browser.find_elements("css selector", css)

    def text(self, css: str) -> str:
        return self.browser.execute_script("return document.querySelector(arguments[0]).innerText", css)

    def click(self, css: str) -> None:
        self.all(css)[0].click()

    def pose(self, piece: str) -> list[float]:
        script = "const d = document.querySelector(arguments[0]).dataset; return [d.x, d.y, d.angle].map(Number)"
        return self.browser.execute_script(script, f"[data-piece={piece}]")

    def drag(self, css: str, x: int, y: int) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).drag_and_drop_by_offset(self.all(css)[0], x, y).perform()

    def seconds(self) -> float:
        words = self.text("#verdict").split()
        return float(words[2] if words[0] == "Solved" else words[0])


def wait(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_visitors_drag_run_step_and_stop(space, tmp_path):
    pytest.importorskip("selenium", reason="Selenium is not installed: pip install selenium")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("Chromium and its driver are not installed")
    with contextlib.ExitStack() as stack:
        first, second = (Visitor(space, tmp_path / name) for name in ("first", "second"))
        stack.callback(first.browser.quit)
        stack.callback(second.browser.quit)

        before = first.pose("agent")
        first.drag("[data-piece=agent]", 60, -40)
        scale = 512 / first.all("#scene svg")[0].rect["width"]
        assert np.subtract(first.pose("agent"), before) == pytest.approx([60 * scale, -40 * scale, 0], abs=2)
        block = first.pose("block")
        first.drag("[data-drag=turn]", 50, -50)
        wait(lambda: first.text("#verdict").startswith("0.0 s"), 20)
        turned = first.pose("block")
        assert turned[:2] == pytest.approx(block[:2]) and abs(turned[2] - block[2]) > 0.3

        first.click("button#step")
        wait(lambda: first.seconds() == 0.1, 20)
        num_numbers = 2 * json.loads((CHECKPOINT / "config.json").read_text())["chunk_size"]
        assert f"tokens for {num_numbers} numbers" in first.text("#tokens")
        assert first.all("#scene [data-past] circle") and first.all("#seen img")

        first.click("button#run")
        second.click("button#run")
        wait(lambda: first.seconds() >= 1 and second.seconds() >= 1, 60)
        assert first.pose("agent") != second.pose("agent")
        first.click("button#stop")
        time.sleep(1)
        stopped, others = first.seconds(), second.seconds()
        wait(lambda: second.seconds() > others, 20)
        assert first.seconds() == stopped

        second.drag("[data-piece=block]", -40, 20)  # while it runs
        wait(lambda: second.seconds() == 0, 20)
        assert first.seconds() == stopped
        first.click("button#reset")
        wait(lambda: first.seconds() == 0 and first.pose("agent") == before, 20)

        first.browser.save_screenshot(str(tmp_path / "page.png"))
        with Image.open(tmp_path / "page.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50
        assert [entry for entry in first.browser.get_log("browser") if entry["level"] == "SEVERE"] == []
