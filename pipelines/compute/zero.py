"""ZeRO (arXiv:1910.02054) by DeepSpeed. zero2 shards gradients and optimizer, zero3 the frozen base as well.

Adapters are small, so zero2 saves little beside ddp; zero3 is for GPUs that have room for the base and not for a step
beside it, at the cost of a gather for each layer, and of layers that are not compiled: they keep 1.3 times as much for
each token (nf4 and the adapters of `train`'s defaults, as pipelines/run/memory.py reckons it).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import Tensor, nn

from pipelines.compute.batches import PackedBatch
from pipelines.compute.exchange import summed
from pipelines.compute.step import answer_loss, base_of, seed_dropout

MOMENTS = ("exp_avg", "exp_avg_sq")


class Sharded:
    """`strategies.Workers` by a DeepSpeed engine. Needs an initialised process group."""

    equal_rounds = True  # each backward pass, and with zero3 each layer, is an exchange in which all take part

    def __init__(
        self,
        model: PeftModel,
        optimizer: torch.optim.AdamW,
        max_grad_norm: float,
        state: dict[str, Any] | None,
        stage: int,
    ) -> None:
        if not next(model.parameters()).is_cuda:  # whatever GPUs the node has
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # here, because it asks the environment which accelerator to use

        self.api, self.stage, self.optimizer = deepspeed, stage, optimizer
        self.parameters: list[nn.Parameter] = list(optimizer.param_groups[0]["params"])
        self.groups = optimizer.state_dict()["param_groups"]
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # only for its logs: blocks come as they are
            "gradient_clipping": max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": False,
                # DeepSpeed's 500 million fp32 numbers would be 2 GB on each GPU.
                "reduce_bucket_size": sum(parameter.numel() for parameter in self.parameters),
                "stage3_max_reuse_distance": 0,  # or the last layers' weights stay whole until the backward pass
            },
        }
        if stage == 3:
            for layer in (module for module in model.modules() if isinstance(module, Linear4bit)):
                keep_no_weight(layer)
        loss = _AnswerLoss(model)
        # Its forward pass takes the output layer's weight itself; others are gathered as their layers are called.
        deepspeed.zero.register_external_parameter(loss, base_of(model).lm_head.weight)
        self.engine, self.sharded, _, _ = deepspeed.initialize(model=loss, optimizer=optimizer, config=settings)
        if state:
            self._load(state["state"])

    def losses(self, batches: Iterable[PackedBatch], counts: list[bool], target_count: int, seed: str) -> Tensor:
        """See Workers."""
        total = torch.zeros((), device=self.engine.device)
        for number, (batch, counted) in enumerate(zip(batches, counts, strict=True), 1):
            self.engine.set_gradient_accumulation_boundary(number == len(counts))
            seed_dropout(seed, batch)
            loss = self.engine(batch) * counted / target_count
            # DeepSpeed takes the mean over the workers, but these losses are shares of one mean already.
            self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            total += loss.detach()
        return summed(total)

    def update(self, rate: float) -> Tensor:
        """See Workers."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.engine.device)

    def loss(self, batch: PackedBatch) -> Tensor:
        """See Workers."""
        loss: Tensor = self.engine(batch)
        return loss

    def optimizer_state(self) -> dict[str, Any]:
        """See Workers."""
        get = self.api.utils.safe_get_full_optimizer_state
        step = next(iter(self.optimizer.state.values()))["step"]
        moments = [{name: get(p, name).cpu() for name in MOMENTS} for p in self.parameters]
        return {"state": dict(enumerate({"step": step, **m} for m in moments)), "param_groups": self.groups}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See Workers."""
        if self.stage < 3:
            yield
            return
        self.sharded.checkpoint_event_prologue()  # after an evaluation, layers it foresaw are still on their way
        with self.api.zero.GatheredParameters(self.parameters):
            yield
        self.sharded.checkpoint_event_epilogue()

    def _load(self, state: dict[int, dict[str, Tensor]]) -> None:
        flat = (
            self.sharded.fp32_partitioned_groups_flat if self.stage == 3 else self.optimizer.param_groups[0]["params"]
        )
        for tensor in flat:  # DeepSpeed has places for the moments only after the first step
            moments = {name: torch.zeros_like(tensor) for name in MOMENTS}
            # A GPU's fused AdamW wants even the number of the step there; a checkpoint's comes from the CPU.
            self.optimizer.state[tensor] = {"step": state[0]["step"].to(tensor.device, copy=True), **moments}
        if self.stage == 2:
            self.sharded._lazy_init_hp_params_optimizer_state()
        for parameter, moments in zip(self.parameters, state.values(), strict=True):
            for name in MOMENTS:
                self._set(parameter, name, moments[name].to(self.engine.device))

    def _set(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        if self.stage == 2:
            self.api.utils.safe_set_full_optimizer_state(parameter, value, name)
            return
        world, numbers = dist.get_world_size(), value.flatten()
        part = -(-len(numbers) // world)
        mine = F.pad(numbers, (0, part * world - len(numbers)))[part * dist.get_rank() :][:part]
        self.api.utils.safe_set_local_optimizer_state(parameter, mine, name)


def keep_no_weight(layer: Linear4bit) -> None:
    """Have a frozen 4-bit layer take its weight anew in the backward pass, in which DeepSpeed has gathered it again."""
    layer.forward = lambda x: _FourBitProduct.apply(x, layer)  # type: ignore[method-assign, no-untyped-call]


class _FourBitProduct(torch.autograd.Function):
    """The layer's own product. bitsandbytes' keeps a view of the weight, and so the whole base until the step's end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        y: Tensor = Linear4bit.forward(layer, x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight: Tensor = dequantize_4bit(ctx.layer.weight, ctx.layer.weight.quant_state)
        return gradients[0] @ weight.to(gradients[0].dtype), None


class _AnswerLoss(nn.Module):
    """The model and its loss in one forward pass, as an engine wants it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        return answer_loss(self.model, batch)
