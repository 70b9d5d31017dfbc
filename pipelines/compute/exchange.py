"""What workers tell each other: sums over all of them. One that is alone need not start NCCL for it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

OPENING = 2**24
"""Numbers of the first exchange, 64 MB: as large as most adapters' gradients."""


def summed(values: Tensor) -> Tensor:
    """All workers' `values` added up, in place."""
    if _several():
        dist.all_reduce(values)
    return values


def open_connections(device: torch.device) -> None:
    """Exchange something as large as gradients, before anything else is in a GPU's memory.

    NCCL takes its buffers at the first exchange, and PyTorch, which may hold nearly all of a GPU by the end of the
    first backward pass, would give none back to it. DeepSpeed opens connections of its own before the first step.
    """
    if _several() and device.type == "cuda":
        summed(torch.zeros(OPENING, device=device))


def any_worker(said: bool, device: torch.device) -> bool:
    """Whether any of the workers says so; all get the same answer."""
    return bool(summed(torch.tensor(float(said), device=device)).item() > 0) if _several() else said


def sum_gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Add up gradients (in place) and `loss` over all workers in one exchange; returns the total loss.

    The gradients of LoRA adapters are a few megabytes, so one flat buffer beats overlapped buckets, and a worker
    may have any number of blocks, none included.
    """
    if not _several():
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = summed(torch.cat([loss.reshape(1), *(g.float().flatten() for g in gradients)]))
    sizes = [p.numel() for p in parameters]
    for parameter, gradient in zip(parameters, flat[1:].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return flat[0]


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
