"""Turn a trained checkpoint into one that ships with the repository.

    python examples/export_checkpoint.py --checkpoint outputs/tiny --output_dir checkpoints/pusht-tiny

Of several checkpoints, where later ones went on from an earlier one, the mean of their weights is exported, with the
processor of the first: it may be better than each (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
Weights become bf16, half the size; `AutoModel.from_pretrained` still loads them as float32, in which the policy is
evaluated. The code files become links to the top-level ones.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import torch

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor

ROOT = Path(__file__).resolve().parents[1]


def imported_modules(path: Path) -> list[str]:
    """The modules beside a code file that it imports itself, anywhere in it."""
    return re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)


def files_needed(path: Path) -> set[Path]:
    """A code file and those beside it that it imports, directly or through others."""
    return {path}.union(*(files_needed(path.with_name(f"{name}.py")) for name in imported_modules(path)))


def mean_of(models: list[SmolAndFastForActionPrediction]) -> SmolAndFastForActionPrediction:
    """The first model with the mean of all their weights."""
    weights = [model.state_dict() for model in models]
    models[0].load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]})
    return models[0]


def export(checkpoints: list[str], folder: Path) -> None:
    """Write the folder anew; what stood there before goes only once the new one is whole."""
    models = [SmolAndFastForActionPrediction.from_pretrained(name, dtype=torch.float32) for name in checkpoints]
    processor = SmolAndFastProcessor.from_pretrained(checkpoints[0], trust_remote_code=True)
    for model in models:
        processor.check_model(model)
    model = mean_of(models).to(torch.bfloat16)
    if model.config.normalization_fingerprint is None:  # trained before there was one
        model.config.normalization_fingerprint = processor.normalizer.fingerprint
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is there and is no checkpoint, so it stays. Name another --output_dir.")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    config_file = partial / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(
        json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    for path in list(partial.rglob("*.py")):  # a checkpoint of older code may lack what today's imports
        for source in files_needed(ROOT / path.name):
            link = path.with_name(source.name)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(source, path.parent.resolve()))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="one, or several for their mean")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    export(args.checkpoint, args.output_dir)
