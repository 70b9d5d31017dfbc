"""Values in few bits: the nearest that a format has, and those that GPTQ chooses."""

import pytest
import torch

from pipelines.weights.gptq import quantise
from pipelines.weights.weight_formats import QUANTISE, group_scales, nearest_int4, spread


@pytest.mark.parametrize(("weight_format", "largest"), [("fp8", 1 / 16), ("w4a16", 1 / 15)])
def test_a_quantised_value_is_the_nearest_that_its_format_has(weight_format: str, largest: float):
    """fp8 has 3 bits behind the point, so it is off by 1/16 of a value; 4 bits by half a step of 1/7.5 of the group's
    largest, and of the largest itself, where the steps end, by as much.
    """
    torch.manual_seed(0)
    weight = torch.randn(6, 256).bfloat16()
    made = QUANTISE[weight_format]("w_proj.weight", weight)
    scale = made["w_proj.weight_scale"].float()
    if weight_format == "fp8":
        found = made["w_proj.weight"].float() * scale
        bound = weight.float().abs() * largest + scale * 2**-10
    else:
        packed = made["w_proj.weight_packed"]
        values = torch.stack([((packed >> shift) & 15) - 8 for shift in range(0, 32, 4)], dim=2).flatten(1)
        found = values * scale.repeat_interleave(128, dim=1)
        bound = (weight.float().unflatten(1, (2, 128)).abs().amax(2) * largest).repeat_interleave(
            128, dim=1
        ) * 1.07  # the scale is rounded too
        assert made["w_proj.weight_shape"].tolist() == [6, 256]
    assert ((found - weight.float()).abs() <= bound).all()


def test_gptq_is_off_by_less_than_the_nearest_values_on_inputs_like_those_it_saw():
    torch.manual_seed(0)
    weight, mixing = torch.randn(32, 256), torch.randn(256, 256) / 16
    seen, unseen = (torch.randn(2000, 256) @ mixing for _ in range(2))  # inputs that go together, as real ones do
    values, scale = quantise(weight, seen.T @ seen)
    assert values.min() >= -8
    assert values.max() <= 7
    assert values.equal(values.round())
    chosen = values * scale.float().repeat_interleave(128, 1)
    uncorrected = spread(group_scales(weight))
    nearest = nearest_int4(weight, uncorrected) * uncorrected
    right = unseen @ weight.T
    off = [((unseen @ guess.T - right) ** 2).mean() / (right**2).mean() for guess in (chosen, nearest)]
    assert off[0] < 0.6 * off[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weight_format", ["fp8", "w4a16"])
def test_on_a_gpu_the_values_are_the_cpus_but_for_ties(weight_format: str):
    """Where merge quantises if there is one."""
    weight = torch.randn(64, 256).bfloat16()
    here, there = (QUANTISE[weight_format]("w_proj.weight", weight.to(device)) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        same = tensor.view(torch.uint8) == there[name].cpu().view(torch.uint8)
        assert same.float().mean() > 0.99, name
