# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing of both kinds, DDP and FSDP2 compute the loss and the gradients of a plain run."""

import warnings

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.models.tiny import IMAGE, PATCHES, tiny_model
from tests.numerics import relative_error

WORLD = 2
# Of each rank: one with a picture in each sample, one with text alone
WITH_PICTURES, TEXT_ONLY = "with pictures", "text only"


def model_of(text_type="mixtral"):
    """The same random model in every process."""
    torch.manual_seed(0)
    model = tiny_model(text_type=text_type).train()
    for parameter in model.vision_tower.unused_parameters():
        parameter.requires_grad_(False)  # DDP waits for the gradients of all others
    return model


def batch_of(kind, seed):
    """Two samples."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 50, (2, 6), generator=generator)
    if kind == TEXT_ONLY:
        return {"input_ids": text, "labels": text}
    ids = torch.cat([torch.full((2, PATCHES), IMAGE), text], dim=1)
    pixels = torch.randn(2, 3, 12, 12, generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "pixel_values": pixels}


def plain(batches, text_type="mixtral"):
    """Mean loss over batches, and its gradients."""
    model = model_of(text_type)
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(loss, grads, expected):
    assert relative_error(loss, expected[0]) <= 1e-5
    for name, grad in expected[1].items():
        if name.endswith("k_proj.bias"):  # mathematically zero: softmax does not see what is added to all scores
            continue
        assert relative_error(grads[name], grad) <= 1e-5, name


def checkpointed(text_type, reentrant):
    """Loss and gradients with activation checkpointing in encoder and language model."""
    model = model_of(text_type)
    with warnings.catch_warnings():  # of inputs without gradients, such as the pictures, and of a name that changed
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layers = (*model.vision_tower.layers, *model.language_model.model.layers)
        assert all(layer.gradient_checkpointing for layer in layers)
        loss = model(**batch_of(WITH_PICTURES, 0)).loss
        loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("text_type", "reentrant"), [("mixtral", False), ("llama", False), ("llama", True)], ids=lambda value: str(value)
)
def test_gradient_checkpointing(text_type, reentrant):
    assert_same(*checkpointed(text_type, reentrant), plain([batch_of(WITH_PICTURES, 0)], text_type))


def test_reentrant_checkpoints_around_experts_of_the_language_model_are_refused():
    with pytest.raises(ValueError, match="use_reentrant: expected False for a language model with experts"):
        checkpointed("mixtral", reentrant=True)


def shard(model):
    """FSDP2 over every block, as Trainer and accelerate do it by `_no_split_modules`."""
    for block in (*model.vision_tower.layers, model.connector, *model.language_model.model.layers):
        fully_shard(block)
    return fully_shard(model)


def run_rank(rank, meeting, kind, kinds, results):
    """One process: loss and full gradients of its own batch, averaged over the processes."""
    from cumo.train.sharding import leave_processes

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    model = model_of()
    if kind == "FSDP2":
        model = wrapped = shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    loss = wrapped(**batch_of(kinds[rank], rank)).loss
    loss.backward()
    grads = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    distributed.all_reduce(loss.detach_())
    if rank == 0:
        torch.save((loss / WORLD, grads), results)
    leave_processes()


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(WITH_PICTURES, WITH_PICTURES), (WITH_PICTURES, TEXT_ONLY)], ids=["both", "one"])
@pytest.mark.parametrize("kind", ["FSDP2", "DDP"])
def test_two_processes(kind, kinds, tmp_path):
    pytest.importorskip("accelerate", reason="cumo.train shards through it")
    results = tmp_path / "results"
    torch.multiprocessing.spawn(run_rank, (tmp_path / "meeting", kind, kinds, results), nprocs=WORLD)
    loss, grads = torch.load(results)
    assert_same(loss, grads, plain([batch_of(k, rank) for rank, k in enumerate(kinds)]))
