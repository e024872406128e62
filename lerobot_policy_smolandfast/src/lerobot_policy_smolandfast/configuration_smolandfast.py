"""The options of `--policy.type=smolandfast`."""

import math
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from smolandfast import SmolAndFastConfig, match_joints
from smolandfast.checks_smolandfast import check_whole
from smolandfast.normalization_smolandfast import BOUNDS
from smolandfast.prompt_smolandfast import check_names
from smolandfast.training.data import axis_names, is_depth

TINY = "tiny"
CHOICES = {"dtype": ("float32", "bfloat16"), "normalization": tuple(BOUNDS)}


@PreTrainedConfig.register_subclass("smolandfast")
@dataclass
class SMOLANDFASTConfig(PreTrainedConfig):
    """Options of the policy and of its training. `lerobot-train --policy.type=smolandfast --help` shows the comments.

    SmolAndFast's processor normalises, see `normalization`; LeRobot's `normalization_mapping` is IDENTITY throughout.
    (With the name `use_relative_actions`, LeRobot would look for its own steps.)
    """

    # SmolVLM or SmolVLM2 checkpoint to start from (hub id or folder), or "tiny": random weights, few enough for CPUs
    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
    scale_factor: int | None = None  # side of the pixel shuffle; None: 1 for a SmolVLM checkpoint, 3 for "tiny"
    do_image_splitting: bool = False  # also cut large images into sub-images; not for "tiny"
    resize_with_pad: bool = False  # keep the aspect ratio of images, between black bars; False: stretch to a square
    freeze_vision_tower: bool = False  # keep the weights of the vision tower as they are
    freeze_connector: bool = False  # keep the weights of the connector as they are
    dtype: str = "float32"  # "bfloat16" runs the model under autocast; the weights are float32 in any case
    gradient_checkpointing: bool = True  # slower, but activations of a batch of 64 take 10 GB instead of 120 (256M)

    chunk_size: int = 10  # actions predicted at once
    n_action_steps: int = 5  # actions of a chunk to execute before the next prediction
    n_state_bins: int = 256  # bins of each state dimension in the prompt
    normalization: str = "min_max"  # of states and actions; or "quantiles": 1st and 99th percentile
    relative_actions: bool = False  # predict actions relative to the state, matched by joint name
    # with relative_actions, joints that stay absolute: all whose name contains one of these, e.g. ["gripper"]
    relative_exclude_joints: list[str] = field(default_factory=list)
    # FAST tokenizer, as hub id ("physical-intelligence/fast") or folder; None: fit one to the data set's actions
    action_tokenizer: str | None = None
    fast_scale: float = 10.0  # scale of a fitted FAST tokenizer: larger is more precise and needs more tokens
    fast_vocab_size: int = 1024  # largest vocabulary of a fitted FAST tokenizer
    relaxed_decoding: bool = False  # decode without constraints, then pad or cut to one chunk
    # replaces an empty task; None: the data set's only task; with several, an empty task is refused
    default_task: str | None = None
    state_names: list[str] | None = None  # of the joints; None: those of the data set
    action_names: list[str] | None = None  # of the joints; None: those of the data set

    vision_learning_rate: float = 2e-5  # peak learning rate of the vision tower
    connector_learning_rate: float = 2e-4  # peak learning rate of the connector
    text_learning_rate: float = 2e-4  # peak learning rate of the language model
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 1e-5  # final value of text_learning_rate; the other rates fall in proportion

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    observation_delta_indices = reward_delta_indices = None
    processor_fingerprint = None  # not an option: of the policy that has this configuration

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    def __post_init__(self) -> None:
        super().__post_init__()
        SmolAndFastConfig(chunk_size=self.chunk_size, n_action_steps=self.n_action_steps)  # checks the two
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}.")
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}, expected 1: the policy uses one observation.")
        for name in ("fast_vocab_size", "n_state_bins", *(() if self.scale_factor is None else ("scale_factor",))):
            check_whole(getattr(self, name), name)
        for name in ("fast_scale", "text_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0.")
        for name in ("vision_learning_rate", "connector_learning_rate", "scheduler_decay_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if self.do_image_splitting and self.vlm_model_name == TINY:
            raise ValueError("do_image_splitting is set, but the images of the tiny preset are too small to be split.")
        if self.do_image_splitting and self.resize_with_pad:
            raise ValueError("resize_with_pad is set, but do_image_splitting resizes images itself. Set one of them.")
        if self.relative_exclude_joints and not self.relative_actions:
            raise ValueError(
                f"relative_exclude_joints is {self.relative_exclude_joints}, but without relative_actions all joints "
                "are absolute. Set --policy.relative_actions=true, or leave it out."
            )
        if set(self.normalization_mapping.values()) - {NormalizationMode.IDENTITY}:
            raise ValueError(
                f"normalization_mapping is {self.normalization_mapping}, expected IDENTITY for all: the policy's own "
                "processor normalises. Choose with --policy.normalization=min_max or quantiles."
            )
        if self.scale_factor is None:
            self.scale_factor = 3 if self.vlm_model_name == TINY else 1

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        """The cameras of the policy, in order, without depth maps, which have one channel."""
        return {key: feature for key, feature in super().image_features.items() if 1 not in feature.shape[::2]}

    def read_dataset_features(self, features: dict[str, dict[str, Any]]) -> None:
        """Take the order of the cameras and the names of the joints from a data set's `meta/info.json`."""
        inputs = self.input_features or {}
        unknown = [key for key in self.image_features if key not in features]
        if unknown:
            raise ValueError(
                f"input_features has the cameras {unknown}, which the data set does not: it has {list(features)}. "
                "Leave --policy.input_features out, or name the data set's own."
            )
        self.input_features = {key: inputs[key] for key in features if key in inputs and not is_depth(features[key])}
        names = {key: axis_names(features[key]) if key in features else None for key in (OBS_STATE, ACTION)}
        self.state_names = self.state_names or names[OBS_STATE]
        self.action_names = self.action_names or names[ACTION]

    def validate_features(self) -> None:
        """Refuse data without a camera, a flat state or a flat action. LeRobot fills in the features beforehand."""
        features = {**(self.input_features or {}), **(self.output_features or {})}
        shapes = {name: tuple(feature.shape) for name, feature in features.items()}
        if not self.image_features or any(len(shapes.get(name, ())) != 1 for name in (OBS_STATE, ACTION)):
            raise ValueError(
                f"The data has {shapes}, expected at least one camera, and {OBS_STATE} and {ACTION} of shape (dim,). "
                "Rename features to match, or use another data set."
            )
        for name, key in (("state_names", OBS_STATE), ("action_names", ACTION)):
            if getattr(self, name) is not None:
                check_names(getattr(self, name), name, *shapes[key])
        if self.relative_actions and shapes[OBS_STATE] != shapes[ACTION] and self.reference_dims is None:
            raise ValueError(
                f"relative_actions is set, but {OBS_STATE} has shape {shapes[OBS_STATE]} and {ACTION} has "
                f"{shapes[ACTION]}, and they have no names to match. Name the joints with --policy.state_names and "
                "--policy.action_names, or leave it off for this robot."
            )

    @property
    def reference_dims(self) -> list[int | None] | None:
        """The dimension of the state that each dimension of the action is relative to, see [`Normalizer`]."""
        return match_joints(self.state_names, self.action_names, self.relative_exclude_joints)

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.text_learning_rate,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.text_learning_rate,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )


def model_options(config: SMOLANDFASTConfig | SmolAndFastConfig) -> dict[str, Any]:
    """The options of the model that may change from run to run."""
    return {name: getattr(config, name) for name in ("n_action_steps", "freeze_vision_tower", "freeze_connector")}
