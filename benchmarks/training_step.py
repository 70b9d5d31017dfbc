"""Tokens a second and peak memory of training steps on one GPU, each recipe in turn, as ratios to the first.

    python -m benchmarks.training_step                                    # the whole table, 7 minutes on an H100
    python -m benchmarks.training_step predecessor nf4-16k-qkv fp8-16k-qkv
    python -m benchmarks.training_step --layers 4 --steps 4 nf4-8k-all-eager nf4-8k-all

A recipe is `predecessor`, `grouped`, or words joined by hyphens:
    nf4 | fp8 | bf16     the frozen base
    4k | 8k | 16k ...    tokens of a packed block, which is one forward and backward pass
    qkv | all            LoRA of rank 4 on q, k, v as the predecessor's, or of rank 16 on all linear layers, our default
    eager                decoder layers as they are, not compiled
    recompute            activations computed again in the backward pass
    dropout              LoRA dropout of 5 % (the predecessor has it; the others have none unless told)
    16bit                adapters and optimizer in bfloat16, not in fp32 and cast at each use

The model has ChatGLM3-6B's shape and random weights: speed does not depend on them. Tokens that are padding do not
count. The predecessor: batches of 4 padded to the longest, recomputing layers, PEFT's preparation for k-bit training
(norms in fp32), logits of all tokens, bitsandbytes NF4, an optimizer step every 8 batches; its answers and prompts are
cut to 511 and 1,022 tokens. Grouped is what transformers' Trainer does today with group_by_length: the same model in
bfloat16, not recomputed, batches of 8 examples of like length, padded.

`useful` is 4 FLOPs for each weight of a linear layer and token over what the GPU reaches in one matrix product of the
model's shape: a frozen base needs that much, forwards and backwards, and no less.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import GlmForCausalLM

from benchmarks.random_checkpoint import native_config, random_state
from chatglm3.quantization import NF4
from pipelines.batches import Padding, batches_ahead
from pipelines.blocks import Block
from pipelines.step import compile_layers, recompute_layers, run_batches, with_adapters

GPU = torch.device("cuda")
WARM_UP = 3
PADDED_STEPS = 40  # to warm up and to time: each new width makes the allocator and the libraries start anew
DEFAULT = [
    *("predecessor", "grouped", "nf4-8k-qkv-eager", "nf4-8k-qkv", "nf4-16k-qkv", "nf4-16k-all", "nf4-16k-qkv-dropout"),
    *("nf4-8k-qkv-recompute", "bf16-16k-qkv", "fp8-8k-qkv", "fp8-16k-qkv", "fp8-16k-all"),
]
ANSWERS = [1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 8, 11, 14, 19, 33, 337]
FIVE = [567, 1187, 1269, 1330, 1377, 1421, 1455, 1492, 1526, 1559, 1594, 1634, 1670, 1712, 1757, 1804, 1856, 1922, 2016]
QUANTILES = {
    # 0, 5, ... 100 % of the prompts' tokens, then of the answers': 3,245 real questions on Chinese encyclopaedia
    # articles, ChatGLM3's tokenizer, the document with the answer alone or among four others.
    "one-document": (
        [63, 167, 210, 231, 247, 261, 277, 288, 300, 313, 328, 342, 357, 373, 392, 416, 450, 490, 548, 629, 1901],
        ANSWERS,
    ),
    "five-documents": ([*FIVE, 2173, 5896], ANSWERS),
}


@dataclass
class Result:
    """What a recipe did."""

    recipe: str
    tokens_per_second: float
    times_the_first: float
    useful: float
    peak_gb: float
    seconds_to_first_step: float
    answer_share: float


def example_lengths(kind: str) -> Iterator[tuple[int, int]]:
    """Prompt and answer lengths without end, the same in every run."""
    chance = np.random.default_rng(1)
    while True:
        if kind == "long-answers":
            prompt = np.clip(np.exp(chance.normal(6.35, 0.55)), 64, 1022)
            answer = np.clip(np.exp(chance.normal(4.2, 0.6)), 8, 511)
        else:
            points = np.linspace(0, 1, 21)
            prompt, answer = (np.interp(chance.random(), points, values) for values in QUANTILES[kind])
        yield int(prompt) + 2, int(answer) + 1


def blocks_of(budget: int, kind: str) -> Iterator[Block]:
    """Packed blocks of random ids without end, filled as `pipelines.packing` fills them: first fit, longest first."""
    chance = np.random.default_rng(2)
    lengths = example_lengths(kind)
    while True:
        blocks: list[list[tuple[int, int]]] = []
        for example in sorted(islice(lengths, 1024), key=sum, reverse=True):
            fitting = (block for block in blocks if sum(map(sum, block)) + sum(example) <= budget)
            if (block := next(fitting, None)) is None:
                blocks.append([example])
            else:
                block.append(example)
        for number in chance.permutation(len(blocks) - 1):  # without the last, which other examples would have filled
            yield _block(blocks[number], chance)


def _block(lengths: list[tuple[int, int]], chance: np.random.Generator) -> Block:
    is_target = np.concatenate([np.arange(prompt + answer) >= prompt for prompt, answer in lengths])
    ids = chance.integers(3, 64000, len(is_target)).astype(np.int32)
    return Block(ids, is_target, [prompt + answer for prompt, answer in lengths], ["a"], int(is_target.sum()))


def base_model(layers: int, base_format: str) -> GlmForCausalLM:
    """The random base on the GPU, in NF4 or bfloat16."""
    config = native_config(layers)
    return GlmForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=random_state(config, GPU),
        dtype=torch.bfloat16,
        quantization_config=NF4 if base_format == "nf4" else None,
        device_map={"": GPU},
    )


def lora(adapters: str, dropout: float) -> LoraConfig:
    """LoRA of rank 4 on q, k, v or of rank 16 on all linear layers."""
    attention = ["q_proj", "k_proj", "v_proj"]
    targets = attention if adapters == "qkv" else [*attention, "o_proj", "gate_up_proj", "down_proj"]
    rank = 4 if adapters == "qkv" else 16
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def predecessor_batches(kind: str) -> Iterator[list[tuple[int, int]]]:
    """Four examples as they come, prompts and answers cut."""
    lengths = example_lengths(kind)
    while True:
        yield [(min(prompt, 1022), min(answer, 511)) for prompt, answer in islice(lengths, 4)]


def grouped_batches(kind: str) -> Iterator[list[tuple[int, int]]]:
    """Eight examples of like length, in random order of such batches."""
    chance, lengths = np.random.default_rng(2), example_lengths(kind)
    while True:
        examples = sorted(islice(lengths, 400), key=sum)
        for start in 8 * chance.permutation(50):
            yield examples[start : start + 8]


def run_padded(options: argparse.Namespace, grouped: bool) -> Iterator[tuple[int, int]]:
    """The predecessor's recipe, or `grouped`; yields tokens and answer tokens after each batch."""
    model = base_model(options.layers, "nf4")
    if not grouped:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(model, lora("qkv", 0.05))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for number, batch in enumerate((grouped_batches if grouped else predecessor_batches)(options.lengths)):
        width = max(map(sum, batch))
        ids = torch.randint(3, 64000, (len(batch), width))
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(batch):
            labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
            mask[row, : prompt + answer] = 1
        with torch.autocast("cuda", dtype=torch.bfloat16):
            inputs = {"input_ids": ids.to(GPU), "attention_mask": mask.to(GPU), "labels": labels.to(GPU)}
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        if grouped or number % 8 == 7:
            optimizer.step()
            optimizer.zero_grad()
        yield int(mask.sum()), int((labels >= 0).sum())


def packed_model(words: list[str], layers: int) -> PeftModel:
    """The model that a recipe's words describe."""
    base_format = words[0]
    assert base_format in ("nf4", "fp8", "bf16")
    config = lora("all" if "all" in words else "qkv", 0.05 if "dropout" in words else 0.0)
    model = with_adapters(base_model(layers, base_format), base_format, config)
    if "16bit" in words:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.requires_grad else parameter.data
    if "recompute" in words:
        recompute_layers(model)
    if "eager" not in words:
        compile_layers(model)
    return model


def run_packed(recipe: str, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Our step, one block a step; yields tokens and answer tokens after each."""
    words = recipe.split("-")
    budget = int(words[1].removesuffix("k")) * 1024
    model = packed_model(words, options.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    counts: list[tuple[int, int]] = []

    def counted() -> Iterator[Block]:
        for block in blocks_of(budget, options.lengths):
            counts.append((len(block.input_ids), block.target_count))
            yield block

    batches = batches_ahead(counted(), GPU, Padding(budget))
    for number, batch in enumerate(batches):
        run_batches(model, [batch], counts[number][1], str(number))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield counts[number]


def measure(recipe: str, options: argparse.Namespace, roof: float) -> Result:
    """Run a recipe's steps and take the time of those after the warm-up."""
    torch._dynamo.reset()
    started = time.monotonic()
    padded = recipe in ("predecessor", "grouped")
    steps = run_padded(options, recipe == "grouped") if padded else run_packed(recipe, options)
    next(steps)
    torch.cuda.synchronize()
    first = time.monotonic() - started
    for _ in range(PADDED_STEPS if padded else WARM_UP):
        next(steps)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    counts = np.array([next(steps) for _ in range(PADDED_STEPS if padded else options.steps)])
    torch.cuda.synchronize()
    rate = counts[:, 0].sum() / (time.monotonic() - begun)
    weights = weights_of_linear_layers(options.layers)
    peak = torch.cuda.max_memory_allocated() / 1e9
    if recipe == options.profile:
        profile(steps, options.out)
    return Result(recipe, rate, 1.0, 4 * weights * rate / roof, peak, first, counts[:, 1].sum() / counts[:, 0].sum())


def weights_of_linear_layers(layers: int) -> int:
    """Of the decoder layers; the embeddings and the output layer are not among them."""
    return layers * (4096 * (4096 + 512) + 4096 * 4096 + 4096 * 27392 + 13696 * 4096)


def matrix_roof() -> float:
    """FLOPs a second in one bfloat16 product of the feed-forward layer's shape."""
    a = torch.randn(16384, 4096, device=GPU, dtype=torch.bfloat16)
    b = torch.randn(27392, 4096, device=GPU, dtype=torch.bfloat16)
    seconds = seconds_of(lambda: a @ b.t())
    return 2 * 16384 * 4096 * 27392 / seconds


def seconds_of(call: Callable[[], object], repeats: int = 20) -> float:
    """Mean seconds of a call on the GPU."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.monotonic() - begun) / repeats


def profile(steps: Iterator[Any], out: Path) -> None:
    """Print where the GPU's time goes in two more steps, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(2):
            next(steps)
        torch.cuda.synchronize()
    table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=100)
    out.with_suffix(".profile.txt").write_text(table)


def main() -> None:
    """Read the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=DEFAULT, help="what to measure, the first is the yardstick")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (default: 28, as in ChatGLM3-6B)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of packed recipes (default: 10)")
    kinds = ["long-answers", *QUANTILES]
    parser.add_argument(
        "--lengths", choices=kinds, default=kinds[0], help="how long examples are (default: log-normal)"
    )
    parser.add_argument("--out", type=Path, default=Path("training_step.json"), help="file for all figures")
    parser.add_argument("--profile", help="a recipe whose kernels are listed too, in OUT.profile.txt")
    options = parser.parse_args()
    roof = matrix_roof()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; matrix roof {roof / 1e12:.0f} TFLOP/s", flush=True)
    print(f"{'recipe':26} {'tokens/s':>9} {'times':>6} {'useful':>7} {'peak GB':>8} {'first step s':>13}", flush=True)
    results: list[Result] = []
    for recipe in options.recipes:
        try:
            result = measure(recipe, options, roof)
        except torch.cuda.OutOfMemoryError:
            print(f"{recipe:26} out of memory", flush=True)
            result = None
        gc.collect()
        torch.cuda.empty_cache()
        if result is None:
            continue
        results.append(result)
        result.times_the_first = result.tokens_per_second / results[0].tokens_per_second
        print(
            f"{recipe:26} {result.tokens_per_second:9,.0f} {result.times_the_first:6.2f} {result.useful:7.1%} "
            f"{result.peak_gb:8.1f} {result.seconds_to_first_step:13.1f}",
            flush=True,
        )
        options.out.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
