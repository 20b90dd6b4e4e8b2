"""Token rows on disk: safetensors shards and a manifest. A shard appears whole or not at all, so a killed writer loses one at most.

    manifest.json                what wrote it, and every complete shard with its counts and SHA-256
    shard-00000.safetensors      tokens [n], offsets [rows + 1], prompt_lengths, temperatures, keys [rows]
    features-00000.safetensors   (optional, `training.features`) the target's final states at each of those tokens

Shapes: L tokens of one row, H width of the target.
"""

import bisect
import hashlib
import json
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdiff.errors import CorpusError

FORMAT = "specdiff-corpus-1"
MANIFEST = "manifest.json"


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

    def split(self, held_out: float) -> tuple[range, range]:
        """Training rows, and the last share of rows, held out (at least one row each)."""
        if len(self) < 2:
            raise CorpusError(f"{self.folder} holds {len(self)} rows; training needs at least 2, one of them held out")
        first = min(len(self) - 1, max(1, round(len(self) * (1 - held_out))))
        return range(first), range(first, len(self))

    def counts(self, rows: range, vocab_size: int) -> Int[Tensor, "V"]:
        """How often each token occurs in `rows`."""
        total = torch.zeros(vocab_size, dtype=torch.long)
        start = 0
        for shard in self.shards:
            low, high = max(rows.start, start) - start, min(rows.stop, start + shard.rows) - start
            if low < high:
                total += torch.bincount(shard.tokens(low, high), minlength=vocab_size)
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
        return {name: self.file.get_tensor(name) for name in ("offsets", "prompt_lengths", "temperatures", "keys")}

    def tokens(self, first: int, last: int) -> Int[Tensor, "L"]:
        """Tokens of rows first..last-1, joined."""
        low, high = self.columns["offsets"][[first, last]].tolist()
        found: Tensor = self.file.get_slice("tokens")[low:high]
        return found.long()

    def row(self, i: int) -> Row:
        c = self.columns
        return Row(self.tokens(i, i + 1), int(c["prompt_lengths"][i]), float(c["temperatures"][i]), int(c["keys"][i]))

    def features(self, i: int) -> tuple[Tensor, Tensor] | None:
        if not self.features_path.exists():
            return None
        low, high = self.columns["offsets"][[i, i + 1]].tolist()
        return self.feature_file.get_slice("hidden")[low:high], self.feature_file.get_slice("log_z")[low:high]


class CorpusWriter:
    """Appends rows; a full buffer becomes a shard. Opening a folder that a killed writer left goes on behind its last shard.

    `about` says what writes it (target, settings, seed); going on with another `about` is refused, for the mixture would
    be nobody's. `notes` is kept in the manifest, and changes there only together with the shards it speaks of.

    Raises CorpusError for a folder that cannot be written, is being written by another process, or was begun otherwise.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, vocab_size: int, shard_tokens: int = 1 << 20) -> None:
        self.folder, self.shard_tokens = Path(folder), shard_tokens
        self.dtype = torch.uint16 if vocab_size <= 1 << 16 else torch.int32
        self.buffer: list[Row] = []
        self.buffered = 0
        self.refused = False
        self.manifest: dict[str, Any] = {"format": FORMAT, "about": dict(about), "vocab_size": vocab_size, "shards": [], "notes": {}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.unlock = weakref.finalize(self, os.close, _lock(self.folder))
            if (self.folder / MANIFEST).exists():
                self.manifest = {"notes": {}} | read_manifest(self.folder)
                self._same(about)
            else:
                _write_json(self.folder / MANIFEST, self.manifest)
        except OSError as error:
            raise CorpusError(f"cannot write to {self.folder} ({error.strerror or error}); choose another --out") from error
        self.notes: dict[str, Any] = self.manifest["notes"]

    def _same(self, about: Mapping[str, Any]) -> None:
        begun = self.manifest["about"]
        for name, value in json.loads(json.dumps(about)).items():
            if begun.get(name) != value:
                self.unlock()
                raise CorpusError(
                    f"{self.folder} was begun with {name} = {begun.get(name)!r}, not {value!r}; "
                    f"repeat that setting to go on, or choose another --out"
                )

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
        """Write what is buffered as a shard, and the notes. Raises CorpusError if the disk does not take it; nothing is lost then."""
        manifest = self.manifest | {"notes": self.notes}
        try:
            if self.buffer:
                manifest["shards"] = [*manifest["shards"], self._write(f"shard-{len(manifest['shards']):05d}.safetensors")]
            _write_json(self.folder / MANIFEST, manifest)
        except (OSError, SafetensorError) as error:
            self.refused = True  # on the way out it would be refused again
            raise CorpusError(
                f"cannot write to {self.folder} ({error}); the {len(self.manifest['shards'])} complete shards are intact: "
                f"make room, then repeat the command to go on"
            ) from error
        self.manifest, self.buffer, self.buffered = manifest, [], 0

    def _write(self, name: str) -> dict[str, Any]:
        lengths = torch.tensor([len(r.tokens) for r in self.buffer])
        write_tensors(
            self.folder / name,
            {
                "tokens": torch.cat([r.tokens for r in self.buffer]).to(self.dtype),
                "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
                "prompt_lengths": torch.tensor([r.prompt_length for r in self.buffer], dtype=torch.int32),
                "temperatures": torch.tensor([r.temperature for r in self.buffer], dtype=torch.float32),
                "keys": torch.tensor([r.key for r in self.buffer], dtype=torch.int64),
            },
        )
        digest = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        return {"file": name, "rows": len(self.buffer), "tokens": self.buffered, "sha256": digest}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if not self.refused:
                self.flush()
        finally:
            self.unlock()


def _lock(folder: Path) -> int:
    """Two writers in one folder would overwrite each other's shards. The lock goes with the process, however it ends."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise CorpusError(f"another process is writing to {folder}; wait for it, or choose another --out") from None
    return file


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest. Raises CorpusError if it is absent, damaged or of another format."""
    path = folder / MANIFEST
    if not path.exists():
        raise CorpusError(f"{folder} holds no {MANIFEST}; make a corpus with:  specdiff data --out {folder}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise CorpusError(f"{path} is of format {data['format']!r}; this version reads {FORMAT}")
        missing = [s["file"] for s in data["shards"] if not (folder / s["file"]).is_file()]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CorpusError(f"{path} is damaged ({type(error).__name__}: {error}); restore it or make the corpus anew") from None
    if missing:
        raise CorpusError(f"{folder} lacks {missing[0]}, which its {MANIFEST} names; restore it or make the corpus anew")
    return dict(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
        _settle(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_json(path: Path, data: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    _settle(partial, path)


def _settle(partial: Path, path: Path) -> None:
    """The content reaches the disk before the name does."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CorpusError(f"{path} cannot be read (truncated or damaged?): {error}") from None


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different length side by side, zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
