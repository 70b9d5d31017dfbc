"""The predecessor's train flags and its JSON file of Hugging Face TrainingArguments, translated to ours by name."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.errors import StageError

RENAMED = {
    "--model_name_or_path": "--base",
    "--lora_rank": "--lora.rank",
    "--lora_dim": "--lora.alpha",  # its code passes lora_dim as LoraConfig's lora_alpha
}
LORA = [
    *("--lora.rank", "4", "--lora.alpha", "8", "--lora.dropout", "0.05"),
    *("--lora.targets", "[q_proj, k_proj, v_proj]"),
]
ROW_FILES = ("--train_data_path", "--eval_data_path")
BARE_ONLY = ("--max_input_length", "--max_output_length")
HF_DEFAULTS = {"per_device_train_batch_size": 8, "learning_rate": 5e-5, "num_train_epochs": 3.0, "warmup_ratio": 0.0}
"""Of TrainingArguments, where train has others."""
ENDLESS = "1000000"
HF_STEPS = 500  # TrainingArguments' own default of save_steps and logging_steps


def translate_flags(flags: list[str]) -> list[str]:
    """Our flags for the predecessor's, the rest unchanged. What came from its JSON file goes first, so flags beat it.

    Prints to stderr what became of each field and flag. Raises StageError naming a field that has no meaning here.
    """
    settings: list[str] = []
    own: list[str] = []
    row_files: list[tuple[str, str]] = []
    words = iter(_split_equals(flags))
    for word in words:
        if word == "--train_args_json":
            settings += read_training_arguments(_value(word, words))
        elif word in ROW_FILES:
            row_files.append((word, _value(word, words)))
        elif word in RENAMED:
            value = _value(word, words)
            own += _told(word, value, [RENAMED[word], value])
        else:
            own.append(word)
    if ("--prompt_format", "bare") not in pairwise(own):
        for flag in BARE_ONLY:
            if flag in own:
                print(f"train: {flag}: no effect unless --prompt_format bare", file=sys.stderr)
    return settings + own + _data_flags(row_files, own)


def read_training_arguments(path: str) -> list[str]:
    """The flags that a TrainingArguments JSON file amounts to. Raises StageError."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(
            f"--train_args_json {path}: {error.strerror}; name the JSON file of training arguments"
        ) from None
    except ValueError as error:
        raise StageError(f"--train_args_json {path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise StageError(f"--train_args_json {path} must hold one object of training arguments")
    flags: list[str] = []
    absent = {name: value for name, value in HF_DEFAULTS.items() if name not in fields}
    fields |= absent
    for name, value in fields.items():
        translate = FIELDS.get(name)
        if translate is None:
            raise StageError(f"--train_args_json {path}: {name} has no meaning here; take it out (see train -h)")
        new, remark = translate(value, fields, f"--train_args_json {path}: {name}")
        flags += _told(name, value, new, remark or ("Hugging Face's default" if name in absent else ""))
    print(f"train: its adapters, unless flags say otherwise -> {' '.join(LORA)}", file=sys.stderr)
    return [*flags, *LORA]


Translated = tuple[list[str], str]
Translator = Callable[[Any, dict[str, Any], str], Translated]


def _flag(name: str) -> Translator:
    return lambda value, fields, where: ([name, str(value)], "")


def _only(allowed: Any, remark: str) -> Translator:
    """A field that is accepted with one value: the one that describes what is done here anyway."""

    def translate(value: Any, fields: dict[str, Any], where: str) -> Translated:
        if value != allowed:
            raise StageError(f"{where}: {value!r} is not supported, only {allowed!r}; change it or take it out")
        return [], remark

    return translate


def _remark(text: str) -> Translator:
    return lambda value, fields, where: ([], text)


def _batch_size(value: Any, fields: dict[str, Any], where: str) -> Translated:
    steps = fields.get("gradient_accumulation_steps", 1)
    for size in (value, steps):
        if not isinstance(size, int):
            raise StageError(f"{where} or gradient_accumulation_steps: {size!r} is no whole number; write one")
    remark = "of all workers together; Hugging Face's Trainer would take as many for each worker"
    return ["--batch_size", str(value * steps)], remark


def _max_steps(value: Any, fields: dict[str, Any], where: str) -> Translated:
    if _is_limit(value):
        return ["--max_steps", str(value), "--epochs", ENDLESS], "however many epochs that takes"
    return ["--max_steps", "0"], ""


def _epochs(value: Any, fields: dict[str, Any], where: str) -> Translated:
    if _is_limit(fields.get("max_steps")):
        return [], "no effect: max_steps is given"
    return ["--epochs", str(value)], ""


def _is_limit(max_steps: Any) -> bool:
    return isinstance(max_steps, int) and max_steps > 0


def _schedule(value: Any, fields: dict[str, Any], where: str) -> Translated:
    if value not in ("linear", "cosine", "constant"):
        raise StageError(f"{where}: {value!r} is not supported; choose linear, cosine or constant")
    return ["--schedule", value], ""


def _every(flag: str, steps_field: str, default_field: str) -> Translator:
    """save_strategy and evaluation_strategy: `steps` leaves the number to its own field, `epoch` is our 0.

    Without a number, Hugging Face's Trainer saves every 500 steps and evaluates as often as it logs.
    """

    def translate(value: Any, fields: dict[str, Any], where: str) -> Translated:
        if value == "steps":
            if fields.get(steps_field):
                return [], f"every {steps_field}"
            return [flag, str(fields.get(default_field) or HF_STEPS)], f"no {steps_field} is given"
        if value == "epoch":
            return [flag, "0"], ""
        raise StageError(f"{where}: {value!r} is not supported; choose steps or epoch")

    return translate


def _steps(flag: str, strategy_fields: tuple[str, ...]) -> Translator:
    def translate(value: Any, fields: dict[str, Any], where: str) -> Translated:
        if "epoch" in (fields.get(name) for name in strategy_fields):
            return [], "no effect: the strategy is epoch"
        return ([flag, str(value)], "") if value else ([], "not given")

    return translate


FIELDS: dict[str, Translator] = {
    "output_dir": _flag("--out"),
    "per_device_train_batch_size": _batch_size,
    "gradient_accumulation_steps": _remark("counted in --batch_size"),
    "per_device_eval_batch_size": _remark("no effect: dev rows are packed into blocks of --block_tokens"),
    "learning_rate": _flag("--learning_rate"),
    "num_train_epochs": _epochs,
    "max_steps": _max_steps,
    "lr_scheduler_type": _schedule,
    "warmup_ratio": _flag("--warmup_ratio"),
    "weight_decay": _flag("--weight_decay"),
    "max_grad_norm": _flag("--max_grad_norm"),
    "logging_steps": _remark("every step is logged"),
    "save_strategy": _every("--save_steps", "save_steps", "save_steps"),
    "save_steps": _steps("--save_steps", ("save_strategy",)),
    "save_total_limit": _flag("--keep_checkpoints"),
    "evaluation_strategy": _every("--eval_steps", "eval_steps", "logging_steps"),
    "eval_strategy": _every("--eval_steps", "eval_steps", "logging_steps"),
    "eval_steps": _steps("--eval_steps", ("evaluation_strategy", "eval_strategy")),
    "gradient_checkpointing": _flag("--recompute"),
    "optim": _only("adamw_torch", "the optimizer is AdamW"),
    "fp16": _only(False, "computed in bfloat16"),
    "remove_unused_columns": _only(False, "rows hold just what is needed"),
    "ddp_find_unused_parameters": _only(False, "every adapter is used"),
    "seed": _flag("--seed"),
}


def _data_flags(row_files: list[tuple[str, str]], own: list[str]) -> list[str]:
    """`--data FOLDER` for files or folders of rows, which must all lie in one folder that prepare wrote."""
    given = [value for flag, value in pairwise(own) if flag == "--data"]
    known = bool(given)
    for flag, path in row_files:
        folder = _prepared_folder(flag, path)
        for other in given:
            if os.path.realpath(other) != os.path.realpath(folder):
                raise StageError(
                    f"{flag} {path}: training and dev rows must lie in one prepared folder, not also in {other}"
                )
        given.append(_told(flag, path, ["--data", folder])[1])
    return ["--data", given[0]] if given and not known else []


def _prepared_folder(flag: str, path: str) -> str:
    place = Path(path)
    if place.suffix in (".json", ".jsonl"):
        place = place.parent
    folder = place.parent if place.name in ("train", "dev") else place
    if not (folder / "receipt.json").is_file():
        raise StageError(
            f"{flag} {path}: not written by prepare; run prepare --raw SHARDS --out {folder}, then --data {folder}"
        )
    return str(folder)


def _told(name: str, value: Any, new: list[str], remark: str = "") -> list[str]:
    """The new flags, after saying on stderr that this is what the old setting became."""
    became = " ".join(new)
    print(
        f"train: {name}: {value} -> {f'{became} ({remark})' if became and remark else became or remark}",
        file=sys.stderr,
    )
    return new


def _split_equals(flags: list[str]) -> list[str]:
    return [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]


def _value(flag: str, words: Iterator[str]) -> str:
    value = next(words, None)
    if value is None:
        raise StageError(f"{flag} needs a value")
    return value
