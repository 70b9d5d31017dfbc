"""Merge measures what it made, beside the model as it was trained, and refuses what is past the limits."""

import shutil
from collections.abc import Mapping
from math import isnan
from pathlib import Path

from chatglm3.chat import PromptFormat
from cluster.errors import StageError
from pipelines.model_folders import ModelFolder
from pipelines.weights.agreement import Example, loss_apart
from pipelines.weights.folding import MergedWeights, Onto
from pipelines.weights.merge_config import MergeConfig
from pipelines.weights.merge_report import REPORT, write_merge_report
from pipelines.weights.merge_rows import training_settings
from pipelines.weights.merge_verdict import Verdict
from pipelines.weights.yardstick import Measured, Yardstick, in_memory, live_model, load_on_device


def make_yardstick(config: MergeConfig, base: ModelFolder, data: Path, prompt_format: PromptFormat) -> Yardstick:
    """The dev rows, and how the model that was trained does on them: base and live adapters, or the base alone."""
    yardstick = Yardstick(data, base.path, prompt_format, config.score_rows, config.score_tokens)
    trainings = training_settings(config)
    in_nf4 = bool(trainings) and all(settings.get("base_format", "nf4") == "nf4" for settings in trainings)
    live = f"live adapter{'s' if len(trainings) > 1 else ''}"
    name = f"{'NF4' if in_nf4 else '16-bit'} base with {live}" if trainings else base.name
    yardstick.measure(name, live_model(base.path, config.adapters, in_nf4))
    return yardstick


def measure(
    parts: Mapping[Onto, Path], weights: Mapping[Onto, MergedWeights], config: MergeConfig, yardstick: Yardstick
) -> tuple[Onto, Measured]:
    """Measure what was written, and the best of it before it was quantised; returns which is the best."""
    found = {}
    for onto, part in parts.items():
        name = f"onto {onto}, {config.format}" if len(parts) > 1 else f"merged, {config.format}"
        found[onto] = yardstick.measure(name, load_on_device(part))
    best = best_of(found, config, yardstick.examples)
    if config.format != "bf16" and config.adapters:
        yardstick.measure("merged, bf16", in_memory(weights[best]))
    return best, found[best]


def best_of(found: Mapping[Onto, Measured], config: MergeConfig, examples: list[Example]) -> Onto:
    """Of the models within the limits, if there are any, the one onto 16 bits, unless the other's loss is lower beyond
    chance.
    """
    if len(found) == 1:
        return next(iter(found))
    in_16_bit, in_nf4 = found["16bit"].agreement, found["nf4"].agreement
    low, high = loss_apart(in_nf4, in_16_bit, examples)
    fits = [onto for onto, measured in found.items() if not past_limits(measured, config)]
    fits = fits or [onto for onto, measured in found.items() if not isnan(measured.agreement.loss)] or ["16bit"]
    best: Onto = "nf4" if fits == ["nf4"] or ("nf4" in fits and high < 0) else "16bit"
    print(
        f"merge: onto {best}: 16bit has a loss of {in_16_bit.loss:.4f}, nf4 of {in_nf4.loss:.4f}, which is "
        f"{in_nf4.loss - in_16_bit.loss:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
    )
    return best


def judge(
    folder: Path, final: Measured, errors: Mapping[str, float], config: MergeConfig, yardstick: Yardstick
) -> Verdict:
    """Write the report, and return where the model stands. `errors` are those of `calibration`.

    StageError for a model past them, unless it is to be kept; its report then lies beside --out.
    """
    far = past_limits(final, config)
    told = f"{'; '.join(far)}; loss {final.agreement.loss:.4f} beside {_reference(yardstick).agreement.loss:.4f}"
    verdict = Verdict("past the limits", told) if far else Verdict("within the limits")
    write_merge_report(folder / REPORT, yardstick, verdict, errors, config)
    if far and not config.keep:
        report = refused_report(config.out)
        shutil.copyfile(folder / REPORT, report)
        raise StageError(
            f"the {config.format} model is too far from {yardstick.reference_name}: {told}; look at {report}; try "
            f"another --format or --onto, or keep it knowingly with --keep true"
        )
    print(f"merge: beside {yardstick.reference_name}: {_summary(final)}; {verdict}")
    return verdict


def past_limits(found: Measured, config: MergeConfig) -> list[str]:
    """The limits that a model is past, and by how much."""
    kl, top1, far = found.agreement.kl, found.agreement.top1, []
    if not kl <= config.max_kl:  # nan, of a model that computes none, is past any limit
        far.append(f"KL {kl:.4f}, the limit is {config.max_kl:g}")
    if not top1 >= config.min_top1:
        far.append(f"top-1 agreement {top1:.4f}, the limit is {config.min_top1:g}")
    return far


def refused_report(out: str) -> Path:
    """Where the report of a model that was not written lies."""
    return Path(out).with_name(f"{Path(out).name}-refused.html")


def numbers(yardstick: Yardstick, final: Measured) -> dict[str, float]:
    """For the receipt: how far the final model is from the reference, and what the answers of both are worth."""
    reference = _reference(yardstick)
    found = {"kl": round(final.agreement.kl, 6), "top1": round(final.agreement.top1, 4)}
    found |= _worth("", final) | _worth("reference_", reference)
    if final.questions:
        found |= {"questions": final.questions, "same_answers": final.same_answers}
    return found


def _reference(yardstick: Yardstick) -> Measured:
    return yardstick.results[yardstick.reference_name]


def _worth(prefix: str, found: Measured) -> dict[str, float]:
    scores = {f"{prefix}{name}": round(score.value, 4) for name, score in found.scores.items()}
    return {f"{prefix}loss": round(found.agreement.loss, 4), **scores}


def _summary(found: Measured) -> str:
    near = f"KL {found.agreement.kl:.4f}, same next token {found.agreement.top1:.1%}"
    return f"{near}, {found.same_answers} of {found.questions} answers the same" if found.questions else near
