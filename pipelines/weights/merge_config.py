"""The settings of merge."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from chatglm3.chat import PromptFormat
from cluster.config import Config
from pipelines.scores.questions import LONGEST_ANSWER
from pipelines.weights.folding import Onto
from pipelines.weights.weight_formats import WeightFormat


class MergeConfig(Config):
    """Fold a LoRA adapter into its 16-bit base and write one model folder to evaluate, chat with and serve.

    Writes weights, config.json, tokenizer, README.md and SHA256SUMS to OUT, and report.html if the model is measured.
    --base DIR without --adapter only converts that model to --format. A run that was killed, failed or was refused goes
    on behind its files when the same command is given again; after a refusal also with --keep true or other limits.
    """

    adapter: str | dict[str, float] = "out/adapter"
    """Folder written by train, or a PEFT adapter of the official modelling code, which needs --base. Several adapters
    of one base are added up with factors: "{DIR: 0.7, DIR: 0.3}"."""
    base: str = ""
    """Model that the adapter was trained on: `tiny`, an official folder, or one that merge wrote in bf16. Unless given:
    where the adapter's receipt says."""
    other_base: bool = False
    """Fold the adapter into --base even if it was trained on other weights."""
    prompt_format: PromptFormat | None = None
    """How prompts looked in training, for an adapter whose receipt does not say. chat: ChatGLM3's own turns; bare: the
    predecessor's plain text."""
    format: WeightFormat = "bf16"
    """Format of the weights, with ChatGLM3-6B's size. bf16: the most exact, 12.5 GB; int8 and nf4: bitsandbytes, 6.8
    and 4.0 GB; fp8 and w4a16: compressed-tensors, which vLLM runs fastest, 6.8 and 4.0 GB."""
    onto: Literal["16bit", "nf4", "auto"] = "16bit"
    """What the adapter is added to: the base's own weights, or what NF4 leaves of them, which is what an adapter of
    --base_format nf4 was trained on. auto makes both, measures them, and of those within the limits keeps
    the one on 16 bits, unless the other's loss is lower beyond chance."""
    data: str = ""
    """Folder written by prepare, to measure and calibrate on. Unless given: what the adapter was trained on, if it is
    still there."""
    measure: bool | None = None
    """Compare the result with base and live adapter on dev rows, for which memory must hold the model. Unless given:
    if there are rows, and a GPU or a small model makes it quick."""
    score_rows: int = Field(32, ge=0)
    """When measuring: dev questions, always the same, that base and live adapter, the merged model and the quantised
    one answer, to be scored; 0: none."""
    score_tokens: int = Field(LONGEST_ANSWER, ge=1)
    """Longest of these answers in tokens."""
    calibrate: bool | None = None
    """w4a16 only: choose its values by GPTQ on training rows, which comes nearer than rounding each, but holds the
    whole model in 16 bits in memory (13 GB for ChatGLM3-6B). Unless given: as with --measure."""
    max_kl: float = Field(0.1, ge=0)
    """Limit of the KL divergence from base and live adapter, in nats a token. A model past it is not written, even if
    its loss is the lower one: it is not the model that was trained."""
    min_top1: float = Field(0.9, ge=0, le=1)
    """Limit of the same kind: least share of answer tokens at which both find the same token the likeliest."""
    keep: bool = False
    """Write the model even past these limits, and say so in its card and receipt."""
    verify: str = ""
    """A model folder: check its files against the checksums that merge wrote, and do nothing else."""
    out: str = "out/model"
    """Folder to write."""

    @model_validator(mode="before")
    @classmethod
    def _base_alone_means_no_adapter(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"adapter": "", **values} if values.get("base") else values

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapters_have_factors(cls, value: Any) -> Any:
        form = 'give several adapters with factors, such as "{out/one: 0.7, out/two: 0.3}"'
        if isinstance(value, str) and "," in value and not Path(value).exists():
            raise ValueError(f"there is no folder {value}; {form}")
        for folder, factor in value.items() if isinstance(value, dict) else ():
            if not isinstance(factor, int | float) or isinstance(factor, bool) or factor == 0:
                raise ValueError(f"{folder} has the factor {factor!r}, which is no number other than 0; {form}")
        return value

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.calibrate and self.format != "w4a16":
            raise ValueError(f"calibrate: {self.format} has nothing to calibrate, only w4a16 has; leave it out")
        if self.onto != "16bit" and not self.adapters and not self.verify:
            raise ValueError(f"onto: without --adapter there is nothing to add to {self.onto}; leave it out")
        if self.onto == "auto" and self.measure is False:
            raise ValueError("measure: --onto auto chooses by measuring; leave --measure out, or say what to add to")
        return self

    @property
    def adapters(self) -> dict[str, float]:
        """Adapter folders and their factors; none for a model that is only converted."""
        if isinstance(self.adapter, dict):
            return self.adapter
        return {self.adapter: 1.0} if self.adapter else {}

    @property
    def ontos(self) -> tuple[Onto, ...]:
        """What the adapter is added to: one, or with auto each in turn."""
        return ("16bit", "nf4") if self.onto == "auto" else (self.onto,)
