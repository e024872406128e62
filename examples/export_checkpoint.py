"""Turn a trained checkpoint into one that ships with the repository: weights and JSON, without the code.

    python examples/export_checkpoint.py --checkpoint outputs/tiny --output_dir checkpoints/pusht-tiny

Of several checkpoints, where later ones went on from an earlier one, the mean of their weights is exported, with the
processor of the first: it may be better than each (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
Weights become bf16, half the size; `AutoModel.from_pretrained` still loads them as float32, in which the policy is
evaluated. A folder that holds anything else than an earlier export is refused.
"""

import argparse
import json
from pathlib import Path

import interrupt  # noqa: F401 - before all that takes long
import torch
from evaluate import first_line

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import SUMS, atomic_write, check_output_dir, read_json, write_checksums

# All that is written; the first names the folder as an export, if its SHA256SUMS lists it.
NAMES = ["config.json", SUMS, "*.safetensors", "*.json", "*.jinja"]


def mean_of(models: list[SmolAndFastForActionPrediction]) -> SmolAndFastForActionPrediction:
    """The first model with the mean of all their weights. Raises `ValueError` if their shapes differ."""
    weights = [model.state_dict() for model in models]
    shapes = [{name: tuple(tensor.shape) for name, tensor in w.items()} for w in weights]
    for found in shapes:
        differing = sorted(dict(found.items() ^ shapes[0].items()))
        if differing:
            raise ValueError(
                f"The checkpoints differ in the shape of {differing[0]}, expected models of one size. Give "
                "checkpoints of trainings that went on from one another."
            )
    models[0].load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]})
    return models[0]


def export(checkpoints: list[str], folder: Path) -> None:
    """Write the folder, or replace an earlier export once the new one is complete.

    Raises:
        OSError: Files of a checkpoint are missing or damaged, or the folder cannot be written.
        ValueError: A folder that holds anything else, or models that do not belong together.
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
        for path in unfinished.rglob("*.py"):  # the repository has the code at its root
            path.unlink()
        config = read_json(unfinished / "config.json") | {"dtype": "float32"}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        names = {path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file()}
        write_checksums(unfinished, names - {SUMS})
        check_output_dir(folder, NAMES, sealed=True)  # what was put there meanwhile


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="one, or several for their mean")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.output_dir)
    except (OSError, ValueError) as error:
        parser.error(first_line(error))


if __name__ == "__main__":
    main()
