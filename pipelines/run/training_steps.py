"""One worker's part of a training: its share of every step, of every evaluation, and of checkpoints."""

import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from pipelines.compute.batches import PackedBatch, Padding, Timed, batches_ahead
from pipelines.compute.block_files import BlockFile
from pipelines.compute.blocks import BlockOrder, Work, share
from pipelines.compute.exchange import open_connections, summed
from pipelines.compute.step import compile_layers, recompute_layers, trainable_model
from pipelines.compute.strategies import Replicated, Workers, adamw, can_be_compiled
from pipelines.run.checkpoints import load_checkpoint, save_checkpoint
from pipelines.run.spot_checks import METRICS, SpotCheck
from pipelines.run.training_config import LoraSettings
from pipelines.run.training_plan import TrainingPlan, learning_rate
from pipelines.run.utilisation import peak_flops, step_flops


class Interrupted(Exception):
    """What is measured has to make way."""


def never() -> bool:
    """Nothing interrupts."""
    return False


class Training:
    """Model, optimizer and step number of one worker. Knows Ray only by rank and world size."""

    def __init__(
        self, plan: TrainingPlan, rank: int, world: int, device: torch.device, start: Path | None = None
    ) -> None:
        """At the plan's beginning, or where the run was that wrote `start`, on any number of workers."""
        self.plan, self.rank, self.world, self.device = plan, rank, world, device
        open_connections(device)
        torch.manual_seed(plan.seed)  # every worker draws the same adapters
        self.model: PeftModel = trainable_model(plan.base, plan.base_format, lora_config(plan.lora), device)
        state = load_checkpoint(self.model, start) if start else {"step": 0, "optimizer": None, "dev_losses": []}
        self.step: int = state["step"]
        self.evaluated: int = state.get("evaluated", self.step)
        """The last step at which the dev loss was measured."""
        self.dev_losses: list[float] = state["dev_losses"]
        if plan.recompute:
            recompute_layers(self.model)
        on_gpu = device.type == "cuda"
        if on_gpu and plan.compiled and can_be_compiled(plan.strategy, plan.base_format):
            compile_layers(self.model)
        self.padding = Padding(plan.block_tokens) if on_gpu else None
        self.workers = _workers(plan, self.model, state["optimizer"])
        self.train_blocks, self.dev_blocks = BlockFile(plan.train_blocks), BlockFile(plan.dev_blocks)
        self.order = BlockOrder(len(self.train_blocks), plan.blocks_per_step, plan.seed)
        self.batches = self._batches()
        check = (plan.questions, plan.base, plan.prompt_format, plan.score_tokens)
        self.spot_check = SpotCheck(*check) if plan.questions else None

    @property
    def done(self) -> bool:
        """Whether the last step is done, or the dev loss has not fallen for `patience` evaluations."""
        since_best = len(self.dev_losses) - 1 - self.dev_losses.index(min(self.dev_losses)) if self.dev_losses else 0
        return self.step >= self.plan.steps or 0 < self.plan.patience <= since_best

    @property
    def due(self) -> bool:
        """Whether the dev loss is to be measured: every so many steps, and after the last one."""
        every = self.plan.eval_every
        return self.step // every > self.evaluated // every or self.step >= self.plan.steps > self.evaluated

    def _batches(self) -> Iterator[PackedBatch]:
        """This worker's batches of this step and all later ones: the first is on its way before its step begins."""
        steps = map(self.order.step, range(self.step, self.plan.steps))
        indices = (index for blocks in steps for index, _ in self._share(blocks))
        return batches_ahead((self.train_blocks[i] for i in indices), self.device, self.padding)

    def _share(self, work: list[Work]) -> list[tuple[Work, bool]]:
        return share(work, self.rank, self.world, self.workers.equal_rounds)

    def _in_rounds(self, work: list[Work], stop: Callable[[], bool]) -> Iterator[tuple[Work, bool]]:
        """This worker's share, one after another. Interrupted on all workers alike, before the same round."""
        mine = self._share(work)
        for number in range(-(-len(work) // self.world)):
            if stop():
                raise Interrupted
            yield from mine[number : number + 1]

    def advance(self) -> dict[str, float]:
        """One optimizer step over all workers; returns its metrics. FloatingPointError if the loss is no good."""
        started = time.monotonic()
        rate = learning_rate(self.plan, self.step)
        blocks = self.order.step(self.step)
        targets = int(self.train_blocks.target_counts[blocks].sum())
        counts = [counted for _, counted in self._share(blocks)]
        batches = Timed(islice(self.batches, len(counts)))
        loss = self.workers.losses(batches, counts, max(targets, 1), f"{self.plan.seed}:{self.step}")
        norm = self.workers.update(rate)
        value, norm_value = torch.stack([loss, norm]).tolist()  # the only time in a step that a GPU is waited for
        self.step += 1
        self._check(value, norm_value, blocks)
        seconds, tokens = time.monotonic() - started, int(self.train_blocks.token_counts[blocks].sum())
        return {
            "step": self.step,
            "epoch": self.step / self.order.steps_per_epoch,
            "loss": value,
            "learning_rate": rate,
            "grad_norm": norm_value,
            "answer_tokens": targets,
            "tokens": tokens,
            "seconds": seconds,
            "waiting_seconds": batches.seconds,
            "workers": self.world,
        } | self._gpu_metrics(blocks, seconds)

    def _gpu_metrics(self, blocks: list[int], seconds: float) -> dict[str, float]:
        """Memory and, of a GPU that is known, how much of its bf16 matrix roof a step used; {} without a GPU."""
        if self.device.type != "cuda":
            return {}
        metrics = {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        if peak and self.plan.base_format != "fp32":
            known = self.train_blocks
            counts = (known.token_counts, known.attended_counts, known.target_counts)
            flops = step_flops(self.model.config, self.plan.lora, *(int(count[blocks].sum()) for count in counts))
            metrics["utilisation"] = flops / seconds / self.world / peak
        return metrics

    def _check(self, loss: float, norm: float, blocks: list[int]) -> None:
        """Raise FloatingPointError for NaN, and for a loss that guessing at random would not reach by far."""
        hopeless = 2 * math.log(self.model.config.vocab_size)
        if math.isfinite(loss) and math.isfinite(norm) and loss < hopeless:
            return
        file = Path(self.plan.folder) / f"bad-step-{self.step}.json"
        if self.rank == 0:
            rows = [row for index in blocks for row in self.train_blocks[index].rows]
            text = json.dumps({"step": self.step, "loss": loss, "grad_norm": norm, "rows": rows}, indent=1)
            file.write_text(text + "\n", encoding="utf-8")
        raise FloatingPointError(
            f"loss {loss:.4g}, gradient norm {norm:.4g} at step {self.step}, its rows are in {file}"
        )

    @torch.no_grad()
    def evaluate(self, stop: Callable[[], bool] = never) -> dict[str, float]:
        """The mean loss over all answer tokens of the dev rows; {} where there are none, or `stop` comes true."""
        targets = int(self.dev_blocks.target_counts.sum())
        started, total = time.monotonic(), torch.zeros((), device=self.device)
        indices = list(range(len(self.dev_blocks) if targets else 0))
        blocks = (self.dev_blocks[i] for i, _ in self._in_rounds(indices, stop))
        self.model.eval()
        try:
            batches = batches_ahead(blocks, self.device, self.padding)
            for batch, (_, counted) in zip(batches, self._share(indices), strict=True):
                total += self.workers.loss(batch) * counted
        except Interrupted:
            return {}
        finally:
            self.model.train()
        self.evaluated = self.step
        if not targets:
            return {}
        self.dev_losses.append(summed(total).item() / targets)
        return {"dev_loss": self.dev_losses[-1], "evaluating_seconds": time.monotonic() - started}

    @torch.no_grad()
    def answer_questions(self, stop: Callable[[], bool] = never) -> dict[str, float]:
        """Exact match and F1 of the answers to the plan's dev questions; {} where there are none, or as `evaluate`."""
        if not self.spot_check:
            return {}
        started = time.monotonic()
        # Without gradients, a token takes less than what a training step keeps of it.
        batches = self.spot_check.batches(self.plan.block_tokens, self.world)
        points = torch.zeros(len(METRICS), device=self.device)
        try:
            for batch, counted in self._in_rounds(batches, stop):
                found = self.spot_check.points(self.model, batch, self.workers.equal_rounds)
                points += torch.tensor(found, device=self.device) * counted
        except Interrupted:
            return {}
        shares = summed(points) / len(self.spot_check.asked)
        scores = {f"dev_{name}": share for name, share in zip(METRICS, shares.tolist(), strict=True)}
        return scores | {"answering_seconds": time.monotonic() - started}

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint into `folder`; with None, take part in what another worker writes."""
        state = {"step": self.step, "evaluated": self.evaluated, "dev_losses": self.dev_losses}
        state["optimizer"] = self.workers.optimizer_state()
        with self.workers.whole():
            if folder:
                save_checkpoint(self.model, state, folder)


def _workers(plan: TrainingPlan, model: PeftModel, state: dict[str, Any] | None) -> Workers:
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], plan.learning_rate, plan.weight_decay)
    if plan.strategy == "ddp":
        return Replicated(model, optimizer, plan.max_grad_norm, state)
    from pipelines.compute.zero import Sharded  # which brings DeepSpeed

    return Sharded(model, optimizer, plan.max_grad_norm, state, stage=int(plan.strategy[-1]))


def lora_config(lora: LoraSettings) -> LoraConfig:
    """The settings as PEFT's."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
