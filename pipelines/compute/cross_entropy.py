"""Cross-entropy of a frozen output layer's logits, which never exist for more than a chunk of tokens at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # tokens; logits of a 65,024-word vocabulary then take 0.27 GB in fp32, and a few copies of them


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens, in fp32: hidden [tokens, size] @ weight' [size, vocabulary] against targets [tokens].

    The gradient of `hidden` is computed with the loss: no logits wait for the backward pass. `weight` gets none.
    """
    loss: Tensor = _SummedCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = []
        for tokens, expected in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = F.linear(tokens, weight).requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                loss = F.cross_entropy(logits.float(), expected, reduction="sum")
            total += loss.detach()
            if ctx.needs_input_grad[0]:
                (gradient,) = torch.autograd.grad(loss, logits)
                gradients.append(gradient @ weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (of_hidden,) = ctx.saved_tensors
        # A mean's 1 / tokens, in 16 bits, would scale all gradients by up to 0.4 %.
        return (of_hidden.float() * gradients[0]).to(of_hidden.dtype), None, None
