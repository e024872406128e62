"""Compare the shipped policy's actions between environments with different releases of the libraries.

    make .venv-oldest/installed test-newest
    python benchmarks/speed/releases.py .venv-oldest .venv .venv-newest

Records observations of a few episodes, and predicts chunks for them in each environment, with the auto classes. Writes
`benchmarks/results/releases.md`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from envs.pusht import BENCHMARK as PUSHT
from evaluate import load_policy, make_predict
from rollouts import rollout

ROOT = Path(__file__).resolve().parents[2]

PREDICT = """
import json, sys
from importlib.metadata import version
sys.modules["smolandfast"] = None  # use the checkpoint's code, not the installed package
import numpy as np, torch
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
folder, seen, path = sys.argv[1:]
seen = np.load(seen)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

def predict(model):
    chunks = []
    for image, state in zip(seen["images"], seen["states"]):
        inputs = processor(images=image, text=None, state=state)
        chunks.append(processor.post_process_actions(model.generate(**inputs))[0])
    return np.array(chunks)

chunks = predict(AutoModel.from_pretrained(folder, trust_remote_code=True))
np.savez(path, chunks=chunks)
names = ("transformers", "torch", "tokenizers", "huggingface_hub", "numpy")
print(json.dumps({"python": sys.version.split()[0], **{n: version(n) for n in names}}))
"""


def collect(checkpoint: str, seeds: range, count: int) -> dict[str, np.ndarray]:
    """Evenly spaced observations of a policy's episodes."""
    model, processor = load_policy(checkpoint)
    predict, images, states = make_predict(model, processor), [], []

    def record(*observation):
        images.extend(image for (image,) in observation[0])
        states.extend(observation[1])
        return predict(*observation)

    rollout(PUSHT, record, seeds, model.config.n_action_steps)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    return {"images": np.stack(images)[chosen], "states": np.stack(states)[chosen]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", type=Path, help="virtual environments; the first is the reference")
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints/pusht-tiny"))
    parser.add_argument("--observations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=6000)
    args = parser.parse_args()
    rows, expected = [], None
    with tempfile.TemporaryDirectory() as folder:
        seen, path, policy = Path(folder, "seen.npz"), Path(folder, "chunks.npz"), Path(folder, "policy")
        for part in load_policy(args.checkpoint):
            part.save_pretrained(policy)  # the code too
        np.savez(seen, **collect(args.checkpoint, range(args.seed, args.seed + 4), args.observations))
        for environment in args.environments:
            python = environment.absolute() / "bin/python"
            command = [python, "-c", PREDICT, policy, seen, path]
            printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
            row, chunks = json.loads(printed.splitlines()[-1]), np.load(path)
            expected = chunks["chunks"] if expected is None else expected
            row["equal"] = int((chunks["chunks"] == expected).all(axis=(1, 2)).sum())
            rows.append(row)
            print(row)
    write_table(rows, args.observations, args.seed)


def write_table(rows: list[dict], observations: int, seed: int) -> None:
    lines = [
        "# Equal actions with different releases",
        "",
        f"{observations} observations of PushT (episodes from seed {seed}), the shipped policy loaded by the auto "
        "classes, one thread, greedy, fp32: chunks that equal the first row's bit for bit.",
        "",
        "| Transformers | PyTorch | Python | tokenizers | huggingface_hub | NumPy | equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("transformers", "torch", "python", "tokenizers", "huggingface_hub", "numpy")
        cells = [*(row[name] for name in names), f"{row['equal']} of {observations}"]
        lines.append(f"| {' | '.join(cells)} |")
    (ROOT / "benchmarks/results/releases.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
