"""Corpora on disk: reading them row by row, and appending rows to them.

Shapes: L tokens of one row, T layers, H width of the target.
"""

import bisect
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import files
from specdiff.data.shards import FORMAT, MANIFEST, Row, Shard, read_manifest
from specdiff.errors import CorpusError, StorageError, UsageError
from specdiff.noise import row_seed

# The key of a packed row is its group followed by its place in the group; the rows of one group
# share documents. PACKED is the key of `about` that marks such a corpus.
GROUP_BITS = 40
PACKED = "grouped"
SPLIT = 0x5EED  # seed of the hash that holds rows out
WEIGHTS = "target_weights"  # a key of `about` that older manifests lack


class Corpus:
    """A corpus folder, read row by row without loading it whole.

    Raises CorpusError naming the folder or file and the fix.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shards = [Shard(self.folder, i, s) for i, s in enumerate(self.manifest["shards"])]
        self._ends: list[int] = []
        for shard in self.shards:
            self._ends.append((self._ends[-1] if self._ends else 0) + shard.rows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def tokens(self) -> int:
        return sum(int(s["tokens"]) for s in self.manifest["shards"])

    def __getitem__(self, row: int) -> Row:
        shard, local = self._find(row)
        return shard.row(local)

    def columns(self) -> Iterator[dict[str, Tensor]]:
        """Per shard: tokens [n], offsets [rows + 1], prompt_lengths, temperatures, keys [rows]."""
        for shard in self.shards:
            yield shard.columns | {"tokens": shard.tokens(0, shard.rows)}

    def features(self, row: int) -> tuple[Float[Tensor, "L H"], Float[Tensor, "L"]] | None:
        """The target's final states and log normalizers at the row's tokens; None if absent."""
        shard, local = self._find(row)
        return shard.features(local)

    @property
    def has_features(self) -> bool:
        """Whether every shard's features were computed."""
        return bool(self.shards) and all(s.features_path.exists() for s in self.shards)

    def layer_states(self, row: int, layers: Sequence[int]) -> Float[Tensor, "L T*H"]:
        """The target's states after `layers` (0: the first) at the row's tokens, concatenated."""
        shard, local = self._find(row)
        return shard.layer_states(local, layers)

    def has_layers(self, layers: Sequence[int]) -> bool:
        """Whether the states after `layers` were computed for every shard."""
        return bool(self.shards) and all(
            shard.layer_path(layer).exists() for shard in self.shards for layer in layers
        )

    def feature_metadata(self, shard: int, target_weights: str) -> dict[str, str]:
        """Metadata of a shard's features: the target and the tokens they belong to."""
        return {
            "target_weights": target_weights,
            "shard_sha256": self.manifest["shards"][shard]["sha256"],
        }

    def check_features(self, target_weights: str) -> None:
        """Raises CorpusError if any stored features belong to another target or other tokens."""
        for index, shard in enumerate(self.shards):
            expected = self.feature_metadata(index, target_weights)
            for path, file in shard.stored_features().items():
                _check_metadata(path, file.metadata() or {}, expected)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the shards: the identity of the rows."""
        digests = "".join(s["sha256"] for s in self.manifest["shards"])
        return hashlib.sha256(digests.encode()).hexdigest()

    def verify(self) -> None:
        """Compare the digest of every shard with the manifest.

        Raises CorpusError naming the shard that differs.
        """
        for shard, entry in zip(self.shards, self.manifest["shards"], strict=True):
            digest = files.digest(shard.path)
            if digest != entry["sha256"]:
                raise CorpusError(
                    f"{shard.path} was changed after it was written (SHA-256 {digest}, "
                    f"not {entry['sha256']}); restore it or write the corpus again"
                )

    def split(self, held_out: float) -> tuple[list[int], list[int]]:
        """Indices of the training rows and of the held-out rows, at least one of each.

        A hash of the row's key decides the part and the order. Neither depends on the order in
        which rows were written, and a growing corpus never moves a row from one part to the
        other. Rows of a packed corpus that share a document lie in the same part.
        """
        about = self.manifest["about"]
        if "row_tokens" in about and PACKED not in about:
            raise CorpusError(
                f"{self.folder} was packed by an earlier version, which put one document into "
                f"both parts; pack it again into another --out (nothing is generated)"
            )
        keys = [key for shard in self.shards for key in shard.columns["keys"].tolist()]
        groups = [key >> GROUP_BITS for key in keys] if PACKED in about else keys
        places = {group: row_seed(SPLIT, group) / 2.0**64 for group in set(groups)}
        if len(places) < 2:
            rows = "rows that share documents" if PACKED in about else "rows"
            raise CorpusError(
                f"{self.folder} holds {len(keys)} {rows}; "
                f"training needs at least 2 apart, one of them held out"
            )
        ranks = sorted(places.values())
        limit = min(max(held_out, ranks[0]), ranks[-2])
        order = sorted(range(len(keys)), key=lambda row: (places[groups[row]], keys[row]))
        first = sum(places[group] <= limit for group in groups)
        return order[first:], order[:first]

    def counts(self, rows: Sequence[int], vocab_size: int) -> Int[Tensor, "V"]:
        """How often each token occurs in `rows`."""
        selection = torch.zeros(len(self), dtype=torch.bool)
        selection[torch.as_tensor(rows, dtype=torch.long)] = True
        total = torch.zeros(vocab_size, dtype=torch.long)
        start = 0
        for shard in self.shards:
            lengths = shard.columns["offsets"].diff()
            inside = torch.repeat_interleave(selection[start : start + shard.rows], lengths)
            total += torch.bincount(shard.tokens(0, shard.rows)[inside], minlength=vocab_size)
            start += shard.rows
        return total

    def _find(self, row: int) -> tuple[Shard, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} rows")
        shard = bisect.bisect_right(self._ends, row)
        return self.shards[shard], row - (self._ends[shard - 1] if shard else 0)


def _check_metadata(path: Path, stored: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        if stored.get(name) != value:
            raise CorpusError(
                f"{path} holds states of the target with {name} = "
                f"{stored.get(name, 'unknown')}, not {value}: "
                f"they are of another target or of other tokens; "
                f"delete the features-* files and compute them again:  specdiff data --features"
            )


class CorpusWriter:
    """Appends rows; a full buffer becomes a shard.

    Opening the folder of an interrupted writer resumes after its last shard. `about` describes the
    writer (target, settings, seed); resuming with another `about` is refused: the mixture could
    not be reproduced. `notes` is stored in the manifest, always together with the shards it
    describes.

    Raises UsageError if the folder holds something else, StorageError if it cannot be written or
    another process is writing to it, CorpusError if it was begun with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, Any],
        *,
        vocab_size: int,
        shard_tokens: int = 1 << 20,
    ) -> None:
        self.folder = Path(folder)
        self.shard_tokens = shard_tokens
        self.dtype = torch.uint16 if vocab_size <= 1 << 16 else torch.int32
        self.buffer: list[Row] = []
        self.buffered = 0
        self.failed = False
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "about": dict(about),
            "vocab_size": vocab_size,
            "shards": [],
            "notes": {},
        }
        check_folder(self.folder)
        self.lock = files.lock(self.folder)
        try:
            if (self.folder / MANIFEST).exists():
                self.manifest = {"notes": {}} | read_manifest(self.folder)
                self._resume(about)
            else:
                files.write_json(self.folder / MANIFEST, self.manifest)
        except BaseException:
            self.lock.release()
            raise
        self.notes: dict[str, Any] = self.manifest["notes"]

    def _resume(self, about: Mapping[str, Any]) -> None:
        stored = self.manifest["about"]
        for name, value in json.loads(json.dumps(about)).items():
            if name == WEIGHTS and name not in stored:
                continue
            if stored.get(name) != value:
                raise CorpusError(
                    f"{self.folder} was begun with {name} = {stored.get(name)!r}, not {value!r}; "
                    f"repeat that setting to resume, or choose another --out"
                )
        if WEIGHTS in about:
            self.manifest["about"] = stored | {WEIGHTS: about[WEIGHTS]}

    @property
    def tokens(self) -> int:
        """Number of tokens written and buffered."""
        return sum(int(s["tokens"]) for s in self.manifest["shards"]) + self.buffered

    @property
    def rows(self) -> int:
        return sum(int(s["rows"]) for s in self.manifest["shards"]) + len(self.buffer)

    def add(self, row: Row) -> None:
        self.buffer.append(row)
        self.buffered += len(row.tokens)
        if self.buffered >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows as a shard, and the notes.

        Raises StorageError if the disk is full or not writable; no complete shard is lost then.
        """
        manifest = self.manifest | {"notes": self.notes}
        shards = manifest["shards"]
        try:
            if self.buffer:
                entry = self._write(f"shard-{len(shards):05d}.safetensors")
                manifest["shards"] = [*shards, entry]
            files.write_json(self.folder / MANIFEST, manifest)
        except StorageError as error:
            self.failed = True  # __exit__ would fail in the same way
            raise StorageError(
                f"{error}; the {len(shards)} complete shards are intact: "
                f"make room, then repeat the command to resume"
            ) from error
        self.manifest = manifest
        self.buffer = []
        self.buffered = 0

    def _write(self, name: str) -> dict[str, Any]:
        lengths = torch.tensor([len(r.tokens) for r in self.buffer])
        prompt_lengths = [r.prompt_length for r in self.buffer]
        temperatures = [r.temperature for r in self.buffer]
        columns = {
            "tokens": torch.cat([r.tokens for r in self.buffer]).to(self.dtype),
            "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            "prompt_lengths": torch.tensor(prompt_lengths, dtype=torch.int32),
            "temperatures": torch.tensor(temperatures, dtype=torch.float32),
            "keys": torch.tensor([r.key for r in self.buffer], dtype=torch.int64),
        }
        path = files.write_tensors(self.folder / name, columns)
        return {
            "file": name,
            "rows": len(self.buffer),
            "tokens": self.buffered,
            "sha256": files.digest(path),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if not self.failed:
                self.flush()
        finally:
            self.lock.release()


def check_folder(folder: Path) -> None:
    """Raises UsageError if the folder holds files but no corpus."""
    if (folder / MANIFEST).exists() or not folder.is_dir():
        return
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if others:
        raise UsageError(
            f"{folder} holds {others[0]}, but no {MANIFEST}: it is not a corpus; "
            f"choose another --out"
        )


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths, padded with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
