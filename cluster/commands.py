"""Stages on the command line: flags from Config classes, run.yaml below them, errors as one line."""

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Callable
from types import FrameType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config import Config, read_section
from cluster.errors import StageError

Stage = Callable[[Any], Any]
Translate = Callable[[list[str]], list[str]]


def run_command(
    program: str,
    stages: dict[str, tuple[str, str]],
    arguments: list[str],
    errors: tuple[type[Exception], ...] = (StageError,),
    translate: dict[str, Translate] | None = None,
) -> int:
    """Run one stage from the command line and return the exit code.

    `stages` maps a command to ("module:function", one line of help); the module is imported only when its command
    runs. `errors` are printed as one line, exit code 1. `translate` may rewrite a stage's flags before they are read.
    """
    signal.signal(signal.SIGTERM, _raise_interrupt)  # `ray job stop` sends it: temporary folders must be cleaned
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview(program, stages))
            return 0
        name, flags = arguments[0], arguments[1:]
        if name not in stages:
            raise StageError(f"{name} is no command{_closest(name, list(stages))}; `{program} -h` lists them")
        stage = _load(stages[name][0])
        config = parse_config(f"{program} {name}", name, stage, (translate or {}).get(name, list)(flags), list(stages))
        stage(config)
        return 0
    except KeyboardInterrupt:
        print(
            f"\n{program}: interrupted; nothing stands half-written at --out. Run the same command to go on.",
            file=sys.stderr,
        )
        return 130
    except errors as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def parse_config(program: str, name: str, stage: Stage, flags: list[str], sections: list[str]) -> Config:
    """The config of `stage` from flags over its run.yaml section over the class's defaults."""
    config_class: type[Config] = get_type_hints(stage)["config"]
    parser = _Parser(
        prog=program,
        description=config_class.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file of settings; its section `{name}` is used, flags beat it"
    )
    _add_fields(parser, config_class, prefix="")
    parsed = vars(parser.parse_args(flags))
    path = parsed.pop("config", None)
    values = read_section(path, name, sections) if path else {}
    for flag, text in parsed.items():
        _set(values, flag.split("."), text)
    return config_class.parse(values, f"{path} and flags" if path else "flags")


class _Parser(argparse.ArgumentParser):
    """argparse that raises StageError, and guesses what a mistyped flag was meant to be."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            message = f"unknown flag {unknown}{_closest(unknown, flags)}"
        raise StageError(f"{message}; `{self.prog} -h` lists the flags")


def _closest(word: str, known: list[str]) -> str:
    guess = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {guess[0]}?" if guess else ""


def _add_fields(parser: argparse.ArgumentParser, config: type[Config], prefix: str) -> None:
    for name, field in config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            _add_fields(parser.add_argument_group(f"{prefix}{name}", kind.__doc__), kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif "positional" in field.metadata:
            parser.add_argument(name, nargs="?", metavar=name.upper(), help=field.description)
        else:
            flag = parser.add_argument(
                f"--{prefix}{name}",
                metavar=_metavar(kind),
                type=str if kind is str else _plain,
                help=f"{(field.description or '').replace('%', '%%')} {_default(field)}",
            )
            if kind is bool:  # `--strict` alone means true
                flag.nargs, flag.const = "?", True


def _metavar(kind: Any) -> str:
    parts = [part for part in get_args(kind) if part is not type(None)]
    if choices := [str(choice) for choice in parts if isinstance(choice, str)]:
        return "|".join(choices)
    if get_origin(kind) in (Union, UnionType) and len(parts) == 1:  # X | None
        return _metavar(parts[0])
    return {str: "TEXT", int: "N", float: "X", bool: "true|false"}.get(get_origin(kind) or kind, "VALUE")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "(required)"
    return "" if field.default in ("", None, (), []) else f"(default {field.default})".replace("%", "%%")


def _plain(text: str) -> Any:
    """A flag's text as YAML reads it (numbers, lists, true, null); the config's types then check it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, str) else value


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise StageError(f"{key} must hold `setting: value` lines in the config file")
    values[keys[-1]] = value


def _load(target: str) -> Stage:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _overview(program: str, stages: dict[str, tuple[str, str]]) -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, (_, text) in stages.items())
    return f"usage: {program} COMMAND [flags]\n\n{rows}\n\n`{program} COMMAND -h` explains a command's flags."


def _raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
