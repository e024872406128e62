"""What users put around the model: `peft`'s LoRA, `torch.compile`."""

from unittest.mock import Mock

import pytest
import torch
from conftest import warnings_of
from peft import LoraConfig, PeftModel, get_peft_model
from test_training import losses, make_trainer
from torch._inductor.inductor_prims import force_stride_order
from torch.fx.experimental.proxy_tensor import make_fx

from smolandfast import compiling_smolandfast
from smolandfast.compiling_smolandfast import _TransposedGradients, compile_layers
from smolandfast.training_smolandfast import make_optimizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": "lm_head"}


def prompts(processor, batch):
    return processor(images=batch["images"], text=batch["text"], state=batch["state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_the_adapters_alone(dtype, processor, model, demonstrations, batch, tmp_path):
    model.to(dtype).set_attn_implementation("bf16_training")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=False)
    optimizer = make_optimizer(adapted, vision_learning_rate=1e-3, text_learning_rate=2e-3)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [2e-4, 1e-3, 2e-3]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in adapted.named_parameters() if "lora_" in name}
    trainer = make_trainer(processor, adapted, demonstrations, tmp_path, optimizer)
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


def test_compiling_layers_without_a_compiler_is_refused(model, monkeypatch):
    missing = Mock(side_effect=torch._inductor.exc.InvalidCxxCompiler)
    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match="compile_layers.*no C\\+\\+ compiler.*Install g"):
        compile_layers(model)


def test_a_compiler_with_other_options_is_used_without_them(model, monkeypatch):
    monkeypatch.setattr(compiling_smolandfast, "CustomGraphPass", None)
    with warnings_of(compiling_smolandfast) as messages:
        compile_layers(model)
    assert len(messages) == 1 and "leaves out its options" in messages[0]


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_have_the_same_loss_and_gradients(dtype, processor, model, batch):
    inputs = processor(**batch)
    model.to(dtype).train().set_attn_implementation("bf16_training")
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            compile_layers(model)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, gradients), (same_loss, same_gradients) = found
    gradients, same_gradients = (
        torch.cat([g.float().flatten() for g in found.values()]) for found in (gradients, same_gradients)
    )
    # Compiled bf16 rounds fewer of the steps in between.
    torch.testing.assert_close(same_loss, loss, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (same_gradients - gradients).norm() < tolerance * gradients.norm()


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_the_compiler_transposes_what_gradients_of_weights_are_products_of(dtype, count):
    narrow, wide = torch.randn(40, 8).to(dtype), torch.randn(40, 32).to(dtype)

    def gradients(x, y):
        return [left.permute(1, 0).mm(right) for left, right in ((x, y), (y, x), (x, x))] + [x.permute(1, 0).mm(y + 1)]

    traced = make_fx(gradients)(narrow, wide)
    expected = traced(narrow, wide)
    _TransposedGradients()(traced.graph)
    traced.recompile()
    nodes = [node.target for node in traced.graph.nodes]
    assert nodes.count(force_stride_order) == count  # `narrow`, once for three products
    for found, exact in zip(traced(narrow, wide), expected, strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.slow
def test_the_whole_compiled_model_writes_the_same_logits(processor, model, batch):
    inputs = prompts(processor, batch)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(**inputs).logits, model(**inputs).logits, rtol=1e-3, atol=1e-4)
