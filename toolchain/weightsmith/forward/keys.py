"""Keys and values of the tokens that a batch of texts has so far.

They stay where they are when a token turns out wrong: its column becomes a hole, which is masked,
and columns are moved together only if there are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from weightsmith.forward.heads import BatchPositions


class KvCacheLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, with room for more: adding some copies only these."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: dict[str, torch.Tensor] = {}
        self.updated: Any = None
        """Called after keys and values were added, if not None."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [rows, heads, columns, width]; return all of them."""
        start = self.get_seq_length()
        self.is_initialized, self.device = True, key_states.device
        self.keys = self._added("keys", start, key_states)
        self.values = self._added("values", start, value_states)
        if self.updated is not None:
            self.updated()
        return self.keys, self.values

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Keep some columns [kept rows, kept columns] of some rows [kept rows]."""
        if not self.is_initialized:
            return
        for name, buffer in self._buffers.items():
            heads = torch.arange(buffer.shape[1])[:, None]
            kept = buffer[rows[:, None, None], heads, columns[:, None]]
            self._buffers[name] = buffer.new_empty(
                (len(rows), buffer.shape[1], max(self._room, kept.shape[2]), buffer.shape[3])
            )
            setattr(self, name, self._added(name, 0, kept))

    def _added(self, name: str, start: int, states: torch.Tensor) -> torch.Tensor:
        old, end = self._buffers.get(name), start + states.shape[-2]
        if old is None or end > old.shape[-2]:
            shape = (*states.shape[:2], max(self._room, end), states.shape[-1])
            self._buffers[name] = states.new_empty(shape)
            if old is not None:
                self._buffers[name][:, :, :start] = old[:, :, :start]
        buffer = self._buffers[name]
        buffer[:, :, start:end] = states
        return buffer[:, :, :end]


class Keys:
    """The cache of a batch, whose texts have different lengths.

    A column may be a token of some texts and a hole in others, which is masked and has no position.
    """

    def __init__(self, layers: int, rows: int, room: int, *, positioned: bool) -> None:
        """`positioned` says that the model takes positions, and does not always count itself."""
        self._positioned = positioned
        self.cache: Any = Cache(layers=[KvCacheLayer(room) for _ in range(layers)])
        self._real = torch.ones((rows, 0), dtype=torch.bool)
        """[rows, columns]: which columns are tokens."""

    @property
    def lengths(self) -> torch.Tensor:
        """Each row's number of tokens."""
        return self._real.sum(1)

    def given(self, counts: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
        """Return what a model is called with to read so many more tokens of each row.

        They are padded on the right to `width` columns. Without holes, a model needs no mask and
        counts the positions itself.
        """
        named: dict[str, Any] = {"cache": self.cache, "use_cache": True}
        if bool(self._real.all()):
            return named
        # Behind a row's tokens is nothing that they could see.
        new = torch.ones((len(self._real), width), dtype=torch.bool)
        named["attention_mask"] = torch.cat([self._real, new], 1).long()
        if self._positioned:
            place = torch.minimum(torch.arange(width), (counts[:, None] - 1).clamp(min=0))
            named["position_ids"] = self.lengths[:, None] + place
        return named

    def keep(self, counts: torch.Tensor, width: int) -> None:
        """Count so many of the columns that were added to each row as its tokens."""
        new = torch.arange(width) < counts[:, None]
        self._real = torch.cat([self._real, new], 1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, and no more columns than the longest of them needs."""
        kept = torch.tensor(rows)
        real = self._real[kept]
        most = int(real.sum(1).max())
        # Holes first, tokens in their order behind them.
        columns = real.int().argsort(dim=1, stable=True)[:, -most:]
        for layer in self.cache.layers:
            layer.select(kept, columns)
        self._real = real.gather(1, columns)

    @property
    def holes(self) -> int:
        """Columns that no row would need if each had its tokens beside each other."""
        return self._real.shape[1] - int(self.lengths.max())

    def narrow(self, positions: BatchPositions) -> None:
        """Tell when the last keys and values are there: then only positions with logits matter."""
        self.cache.layers[-1].updated = positions.narrow
