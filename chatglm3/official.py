"""The official ChatGLM3 layout (config.json and tensors) in terms of transformers' GlmForCausalLM."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GlmConfig

from chatglm3.errors import ModelError
from chatglm3.weights import Weight

_SIZES = {
    "padded_vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
}
"""Official config field -> GlmConfig field, one to one."""

_ARCHITECTURE: dict[str, Any] = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}
"""What GlmForCausalLM computes. With any other value the official code computes something else."""

_ROTARY_BUFFER = "transformer.rotary_pos_emb.inv_freq"


class OfficialTensor(NamedTuple):
    """A tensor of the official layout: its shape, and the native tensors it holds, each with its rows, in order."""

    shape: tuple[int, ...]
    parts: dict[str, int]


class _Rows(NamedTuple):
    """A native tensor as an official folder stores it."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    """[rows] of an int8 or int4 one."""
    columns: int
    """Of the tensor itself: an int4 one is stored in half as many."""


def translate_config(folder: Path, raw: dict[str, Any]) -> GlmConfig:
    """GlmConfig of the official config.json `raw`. ModelError names a field of another model family."""
    file = folder / "config.json"
    _refuse_other_families(folder, raw)
    for field, value in _ARCHITECTURE.items():
        if raw.get(field, value) != value:
            raise ModelError(f"{file}: {field} is {raw[field]!r}, ChatGLM3-6B has {value!r}: use a ChatGLM3-6B folder")
    for field in _SIZES:
        if not isinstance(raw.get(field), int):
            raise ModelError(f"{file}: {field} is {raw.get(field)!r}, not a number: use a ChatGLM3-6B folder")
    dtype = raw.get("torch_dtype", "float16")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ModelError(f"{file}: torch_dtype is {dtype!r}: write float16, which ChatGLM3-6B has")
    return GlmConfig(
        **{native: raw[field] for field, native in _SIZES.items()},
        rms_norm_eps=raw.get("layernorm_epsilon", 1e-5),
        attention_bias=raw.get("add_qkv_bias", False),
        attention_dropout=raw.get("attention_dropout", 0.0),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * raw.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        # GlmConfig's own defaults are GLM-4's.
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )


def _refuse_other_families(folder: Path, raw: dict[str, Any]) -> None:
    file = folder / "config.json"
    if "padded_vocab_size" not in raw:
        raise ModelError(f"{file}: padded_vocab_size is missing, as in the first ChatGLM-6B: use a ChatGLM3-6B folder")
    if (raw.get("eos_token_id", 2), raw.get("pad_token_id", 0)) != (2, 0):
        raise ModelError(f"{file}: eos_token_id is {raw.get('eos_token_id')}, as in GLM-4: use a ChatGLM3-6B folder")
    # ChatGLM2's config has the same fields and values; its name differs, and its tokenizer has no chat roles.
    tokenizer_code = folder / "tokenization_chatglm.py"
    named = any(name in str(raw.get("_name_or_path")).lower() for name in ("chatglm2", "codegeex2"))
    if named or (tokenizer_code.is_file() and "<|user|>" not in tokenizer_code.read_text(encoding="utf-8")):
        raise ModelError(
            f"{file}: this is ChatGLM2 (_name_or_path {raw.get('_name_or_path')!r}): use a ChatGLM3-6B folder"
        )


def layout(config: GlmConfig) -> dict[str, OfficialTensor]:
    """Name -> tensor of every tensor of an official checkpoint, but for the rotary buffer."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    assert config.head_dim is not None and config.num_key_value_heads is not None
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    qkv = query + 2 * key
    tensors = {
        "transformer.embedding.word_embeddings.weight": _whole("model.embed_tokens.weight", config.vocab_size, hidden),
        "transformer.encoder.final_layernorm.weight": _whole("model.norm.weight", hidden),
        "transformer.output_layer.weight": _whole("lm_head.weight", config.vocab_size, hidden),
    }
    for number in range(config.num_hidden_layers):
        old, new = f"transformer.encoder.layers.{number}.", f"model.layers.{number}."
        attention = f"{new}self_attn."
        for kind, shape in (("weight", (qkv, hidden)), ("bias", (qkv,))):
            if kind == "weight" or config.attention_bias:
                rows = {f"{attention}{name}_proj.{kind}": size for name, size in (("q", query), ("k", key), ("v", key))}
                tensors[f"{old}self_attention.query_key_value.{kind}"] = OfficialTensor(shape, rows)
        tensors |= {
            f"{old}self_attention.dense.weight": _whole(f"{attention}o_proj.weight", hidden, query),
            f"{old}mlp.dense_h_to_4h.weight": _whole(f"{new}mlp.gate_up_proj.weight", 2 * ffn, hidden),
            f"{old}mlp.dense_4h_to_h.weight": _whole(f"{new}mlp.down_proj.weight", hidden, ffn),
            f"{old}input_layernorm.weight": _whole(f"{new}input_layernorm.weight", hidden),
            f"{old}post_attention_layernorm.weight": _whole(f"{new}post_attention_layernorm.weight", hidden),
        }
    return tensors


def native_shapes(config: GlmConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the native model."""
    return {name: (rows, *shape[1:]) for shape, parts in layout(config).values() for name, rows in parts.items()}


def _whole(native: str, *shape: int) -> OfficialTensor:
    return OfficialTensor(shape, {native: shape[0]})


class NativeTensors(Mapping[str, torch.Tensor]):
    """Native name -> tensor of an official folder: rows of the official one, which stay on disk until they are used.

    Where that is int8 or int4, they are dequantised each time they are asked for: memory need not hold all of them.
    """

    def __init__(self, rows: dict[str, _Rows]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> torch.Tensor:
        rows = self._rows[name]
        return rows.stored if rows.scale is None else dequantise(rows.stored, rows.scale, rows.columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def native_tensors(folder: Path, weights: dict[str, Weight], config: GlmConfig) -> NativeTensors:
    """The tensors of an official folder. ModelError if one is missing, left over or of another shape."""
    expected = layout(config)
    quantised = {f"{name}_scale" for name, (_, tensor) in weights.items() if tensor.dtype == torch.int8}
    for name in expected:
        if name not in weights:
            raise ModelError(f"{folder}: no weight file holds {name}: download the folder again, completely")
    for name, (file, _) in weights.items():
        if name not in expected and name not in quantised and name != _ROTARY_BUFFER:
            raise ModelError(f"{file}: {name} is not in the model of config.json: use its own config.json")
    native: dict[str, _Rows] = {}
    for name, (shape, parts) in expected.items():
        stored, scale = weights[name].tensor, _scale(name, weights, shape)
        if scale is None and (stored.shape != shape or not stored.is_floating_point()):
            found = f"{stored.dtype} {tuple(stored.shape)}"
            raise ModelError(
                f"{weights[name].file}: {name} is {found}, config.json wants {shape}: use its own config.json"
            )
        sizes = list(parts.values())
        scales = [None] * len(sizes) if scale is None else torch.split(scale, sizes)
        for part, rows, row_scales in zip(parts, torch.split(stored, sizes), scales, strict=True):
            native[part] = _Rows(rows, row_scales, shape[-1])
    return NativeTensors(native)


def _scale(name: str, weights: dict[str, Weight], shape: tuple[int, ...]) -> torch.Tensor | None:
    """The scales [rows] of that tensor, if it is a well-formed int8 or int4 matrix of that shape."""
    stored, scale = weights[name].tensor, weights.get(f"{name}_scale")
    if stored.dtype != torch.int8 or scale is None or stored.dim() != 2 or scale.tensor.shape != shape[:1]:
        return None
    is_whole = len(stored) == shape[0] and shape[1] in (stored.shape[1], 2 * stored.shape[1])
    return scale.tensor if is_whole else None


def dequantise(weight: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Weights [out, columns] in the scale's dtype, of official int8 [out, columns] or int4 [out, columns / 2] ones.

    Quantisation is symmetric with one scale [out] per row. The high half of an int4 byte is the even column.
    """
    if weight.shape[1] * 2 == columns:
        weight = torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(1)
    return weight.to(scale.dtype) * scale[:, None]
