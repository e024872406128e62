"""8-bit weights for inference, by Transformers' own way: `quantization_config`."""

import numpy as np
import pytest
import torch
from transformers import TorchAoConfig

from smolandfast import SmolAndFastForActionPrediction

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
get_model_size_in_bytes = pytest.importorskip("torchao.utils").get_model_size_in_bytes


@pytest.fixture
def quantized(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return SmolAndFastForActionPrediction.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)


def test_eight_bit_weights_give_nearly_the_same_scores(model, quantized, processor, batch):
    inputs = processor(images=batch["images"], text=batch["text"], state=batch["state"])
    exact, found = (policy(**inputs, logits_to_keep=1).logits for policy in (model, quantized))
    assert 0 < (found - exact).abs().mean() < 0.05 * exact.std()
    layers, exact_layers = (policy.model.text_model.layers for policy in (quantized, model))
    assert get_model_size_in_bytes(layers) < 0.3 * get_model_size_in_bytes(exact_layers)


def test_a_quantized_model_writes_chunks(quantized, processor, batch):
    inputs = processor(images=batch["images"], text=batch["text"], state=batch["state"])
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        actions = processor.post_process_actions(quantized.generate(**inputs, **options))
        assert actions.shape == (4, 8, 2) and np.isfinite(actions).all()
    with pytest.raises(ValueError, match="Quantized weights cannot be packed"):
        quantized.pack()
