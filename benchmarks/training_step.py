"""Tokens a second and peak memory of training steps, each recipe in turn, as ratios to the first.

    python -m benchmarks.training_step                                    # the whole table, 8 minutes on an H100
    python -m benchmarks.training_step predecessor nf4-16k-qkv fp8-16k-qkv --lengths five-documents
    python -m benchmarks.training_step --layers 4 --steps 4 nf4-8k-all-eager nf4-8k-all
    python -m benchmarks.training_step nf4-16k-qkv --profile nf4-16k-qkv  # and where the time goes

A recipe is `predecessor`, `hf-...`, or words joined by hyphens:
    nf4 | fp8 | bf16     the frozen base
    4k | 8k | 16k ...    tokens of a packed block, which is one forward and backward pass and one step
    qkv | all            LoRA of rank 4 on q, k, v as the predecessor's, or of rank 16 on all linear layers, our default
    eager                decoder layers as they are, not compiled
    recompute            activations computed again in the backward pass
    dropout              LoRA dropout of 5 % (the predecessor has it; the others have none unless told)
    16bit                adapters and optimizer in bfloat16, not in fp32 and cast at each use

The predecessor: batches of 4 padded to the longest, recomputing layers, PEFT's preparation for k-bit training (norms
in fp32), logits of all tokens, bitsandbytes NF4, an optimizer step every 8 batches; its answers and prompts are cut to
511 and 1,022 tokens. Its step here is those 8 batches.

What Hugging Face offers today is transformers' Trainer with an NF4 base, LoRA of rank 4 on q, k, v, bfloat16, fused
AdamW, no recomputing, in one of these:
    hf-grouped           train_sampling_strategy="group_by_length", batches of 4 (five documents: 2), sdpa
    hf-packed-8k-sdpa    blocks packed first fit, longest first, through DataCollatorWithFlattening, whose position_ids
                         tell examples apart; sdpa with the mask that transformers makes of them
    hf-packed-8k-flex    the same with flex_attention, which takes a minute to compile
    hf-packed-8k-flash   the same with PyTorch's variable-length flash attention, in place of the package flash-attn

Tokens that are padding do not count. The GPU is waited for after each step, as the train stage does; `tokens/s` is the
median over the timed steps, `low` and `high` their quartiles, `mean` all tokens over all time. `useful` is 4 FLOPs for
each weight of a linear layer and token over what the GPU reaches in one matrix product of the model's shape: a frozen
base needs that much, forwards and backwards, and no less. `reserved` is what PyTorch took from the GPU, GB.
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks import step_profile
from benchmarks.recipes import DEVICE, ON_GPU, PREDECESSOR_STEPS, QUANTILES, make_model, model_key, run
from pipelines.run.memory import linear_shapes

PROFILED = 2
DEFAULT = [
    *("predecessor", "hf-grouped", "hf-packed-8k-sdpa", "hf-packed-8k-flash"),
    *("nf4-8k-qkv", "nf4-8k-qkv-recompute", "nf4-16k-qkv", "nf4-16k-all", "bf16-16k-qkv", "fp8-16k-qkv", "fp8-16k-all"),
]
ON_CPU = ["predecessor", "hf-grouped", "nf4-2k-qkv", "fp32-2k-qkv"]


@dataclass
class Result:
    """What a recipe did."""

    recipe: str
    lengths: str
    tokens_per_second: float
    quartiles: list[float]
    mean: float
    times_the_first: float
    useful: float
    peak_gb: float
    reserved_gb: float
    seconds_to_first_step: float
    answer_share: float


@dataclass
class Clock:
    """Takes the time of each step; the first ones warm up, and two more may be profiled."""

    warm_up: int
    timed: int
    profiled: bool
    begun: float = field(default_factory=time.monotonic)
    ends: list[float] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    peaks: tuple[float, float] = (0.0, 0.0)
    profiler: torch.profiler.profile | None = None
    profile: Any = None

    def tick(self, tokens: int, answers: int) -> bool:
        """Note a step that is done; says whether another one is wanted."""
        synchronize()
        self.ends.append(time.monotonic())
        self.counts.append((tokens, answers))
        done, last = len(self.ends), self.warm_up + self.timed
        if ON_GPU and done == self.warm_up:
            torch.cuda.reset_peak_memory_stats()
        if done == last:
            if ON_GPU:
                self.peaks = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
            if self.profiled:
                self.profiler = step_profile.start()
        if self.profiler and done == last + PROFILED:
            self.profile = step_profile.stop(self.profiler)
        return done < last + PROFILED * self.profiled

    def rates(self) -> tuple[np.ndarray, float]:
        """Tokens a second of each timed step, and over all of them."""
        timed = slice(self.warm_up, self.warm_up + self.timed)
        seconds = np.diff([self.begun, *self.ends])[timed]
        tokens = np.array(self.counts)[timed, 0]
        return tokens / seconds, tokens.sum() / seconds.sum()


class Bench:
    """Measures recipes one after another; those that differ in their blocks alone share a model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.roof = options, matrix_roof()
        self.key, self.model = "", None

    def measure(self, recipe: str, kind: str) -> Result:
        """Run a recipe's steps and take the time of those after the warm-up."""
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        words = recipe.split("-")
        packed = recipe != "predecessor"
        model = self._model(words)
        clock = Clock(
            *((4, self.options.steps) if packed else (PREDECESSOR_STEPS, PREDECESSOR_STEPS)),
            profiled=recipe in self.options.profile,
        )
        run(model, words, kind, clock.tick)
        if clock.profile:
            self._write_profile(recipe, kind, *clock.profile)
        rates, mean = clock.rates()
        low, median, high = (float(value) for value in np.quantile(rates, [0.25, 0.5, 0.75]))
        useful = 4 * weights_of_linear_layers(self.model) * median / self.roof
        tokens, answers = np.array(clock.counts).sum(0)
        first = clock.ends[0] - clock.begun
        return Result(
            recipe, kind, median, [low, high], float(mean), 1.0, useful, *clock.peaks, first, float(answers / tokens)
        )

    def _model(self, words: list[str]) -> Any:
        if self.key != model_key(words):
            self.forget()
            self.key, self.model = model_key(words), make_model(words, self.options.layers)
        return self.model

    def forget(self) -> None:
        """Free the model's memory."""
        self.key, self.model = "", None
        gc.collect()
        torch.cuda.empty_cache()

    def _write_profile(self, recipe: str, kind: str, totals: Any, span: float) -> None:
        text = step_profile.table(totals, span, PROFILED)
        print(f"{recipe}, {kind}\n{text}", flush=True)
        file = self.options.out.with_name(f"{self.options.out.stem}.{recipe}.{kind}.profile.json")
        file.write_text(json.dumps(step_profile.kernel_list(totals, PROFILED), indent=1) + "\n")


def weights_of_linear_layers(model: Any) -> int:
    """Of the decoder layers; the embeddings and the output layer are not among them."""
    shapes = linear_shapes(model.config).values()
    return int(model.config.num_hidden_layers * sum(rows * columns for rows, columns in shapes))


def matrix_roof() -> float:
    """FLOPs a second in one product of the feed-forward layer's shape: bfloat16 on a GPU, fp32 on a CPU."""
    rows, inner, columns = (16384, 4096, 27392) if ON_GPU else (2048, 256, 768)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    a, b = (torch.randn(size, inner, device=DEVICE, dtype=dtype) for size in (rows, columns))
    return 2 * rows * inner * columns / seconds_of(lambda: a @ b.t())


def seconds_of(call: Callable[[], object], repeats: int = 20) -> float:
    """Mean seconds of a call."""
    for _ in range(3):
        call()
    synchronize()
    begun = time.monotonic()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.monotonic() - begun) / repeats


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    """Read the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = DEFAULT if ON_GPU else ON_CPU
    parser.add_argument("recipes", nargs="*", default=recipes, help="what to measure, the first is the yardstick")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (default: 28, as in ChatGLM3-6B)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps; the predecessor has 4 (default: 10)")
    kinds = ["one-document", "five-documents", "long-answers"]
    assert {*kinds} >= {*QUANTILES}
    parser.add_argument("--lengths", choices=kinds, nargs="+", default=kinds[:2], help="how long examples are")
    parser.add_argument("--out", type=Path, default=Path("training_step.json"), help="file for all figures")
    parser.add_argument("--profile", nargs="*", default=[], help="recipes whose kernels are listed too, beside OUT")
    options = parser.parse_args()
    bench = Bench(options)
    name = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads, the tiny model"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{name}, {versions}; matrix roof {bench.roof / 1e12:.2f} TFLOP/s")
    print("| recipe | lengths | tokens/s | low | high | mean | times | useful | peak GB | reserved | first step s |")
    print("|---|---|" + "--:|" * 9, flush=True)
    results: list[Result] = []
    for recipe in options.recipes:
        for kind in options.lengths:
            if result := _measured(bench, recipe, kind):
                yardstick = next((r for r in results if r.lengths == kind), result)
                result.times_the_first = result.tokens_per_second / yardstick.tokens_per_second
                results.append(result)
                print(_line(result), flush=True)
                options.out.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def _measured(bench: Bench, recipe: str, kind: str) -> Result | None:
    """The result, or None when the recipe failed, which is printed: the others are measured all the same."""
    try:
        return bench.measure(recipe, kind)
    except torch.cuda.OutOfMemoryError:
        print(f"| {recipe} | {kind} | out of memory |", flush=True)
    except Exception:
        print(f"| {recipe} | {kind} | failed |", flush=True)
        traceback.print_exc(limit=-4)
    bench.forget()
    return None


def _line(r: Result) -> str:
    rates = " | ".join(f"{value:,.0f}" for value in (r.tokens_per_second, *r.quartiles, r.mean))
    return (
        f"| {r.recipe} | {r.lengths} | {rates} | {r.times_the_first:.2f} | {r.useful:.1%} | {r.peak_gb:.1f} "
        f"| {r.reserved_gb:.1f} | {r.seconds_to_first_step:.1f} |"
    )


if __name__ == "__main__":
    main()
