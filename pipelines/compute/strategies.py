"""How workers share a step. ddp: each holds everything, and gradients are added up; zero.py has DeepSpeed's ways."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from pipelines.compute.batches import PackedBatch
from pipelines.compute.exchange import sum_gradients
from pipelines.compute.step import BaseFormat, answer_loss, run_batches

Strategy = Literal["ddp", "zero2", "zero3"]


class Workers(Protocol):
    """What the training loop asks of a strategy. All workers call the same methods in the same order."""

    equal_rounds: bool
    """Whether each worker must compute as many batches as the others."""

    def losses(self, batches: Iterable[PackedBatch], counts: list[bool], target_count: int, seed: str) -> Tensor:
        """Forward and backward; the global mean loss. `counts` says which batches do, as `blocks.share` does."""

    def update(self, rate: float) -> Tensor:
        """An optimizer step at that learning rate; the gradient's norm before clipping."""

    def loss(self, batch: PackedBatch) -> Tensor:
        """Summed loss of a batch, for evaluation."""

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's whole state_dict(), the same for every strategy and number of workers."""

    def whole(self) -> AbstractContextManager[object]:
        """A context in which the adapters are whole on this worker."""


def can_be_compiled(strategy: Strategy, base_format: BaseFormat) -> bool:
    """Not with zero3's hooks between a layer's parts; and fp32's attention would be anew for every block."""
    return strategy != "zero3" and base_format != "fp32"


def adamw(parameters: list[nn.Parameter], rate: float, decay: float) -> torch.optim.AdamW:
    """The optimizer of every strategy."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=parameters[0].is_cuda)


class Replicated:
    """Every worker holds base, adapters and optimizer; gradients of a few megabytes are added up in one exchange."""

    equal_rounds = False

    def __init__(
        self, model: PeftModel, optimizer: torch.optim.AdamW, max_grad_norm: float, state: dict[str, Any] | None
    ) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        self.parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        if state:
            optimizer.load_state_dict(state)

    def losses(self, batches: Iterable[PackedBatch], counts: list[bool], target_count: int, seed: str) -> Tensor:
        """See Workers. All batches count: `equal_rounds` is false."""
        return sum_gradients(self.parameters, run_batches(self.model, batches, target_count, seed))

    def update(self, rate: float) -> Tensor:
        """See Workers."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def loss(self, batch: PackedBatch) -> Tensor:
        """See Workers."""
        return answer_loss(self.model, batch)

    def optimizer_state(self) -> dict[str, Any]:
        """See Workers."""
        return self.optimizer.state_dict()

    def whole(self) -> AbstractContextManager[object]:
        """See Workers."""
        return torch.no_grad()
