"""ChatGLM3 natively: checkpoints, tokenizer, chat format, replies, adapters. No remote code.

Importing this package loads no torch; `load_model` brings it in when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chatglm3.chat import example_ids, prompt_ids
from chatglm3.errors import ModelError
from chatglm3.reply import Reply, parse_reply
from chatglm3.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from chatglm3.checkpoint import load_model

__all__ = ["ModelError", "Reply", "example_ids", "load_model", "load_tokenizer", "parse_reply", "prompt_ids"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        return import_module("chatglm3.checkpoint").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
