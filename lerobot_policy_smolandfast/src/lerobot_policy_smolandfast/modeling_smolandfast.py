"""SmolAndFast behind LeRobot's policy interface."""

import json
import logging
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from transformers import GenerationConfig

from smolandfast import SmolAndFastConfig, SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.training import make_tiny_model, parameter_groups

from .configuration_smolandfast import TINY, SMOLANDFASTConfig, model_options
from .processor_smolandfast import BatchReader, learn_tasks, make_processor, processor_options

FOLDER = "smolandfast"  # in a LeRobot checkpoint: the model's configuration and the processor


class SMOLANDFASTPolicy(PreTrainedPolicy):
    """A SmolAndFast model and its processor as a LeRobot policy. Observations and actions are in the robot's units.

    A new policy is built from the statistics and metadata of its data set, a loaded one from its model and processor.
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
        if parts is None and dataset_meta is not None:
            config.read_dataset_features(dataset_meta.features)
        config.validate_features()
        if parts is not None:
            self.model, self.processor = parts
        elif dataset_stats is None or dataset_meta is None:
            raise ValueError(
                "A new policy needs a data set: its statistics, tasks and actions. Train one with lerobot-train, or "
                "load a checkpoint with --policy.path."
            )
        else:
            self.processor = make_processor(config, dataset_stats, dataset_meta)
            if config.vlm_model_name == TINY:
                self.model = make_tiny_model(self.processor, **model_options(config))
            else:
                options = {**self.processor.model_kwargs(), **model_options(config), "dtype": torch.float32}
                self.model = SmolAndFastForActionPrediction.from_pretrained(config.vlm_model_name, **options)
        if config.default_task is None:
            config.default_task = self.processor.default_task
        self.processor.default_task = config.default_task
        self._check_processor()
        config.processor_fingerprint = self.model.config.processor_fingerprint or self.processor.fingerprint
        self._read = BatchReader(self.processor, config, config.processor_fingerprint)
        self._has_warned_of_compilation = False
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reset()

    def _check_processor(self) -> None:
        """Refuse options and features that differ from those of the training."""
        config, normalizer = self.config, self.processor.normalizer
        pairs = {name: (getattr(config, name), value) for name, value in processor_options(self.processor).items()}
        pairs[f"the dimension of {OBS_STATE}"] = config.robot_state_feature.shape[0], normalizer.state_dim
        pairs[f"the dimension of {ACTION}"] = config.action_feature.shape[0], normalizer.action_dim
        pairs["the list of cameras"] = list(config.image_features), self.processor.image_keys
        for name, (requested, trained) in pairs.items():
            if requested != trained:
                raise ValueError(
                    f"{name} is {requested!r}, but {trained!r} in the checkpoint. Use the value of the training, or "
                    "train a new policy with --policy.type=smolandfast."
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
        """Load a checkpoint that LeRobot saved: a folder (`.../pretrained_model`) or Hub id.

        `dataset_stats` is ignored: a fine-tuned policy keeps its statistics and tokenizer. It adds the tasks of
        `dataset_meta`.

        Args:
            config: Options to use instead of the checkpoint's.
            hub_kwargs: Those of `huggingface_hub.snapshot_download`, such as `revision`.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            files = ["config.json", "model.safetensors", f"{FOLDER}/*"]
            folder = Path(snapshot_download(str(pretrained_name_or_path), allow_patterns=files, **hub_kwargs))
        if not (folder / FOLDER / "config.json").is_file():
            raise ValueError(
                f"{pretrained_name_or_path} has no {FOLDER}/config.json, so it is not a LeRobot checkpoint of this "
                "policy. Convert a Transformers folder with python -m lerobot_policy_smolandfast.convert_checkpoint."
            )
        config = config or PreTrainedConfig.from_pretrained(folder)
        model_config = SmolAndFastConfig.from_pretrained(folder / FOLDER, **model_options(config))
        model = SmolAndFastForActionPrediction(model_config)
        model.generation_config = GenerationConfig.from_pretrained(folder / FOLDER)
        processor = SmolAndFastProcessor.from_pretrained(folder / FOLDER)
        if processor.fps is not None:  # policies do not get LeRobot's --fps, so it cannot be checked here
            logging.info("The policy was trained at %g actions a second: run it with --fps=%g", *[processor.fps] * 2)
        if dataset_meta is not None:
            learn_tasks(processor, config, list(dataset_meta.tasks.index))
        return super().from_pretrained(folder, config=config, strict=True, parts=(model, processor))

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        super()._save_pretrained(save_directory, **kwargs)
        folder = save_directory / FOLDER
        for part in (self.model.config, self.model.generation_config, self.processor):
            part.save_pretrained(folder)
        # `push_model_to_hub` uploads only JSON from this folder, and the code is in the installed package.
        template = json.dumps({"chat_template": self.processor.chat_template})
        (folder / "chat_template.json").write_text(template, encoding="utf-8")
        for path in (folder / "chat_template.jinja", *folder.rglob("*.py")):
            path.unlink()

    def get_optim_params(self) -> list[dict]:
        config = self.config
        rates = config.vision_learning_rate, config.connector_learning_rate, config.text_learning_rate
        return parameter_groups(self.model, *rates, config.optimizer_weight_decay)

    def reset(self) -> None:
        """Drop the remaining actions, at the start of an episode."""
        self._action_queue: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        """The loss of a batch, a scalar: the cross-entropy of the action tokens. LeRobot logs the second value.

        Args:
            batch: The output of the pre-processor, of which only the model inputs are used. A batch without them,
                such as LeRobot's loader gives, is turned into inputs here, see [`BatchReader`].
        """
        inputs = batch if "labels" in batch else self._read(batch, with_actions=True)
        inputs = {name: inputs[name].to(self.model.device) for name in (*self.processor.model_input_names, "labels")}
        with self._autocast():
            return self.model(**inputs, use_cache=False).loss, None

    def supports_rtc(self) -> bool:
        """Whether LeRobot's real-time mode, `lerobot-rollout --inference.type=rtc`, is supported: yes.

        It predicts while the arm executes the previous chunk, drops the past actions of the new one and switches to
        it. The prediction is not conditioned on the actions executed in the meantime.
        """
        return True

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Predict chunks: `(B, chunk_size, action_dim)`.

        Args:
            batch: Observations, see [`BatchReader`].
            inference_delay, prev_chunk_left_over: Of LeRobot's real-time mode; not used, see [`supports_rtc`].
            kwargs: For `generate()`.
        """
        return self._generate_chunk(batch, torch.compiler.is_compiling(), kwargs)

    @torch.compiler.disable  # the processor and constrained decoding cannot be traced
    def _generate_chunk(self, batch: dict[str, Any], is_compiled: bool, options: dict[str, Any]) -> Tensor:
        if is_compiled and not self._has_warned_of_compilation:
            self._has_warned_of_compilation = True
            logging.warning("SmolAndFast runs without torch.compile: --use_torch_compile=true has no effect.")
        self.eval()
        inputs = self._read(batch).to(self.model.device)
        relaxed = self.config.relaxed_decoding
        with self._autocast():
            ids = self.model.generate(**inputs, relaxed=relaxed, **options)
        return torch.from_numpy(self.processor.post_process_actions(ids, relaxed)).to(self.model.device)

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action of each environment: `(B, action_dim)`. A new chunk is predicted every `n_action_steps`."""
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch, **kwargs)[:, : self.config.n_action_steps]
            self._action_queue.extend(chunk.transpose(0, 1))  # (B, n, D) -> n times (B, D)
        return self._action_queue.popleft()

    def _autocast(self) -> AbstractContextManager:
        if self.config.dtype == "bfloat16":
            return torch.autocast(self.model.device.type, torch.bfloat16)
        return nullcontext()  # keeps the setting of `accelerate launch --mixed_precision`
