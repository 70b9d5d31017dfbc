"""The rows that merge calibrates and measures on, and the limits past which it refuses."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chatglm3.chat import PromptFormat
from cluster import storage
from cluster.errors import StageError
from pipelines.agreement import MOST_TOKENS, Agreement, shuffled_examples, take
from pipelines.folding import MergedWeights
from pipelines.gptq import Calibrated, calibrate
from pipelines.merge_report import REPORT, write_merge_report
from pipelines.model_folders import ModelFolder
from pipelines.yardstick import Yardstick, in_memory, live_model, load_on_device

if TYPE_CHECKING:
    from pipelines.merging import MergeConfig

CALIBRATION_TOKENS = 1 << 15
"""GPTQ's own experiments took 2^18, which a GPU does in minutes and two cores do not."""
NO_WORSE = 0.01  # nats: a loss that is higher by no more than this is as good
QUICK_BYTES = 1 << 30  # of a model that a CPU measures in a minute


def _training(config: "MergeConfig") -> dict[str, Any]:
    """The settings that the adapter was trained with; nothing if there is not one adapter with a receipt."""
    receipt = storage.read_receipt(next(iter(config.adapters))) if len(config.adapters) == 1 else None
    return receipt.config if receipt else {}


def _data(config: "MergeConfig", base: ModelFolder, is_asked: bool | None, split: str) -> Path | None:
    """The data folder to go by; None if that is not asked for, or unasked and not quick."""
    data = config.data or _training(config).get("data", "")
    size = sum(file.stat().st_size for file in base.path.iterdir())
    is_quick = torch.cuda.is_available() or size < QUICK_BYTES
    if is_asked is False or (is_asked is None and not (is_quick and any(Path(data, split).glob("*.jsonl")))):
        return None
    if not data:
        raise StageError("--data is empty, and no adapter's receipt names a data folder: give one to go by")
    return Path(data)


def calibration_rows(config: "MergeConfig", base: ModelFolder) -> Path | None:
    """The data folder that w4a16 is calibrated on; None for another format, and where there are no rows."""
    return _data(config, base, config.calibrate, "train") if config.format == "w4a16" else None


def calibration(
    config: "MergeConfig", base: ModelFolder, weights: MergedWeights, facts: dict[str, Any]
) -> Callable[[], Calibrated] | None:
    """What makes the weights in w4a16 by GPTQ, once; None if another format is asked for, or there are no rows."""
    data = calibration_rows(config, base)
    if not data:
        return None

    @cache
    def calibrated() -> Calibrated:
        drawn = shuffled_examples(data, "train", base.path, facts["prompt_format"])
        rows = [example.ids for example in take(drawn, CALIBRATION_TOKENS, lambda example: len(example.ids))]
        found = calibrate(in_memory(weights), rows)
        print(
            f"merge: w4a16 by GPTQ: outputs off by {found.error:.2%}, with the nearest values "
            f"{found.error_of_nearest:.2%}"
        )
        return found

    return calibrated


def make_yardstick(config: "MergeConfig", base: ModelFolder, prompt_format: PromptFormat) -> Yardstick | None:
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


def measure(folder: Path, weights: MergedWeights, config: "MergeConfig", yardstick: Yardstick) -> dict[str, float]:
    """Measure what was written, write the report, and return the numbers.

    StageError for a model past the limits that answers worse too.
    """
    if config.format != "bf16" and config.adapters:
        yardstick.measure("merged, bf16", in_memory(weights))
    final = yardstick.measure(f"merged, {config.format}", load_on_device(folder))
    limits = {"kl": config.max_kl, "top1": config.min_top1}
    write_merge_report(folder / REPORT, yardstick.results, yardstick.tokens, limits, config.model_dump())
    _hold_to_limits(final, config, yardstick)
    print(f"merge: beside {yardstick.reference_name}: KL {final.kl:.4f}, same next token {final.top1:.1%}")
    return {"kl": round(final.kl, 6), "top1": round(final.top1, 4), "loss": round(final.loss, 4)}


def _hold_to_limits(final: Agreement, config: "MergeConfig", yardstick: Yardstick) -> None:
    far = []
    if final.kl > config.max_kl:
        far.append(f"KL {final.kl:.4f}, the limit is {config.max_kl:g}")
    if final.top1 < config.min_top1:
        far.append(f"top-1 agreement {final.top1:.4f}, the limit is {config.min_top1:g}")
    if not far:
        return
    loss = yardstick.results[yardstick.reference_name].loss
    told = f"{'; '.join(far)}; loss {final.loss:.4f} beside {loss:.4f}"
    # The 16-bit base can be far from the NF4 one that an adapter was trained on, and better.
    if final.loss > loss + NO_WORSE and not config.keep:
        raise StageError(
            f"the {config.format} model is too far from {yardstick.reference_name}: {told}; try another --format or "
            f"--onto, or keep it knowingly with --keep true"
        )
    print(f"merge: far from {yardstick.reference_name}, but kept: {told}")
