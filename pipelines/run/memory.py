"""How many tokens a GPU computes at once, and whether it keeps their activations: from its free memory."""

from collections.abc import Iterator
from pathlib import Path

import ray
import torch
from transformers import GlmConfig

from cluster.config import Config
from cluster.errors import StageError
from pipelines.compute.step import BaseFormat
from pipelines.compute.strategies import can_be_compiled
from pipelines.run.training_config import TrainConfig

CHOICE = "memory.json"
ON_CPU = 4096
SIZES = [16384, 8192, 4096]
RESERVE = 0.92  # of the free memory: the rest goes to the allocator's gaps and to kernels' own buffers
CHUNK_GB = 1.0  # logits of a chunk of tokens with their gradients, and what libraries keep
BYTES_A_WEIGHT = {"nf4": 0.516, "fp8": 1.0, "bf16": 2.0, "fp32": 4.0}


class Memory(Config):
    """What was chosen. It decides what the blocks are and so the loss curve: a resumed run must find it again."""

    block_tokens: int
    recompute: bool
    needed_gb: float = 0.0
    """What the choice is expected to take; 0: not worked out, on a CPU."""


def choose_memory(config: TrainConfig, model: GlmConfig, longest: int, file: Path, gpus: int) -> Memory:
    """What `config` says, and for what it leaves open, what `file` has, or the fastest that fits; kept there, and told.

    No block is smaller than `longest`, the tokens that an example may have. Raises StageError if nothing fits.
    """
    if file.is_file():
        kept = Memory.model_validate_json(file.read_text(encoding="utf-8"))
        given = config.model_dump(include={"block_tokens", "recompute"}, exclude_none=True)
        return kept.model_copy(update=given)
    if not gpus:
        chosen = Memory(block_tokens=config.block_tokens or max(ON_CPU, longest), recompute=bool(config.recompute))
    else:
        # At once, so that they meet different GPUs: the one with least decides for all.
        asked = max(1, min(config.workers, int(ray.cluster_resources().get("GPU", 0))))
        free_gb = min(ray.get([_free_gb.remote() for _ in range(asked)]))
        chosen = _fastest(config, model, longest, free_gb)
        if config.block_tokens is None or config.recompute is None:
            print(
                f"train: memory: blocks of {chosen.block_tokens:,} tokens, activations "
                f"{'computed again' if chosen.recompute else 'kept'}: about {chosen.needed_gb:.0f} GB "
                f"of the {free_gb:.0f} GB free on {'a' if asked == 1 else 'each'} GPU (--block_tokens, --recompute)"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(chosen.model_dump_json() + "\n", encoding="utf-8")
    partial.replace(file)
    return chosen


def _fastest(config: TrainConfig, model: GlmConfig, longest: int, free_gb: float) -> Memory:
    needed = 0.0
    for tokens, recompute in _by_speed(config, longest):
        needed = needed_gb(model, config, tokens, recompute)
        # What was asked for in full is tried; the estimate has no say in it.
        if needed <= RESERVE * free_gb or None not in (config.block_tokens, config.recompute):
            return Memory(block_tokens=tokens, recompute=recompute, needed_gb=round(needed, 1))
    raise StageError(
        f"--base {config.base} in {config.base_format} needs about {needed:.0f} GB even in small blocks, a GPU has "
        f"{free_gb:.0f} GB free; give --base_format nf4, or --block_tokens and --recompute to try it all the same"
    )


def _by_speed(config: TrainConfig, longest: int) -> Iterator[tuple[int, bool]]:
    """Sizes and whether to recompute, the fastest first: recomputing costs a third, small blocks a tenth."""
    sizes = [config.block_tokens] if config.block_tokens else [n for n in SIZES if n >= longest] or [longest]
    for recompute in (False, True) if config.recompute is None else (config.recompute,):
        yield from ((tokens, recompute) for tokens in sizes)


@ray.remote(num_cpus=0, num_gpus=1, max_retries=3)
def _free_gb() -> float:
    return float(torch.cuda.mem_get_info()[0]) / 1e9


def needed_gb(model: GlmConfig, config: TrainConfig, tokens: int, recompute: bool) -> float:
    """GPU memory of a training step, in GB: base, adapters with their optimizer, activations, a chunk of logits.

    Beside 19 peaks that one H100 showed for ChatGLM3-6B: -2 to +4 % without recompute, -6 to +10 % with it.
    """
    bytes_each = 4 if config.base_format == "fp32" else 2
    is_compiled = can_be_compiled(config.strategy, config.base_format)
    kept = (_kept_compiled if is_compiled else _kept_eagerly)(model, config, bytes_each)
    layers = model.num_hidden_layers
    # Recomputing keeps each layer's input, and all of the layer that is at work.
    numbers = layers * bytes_each * model.hidden_size + kept if recompute else layers * kept
    # Workers that share the base out hold a part each, and the whole of the layer that is at work. fp8 is not shared
    # out: its layers hold buffers, and DeepSpeed takes parameters. `train` refuses the two together.
    workers = (config.min_workers or config.workers) if config.strategy == "zero3" else 1
    fixed = base_bytes(model, config.base_format, workers) + 16 * _adapter_weights(model, config)
    # Each worker loads the whole base before fp8 is made of it, or zero3 takes its part.
    loading = base_bytes(model, "bf16" if config.base_format == "fp8" else config.base_format)
    return max(loading, fixed + tokens * numbers) / 1e9 + CHUNK_GB


def base_bytes(model: GlmConfig, base_format: BaseFormat, workers: int = 1) -> float:
    """The frozen base: linear layers in its format, embeddings and the output layer in 16 or 32 bits.

    Of linear layers shared out among `workers`, what one of them holds: its part, and one layer that is gathered.
    """
    layer = sum(rows * columns for rows, columns in linear_shapes(model).values())
    layers = model.num_hidden_layers / workers + (workers > 1)
    tables = 2 * model.vocab_size * model.hidden_size
    return layers * layer * BYTES_A_WEIGHT[base_format] + tables * (4 if base_format == "fp32" else 2)


def linear_shapes(model: GlmConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of a decoder layer's linear layers."""
    h, f = model.hidden_size, model.intermediate_size
    assert model.head_dim and model.num_key_value_heads
    heads, groups = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    return {
        "q_proj": (heads, h),
        "k_proj": (groups, h),
        "v_proj": (groups, h),
        "o_proj": (h, heads),
        "gate_up_proj": (2 * f, h),
        "down_proj": (h, f),
    }


def _adapter_weights(model: GlmConfig, config: TrainConfig) -> int:
    shapes = linear_shapes(model)
    return model.num_hidden_layers * config.lora.rank * sum(sum(shapes[name]) for name in config.lora.targets)


def _kept_compiled(model: GlmConfig, config: TrainConfig, bytes_each: int) -> int:
    """Bytes a token that one compiled layer keeps for its backward pass."""
    h, shapes, targets = model.hidden_size, linear_shapes(model), config.lora.targets
    kept = 5 * h + 2 * shapes["k_proj"][0] + shapes["gate_up_proj"][0]
    if "down_proj" in targets:
        kept += model.intermediate_size  # the input of its adapter, which a frozen layer need not keep
    kept += h * ("o_proj" in targets) + h * ("gate_up_proj" in targets)
    if config.lora.dora:  # what each frozen layer makes, which its row lengths are learned from, and what comes of it
        kept += sum(shapes[name][0] for name in targets) * (2 if config.lora.dropout else 1)
        kept += sum(shapes[name][0] for name in {"q_proj", "k_proj", "v_proj", "o_proj"} & set(targets))
    masks = 0
    if config.lora.dropout:  # a mask of bytes for each adapter's input, and what both norms make
        masks = sum(shapes[name][1] for name in targets)
        kept += h * bool({"q_proj", "k_proj", "v_proj"} & set(targets)) + h * ("gate_up_proj" in targets)
    return bytes_each * kept + masks


def _kept_eagerly(model: GlmConfig, config: TrainConfig, bytes_each: int) -> int:
    """Bytes a token that one layer keeps where it is not compiled: what autograd saves, and the attention's kernel.

    tests/test_memory.py counts them through torch.autograd.graph.saved_tensors_hooks, each storage once.
    """
    h, f, shapes = model.hidden_size, model.intermediate_size, linear_shapes(model)
    targets = config.lora.targets
    in_fp32 = 2 * (h + 1) + model.num_attention_heads  # of both norms, and the attention's sums
    queries, keys = shapes["q_proj"][0], shapes["k_proj"][0]
    numbers = 2 * (queries + keys) + 3 * f + queries // model.num_attention_heads + config.lora.rank * len(targets)
    # Dropout leaves each adapter a copy of its input, and a mask of bytes.
    copied = sum(shapes[name][1] for name in targets) if config.lora.dropout else 0
    # Others keep the input itself, and so does DeepSpeed's product with a frozen weight, which 4-bit layers go without.
    whole = set(shapes) if config.base_format != "nf4" else set() if copied else set(targets)
    numbers += h * bool(whole & {"q_proj", "k_proj", "v_proj"}) + h * ("gate_up_proj" in whole)
    numbers += f * ("down_proj" in whole)
    return 4 * in_fp32 + bytes_each * (numbers + copied) + copied
