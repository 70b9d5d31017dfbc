"""Where a step's GPU time goes: a profiler's kernels in groups that a reader of the code knows."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

VOCABULARY = 65024
RANK = 64
"""A matrix product with a side no longer than this is an adapter's."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "aten::_scaled_mm"}


class Kernel(NamedTuple):
    """A kernel's name, the operator that started it, and the sizes that operator was given."""

    name: str
    operator: str
    sizes: str


def start() -> torch.profiler.profile:
    """A profiler under way."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    profiler.start()
    return profiler


def stop(profiler: torch.profiler.profile) -> tuple[Counter[Kernel], float]:
    """Microseconds by kernel, and from the first kernel's start to the last one's end."""
    torch.cuda.synchronize()
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    return kernels_of(events)


def kernels_of(events: list[dict[str, Any]]) -> tuple[Counter[Kernel], float]:
    """As `stop`, of a trace."""
    operators = {e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op" and "External id" in e["args"]}
    totals: Counter[Kernel] = Counter()
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    for event in on_gpu:
        operator = operators.get(event["args"].get("External id"), {"name": "", "args": {}})
        sizes = json.dumps(operator["args"].get("Input Dims", []))
        totals[Kernel(event["name"], operator["name"], sizes)] += event["dur"]
    span = max(e["ts"] + e["dur"] for e in on_gpu) - min(e["ts"] for e in on_gpu)
    return totals, span


def group(kernel: Kernel) -> str:
    """Which part of the step a kernel belongs to."""
    name = kernel.name.lower()
    sides = {side for sizes in json.loads(kernel.sizes) if isinstance(sizes, list) for side in sizes if _number(side)}
    if "flash" in name or "fmha" in name:
        return "attention"
    if VOCABULARY in sides:
        return "logits and cross-entropy"
    if "dequantize" in name:
        return "NF4 to bfloat16"
    if kernel.operator in PRODUCTS:
        return "adapters' products" if min(sides - {1}) <= RANK else "base's products"
    if "multi_tensor" in name or "adam" in name:
        return "optimizer and clipping"
    if name.startswith("triton") and ("amax" in name or "float8" in name):
        return "quantising to fp8"
    if name.startswith("triton_poi") and "scaled_mm" in name:
        return "turning fp8 weights over"
    if name.startswith("triton"):
        return "norms, activation, rotary, sums (fused)"
    return "other"


def _number(side: Any) -> bool:
    return isinstance(side, int)


def table(totals: Counter[Kernel], span: float, steps: int) -> str:
    """Milliseconds a step by group, as Markdown."""
    groups: Counter[str] = Counter()
    for kernel, microseconds in totals.items():
        groups[group(kernel)] += microseconds
    groups["GPU waits"] = max(0.0, span - sum(groups.values()))
    lines = ["| part | ms a step | share |", "|---|--:|--:|"]
    lines += [f"| {name} | {us / 1000 / steps:.1f} | {us / span:.1%} |" for name, us in groups.most_common()]
    return "\n".join([*lines, f"| all | {span / 1000 / steps:.1f} | 100 % |"])


def kernel_list(totals: Counter[Kernel], steps: int, most: int = 250) -> list[dict[str, Any]]:
    """The kernels that take longest, for a JSON file."""
    return [
        {"group": group(kernel), "ms": us / 1000 / steps} | kernel._asdict() for kernel, us in totals.most_common(most)
    ]
