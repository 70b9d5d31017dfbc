"""Weak scaling of data-parallel training, worked out from a measured step and the bytes that workers exchange.

    python -m benchmarks.scaling --picture docs/scaling.svg
    python -m benchmarks.scaling --measure 2            # so many GPUs, or CPU processes: the exchange itself

The model: workers compute a block each, then add up the adapters' gradients (fp32) in one all-reduce that overlaps with
nothing, as `exchange.sum_gradients` does. NCCL takes the quicker of a ring and a double tree: a ring's time is
2 (n - 1) latency + 2 bytes (n - 1) / n / bandwidth, a tree's 2 log2(n) latency + 2 bytes / bandwidth. Up to 8 workers
share a machine (NVLink, 300 GB/s, 5 us); behind that every machine has one network card, which its 8 GPUs send the sum
through once. No worker is slower than another: with stragglers it is worse. Measured are the step (one H100,
benchmarks/BENCHMARKS.md), the bytes, and the crosses: two H200s of one machine. `--measure` runs
`exchange.sum_gradients` alone, on as many gradients.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from statistics import median

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib import pyplot as plt
from torch import nn

from benchmarks.random_checkpoint import native_config
from chatglm3.official import native_shapes
from pipelines.compute.exchange import sum_gradients

STEPS_S = {"nf4": 0.76, "fp8": 0.53}
"""Seconds of a step of one block of 16,384 tokens."""
ON_TWO = {"nf4": 97.6, "fp8": 96.7}
"""Per cent of twice one GPU's rate that two reached (ddp, rank 16 on all)."""
NETWORKS = {"400 Gbit/s InfiniBand": (50e9, 5e-6), "25 Gbit/s Ethernet": (3.1e9, 30e-6)}
"""Bytes a second of a machine's card, and seconds until a message arrives."""
NVLINK = (300e9, 5e-6)
ON_A_MACHINE = 8
WORKERS = [2**power for power in range(11)]


EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
ADAPTERS = {"rank 4 on q, k, v": (4, EVERYTHING[:3]), "rank 16 on all": (16, EVERYTHING)}
TIMES = 20


def adapted(targets: tuple[str, ...]) -> list[tuple[int, int]]:
    """Shapes of the matrices of ChatGLM3-6B that have an adapter."""
    shapes = native_shapes(native_config(28))
    return [(s[0], s[1]) for name, s in shapes.items() if name.split(".")[-2] in targets and len(s) == 2]


def adapter_bytes(rank: int, targets: tuple[str, ...]) -> int:
    """Bytes of the adapters' gradients on ChatGLM3-6B, in fp32."""
    return sum(4 * rank * sum(shape) for shape in adapted(targets))


def exchange(workers: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of an all-reduce of `size` bytes among `workers`."""
    if workers == 1:
        return 0.0
    ring = 2 * (workers - 1) * latency + 2 * size * (workers - 1) / workers / bandwidth
    tree = 2 * math.log2(workers) * latency + 2 * size / bandwidth
    return min(ring, tree)


def efficiency(workers: int, step_s: float, size: float, network: str) -> float:
    """Tokens a second of each worker as a share of one that works alone."""
    inside = exchange(min(workers, ON_A_MACHINE), size, *NVLINK)
    between = exchange(max(1, workers // ON_A_MACHINE), size, *NETWORKS[network])
    return step_s / (step_s + inside + between)


def measure(workers: int) -> None:
    """Print how long the exchange takes among so many processes, a GPU each where there are GPUs."""
    print("| adapters | MB | GPUs | exchange, ms | worked out, ms |\n|---|--:|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_exchange, (workers, f"file://{folder}/together"), nprocs=workers)


def _exchange(rank: int, workers: int, together: str) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", together, rank=rank, world_size=workers)
    for name, (lora_rank, targets) in ADAPTERS.items():
        sizes = [lora_rank * side for shape in adapted(targets) for side in shape]  # B and A of each matrix
        parameters = [nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        seconds = []
        for _ in range(2 + TIMES):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            loss = torch.zeros((), device=device)
            loss.item()  # waits for the GPU, as below
            began = time.perf_counter()
            sum_gradients(parameters, loss).item()
            seconds.append(time.perf_counter() - began)
        if rank == 0:
            size = 4 * sum(sizes)
            guess = f"{1000 * exchange(workers, size, *NVLINK):.2f}" if gpu else "-"
            taken = 1000 * median(seconds[2:])
            print(f"| {name} | {size / 1e6:.0f} | {workers} | {taken:.2f} | {guess} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Print a table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/scaling.svg"), help="file to draw")
    parser.add_argument("--measure", type=int, metavar="N", help="time the exchange on N GPUs instead")
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure)
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    print(f"| base, network, adapters | MB | {' | '.join(map(str, WORKERS))} |\n|---|--:|{'--:|' * len(WORKERS)}")
    for plot, (base, step_s) in zip(axes, STEPS_S.items(), strict=True):
        for network in NETWORKS:
            for name, (rank, targets) in ADAPTERS.items():
                size = adapter_bytes(rank, targets)
                shares = [efficiency(n, step_s, size, network) for n in WORKERS]
                cells = " | ".join(f"{100 * share:.1f}" for share in shares)
                print(f"| {base}, {network}, {name} | {size / 1e6:.0f} | {cells} |")
                plot.plot(WORKERS, [100 * s for s in shares], "o-", label=f"{network}, {name} ({size / 1e6:.0f} MB)")
        plot.plot(2, ON_TWO[base], "kx", markersize=9, markeredgewidth=2, label="measured, rank 16 on all")
        plot.set_xscale("log", base=2)
        plot.set_xticks(WORKERS, [str(n) for n in WORKERS])
        plot.set(title=f"{base}, {step_s} s a step", xlabel="workers", ylim=(80, 101))
        plot.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency, %")
    axes[0].legend(loc="lower left")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    figure.savefig(chosen.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
