"""What users put around the model: `peft`'s LoRA, `torch.compile`."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_training import losses, make_trainer

from smolandfast.training import make_optimizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": "lm_head"}


def prompts(processor, batch):
    return processor(images=batch["images"], text=batch["text"], state=batch["state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_the_adapters_alone(dtype, processor, model, demonstrations, batch, tmp_path):
    model.to(dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(**LORA))  # the adapters are fp32
    optimizer = make_optimizer(adapted, vision_learning_rate=1e-3, text_learning_rate=2e-3)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [2e-4, 1e-3, 2e-3]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in adapted.named_parameters() if "lora_" in name}
    trainer = make_trainer(processor, adapted, demonstrations, tmp_path, optimizer, save_strategy="no")
    trainer.train()
    assert losses(trainer)[5] < losses(trainer)[1]
    for name, tensor in adapted.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, weights[name.replace("base_layer.", "")])


def test_a_lora_adapter_loads_again_and_merges_into_the_weights(processor, model, batch, tmp_path):
    inputs = prompts(processor, batch)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path)
    actions = processor.post_process_actions(adapted.generate(**inputs))
    assert actions.shape == (4, processor.chunk_size, 2)
    model = adapted.unload()
    model.load_state_dict(weights)
    merged = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    assert type(merged) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_whole_compiled_model_writes_the_same_logits(processor, model, batch):
    inputs = prompts(processor, batch)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(**inputs).logits, model(**inputs).logits, rtol=1e-3, atol=1e-4)
