"""Keys and values of all running requests, a row each, and the attention of one new token per row over them."""

from typing import Any

import torch
from transformers import AttentionInterface, GlmForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "chatglm3_grouped"
_BLOCK = 256  # positions; memory grows by doubling from here, so that a short-prompt server stays small


class SlotCache:
    """A transformers cache whose rows have lengths of their own: row r, position p of every layer.

    `aim` says where the next forward pass writes; each layer's tensors are [rows, groups, positions, head_dim].
    """

    def __init__(self, num_layers: int, num_rows: int, max_length: int) -> None:
        self.num_rows = num_rows
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._max_length = max_length

    @property
    def capacity(self) -> int:
        """Positions that it has memory for; when this has changed, so has the memory."""
        return min(layer[0].shape[2] if layer else 0 for layer in self._layers)

    def room_for(self, length: int) -> int:
        """The capacity that so many positions need."""
        room = _BLOCK
        while room < length:
            room *= 2
        return min(room, self._max_length)

    def aim(self, first_row: int, positions: torch.Tensor, length: int) -> None:
        """Let the next pass write `positions` [B, T] of rows first_row.. and read those rows' first `length`."""
        self._rows = slice(first_row, first_row + len(positions))
        self._positions = positions
        self._length = length

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new key and value [B, groups, T, d]; return all of its rows' [B, groups, length, d]."""
        layer = self._layers[layer_idx]
        if layer is None or layer[0].shape[2] < self._length:
            layer = self._layers[layer_idx] = (
                self._grown(key, layer and layer[0]),
                self._grown(value, layer and layer[1]),
            )
        batch = torch.arange(len(key), device=key.device)[:, None]
        positions = self._positions.to(key.device)
        rows = []
        for stored, new in zip(layer, (key, value), strict=True):
            view = stored[self._rows]
            view[batch, :, positions] = new.transpose(1, 2)
            rows.append(view[:, :, : self._length])
        return rows[0], rows[1]

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for layer in self._layers:
            for stored in layer or ():
                stored[target] = stored[source]

    def erase(self, row: int) -> None:
        """Zero a row for its next owner: NaN that the last one left would spoil it, even under an attention of 0."""
        for layer in self._layers:
            for stored in layer or ():
                stored[row].zero_()

    def _grown(self, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        """`old` with room for the aimed length; in zeros, since unused memory may hold NaN."""
        grown = new.new_zeros(self.num_rows, new.shape[1], self.room_for(self._length), new.shape[3])
        if old is not None:
            grown[:, :, : old.shape[2]] = old
        return grown


def position_bytes(model: GlmForCausalLM) -> int:
    """Memory of the keys and values of one position, in all layers."""
    sizes: list[int] = [layer.self_attn.k_proj.out_features for layer in model.model.layers]
    return 2 * sum(sizes) * model.dtype.itemsize


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention of query [B, heads, T, d] over key and value [B, groups, L, d]: [B, T, heads, d].

    For one new token per row, the heads that share keys become rows of one query. The stock function repeats the
    keys for each head instead: sixteen copies of the whole cache at every step of ChatGLM3-6B.
    """
    batch, heads, length, head_dim = query.shape
    if length > 1:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    folded = query.reshape(batch, key.shape[1], -1, head_dim)
    attended = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=kwargs["scaling"]
    )
    return attended.reshape(batch, 1, heads, head_dim), None


AttentionInterface.register(ATTENTION, _grouped_attention)
