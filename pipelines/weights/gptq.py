"""4-bit integers whose errors cancel on the data they will see: GPTQ (arXiv:2210.17323), one layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM

from cluster.progress import track
from pipelines.weights.weight_formats import GROUP, Tensors, group_scales, nearest_int4, packed_int4, spread

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper


@dataclass
class Calibrated:
    """The matrices of a model in w4a16, and how far off their outputs are on the calibration rows."""

    tensors: dict[str, Tensors]
    """By the matrix's name."""
    error: float = 0.0
    """Mean over the matrices of the output's squared error, as a share of the output's square."""
    error_of_nearest: float = 0.0
    """The same if each value were the nearest."""


@torch.inference_mode()
def calibrate(model: GlmForCausalLM, rows: list[list[int]]) -> Calibrated:
    """Quantise the layers' matrices of a 16-bit model, which is changed, on rows of ids. Outputs of a quantised layer
    are the next one's inputs, so that it makes up for what went wrong before it.
    """
    found, errors = Calibrated({}), []
    inputs, settings = _first_inputs(model, rows)
    layers = model.model.layers
    for number, layer in enumerate(track(layers, "calibrate", len(layers))):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        with _hessians(linears) as hessians:
            for hidden, extra in zip(inputs, settings, strict=True):
                layer(hidden, **extra)
        for name, linear in linears.items():
            weight, hessian = linear.weight.float(), hessians[name]
            uncorrected = spread(group_scales(weight))
            nearest = nearest_int4(weight, uncorrected) * uncorrected
            values, scale = quantise(weight, hessian)
            linear.weight.copy_(values * spread(scale))
            full = f"model.layers.{number}.{name}.weight"
            found.tensors[full] = {
                part: tensor.cpu() for part, tensor in packed_int4(full, values.to(torch.int32), scale).items()
            }
            errors.append([_error(weight, guess, hessian) for guess in (linear.weight.float(), nearest)])
        inputs = [layer(hidden, **extra) for hidden, extra in zip(inputs, settings, strict=True)]
    found.error, found.error_of_nearest = torch.tensor(errors).mean(0).tolist()
    return found


def quantise(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Values from -8 to 7 [rows, columns] and scales [rows, columns / GROUP] of a weight whose inputs x have
    sum(x x^T) = `hessian` [columns, columns]. Each column's error is made up for in the columns behind it.
    """
    weight, values = weight.clone(), torch.empty_like(weight)
    inverse = _inverse_factor(hessian)
    scales = []
    for start in range(0, weight.shape[1], GROUP):
        block, errors = weight[:, start : start + GROUP].clone(), torch.empty(len(weight), GROUP).to(weight)
        scale = group_scales(block)
        scales.append(scale)
        for column in range(GROUP):
            row = inverse[start + column, start : start + GROUP]
            value = nearest_int4(block[:, column], scale[:, 0])
            error = (block[:, column] - value * scale[:, 0].float()) / row[column]
            block[:, column:] -= error[:, None] * row[column:]
            values[:, start + column], errors[:, column] = value, error
        weight[:, start + GROUP :] -= errors @ inverse[start : start + GROUP, start + GROUP :]
    return values, torch.cat(scales, 1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean() + 1e-6
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _error(weight: Tensor, guess: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs as a share of their square."""
    wrong = weight - guess
    return float(((wrong @ hessian) * wrong).sum() / ((weight @ hessian) * weight).sum())


class _Captured(Exception):
    """The first layer was reached: no more of the model is needed."""


def _first_inputs(model: GlmForCausalLM, rows: list[list[int]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer is called with for each row: its input, and masks and positions, which all layers share."""
    inputs: list[Tensor] = []
    settings: list[dict[str, Any]] = []

    def capture(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(arguments[0])
        settings.append(named)
        raise _Captured

    layers = model.model.layers
    handle = layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    for ids in rows:
        with suppress(_Captured):
            model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    handle.remove()
    return inputs, settings


@contextmanager
def _hessians(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """sum(x x^T) over all inputs x that each linear layer meets meanwhile, in fp32."""
    sums: dict[str, Tensor] = {}

    def add(name: str, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.T @ x

    handles = [
        linear.register_forward_pre_hook(lambda module, arguments, name=name: add(name, arguments))
        for name, linear in linears.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
