"""SmolAndFast behind LeRobot's policy interface.

Everything is handed to [`SmolAndFastForActionPrediction`] and its processor. Observations come, and actions go, in the
robot's units.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from transformers import GenerationConfig

from lerobot_policy_smolandfast.configuration_smolandfast import TINY, SMOLANDFASTConfig
from lerobot_policy_smolandfast.processor_smolandfast import (
    load_processor,
    make_processor,
    processor_options,
    save_processor,
)
from smolandfast import SmolAndFastConfig, SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.tiny_smolandfast import make_tiny_model
from smolandfast.training_smolandfast import parameter_groups

FOLDER = "smolandfast"  # in a LeRobot checkpoint: the model's configuration and the processor


class SMOLANDFASTPolicy(PreTrainedPolicy):
    """A SmolAndFast model and its processor as a LeRobot policy.

    Args:
        config: Options, with the features that LeRobot filled in.
        dataset_stats: `meta/stats.json` of the data set that a new policy is for.
        dataset_meta: That data set.
        parts: Model and processor of a policy that is not new.

    Raises:
        ValueError: No data set for a new policy, or parts that contradict the options.
    """

    config_class = SMOLANDFASTConfig
    name = "smolandfast"

    def __init__(
        self,
        config: SMOLANDFASTConfig,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: LeRobotDatasetMetadata | None = None,
        parts: tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor] | None = None,
    ):
        super().__init__(config)
        config.validate_features()
        if parts is None:
            if dataset_stats is None or dataset_meta is None:
                raise ValueError(
                    "A new policy needs a data set: its statistics, tasks and actions. Train one with lerobot-train, "
                    "or load a checkpoint with --policy.path."
                )
            processor = make_processor(config, dataset_stats, dataset_meta)
            parts = _make_model(config, processor), processor
            config.scale_factor = processor.scale_factor
        self.model, self.processor = parts
        if config.default_task is None:
            config.default_task = self.processor.default_task
        self.processor.default_task = config.default_task
        self._check_parts()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reset()

    def _check_parts(self) -> None:
        normalizer = self.processor.normalizer
        found = processor_options(self.processor) | {
            f"the dimension of {OBS_STATE}": normalizer.state_dim,
            f"the dimension of {ACTION}": normalizer.action_dim,
        }
        expected = {name: getattr(self.config, name) for name in processor_options(self.processor)} | {
            f"the dimension of {OBS_STATE}": self.config.robot_state_feature.shape[0],
            f"the dimension of {ACTION}": self.config.action_feature.shape[0],
        }
        for name, value in found.items():
            if value != expected[name]:
                raise ValueError(
                    f"{name} is {expected[name]!r}, but {value!r} in the checkpoint, whose weights are for that. "
                    "Leave it as it is, or train a new policy with --policy.type=smolandfast."
                )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: LeRobotDatasetMetadata | None = None,
        **hub_kwargs: Any,
    ) -> "SMOLANDFASTPolicy":
        """Load a checkpoint that LeRobot saved, to evaluate it, to resume or to fine-tune it.

        Statistics and tokenizer stay the checkpoint's, whatever data set it is trained on next: the weights are for
        them. So `dataset_stats` and `dataset_meta` are of no use here.

        Args:
            pretrained_name_or_path: Folder (`.../pretrained_model`) or hub id.
            config: Options to use instead of the checkpoint's.
            hub_kwargs: Those of `huggingface_hub.snapshot_download`, such as `revision`.

        Raises:
            ValueError: A folder of another kind, or options that contradict the checkpoint.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            files = ["config.json", "model.safetensors", f"{FOLDER}/*"]
            folder = Path(snapshot_download(str(pretrained_name_or_path), allow_patterns=files, **hub_kwargs))
        if not (folder / FOLDER / "config.json").is_file():
            raise ValueError(
                f"{pretrained_name_or_path} has no {FOLDER}/config.json: it is no LeRobot checkpoint of this policy. "
                "Convert a Transformers folder with python -m lerobot_policy_smolandfast.convert_checkpoint."
            )
        config = PreTrainedConfig.from_pretrained(folder) if config is None else config
        model_config = SmolAndFastConfig.from_pretrained(folder / FOLDER, **_model_options(config))
        model = SmolAndFastForActionPrediction(model_config)
        model.generation_config = GenerationConfig.from_pretrained(folder / FOLDER)
        parts = model, load_processor(folder / FOLDER)
        return super().from_pretrained(folder, config=config, strict=True, parts=parts)

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        super()._save_pretrained(save_directory, **kwargs)
        self.model.config.save_pretrained(save_directory / FOLDER)
        self.model.generation_config.save_pretrained(save_directory / FOLDER)
        save_processor(self.processor, save_directory / FOLDER)

    def get_optim_params(self) -> list[dict]:
        """Groups of what is trained, with the learning rates of vision tower, connector and language model."""
        return parameter_groups(
            self.model,
            self.config.vision_learning_rate,
            self.config.connector_learning_rate,
            self.config.text_learning_rate,
            self.config.optimizer_weight_decay,
        )

    def reset(self) -> None:
        """Forget the actions still to execute: to be called when an episode begins."""
        self._action_queue: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        """The loss of a batch.

        Args:
            batch: For each camera `(B, 3, H, W)` floats in [0, 1], `observation.state` `(B, state_dim)`, `action`
                `(B, chunk_size, action_dim)` and `task`, B sentences.

        Returns:
            Cross-entropy of the action tokens, a scalar; nothing more to log.
        """
        inputs = self.processor(**self._read_observation(batch), actions=batch[ACTION]).to(self.model.device)
        with self._autocast():
            return self.model(**inputs, use_cache=False).loss, None

    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Predict the next actions: observations as in `forward` -> `(B, chunk_size, action_dim)`, robot units.

        Args:
            batch: Observations. Without `task`, or where it is empty, the default task is used.
            kwargs: Options of `generate()`, such as `do_sample` and `temperature`.
        """
        self.eval()
        inputs = self.processor(**self._read_observation(batch)).to(self.model.device)
        relaxed = self.config.relaxed_decoding
        with self._autocast():
            ids = self.model.generate(**inputs, relaxed=relaxed, **kwargs)
        return torch.from_numpy(self.processor.post_process_actions(ids, relaxed)).to(self.model.device)

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action of each environment: observations as in `forward` -> `(B, action_dim)`, robot units.

        A chunk is predicted when `n_action_steps` of the last one have been executed.
        """
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch, **kwargs)[:, : self.config.n_action_steps]
            self._action_queue.extend(chunk.transpose(0, 1))  # (B, n, D) -> n times (B, D)
        return self._action_queue.popleft()

    def _read_observation(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The processor's arguments."""
        keys = [*self.config.image_features, OBS_STATE]
        missing = [key for key in keys if key not in batch]
        if missing:
            raise ValueError(
                f"The batch has no {', '.join(missing)}, only {sorted(batch)}. Rename what is there with "
                "--rename_map, or train a policy for these cameras."
            )
        images = zip(*(batch[key] for key in self.config.image_features), strict=True)  # one tuple a sample
        return {"images": list(images), "text": batch.get("task"), "state": batch[OBS_STATE]}

    def _autocast(self) -> AbstractContextManager:
        # With float32, what `accelerate launch --mixed_precision` set up stays in force.
        is_bfloat16 = self.config.dtype == "bfloat16"
        return torch.autocast(self.model.device.type, torch.bfloat16) if is_bfloat16 else nullcontext()


def _model_options(config: SMOLANDFASTConfig) -> dict[str, Any]:
    """The fields of [`SmolAndFastConfig`] that may change from run to run."""
    names = ("n_action_steps", "freeze_vision_tower", "freeze_connector")
    return {name: getattr(config, name) for name in names}


def _make_model(config: SMOLANDFASTConfig, processor: SmolAndFastProcessor) -> SmolAndFastForActionPrediction:
    if config.vlm_model_name == TINY:
        return make_tiny_model(processor, **_model_options(config))
    return SmolAndFastForActionPrediction.from_pretrained(
        config.vlm_model_name, **processor.model_kwargs(), **_model_options(config), dtype=torch.float32
    )
