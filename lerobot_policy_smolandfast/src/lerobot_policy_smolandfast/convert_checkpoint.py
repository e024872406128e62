"""Turn a LeRobot checkpoint into a Transformers folder, or back. Both predict the same actions.

    python -m lerobot_policy_smolandfast.convert_checkpoint --to transformers \
        --checkpoint outputs/train/.../checkpoints/last/pretrained_model --output_dir policy
    python -m lerobot_policy_smolandfast.convert_checkpoint --to lerobot \
        --checkpoint policy --output_dir policy_lerobot

Cameras, control rate and tasks are kept; `--image_keys` renames the cameras, for a robot that names them differently.
What only LeRobot knows, the sizes of the cameras' images, lies in `lerobot_features.json` of the Transformers folder.
One folder cannot be both: LeRobot and Transformers each want a `config.json`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import atomic_write, read_json
from smolandfast.prompt_smolandfast import check_image_keys

from .configuration_smolandfast import SMOLANDFASTConfig, model_options
from .modeling_smolandfast import SMOLANDFASTPolicy
from .processor_smolandfast import make_smolandfast_pre_post_processors, processor_options

FEATURES_FILE = "lerobot_features.json"


def to_transformers(checkpoint: str | Path, output_dir: Path, image_keys: Sequence[str] | None = None) -> None:
    """Write what `AutoModel` and `AutoProcessor` load, code included, from a LeRobot checkpoint's folder or hub id.

    Args:
        image_keys: Other names for the cameras, in the same order.
    """
    _check_output_dir(output_dir)
    policy = SMOLANDFASTPolicy.from_pretrained(checkpoint)
    shapes = [feature.shape for feature in policy.config.image_features.values()]
    _rename_cameras(policy.model, policy.processor, image_keys)
    features = {"image_shapes": dict(zip(policy.processor.image_keys, map(list, shapes), strict=True))}
    with atomic_write(output_dir) as folder:
        policy.model.save_pretrained(folder)
        policy.processor.save_pretrained(folder)
        (folder / FEATURES_FILE).write_text(json.dumps(features, indent=2) + "\n", encoding="utf-8")


def to_lerobot(checkpoint: str | Path, output_dir: Path, image_keys: Sequence[str] | None = None) -> None:
    """Write what `--policy.path` loads, from a folder that a SmolAndFast model and processor were saved in.

    Args:
        image_keys: Other names for the cameras, in the same order.
    """
    _check_output_dir(output_dir)
    checkpoint = Path(checkpoint)
    if not (checkpoint / "processor_config.json").is_file():
        raise ValueError(
            f"{checkpoint} has no processor_config.json, so it is not a Transformers folder of this policy. Name one "
            "that model and processor were saved in."
        )
    model = SmolAndFastForActionPrediction.from_pretrained(checkpoint)
    processor = SmolAndFastProcessor.from_pretrained(checkpoint)
    features = read_json(checkpoint / FEATURES_FILE) if (checkpoint / FEATURES_FILE).is_file() else {}
    # Sizes that are not known are those that the processor resizes to.
    side = processor.image_processor.max_image_size["longest_edge"]
    shapes = [tuple(features.get("image_shapes", {}).get(key, (3, side, side))) for key in processor.image_keys]
    _rename_cameras(model, processor, image_keys)
    normalizer = processor.normalizer
    config = SMOLANDFASTConfig(
        input_features={
            OBS_STATE: PolicyFeature(FeatureType.STATE, (normalizer.state_dim,)),
            **{
                key: PolicyFeature(FeatureType.VISUAL, shape)
                for key, shape in zip(processor.image_keys, shapes, strict=True)
            },
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (normalizer.action_dim,))},
        vlm_model_name=str(checkpoint),
        gradient_checkpointing=False,
        default_task=processor.default_task,
        push_to_hub=False,
        state_names=processor.state_names,
        action_names=processor.action_names,
        **model_options(model.config),
        **processor_options(processor),
    )
    policy = SMOLANDFASTPolicy(config, parts=(model, processor))
    with atomic_write(output_dir) as folder:
        policy.save_pretrained(folder)
        for pipeline in make_smolandfast_pre_post_processors(config):
            pipeline.save_pretrained(folder)


def _check_output_dir(output_dir: Path) -> None:
    output_dir = Path(output_dir)
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        raise ValueError(f"output_dir {output_dir} exists and is not an empty folder. Name a new one.")


def _rename_cameras(
    model: SmolAndFastForActionPrediction, processor: SmolAndFastProcessor, image_keys: Sequence[str] | None
) -> None:
    """Give the cameras other names; model and processor still belong together."""
    if image_keys is None:
        return
    image_keys = check_image_keys(image_keys)
    if len(image_keys) != len(processor.image_keys):
        raise ValueError(
            f"image_keys is {image_keys}, expected {len(processor.image_keys)} names, in the order of the policy's "
            f"cameras: {processor.image_keys}. Leave it out to keep these names."
        )
    processor.image_keys = image_keys
    model.config.processor_fingerprint = processor.fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("transformers", "lerobot"), required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--image_keys", nargs="+", help="rename the cameras: as many names, in the policy's order")
    args = parser.parse_args()
    convert = to_transformers if args.to == "transformers" else to_lerobot
    try:
        convert(args.checkpoint, args.output_dir, args.image_keys)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
