"""Ledgers: the outcome of every key of a corpus, stored in its manifest.

A ledger counts the rows by temperature, with their repetitions, and the dropped keys by reason.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

from specdiff.data.corpus import CorpusWriter
from specdiff.data.shards import Row
from specdiff.repetition import repeated

DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """Counts of a whole corpus: rows by temperature, dropped keys by reason.

    `by_temperature` holds rows, tokens, answer_tokens, repeated (answer tokens in repeated
    8-grams), their share repeated_share, and cut (rows whose prompt is the start of a document).
    """

    rows: int
    tokens: int
    shards: int
    dropped: dict[str, int]
    first_dropped: dict[str, str]
    by_temperature: dict[str, dict[str, float]]


class Ledger:
    """Counts over a corpus, also over one that an earlier process began.

    `shards` are the columns already on disk, read once; later rows are counted as they come.
    """

    def __init__(self, writer: CorpusWriter, shards: Iterable[dict[str, Tensor]]) -> None:
        notes = writer.notes
        self.writer = writer
        self.by_temperature: dict[str, dict[str, int]] = notes.setdefault("by_temperature", {})
        self.dropped: dict[str, list[int]] = notes.setdefault("dropped", {})
        self.first_dropped: dict[str, str] = notes.setdefault("first_dropped", {})
        self.keys: set[int] = {key for keys in self.dropped.values() for key in keys}
        self.texts: set[bytes] = set()
        for shard in shards:
            self.keys |= set(shard["keys"].tolist())
            offsets = shard["offsets"].tolist()
            self.texts |= {_digest(shard["tokens"][a:b]) for a, b in pairwise(offsets)}

    def add(self, row: Row, *, cut: bool = False) -> bool:
        """Pass the row to the writer unless its text exists. Returns whether it was new."""
        digest = _digest(row.tokens)
        if digest in self.texts:
            self.drop(row.key, DUPLICATE)
            return False
        self.texts.add(digest)
        self.keys.add(row.key)
        answer = row.tokens[row.prompt_length :]
        values = {
            "rows": 1,
            "tokens": len(row.tokens),
            "answer_tokens": len(answer),
            "repeated": repeated(answer),
            "cut": int(cut),
        }
        counts = self.by_temperature.setdefault(f"{row.temperature:g}", dict.fromkeys(values, 0))
        for name, value in values.items():
            counts[name] += value
        self.writer.add(row)  # last: a full buffer is flushed here, together with the notes
        return True

    def drop(self, key: int, reason: str, detail: str = "") -> None:
        """Record that this key gives no row; it is not tried again.

        `detail` names its record; the first one of each reason is stored.
        """
        if key in self.keys:
            return
        self.keys.add(key)
        self.dropped.setdefault(reason, []).append(key)
        if detail:
            self.first_dropped.setdefault(reason, detail)

    @property
    def drops(self) -> int:
        """Number of dropped keys."""
        return sum(len(keys) for keys in self.dropped.values())

    def reasons(self) -> str:
        """The reasons of all drops in words, with their counts and first records."""
        counts = [f"{len(keys)} {reason}" for reason, keys in sorted(self.dropped.items())]
        details = [f"first {reason}: {d}" for reason, d in sorted(self.first_dropped.items())]
        return "; ".join([", ".join(counts) or "none", *details])

    def close(self) -> CorpusSummary:
        """Flush the writer and store the final counts in the manifest."""
        self.writer.flush()
        summary = self.summary()
        self.writer.notes["counts"] = asdict(summary)
        self.writer.flush()
        return summary

    def summary(self) -> CorpusSummary:
        """The counts so far."""
        return CorpusSummary(
            rows=self.writer.rows,
            tokens=self.writer.tokens,
            shards=len(self.writer.manifest["shards"]),
            dropped={reason: len(keys) for reason, keys in sorted(self.dropped.items())},
            first_dropped=dict(sorted(self.first_dropped.items())),
            by_temperature=with_shares(self.by_temperature),
        )


def with_shares(by_temperature: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """The counts in order of temperature, each with its share of repeated answer tokens."""
    shares: dict[str, dict[str, float]] = {}
    for name in sorted(by_temperature, key=float):
        counts = by_temperature[name]
        share = round(counts["repeated"] / max(1, counts["answer_tokens"]), 4)
        shares[name] = {**counts, "repeated_share": share}
    return shares


def _digest(tokens: Int[Tensor, "L"]) -> bytes:
    return hashlib.blake2b(tokens.int().numpy().tobytes(), digest_size=12).digest()
