"""Turn a trained checkpoint into one that ships with the repository.

    python examples/export_checkpoint.py --checkpoint outputs/tiny --output_dir checkpoints/pusht-tiny

Of several checkpoints, where later ones went on from an earlier one, the mean of their weights is exported, with the
processor of the first: it may be better than each (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
Weights become bf16, half the size; `AutoModel.from_pretrained` still loads them as float32, in which the policy is
evaluated.
"""

import argparse
import json
from pathlib import Path

import torch

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import atomic_write, read_json


def mean_of(models: list[SmolAndFastForActionPrediction]) -> SmolAndFastForActionPrediction:
    """The first model with the mean of all their weights."""
    weights = [model.state_dict() for model in models]
    models[0].load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]})
    return models[0]


def export(checkpoints: list[str], folder: Path) -> None:
    """Write the folder anew; what stood there before goes only once the new one is whole.

    Raises:
        ValueError: Models of different processors, or a folder that is no checkpoint.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is there and is no checkpoint, so it stays. Name another --output_dir.")
    models = [SmolAndFastForActionPrediction.from_pretrained(name, dtype=torch.float32) for name in checkpoints]
    processor = SmolAndFastProcessor.from_pretrained(checkpoints[0], trust_remote_code=True)
    for model in models:
        processor.check_model(model)
    model = mean_of(models).to(torch.bfloat16)
    model.config.processor_fingerprint = processor.fingerprint  # missing in checkpoints saved before 0.2
    with atomic_write(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        config = read_json(unfinished / "config.json") | {"dtype": "float32"}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="one, or several for their mean")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    export(args.checkpoint, args.output_dir)
