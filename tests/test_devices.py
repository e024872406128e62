"""Devices other than one CPU: nothing mixes devices or waits for one, and wrapped models compute the same.

"meta" stands for an accelerator: PyTorch refuses to mix its tensors with those of the CPU, except where a GPU's may be
mixed too, and to read a value from it, for which the host would have to wait. (A build without CUDA cannot index a
fake tensor on "cuda".)
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generation import EOS, MASK, PROMPTS, Policy, make_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, SmolVLMForConditionalGeneration, TrainingArguments

from smolandfast import SmolAndFastForActionPrediction
from smolandfast.generation_smolandfast import ActionGrammar, ActionLogitsProcessor, ActionReader, ChunkIsComplete
from smolandfast.training import AtomicCheckpointTrainer

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
TABLES = {
    "lengths": {"fast_token_lengths": [1, 1, 2, 3]},
    "bytes": {"fast_token_bytes": [f"{byte:02x}" for byte in range(256)] + ["6161"]},
}


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads, for which it waits for a device.

    The answers are what it reads from "meta", in this order; without one left, PyTorch raises.
    """

    def __init__(self, *answers):
        super().__init__()
        self.count, self.answers = 0, list(answers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        is_copy = func is aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu")
        if is_mask or is_copy or func in READS:
            self.count += 1
            if self.answers and args[0].is_meta:
                return self.answers.pop(0)
        return func(*args, **(kwargs or {}))


class MaskedBand(LogitsProcessor):
    """All that stock `generate()` needs to write action tokens, forever."""

    def __init__(self, band):
        self.band = band

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.band] = scores[:, self.band]
        return masked


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
@pytest.mark.parametrize("shape", [(10, 2, 41), (3, 7, 512)])
def test_the_host_waits_at_a_token_as_often_as_in_stock_generate(shape, options):
    policy = Policy(*shape)
    model = policy.make_model()
    stock = LogitsProcessorList([MaskedBand(policy.band)])

    def reads(is_stock, num_tokens):
        given = {"input_ids": PROMPTS, "attention_mask": MASK, "max_new_tokens": num_tokens, **options}
        with HostReads() as host:
            if is_stock:
                SmolVLMForConditionalGeneration.generate(model, **given, logits_processor=stock, pad_token_id=0)
            else:
                model.generate(**given)
        return host.count

    assert reads(False, 5) - reads(False, 2) == reads(True, 5) - reads(True, 2) > 0


@pytest.mark.parametrize("grammar", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("relaxed", [False, True])
def test_decoding_stays_on_the_device_of_its_ids(grammar, relaxed):
    config = make_config(3, 1, **grammar)
    on_cpu = ActionGrammar(config)
    grammar = on_cpu.to("meta")
    for has_beams in (False, True):
        reader = ActionReader(grammar, 2, has_beams)
        processor, end = ActionLogitsProcessor(reader, EOS, relaxed), ChunkIsComplete(reader)
        ids = torch.ones((4, 2), dtype=torch.long, device="meta")
        for _ in range(4):
            scores = processor(ids, torch.zeros(4, config.text_config.vocab_size, device="meta"))
            ids = torch.cat([ids, scores.argmax(1, keepdim=True)], dim=1)
            is_done = end(ids, None)
        assert scores.is_meta and is_done.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        processor.check()  # the one read, at the end of `generate()`
    with pytest.raises(RuntimeError, match="meta"):  # the proof that devices are not mixed above
        on_cpu.read(ids)


@pytest.mark.parametrize("device", ["meta", "cpu"], ids=["labels beside logits", "labels beside the first layer"])
def test_loss_and_log_probability_mix_no_devices(device):
    config = make_config(3, 1, **TABLES["lengths"])
    model = SmolAndFastForActionPrediction(config)
    for part in (model.model.text_model.norm, model.lm_head):  # the last layers are on another device
        part.to("meta").register_forward_pre_hook(lambda _, args: (args[0].to("meta"),))
    labels = torch.full((2, 9), -100)
    labels[:, 5:] = config.action_token_base_id
    labels[:, 8] = EOS
    ids, is_target = torch.ones_like(labels), labels != -100
    labels, reads = labels.to(device), [is_target[:, 1:].any(0), is_target] if device == "meta" else []
    with HostReads(*reads[:1]) as host:
        outputs = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(8, device=device))
    assert outputs.logits.shape[:2] == (2, 4) and outputs.loss.is_meta and not host.answers
    # At the end, the host reads whether all strings are complete.
    with HostReads(*reads, True) as host:
        found = model.log_probability(labels, input_ids=ids)
    assert found.shape == (2,) and found.is_meta and not host.answers


def test_a_policy_that_has_decoded_is_moved_copied_and_saved_as_before(tmp_path):
    policy = Policy(10, 2, 300)
    model = policy.make_model()
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    expected = model.generate(input_ids=PROMPTS, attention_mask=MASK)
    assert list(model.state_dict()) == names and not dict(model.named_buffers()).keys() & {"started", "next_state"}
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name
    with torch.device("meta"):
        empty = SmolAndFastForActionPrediction(policy.config).eval()
        assert empty.action_grammar.started.device.type == "cpu"
    empty.load_state_dict(model.state_dict(), assign=True)
    loaded = SmolAndFastForActionPrediction.from_pretrained(tmp_path / "after")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, model.double().float()]
    for other in copies:
        assert torch.equal(other.generate(input_ids=PROMPTS, attention_mask=MASK), expected)
    # Rotary frequencies have no weights to load on top of "meta".
    assert torch.equal(empty.action_grammar.started, model.action_grammar.started)
    assert model.half().action_grammar.started.dtype == torch.int64


def test_data_parallel_is_refused_with_the_command_that_works(model, processor, batch, tmp_path):
    with pytest.raises(ValueError, match="nn.DataParallel.*torchrun --nproc_per_node=N"):
        model._replicate_for_data_parallel()(**processor(**batch))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs, expected one.*torchrun --nproc_per_node=N"):
        AtomicCheckpointTrainer(model, arguments)


def test_log_probability_needs_labels(model, processor, batch):
    inputs = processor(**batch)
    del inputs["labels"]
    with pytest.raises(ValueError, match="return_log_probability needs labels"):
        model(**inputs, return_log_probability=True)


@pytest.mark.slow
def test_wrapped_policies_in_two_processes_compute_what_one_does(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    differences = json.loads((tmp_path / "results.json").read_text())
    assert set(differences) == {"DDP", "FSDP", "FSDP2"} and {"method", "saved"} < set(differences["FSDP2"])
    for name, found in differences.items():
        assert {"loss", "loss gradients", "log_probability", "log_probability gradients"} <= set(found), name
        assert max(found.values()) < 1e-4, (name, found)
