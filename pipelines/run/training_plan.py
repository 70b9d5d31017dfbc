"""What every worker must know of a run: its files, its steps, and how to learn in each."""

import math
from typing import Literal

from chatglm3.chat import PromptFormat
from cluster.config import Config
from pipelines.compute.step import BaseFormat
from pipelines.compute.strategies import Strategy
from pipelines.run.training_config import LoraSettings
from pipelines.scores.questions import LONGEST_ANSWER


class TrainingPlan(Config):
    """All a worker must know, worked out by the train stage."""

    base: str
    base_format: BaseFormat
    lora: LoraSettings
    recompute: bool
    compiled: bool = True
    """Whether a GPU's decoder layers are compiled (not zero3's, not fp32's): half a minute, and a C compiler."""
    strategy: Strategy = "ddp"
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
    patience: int = 0
    keep: Literal["last", "best"] = "last"
    """Which adapter the run is for: that of the last step, or of the lowest dev loss."""
    prompt_format: PromptFormat = "chat"
    questions: str = ""
    """File of dev rows to answer at each evaluation; "": none."""
    score_tokens: int = LONGEST_ANSWER


def learning_rate(plan: TrainingPlan, step: int) -> float:
    """The rate of 0-based `step`: linear warm-up, then the schedule, which reaches 0 after the last step."""
    warmup = math.ceil(plan.warmup_ratio * plan.steps)
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, plan.steps - warmup)
    factor = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return plan.learning_rate * factor[plan.schedule]
