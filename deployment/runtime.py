"""A deployed policy: ONNX graphs, tokenizers and statistics in one folder, without PyTorch and Transformers.

`examples/export_policy.py` writes the folder, including this file and its imports. It needs onnxruntime (or OpenVINO),
tokenizers, NumPy and Pillow. Observations are validated by the processor's code, and decoding follows the grammar of
`generate()`, so that every output is exactly one chunk, whatever the weights.
"""

import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..checks_smolandfast import as_value_error, check_length, check_whole
from ..files_smolandfast import check_checksums, read_json
from ..grammar_smolandfast import INVALID, grammar_tables, inverse_dct, read_coefficients
from ..normalization_smolandfast import Normalizer
from ..prompt_smolandfast import (
    ImageResizer,
    pixel_table,
    read_observations,
    to_pixel_values,
    warning_of_new_tasks,
    write_prompt,
)

logger = logging.getLogger("smolandfast")

FORMAT = 3  # of the folder
POLICY, VISION, DECODER, EMBEDDINGS, TOKENIZER = FILES = (
    "policy.json",
    "vision.onnx",
    "decoder.onnx",
    "embeddings.npy",
    "tokenizer.json",
)
KEPT = ("n_action_steps", "default_task", "training_tasks", "image_keys", "fps", "state_names", "action_names")
AGAIN = "Export the policy again."


class DeployedPolicy:
    """Predicts action chunks greedily, as `generate()` of the exported policy does.

    Args:
        folder: Written by `examples/export_policy.py`.
        backend: `"onnxruntime"` or `"openvino"`.
        num_threads: Threads that compute; by default the backend's own choice, all cores.
        device: OpenVINO's device (`"CPU"`, `"GPU"`, `"NPU"`), or an execution provider of onnxruntime such as
            `"CUDAExecutionProvider"` or `"TensorrtExecutionProvider"`; by default the CPU.

    Attributes:
        chunk_size, n_action_steps, action_dim, state_dim: As in the configuration of the policy.
        token_lengths: Coefficients in each FAST token; `None` with FAST+.
        image_keys, fps: The cameras and the control rate of the demonstrations; `fps` may be `None`.
        state_names, action_names: Names of the dimensions of state and action; `None` where the data had none.
        training_tasks: Instructions seen in training. Any other instruction triggers a one-time warning.

    Raises:
        OSError: Files are missing, damaged, or not those that were exported together.
        ValueError: A folder of another kind, or parts that do not fit together.
        ImportError: The backend is not installed.
    """

    _has_warned = False

    def __init__(
        self,
        folder: str | Path,
        backend: str = "onnxruntime",
        num_threads: int | None = None,
        device: str | None = None,
    ):
        if backend not in list(BACKENDS):
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}.")
        if num_threads is not None:
            check_whole(num_threads, "num_threads")
        folder = Path(folder)
        if not (folder / POLICY).is_file():
            raise OSError(f"{folder} has no {POLICY}: it is not a deployed policy. Make one with export_policy.py.")
        check_checksums(folder, FILES)
        metadata = read_json(folder / POLICY, AGAIN)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {metadata.get('format')!r}, this code reads {FORMAT}. {AGAIN}")
        with as_value_error(folder, "Export the policy again, or choose another backend or device."):
            self._read(metadata)
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
            self._embeddings = embeddings.view(np.ndarray)  # look-ups in a memmap are slower
            self._vision, self._decoder = (
                BACKENDS[backend](folder / name, num_threads, device) for name in (VISION, DECODER)
            )
            # A first chunk shows whether the parts fit together, and lets the backend compile.
            task = (self.training_tasks or ["Do nothing."])[0]
            image = np.zeros((self._resize.side, self._resize.side, 3), dtype=np.uint8)
            self.predict([image] * len(self.image_keys), task, np.zeros(self.state_dim))

    def _read(self, metadata: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, metadata[name])
        self.normalizer = Normalizer(**metadata["normalizer"])
        self.state_dim, self.action_dim = self.normalizer.state_dim, self.normalizer.action_dim
        self._prompt, self._cache_shape = metadata["prompt"], metadata["cache"]
        self._max_positions = metadata["max_position_embeddings"]
        pixels = metadata["pixels"]
        self._resize = ImageResizer(pixels["side"], pixels["resample"], pixels["with_pad"])
        self._pixel_table = pixel_table(pixels["rescale_factor"], pixels["mean"], pixels["std"])
        tokens = metadata["actions"]
        self.chunk_size, self._scale, self._base_id = (tokens[name] for name in ("chunk_size", "scale", "base_id"))
        self._symbols = tokens["first_symbol"], tokens["min_coefficient"]
        self._token_bytes = [None if token is None else bytes.fromhex(token) for token in tokens["token_bytes"]]
        self.token_lengths = tokens["token_lengths"]
        self._num_coefficients = self.chunk_size * self.action_dim
        started, next_state, self._max_new_tokens = grammar_tables(
            self._num_coefficients, tokens["token_lengths"], tokens["token_bytes"]
        )
        # In the order of the scores, which is the vocabulary's: the last token first.
        self._started, self._next_state = started[::-1].copy(), next_state[:, ::-1].copy()
        self._may_follow = self._next_state != INVALID

    def predict(self, images, text: str | list[str] | None = None, state=None, **limits) -> np.ndarray:
        """Predict a chunk for one observation or a batch, one after the other.

        Args:
            images: One sample: an RGB image (PIL or NumPy, `(H, W, 3)` or `(3, H, W)`, uint8 or floats in [0, 1]; any
                size), a list with one of each camera in the order of `image_keys`, or a dictionary by name. A batch:
                a list with one entry a sample, an array `(batch, ...)` for one camera, or a dictionary of either.
            text: The instruction, or one a sample. `None` or empty: the policy's default task.
            state: `(state_dim,)` or `(batch, state_dim)`, the robot's units. Its shape decides whether it is a batch.
            limits: `max_tokens` or `deadline`, see [`report`].

        Returns:
            `(batch, chunk_size, action_dim)` float32 in the robot's units, within the range of the demonstrations.
            Execute the first `n_action_steps` of a chunk before the next prediction.

        Raises:
            ValueError: Input that is missing, of the wrong shape or kind, or not finite; a prompt that leaves no
                positions for a chunk; scores that are not finite.
        """
        return self.report(images, text, state, **limits)["actions"]

    def report(
        self,
        images,
        text: str | list[str] | None = None,
        state=None,
        max_tokens: int | None = None,
        deadline: float | None = None,
    ) -> dict[str, Any]:
        """[`predict`] with measures of confidence, so that a controller can stop the arm.

        Args:
            max_tokens: Most tokens of a chunk. Low frequencies come first, so a chunk that is cut short is smoother.
            deadline: Seconds from this call after which each sample's chunk is cut short. The first token is always
                written.

        Returns:
            `actions` as of `predict`, and, each `(batch,)`: `log_probability`, the mean over the chunk's tokens, each
            among those that could follow; `clipped_actions`, how many of its values were outside the demonstrations'
            range; `clamped_states`, how many values of the state were; `is_whole`, whether the chunk was not cut
            short. And `tokens`, a list with each chunk's FAST tokens `(length,)`.
        """
        start = time.monotonic()
        if max_tokens is not None:
            check_whole(max_tokens, "max_tokens")
        if deadline is not None and not (isinstance(deadline, int | float) and deadline > 0):
            raise ValueError(f"deadline is {deadline!r}, expected seconds, above 0.")
        limits = max_tokens or math.inf, math.inf if deadline is None else start + deadline
        images, tasks, state = read_observations(images, text, state, self.default_task, self.image_keys)
        bins = self.normalizer.state_bins(state)
        warning = warning_of_new_tasks(tasks, self.training_tasks)
        if warning and not self._has_warned:
            self._has_warned = True
            logger.warning(warning)
        prompts = [self._write_prompt(*sample) for sample in zip(tasks, bins, strict=True)]
        check_length(max(map(len, prompts)), self._max_new_tokens, self._max_positions)
        written = [self._write(ids, sample, *limits) for ids, sample in zip(prompts, images, strict=True)]
        coefficients, log_probability, is_whole, written_tokens = zip(*written, strict=True)
        chunks = inverse_dct(np.stack(coefficients) / self._scale)
        reference = bins if self.normalizer.use_relative_actions else None
        return {
            "actions": self.normalizer.unnormalize_actions(chunks, reference),
            "log_probability": np.array(log_probability),
            "clipped_actions": self.normalizer.count_clipped_actions(chunks, reference),
            "clamped_states": self.normalizer.count_clamped_states(state),
            "is_whole": np.array(is_whole),
            "tokens": [np.array(tokens) for tokens in written_tokens],
        }

    def _write_prompt(self, task: str, bins: np.ndarray) -> np.ndarray:
        before, after = self._prompt["around"]
        text = write_prompt(before, task, bins.tolist(), after, self._prompt["special_tokens"])
        return np.array(self._tokenizer.encode(text).ids)

    def _write(
        self, ids: np.ndarray, images: list[np.ndarray], max_tokens: float, end: float
    ) -> tuple[np.ndarray, float, bool, list[int]]:
        """Coefficients `(chunk_size, action_dim)`, mean log-probability, whether the chunk is whole, and tokens."""
        embeds = self._embeddings[ids]
        is_visual = ids == self._prompt["image_token_id"]
        embeds[is_visual] = np.concatenate([self._encode(image) for image in images])
        layers, heads, head_dim = self._cache_shape
        cache = [np.zeros((1, heads, 0, head_dim), dtype=np.float32)] * (2 * layers)
        left, state, tokens, total, length = self._num_coefficients, 0, [], 0.0, 0
        while (left > 0 or state != 0) and (not tokens or (len(tokens) < max_tokens and time.monotonic() < end)):
            scores, *cache = self._decoder(self._decoder_inputs(embeds, length, cache))
            length += len(embeds)
            scores = np.where(self._may_follow[state] & (self._started <= left), scores[0], -np.inf)
            best = int(scores.argmax())
            highest = float(scores[best])
            if not math.isfinite(highest):
                raise ValueError(
                    f"The model's scores for the action tokens are {highest}: no action can be chosen. {AGAIN}"
                )
            total -= math.log(np.exp(scores - highest, dtype=np.float64).sum())
            left, state = left - int(self._started[best]), int(self._next_state[state, best])
            tokens.append(len(scores) - 1 - best)
            embeds = self._embeddings[[self._base_id - tokens[-1]]]
        is_whole = left == 0 and state == 0
        string = b"".join(self._token_bytes[token] for token in tokens)
        written = read_coefficients(string, *self._symbols, errors="strict" if is_whole else "ignore")
        coefficients = np.zeros(self._num_coefficients, dtype=np.int64)
        coefficients[: len(written)] = written  # without a character that was cut in two
        return coefficients.reshape(self.chunk_size, self.action_dim), total / len(tokens), is_whole, tokens

    def _encode(self, image: np.ndarray) -> np.ndarray:
        """An image's visual tokens: `(visual tokens, hidden_size)`."""
        pixel_values = to_pixel_values(self._resize(image), self._pixel_table)
        return self._vision({"pixel_values": pixel_values[None]})[0][0]

    def _decoder_inputs(self, embeds: np.ndarray, length: int, cache: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs for new tokens, `(new, hidden_size)`, after the `length` tokens of the cache."""
        positions = np.arange(length, length + len(embeds))
        is_later = np.arange(length + len(embeds)) > positions[:, None]
        inputs = {
            "inputs_embeds": embeds[None],
            "position_ids": positions[None],
            "attention_mask": np.where(is_later, np.finfo(np.float32).min, np.float32(0))[None, None],
        }
        return inputs | {f"past_{i}": values for i, values in enumerate(cache)}


# A graph: inputs by name to a list of outputs.
Graph = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def _load_onnxruntime(path: Path, num_threads: int | None, device: str | None) -> Graph:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if device is not None and device not in providers:  # onnxruntime would use the CPU instead
        raise ValueError(f"device is {device!r}, expected one of {providers}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    options.log_severity_level = 3
    # Threads sleep between two chunks: spinning would take the processor from the robot's own programs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=[device or "CPUExecutionProvider"])
    return functools.partial(session.run, None)


@functools.cache
def _openvino_core() -> Any:
    """The one `openvino.Core` of the process, which is never freed.

    With AMX, a core gives signals their own stack. Freeing one of several cores may free that stack (seen with
    2026.4), and the next signal, including Ctrl-C, ends the process without a message.
    """
    import openvino

    return openvino.Core()


def _load_openvino(path: Path, num_threads: int | None, device: str | None) -> Graph:
    device = device or "CPU"
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        options["INFERENCE_PRECISION_HINT"] = "f32"  # otherwise bf16, where the processor has it
        options |= {} if num_threads is None else {"INFERENCE_NUM_THREADS": num_threads}
    request = _openvino_core().compile_model(path, device, options).create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        request.infer(inputs, share_inputs=True)
        return [tensor.data.copy() for tensor in request.output_tensors]

    return run


BACKENDS = {"onnxruntime": _load_onnxruntime, "openvino": _load_openvino}
