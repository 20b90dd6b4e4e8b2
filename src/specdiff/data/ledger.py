"""What became of every key of a corpus: rows by temperature with their loops, and what was dropped and why. Kept in the manifest."""

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from jaxtyping import Int
from torch import Tensor

from specdiff.data.corpus import CorpusWriter, Row
from specdiff.repetition import repeated

DUPLICATE = "duplicate"


class Ledger:
    """Counts over a corpus, also over one that an earlier process began: read once from disk, then kept up row by row."""

    def __init__(self, writer: CorpusWriter, written: Iterable[dict[str, Tensor]]) -> None:
        self.writer = writer
        self.by_temperature: dict[str, dict[str, int]] = writer.notes.setdefault(
            "by_temperature", {}
        )
        self.dropped: dict[str, list[int]] = writer.notes.setdefault("dropped", {})
        self.first_dropped: dict[str, str] = writer.notes.setdefault("first_dropped", {})
        self.known: set[int] = {key for keys in self.dropped.values() for key in keys}
        self.texts: set[bytes] = set()
        for shard in written:
            self.known |= set(shard["keys"].tolist())
            offsets = shard["offsets"].tolist()
            self.texts |= {_digest(shard["tokens"][a:b]) for a, b in pairwise(offsets)}

    def add(self, row: Row, *, cut: bool = False) -> bool:
        """Hand the row to the writer, unless the same text is there already. Returns whether it was new."""
        digest = _digest(row.tokens)
        if digest in self.texts:
            self.drop(row.key, DUPLICATE)
            return False
        self.texts.add(digest)
        self.known.add(row.key)
        counts = self.by_temperature.setdefault(
            f"{row.temperature:g}",
            {"rows": 0, "tokens": 0, "answer_tokens": 0, "repeated": 0, "cut": 0},
        )
        answer = row.tokens[row.prompt_length :]
        for name, value in (
            ("tokens", len(row.tokens)),
            ("answer_tokens", len(answer)),
            ("repeated", repeated(answer)),
            ("cut", int(cut)),
        ):
            counts[name] += value
        counts["rows"] += 1
        self.writer.add(row)  # last: a full buffer is flushed here, together with the notes
        return True

    def drop(self, key: int, why: str, detail: str = "") -> None:
        """This key gives no row, and is not tried again. `detail` names its record; the first of each reason is kept."""
        if key in self.known:
            return
        self.known.add(key)
        self.dropped.setdefault(why, []).append(key)
        if detail:
            self.first_dropped.setdefault(why, detail)

    def reasons(self) -> str:
        """What was dropped, for people: counts, and the first record of each reason that names one."""
        counts = [f"{len(keys)} {why}" for why, keys in sorted(self.dropped.items())]
        return "; ".join(
            [
                ", ".join(counts) or "none",
                *(f"first {why}: {d}" for why, d in sorted(self.first_dropped.items())),
            ]
        )

    def close(self) -> dict[str, Any]:
        """Flush, and leave the closing counts in the manifest."""
        self.writer.flush()
        self.writer.notes["counts"] = summary = self.summary()
        self.writer.flush()
        return summary

    def summary(self) -> dict[str, Any]:
        """Rows, tokens, what was dropped, and by temperature the share of answer tokens in repeated 8-grams."""
        laws = {
            name: {**c, "repeated_share": round(c["repeated"] / max(1, c["answer_tokens"]), 4)}
            for name, c in sorted(self.by_temperature.items(), key=lambda item: float(item[0]))
        }
        return {
            "rows": self.writer.rows,
            "tokens": self.writer.tokens,
            "shards": len(self.writer.manifest["shards"]),
            "dropped": {why: len(keys) for why, keys in sorted(self.dropped.items())},
            "first_dropped": dict(sorted(self.first_dropped.items())),
            "by_temperature": laws,
        }


def _digest(tokens: Int[Tensor, "L"]) -> bytes:
    return hashlib.blake2b(tokens.int().numpy().tobytes(), digest_size=12).digest()
