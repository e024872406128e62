"""Turn a LeRobot checkpoint into a Transformers folder, or back. Both predict the same actions.

    python -m lerobot_policy_smolandfast.convert_checkpoint --to transformers \
        --checkpoint outputs/train/.../checkpoints/last/pretrained_model --output_dir policy
    python -m lerobot_policy_smolandfast.convert_checkpoint --to lerobot \
        --checkpoint policy --output_dir policy_lerobot

Cameras, control rate and tasks are kept; `--image_keys` renames the cameras, for a robot with other names. The sizes
of the cameras' images, which only LeRobot needs, are stored in `lerobot_features.json` of the Transformers folder.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import atomic_write, check_new_folder, read_json
from smolandfast.prompt_smolandfast import check_names

from .configuration_smolandfast import SMOLANDFASTConfig, model_options
from .modeling_smolandfast import SMOLANDFASTPolicy
from .processor_smolandfast import make_smolandfast_pre_post_processors, processor_options

FEATURES_FILE = "lerobot_features.json"


def to_transformers(checkpoint: str | Path, output_dir: Path, image_keys: Sequence[str] | None = None) -> None:
    """Write a folder for `AutoModel` and `AutoProcessor`, code included, from a LeRobot checkpoint's folder or Hub id.

    Args:
        image_keys: Other names for the cameras, in the same order.
    """
    check_new_folder(Path(output_dir))
    policy = SMOLANDFASTPolicy.from_pretrained(checkpoint)
    shapes = [feature.shape for feature in policy.config.image_features.values()]
    _rename_cameras(policy.model, policy.processor, image_keys)
    features = {"image_shapes": dict(zip(policy.processor.image_keys, map(list, shapes), strict=True))}
    with atomic_write(output_dir) as folder:
        policy.model.save_pretrained(folder)
        policy.processor.save_pretrained(folder)
        (folder / FEATURES_FILE).write_text(json.dumps(features, indent=2) + "\n", encoding="utf-8")


def to_lerobot(checkpoint: str | Path, output_dir: Path, image_keys: Sequence[str] | None = None) -> None:
    """Write a folder for `--policy.path` from one with a saved SmolAndFast model and processor.

    Args:
        image_keys: Other names for the cameras, in the same order.
    """
    check_new_folder(Path(output_dir))
    checkpoint = Path(checkpoint)
    if not (checkpoint / "processor_config.json").is_file():
        raise ValueError(
            f"{checkpoint} has no processor_config.json, so it is not a Transformers folder of this policy. Name one "
            "with a saved model and processor."
        )
    model = SmolAndFastForActionPrediction.from_pretrained(checkpoint)
    processor = SmolAndFastProcessor.from_pretrained(checkpoint)
    features = read_json(checkpoint / FEATURES_FILE) if (checkpoint / FEATURES_FILE).is_file() else {}
    side = processor.image_processor.max_image_size["longest_edge"]  # for unknown sizes
    shapes = [tuple(features.get("image_shapes", {}).get(key, (3, side, side))) for key in processor.image_keys]
    _rename_cameras(model, processor, image_keys)
    inputs = {OBS_STATE: PolicyFeature(FeatureType.STATE, (processor.normalizer.state_dim,))}
    for key, shape in zip(processor.image_keys, shapes, strict=True):
        inputs[key] = PolicyFeature(FeatureType.VISUAL, shape)
    config = SMOLANDFASTConfig(
        input_features=inputs,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (processor.normalizer.action_dim,))},
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


def _rename_cameras(
    model: SmolAndFastForActionPrediction, processor: SmolAndFastProcessor, image_keys: Sequence[str] | None
) -> None:
    """Rename the cameras in the processor, and update the model's fingerprint of it."""
    if image_keys is None:
        return
    image_keys = check_names(image_keys, "image_keys")
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
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
