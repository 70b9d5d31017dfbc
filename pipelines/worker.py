"""What each training worker does: its share of every step, checkpoints, metrics. One process per GPU."""

import math
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from ray.train import Checkpoint
from ray.train.torch import get_device
from safetensors.torch import load_file

from cluster.config import Config
from pipelines.batches import PackedBatch, Padding, batches_ahead
from pipelines.block_files import BlockFile
from pipelines.blocks import BlockOrder
from pipelines.progress import MetricsLog
from pipelines.step import (
    BaseFormat,
    answer_loss,
    compile_layers,
    recompute_layers,
    run_batches,
    sum_over_workers,
    trainable_model,
)


class TrainingPlan(Config):
    """All a worker must know, worked out by the train stage."""

    base: str
    base_format: BaseFormat
    lora: dict[str, Any]
    recompute: bool
    compiled: bool = True
    """Whether a GPU's decoder layers are compiled, which takes half a minute and a C compiler."""
    block_tokens: int
    learning_rate: float
    schedule: Literal["linear", "cosine", "constant"]
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    folder: str
    """Where metrics.jsonl and tensorboard/ go; shared by all nodes."""
    train_blocks: str
    dev_blocks: str
    blocks_per_step: int
    steps: int
    save_every: int
    eval_every: int


def train_worker(settings: dict[str, Any]) -> None:
    """Train this worker's share from the last checkpoint to the plan's last step."""
    plan = TrainingPlan(**settings)
    context = ray.train.get_context()
    training = Training(plan, context.get_world_rank(), context.get_world_size(), get_device())
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            training.load(Path(folder))
    log = MetricsLog(Path(plan.folder), training.step) if training.rank == 0 else None
    while training.step < plan.steps:
        metrics = training.advance()
        last = training.step == plan.steps
        if training.step % plan.eval_every == 0 or last:
            metrics |= training.evaluate()
        if log:
            log.write(metrics)
        if training.step % plan.save_every == 0 or last:
            _report(training, metrics)


def _report(training: "Training", metrics: dict[str, float]) -> None:
    """Hand a checkpoint to Ray Train; every worker takes part, the first one writes."""
    if training.rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        training.save(Path(folder))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


class Training:
    """Model, optimizer and step number of one worker. Knows Ray only by rank and world size."""

    def __init__(self, plan: TrainingPlan, rank: int, world: int, device: torch.device) -> None:
        self.plan, self.rank, self.world, self.device = plan, rank, world, device
        self.step = 0
        torch.manual_seed(plan.seed)  # every worker draws the same adapters
        self.model: PeftModel = trainable_model(plan.base, plan.base_format, _lora_config(plan.lora), device)
        if plan.recompute:
            recompute_layers(self.model)
        on_gpu = device.type == "cuda"
        if on_gpu and plan.compiled:
            compile_layers(self.model)
        self.padding = Padding(plan.block_tokens) if on_gpu else None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=on_gpu
        )
        self.train_blocks, self.dev_blocks = BlockFile(plan.train_blocks), BlockFile(plan.dev_blocks)
        self.order = BlockOrder(len(self.train_blocks), plan.blocks_per_step, plan.seed)
        self.batches = self._batches_from(0)

    def _batches_from(self, step: int) -> Iterator[PackedBatch]:
        """This worker's batches of `step` and all after it: the first of a step is under way before the step begins."""
        indices = (i for later in range(step, self.plan.steps) for i in self.order.share(later, self.rank, self.world))
        return batches_ahead((self.train_blocks[i] for i in indices), self.device, self.padding)

    def advance(self) -> dict[str, float]:
        """One optimizer step over all workers; returns its metrics. Raises FloatingPointError for a loss of NaN."""
        started = time.monotonic()
        rate = learning_rate(self.plan, self.step)
        targets = int(self.train_blocks.target_counts[self.order.step(self.step)].sum())
        share = self.order.share(self.step, self.rank, self.world)
        batches = islice(self.batches, len(share))
        loss = run_batches(self.model, batches, max(targets, 1), f"{self.plan.seed}:{self.step}")
        loss = sum_over_workers(self.parameters, loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
        value, norm_value = torch.stack([loss, norm]).tolist()  # the only time in a step that a GPU is waited for
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            rows = ", ".join(row for index in share for row in self.train_blocks[index].rows[:20])
            raise FloatingPointError(f"loss {value}, gradient norm {norm_value} at step {self.step + 1}, rows {rows}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "step": self.step,
            "epoch": self.step / self.order.steps_per_epoch,
            "loss": value,
            "learning_rate": rate,
            "grad_norm": norm_value,
            "answer_tokens": targets,
            "seconds": time.monotonic() - started,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss over all answer tokens of the dev rows; {} where there are none."""
        targets = int(self.dev_blocks.target_counts.sum())
        if not targets:
            return {}
        self.model.eval()
        total = torch.zeros((), device=self.device)
        blocks = (self.dev_blocks[index] for index in range(self.rank, len(self.dev_blocks), self.world))
        for batch in batches_ahead(blocks, self.device, self.padding):
            total += answer_loss(self.model, batch)
        self.model.train()
        return {"dev_loss": sum_over_workers([], total).item() / targets}

    def save(self, folder: Path) -> None:
        """Write the adapter (plain PEFT) and the optimizer's state."""
        # Told not to look for changed embeddings, PEFT does not ask the network what the base's were.
        self.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        torch.save({"step": self.step, "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        set_peft_model_state_dict(self.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
        state = torch.load(folder / "state.pt", weights_only=True, map_location=self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.batches = self._batches_from(self.step)


def learning_rate(plan: TrainingPlan, step: int) -> float:
    """The rate of 0-based `step`: linear warm-up, then the schedule, which reaches 0 after the last step."""
    warmup = math.ceil(plan.warmup_ratio * plan.steps)
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, plan.steps - warmup)
    factor = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return plan.learning_rate * factor[plan.schedule]


def _lora_config(lora: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        use_rslora=lora["rslora"],
        use_dora=lora["dora"],
        task_type="CAUSAL_LM",
    )
