"""Features of a corpus: the target's final states at every token, for training on a CPU."""

from pathlib import Path

from specdiff import files
from specdiff.data import generate
from specdiff.data.corpus import Corpus
from specdiff.data.write import CorpusProgress, Report, ignore
from specdiff.errors import CorpusError, StorageError
from specdiff.targets.causal import CausalTarget
from specdiff.training.teacher import precompute
from specdiff.weights import fingerprint


def store(target: CausalTarget, folder: Path, report: Report = ignore) -> int:
    """Write the features of every shard that lacks them; returns the corpus's number of tokens.

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
            for done, total in precompute(target.model, corpus, weights):
                report(CorpusProgress(done, total, done))
    except StorageError as error:
        raise StorageError(
            f"{error}; finished shards are kept: make room, then repeat the command to resume"
        ) from error
    return corpus.tokens
