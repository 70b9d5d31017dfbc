"""What a load asks: rows of a file, the dev rows that prepare wrote, or random text of a given length."""

import json
import random
from pathlib import Path
from typing import Any

from cluster.errors import StageError
from serve_app.load import Prompt

CHARACTERS = "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"
"""Each is a token of its own to ChatGLM3, nearly always."""


def read_prompts(path: str, count: int, max_tokens: int, prompt_tokens: int, seed: int) -> list[Prompt]:
    """`count` prompts in random order, again from the start where there are fewer.

    A row is {"instruction"}, {"prompt"}, {"messages"}, or {"prompt_tokens": N} for random text; its own "max_tokens"
    beats the argument. Without `path` all are random texts of `prompt_tokens`. StageError names a row that is none.
    """
    chance = random.Random(seed)
    rows: list[tuple[str, dict[str, Any]]] = [("", {"prompt_tokens": prompt_tokens})]
    if path:
        rows = _rows(Path(path))
    chance.shuffle(rows)
    return [_prompt(*rows[index % len(rows)], max_tokens, chance) for index in range(count)]


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, or of a folder's dev side, and where each stands."""
    dev = path / "dev"
    files = sorted((dev if dev.is_dir() else path).glob("*.jsonl")) if path.is_dir() else [path]
    rows = []
    try:
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                rows.append((f"{file} line {number}", json.loads(line)))
    except (OSError, ValueError) as error:
        raise StageError(
            f"--prompts {path} is not readable JSON Lines ({error}); name a file or prepare's folder"
        ) from None
    if not rows:
        raise StageError(f"--prompts {path} has no rows; name a JSON Lines file or a folder that prepare wrote")
    return rows


def _prompt(where: str, row: dict[str, Any], max_tokens: int, chance: random.Random) -> Prompt:
    match row:
        case {"messages": [*messages]}:
            # A conversation to learn from ends with the answer.
            while messages and messages[-1].get("role") == "assistant":
                messages = messages[:-1]
        case {"instruction": str(text)} | {"prompt": str(text)}:
            messages = [{"role": "user", "content": text}]
        case {"prompt_tokens": int(length)}:
            messages = [{"role": "user", "content": "".join(chance.choices(CHARACTERS, k=length))}]
        case _:
            raise StageError(f"{where} has none of instruction, prompt, messages, prompt_tokens")
    return Prompt(messages, int(row.get("max_tokens", max_tokens)))
