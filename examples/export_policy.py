"""Export a checkpoint as a deployed policy: a folder that runs without PyTorch and Transformers.

    python examples/export_policy.py --checkpoint checkpoints/pusht-tiny --output_dir deployed
    python examples/export_policy.py --checkpoint checkpoints/pusht-tiny --output_dir deployed-int8 --weights int8

See `smolandfast.deployment.export`. Needs `pip install -e ".[deployment]"`.
"""

import argparse
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
from evaluate import error_line, find_checkpoint

from smolandfast.deployment.export import NUM_OBSERVATIONS, export_policy


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint as a deployed policy.")
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote, or a Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--weights", choices=("float32", "int8"), default="float32")
    args = parser.parse_args(argv)
    find_checkpoint(parser, args)
    with error_line(parser):
        num_equal, difference = export_policy(args.checkpoint, args.output_dir, args.weights)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(
        f"{args.output_dir}: {size / 1e6:.1f} MB, {args.weights}. For {num_equal} of {NUM_OBSERVATIONS} random "
        f"observations the chunks equal the checkpoint's; mean log-probabilities differ by up to {difference:.1g}."
    )


if __name__ == "__main__":
    main()
