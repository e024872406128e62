"""Export a checkpoint as a deployed policy: a folder that runs without PyTorch and Transformers.

The folder holds two ONNX graphs (vision with connector; the language model, for the prompt and for each token), the
tokenizers, the statistics, a README, and the code that runs them: `docs/deployment.md`. The exported policy is
compared with the checkpoint before the folder is put in place. Needs the extra `deployment`.
"""

import json
import logging
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from ..files_smolandfast import SUMS, atomic_write, check_output_dir, write_checksums
from ..modeling_smolandfast import SmolAndFastForActionPrediction
from ..processing_smolandfast import SmolAndFastProcessor
from .runtime import DECODER, EMBEDDINGS, FILES, FORMAT, POLICY, TOKENIZER, VISION, DeployedPolicy

logging.getLogger().setLevel(logging.WARNING)  # importing the quantizer has made every library tell all it does
logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators that are not used
ROOT = Path(__file__).resolve().parents[1]
# What a deployed policy needs of this package.
CODE = [f"{name}_smolandfast.py" for name in ("checks", "files", "grammar", "normalization", "prompt")]
CODE += [f"deployment/{name}.py" for name in ("__init__", "loop", "runtime")]
# All that is written; the first names the folder as an export.
NAMES = [*FILES, SUMS, "README.md", "pyproject.toml", "smolandfast_runtime/*.py"]
OPSET = 23  # the first with attention, rotary embeddings and RMS norms as operators
NUM_OBSERVATIONS = 8  # that the two policies are compared on
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

Execute the first {n_action_steps} actions, then look again. `policy.report` also says how far to trust them.
`ControlLoop(observe, predict, act, fps={fps}, n_action_steps={n_action_steps}, policy_fps=policy.fps)` drives a robot
at the control rate of the demonstrations{unknown}.
Weights: {weights}. {comparison}.
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
    """Pixels `(1, 3, side, side) -> (1, visual tokens, hidden_size)`, in what the language model reads."""

    def __init__(self, model: Any, side: int):
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        # The places of the patches depend on nothing but the image's size: a constant, not a search at every call.
        black, patches = torch.zeros(1, 3, side, side), side // model.config.vision_config.patch_size
        mask = torch.ones(1, patches, patches, dtype=torch.bool)
        self.register_buffer("places", self.tower.embeddings(black, mask) - self._embed(black))

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self._embed(pixel_values) + self.places
        encoded = self.tower.encoder(inputs_embeds=patches, attention_mask=None).last_hidden_state
        return self.connector(self.tower.post_layernorm(encoded))


class Decoder(nn.Module):
    """New tokens behind those of a cache -> scores of the action tokens after the last, and all keys and values."""

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
    layers, new, past = text.num_hidden_layers, 5, 3
    size = 1, text.num_key_value_heads, past, text.head_dim
    cache = [torch.randn(size) for _ in range(2 * layers)]
    embeds, positions = torch.randn(1, new, text.hidden_size), torch.arange(past, past + new)[None]
    arguments = (embeds, positions, torch.zeros(1, 1, new, past + new), cache)
    any_size = Dim.DYNAMIC
    shapes = ({1: any_size}, {1: any_size}, {2: any_size, 3: any_size}, [{2: any_size}] * len(cache))
    names = ["inputs_embeds", "position_ids", "attention_mask", *(f"past_{i}" for i in range(len(cache)))]
    outputs = ["scores", *(f"present_{i}" for i in range(len(cache)))]
    options = {"dynamo": True, "external_data": False, "opset_version": OPSET, "verbose": False}
    vision, pixels = Vision(model, side).eval(), (torch.zeros(1, 3, side, side),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        torch.onnx.export(
            vision, pixels, folder / VISION, input_names=["pixel_values"], output_names=["features"], **options
        )
        torch.onnx.export(
            Decoder(model).eval(),
            arguments,
            folder / DECODER,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=outputs,
            **options,
        )


def describe(model: Any, processor: Any) -> dict[str, Any]:
    """What `policy.json` says."""
    config, images, actions = model.config, processor.image_processor, processor.action_tokenizer
    if images.do_image_splitting or not (images.do_rescale and images.do_normalize):
        raise ValueError(
            "The processor splits images, or does not normalise them, which a deployed policy cannot. Train with "
            "do_image_splitting=False."
        )
    tokens = [token.hex() for token in actions.token_bytes]
    return {
        "format": FORMAT,
        "n_action_steps": config.n_action_steps,
        "default_task": processor.default_task,
        "training_tasks": processor.training_tasks,
        "image_keys": processor.image_keys,
        "fps": processor.fps,
        "state_names": processor.state_names,
        "action_names": processor.action_names,
        "prompt": {
            "around": processor.prompt_around(),
            "special_tokens": sorted(processor.tokenizer.get_added_vocab()),
            "image_token_id": config.image_token_id,
        },
        "pixels": {
            "side": images.max_image_size["longest_edge"],
            "resample": int(images.resample),
            "rescale_factor": images.rescale_factor,
            "mean": list(images.image_mean),
            "std": list(images.image_std),
        },
        "normalizer": {
            "statistics": processor.statistics,
            "normalization": processor.normalization,
            "n_state_bins": processor.n_state_bins,
            "use_relative_actions": processor.use_relative_actions,
        },
        "max_position_embeddings": config.text_config.max_position_embeddings,
        "cache": [
            config.text_config.num_hidden_layers,
            config.text_config.num_key_value_heads,
            config.text_config.head_dim,
        ],
        "actions": {
            "chunk_size": config.chunk_size,
            "scale": actions.scale,
            "base_id": config.action_token_base_id,
            "first_symbol": actions.first_symbol,
            "min_coefficient": actions.min_coefficient,
            "token_bytes": config.fast_token_bytes or tokens,
            "token_lengths": config.fast_token_lengths,
        },
    }


def quantize(folder: Path) -> None:
    """Make the language model's weights 8 bits, with a scale for every 32 of them; activations are rounded alike.

    The vision tower stays: most of its time is not for reading weights, and rounding it changes more chunks.
    """
    options = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / DECODER), algo_config=options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / DECODER))


def task_of(processor: Any) -> str:
    """A task that the policy takes."""
    return (processor.training_tasks or [processor.default_task or "Do it."])[0]


def compare(policy: DeployedPolicy, model: Any, processor: Any) -> tuple[int, float]:
    """Of [`NUM_OBSERVATIONS`] made-up observations, how many chunks are equal bit by bit, and the largest difference
    of a mean log-probability among those."""
    rng, side = np.random.default_rng(0), processor.image_processor.max_image_size["longest_edge"]
    low, high = processor.normalizer.state_bounds
    task = task_of(processor)
    num_equal, difference = 0, 0.0
    for _ in range(NUM_OBSERVATIONS):
        images = list(rng.integers(0, 256, (len(processor.image_keys), side, side, 3), dtype=np.uint8))
        state = rng.uniform(low, high)
        inputs = processor(images=images, text=task, state=state)
        output = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
        expected, found = processor.report(output, state), policy.report(images, task, state)
        if np.array_equal(processor.post_process_actions(output), found["actions"]):
            num_equal += 1
            difference = max(difference, float(abs(expected["log_probability"] - found["log_probability"])[0]))
    return num_equal, difference


def export_policy(checkpoint: str | Path, output_dir: Path, weights: str = "float32") -> tuple[int, float]:
    """Write the folder, or replace an earlier export once the new one is complete. Returns what [`compare`] does.

    Raises:
        OSError: Files of the checkpoint are missing or damaged, or the folder cannot be written.
        ValueError: A folder that holds anything else, a checkpoint of another kind, or an exported policy that is not
            the same.
    """
    check_output_dir(output_dir, NAMES, sealed=True)
    model = SmolAndFastForActionPrediction.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    processor = SmolAndFastProcessor.from_pretrained(checkpoint)
    processor.check_model(model)
    about = describe(model, processor)
    with atomic_write(output_dir) as folder:
        folder.mkdir(parents=True)
        export_graphs(model, processor, folder)
        if weights == "int8":
            quantize(folder)
        (folder / POLICY).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / TOKENIZER).write_text(processor.tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        write_checksums(folder, FILES)  # for the comparison below
        package = folder / "smolandfast_runtime"
        (package / "deployment").mkdir(parents=True)
        for name in CODE:
            shutil.copyfile(ROOT / name, package / name)
        (package / "__init__.py").write_text(INIT, encoding="utf-8")
        (folder / "pyproject.toml").write_text(PYPROJECT.format(format=FORMAT), encoding="utf-8")
        num_equal, difference = compare(DeployedPolicy(folder), model, processor)
        comparison = f"{num_equal} of {NUM_OBSERVATIONS} made-up chunks are those of the checkpoint in float32"
        if weights == "float32" and (num_equal < NUM_OBSERVATIONS - 1 or difference > TOLERANCE):
            raise ValueError(
                f"The exported policy is not the same: {comparison}, and mean log-probabilities differ by up to "
                f"{difference:.2g}. This is torch {torch.__version__}; try the locked releases."
            )
        name, side = output_dir.resolve().name, about["pixels"]["side"]
        readme = README.format(
            folder=name,
            install_path=shlex.quote(f"./{name}"),
            images="".join(
                f"    {key!r}: np.zeros(({side}, {side}, 3), dtype=np.uint8),\n" for key in about["image_keys"]
            ),
            task=task_of(processor),
            fps="policy.fps" if processor.fps else "...",
            unknown="" if processor.fps else ", which this policy does not know: `policy.fps` is None",
            state=np.mean(processor.normalizer.state_bounds, axis=0).round(2).tolist(),
            action_dim=model.config.action_dim,
            weights=weights,
            comparison=comparison,
            chunk_size=model.config.chunk_size,
            n_action_steps=model.config.n_action_steps,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        write_checksums(folder, names - {SUMS})
        check_output_dir(output_dir, NAMES, sealed=True)  # what was put there meanwhile
    return num_equal, difference
