"""The room of a running batch: how many rows of which width its caches may have together."""

from dataclasses import dataclass

from specdiff.errors import UsageError

STEP = 256  # positions by which caches grow


def rounded(positions: int) -> int:
    """The next multiple of STEP."""
    return -(-positions // STEP) * STEP


def stored(positions: int) -> int:
    """The slots of a row that reserves a number of positions: one more, which holds nothing."""
    return rounded(positions) + 1


@dataclass(frozen=True, slots=True)
class Capacity:
    """At most `rows` rows of `width` positions, and `positions` in all (None: no such limit).

    Every row is as wide as the widest needs to be.
    """

    rows: int
    width: int
    positions: int | None = None

    def check(self) -> None:
        """Raise UsageError if one row of full width has no room."""
        if not self.holds(1, self.width):
            raise UsageError(
                f"a request may take {stored(self.width)} positions of the cache, and there is "
                f"memory for {self.positions}; give more memory, or lower the context length",
                param="slots",
            )

    def need(self, tokens: int) -> int:
        """The positions that a row reserves to reach a number of tokens."""
        return min(rounded(tokens), rounded(self.width))

    def holds(self, rows: int, width: int) -> bool:
        """Whether there is room for rows of a width."""
        return rows <= self.rows and (
            self.positions is None or rows * stored(width) <= self.positions
        )

    def grown(self, rows: int, missing: int, width: int) -> int:
        """The rows to open in place of `rows` where `missing` more are needed: twice as many, if
        they have room."""
        more = rows + max(missing, min(rows, self.rows - rows))
        if self.positions is not None:
            more = min(more, self.positions // stored(width))
        return max(more, rows + missing)
