"""What `test_devices` runs in each of two processes: policies wrapped for training on several devices.

Each process has half of a batch; losses, log-probabilities and gradients must be those of one process with all of it.
`torchrun --nproc_per_node 2 tests/two_processes.py FOLDER` writes the relative differences to `FOLDER/results.json`.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import TASK, make_processor, make_small_model
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from smolandfast import SmolAndFastForActionPrediction


def shard(model):
    for layer in model.model.text_model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "FSDP2": shard,
}


def full_gradients(model):
    """Of all parameters, which FSDP holds in parts; their names as in the bare model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {n.removeprefix("_fsdp_wrapped_module."): p.grad.clone() for n, p in model.named_parameters()}
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def difference(found, expected) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


def compare(wrap, model, batch):
    rank = distributed.get_rank()
    half = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    wrapped, worst = wrap(copy.deepcopy(model)), {}
    count = (batch["labels"] != -100).sum()
    # Gradients of the processes are averaged; with the count of all targets, Trainer multiplies its loss again.
    calls = {
        "loss": lambda model, inputs: model(**inputs, num_items_in_batch=count).loss,
        "log_probability": lambda model, inputs: model(**inputs, return_log_probability=True).sum(),
    }
    for name, call in calls.items():
        model.zero_grad()
        wrapped.zero_grad()
        expected, found = call(model, batch), call(wrapped, half)
        expected.backward()
        (2 * found).backward()
        total = found.detach().clone()
        distributed.all_reduce(total)
        worst[name] = difference(total, expected.detach())
        expected, found = {name: p.grad for name, p in model.named_parameters()}, full_gradients(wrapped)
        assert found.keys() == expected.keys()
        found, expected = (torch.cat([part[name].flatten() for name in expected]) for part in (found, expected))
        worst[f"{name} gradients"] = difference(found, expected)
    if wrap is shard:  # the method of the policy calls its hooks
        found = wrapped.log_probability(**half).detach()
        worst["method"] = difference(found, model.log_probability(**batch).detach()[2 * rank : 2 * rank + 2])
    return worst


def save(model, batch, folder: Path) -> float:
    """Train a sharded policy for a step and save it whole; the difference of what loads."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.log_probability(**batch).detach()
    (-model.log_probability(**batch).sum()).backward()
    optimizer.step()
    expected = model.log_probability(**batch).detach()
    assert (expected > before).all()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(model, options=options)  # on the first process
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state_dict)
    distributed.barrier()
    return difference(SmolAndFastForActionPrediction.from_pretrained(folder).log_probability(**batch), expected)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rng = np.random.default_rng(0)
    states = rng.uniform(100, 400, (16, 2)).astype(np.float32)
    chunks = (states[:, None] + np.cumsum(rng.normal(0, 8, (16, 8, 2)), axis=1)).astype(np.float32)
    processor = make_processor((states, chunks))
    images = list(rng.integers(0, 256, (4, 96, 96, 3), dtype=np.uint8))
    batch = dict(processor(images=images, text=["a", TASK, "", "b"], state=states[:4], actions=chunks[:4]))
    model = make_small_model(processor)
    results = {name: compare(wrap, model, batch) for name, wrap in WRAPPERS.items()}
    results["FSDP2"]["saved"] = save(shard(model), batch, folder / "saved")
    if distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
