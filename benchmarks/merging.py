"""Memory and time of `merge` on a model of ChatGLM3-6B's shape, beside loading it whole and beside a plain copy.

    python -m benchmarks.random_checkpoint --out /tmp/random-6b
    python -m benchmarks.merging --base /tmp/random-6b --out /tmp/merged
    python -m benchmarks.merging --base /tmp/random-6b --out /tmp/merged copy int8

Memory is what a process has for itself (RssAnon): mapped files are the page cache's, which gives way. `whole` is the
predecessor's way: the model in memory, PEFT's merge_and_unload, save_pretrained. w4a16 has the nearest values here:
GPTQ needs rows.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from chatglm3 import load_model
from chatglm3.adapters import load_adapter
from chatglm3.checkpoint import read_config
from chatglm3.official import native_shapes

SAMPLE_EVERY_S = 0.1
CONTENDERS = ("copy", "bf16", "nf4", "int8", "fp8", "w4a16", "whole")


def write_adapter(folder: Path, base: Path, rank: int = 16) -> None:
    """A random LoRA adapter on all linear layers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    shapes = {name: shape for name, shape in native_shapes(read_config(base)).items() if name.endswith("_proj.weight")}
    for name, (rows, columns) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in shapes})
    LoraConfig(r=rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)


def merge_whole(base: Path, adapter: Path, out: Path) -> None:
    """The predecessor's way."""
    load_adapter(load_model(base, dtype=torch.bfloat16), adapter).merge_and_unload().save_pretrained(out)


def measure(name: str, base: Path, adapter: Path, out: Path) -> tuple[int, float, float]:
    """Run one contender in a process of its own; its exit code, seconds, and GB of its own memory at the peak."""
    shutil.rmtree(out, ignore_errors=True)
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(_command(name, base, adapter, out))
    while process.poll() is None:
        peak = max(peak, _own_memory(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    seconds = time.monotonic() - started
    subprocess.run(["sync"], check=True)  # what one contender left to write must not slow the next
    return process.returncode, seconds, peak / 1e6


def _command(name: str, base: Path, adapter: Path, out: Path) -> list[str]:
    if name == "copy":
        return ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(base), str(out)]  # on the disk, as merge's files are
    if name == "whole":
        arguments = ["--base", str(base), "--out", str(out), "--only", str(adapter)]
        return [sys.executable, "-m", "benchmarks.merging", *arguments]
    folders = ["--adapter", str(adapter), "--base", str(base), "--out", str(out)]
    return [sys.executable, "-m", "pipelines", "merge", *folders, "--prompt_format", "chat", "--format", name]


def _own_memory(pid: int) -> int:
    """kB of a process that no file stands for."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def main() -> None:
    """Measure each contender and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=CONTENDERS, help=f"of {', '.join(CONTENDERS)} (default all)")
    parser.add_argument("--base", type=Path, required=True, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, and remove")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # the adapter, in the process that merges whole
    chosen = parser.parse_args()
    if chosen.only:
        merge_whole(chosen.base, chosen.only, chosen.out)
        return
    adapter = chosen.out.with_name(f"{chosen.out.name}-adapter")
    write_adapter(adapter, chosen.base)
    print("| | seconds | of a copy | own memory, GB | output, GB |\n|---|--:|--:|--:|--:|")
    copied = 0.0
    for name in chosen.contenders:
        exit_code, seconds, peak = measure(name, chosen.base, adapter, chosen.out)
        copied = seconds if name == "copy" else copied
        of_a_copy = f"{seconds / copied:.1f}" if copied else ""
        size = sum(file.stat().st_size for file in chosen.out.iterdir()) / 1e9 if chosen.out.is_dir() else 0
        failed = f" (ended with {exit_code})" if exit_code else ""
        print(f"| {name}{failed} | {seconds:.0f} | {of_a_copy} | {peak:.2f} | {size:.2f} |", flush=True)
    for folder in (chosen.out, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
