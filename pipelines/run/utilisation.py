"""How much of a GPU's matrix roof a training step uses: the FLOPs that it needs, over what the vendor promises."""

import re

from transformers import GlmConfig

from pipelines.run.memory import linear_shapes
from pipelines.run.training_config import LoraSettings

PEAK_TFLOPS = {
    r"NVIDIA B200": 2250,
    r"NVIDIA (H200|H100 80GB HBM3|H800|GH200 \d+GB)": 989.4,
    r"NVIDIA H200 NVL|NVIDIA H100 NVL": 835.5,
    r"NVIDIA H100 PCIe": 756.5,
    r"NVIDIA H20": 148,
    r"NVIDIA A[18]00[- ].*": 312,
    r"NVIDIA L40S": 362,
    r"NVIDIA L40": 181,
    r"NVIDIA L4": 121,
    r"NVIDIA A40": 149.7,
    r"NVIDIA A30": 165,
    r"NVIDIA A10": 125,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"NVIDIA GeForce RTX 3090": 71,
}
"""Name, as PyTorch tells it -> dense bfloat16 products with fp32 sums in TFLOP/s, by the vendor's data sheet, which
gives twice as much with sparsity for most. An fp8 base can pass it: fp8 products have a roof twice as high."""


def peak_flops(device: str) -> float | None:
    """FLOP/s that the GPU of this name can reach; None for one that is not known, or is a slice of one (MIG)."""
    if " MIG " in device:
        return None
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if re.fullmatch(name, device)), None)


def step_flops(model: GlmConfig, lora: LoraSettings, tokens: int, attended: int, targets: int) -> float:
    """FLOPs that a step needs, forwards and backwards; recomputing, padding, norms and activations are not counted.

    A product takes 2 FLOPs for each weight and token. Going back, it is done again for the inputs' gradient, and where
    the weight is learned a third time for its own (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). So a token takes
    4 for each frozen weight and 6 for each of the adapters; the output layer is frozen, and there are answers only.
    Attention's two products take 2 * heads * head_dim for each pair of a token and one that it sees, and twice
    that going back: 12 * heads * head_dim a layer (PaLM, arXiv:2204.02311, appendix B, which takes all pairs for seen).
    """
    shapes = linear_shapes(model)
    frozen = sum(rows * columns for rows, columns in shapes.values())
    adapters = lora.rank * sum(sum(shapes[name]) for name in lora.targets)
    width = shapes["q_proj"][0]
    layers = model.num_hidden_layers * (tokens * (4 * frozen + 6 * adapters) + 12 * width * attended)
    return float(layers + 4 * model.vocab_size * model.hidden_size * targets)
