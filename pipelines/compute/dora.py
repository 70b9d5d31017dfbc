"""DoRA (arXiv:2402.09353) over a frozen layer of any format: PEFT's numbers without a weight matrix being built."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from pipelines.compute.fp8_linear import Fp8Linear


class FactoredDora(DoraLinearVariant):
    """PEFT's DoRA layer, but for how the rows' norms of W + s B A are found.

    PEFT dequantises W and multiplies B A out for each batch, and takes an fp8 weight for what it is without its scales.
    Here |w + s b A|^2 = |w|^2 + 2 s b.(A w) + s^2 b (A A') b', where the frozen layer makes A w of A's few rows.
    Made before the layer is in fp8: magnitudes are those of the weight that the adapter will be merged into.
    """

    def __init__(self, layer: LoraLayer, adapter: str) -> None:
        weight = dequantize_module_weight(layer.get_base_layer()).detach()
        norms = weight.float().norm(dim=1)
        self.base_squares: Tensor = norms**2
        # PEFT rounds the magnitudes it begins with to the weight's 16 bits.
        layer.lora_magnitude_vector[adapter].weight.data = norms

    def forward(  # type: ignore[override]  # PEFT's is static: it holds nothing of a layer
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's output for `x`: magnitude / norm times what W + s B A makes of it, and the bias."""
        base, scale = module.get_base_layer(), module.scaling[active_adapter]
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropped = module.lora_dropout[active_adapter](x)
        kept = isinstance(module.lora_dropout[active_adapter], nn.Identity) or not module.training
        # With dropout, PEFT's update sees no input that was dropped, in the frozen weight's share of it either.
        product = (result if kept else base(dropped.to(result.dtype))).float()
        product = product if base.bias is None else product - base.bias
        ratio: Tensor = module.lora_magnitude_vector[active_adapter].weight / self.norms(
            base, a.weight, b.weight, scale, result.dtype
        )
        # In fp32, or gradients lose a tenth to rounding; compiled, it costs nothing.
        added: Tensor = (ratio - 1) * product + ratio * b(a(dropped) * scale).float()
        return (result.float() + added).to(result.dtype)

    @torch.no_grad()
    def norms(self, base: nn.Linear | Fp8Linear, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """Norms of the rows of W + scale B A, which count as constants in the backward pass, as in PEFT."""
        of_a: Tensor = base(a.to(dtype)).float()
        if base.bias is not None:
            of_a = of_a - base.bias.float()
        with torch.autocast(a.device.type, enabled=False):
            a, b = a.float(), b.float()
            squares = self.base_squares + 2 * scale * (b * of_a.t()).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        return squares.clamp(min=1e-12).sqrt()
