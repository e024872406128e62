"""Turn a trained checkpoint into one that ships with the repository.

    python examples/export_checkpoint.py --checkpoint outputs/tiny --output_dir checkpoints/pusht-tiny

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


def files_needed(path: Path) -> set[Path]:
    """A code file and those beside it that it imports, directly or through others."""
    names = re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {path}.union(*(files_needed(path.with_name(f"{name}.py")) for name in names))


def export(checkpoint: str, folder: Path) -> None:
    """Write the folder anew; what stood there before goes only once the new one is whole."""
    model = SmolAndFastForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16)
    processor = SmolAndFastProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    processor.check_model(model)
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
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    export(args.checkpoint, args.output_dir)
