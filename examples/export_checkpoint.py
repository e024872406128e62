"""Export a trained checkpoint for the repository: bf16 weights and JSON, without the code.

    python examples/export_checkpoint.py --checkpoint outputs/tiny --output_dir checkpoints/pusht-tiny

Several checkpoints of one training are averaged (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"); the
processor is the first one's. `AutoModel.from_pretrained` loads the weights as float32.
"""

import argparse
import json
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
import torch
from evaluate import error_line

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import SUMS, atomic_write, check_output_dir, read_json, write_checksums

# The output files. A folder whose SHA256SUMS lists the first is an earlier export, and may be replaced.
NAMES = ["config.json", SUMS, "*.safetensors", "*.json", "*.jinja"]


def mean_of(models: list[SmolAndFastForActionPrediction]) -> SmolAndFastForActionPrediction:
    """The first model with the mean of all weights. Raises `ValueError` if their shapes differ."""
    weights = [model.state_dict() for model in models]
    shapes = [{name: tuple(tensor.shape) for name, tensor in w.items()} for w in weights]
    differing = sorted({name for other in shapes for name, _ in other.items() ^ shapes[0].items()})
    if differing:
        raise ValueError(
            f"The checkpoints differ in the shape of {differing[0]}, expected models of one size. Give checkpoints of "
            "one training."
        )
    models[0].load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]})
    return models[0]


def export(checkpoints: list[str], folder: Path) -> None:
    """Write the folder, or replace an earlier export atomically.

    Raises:
        OSError: Files of a checkpoint are missing or damaged, or the folder cannot be written.
        ValueError: The folder holds anything else, or the models do not fit together.
    """
    check_output_dir(folder, NAMES, sealed=True)
    models = [SmolAndFastForActionPrediction.from_pretrained(name, dtype=torch.float32) for name in checkpoints]
    processor = SmolAndFastProcessor.from_pretrained(checkpoints[0])
    for model in models:
        processor.check_model(model)
    model = mean_of(models).to(torch.bfloat16)
    with atomic_write(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        for path in unfinished.rglob("*.py"):  # the code is at the root of the repository
            path.unlink()
        config = read_json(unfinished / "config.json") | {"dtype": "float32"}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        names = {path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file()}
        write_checksums(unfinished, names - {SUMS})
        check_output_dir(folder, NAMES, sealed=True)  # it may have changed in the meantime


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="one, or several for their mean")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    with error_line(parser):
        export(args.checkpoint, args.output_dir)


if __name__ == "__main__":
    main()
