"""A static key/value cache whose rows advance independently.

Each forward writes its keys and values at per-row slots and attends to a bucketed prefix of them,
so cost follows length and shapes stay few. Memory follows the longest text too: the stores grow in
steps, up to all slots. Nothing is ever removed: a rejected slot is simply overwritten, because the
next write starts there. Of a tree, the accepted path is first moved to consecutive slots.

Shapes: B rows, R rows of this forward, A key/value heads, N positions of this forward, S slots,
D head width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.capacity import rounded

BUCKET = 128


@dataclass(slots=True)
class RaggedCache:
    """Call `place` before each forward; attention calls `update`. Layers appear at first write."""

    rows: int
    slots: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    index: tuple[Int[Tensor, "R 1"], Int[Tensor, "R N"]] | None = None  # rows and slots to write
    whole: bool = True  # whether those are all rows, in order
    bound: int = 0
    width: int = 0  # slots that the stores must have
    graphs: dict[Any, Any] = field(default_factory=dict)  # captured forwards over this cache

    def place(
        self,
        at: Int[Tensor, "R N"],
        selected: Int[Tensor, "R"] | None = None,
        length: int | None = None,
    ) -> None:
        """Set the slots of the next forward: row `selected[r]` (default: every row) at `at[r]`.

        It attends to the slots below `length`; a caller that gives it may write to any slot.
        """
        self.whole = selected is None
        rows = torch.arange(len(at), device=at.device) if selected is None else selected
        self.index = rows[:, None], at
        reach = int(at.max()) + 1 if length is None else length
        self.bound = min(self.slots, -(-reach // BUCKET) * BUCKET)
        width = self.slots if length is not None else min(self.slots, rounded(self.bound))
        self.width = width + 1  # a compiled layer takes the attended slots to be a part of all

    def update(
        self, keys: Float[Tensor, "R A N D"], values: Float[Tensor, "R A N D"], layer: int
    ) -> tuple[Float[Tensor, "R A S D"], Float[Tensor, "R A S D"]]:
        """Store this forward's keys and values; return all that may be attended."""
        self.reserve(layer, keys, values)
        return self._write(self.keys[layer], keys), self._write(self.values[layer], values)

    def reserve(
        self, layer: int, keys: Float[Tensor, "R A N D"], values: Float[Tensor, "R A N D"]
    ) -> None:
        """Room for `width` slots in a layer's stores, of the heads, widths and dtypes of these."""
        for stores, new in ((self.keys, keys), (self.values, values)):
            old = stores.get(layer)
            if old is not None and old.shape[2] >= self.width:
                continue
            self.graphs.clear()  # they read and write the old store
            stores[layer] = new.new_zeros(self.rows, new.shape[1], self.width, new.shape[3])
            if old is not None:
                stores[layer][:, :, : old.shape[2]] = old

    @property
    def reserved(self) -> bool:
        """Whether the stores of the first layer have room for this forward."""
        return 0 in self.keys and self.keys[0].shape[2] >= self.width

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(store.nbytes for store in (*self.keys.values(), *self.values.values()))

    def move(self, source: Int[Tensor, "R N"], to: Int[Tensor, "R N"]) -> None:
        """Copy the keys and values of every row from slots `source` to slots `to`."""
        for store in (*self.keys.values(), *self.values.values()):
            rows = torch.arange(self.rows, device=store.device)[:, None]
            slots = store.transpose(1, 2)
            slots.index_put_((rows, to.to(store.device)), slots[rows, source.to(store.device)])

    def _write(self, store: Tensor, new: Tensor) -> Tensor:
        assert self.index is not None, "place comes first"
        rows, at = self.index
        if at.device != new.device:  # a model's layers may lie on several devices
            rows, at = rows.to(new.device), at.to(new.device)
        # advanced-index assignment: scatter_ on a bf16 CPU tensor copies all of it
        store.transpose(1, 2).index_put_((rows, at), new.transpose(1, 2))
        return store[:, :, : self.bound] if self.whole else store[rows[:, 0], :, : self.bound]
