"""Features of a corpus: the target's states at every token, for training on a CPU."""

from collections.abc import Sequence
from pathlib import Path

from specdiff import files
from specdiff.data import generate
from specdiff.data.corpus import Corpus
from specdiff.data.write import CorpusProgress, Report, ignore
from specdiff.errors import CorpusError, StorageError, UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.training.teacher import precompute
from specdiff.weights import fingerprint

SHARES = (0.3, 2 / 3, 0.93)  # of the target's depth: the layers that a block drafter reads


def default_layers(count: int) -> tuple[int, ...]:
    """The layers of a target of `count` layers that a block drafter reads, 0 being the first.

    Never the last one: its state is known to transformers only after the final norm.
    """
    layers = {min(max(0, round(share * count) - 1), count - 2) for share in SHARES}
    return tuple(sorted(layer for layer in layers if layer >= 0))


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Layers as `auto` or `8,19,27`. Raises UsageError for others than 0..count - 2."""
    if text == "auto":
        return default_layers(count)
    parts = [part.strip() for part in text.split(",")]
    layers = [int(part) for part in parts if part.isdecimal()]
    if len(layers) != len(parts) or not all(layer <= count - 2 for layer in layers):
        raise UsageError(
            f"--layers must be auto or numbers of 0..{count - 2} separated by commas, not {text!r}"
        )
    return tuple(sorted(set(layers)))


def store(
    target: CausalTarget, folder: Path, report: Report = ignore, layers: Sequence[int] = ()
) -> int:
    """Write the features that shards lack, of `layers` too; returns the corpus's tokens.

    Raises CorpusError if the corpus has another vocabulary, a changed shard or features of another
    target, StorageError if the folder cannot be written or another process is writing to it.
    """
    name = target.info.name
    corpus = Corpus(folder)
    writer = corpus.manifest["about"].get("target")
    if corpus.manifest["vocab_size"] != target.info.vocab_size:
        raise CorpusError(
            f"{folder} was written by {writer}, of another vocabulary than {name}; "
            f"give --model {writer}"
        )
    corpus.verify()
    weights = fingerprint(generate.model_files(name))
    try:
        with files.lock(folder):
            report(CorpusProgress(0, corpus.tokens))
            for done, total in precompute(target.model, corpus, weights, layers=layers):
                report(CorpusProgress(done, total, done))
    except StorageError as error:
        raise StorageError(
            f"{error}; finished shards are kept: make room, then repeat the command to resume"
        ) from error
    return corpus.tokens
