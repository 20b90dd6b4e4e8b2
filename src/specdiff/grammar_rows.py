"""The grammars of a running batch: one matcher for each row that has one.

Between rounds a matcher stands after the row's committed tokens. A round reads the masks along its
draft, and the matcher returns; what is committed afterwards advances it in the next round. A tree
is read line by line, from the anchor to each leaf.

Shapes: B rows, R running rows with a grammar, K drafted tokens, N = K + 1 scored positions, L
tokens of a line, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from specdiff.grammar import Matcher, fill_masks
from specdiff.types import Batch, Draft

if TYPE_CHECKING:
    from llguidance import LLExecutor


@dataclass(frozen=True, slots=True)
class Drafted:
    """The running rows' drafts on the host: `lines[i][r]` is the i-th line of row r, of L tokens.

    A chain is one line. `line` and `depth` [R, N] say where each scored row of a tree lies (None: a
    chain's row n has depth n). Rows with fewer lines repeat one, shorter lines are padded: what no
    scored row points to is not used.
    """

    lines: Sequence[Sequence[Sequence[int]]]
    line: NDArray[np.int64] | None = None
    depth: NDArray[np.int64] | None = None


class GrammarRows:
    """The matchers of a batch's rows. False where no row has a grammar: then nothing is done."""

    def __init__(self) -> None:
        self.matchers: dict[int, Matcher] = {}
        self.running: list[int] = []  # rows with a matcher that are not done
        self.width = 0  # the most tokens that the last round can have committed
        self._executor: LLExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self.matchers)

    def admit(self, batch: Batch, rows: Int[Tensor, "R"]) -> None:
        """New requests sit in `rows`, or running ones whose answers are read again."""
        if not batch.grammars:
            return
        for row in rows.tolist():
            self.matchers.pop(row, None)
            if row in batch.grammars:
                answer = batch.ids[row, batch.prompt_length[row] : batch.length[row]].tolist()
                self.matchers[row] = Matcher(batch.grammars[row], answer)

    def release(self, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left."""
        if self.matchers:
            for row in rows.tolist():
                self.matchers.pop(row, None)
            self.running = [row for row in self.running if row in self.matchers]

    def advance(self, batch: Batch) -> None:
        """Read what the last round committed. Waits for the device once."""
        if not self.matchers:
            return
        rows = torch.tensor([*self.matchers], device=batch.ids.device)
        start = batch.prompt_length[rows] + torch.tensor(
            [len(matcher.tokens) for matcher in self.matchers.values()], device=rows.device
        )
        index = start[:, None] + torch.arange(self.width, device=rows.device)
        tokens = batch.ids[rows].gather(1, index.clamp(max=batch.ids.shape[1] - 1))
        count = batch.length[rows] - start
        table = torch.cat([torch.stack([count, batch.done[rows].long()], 1), tokens], 1).tolist()
        self.running = []
        for row, (new, done, *committed) in zip(self.matchers, table, strict=True):
            if not done:
                self.matchers[row].advance(committed[:new])
                self.running.append(row)

    def next_mask(self, batch: Batch, vocab_size: int) -> Bool[Tensor, "B V"] | None:
        """Which tokens may follow each row's text; all of them in a row without a grammar."""
        if not self.running:
            return None
        mask = torch.ones(
            len(batch.length), vocab_size, dtype=torch.bool, device=batch.length.device
        )
        rows = torch.tensor(self.running, device=mask.device)
        words = self._fill(Drafted([[[] for _ in self.running]]))
        return mask.index_copy(0, rows, unpacked(words, vocab_size, mask.device)[:, 0])

    def drafted(self, draft: Draft) -> Drafted:
        """The draft tokens of the running rows, on the host.

        Read them before the target scores them: they are there earlier than its logits.
        """
        self.width = draft.tokens.shape[1] + 1
        if not self.running:
            return Drafted([])
        if draft.parents is None:
            return Drafted([draft.tokens[self.running].tolist()])
        tokens, parents = torch.stack([draft.tokens, draft.parents])[:, self.running].tolist()
        return tree_lines(tokens, parents)

    def masked(self, logits: Float[Tensor, "B N V"], drafted: Drafted) -> Float[Tensor, "B N V"]:
        """The logits, -inf where a row's grammar forbids the token; the same object if none does.

        Row k is masked by the grammar's state after the `drafted` tokens before it. A position at
        which the grammar fails has no finite logit: see `error`.
        """
        if not self.running:
            return logits
        allowed = unpacked(self._fill(drafted), logits.shape[2], logits.device)
        if len(self.running) == len(logits):
            order = torch.tensor(self.running, device=logits.device).argsort()
            return logits.masked_fill(~allowed[order], -torch.inf)
        rows = torch.tensor(self.running, device=logits.device)
        return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed, -torch.inf))

    def errors(self) -> dict[int, str]:
        """Why the grammar of a row has failed at some position of the last draft, by row."""
        failures = {row: self.matchers[row].error for row in self.running}
        return {
            row: f"the grammar allows no token here ({error})"
            for row, error in failures.items()
            if error is not None
        }

    def _fill(self, drafted: Drafted) -> NDArray[np.int32]:
        """The packed masks [R, N, W] of the scored rows."""
        if self._executor is None:  # of this run alone: its threads do not survive a fork
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        matchers = [self.matchers[row] for row in self.running]
        masks = []
        errors: dict[int, str] = {}
        for lines in drafted.lines:
            masks.append(fill_masks(matchers, lines, self._executor))
            for row, matcher in enumerate(matchers):
                if matcher.error is not None:
                    errors.setdefault(row, matcher.error)
        for row, error in errors.items():
            matchers[row].error = error
        if drafted.line is None:
            return masks[0]
        rows = np.arange(len(matchers))[:, None]
        scored: NDArray[np.int32] = np.stack(masks)[drafted.line, rows, drafted.depth]
        return scored


def tree_lines(tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Drafted:
    """The lines from the anchor to the leaves of each row's tree."""
    nodes = [_paths(row) for row in parents]
    count = max(len(paths) for paths in nodes)
    longest = max(len(path) for paths in nodes for path in paths)
    shape = len(tokens), len(tokens[0]) + 1
    line = np.zeros(shape, dtype=np.int64)
    depth = np.zeros(shape, dtype=np.int64)
    lines: list[list[list[int]]] = [[] for _ in range(count)]
    for row, paths in enumerate(nodes):
        for i in range(count):
            path = paths[i] if i < len(paths) else paths[0]
            text = [tokens[row][node] for node in path]
            lines[i].append(text + [0] * (longest - len(text)))
        for i, path in enumerate(paths):
            for k, node in enumerate(path):
                line[row, node + 1] = i
                depth[row, node + 1] = k + 1
    return Drafted(lines, line, depth)


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """The nodes from the anchor to each leaf."""
    paths = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


def unpacked(
    words: NDArray[np.int32], vocab_size: int, device: torch.device
) -> Bool[Tensor, "R N V"]:
    """Packed masks as booleans; a vocabulary is at most as large as the mask."""
    packed = torch.from_numpy(words.view(np.uint8)).to(device)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    bits = packed[..., None].bitwise_and(powers) != 0
    return bits.flatten(-2)[..., :vocab_size]
