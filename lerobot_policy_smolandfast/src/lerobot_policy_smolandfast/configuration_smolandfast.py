"""The options of `--policy.type=smolandfast`."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_STATE

TINY = "tiny"
CHOICES = {"dtype": ("float32", "bfloat16"), "normalization": ("min_max", "quantiles")}


@PreTrainedConfig.register_subclass("smolandfast")
@dataclass
class SMOLANDFASTConfig(PreTrainedConfig):
    """Options of the policy, and of its training.

    Normalisation is done once, by SmolAndFast's processor: it needs robot units to write the state into the prompt, to
    take actions relative to it and to clip what it decodes. It uses the data set's statistics as LeRobot has them.
    `normalization_mapping`, which LeRobot's own steps read, therefore is IDENTITY throughout; choose with
    `normalization`.

    Args:
        vlm_model_name: What a new policy starts from: a SmolVLM or SmolVLM2 checkpoint, as hub id or folder, or
            `"tiny"`, a few million random weights for 96x96 images that train on a CPU.
        scale_factor: Side of the pixel shuffle. `None`: 1 for a SmolVLM checkpoint, 3 for the tiny preset.
        do_image_splitting: Whether large images are also cut into sub-images. Not for the tiny preset.
        freeze_vision_tower: Whether the vision tower stays as it is.
        freeze_connector: Whether the connector stays as it is.
        dtype: `"bfloat16"` runs the model under autocast; the weights are float32 in any case.
        gradient_checkpointing: Whether activations are computed twice instead of kept: slower, but a batch of 64 then
            takes some 10 GB of them and not 120 (256M, `scale_factor` 1).
        chunk_size: Actions predicted at once.
        n_action_steps: Actions of a chunk that are executed before the next prediction.
        n_state_bins: Bins of each state dimension in the prompt.
        normalization: `"min_max"`, or `"quantiles"` (1st and 99th percentile), of states and actions.
        relative_actions: Whether actions are predicted relative to the state. (Not `use_relative_actions`: LeRobot
            looks for processor steps of its own where a policy has an option of this name.)
        action_tokenizer: FAST tokenizer of a new policy, as hub id (`"physical-intelligence/fast"`) or folder. `None`:
            one is fitted to the actions of the data set.
        fast_scale: Scale of a fitted FAST tokenizer: larger is finer and needs more tokens.
        fast_vocab_size: Largest vocabulary of a fitted FAST tokenizer.
        relaxed_decoding: Whether the model may end a string of action tokens where it likes; what is missing to a
            chunk is then filled with zeros, and what is too much is cut. By default it can only write whole chunks.
        default_task: Stands in for an empty task. `None`: the first task of the data set.
        vision_learning_rate: Peak learning rate of the vision tower.
        connector_learning_rate: Peak learning rate of the connector.
        text_learning_rate: Peak learning rate of the language model.
        scheduler_decay_lr: Where the cosine takes `text_learning_rate`; the other rates fall in proportion.

    Raises:
        ValueError: A value that cannot be; the message says the mend.
    """

    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
    scale_factor: int | None = None
    do_image_splitting: bool = False
    freeze_vision_tower: bool = False
    freeze_connector: bool = False
    dtype: str = "float32"
    gradient_checkpointing: bool = True

    chunk_size: int = 10
    n_action_steps: int = 5
    n_state_bins: int = 256
    normalization: str = "min_max"
    relative_actions: bool = False
    action_tokenizer: str | None = None
    fast_scale: float = 10.0
    fast_vocab_size: int = 1024
    relaxed_decoding: bool = False
    default_task: str | None = None

    vision_learning_rate: float = 2e-5
    connector_learning_rate: float = 2e-4
    text_learning_rate: float = 2e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 1e-5

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}, expected 1: the policy looks at one moment.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}.")
        for name in ("chunk_size", "n_action_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a whole number of at least 1.")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, more than the chunk_size of {self.chunk_size} actions that "
                "one prediction holds. Execute fewer steps or predict longer chunks."
            )
        if self.do_image_splitting and self.vlm_model_name == TINY:
            raise ValueError("do_image_splitting is set, but the tiny preset's images are too small to be cut.")
        if set(self.normalization_mapping.values()) - {NormalizationMode.IDENTITY}:
            raise ValueError(
                f"normalization_mapping is {self.normalization_mapping}, expected IDENTITY for all: the policy's own "
                "processor normalises. Choose with --policy.normalization=min_max or quantiles."
            )

    def validate_features(self) -> None:
        """Refuse data without a camera, a flat state or a flat action; LeRobot fills the features in beforehand."""
        if not self.image_features:
            raise ValueError(f"input_features has no camera, only {sorted(self.input_features or ())}.")
        for key, feature in ((OBS_STATE, self.robot_state_feature), (ACTION, self.action_feature)):
            if feature is None or len(feature.shape) != 1:
                found = {**(self.input_features or {}), **(self.output_features or {})}
                raise ValueError(
                    f"The features have no flat vector {key!r}, expected one of shape (dim,). Found "
                    f"{ {name: tuple(feature.shape) for name, feature in found.items()} }: rename the one meant."
                )
        dims = self.robot_state_feature.shape[0], self.action_feature.shape[0]
        if self.relative_actions and dims[0] != dims[1]:
            raise ValueError(
                f"relative_actions is set, but state and action have {dims[0]} and {dims[1]} dimensions, expected the "
                "same: the state is subtracted. Leave it off for this robot."
            )

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

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None
