"""Base model and adapter in, one servable model folder out."""

import copy
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import GenerationConfig

from chatglm3 import load_tokenizer
from chatglm3.auto_tokenizer import write_auto_tokenizer
from chatglm3.chat import TOOLS_CONTENT, PromptFormat
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.agreement import MOST_TOKENS, shuffled_examples, take
from pipelines.folding import MergedWeights, Onto
from pipelines.gptq import Calibrated, calibrate
from pipelines.merge_report import write_merge_report
from pipelines.model_card import verify, write_card, write_sums
from pipelines.model_folders import ModelFolder, folder_digest, open_model
from pipelines.weight_files import write_weights
from pipelines.weight_formats import QUANTISE, WeightFormat, is_quantised, quantization_config
from pipelines.yardstick import Yardstick, in_memory, live_model, load_on_device

CALIBRATION_TOKENS = 1 << 15
QUICK_BYTES = 1 << 30  # of a model that a CPU measures in a minute
ONTO: tuple[Onto, ...] = ("16bit", "nf4")


class MergeConfig(Config):
    """Fold a LoRA adapter into its 16-bit base and write one model folder to evaluate, chat with and serve.

    --base DIR without --adapter only converts that model to --format.
    """

    adapter: str | dict[str, float] = "out/adapter"
    """Folder written by train, or a PEFT adapter of the official modelling code (needs --base). Several adapters of one
    base are added up with factors: "{DIR: 0.7, DIR: 0.3}"."""
    base: str = ""
    """Model that the adapter belongs to, if it is not where it was trained."""
    other_base: bool = False
    """Fold an adapter into weights that it was not trained on."""
    prompt_format: PromptFormat | None = None
    """chat|bare: what an adapter without a receipt was trained with; the predecessor's were with bare."""
    format: WeightFormat = "bf16"
    """Format of the weights. nf4 and int8: bitsandbytes; fp8 and w4a16: compressed-tensors, which vLLM runs fastest."""
    onto: Literal["16bit", "nf4", "auto"] = "16bit"
    """What an adapter is added to: the base's own weights, or what NF4 leaves of them, which QLoRA trained it on. auto
    makes both and keeps the one with the lower loss on the dev rows."""
    data: str = ""
    """Folder written by prepare, to measure on; unless given, the adapter's own, if it is still there."""
    measure: bool | None = None
    """Compare the result with base and live adapter on dev rows; unless given, where a GPU or a small model makes it
    quick."""
    calibrate: bool | None = None
    """Choose the values of w4a16 by GPTQ on training rows, not each the nearest; unless given, as with --measure."""
    max_kl: float = Field(0.1, ge=0)
    """Largest divergence from base and live adapter, in nats a token: past it nothing is written."""
    min_top1: float = Field(0.9, ge=0, le=1)
    """Least share of answer tokens at which both find the same token the likeliest."""
    keep: bool = False
    """Write the model past these limits too."""
    verify: str = ""
    """Only check this model folder's files against the checksums that merge wrote."""
    out: str = "out/model"
    """Folder to write."""

    @model_validator(mode="before")
    @classmethod
    def _base_alone_means_no_adapter(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"adapter": "", **values} if values.get("base") else values

    @property
    def adapters(self) -> dict[str, float]:
        """Adapter folders and their factors; none for a model that is only converted."""
        if isinstance(self.adapter, dict):
            return self.adapter
        return {self.adapter: 1.0} if self.adapter else {}


def merge(config: MergeConfig) -> str:
    """Fold an adapter into its base model and return the model folder."""
    if config.verify:
        print(f"merge: {config.verify}: all {verify(Path(config.verify))} files are as they were written")
        return config.verify
    storage.check_output(config.out, "merge")
    told = _told_by_all(config)
    base = open_base(config, told)
    paths = [base.path, *map(Path, config.adapters)]
    inputs = {str(path): folder_digest(path) for path in paths}
    receipt = storage.receipt_of("merge", config, inputs=inputs, facts=make_facts(config, base, told))
    with storage.publish(config.out, receipt, _digest(config, base, inputs)) as folder:
        write_companions(base.path, folder)
        yardstick = _yardstick(config, base, receipt.facts["prompt_format"])
        weights = _write_best(folder, base, config, receipt.facts, yardstick)
        if config.adapters:
            receipt.facts["onto"] = weights.onto
        if yardstick:
            receipt.counts |= _measure(folder, weights, config, yardstick)
        write_card(folder, receipt.facts, config.model_dump(), yardstick.results if yardstick else {})
        write_sums(folder)
        receipt.counts["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    names = " + ".join(name if factor == 1 else f"{factor} x {name}" for name, factor in config.adapters.items())
    what = f"{names} folded into {base.name}" if names else f"{base.name} converted"
    size = f"{receipt.counts['bytes'] / 1e6:,.1f} MB"
    print(f"merge: {what}, {config.format}, {size} in {receipt.seconds} s -> {config.out}")
    return config.out


def open_base(config: MergeConfig, told: dict[str, Any]) -> ModelFolder:
    """The model to start from. `told` is what the adapter's receipt says.

    Raises StageError if the weights are quantised by bitsandbytes, or the adapter was trained with another tokenizer
    or, unless that is asked for, on other weights.
    """
    base = open_model(config.base or told["base"], "--base")
    if "quantization_config" in base.config:
        raise StageError(f"--base {base.name} is quantised already; give the 16-bit model it was made from")
    if bits := base.config.get("quantization_bit"):
        print(f"merge: {base.name} is in the official int{bits} format; it is dequantised first", file=sys.stderr)
    adapter = ", ".join(config.adapters)
    if told.get("tokenizer", base.tokenizer) != base.tokenizer:
        raise StageError(
            f"--adapter {adapter} was trained on {told['base']}, whose tokenizer is not that of "
            f"--base {base.name}; give the model it was trained on"
        )
    if "base_digest" in told and told["base_digest"] != base.weights_digest and not config.other_base:
        raise StageError(
            f"{base.name} does not hold the weights that --adapter {adapter} was trained on ({told['base']} at "
            f"that time); give those with --base, or fold it into others knowingly with --other_base true"
        )
    return base


def make_facts(config: MergeConfig, base: ModelFolder, told: dict[str, Any]) -> dict[str, Any]:
    """What the receipt tells later stages: what the adapter's told, or without adapter the base's, and the format."""
    if not config.adapters:
        told = base.facts
    prompt_format = told.get("prompt_format", config.prompt_format or "chat")
    if config.prompt_format not in (None, prompt_format):
        raise StageError(
            f"--prompt_format {config.prompt_format}: the receipt says {prompt_format}; leave the flag out"
        )
    origin = base.location if config.adapters else told.get("base", base.location)
    if config.adapters:
        told = told | {"base_digest": base.weights_digest}
    known = {"base": origin, "prompt_format": prompt_format, "tokenizer": base.tokenizer, "format": config.format}
    return told | known


def _told_by_all(config: MergeConfig) -> dict[str, Any]:
    """What the adapters' receipts say; nothing for adapters of somebody else, or for none."""
    if not config.adapters and not config.base:
        raise StageError("--adapter and --base are both empty; give one of them")
    told = {path: _facts_of(Path(path), config) for path in config.adapters}
    for name in ("base_digest", "tokenizer", "prompt_format"):
        if len({facts.get(name) for facts in told.values()}) > 1:
            raise StageError(f"--adapter {', '.join(told)}: they differ in {name}, so they cannot be added up")
    return next(iter(told.values()), {})


def _facts_of(path: Path, config: MergeConfig) -> dict[str, Any]:
    if storage.read_receipt(path) or not (path / "adapter_config.json").is_file():
        return storage.open_folder(path, "train").receipt.facts
    if not config.base:
        raise StageError(
            f"--adapter {path} has no receipt to say what it was trained on; give that model as --base DIR"
        )
    if not config.prompt_format:
        print(
            f"merge: {path} has no receipt; taken for an adapter of the chat format "
            f"(the predecessor's were trained on bare text: --prompt_format bare)",
            file=sys.stderr,
        )
    return {}


def _digest(config: MergeConfig, base: ModelFolder, inputs: dict[str, str]) -> str:
    """Stands for the weights that are made."""
    made = [base.weights_digest, inputs, config.adapters, config.format, config.onto, config.calibrate, config.data]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _training(config: MergeConfig) -> dict[str, Any]:
    """The settings that the adapter was trained with; nothing if there is not one adapter with a receipt."""
    receipt = storage.read_receipt(next(iter(config.adapters))) if len(config.adapters) == 1 else None
    return receipt.config if receipt else {}


def _data(config: MergeConfig, base: ModelFolder, is_asked: bool | None, split: str) -> Path | None:
    """The data folder to go by; None if that is not asked for, or unasked and not quick."""
    data = config.data or _training(config).get("data", "")
    size = sum(file.stat().st_size for file in base.path.iterdir())
    is_quick = torch.cuda.is_available() or size < QUICK_BYTES
    if is_asked is False or (is_asked is None and not (is_quick and any(Path(data, split).glob("*.jsonl")))):
        return None
    if not data:
        raise StageError("--data is empty, and no adapter's receipt names a data folder: give one to go by")
    return Path(data)


def _calibrated(
    config: MergeConfig, base: ModelFolder, weights: MergedWeights, facts: dict[str, Any]
) -> Calibrated | None:
    """The weights in w4a16 by GPTQ, if that is the format and there are rows to calibrate on."""
    data = _data(config, base, config.calibrate, "train") if config.format == "w4a16" else None
    if not data:
        return None
    drawn = shuffled_examples(data, "train", base.path, facts["prompt_format"])
    rows = [example.ids for example in take(drawn, CALIBRATION_TOKENS, lambda example: len(example.ids))]
    found = calibrate(in_memory(weights), rows)
    print(
        f"merge: w4a16 by GPTQ: outputs off by {found.error:.2%}, with the nearest values {found.error_of_nearest:.2%}"
    )
    return found


def _yardstick(config: MergeConfig, base: ModelFolder, prompt_format: PromptFormat) -> Yardstick | None:
    """The model that was trained, to measure with; None where that is not asked for, or not quick."""
    data = _data(config, base, True if config.onto == "auto" else config.measure, "dev")
    if not data:
        return None
    trained = _training(config)
    drawn = shuffled_examples(data, "dev", base.path, prompt_format)
    examples = take(drawn, MOST_TOKENS, lambda example: sum(example.is_target))
    if list(config.adapters.values()) not in ([], [1.0]):
        return Yardstick("the sum in 16 bits", in_memory(MergedWeights(base.path, config.adapters, "16bit")), examples)
    adapter, in_nf4 = next(iter(config.adapters), ""), trained.get("base_format", "nf4") == "nf4"
    name = f"{'NF4' if in_nf4 else '16-bit'} base with live adapter" if adapter else base.name
    return Yardstick(name, live_model(base.path, adapter, bool(adapter) and in_nf4), examples)


def _write_best(
    folder: Path, base: ModelFolder, config: MergeConfig, facts: dict[str, Any], yardstick: Yardstick | None
) -> MergedWeights:
    """Write the model; where --onto auto leaves the choice, both, of which the one that answers better stays."""
    if config.onto != "auto":
        weights = MergedWeights(base.path, config.adapters, config.onto)
        write_model(folder, weights, config.format, _calibrated(config, base, weights, facts))
        return weights
    assert yardstick, "auto asks for one"
    tried: dict[str, MergedWeights] = {}
    losses: dict[str, float] = {}
    for onto in ONTO:
        tried[onto] = MergedWeights(base.path, config.adapters, onto)
        write_model(folder / onto, tried[onto], config.format, _calibrated(config, base, tried[onto], facts))
        losses[onto] = yardstick.measure(f"onto {onto}, {config.format}", load_on_device(folder / onto)).loss
    best = min(ONTO, key=lambda onto: losses[onto])
    for file in (folder / best).iterdir():
        file.rename(folder / file.name)
    for onto in ONTO:
        shutil.rmtree(folder / onto)
    print(f"merge: onto {best}: " + ", ".join(f"{onto} has a loss of {losses[onto]:.4f}" for onto in ONTO))
    return tried[best]


def _measure(folder: Path, weights: MergedWeights, config: MergeConfig, yardstick: Yardstick) -> dict[str, float]:
    """Measure what was written, write the report, and return the numbers. StageError for a model past the limits."""
    if config.format != "bf16" and config.adapters:
        yardstick.measure("merged, bf16", in_memory(weights))
    final = yardstick.measure(f"merged, {config.format}", load_on_device(folder))
    limits = {"kl": config.max_kl, "top1": config.min_top1}
    write_merge_report(folder / "report.html", yardstick.results, yardstick.tokens, limits, config.model_dump())
    problems = [
        f"{name} {value:.4f}, the limit is {limit:g}"
        for name, value, limit, is_past in (
            ("KL", final.kl, config.max_kl, final.kl > config.max_kl),
            ("top-1 agreement", final.top1, config.min_top1, final.top1 < config.min_top1),
        )
        if is_past
    ]
    if problems and not config.keep:
        raise StageError(
            f"the {config.format} model is too far from {yardstick.reference_name}: {'; '.join(problems)}; try another "
            f"--format or --onto, or keep it knowingly with --keep true"
        )
    print(f"merge: beside {yardstick.reference_name}: KL {final.kl:.4f}, same next token {final.top1:.1%}")
    return {"kl": round(final.kl, 6), "top1": round(final.top1, 4), "loss": round(final.loss, 4)}


def write_model(
    folder: Path, weights: MergedWeights, weight_format: WeightFormat, calibrated: Calibrated | None = None
) -> None:
    """Weights and config.json. Memory holds one file's tensors beside the mapped ones, whatever the model's size; but
    `calibrated` ones are all there already.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"  # for quantising: a minute on two cores, a second there

    def make(name: str) -> dict[str, torch.Tensor]:
        if weight_format == "bf16" or not is_quantised(name):
            return {name: weights[name]}
        if calibrated:
            return calibrated.tensors.pop(name)
        made = QUANTISE[weight_format](name, weights[name].to(device))
        return {part: tensor.cpu().contiguous() for part, tensor in made.items()}

    write_weights(folder, weights.shapes, make)
    settings = copy.deepcopy(weights.config)
    settings.architectures, settings.dtype, settings.name_or_path = ["GlmForCausalLM"], torch.bfloat16, ""
    if method := quantization_config(weight_format):
        settings.quantization_config = method
    settings.save_pretrained(folder)


def write_companions(base: Path, folder: Path) -> None:
    """The tokenizer, the weights' licence, and where generation stops: at </s>, <|user|> and <|observation|>."""
    for name in ("tokenizer.model", "MODEL_LICENSE"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_auto_tokenizer((base / "tokenizer.model").read_bytes(), folder, TOOLS_CONTENT)
    tokenizer = load_tokenizer(base)
    GenerationConfig(eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id).save_pretrained(folder)
