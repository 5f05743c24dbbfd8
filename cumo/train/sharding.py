# SPDX-License-Identifier: Apache-2.0
"""FSDP2 as accelerate applies it: on CPUs too, with gradients added up in float32, and left without its threads."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from cumo.train.modules import clean


def shard(accelerator: Any, plugin_arguments: dict[str, Any], precision: torch.dtype) -> None:
    """Have an accelerator shard the models that it prepares.

    On CPUs accelerate leaves the plugin out, and trains under DDP, without a word: what is to run on GPUs could not be
    tried. Its policy would also add up gradients in half precision, and round outputs of every block.

    Args:
        accelerator: of several processes.
        plugin_arguments: of a `FullyShardedDataParallelPlugin`.
        precision: in which the blocks compute; parameters, gradients and the optimizer's state are in float32.
    """
    # of outputs that are views: the message warns of in-place operations, of which there are none on them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    state = accelerator.state
    if state.distributed_type is not DistributedType.FSDP:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=None if precision is torch.float32 else precision, reduce_dtype=torch.float32
    )


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a sharded model on the CPU, in the first process; no others may be absent from the call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    return {clean(name): tensor for name, tensor in tensors.items()}


def is_joined() -> bool:
    """Whether this process is in a process group."""
    return distributed.is_available() and distributed.is_initialized()


def wait_for_all() -> None:
    """Wait until every rank is here; alone, do nothing."""
    if is_joined():
        distributed.barrier()


def leave_processes() -> None:
    """Wait for all ranks, then destroy the process groups and end their threads; alone, do nothing.

    A rank that exits early can abort the others. One whose threads outlive the interpreter can abort itself: a thread
    of Gloo that then drops a tensor ends the process, https://github.com/pytorch/pytorch/issues/38228. Destroyed groups
    live on in sharded models, and in device meshes, which DTensor caches for good.
    """
    if not is_joined():
        return
    wait_for_all()
    distributed.destroy_process_group()
    gc.collect()
    for mesh in gc.get_objects():
        if type(mesh) is DeviceMesh:  # isinstance would ask objects of all kinds for their class
            getattr(mesh, "_pg_registry", {}).clear()
