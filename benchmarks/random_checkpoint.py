"""Write a model folder of ChatGLM3-6B's shape with random weights, to measure speed and memory where no download is.

    python -m benchmarks.random_checkpoint --out /tmp/random-6b
    python -m benchmarks.random_checkpoint --out /tmp/random-2-layers --layers 2

The layout is the official one (fp16 safetensors, config.json); the tokenizer is the tiny model's, whose ids are valid
here. Answers are noise, of tokens that this tokenizer can write and without end: all others have no weight in the
output layer. Tensors, shapes and bytes are those of the real thing: 12.5 GB with all 28 layers.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GlmConfig

from chatglm3.official import layout, native_shapes, translate_config
from chatglm3.tiny import FOLDER as TINY
from chatglm3.tokenizer import load_tokenizer

CHATGLM3_6B: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHARD_BYTES = 2 << 30


def native_config(layers: int) -> GlmConfig:
    """ChatGLM3-6B's config as transformers', with so many layers."""
    return translate_config(Path("."), CHATGLM3_6B | {"num_layers": layers})


def random_state(config: GlmConfig, device: torch.device) -> dict[str, Tensor]:
    """Random weights in bfloat16 by native name, made on `device`: seconds on a GPU."""
    torch.manual_seed(0)
    return {name: _random(name, shape, device) for name, shape in native_shapes(config).items()}


def _random(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if len(shape) == 2:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16, device=device)


def write(folder: Path, layers: int) -> int:
    """Write the folder; returns the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CHATGLM3_6B | {"num_layers": layers}, indent=2) + "\n")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(Path(TINY) / name, folder / name)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(_official_tensors(layers)), 1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _official_tensors(layers: int) -> Iterator[tuple[str, Tensor]]:
    # Drawing 6 billion normal numbers takes minutes on a CPU. A pool of a prime length, read on and on, has no two
    # rows alike within its 67 million numbers, and makes every matrix of full rank.
    pool = torch.randn(67_108_859, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    place, tokenizer = 0, load_tokenizer(TINY)
    for name, (shape, _) in layout(native_config(layers)).items():
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        if len(shape) == 2:
            end = place + size
            tensor = pool.repeat(-(-end // len(pool)))[place:end].view(shape).clone()
            if name.endswith("output_layer.weight"):
                tensor[[*tokenizer.stop_ids, *range(tokenizer.vocab_size, shape[0])]] = 0
            yield name, tensor
            place = end % len(pool)
        else:
            yield name, (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.float16)


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        shard[name] = tensor
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers; 28 as in ChatGLM3-6B (default)")
    options = parser.parse_args()
    started = time.monotonic()
    size = write(options.out, options.layers)
    print(f"{options.out}: {size / 1e9:.1f} GB in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
