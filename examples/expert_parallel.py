# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism over processes: `torchrun --nproc-per-node 2 examples/expert_parallel.py`.

Every process has the tokens and a share of the experts. Ids of experts that live elsewhere lie outside of its range and
are left out by the layer; the sum over processes is the whole layer.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

import cumo_kernels as ck

T, E, K, D, F = 64, 8, 2, 32, 48


def main() -> None:
    """One process."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)  # the same tokens, router and experts everywhere, to compare with the whole layer
    x = torch.randn(T, D).to(device)
    gate, w1, w2 = (
        t.to(device) for t in (torch.randn(E, D), torch.randn(E, F, D) / D**0.5, torch.randn(E, D, F) / F**0.5)
    )
    mine = slice(rank * E // world, (rank + 1) * E // world)
    local1, local2 = (w[mine].clone().requires_grad_() for w in (w1, w2))

    routing = ck.linear_topk_gating(x, gate, K)
    local_ids = routing.expert_TK - mine.start  # below 0 or beyond the end: another process has it
    y = all_reduce(ck.moe_mlp(x, routing.weight_TK, local_ids, local1, local2))
    y.square().mean().backward()

    whole1, whole2 = (w.clone().requires_grad_() for w in (w1, w2))
    expected = ck.moe_mlp(x, routing.weight_TK, routing.expert_TK, whole1, whole2)
    (expected.square().mean() * world).backward()  # each process has the loss: their gradients are summed
    error = ((y - expected).norm() / expected.norm()).item()
    grad_error = ((local1.grad - whole1.grad[mine]).norm() / whole1.grad[mine].norm()).item()
    experts = f"experts {mine.start} to {mine.stop - 1}"
    print(f"process {rank} of {world}, {experts}: off by {error:.1e}, gradients by {grad_error:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
