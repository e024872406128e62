"""From camera images, task and robot state to model inputs, and from generated ids to robot actions.

The prompt (`prompt_smolandfast.py`) is SmolVLM's chat template around

    <image> Task: {task}, State: {bins}, Action:

with one bin number per dimension of the state. `processor_config.json` holds the statistics of the data set.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin, SmolVLMImageProcessorPil
from transformers.utils import logging

from .checks_smolandfast import as_numbers, as_value_error, check_fps, check_length, check_whole
from .configuration_smolandfast import SmolAndFastConfig, action_token_map
from .files_smolandfast import HUB_KWARGS, find_file
from .grammar_smolandfast import MAX_SYMBOL_BYTES
from .normalization_smolandfast import Normalizer, match_joints
from .prompt_smolandfast import (
    BINS_IN_PROMPT,
    ImageResizer,
    check_names,
    pixel_table,
    read_observations,
    to_pixel_values,
    warning_of_new_tasks,
    write_prompt,
)
from .tokenization_fast_action import FastActionTokenizer

logger = logging.get_logger(__name__)

DEFAULT_IMAGE_KEY = "observation.image"  # LeRobot's name for a single camera
PROCESSOR_FILE = "processor_config.json"
ACTION_TOKENIZER = "action_tokenizer"  # folder in a saved processor


class SmolAndFastProcessor(ProcessorMixin):
    r"""
    SmolVLM's image processor and tokenizer, a FAST tokenizer and the robot's statistics.

    Make one for a SmolVLM checkpoint with [`SmolAndFastProcessor.from_vlm`]; load a saved one with
    `AutoProcessor.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        image_processor ([`SmolVLMImageProcessorPil`]): Resizes and normalises images.
        tokenizer ([`PreTrainedTokenizerFast`]): The language model's tokenizer.
        action_tokenizer ([`FastActionTokenizer`]): Turns action chunks into tokens.
        statistics (`dict`): See [`compute_statistics`].
        normalization (`str`, defaults to `"min_max"`): Or `"quantiles"`.
        use_relative_actions (`bool`, defaults to `False`): Whether actions are predicted relative to the state.
        relative_exclude_joints (`list[str]`, *optional*):
            With `use_relative_actions`, joints that stay absolute: all whose name contains one of these. `"gripper"`
            is a good choice for an arm. Needs `action_names`.
        chunk_size (`int`, *optional*): Actions in a chunk, by default the FAST tokenizer's horizon. FAST+ has none.
        n_state_bins (`int`, defaults to 256): Bins of each state dimension in the prompt.
        fast_skip_tokens (`int`, defaults to 280): Ids at the end of the vocabulary that remain text.
        scale_factor (`int`, defaults to 1): Side of the model's pixel shuffle.
        patch_size (`int`, defaults to 16): Side of the vision tower's patches, in pixels.
        resize_with_pad (`bool`, defaults to `False`):
            Whether images keep their aspect ratio between black bars. Otherwise they are stretched to a square.
        image_keys (`list[str]`, defaults to `["observation.image"]`):
            The policy's cameras, in order, under the names of the data set.
        fps (`float`, *optional*): Control steps per second of the demonstrations. `None`: unknown.
        state_names, action_names (`list[str]`, *optional*):
            Names of the dimensions of state and action, such as the robot's joints. Relative actions match them, so
            that state and action may differ in length or order.
        max_position_embeddings (`int`, *optional*):
            Positions of the language model. If given, prompts that leave no room for a chunk are refused here.
        default_task (`str`, defaults to `""`): Replaces an empty task, which is refused if this is empty too.
        training_tasks (`list[str]`, *optional*):
            Instructions seen in training. Any other instruction triggers a one-time warning.

    Raises:
        ValueError: Parts that do not fit together; the message says how to fix it.
    """

    _has_warned = False

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        action_tokenizer=None,
        statistics: dict | None = None,
        normalization: str = "min_max",
        use_relative_actions: bool = False,
        relative_exclude_joints: Sequence[str] = (),
        chunk_size: int | None = None,
        n_state_bins: int = 256,
        fast_skip_tokens: int = 280,
        scale_factor: int = 1,
        patch_size: int = 16,
        resize_with_pad: bool = False,
        image_keys: Sequence[str] = (DEFAULT_IMAGE_KEY,),
        fps: float | None = None,
        state_names: list[str] | None = None,
        action_names: list[str] | None = None,
        max_position_embeddings: int | None = None,
        default_task: str = "",
        training_tasks: list[str] | None = None,
        chat_template: str | None = None,
    ):
        # Not isinstance, since with `trust_remote_code` the tokenizer may come from a copy of its module.
        if not hasattr(action_tokenizer, "encode_actions"):
            kind = type(action_tokenizer).__name__
            raise ValueError(f"action_tokenizer is a {kind}, expected a FastActionTokenizer. Fit one or load FAST+.")
        self.statistics = statistics
        self.normalization = normalization
        self.use_relative_actions = use_relative_actions
        self.n_state_bins = check_whole(n_state_bins, "n_state_bins", 2)
        self.fast_skip_tokens = check_whole(fast_skip_tokens, "fast_skip_tokens", 0)
        self.scale_factor = check_whole(scale_factor, "scale_factor")
        self.patch_size = check_whole(patch_size, "patch_size")
        self.image_keys = check_names(image_keys, "image_keys")
        self.fps = None if fps is None else check_fps(fps)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings is not None:
            self.max_position_embeddings = check_whole(max_position_embeddings, "max_position_embeddings")
        if not isinstance(default_task, str):
            raise ValueError(f"default_task is {default_task!r}, expected an instruction, or '' for none.")
        self.default_task = default_task
        if not isinstance(training_tasks, list | None) or not all(isinstance(x, str) for x in training_tasks or ()):
            raise ValueError(f"training_tasks is {training_tasks!r}, expected a list of instructions, or None.")
        self.training_tasks = training_tasks
        self.state_names = None if state_names is None else check_names(state_names, "state_names")
        self.action_names = None if action_names is None else check_names(action_names, "action_names")
        self.relative_exclude_joints = list(relative_exclude_joints)
        dims = None
        if use_relative_actions:
            dims = match_joints(self.state_names, self.action_names, self.relative_exclude_joints)
        self.normalizer = Normalizer(statistics, normalization, n_state_bins, use_relative_actions, dims)
        for name, size in (("state_names", self.normalizer.state_dim), ("action_names", self.normalizer.action_dim)):
            if getattr(self, name) is not None:
                check_names(getattr(self, name), name, size)
        chunk_size = action_tokenizer.horizon if chunk_size is None else chunk_size
        if chunk_size is None:
            raise ValueError("chunk_size is missing, and FAST+ has no horizon. Pass chunk_size=....")
        self.chunk_size = check_whole(chunk_size, "chunk_size")
        shape = self.chunk_size, self.normalizer.action_dim
        fitted = action_tokenizer.horizon, action_tokenizer.action_dim
        if fitted not in (shape, (None, None)):
            raise ValueError(
                f"chunk_size is {shape[0]} and the statistics have {shape[1]} action dimensions, but the FAST "
                f"tokenizer was fitted for {fitted[0]} and {fitted[1]}. Fit one on such chunks of this robot."
            )
        super().__init__(image_processor, tokenizer, action_tokenizer, chat_template=chat_template)
        if not isinstance(resize_with_pad, bool):
            raise ValueError(f"resize_with_pad is {resize_with_pad!r}, expected True or False.")
        self.resize_with_pad = resize_with_pad
        if resize_with_pad and self.image_resizer is None:
            raise ValueError("resize_with_pad is set, but do_image_splitting resizes images itself. Set one of them.")
        side = check_whole(image_processor.max_image_size["longest_edge"], "longest_edge of max_image_size")
        if side % (patch_size * scale_factor):
            raise ValueError(
                f"The images' longest_edge of {side} pixels is not a multiple of patch_size * scale_factor, "
                f"{patch_size} * {scale_factor}. Change image_size or scale_factor."
            )
        self.action_token_base_id = tokenizer.vocab_size - 1 - fast_skip_tokens
        last_prompt_id = tokenizer(self._prompt_around_images()[1])["input_ids"][-1]
        if self.action_token_base_id + 1 < len(action_tokenizer) or self._is_action(np.array(last_prompt_id)):
            raise ValueError(
                f"{len(action_tokenizer)} action tokens and fast_skip_tokens={fast_skip_tokens} do not fit into a "
                f"vocabulary of {tokenizer.vocab_size} next to those of the prompt. Fit a smaller FAST vocabulary."
            )
        tasks = dict.fromkeys([default_task, *(training_tasks or ())])
        bins, template = [n_state_bins - 1] * self.normalizer.state_dim, self._prompt_around_images()
        rows = self._tokenize([self._write_prompt(template, task, bins) for task in tasks])
        self.longest_prompt = max(map(len, rows))  # tokens, of these tasks

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SmolAndFastProcessor":
        """Load a saved processor from a folder or Hub id, without running code of the checkpoint.

        Args:
            kwargs: Arguments of the class to change, and [`HUB_KWARGS`].

        Raises:
            ValueError: Damaged files, or those of another processor.
            OSError: No such files, or a Hub that cannot be reached.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        kwargs.pop("trust_remote_code", None)
        actions = {**hub_kwargs, "subfolder": str(PurePosixPath(hub_kwargs.get("subfolder") or "", ACTION_TOKENIZER))}
        if find_file(pretrained_model_name_or_path, PROCESSOR_FILE, **hub_kwargs) is None:
            raise OSError(
                f"{pretrained_model_name_or_path} has no {PROCESSOR_FILE} (or the Hub cannot be reached). Name a "
                "saved processor; from_vlm makes one for a SmolVLM checkpoint."
            )
        with as_value_error(f"The processor in {pretrained_model_name_or_path}", passing=(ValueError,)):
            options, kwargs = cls.get_processor_dict(pretrained_model_name_or_path, **hub_kwargs, **kwargs)
            unknown = [name for name in kwargs if name not in ARGUMENTS and not name.startswith("_")]
            if unknown:
                raise ValueError(f"from_pretrained got {unknown[0]!r}, expected some of {', '.join(ARGUMENTS)}.")
            parts = [
                SmolVLMImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **hub_kwargs),
                PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **hub_kwargs),
                FastActionTokenizer.from_pretrained(pretrained_model_name_or_path, **actions),
            ]
            return cls.from_args_and_dict(parts, options, **kwargs)

    @classmethod
    def from_vlm(
        cls,
        pretrained_model_name_or_path,
        action_tokenizer: FastActionTokenizer,
        statistics: dict,
        scale_factor: int = 1,
        do_image_splitting: bool = False,
        image_size: int | None = None,
        **kwargs,
    ) -> "SmolAndFastProcessor":
        """Make a processor for a SmolVLM or SmolVLM2 checkpoint, a folder or Hub id.

        Args:
            do_image_splitting: Whether large images are also split into sub-images, as in SmolVLM.
            image_size: Side in pixels of the square that an image (or sub-image) is resized to, a multiple of
                `patch_size * scale_factor`, by default the vision tower's 512. An image becomes
                `(image_size / patch_size / scale_factor)^2` visual tokens.
            kwargs: The class's other arguments, and [`HUB_KWARGS`].

        Raises:
            ValueError: An image size that does not fit, or a checkpoint without a chat template.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        config = SmolAndFastConfig.from_pretrained(
            pretrained_model_name_or_path, scale_factor=scale_factor, image_size=image_size, **hub_kwargs
        )
        # SmolVLM's files name GPT2Tokenizer, which does not split digits.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        image_processor = SmolVLMImageProcessorPil.from_pretrained(
            pretrained_model_name_or_path,
            do_image_splitting=do_image_splitting,
            # Without splitting, SmolVLM would enlarge the image before it resizes it to the square.
            do_resize=do_image_splitting,
            max_image_size={"longest_edge": image_size or config.vision_config.image_size},
            **hub_kwargs,
        )
        options, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub_kwargs)
        chat_template = tokenizer.chat_template or options.get("chat_template")
        if chat_template is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no chat template. Name a SmolVLM checkpoint such as "
                "HuggingFaceTB/SmolVLM2-256M-Video-Instruct."
            )
        return cls(
            image_processor,
            tokenizer,
            action_tokenizer,
            statistics,
            scale_factor=scale_factor,
            patch_size=config.vision_config.patch_size,
            max_position_embeddings=config.text_config.max_position_embeddings,
            chat_template=chat_template,
            **kwargs,
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the files that [`from_pretrained`] loads. Raises `OSError` if the folder cannot be written."""
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        except (TypeError, ValueError):  # not serialisable
            raise
        except Exception as error:  # tokenizers raises a bare Exception on a full disk
            raise OSError(
                f"The processor cannot be saved in {save_directory}: {error}. Make room there, or name another folder."
            ) from error

    def model_kwargs(self) -> dict:
        """The fields of [`SmolAndFastConfig`] that must agree with this processor."""
        return {
            "scale_factor": self.scale_factor,
            "image_size": self.image_processor.max_image_size["longest_edge"],
            "chunk_size": self.chunk_size,
            "action_dim": self.normalizer.action_dim,
            "action_token_base_id": self.action_token_base_id,
            "processor_fingerprint": self.fingerprint,
            **self.action_tokenizer.token_grammar(self.chunk_size * self.normalizer.action_dim),
        }

    @property
    def fingerprint(self) -> str:
        """A hash of everything that gives the model's inputs and outputs their meaning.

        Two processors with the same fingerprint make the same prompt and pixels of an observation, and decode the same
        actions. Checkpoints store it, so changing this definition changes the fingerprint of every checkpoint.
        """
        images, actions, normalizer = self.image_processor, self.action_tokenizer, self.normalizer
        template = self._prompt_around_images()
        prompt = self._write_prompt(template, "A task, 0123456789.", range(normalizer.state_dim))
        image_options = ("do_image_splitting", "do_resize", "resample", "do_rescale", "rescale_factor")
        image_options += ("do_normalize", "image_mean", "image_std")
        meaning = {
            "prompt": self.tokenizer(prompt)["input_ids"],
            "images": [images.max_image_size["longest_edge"], *(getattr(images, name) for name in image_options)],
            "states": [bound.tolist() for bound in normalizer.state_bounds] + [self.n_state_bins],
            "actions": [bound.tolist() for bound in (*normalizer.action_bounds, *normalizer.action_limits)],
            "use_relative_actions": self.use_relative_actions,
            "tokens": [self.chunk_size, actions.scale, actions.min_coefficient, self.action_token_base_id],
            "cameras": self.image_keys,
            "fps": self.fps,
            "vocabulary": actions.convert_ids_to_tokens(list(range(len(actions)))),
        }
        if self.normalization == "quantiles":
            meaning["normalized_limit"] = normalizer.normalized_limit
        if normalizer.reference_dims is not None:
            meaning["reference_dims"] = normalizer.reference_dims
        if self.resize_with_pad:
            meaning["resize_with_pad"] = True
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    def check_model(self, model) -> None:
        """Raise `ValueError` if fields of `model.config` differ from [`model_kwargs`]: its actions would be wrong."""
        expected = self.model_kwargs()
        actual = {name: getattr(model.config, name, None) for name in expected}
        actual["image_size"] = actual["image_size"] or model.config.vision_config.image_size
        if self.max_position_embeddings is not None:
            expected["max_position_embeddings"] = self.max_position_embeddings
            actual["max_position_embeddings"] = model.config.text_config.max_position_embeddings
        differing = [name for name in expected if actual[name] != expected[name]]
        if differing:
            raise ValueError(
                f"This processor belongs to another model: {', '.join(differing)} differ from model.config. Load both "
                "from one folder. To keep this processor, load the model with from_pretrained(folder, "
                "**processor.model_kwargs())."
            )

    @property
    def image_resizer(self) -> ImageResizer | None:
        """Resizes an image as this processor does; `None` for images that are split.

        Images that a data loader's workers have resized give the same pixels, and no work here.
        """
        images = self.image_processor
        if images.do_image_splitting or images.do_resize:
            return None
        return ImageResizer(images.max_image_size["longest_edge"], int(images.resample), self.resize_with_pad)

    @property
    def image_seq_len(self) -> int:
        """Visual tokens of one image or sub-image."""
        return (self.image_processor.max_image_size["longest_edge"] // self.patch_size // self.scale_factor) ** 2

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"]

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        state: ArrayLike | None = None,
        actions: ArrayLike | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare one sample or a batch.

        Args:
            images: One sample: an RGB image (PIL; NumPy array or tensor, `(H, W, 3)` or `(3, H, W)`, uint8 or floats
                in [0, 1]; any size), a list with one per camera in the order of `image_keys`, or a dictionary by
                camera. A batch: a list of samples, an array `(batch, ...)` for one camera, or a dictionary of such
                arrays or lists by camera.
            text: The task, one instruction or one per sample. `None` or empty: the default task.
            state: `(state_dim,)` for one sample or `(batch, state_dim)`, in robot units.
            actions: `(chunk_size, action_dim)` or `(batch, chunk_size, action_dim)`, for training: adds `labels`.
            return_tensors: Only `"pt"`.

        Returns:
            `input_ids`, `attention_mask` `(batch, length)`, padded on the left, or on the right with actions;
            `pixel_values` `(batch, num_images, 3, height, width)`, `pixel_attention_mask`; with actions, `labels`,
            -100 outside the action tokens and their EOS.

        Raises:
            ValueError: Input that is missing, of the wrong shape or kind, or not finite; other cameras than
                `image_keys`.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported.")
        observations = read_observations(images, text, state, self.default_task, self.image_keys)
        is_one = np.ndim(state) == 1
        images, tasks, state = observations
        bins = self.normalizer.state_bins(state)
        pixels, grids = self._process_images(images)
        template, samples = self._prompt_around_images(), zip(tasks, bins, grids, strict=True)
        prompts = [self._write_prompt(template, *sample) for sample in samples]
        rows, side, labels = self._tokenize(prompts), "left", {}
        if actions is None:
            warning = warning_of_new_tasks(tasks, self.training_tasks)
            if warning and not self._has_warned:
                self._has_warned = True
                logger.warning(warning)
        else:
            actions = as_numbers(actions, "actions")[None] if is_one else actions
            actions = as_numbers(actions, "actions", (len(state), self.chunk_size, self.normalizer.action_dim))
            tokens = self.action_tokenizer.encode_actions(self.normalizer.normalize_actions(actions, bins))
            targets = [[action_token_map(token, self.action_token_base_id) for token in row] for row in tokens]
            targets = [target + [self.tokenizer.eos_token_id] for target in targets]
            labels = [[-100] * len(row) + target for row, target in zip(rows, targets, strict=True)]
            rows, side = [row + target for row, target in zip(rows, targets, strict=True)], "right"
            labels = {"labels": _pad(labels, -100, side)}
        inputs = {
            "input_ids": _pad(rows, self.tokenizer.pad_token_id, side),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, side),
        }
        return BatchFeature({**inputs, **pixels, **labels})

    def _process_images(self, images: list[list[np.ndarray]]) -> tuple[dict, list[list[tuple]]]:
        """The model's inputs, and rows and columns of each image's sub-images, 0 if it is not split.

        For images that are not split, the pixels are those of the image processor, in a fifth of its time.
        """
        options, resizer = self.image_processor, self.image_resizer
        if resizer is None or not (options.do_rescale and options.do_normalize):
            pixels = options(images, return_row_col_info=True, return_tensors="pt", input_data_format="channels_last")
            splits = zip(pixels.pop("rows"), pixels.pop("cols"), strict=True)
            return pixels, [list(zip(rows, cols, strict=True)) for rows, cols in splits]
        table = pixel_table(options.rescale_factor, options.image_mean, options.image_std)
        values = np.stack([[to_pixel_values(resizer(image), table) for image in sample] for sample in images])
        mask = torch.ones(*values.shape[:2], *values.shape[3:], dtype=torch.bool)
        pixels = {"pixel_values": torch.from_numpy(values), "pixel_attention_mask": mask}
        return pixels, [[(0, 0)] * len(sample) for sample in images]

    def post_process_actions(self, generated_ids: torch.LongTensor, relaxed: bool = False) -> np.ndarray:
        """Decode the output of `model.generate(**inputs)` to actions for the robot.

        Args:
            generated_ids: `(batch, length)` ids, the prompt included.
            relaxed: Truncate rows that are too long, and fill rows that are too short with zero coefficients, as
                published FAST policies do.

        Returns:
            `(batch, chunk_size, action_dim)` float32 in robot units, clipped to `min` and `max` of the statistics.

        Raises:
            ValueError: A row that does not end with exactly one chunk, unless `relaxed`.
        """
        actions, prompts, _ = self._decode(generated_ids, relaxed)
        bins = self._read_bins(prompts) if self.use_relative_actions else None
        return self.normalizer.unnormalize_actions(actions, bins)

    def report(self, output, state: ArrayLike) -> dict[str, np.ndarray]:
        """Confidence of each chunk, so that a controller can stop the robot.

        Args:
            output: That of `model.generate(**inputs, return_dict_in_generate=True, output_scores=True)`: greedy,
                sampled or from beam search.
            state: `(state_dim,)` or `(sequences, state_dim)`, the states in the prompts.

        Returns:
            Three arrays `(sequences,)`. `log_probability`: mean natural log-probability of the chunk's tokens under
            the distribution that they were chosen from (the allowed tokens, after `temperature`, `top_k` and the
            like). `clipped_actions`: number of its `chunk_size * action_dim` values outside the statistics, which
            [`post_process_actions`] clips. `clamped_states`: number of values of the state outside the statistics.

        Raises:
            ValueError: An output without scores, or with those of other sequences; a state that is not in the prompt.
        """
        if getattr(output, "scores", None) is None:
            options = "return_dict_in_generate=True, output_scores=True"
            raise ValueError(f"output holds no scores: call model.generate(**inputs, {options}) and pass its output.")
        actions, prompts, spans = self._decode(output)
        bins, state = self._read_bins(prompts), as_numbers(state, "state")
        state = state[None] if state.ndim == 1 else state
        if not np.array_equal(self.normalizer.state_bins(state), bins):
            raise ValueError(
                f"state is {state.tolist()}, which is not the state in the prompts. Pass those that the processor was "
                "called with, one per sequence."
            )
        return {
            "log_probability": np.array([_mean_log_probability(output, i, *span) for i, span in enumerate(spans)]),
            "clipped_actions": self.normalizer.count_clipped_actions(actions, bins),
            "clamped_states": self.normalizer.count_clamped_states(state),
        }

    def _decode(self, generated_ids, relaxed: bool = False) -> tuple[np.ndarray, list[np.ndarray], list[tuple]]:
        """Normalised chunks `(batch, chunk_size, action_dim)`, the prompts, and start and end of each string."""
        ids = torch.as_tensor(getattr(generated_ids, "sequences", generated_ids)).cpu().numpy()
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype.kind != "i":
            kind = f"shape {ids.shape} and dtype {ids.dtype}"
            raise ValueError(f"generated_ids has {kind}, expected integers (batch, length), the output of generate().")
        tokens, prompts, spans = [], [], []
        for row in ids:
            is_action = self._is_action(row)
            end = len(row) - np.argmax(is_action[::-1])  # EOS and padding follow the last action token
            start = end - np.argmin(np.append(is_action[:end][::-1], False)) if is_action.any() else end
            tokens.append(action_token_map(row[start:end], self.action_token_base_id).tolist())
            prompts.append(row[:start])
            spans.append((int(start), int(end)))
        actions = self.action_tokenizer.decode_actions(tokens, self.chunk_size, self.normalizer.action_dim, relaxed)
        return actions, prompts, spans

    def _is_action(self, ids: np.ndarray) -> np.ndarray:
        tokens = action_token_map(ids, self.action_token_base_id)
        return (tokens >= 0) & (tokens < len(self.action_tokenizer))

    @property
    def max_new_tokens(self) -> int:
        """Length of the longest action string: a token holds at least one coefficient, or one byte of it."""
        num_coefficients = self.chunk_size * self.normalizer.action_dim
        return num_coefficients * (MAX_SYMBOL_BYTES if self.action_tokenizer.is_byte_level else 1)

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        rows = self.tokenizer(prompts)["input_ids"]
        if self.max_position_embeddings is not None:
            check_length(max(map(len, rows)), self.max_new_tokens, self.max_position_embeddings)
        return rows

    def prompt_around(self) -> tuple[str, str]:
        """The prompt before and after task and state, for images that are not split."""
        before, after = self._prompt_around_images()
        return before.replace(self.tokenizer.image_token, self._write_image(0, 0)), after

    def _prompt_around_images(self) -> tuple[str, str]:
        """The chat template's text before and after the user's text; an image token for each image."""
        mark, num_images = "{prompt}", len(self.image_keys)
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": mark}]
        rendered = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        parts = rendered.split(mark)
        if len(parts) != 2 or parts[0].count(self.tokenizer.image_token) != num_images:
            raise ValueError(
                f"chat_template renders {num_images} images and a text as {rendered!r}, expected a token for each "
                "image, then the text once. Load SmolVLM's, or the saved files again."
            )
        return parts[0], parts[1]

    def _write_prompt(self, template: tuple[str, str], task: str, bins, grid: list[tuple] | None = None) -> str:
        """The prompt of one sample; `grid` has rows and columns of each image's sub-images, 0 if it is not split."""
        before, *pieces = template[0].split(self.tokenizer.image_token)
        for (rows, cols), piece in zip(grid or [(0, 0)] * len(pieces), pieces, strict=True):
            before += self._write_image(rows, cols) + piece
        return write_prompt(before, task, bins, template[1], self.tokenizer.get_added_vocab())

    def _write_image(self, rows: int, cols: int) -> str:
        """SmolVLM's tokens of one image: its sub-images, row by row, if it is split, then the whole image."""
        fake, visual = self.tokenizer.fake_image_token, self.tokenizer.image_token * self.image_seq_len
        lines = [
            "".join(f"{fake}<row_{row}_col_{col}>{visual}" for col in range(1, cols + 1)) + "\n"
            for row in range(1, rows + 1)
        ]
        whole = f"{fake}{self.tokenizer.global_image_token}{visual}{fake}"
        return "".join([*lines, "\n" if lines else "", whole])

    def _read_bins(self, prompts: list[np.ndarray]) -> np.ndarray:
        rows = []
        for index, text in enumerate(self.tokenizer.batch_decode(prompts)):
            matches = BINS_IN_PROMPT.findall(text)
            bins = [int(number) for number in matches[-1].split()] if matches else []
            if len(bins) != self.normalizer.state_dim or max(bins) >= self.n_state_bins:
                raise ValueError(
                    f"generated_ids[{index}] holds no state of {self.normalizer.state_dim} bins before its actions. "
                    "Pass the output of generate(), the prompt included."
                )
            rows.append(bins)
        return np.array(rows)


def _mean_log_probability(output, index: int, start: int, end: int) -> float:
    """Mean log-probability of the ids `start` to `end` of one sequence."""
    beams = getattr(output, "beam_indices", None)
    total = 0.0
    for step, token in enumerate(output.sequences[index, start:end]):
        row = index if beams is None else int(beams[index, step])  # a sequence's beam changes while it is searched
        total += output.scores[step][row].float().log_softmax(dim=0)[token].item()
    if not np.isfinite(total):
        raise ValueError("output.scores gives output.sequences no probability. Pass generate()'s output.")
    return total / (end - start)


def _pad(rows: list[list[int]], value: int, side: str) -> torch.LongTensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side)


ARGUMENTS = tuple(inspect.signature(SmolAndFastProcessor.__init__).parameters)[1:]
SmolAndFastProcessor.register_for_auto_class("AutoProcessor")
