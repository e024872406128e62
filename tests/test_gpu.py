"""What only a GPU can show; `benchmarks/speed/gpu.sh` runs these."""

import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from test_checkpoint import CHECKPOINT
from test_devices import MaskedBand
from test_generation import MASK, PROMPTS, Policy
from transformers import LogitsProcessorList, SmolVLMForConditionalGeneration

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.fixture
def shipped():
    """The shipped policy on both devices, its processor, and a batch with actions."""
    processor = SmolAndFastProcessor.from_pretrained(CHECKPOINT)
    models = [SmolAndFastForActionPrediction.from_pretrained(CHECKPOINT, dtype=torch.float32) for _ in range(2)]
    rng = np.random.default_rng(0)
    images, state = list(rng.integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)), rng.uniform(100, 400, (4, 2))
    actions = state[:, None] + rng.normal(0, 20, (4, processor.chunk_size, 2))
    batch = {"images": images, "text": [""] * 4, "state": state}
    return models[0].eval(), models[1].eval().to("cuda"), processor, batch, batch | {"actions": actions}


def test_the_shipped_policy_scores_chunks_as_on_the_cpu(shipped):
    on_cpu, on_gpu, processor, _, batch = shipped
    inputs = processor(**batch)
    expected = on_cpu.log_probability(**inputs, per_token=True)
    found = on_gpu.log_probability(**inputs.to("cuda"), per_token=True)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        on_gpu(**inputs.to("cuda")).loss.cpu(), on_cpu(**inputs.to("cpu")).loss, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_string_decodes_to_one_chunk(shipped, dtype, options):
    _, model, processor, observation, _ = shipped
    ids = model.to(dtype).generate(**processor(**observation).to("cuda"), **options)
    actions = processor.post_process_actions(ids)
    assert actions.shape == (4, processor.chunk_size, 2) and np.isfinite(np.asarray(actions)).all()


def test_a_policy_moves_between_devices_and_is_pickled_from_either(shipped):
    model, _, processor, observation, _ = shipped
    inputs = processor(**observation)
    expected = model.generate(**inputs)
    model.to("cuda").generate(**inputs.to("cuda"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    inputs = inputs.to("cpu")
    for other in (loaded, model.to("cpu"), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(**inputs), expected)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_scores_that_are_not_finite_are_an_error_after_which_the_gpu_works(shipped, options):
    _, model, processor, observation, _ = shipped
    inputs, head = processor(**observation).to("cuda"), model.lm_head.weight.data.clone()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="scores for the action tokens are nan"):
        model.generate(**inputs, **options)
    model.lm_head.weight.data.copy_(head)
    assert processor.post_process_actions(model.generate(**inputs)).shape[0] == 4


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_the_host_waits_at_a_token_as_often_as_in_stock_generate(options):
    policy = Policy(10, 2, 41)
    model, stock = policy.make_model().to("cuda"), LogitsProcessorList([MaskedBand(policy.band)])

    def waits(is_stock, num_tokens):
        given = {"input_ids": PROMPTS.to("cuda"), "attention_mask": MASK.to("cuda"), "max_new_tokens": num_tokens}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                if is_stock:
                    given |= {"logits_processor": stock, "pad_token_id": 0}
                    SmolVLMForConditionalGeneration.generate(model, **given, **options)
                else:
                    model.generate(**given, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    waits(True, 2), waits(False, 2)  # the first calls load kernels
    assert waits(False, 5) - waits(False, 2) <= waits(True, 5) - waits(True, 2)


def test_a_training_step_in_bf16_lowers_the_loss(shipped):
    _, model, processor, _, batch = shipped
    inputs, found = processor(**batch).to("cuda"), []
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            found.append(model(**inputs).loss)
        found[-1].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0]
