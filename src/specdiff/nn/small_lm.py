"""A small Hugging Face causal LM as a drafter's network, optionally without its own embeddings.

A folder with `borrow_embeddings` in its config.json holds the body alone (and the draft
vocabulary): it reads and writes through its target's embedding and head. Any other folder is a
plain Hugging Face checkpoint.

Shapes: B rows, L positions, H width, V target vocabulary, C output columns (V, or the draft
vocabulary).
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from specdiff import files, weights
from specdiff.errors import ConfigError, WeightsError
from specdiff.nn.borrowed import BorrowedHead, BorrowedLookup, check_tables, head_rows

# keys that specdiff adds to a Hugging Face config
BORROW = "borrow_embeddings"
DRAFT_VOCAB = "draft_vocab_size"


class SmallLM(nn.Module):
    """`net` is a causal LM of transformers, of the family and sizes `config` names.

    The config may hold two keys of specdiff's own: `borrow_embeddings` (the input embedding and the
    head are the target's: call `borrow`) and, with it, `draft_vocab_size` (the head has the rows
    `draft_vocab`, ascending). Raises ConfigError.
    """

    draft_vocab: Tensor
    vocab_size: int
    width: int

    def __init__(self, config: PretrainedConfig, net: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.config = config
        self.borrows, self.draft_vocab_size = _options(config)
        self.net: Any = _built(config) if net is None else net
        words: Any = self.net.get_input_embeddings()
        self.vocab_size, self.width = words.weight.shape
        if self.borrows:
            self.net.set_input_embeddings(BorrowedLookup(self.vocab_size, self.width))
            self.net.set_output_embeddings(
                BorrowedHead(self.draft_vocab_size or self.vocab_size, self.width)
            )
        if self.draft_vocab_size is not None:
            self.register_buffer("draft_vocab", torch.full((self.draft_vocab_size,), -1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder or hub id, with parameters in `dtype`; safetensors only, no remote code.

        Raises ConfigError or WeightsError, naming the file and the field or tensor.
        """
        path = weights.locate(folder)
        config = _config(path)
        if not _options(config)[0]:
            return cls(config, _plain(path, config, dtype)).eval()
        model = cls(config)
        weights.load_into(model, path)
        ids = model.draft_ids
        if ids is not None and not (
            bool(((ids >= 0) & (ids < model.vocab_size)).all()) and bool((ids.diff() > 0).all())
        ):
            raise WeightsError(
                f"{path / weights.TENSORS}: draft_vocab must hold ascending ids of the "
                f"{model.vocab_size} words"
            )
        # not the buffers: rotary frequencies must stay float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.eval()

    @property
    def draft_ids(self) -> Int[Tensor, "C"] | None:
        """The draft vocabulary, ids of the borrowed head's rows; None for the whole vocabulary."""
        return None if self.draft_vocab_size is None else self.draft_vocab

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any
    ) -> None:
        """Write config.json (with `extra` keys) and the safetensors, each file atomically.

        Raises StorageError.
        """
        config = copy.deepcopy(self.config)
        path = Path(folder)
        config.update({**extra, "dtype": dtype or self.net.dtype})
        if self.borrows:
            weights.save(self, path, config.to_dict(), dtype)
            return
        # transformers knows which tensors are tied, and writes each once
        net = copy.deepcopy(self.net).to(dtype)
        net.config = config
        with files.storing(path):
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".partial", dir=path) as partial:
                net.save_pretrained(partial)
                for file in Path(partial).iterdir():
                    file.replace(path / file.name)

    def borrow(self, embedding: Float[Tensor, "V H"], head: Float[Tensor, "V H"]) -> Self:
        """Read and write through the target's embedding and the `draft_vocab` rows of its head.

        Raises ConfigError if the target's sizes are not those this network was trained for.
        """
        check_tables(embedding, head, self.vocab_size, self.width)
        lookup = self.net.get_input_embeddings()
        lookup.weight = embedding.detach()
        lookup.dtype = self.net.dtype
        read_out = self.net.get_output_embeddings()
        read_out.weight = head_rows(head, self.draft_ids).to(self.net.dtype)
        return self

    def hidden(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
        """The normed final states of a causal pass. Rows start at 0; padding is on the right."""
        states: Tensor = self.net.base_model(ids, use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B C"]:
        """The head's product with `hidden`."""
        logits: Tensor = self.net.get_output_embeddings()(hidden)
        return logits.float()


def _options(config: PretrainedConfig) -> tuple[bool, int | None]:
    """specdiff's own keys, checked: whether it borrows, and the draft vocabulary's size."""
    where = f"{weights.CONFIG} of a {config.model_type} drafter"
    fields = config.to_dict()
    options = {key: fields[key] for key in (BORROW, DRAFT_VOCAB) if fields.get(key) is not None}
    borrows = weights.field({BORROW: False, **options}, BORROW, bool, where)
    size = weights.positive(options, DRAFT_VOCAB, where) if DRAFT_VOCAB in options else None
    if size is not None and not borrows:
        raise ConfigError(
            f"{where}: {DRAFT_VOCAB} {size} are rows of the target's head, so it needs "
            f"{BORROW} true"
        )
    words = config.get_text_config().vocab_size
    if size is not None and size > words:
        raise ConfigError(f"{where}: {DRAFT_VOCAB} {size} is larger than the vocabulary of {words}")
    return borrows, size


def _built(config: PretrainedConfig) -> Any:
    """A network with random weights. Raises ConfigError for sizes that do not fit together."""
    weights.check_heads(config, f"{weights.CONFIG} of a {config.model_type} drafter")
    auto: Any = AutoModelForCausalLM
    with weights.building():
        return auto.from_config(config, dtype=torch.float32)


def _config(path: Path) -> PretrainedConfig:
    """The folder's config as transformers reads it."""
    where = path / weights.CONFIG
    if weights.read_config(path).get("auto_map"):
        raise ConfigError(f"{where} asks for its own code (auto_map), which is never run")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (
        StrictDataclassError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
    ) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    weights.check_heads(config, str(where))
    return config


def _plain(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A Hugging Face checkpoint (sharded or not) as it is."""
    if not any(path.glob("*.safetensors")):
        weights.read_tensors(path)  # raises, naming what lies there instead
    auto: Any = AutoModelForCausalLM
    try:
        with weights.building():
            net, report = auto.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ArithmeticError, SafetensorError) as error:
        raise WeightsError(
            f"the safetensors of {path} cannot be read (truncated or damaged?): "
            f"{' '.join(str(error).split())}"
        ) from error
    weights.complete(path, report)
    loaded: PreTrainedModel = net
    return loaded
