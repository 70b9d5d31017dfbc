"""What a merged model says of itself: README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.weights.calibration import errors_text, read_errors
from pipelines.weights.merge_config import MergeConfig
from pipelines.weights.merge_report import limits_text, measured_table, measured_text, scores_table
from pipelines.weights.merge_verdict import read_verdict
from pipelines.weights.weight_formats import WeightFormat
from pipelines.weights.yardstick import Yardstick


def write_card(folder: Path, facts: Mapping[str, Any], config: MergeConfig, yardstick: Yardstick | None) -> None:
    """Write README.md."""
    recipe = {
        "base": facts["base"],
        "adapter": config.adapter or "none: the base was only converted",
        **{f"trained: {name}": _words(settings) for name, settings in facts.get("recipe", {}).items()},
        "added to": facts.get("onto", ""),
        "format": facts["format"],
        "calibration": errors_text(read_errors(folder)),
        "prompt format": facts["prompt_format"],
        "data set (sha256 of its rows)": facts.get("dataset", ""),
        "data preset": facts.get("preset", ""),
        "training run (digest)": facts.get("run", ""),
        "limits": limits_text(config.max_kl, config.min_top1),
        "verdict": read_verdict(facts),
        "verdict on the base": read_verdict(facts, "base_"),
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in recipe.items() if value)
    sections = [
        f"---\n{_HEAD}{_license(folder, facts)}---",
        f"# ChatGLM3, tuned to answer from documents\n\n| | |\n|---|---|\n{rows}",
        f"## Agreement\n\n{_agreement(yardstick)}",
        f"## Use\n\n{_USE[config.format]}\n\n{_PROMPTS}",
        f"## Limits\n\n{_LIMITS}",
        f"## Licence\n\n{_LICENCE[facts['license']]}",
    ]
    (folder / "README.md").write_text("\n\n".join(map(str.strip, sections)) + "\n", encoding="utf-8")


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _license(folder: Path, facts: Mapping[str, Any]) -> str:
    if facts["license"] == "apache-2.0":
        return "license: apache-2.0\n"
    link = "license_link: MODEL_LICENSE\n" if (folder / "MODEL_LICENSE").is_file() else ""
    return f"license: other\nlicense_name: {facts['license']}\n{link}"


def _agreement(yardstick: Yardstick | None) -> str:
    if not yardstick:
        return "Not measured: `merge --measure true` does it."
    tables = [_table(*measured_table(yardstick.results))]
    tables += [_table(*scores_table(yardstick.results))] if yardstick.questions else []
    return "\n\n".join([measured_text(yardstick), *tables])


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rules = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rules, *lines))


_HEAD = """\
library_name: transformers
pipeline_tag: text-generation
language: [zh, en]
"""

_BITSANDBYTES = """\
`AutoModelForCausalLM.from_pretrained` (with the `bitsandbytes` package) and `AutoTokenizer.from_pretrained` load this
folder without other code, and so does vLLM with the package `vllm-bnb-plugin`; fp8 and w4a16 are faster there."""
_COMPRESSED = """\
vLLM loads this folder without other code, and so do `AutoModelForCausalLM.from_pretrained` (with the
`compressed-tensors` package) and `AutoTokenizer.from_pretrained`."""
_USE: dict[WeightFormat, str] = {
    "bf16": "vLLM, `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load this folder without "
    "other code.",
    "nf4": _BITSANDBYTES,
    "int8": _BITSANDBYTES,
    "fp8": _COMPRESSED,
    "w4a16": _COMPRESSED,
}

_PROMPTS = """\
Generation stops at `</s>`, `<|user|>` and `<|observation|>`.

The chat template makes one text of a conversation: `<|user|>` inside a message or a document becomes a control token
there, and can pose as another role. For texts that are not your own, encode each message apart, as the service of this
project does."""

_LIMITS = """\
Answers are learned from one collection of documents and questions: measure on your own before you rely on them
(`python -m pipelines evaluate`)."""

_LICENCE = {
    "apache-2.0": "The tiny model that this one was made from, and so this one, is under the Apache License 2.0.",
    "chatglm3-6b-model-license": "The weights of ChatGLM3-6B have a licence of their own, which holds for what is made "
    "of them: MODEL_LICENSE, which comes with their download.",
}
