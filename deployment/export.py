"""Export a checkpoint as a deployed policy: a folder that runs without PyTorch and Transformers.

The folder holds two ONNX graphs (vision tower with connector; language model), the tokenizers, the statistics, a
README, and the code that runs them: `docs/deployment.md`. Needs the extra `deployment`.
"""

import json
import logging
import shlex
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from ..files_smolandfast import SUMS, atomic_write, check_output_dir, write_checksums
from ..modeling_smolandfast import SmolAndFastForActionPrediction
from ..processing_smolandfast import SmolAndFastProcessor
from .runtime import DECODER, EMBEDDINGS, FILES, FORMAT, POLICY, TOKENIZER, VISION, DeployedPolicy

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators that are not used
ROOT = Path(__file__).resolve().parents[1]
# The part of this package that a deployed policy needs.
CODE = [f"{name}_smolandfast.py" for name in ("checks", "files", "grammar", "normalization", "prompt")]
CODE += [f"deployment/{name}.py" for name in ("__init__", "loop", "runtime")]
# All files of an export; the first identifies one.
NAMES = [*FILES, SUMS, "README.md", "pyproject.toml", "smolandfast_runtime/*.py"]
OPSET = 23  # the first with attention, rotary embeddings and RMS norms as operators
NUM_OBSERVATIONS = 8  # on which the two policies are compared
# Largest difference of a chunk's mean log-probability that rounding in float32 explains.
TOLERANCE = 1e-3
README = """# A deployed SmolAndFast policy

    pip install {install_path}

```python
import numpy as np
from smolandfast_runtime import DeployedPolicy

policy = DeployedPolicy({folder!r})
images = {{  # your cameras' images, RGB, of any size
{images}}}
actions = policy.predict(images=images, text={task!r}, state={state})
print(actions.shape)  # (1, {chunk_size}, {action_dim})
```

Execute the first {n_action_steps} actions, then predict again. `policy.report` adds measures of confidence.
`ControlLoop(observe, predict, act, fps={fps}, n_action_steps={n_action_steps}, policy_fps=policy.fps)` drives a robot
at the control rate of the demonstrations{unknown_fps}.
"""
INIT = """from .deployment import ControlLoop, DeployedPolicy

__all__ = ["ControlLoop", "DeployedPolicy"]
"""
PYPROJECT = """[build-system]
requires = ["setuptools>=77.0.1"]
build-backend = "setuptools.build_meta"

[project]
name = "smolandfast-runtime"
version = "{format}.0"
description = "Runs deployed SmolAndFast policies"
requires-python = ">=3.10"
dependencies = ["onnxruntime>=1.23", "tokenizers>=0.22", "numpy>=2.1", "pillow>=11.0"]

[project.optional-dependencies]
openvino = ["openvino>=2026.4"]

[tool.setuptools]
packages = ["smolandfast_runtime", "smolandfast_runtime.deployment"]
"""


class Vision(nn.Module):
    """Pixels `(1, 3, side, side) -> (1, visual tokens, hidden_size)`, the input of the language model."""

    def __init__(self, model: Any, side: int):
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        # Position embeddings depend only on the image's size, so they are a constant of the graph.
        black, patches = torch.zeros(1, 3, side, side), side // model.config.vision_config.patch_size
        mask = torch.ones(1, patches, patches, dtype=torch.bool)
        self.register_buffer("positions", self.tower.embeddings(black, mask) - self._embed(black))

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self._embed(pixel_values) + self.positions
        encoded = self.tower.encoder(inputs_embeds=patches, attention_mask=None).last_hidden_state
        return self.connector(self.tower.post_layernorm(encoded))


class Decoder(nn.Module):
    """New tokens after those of a cache -> scores of the next action token, and all keys and values."""

    def __init__(self, model: Any):
        super().__init__()
        self.text_model = model.model.text_model
        self.head = nn.Linear(model.lm_head.in_features, model.config.num_action_tokens, bias=False)
        self.head.weight = nn.Parameter(model.lm_head.weight[model.action_grammar.band].detach())

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.text_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        present = [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]
        return self.head(output.last_hidden_state[:, -1]), *present


def export_graphs(model: Any, processor: Any, folder: Path) -> None:
    """Write `vision.onnx`, `decoder.onnx` and `embeddings.npy`."""
    text, side = model.config.text_config, processor.image_processor.max_image_size["longest_edge"]
    np.save(folder / EMBEDDINGS, model.get_input_embeddings().weight.detach().numpy())
    new, past = 5, 3  # tokens of the example inputs
    cache = [torch.randn(1, text.num_key_value_heads, past, text.head_dim) for _ in range(2 * text.num_hidden_layers)]
    embeds, positions = torch.randn(1, new, text.hidden_size), torch.arange(past, past + new)[None]
    arguments = (embeds, positions, torch.zeros(1, 1, new, past + new), cache)
    any_size = Dim.DYNAMIC
    shapes = ({1: any_size}, {1: any_size}, {2: any_size, 3: any_size}, [{2: any_size}] * len(cache))
    vision_names = {"input_names": ["pixel_values"], "output_names": ["features"]}
    decoder_names = {
        "input_names": ["inputs_embeds", "position_ids", "attention_mask", *(f"past_{i}" for i in range(len(cache)))],
        "output_names": ["scores", *(f"present_{i}" for i in range(len(cache)))],
    }
    options = {"dynamo": True, "external_data": False, "opset_version": OPSET, "verbose": False}
    vision, decoder = Vision(model, side).eval(), Decoder(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # internal to the exporter
        torch.onnx.export(vision, (torch.zeros(1, 3, side, side),), folder / VISION, **vision_names, **options)
        torch.onnx.export(decoder, arguments, folder / DECODER, dynamic_shapes=shapes, **decoder_names, **options)


def describe(model: Any, processor: Any) -> dict[str, Any]:
    """The content of `policy.json`."""
    config, images, actions = model.config, processor.image_processor, processor.action_tokenizer
    if processor.image_resizer is None or not (images.do_rescale and images.do_normalize):
        raise ValueError(
            "The processor splits images, or does not normalise them, which a deployed policy does not support. Train "
            "with do_image_splitting=False."
        )

    def fields(source: Any, *names: str) -> dict[str, Any]:
        return {name: getattr(source, name) for name in names}

    return {
        "format": FORMAT,
        "n_action_steps": config.n_action_steps,
        **fields(processor, "default_task", "training_tasks", "image_keys", "fps", "state_names", "action_names"),
        "prompt": {
            "around": processor.prompt_around(),
            "special_tokens": sorted(processor.tokenizer.get_added_vocab()),
            "image_token_id": config.image_token_id,
        },
        "pixels": {
            **asdict(processor.image_resizer),
            "rescale_factor": images.rescale_factor,
            "mean": list(images.image_mean),
            "std": list(images.image_std),
        },
        "normalizer": {
            **fields(processor, "statistics", "normalization", "n_state_bins", "use_relative_actions"),
            "reference_dims": processor.normalizer.reference_dims,
        },
        "max_position_embeddings": config.text_config.max_position_embeddings,
        "cache": list(fields(config.text_config, "num_hidden_layers", "num_key_value_heads", "head_dim").values()),
        "actions": {
            "chunk_size": config.chunk_size,
            "scale": actions.scale,
            "base_id": config.action_token_base_id,
            **fields(actions, "first_symbol", "min_coefficient"),
            "token_bytes": config.fast_token_bytes or [token.hex() for token in actions.token_bytes],
            "token_lengths": config.fast_token_lengths,
        },
    }


def quantize(folder: Path) -> None:
    """Quantize the language model to 8 bits, weights and activations, with a scale for every 32 weights.

    The vision tower stays in float32: it is less bound by memory, and rounding it changes more chunks.
    """
    level = logging.getLogger().level
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger().setLevel(level)  # the import has set it to INFO
    options = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / DECODER), algo_config=options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / DECODER))


def task_of(processor: Any) -> str:
    """An instruction for the comparison and the README."""
    return (processor.training_tasks or [processor.default_task or "Do it."])[0]


def compare(policy: DeployedPolicy, model: Any, processor: Any) -> tuple[int, float]:
    """Compare both policies on random observations.

    Returns:
        How many of [`NUM_OBSERVATIONS`] chunks are equal bit by bit, and the largest difference of a mean
        log-probability among those.
    """
    rng, side = np.random.default_rng(0), processor.image_processor.max_image_size["longest_edge"]
    low, high = processor.normalizer.state_bounds
    task = task_of(processor)
    num_equal, difference = 0, 0.0
    for _ in range(NUM_OBSERVATIONS):
        images = list(rng.integers(0, 256, (len(processor.image_keys), side * 3 // 4, side, 3), dtype=np.uint8))
        state = rng.uniform(low, high)
        inputs = processor(images=images, text=task, state=state)
        output = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
        expected, report = processor.report(output, state), policy.report(images, task, state)
        if np.array_equal(processor.post_process_actions(output), report["actions"]):
            num_equal += 1
            difference = max(difference, float(abs(expected["log_probability"] - report["log_probability"])[0]))
    return num_equal, difference


def export_policy(checkpoint: str | Path, output_dir: Path, weights: str = "float32") -> tuple[int, float]:
    """Write the folder, or replace an earlier export once the new one is complete. Returns the result of [`compare`].

    Args:
        weights: `"float32"` or `"int8"`.

    Raises:
        OSError: Files of the checkpoint are missing or damaged, or the folder cannot be written.
        ValueError: A folder with other files, a checkpoint of another kind, or an exported policy that differs.
    """
    check_output_dir(output_dir, NAMES, sealed=True)
    model = SmolAndFastForActionPrediction.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    processor = SmolAndFastProcessor.from_pretrained(checkpoint)
    processor.check_model(model)
    metadata = describe(model, processor)
    with atomic_write(output_dir) as folder:
        package = folder / "smolandfast_runtime"
        (package / "deployment").mkdir(parents=True)
        export_graphs(model, processor, folder)
        if weights == "int8":
            quantize(folder)
        (folder / POLICY).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        (folder / TOKENIZER).write_text(processor.tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        write_checksums(folder, FILES)  # for the comparison below
        for name in CODE:
            shutil.copyfile(ROOT / name, package / name)
        (package / "__init__.py").write_text(INIT, encoding="utf-8")
        (folder / "pyproject.toml").write_text(PYPROJECT.format(format=FORMAT), encoding="utf-8")
        num_equal, difference = compare(DeployedPolicy(folder), model, processor)
        comparison = f"the chunks equal the checkpoint's for {num_equal} of {NUM_OBSERVATIONS} random observations"
        if weights == "float32" and (num_equal < NUM_OBSERVATIONS - 1 or difference > TOLERANCE):
            raise ValueError(
                f"The exported policy is not the same: {comparison}, and mean log-probabilities differ by up to "
                f"{difference:.2g}. This is torch {torch.__version__}; try the locked releases."
            )
        readme = write_readme(output_dir.resolve().name, model, processor)
        readme += f"Weights: {weights}; {comparison}.\n"
        (folder / "README.md").write_text(readme, encoding="utf-8")
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        write_checksums(folder, names - {SUMS})
        check_output_dir(output_dir, NAMES, sealed=True)  # files may have been added in the meantime
    return num_equal, difference


def write_readme(name: str, model: Any, processor: Any) -> str:
    """The folder's README, without its last line."""
    side = processor.image_processor.max_image_size["longest_edge"]
    images = (f"    {key!r}: np.zeros(({side}, {side}, 3), dtype=np.uint8),\n" for key in processor.image_keys)
    return README.format(
        folder=name,
        install_path=shlex.quote(f"./{name}"),
        images="".join(images),
        task=task_of(processor),
        state=np.mean(processor.normalizer.state_bounds, axis=0).round(2).tolist(),
        fps="policy.fps" if processor.fps else "...",
        unknown_fps="" if processor.fps else ", which is unknown for this policy: `policy.fps` is None",
        chunk_size=model.config.chunk_size,
        action_dim=model.config.action_dim,
        n_action_steps=model.config.n_action_steps,
    )
