"""Turn a LeRobot checkpoint into a Transformers folder, or back. Both predict the same actions.

    python -m lerobot_policy_smolandfast.convert_checkpoint --to transformers \
        --checkpoint outputs/train/.../checkpoints/last/pretrained_model --output_dir policy
    python -m lerobot_policy_smolandfast.convert_checkpoint --to lerobot \
        --checkpoint policy --output_dir policy_lerobot --image_keys observation.image

One folder cannot be both: LeRobot and Transformers each want a `config.json` of their own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from smolandfast import SmolAndFastForActionPrediction

from .configuration_smolandfast import SMOLANDFASTConfig, model_options
from .modeling_smolandfast import SMOLANDFASTPolicy
from .processor_smolandfast import load_processor, make_smolandfast_pre_post_processors, processor_options


def to_transformers(checkpoint: str | Path, output_dir: Path) -> None:
    """Write what `AutoModel` and `AutoProcessor` load, code included, from a LeRobot checkpoint's folder or hub id."""
    policy = SMOLANDFASTPolicy.from_pretrained(checkpoint)
    policy.model.save_pretrained(output_dir)
    policy.processor.save_pretrained(output_dir)


def to_lerobot(checkpoint: Path, output_dir: Path, image_keys: Sequence[str] = (OBS_IMAGE,)) -> None:
    """Write what `--policy.path` loads, from a folder that a SmolAndFast model and processor were saved in.

    `image_keys` are LeRobot's names of the cameras, in the order the policy was trained with.
    """
    model = SmolAndFastForActionPrediction.from_pretrained(checkpoint)
    processor = load_processor(checkpoint)
    normalizer, side = processor.normalizer, processor.image_processor.max_image_size["longest_edge"]
    config = SMOLANDFASTConfig(
        input_features={
            OBS_STATE: PolicyFeature(FeatureType.STATE, (normalizer.state_dim,)),
            **{key: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for key in image_keys},
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (normalizer.action_dim,))},
        vlm_model_name=str(checkpoint),
        default_task=processor.default_task,
        push_to_hub=False,
        **model_options(model.config),
        **processor_options(processor),
    )
    SMOLANDFASTPolicy(config, parts=(model, processor)).save_pretrained(output_dir)
    for pipeline in make_smolandfast_pre_post_processors(config):
        pipeline.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("transformers", "lerobot"), required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--image_keys", nargs="+", default=[OBS_IMAGE], help="LeRobot's names of the cameras")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} already exists. Choose a new one.")
    if args.to == "transformers":
        to_transformers(args.checkpoint, args.output_dir)
    else:
        to_lerobot(Path(args.checkpoint), args.output_dir, args.image_keys)


if __name__ == "__main__":
    main()
