"""FlashAttention 4's operators in compiled layers, by plain arithmetic in the package's place: it needs a GPU.

With the package and a GPU, `pytest -m gpu tests/test_step.py` goes through the real one.
"""

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipelines.compute import flash_attention_4
from pipelines.compute.packed_attention import _one_by_one

BOUNDARIES, LONGEST, SCALE = torch.tensor([0, 5, 24, 24], dtype=torch.int32), 19, 0.3


def examples(boundaries: Tensor, *tensors: Tensor) -> Any:
    """Each example's part of each tensor, heads first; those of groups once for each of their heads."""
    heads = tensors[0].shape[1]
    for start, end in pairwise(boundaries.tolist()):
        yield (
            slice(start, end),
            [t[start:end].repeat_interleave(heads // t.shape[1], 1).transpose(0, 1) for t in tensors],
        )


def probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    later = torch.ones(query.shape[1], key.shape[1]).triu(1).bool()
    return (query @ key.mT * scale).masked_fill(later, float("-inf")).softmax(-1)


def forward(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, **known: Any) -> tuple[Any, ...]:
    assert known["causal"] and known["return_lse"] and known["max_seqlen_q"] == LONGEST
    output = torch.empty_like(query)
    for place, (q, k, v) in examples(known["cu_seqlens_q"], query, key, value):
        output[place] = (probabilities(q, k, softmax_scale) @ v).transpose(0, 1)
    return output, torch.zeros(query.shape[1], query.shape[0]), None, None, None


def backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor, log_sums: Tensor, **known: Any
) -> tuple[Tensor, ...]:
    scale, groups = known["softmax_scale"], key.shape[1]
    found = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for place, (q, k, v, g) in examples(known["cu_seqlens_k"], query, key, value, gradient):
        p = probabilities(q, k, scale)
        of_p = g @ v.mT
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
        of_each = of_scores @ k, of_scores.mT @ q, p.mT @ g
        for total, part, heads in zip(found, of_each, (query.shape[1], groups, groups), strict=True):
            total[place] = part.unflatten(0, (heads, -1)).sum(1).transpose(0, 1)
    return tuple(found)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)


def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return 2 * flash_attention_4.attend(*flat, BOUNDARIES, LONGEST, SCALE)[0][None]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_is_one_graph_and_has_the_gradients_of_its_examples_one_by_one(
    package: None, is_compiled: bool, recompute: bool
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 24, 16, requires_grad=True) for heads in (4, 2, 2)]
    gradient = torch.randn(1, 24, 4, 16)
    run = torch.compile(layer, fullgraph=True, dynamic=False) if is_compiled else layer
    output = checkpoint(run, *inputs, use_reentrant=False) if recompute else run(*inputs)
    expected = 2 * _one_by_one(*inputs, BOUNDARIES, SCALE)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(each, inputs, gradient) for each in (output, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
