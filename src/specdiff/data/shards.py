"""Shards: the files of a corpus folder.

A shard appears whole or not at all, so a killed writer loses at most one.

    manifest.json                what wrote it; every complete shard with its counts and SHA-256
    shard-00000.safetensors      tokens [n], offsets [rows + 1], and prompt_lengths, temperatures,
                                 keys [rows]
    features-00000.safetensors   optional: the target's final states at each of those tokens
    features-00000-layer-08.safetensors   optional: the states after its layer 8 (0 is the first)

Shapes: L tokens of one row, T layers, H width of the target.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdiff.errors import CorpusError

FORMAT = "specdiff-corpus-1"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One text as tokens: `prompt_length` tokens of prompt, then the answer.

    Temperature 0 is greedy. `key` identifies the request that the row answers.
    """

    tokens: Int[Tensor, "L"]
    prompt_length: int
    temperature: float
    key: int


class Shard:
    """One shard of a corpus folder, opened when it is first read."""

    def __init__(self, folder: Path, index: int, entry: Mapping[str, Any]) -> None:
        self.path = folder / entry["file"]
        self.rows = int(entry["rows"])
        self.features_path = folder / f"features-{index:05d}.safetensors"
        self._layers: dict[int, Any] = {}

    @cached_property
    def file(self) -> Any:
        return _open(self.path)

    @cached_property
    def feature_file(self) -> Any:
        return _open(self.features_path)

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        names = ("offsets", "prompt_lengths", "temperatures", "keys")
        return {name: self.file.get_tensor(name) for name in names}

    def tokens(self, first: int, last: int) -> Int[Tensor, "L"]:
        """Tokens of rows first..last-1, concatenated."""
        low, high = self.columns["offsets"][[first, last]].tolist()
        tokens: Tensor = self.file.get_slice("tokens")[low:high]
        return tokens.long()

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
        hidden = self.feature_file.get_slice("hidden")[low:high]
        log_z = self.feature_file.get_slice("log_z")[low:high]
        return hidden, log_z

    def layer_path(self, layer: int) -> Path:
        """Where the states after a layer of the target are stored."""
        return self.features_path.with_name(
            f"{self.features_path.stem}-layer-{layer:02d}.safetensors"
        )

    def layer_states(self, i: int, layers: Sequence[int]) -> Float[Tensor, "L T*H"]:
        """The target's states after `layers` at a row's tokens, next to each other."""
        low, high = self.columns["offsets"][[i, i + 1]].tolist()
        for layer in layers:
            if layer not in self._layers:
                self._layers[layer] = _open(self.layer_path(layer))
        slices = [self._layers[layer].get_slice("states")[low:high] for layer in layers]
        return torch.cat(slices, dim=-1)

    def stored_features(self) -> dict[Path, Any]:
        """Every file of features that exists, by path."""
        pattern = f"{self.features_path.stem}-layer-*.safetensors"
        paths = [self.features_path, *sorted(self.features_path.parent.glob(pattern))]
        return {path: _open(path) for path in paths if path.exists()}


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
            f"{path} is damaged ({type(error).__name__}: {error}); "
            f"restore it or write the corpus again"
        ) from None
    if missing:
        raise CorpusError(
            f"{folder} lacks {missing[0]}, which its {MANIFEST} names; "
            f"restore it or write the corpus again"
        )
    return dict(data)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CorpusError(f"{path} cannot be read (truncated or damaged?): {error}") from None
