"""Teachers for distillation: the target's final states at every token, precomputed or run online.

The teacher's probabilities of any set of columns are exp(hidden @ head[columns] - log_z). log_z
covers the whole vocabulary, so a draft vocabulary's columns sum to less than 1.

Shapes: B rows, L tokens, H width, V vocabulary, N positions.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from specdiff import files
from specdiff.data.corpus import Corpus, pad
from specdiff.errors import CorpusError, UnsupportedModelError
from specdiff.models.loading import home
from specdiff.models.packed import formats

# log_z is computed from the rounded states, so that the stored probabilities sum to 1
STORED = torch.bfloat16
POSITIONS = 2048  # positions whose whole-vocabulary logits are in memory at a time


class Teacher(Protocol):
    """Final states [B, L, H] and log normalizers [B, L] of padded corpus rows."""

    def __call__(
        self, rows: Sequence[int], ids: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B L"]]: ...


class PrecomputedTeacher:
    """Reads what `precompute` stored with the corpus."""

    def __init__(self, corpus: Corpus) -> None:
        if not corpus.has_features:
            raise CorpusError(
                f"{corpus.folder} lacks the target states of some shards; "
                f"compute them:  specdiff data --features"
            )
        self.corpus = corpus

    def __call__(
        self, rows: Sequence[int], ids: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B L"]]:
        features = [self.corpus.features(row) for row in rows]
        hidden, log_z = zip(*(pair for pair in features if pair is not None), strict=True)
        return pad(hidden).to(ids.device).float(), pad(log_z).to(ids.device)


class OnlineTeacher:
    """Runs the target on each batch: needs no disk, where its forward pass is cheap."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.head = _head(model)

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[int], ids: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B L"]]:
        ids = ids.to(home(self.model))  # batches are built on the host
        # causal, so padding after a row changes nothing
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        return hidden.float(), log_normalizer(hidden, self.head)


def log_normalizer(
    hidden: Float[Tensor, "*B H"], head: Float[Tensor, "V H"]
) -> Float[Tensor, "*B"]:
    """log sum exp of the whole vocabulary's logits, in slices that fit memory."""
    flat = hidden.reshape(-1, hidden.shape[-1]).to(head.dtype)
    parts = [torch.logsumexp((h @ head.T).float(), -1) for h in flat.split(POSITIONS)]
    return torch.cat(parts).view(hidden.shape[:-1])


@torch.inference_mode()
def precompute(
    model: PreTrainedModel,
    corpus: Corpus,
    target_weights: str,
    *,
    rows: int = 8,
) -> Iterator[tuple[int, int]]:
    """Write the features of every shard that lacks them; yields (tokens done, tokens in total).

    A killed run loses one shard. `target_weights` is the model's digest, stored with the features.

    Raises:
        CorpusError: the corpus holds features of another target.
        UnsupportedModelError: the model's logits are not its head times its final states.
    """
    corpus.check_features(target_weights)
    model.eval()
    head = _head(model)
    done = 0
    first = 0
    for index, shard in enumerate(corpus.shards):
        indices = range(first, first + shard.rows)
        first += shard.rows
        if shard.features_path.exists():
            done += int(corpus.manifest["shards"][index]["tokens"])
            continue
        tokens = [corpus[i].tokens for i in indices]
        hidden: dict[int, Tensor] = {}
        log_z: dict[int, Tensor] = {}
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        for start in range(0, len(tokens), rows):
            group = by_length[start : start + rows]
            ids = pad([tokens[i] for i in group]).to(model.device)
            states = model.base_model(ids, use_cache=False).last_hidden_state.to(STORED)
            for i, h, z in zip(group, states, log_normalizer(states, head), strict=True):
                hidden[i] = h[: len(tokens[i])].cpu()
                log_z[i] = z[: len(tokens[i])].cpu()
            done += sum(len(tokens[i]) for i in group)
            yield done, corpus.tokens
        features = {
            "hidden": torch.cat([hidden[i] for i in range(len(tokens))]),
            "log_z": torch.cat([log_z[i] for i in range(len(tokens))]),
        }
        metadata = corpus.feature_metadata(index, target_weights)
        files.write_tensors(shard.features_path, features, metadata)


def _head(model: PreTrainedModel) -> Tensor:
    """The output matrix, after a check that the logits are the final states times it."""
    if formats(model):
        raise UnsupportedModelError(
            "states of quantized weights cannot teach: the drafter is trained on the plain head; "
            "load the target with quantize='none'"
        )
    read_out = model.get_output_embeddings()
    if not isinstance(read_out, torch.nn.Linear) or read_out.bias is not None:
        raise UnsupportedModelError(
            f"{model.config.model_type} has no plain output matrix, so its states cannot teach; "
            f"train with --set objective=denoise"
        )
    with torch.inference_mode():
        ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        logits = model(ids, use_cache=False).logits.float()
        states = model.base_model(ids, use_cache=False).last_hidden_state
        error = (read_out(states).float() - logits).abs().max().item()
    if error > 1e-2 * max(1.0, logits.abs().max().item()):
        raise UnsupportedModelError(
            f"{model.config.model_type} transforms its logits after its output matrix (difference "
            f"{error:.2g}), so its states cannot teach; train with --set objective=denoise"
        )
    return read_out.weight.detach()
