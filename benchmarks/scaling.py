"""Weak scaling of data-parallel training, worked out from a measured step and the bytes that workers exchange.

    python -m benchmarks.scaling --picture docs/scaling.svg

The model: workers compute a block each, then add up the adapters' gradients (fp32) in one all-reduce that overlaps with
nothing, as `exchange.sum_gradients` does. NCCL takes the quicker of a ring and a double tree: a ring's time is
2 (n - 1) latency + 2 bytes (n - 1) / n / bandwidth, a tree's 2 log2(n) latency + 2 bytes / bandwidth. Up to 8 workers
share a machine (NVLink, 300 GB/s, 5 us); behind that every machine has one network card, which its 8 GPUs send the sum
through once. No worker is slower than another: with stragglers it is worse. Measured are the step (one H100,
benchmarks/BENCHMARKS.md) and the bytes.
"""

import argparse
import math
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from benchmarks.random_checkpoint import native_config
from chatglm3.official import native_shapes

STEPS_S = {"nf4": 0.76, "fp8": 0.53}
"""Seconds of a step of one block of 16,384 tokens."""
NETWORKS = {"400 Gbit/s InfiniBand": (50e9, 5e-6), "25 Gbit/s Ethernet": (3.1e9, 30e-6)}
"""Bytes a second of a machine's card, and seconds until a message arrives."""
NVLINK = (300e9, 5e-6)
ON_A_MACHINE = 8
WORKERS = [2**power for power in range(11)]


def adapter_bytes(rank: int, targets: tuple[str, ...]) -> int:
    """Bytes of the adapters' gradients on ChatGLM3-6B, in fp32."""
    shapes = native_shapes(native_config(28))
    return sum(4 * rank * sum(s) for name, s in shapes.items() if name.split(".")[-2] in targets and len(s) == 2)


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


def main() -> None:
    """Print a table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/scaling.svg"), help="file to draw")
    chosen = parser.parse_args()
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    adapters = {"rank 4 on q, k, v": (4, everything[:3]), "rank 16 on all": (16, everything)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    print(f"| base, network, adapters | MB | {' | '.join(map(str, WORKERS))} |\n|---|--:|{'--:|' * len(WORKERS)}")
    for plot, (base, step_s) in zip(axes, STEPS_S.items(), strict=True):
        for network in NETWORKS:
            for name, (rank, targets) in adapters.items():
                size = adapter_bytes(rank, targets)
                shares = [efficiency(n, step_s, size, network) for n in WORKERS]
                cells = " | ".join(f"{100 * share:.1f}" for share in shares)
                print(f"| {base}, {network}, {name} | {size / 1e6:.0f} | {cells} |")
                plot.plot(WORKERS, [100 * s for s in shares], "o-", label=f"{network}, {name} ({size / 1e6:.0f} MB)")
        plot.set_xscale("log", base=2)
        plot.set_xticks(WORKERS, [str(n) for n in WORKERS])
        plot.set(title=f"{base}, {step_s} s a step", xlabel="workers", ylim=(0, 102))
        plot.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency, %")
    axes[0].legend(loc="lower left")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    figure.savefig(chosen.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
