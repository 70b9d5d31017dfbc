"""The settings of a training, and which of them its loss curve depends on."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from chatglm3.chat import PromptFormat
from cluster.config import Config
from pipelines.compute.step import BaseFormat
from pipelines.compute.strategies import Strategy
from pipelines.one_or_more import ONE_OR_MORE
from pipelines.run.trackers import TrackerName
from pipelines.scores.questions import LONGEST_ANSWER

BESIDE_THE_CURVE = "beside the curve"
"""Marks the settings that do not change a loss curve: a run goes on when they do. What stands in the folders of data
and base does change it, but not where these are."""


class LoraSettings(Config):
    """Low-rank adapters (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """Scale of the update: alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update. On a GPU its masks take a third more memory with every layer adapted."""
    targets: Annotated[
        list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]], ONE_OR_MORE
    ] = Field(["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], min_length=1)
    """Linear layers that get an adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks learning (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn each weight row's length apart from its direction (DoRA, arXiv:2402.09353); slower."""


class TrainConfig(Config):
    """Fine-tune ChatGLM3 by QLoRA on prepared rows.

    Checkpoints go to OUT.run; a killed run goes on from the last one when the same command is given again. The
    predecessor's flags and its --train_args_json file are accepted too.
    """

    data: Annotated[str, BESIDE_THE_CURVE] = "out/data"
    """Folder written by prepare."""
    base: Annotated[str, BESIDE_THE_CURVE] = "tiny"
    """Model folder: an official ChatGLM3 download, a folder written by merge, or tiny."""
    out: Annotated[str, BESIDE_THE_CURVE] = "out/adapter"
    """Folder to write; OUT.run beside it holds checkpoints. Nodes of a cluster must share it."""
    prompt_format: PromptFormat = "chat"
    """chat: ChatGLM3's own turns; bare: the predecessor's plain text."""
    base_format: BaseFormat = "nf4"
    """Format of the frozen base. nf4: QLoRA with double quantisation, the smallest; fp8: the fastest, on GPUs of
    compute capability 8.9 and later (Ada, Hopper)."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    epochs: float = Field(2.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimizer steps; 0: all epochs."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimizer step over all workers, rounded to whole blocks."""
    block_tokens: int | None = Field(None, ge=16)
    """Tokens of a packed block, which is what a worker computes at once; more is faster and takes more memory. Unless
    given: 16,384, 8,192 or 4,096, whichever a GPU has memory for; 4,096 on CPU. None is smaller than the
    longest row that prepare was to let through."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which it rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    eval_steps: int = Field(0, ge=0)
    """Measure the loss on the dev rows every so many steps; 0: after each epoch. A node's notice that it will be taken
    away puts it off until the run has restarted; at the last step it follows the checkpoint."""
    score_rows: Annotated[int, BESIDE_THE_CURVE] = Field(32, ge=0)
    """Dev questions, always the same, that are answered and scored too whenever the dev loss is measured; 0: none."""
    score_tokens: Annotated[int, BESIDE_THE_CURVE] = Field(LONGEST_ANSWER, ge=1)
    """Longest of these answers in tokens."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations without a lower dev loss, and keep the adapter that had the lowest; 0: go on to
    the last step."""
    keep: Annotated[Literal["last", "best"], BESIDE_THE_CURVE] = "last"
    """Which adapter is OUT's: that of the last step, or of the lowest dev loss. Given to a finished run, best takes
    the best of the checkpoints that are left."""
    save_steps: Annotated[int, BESIDE_THE_CURVE] = Field(50, ge=0)
    """Write a checkpoint every so many steps; 0: after each epoch. Each evaluation and a node's notice that it will be
    taken away write one too. Training goes on meanwhile; what falls due during an upload is skipped, but the best one
    so far of --keep best and --patience, for which training waits until that upload has ended."""
    keep_checkpoints: Annotated[int, BESIDE_THE_CURVE] = Field(2, ge=1)
    """How many checkpoints stay: those of lowest dev loss, and always the newest."""
    storage: Annotated[str, BESIDE_THE_CURVE] = ""
    """Where checkpoints go, a folder or an address such as s3://bucket/path; unless given, OUT.run."""
    recompute: Annotated[bool | None, BESIDE_THE_CURVE] = None
    """Compute activations again in the backward pass: less memory, a third slower. Unless given: if a GPU has no
    memory for blocks of 4,096 tokens otherwise."""
    max_input_length: int = Field(1024, ge=3)
    """Prompt ids that are kept (bare format only; the chat format cuts nothing)."""
    max_output_length: int = Field(512, ge=2)
    """Answer ids that are kept (bare format only)."""
    strategy: Annotated[Strategy, BESIDE_THE_CURVE] = "ddp"
    """ddp: every worker holds the whole base, right while one GPU has room for it (ChatGLM3-6B in NF4: 4 GB); zero2:
    DeepSpeed shards gradients and optimizer; zero3: the base too (not fp8), once each has loaded it: for GPUs
    with room for the base and not for a step beside it. It gathers each layer, and layers are not compiled, so they
    take twice as long and keep more for each token. The curve is the same."""
    workers: Annotated[int, BESIDE_THE_CURVE] = Field(1, ge=1)
    """Worker processes. The loss curve does not depend on it."""
    min_workers: Annotated[int | None, BESIDE_THE_CURVE] = Field(None, ge=1)
    """Go on with as few workers as this when nodes are lost, and with more again when there are nodes for them; unless
    given, wait for all of --workers."""
    use_gpu: Annotated[bool | None, BESIDE_THE_CURVE] = None
    """Give each worker a GPU; unless given, whether the cluster has GPUs now (nodes scaled to zero do not count)."""
    max_failures: Annotated[int, BESIDE_THE_CURVE] = Field(3, ge=0)
    """How often dead workers are replaced."""
    trackers: Annotated[list[TrackerName], ONE_OR_MORE, BESIDE_THE_CURVE] = Field([])
    """Where metrics go besides TensorBoard, such as mlflow or mlflow,wandb. Their own environment variables say to
    which server and project, and hold the keys."""
    seed: int = Field(42, ge=0)
    """Seed of the adapter's start, the order of blocks and dropout."""

    @model_validator(mode="after")
    def _can_have_so_few(self) -> Self:
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than workers {self.workers}; it is the least of them"
            )
        return self
