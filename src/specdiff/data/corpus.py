"""Token rows on disk: safetensors shards and a manifest. A shard appears whole or not at all, so a killed writer loses one at most.

    manifest.json                what wrote it, and every complete shard with its counts and SHA-256
    shard-00000.safetensors      tokens [n], offsets [rows + 1], prompt_lengths, temperatures, keys [rows]
    features-00000.safetensors   (optional, `training.features`) the target's final states at each of those tokens

Shapes: L tokens of one row, H width of the target.
"""

import bisect
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdiff import files
from specdiff.errors import CorpusError, StorageError, UsageError
from specdiff.noise import row_seed

FORMAT = "specdiff-corpus-1"
MANIFEST = "manifest.json"
GROUP_BITS = (
    40  # a packed row's key is its group, then its place in it: rows of one group share documents
)
PACKED = "grouped"  # the key of `about` that says so
SPLIT = 0x5EED  # of the hash that holds rows out
ADDED = "target_weights"  # the key of `about` that older manifests lack; the others tell their targets apart


@dataclass(frozen=True, slots=True)
class Row:
    """One text as tokens. `prompt_length` tokens of it were given; 0 temperature is greedy. `key` names the request it answers."""

    tokens: Int[Tensor, "L"]
    prompt_length: int
    temperature: float
    key: int


class Corpus:
    """A corpus folder, read row by row without loading it. Raises CorpusError naming the folder or file and the fix."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shards = [_Shard(self.folder, i, s) for i, s in enumerate(self.manifest["shards"])]
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
        """Shard by shard: tokens [n], offsets [rows + 1], prompt_lengths, temperatures and keys [rows]."""
        for shard in self.shards:
            yield shard.columns | {"tokens": shard.tokens(0, shard.rows)}

    def features(self, row: int) -> tuple[Float[Tensor, "L H"], Float[Tensor, "L"]] | None:
        """The target's final states at the row's tokens and the log of its softmax's normaliser there, if they were computed."""
        shard, local = self._find(row)
        return shard.features(local)

    @property
    def has_features(self) -> bool:
        """Whether every shard's features were computed."""
        return bool(self.shards) and all(s.features_path.exists() for s in self.shards)

    def feature_metadata(self, shard: int, target_weights: str) -> dict[str, str]:
        """What a shard's features say of themselves: of which target they are, and of which tokens."""
        return {
            "target_weights": target_weights,
            "shard_sha256": self.manifest["shards"][shard]["sha256"],
        }

    def check_features(self, target_weights: str) -> None:
        """Raises CorpusError if any features there are of another target, or of other tokens."""
        for index, shard in enumerate(self.shards):
            if not shard.features_path.exists():
                continue
            metadata = shard.feature_file.metadata() or {}
            for name, value in self.feature_metadata(index, target_weights).items():
                if metadata.get(name) != value:
                    raise CorpusError(
                        f"{shard.features_path} holds final states with {name} = {metadata.get(name, 'unknown')}, not {value}: "
                        f"they are of another target or of other tokens; delete the features-* files and compute them again:  "
                        f"specdiff data --features"
                    )

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' own digests: the identity of the rows."""
        return hashlib.sha256(
            "".join(s["sha256"] for s in self.manifest["shards"]).encode()
        ).hexdigest()

    def verify(self) -> None:
        """Read every shard whole and compare its digest with the manifest's. Raises CorpusError naming the shard that differs."""
        for shard, entry in zip(self.shards, self.manifest["shards"], strict=True):
            digest = files.digest(shard.path)
            if digest != entry["sha256"]:
                raise CorpusError(
                    f"{shard.path} was changed after it was written (SHA-256 {digest}, not {entry['sha256']}); "
                    f"restore it or make the corpus anew"
                )

    def split(self, held_out: float) -> tuple[list[int], list[int]]:
        """Indices of the training rows, and of the share that is held out (at least one row each).

        A hash of the row's key decides, and gives the order of both: neither depends on the order in which rows were
        written, and a corpus that grows never moves a row from one part to the other. Rows of a packed corpus that share a
        document lie in one part.
        """
        about = self.manifest["about"]
        if "row_tokens" in about and PACKED not in about:
            raise CorpusError(
                f"{self.folder} was packed by an earlier version, which put one document into both parts; "
                f"pack it again into another --out (nothing is generated)"
            )
        keys = [key for shard in self.shards for key in shard.columns["keys"].tolist()]
        groups = [key >> GROUP_BITS for key in keys] if PACKED in about else keys
        places = {group: row_seed(SPLIT, group) / 2.0**64 for group in set(groups)}
        if len(places) < 2:
            rows = "rows that share documents" if PACKED in about else "rows"
            raise CorpusError(
                f"{self.folder} holds {len(keys)} {rows}; training needs at least 2 apart, one of them held out"
            )
        ranks = sorted(places.values())
        limit = min(max(held_out, ranks[0]), ranks[-2])
        order = sorted(range(len(keys)), key=lambda row: (places[groups[row]], keys[row]))
        first = sum(places[group] <= limit for group in groups)
        return order[first:], order[:first]

    def counts(self, rows: Sequence[int], vocab_size: int) -> Int[Tensor, "V"]:
        """How often each token occurs in `rows`."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.as_tensor(rows, dtype=torch.long)] = True
        total = torch.zeros(vocab_size, dtype=torch.long)
        start = 0
        for shard in self.shards:
            lengths = shard.columns["offsets"].diff()
            inside = torch.repeat_interleave(chosen[start : start + shard.rows], lengths)
            total += torch.bincount(shard.tokens(0, shard.rows)[inside], minlength=vocab_size)
            start += shard.rows
        return total

    def _find(self, row: int) -> tuple["_Shard", int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} rows")
        shard = bisect.bisect_right(self._ends, row)
        return self.shards[shard], row - (self._ends[shard - 1] if shard else 0)


class _Shard:
    def __init__(self, folder: Path, index: int, entry: Mapping[str, Any]) -> None:
        self.path, self.rows = folder / entry["file"], int(entry["rows"])
        self.features_path = folder / f"features-{index:05d}.safetensors"

    @cached_property
    def file(self) -> Any:
        return _open(self.path)

    @cached_property
    def feature_file(self) -> Any:
        return _open(self.features_path)

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        return {
            name: self.file.get_tensor(name)
            for name in ("offsets", "prompt_lengths", "temperatures", "keys")
        }

    def tokens(self, first: int, last: int) -> Int[Tensor, "L"]:
        """Tokens of rows first..last-1, joined."""
        low, high = self.columns["offsets"][[first, last]].tolist()
        found: Tensor = self.file.get_slice("tokens")[low:high]
        return found.long()

    def row(self, i: int) -> Row:
        c = self.columns
        return Row(
            self.tokens(i, i + 1),
            int(c["prompt_lengths"][i]),
            float(c["temperatures"][i]),
            int(c["keys"][i]),
        )

    def features(self, i: int) -> tuple[Tensor, Tensor] | None:
        if not self.features_path.exists():
            return None
        low, high = self.columns["offsets"][[i, i + 1]].tolist()
        return self.feature_file.get_slice("hidden")[low:high], self.feature_file.get_slice(
            "log_z"
        )[low:high]


class CorpusWriter:
    """Appends rows; a full buffer becomes a shard. Opening a folder that a killed writer left resumes after its last shard.

    `about` says what writes it (target, settings, seed); resuming with another `about` is refused, for the mixture could not
    be reproduced. `notes` is kept in the manifest, and changes there only together with the shards it describes.

    Raises UsageError for a folder that holds something else, StorageError for one that cannot be written or is being written
    by another process, CorpusError for one that was begun otherwise.
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
        self.refused = False
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
        begun = self.manifest["about"]
        for name, value in json.loads(json.dumps(about)).items():
            if name == ADDED and name not in begun:
                continue
            if begun.get(name) != value:
                raise CorpusError(
                    f"{self.folder} was begun with {name} = {begun.get(name)!r}, not {value!r}; "
                    f"repeat that setting to resume, or choose another --out"
                )
        self.manifest["about"] = begun | {name: about[name] for name in about if name == ADDED}

    @property
    def tokens(self) -> int:
        """Tokens written and buffered."""
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
        """Write what is buffered as a shard, and the notes. Raises StorageError if the disk does not take it; nothing is lost then."""
        manifest = self.manifest | {"notes": self.notes}
        try:
            if self.buffer:
                manifest["shards"] = [
                    *manifest["shards"],
                    self._write(f"shard-{len(manifest['shards']):05d}.safetensors"),
                ]
            files.write_json(self.folder / MANIFEST, manifest)
        except StorageError as error:
            self.refused = True  # on the way out it would be refused again
            raise StorageError(
                f"{error}; the {len(self.manifest['shards'])} complete shards are intact: make room, then repeat the command to resume"
            ) from error
        self.manifest = manifest
        self.buffer = []
        self.buffered = 0

    def _write(self, name: str) -> dict[str, Any]:
        lengths = torch.tensor([len(r.tokens) for r in self.buffer])
        path = files.write_tensors(
            self.folder / name,
            {
                "tokens": torch.cat([r.tokens for r in self.buffer]).to(self.dtype),
                "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
                "prompt_lengths": torch.tensor(
                    [r.prompt_length for r in self.buffer], dtype=torch.int32
                ),
                "temperatures": torch.tensor(
                    [r.temperature for r in self.buffer], dtype=torch.float32
                ),
                "keys": torch.tensor([r.key for r in self.buffer], dtype=torch.int64),
            },
        )
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
            if not self.refused:
                self.flush()
        finally:
            self.lock.release()


def check_folder(folder: Path) -> None:
    """Raises UsageError if the folder holds files and is not a corpus."""
    if (folder / MANIFEST).exists() or not folder.is_dir():
        return
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if others:
        raise UsageError(
            f"{folder} holds {others[0]}, but no {MANIFEST}: it is not a corpus; choose another --out"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest. Raises CorpusError if it is absent, damaged or of another format."""
    path = folder / MANIFEST
    if not path.exists():
        raise CorpusError(
            f"{folder} holds no {MANIFEST}; make a corpus with:  specdiff data --out {folder}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise CorpusError(
                f"{path} is of format {data['format']!r}; this version reads {FORMAT}"
            )
        missing = [s["file"] for s in data["shards"] if not (folder / s["file"]).is_file()]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it or make the corpus anew"
        ) from None
    if missing:
        raise CorpusError(
            f"{folder} lacks {missing[0]}, which its {MANIFEST} names; restore it or make the corpus anew"
        )
    return dict(data)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CorpusError(f"{path} cannot be read (truncated or damaged?): {error}") from None


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different length side by side, zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
