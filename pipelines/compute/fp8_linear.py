"""A frozen linear layer in 8-bit floating point: one scale per row, multiplied in fp8 forwards and backwards.

The weight is quantised once; activations and their gradients are quantised token by token as they come. Both passes
use the same quantised weight, so the gradient is that of the function computed, up to the rounding of activations.
Adapters on top stay in bfloat16. Needs compute capability 8.9 (Ada, Hopper or later); on a CPU the same numbers are
multiplied in fp32, which is slow and for tests.
"""

from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Fp8Linear(nn.Module):
    """y = x W' + b with W frozen in fp8. Made from a linear layer, whose numbers it takes over."""

    weight: Tensor
    """[out, in], fp8: each row is divided by its scale."""
    scales: Tensor
    """[out, 1], fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scales = quantise_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        y: Tensor = _FrozenProduct.apply(x, self.weight, self.scales)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `x` [rows, columns] divided by their scales as fp8, and the scales [rows, 1] in fp32."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        quantised, x_scales = quantise_rows(x.flatten(0, -2))
        y: Tensor = _product(quantised, x_scales, weight, scales, x.dtype).unflatten(0, x.shape[:-1])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scales = ctx.saved_tensors
        (gradient,) = gradients
        # The weight's scales lie along the dimension that is summed over here, so they go into the gradient first.
        scaled = gradient.flatten(0, -2).float() * scales.t()
        quantised, g_scales = quantise_rows(scaled)
        # The GPU multiplies rows by rows only. To transpose the weight each time costs a hundredth of a step; to keep
        # it transposed would cost as much memory again.
        columns = weight.t().contiguous()
        ones = torch.ones(columns.shape[0], 1, device=columns.device)
        product = _product(quantised, g_scales, columns, ones, gradient.dtype)
        return product.unflatten(0, gradient.shape[:-1]), None, None


def _product(x: Tensor, x_scales: Tensor, rows: Tensor, row_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, k] times the transpose of `rows` [m, k], both fp8 with a scale per row -> [n, m]."""
    if not x.is_cuda:
        return ((x.float() * x_scales) @ (rows.float() * row_scales).t()).to(dtype)
    return torch._scaled_mm(x, rows.t(), scale_a=x_scales, scale_b=row_scales.t(), out_dtype=dtype, use_fast_accum=True)


def to_fp8(model: nn.Module) -> None:
    """Replace every frozen linear layer inside `model` by its fp8 form, in place, one at a time.

    Adapters around them stay what they are.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(module, name, Fp8Linear(child))
