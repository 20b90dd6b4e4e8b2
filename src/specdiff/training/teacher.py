"""Teachers for distillation: the target's final states at every token, precomputed or run online.

The teacher's probabilities of any set of columns are exp(hidden @ head[columns] - log_z). log_z
covers the whole vocabulary, so a draft vocabulary's columns sum to less than 1.

A block drafter also reads the states after some of the target's layers (0 is the first).

Shapes: B rows, L tokens, H width, T layers, V vocabulary, N positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class TargetStates:
    """Final states, log normalizers, and the states after the teacher's layers, concatenated."""

    final: Float[Tensor, "B L H"]
    log_z: Float[Tensor, "B L"]
    layers: Float[Tensor, "B L T*H"] | None = None


class Teacher(Protocol):
    """The target's states at the tokens of padded corpus rows."""

    def __call__(self, rows: Sequence[int], ids: Int[Tensor, "B L"]) -> TargetStates: ...


class PrecomputedTeacher:
    """Reads what `precompute` stored with the corpus."""

    def __init__(self, corpus: Corpus, layers: Sequence[int] = ()) -> None:
        if not corpus.has_features:
            raise CorpusError(
                f"{corpus.folder} lacks the target states of some shards; "
                f"compute them:  specdiff data --features"
            )
        if not corpus.has_layers(layers):
            raise CorpusError(
                f"{corpus.folder} lacks the states after layers {','.join(map(str, layers))} of "
                f"some shards; compute them:  specdiff data --features --layers "
                f"{','.join(map(str, layers))}"
            )
        self.corpus = corpus
        self.layers = tuple(layers)

    def __call__(self, rows: Sequence[int], ids: Int[Tensor, "B L"]) -> TargetStates:
        features = [self.corpus.features(row) for row in rows]
        hidden, log_z = zip(*(pair for pair in features if pair is not None), strict=True)
        layers = None
        if self.layers:
            layers = pad([self.corpus.layer_states(row, self.layers) for row in rows])
            layers = layers.to(ids.device)
        return TargetStates(pad(hidden).to(ids.device).float(), pad(log_z).to(ids.device), layers)


class OnlineTeacher:
    """Runs the target on each batch: needs no disk, where its forward pass is cheap."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
        self.model = model.eval()
        self.head = _head(model)
        self.layers = tuple(layers)

    @torch.no_grad()
    def __call__(self, rows: Sequence[int], ids: Int[Tensor, "B L"]) -> TargetStates:
        ids = ids.to(home(self.model))  # batches are built on the host
        # causal, so padding after a row changes nothing
        final, layers = _states(self.model, ids, self.layers)
        return TargetStates(
            final.float(),
            log_normalizer(final, self.head),
            torch.cat(layers, dim=-1) if layers else None,
        )


def _states(
    model: PreTrainedModel, ids: Int[Tensor, "B L"], layers: Sequence[int]
) -> tuple[Float[Tensor, "B L H"], list[Float[Tensor, "B L H"]]]:
    """Final states, and the states after some layers, on the device of the final ones."""
    out = model.base_model(ids, use_cache=False, output_hidden_states=bool(layers))
    final = out.last_hidden_state
    return final, [out.hidden_states[layer + 1].to(final.device) for layer in layers]


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
    layers: Sequence[int] = (),
    rows: int = 8,
) -> Iterator[tuple[int, int]]:
    """Write the features that shards lack; yields (tokens done, tokens in total).

    Of `layers` (0: the first) the states after them are written too, a file each. A killed run
    loses one shard. `target_weights` is the model's digest, stored with the features.

    Raises:
        CorpusError: the corpus holds features of another target.
        StorageError: the disk is full or not writable; finished shards are intact.
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
        missing = [layer for layer in layers if not shard.layer_path(layer).exists()]
        final = not shard.features_path.exists()
        if not missing and not final:
            done += int(corpus.manifest["shards"][index]["tokens"])
            continue
        tokens = [corpus[i].tokens for i in indices]
        offsets = shard.columns["offsets"].tolist()
        metadata = corpus.feature_metadata(index, target_weights)
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with ExitStack() as open_files:
            wide = (STORED, (offsets[-1], head.shape[1]))
            by_layer = {
                layer: open_files.enter_context(
                    files.tensor_file(shard.layer_path(layer), {"states": wide}, metadata)
                )
                for layer in missing
            }
            features = None
            if final:
                tensors = {"hidden": wide, "log_z": (torch.float32, (offsets[-1],))}
                features = open_files.enter_context(
                    files.tensor_file(shard.features_path, tensors, metadata)
                )
            for start in range(0, len(tokens), rows):
                group = by_length[start : start + rows]
                ids = pad([tokens[i] for i in group]).to(home(model))
                states, after = _states(model, ids, missing)
                for file, layer_states in zip(by_layer.values(), after, strict=True):
                    for i, h in zip(group, layer_states.to(STORED), strict=True):
                        file.write("states", offsets[i], h[: len(tokens[i])])
                if features is not None:
                    states = states.to(STORED)
                    log_z = log_normalizer(states, head)
                    for i, h, z in zip(group, states, log_z, strict=True):
                        features.write("hidden", offsets[i], h[: len(tokens[i])])
                        features.write("log_z", offsets[i], z[: len(tokens[i])])
                done += sum(len(tokens[i]) for i in group)
                yield done, corpus.tokens


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
