"""The tokenizer in the files that transformers' AutoTokenizer and vLLM read, with ChatGLM3's chat template.

What this cannot do: "<|user|>" or "</s>" in a text becomes a control token, and a template makes one text of a whole
conversation, so that a message or a document can pose as another role. `chatglm3.chat` has no such hole.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from chatglm3.tokenizer import CONTROL_TOKENS

_NORMAL = 1  # ModelProto.SentencePiece.Type.NORMAL: neither <s> nor a byte

# Each message is its role, a line with its metadata, and its content, which SentencePiece puts a space before.
CHAT_TEMPLATE = """\
{%- macro body(message) -%}
{{ '\\n' }}{% if message['content'] %}{{ ' ' + message['content'] }}{% endif %}
{%- endmacro -%}
[gMASK]sop
{%- if tools -%}
{%- set told = messages[0]['content'] if messages[0]['role'] == 'system' else TOOLS_CONTENT -%}
<|system|>{{ '\\n ' + told + '\\n' + (tools | tojson(indent=4)) }}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message['role'] == 'system') -%}
{%- set role = 'observation' if message['role'] == 'tool' else message['role'] -%}
{{ '<|' + role + '|>' + (message['metadata'] or '') + body(message) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


def write_auto_tokenizer(model: bytes, folder: Path, tools_content: str) -> None:
    """Write tokenizer.json and tokenizer_config.json of a SentencePiece model (the content of tokenizer.model).

    `tools_content` is what a system message says before the tools if the conversation has none of its own.
    """
    convert(model).save(str(folder / "tokenizer.json"))
    template = CHAT_TEMPLATE.replace("TOOLS_CONTENT", repr(tools_content))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def convert(model: bytes) -> Tokenizer:
    """A SentencePiece BPE model with byte fallback as a Hugging Face tokenizer: equal ids, and the same text back."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    bpe = BPE(vocabulary, _merges(proto, vocabulary), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    prefix = ("[gMASK]", "sop")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(prefix)} $A", special_tokens=[(token, tokenizer.token_to_id(token)) for token in prefix]
    )
    return tokenizer


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two, the most likely piece first: what SentencePiece joins in that order."""
    normal = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (-piece.score, vocabulary[start], vocabulary[end], start, end)
        for piece in proto.pieces
        if piece.piece in normal
        for start, end in ((piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece)))
        if start in normal and end in normal
    ]
    return [(start, end) for *_, start, end in sorted(merges)]
