"""The log-probability of a chunk: of the distribution that `generate()` samples from, and differentiable."""

from itertools import product

import numpy as np
import pytest
import torch
from test_generation import BOS, EOS, NUM_TEXT_TOKENS, make_config

from smolandfast import SmolAndFastForActionPrediction


@pytest.fixture
def ragged(processor, batch):
    """Prompts and strings of unequal lengths."""
    return processor(**batch | {"text": ["a", "a longer task", "", "b"]})


def test_all_whole_strings_together_have_probability_one():
    config = make_config(3, 1, fast_token_lengths=[1, 1, 2, 3])
    torch.manual_seed(0)
    model = SmolAndFastForActionPrediction(config)
    model.lm_head.weight.data *= 20
    lengths, total = config.fast_token_lengths, 0.0
    for count in (1, 2, 3):
        for tokens in product(range(4), repeat=count):
            if sum(lengths[token] for token in tokens) == 3:
                target = [config.action_token_base_id - token for token in tokens] + [EOS]
                ids = torch.tensor([[BOS, NUM_TEXT_TOKENS - 1, *target]])
                labels = torch.tensor([[-100, -100, *target]])
                total += model.log_probability(labels, input_ids=ids).exp().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_it_is_what_the_report_says_of_a_written_chunk(processor, model, batch):
    """Its mean over the chunk's tokens, by another pass over the finished string."""
    observation = {name: batch[name] for name in ("images", "text", "state")}
    inputs = processor(**observation)
    torch.manual_seed(0)
    output = model.generate(**inputs, do_sample=True, top_k=0, return_dict_in_generate=True, output_scores=True)
    reported = processor.report(output, batch["state"])["log_probability"]
    new, length = output.sequences[:, inputs["input_ids"].shape[1] :], inputs["input_ids"].shape[1]
    labels = torch.full_like(output.sequences, -100)
    is_action = torch.from_numpy(processor._is_action(new.numpy()))
    labels[:, length:][is_action] = new[is_action]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    images = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
    found = model.log_probability(labels, input_ids=output.sequences, attention_mask=mask, **images)
    assert found.shape == (4,) and found.dtype == torch.float32
    np.testing.assert_allclose(found.detach() / is_action.sum(dim=1), reported, atol=1e-4)


def test_each_samples_is_its_own_whatever_stands_beside_it(processor, model, batch, ragged):
    together = model.log_probability(**ragged, per_token=True)
    assert torch.equal(model.log_probability(**ragged), together.sum(dim=1))
    for i, task in enumerate(["a", "a longer task", "", "b"]):
        one = {name: batch[name][i] for name in ("images", "state", "actions")}
        alone = model.log_probability(**processor(**one, text=task), per_token=True)[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-3, atol=1e-4)
        assert alone[-1] == 0 and (together[i, len(alone) :] == 0).all()  # EOS and behind it


def test_a_step_along_its_gradient_makes_the_chunks_likelier(model, ragged):
    before = model.log_probability(**ragged)
    before.mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all()
                parameter += 1e-3 * parameter.grad
        assert (model.log_probability(**ragged) > before).all()


def test_labels_that_are_no_whole_chunk_are_refused(model, ragged):
    labels = ragged.pop("labels")
    first = int((labels[0] != -100).int().argmax())
    for wrong in (
        labels.index_fill(1, torch.tensor(first), 7),
        torch.where(torch.arange(4)[:, None] == 2, -100, labels),
    ):
        with pytest.raises(ValueError, match="expected strings of exactly 16 coefficients"):
            model.log_probability(wrong, **ragged)
    with pytest.raises(ValueError, match="every entry is -100"):
        model.log_probability(torch.full_like(labels, -100), **ragged)
