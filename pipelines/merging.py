"""Base model and adapter in, one servable model folder out."""

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig

from chatglm3 import load_tokenizer
from chatglm3.auto_tokenizer import write_auto_tokenizer
from chatglm3.chat import TOOLS_CONTENT
from cluster import storage
from pipelines.model_folders import ModelFolder, folder_digest
from pipelines.weights.calibration import read_errors, write_errors
from pipelines.weights.checksums import SUMS, verify, write_sums
from pipelines.weights.folding import MergedWeights, Onto
from pipelines.weights.gptq import calibrate
from pipelines.weights.merge_config import MergeConfig
from pipelines.weights.merge_inputs import make_facts, open_base, told_by_all
from pipelines.weights.merge_measures import judge, make_yardstick, measure, numbers, refused_report
from pipelines.weights.merge_report import REPORT
from pipelines.weights.merge_rows import calibration_ids, calibration_rows, data_digest, measuring_rows
from pipelines.weights.merge_verdict import Verdict
from pipelines.weights.model_card import write_card
from pipelines.weights.weight_files import are_written, write_weights
from pipelines.weights.weight_formats import QUANTISE, Tensors, WeightFormat, is_quantised, quantization_config
from pipelines.weights.yardstick import Yardstick, in_memory


def merge(config: MergeConfig) -> str:
    """Fold an adapter into its base model and return the model folder."""
    if config.verify:
        print(f"merge: {config.verify}: all {verify(Path(config.verify))} files are as they were written")
        return config.verify
    storage.check_output(config.out, "merge")
    told = told_by_all(config)
    base = open_base(config, told)
    measured_on, calibrated_on = measuring_rows(config, base), calibration_rows(config, base)
    models = {str(path): folder_digest(path) for path in (base.path, *map(Path, config.adapters))}
    inputs = models | {str(data): data_digest(data) for data in (measured_on, calibrated_on) if data}
    receipt = storage.receipt_of("merge", config, inputs=inputs, facts=make_facts(config, base, told))
    prompt_format = receipt.facts["prompt_format"]
    weights = {onto: MergedWeights(base.path, config.adapters, onto) for onto in config.ontos}
    rows = calibration_ids(calibrated_on, base.path, prompt_format) if calibrated_on else []
    yardstick = make_yardstick(config, base, measured_on, prompt_format) if measured_on else None
    refused_report(config.out).unlink(missing_ok=True)
    with storage.publish(config.out, receipt, _digest(config, base, models, rows), write_sums) as folder:
        for name in (REPORT, SUMS, storage.RECEIPT):  # of a run that was killed when its weights were written
            (folder / name).unlink(missing_ok=True)
        write_companions(base.path, folder)
        parts = _write_models(folder, weights, config, rows)
        best, verdict, counts = _measured(folder, parts, weights, config, yardstick)
        _keep(best, parts, folder)
        receipt.counts |= counts
        receipt.facts |= verdict.facts() | ({"onto": best} if config.adapters else {})
        write_card(folder, receipt.facts, config, yardstick)
        receipt.counts["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    size = f"{receipt.counts['bytes'] / 1e6:,.1f} MB"
    print(f"merge: {_what(config, base)}, {config.format}, {size} in {receipt.seconds} s -> {config.out}")
    return config.out


def _what(config: MergeConfig, base: ModelFolder) -> str:
    names = " + ".join(name if factor == 1 else f"{factor} x {name}" for name, factor in config.adapters.items())
    return f"{names} folded into {base.name}" if names else f"{base.name} converted"


def _digest(config: MergeConfig, base: ModelFolder, models: dict[str, str], rows: list[list[int]]) -> str:
    """Stands for the weights that are made: files that another run of the same digest wrote are gone on behind."""
    made = [base.weights_digest, models, config.adapters, config.format, config.onto, rows]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _write_models(
    folder: Path, weights: Mapping[Onto, MergedWeights], config: MergeConfig, rows: list[list[int]]
) -> dict[Onto, Path]:
    """Write a model of each of the weights; returns where it is: if there are several, in a folder of its own."""
    parts = {onto: folder / onto if len(weights) > 1 else folder for onto in weights}
    for onto, part in parts.items():
        write_model(part, weights[onto], config.format, rows)
    return parts


def _measured(
    folder: Path,
    parts: Mapping[Onto, Path],
    weights: Mapping[Onto, MergedWeights],
    config: MergeConfig,
    yardstick: Yardstick | None,
) -> tuple[Onto, Verdict, dict[str, float]]:
    """Which of the models stays, where it stands, and the numbers for the receipt. StageError as `judge`."""
    if not yardstick:
        (best,) = parts
        return best, Verdict(), read_errors(parts[best])
    best, final = measure(parts, weights, config, yardstick)
    errors = read_errors(parts[best])
    return best, judge(folder, final, errors, config, yardstick), numbers(yardstick, final) | errors


def _keep(best: Onto, parts: Mapping[Onto, Path], folder: Path) -> None:
    """Move the best of the models that --onto auto wrote out of its folder, and remove these folders."""
    if len(parts) > 1:
        for file in parts[best].iterdir():
            file.rename(folder / file.name)
        for part in parts.values():
            shutil.rmtree(part)


def write_model(folder: Path, weights: MergedWeights, weight_format: WeightFormat, rows: list[list[int]]) -> None:
    """Weights and config.json; w4a16 by GPTQ if there are `rows` of ids to go by, else each value the nearest.

    Memory holds one file's tensors beside the mapped ones, whatever the model's size; with GPTQ, the whole model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"  # for quantising: a minute on two cores, a second there
    chosen: dict[str, Tensors] = {}
    if rows and not are_written(folder, weights.shapes):
        found = calibrate(in_memory(weights), rows)
        write_errors(folder, found)
        chosen = found.tensors

    def make(name: str) -> Tensors:
        if weight_format == "bf16" or not is_quantised(name):
            return {name: weights[name]}
        if chosen:
            return chosen.pop(name)
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
