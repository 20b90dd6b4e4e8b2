"""Initial networks: from scratch, from the target's own layers, or from an earlier drafter.

Shapes: V target vocabulary, C draft vocabulary, H width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdiff.data.corpus import Corpus
from specdiff.errors import ConfigError, UsageError
from specdiff.nn.borrowed import BorrowedEmbedding
from specdiff.nn.ddit import SEDD, Block
from specdiff.nn.sedd_config import SEDDConfig
from specdiff.nn.small_lm import SmallLM
from specdiff.training.recipe import Recipe
from specdiff.training.task import most_frequent

Network = TypeVar("Network", SEDD, SmallLM)
CONDITIONING = 128  # width of the sigma embedding, as in the authors' checkpoints
LAYER = re.compile(r"(layers|h)\.(\d+)\.")
QUERY = "self_attn.q_proj.weight"


def sedd(recipe: Recipe, corpus: Corpus, rows: Sequence[int], target: PreTrainedModel) -> SEDD:
    """The SEDD network of a recipe. Raises ConfigError or UsageError if the target does not fit."""
    if recipe.init is not None and recipe.init != "target":
        return _earlier_sedd(recipe, recipe.init, target)
    text = target.config.get_text_config()
    width = recipe.hidden_size or text.hidden_size
    vocab = most_frequent(corpus, rows, text.vocab_size, recipe.draft_vocab)
    config = SEDDConfig(
        tokens=text.vocab_size,
        hidden_size=width,
        n_blocks=recipe.blocks,
        n_heads=recipe.heads or max(1, width // 64),
        cond_dim=CONDITIONING,
        length=recipe.length,
        dropout=recipe.dropout,
        scale_by_sigma=recipe.process == "absorb" and recipe.objective == "score_entropy",
        process=recipe.process,
        schedule=recipe.schedule,
        borrow_embeddings=recipe.borrow_embeddings,
        draft_vocab_size=None if vocab is None else len(vocab),
        attention=recipe.attention,
        context_window=recipe.context_window if recipe.attention == "causal-context" else None,
        time_conditioning=recipe.time_conditioning,
        output=_output(recipe),
        taps=recipe.taps or (),
    )
    check_taps(config.taps, target)
    network = SEDD(config)
    if vocab is not None:
        network.draft_vocab.copy_(vocab)
    if config.borrow_embeddings:
        _borrow_from(network, target)
        _open(network, corpus.counts(rows, text.vocab_size), _final_norm(target))
    if recipe.init == "target":
        _copy_attention(network, target)
    return network


def _earlier_sedd(recipe: Recipe, folder: str, target: PreTrainedModel) -> SEDD:
    network = SEDD.from_pretrained(folder)
    config = network.config
    _check_vocabulary(config.tokens, target, folder)
    if config.attention != recipe.attention or config.process != recipe.process:
        raise UsageError(
            f"{folder} has attention {config.attention!r} and process {config.process!r}, "
            f"but the recipe says {recipe.attention!r} and {recipe.process!r}; "
            f"set attention={config.attention} and process={config.process}"
        )
    if recipe.taps not in (None, config.taps):
        raise UsageError(
            f"{folder} reads layers {list(config.taps)} of the target, but the recipe says "
            f"{list(recipe.taps or ())}; leave taps null"
        )
    check_taps(config.taps, target)
    for block in network.blocks:
        assert isinstance(block, Block)
        block.dropout = recipe.dropout  # the run's, not the one the checkpoint was trained with
    network.config = replace(config, output=_output(recipe))
    return _borrow_from(network, target) if config.borrow_embeddings else network


def check_taps(taps: Sequence[int], target: PreTrainedModel) -> None:
    """Raise UsageError for layers that the target lacks, or cannot show."""
    deepest = target.config.get_text_config().num_hidden_layers - 2
    if taps and max(taps) > deepest:
        raise UsageError(
            f"taps {list(taps)}: the target's layers are 0..{deepest + 1}, and the last one's "
            f"state is not readable unnormed; use layers up to {deepest}"
        )


def _output(recipe: Recipe) -> str:
    """How the output is read: cross-entropy and distillation leave a score's scale free."""
    return "score" if recipe.objective == "score_entropy" else "denoiser"


def autoregressive(
    recipe: Recipe, corpus: Corpus, rows: Sequence[int], target: PreTrainedModel
) -> SmallLM:
    """A causal LM of the target's family with fewer layers, or an earlier drafter."""
    if recipe.init is not None and recipe.init != "target":
        network = SmallLM.from_pretrained(recipe.init)
        if network.borrows:
            return _borrow_from(network, target)
        _check_vocabulary(network.vocab_size, target, recipe.init)
        return network
    config = _shallow_config(recipe, target)
    vocab = None
    if recipe.borrow_embeddings:
        vocab = most_frequent(corpus, rows, config.vocab_size, recipe.draft_vocab)
    config.borrow_embeddings = recipe.borrow_embeddings
    config.draft_vocab_size = None if vocab is None else len(vocab)
    network = SmallLM(config)
    if vocab is not None:
        network.draft_vocab.copy_(vocab)
    if recipe.init == "target":
        _copy_layers(network.net, target)
    return _borrow_from(network, target) if recipe.borrow_embeddings else network


def _shallow_config(recipe: Recipe, target: PreTrainedModel) -> Any:
    """The target's own config with the recipe's depth and width."""
    text = target.config.get_text_config()
    public = {key: value for key, value in text.to_dict().items() if not key.startswith("_")}
    config = type(text).from_dict(public)
    for name in {"num_hidden_layers", "n_layer", "num_layers"} & set(config.to_dict()):
        setattr(config, name, recipe.blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: recipe.blocks]
    width = recipe.hidden_size
    if width is None or width == config.hidden_size:
        return config
    if recipe.borrow_embeddings:
        raise UsageError(
            f"hidden_size {width} does not fit the borrowed embeddings of width "
            f"{config.hidden_size}; leave it null"
        )
    heads = recipe.heads or max(1, width // 64)
    if width % heads:
        raise UsageError(f"hidden_size {width} is not a multiple of heads {heads}")
    config.hidden_size = width
    config.intermediate_size = 4 * width
    config.num_attention_heads = heads
    config.num_key_value_heads = heads
    config.head_dim = width // heads
    return config


def _check_vocabulary(size: int, target: PreTrainedModel, folder: str) -> None:
    expected = target.config.get_text_config().vocab_size
    if size != expected:
        raise ConfigError(
            f"{folder} has a vocabulary of {size} tokens, but the target has {expected}; "
            f"start from a drafter of this target"
        )


def _borrow_from(network: Network, target: PreTrainedModel) -> Network:
    head: Any = target.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UsageError(
            f"{target.config.model_type} has no plain output matrix to borrow; "
            f"train with --set borrow_embeddings=false"
        )
    table: Any = target.get_input_embeddings()
    network.borrow(table.weight.detach(), head.weight.detach())
    return network


def _final_norm(target: PreTrainedModel) -> Tensor | None:
    """The weight of the norm before the target's head, whatever its family calls it."""
    children = target.base_model.named_children()
    norms = [module for name, module in children if "norm" in name or name == "ln_f"]
    return norms[-1].get_parameter("weight").detach().float() if norms else None


def _open(network: SEDD, counts: Int[Tensor, "V"], norm: Float[Tensor, "H"] | None) -> None:
    """Open the gates, set the read-out to word frequencies, scale the MASK embedding to the table.

    From the authors' zeros, a short run spends its budget on opening its gates (LAB.md).
    """
    width = network.config.hidden_size
    table = network.vocab_embed
    assert isinstance(table, BorrowedEmbedding)
    columns = counts[network.draft_vocab] if network.config.draft_vocab_size is not None else counts
    with torch.no_grad():
        table.mask_embedding.normal_(std=table.weight.std().item())
        if network.config.taps:
            network.tap_norm.weight.fill_(table.weight.std().item())  # as large as the embeddings
        for block in network.blocks:
            gates = block.get_parameter("adaLN_modulation.bias").view(6, width)
            gates[2] = 1.0
            gates[5] = 1.0
        if norm is not None:
            network.output_layer.norm_final.weight.copy_(0.1 * norm)
    shift = unigram_shift(network.head.float(), columns)
    with torch.no_grad():
        # copied, for the head may be on another device
        network.output_layer.adaLN_modulation.bias[:width].copy_(shift)


def unigram_shift(head: Float[Tensor, "C H"], counts: Int[Tensor, "C"]) -> Float[Tensor, "H"]:
    """The state whose read-out is nearest to the corpus's word frequencies: saves early steps."""
    shift = torch.zeros(head.shape[1], device=head.device, requires_grad=True)
    frequency = (counts.float() / counts.sum()).to(head.device)
    optimizer = torch.optim.LBFGS([shift], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        cross_entropy = -(frequency * torch.log_softmax(head @ shift, -1)).sum()
        loss = cross_entropy + 1e-4 * shift.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return shift.detach()


def _spread(blocks: int, layers: int) -> list[int]:
    """The target's layers that a shallow network copies: first, last, others evenly between."""
    return [round(i * (layers - 1) / max(1, blocks - 1)) for i in range(blocks)]


def _copy_layers(network: nn.Module, target: PreTrainedModel) -> None:
    """Copy layers, final norm and positions by name. Raises UsageError if a shape differs."""
    source = target.state_dict()
    own = network.state_dict()
    blocks = 1 + max(int(match.group(2)) for name in own if (match := LAYER.search(name)))
    layers = _spread(blocks, target.config.get_text_config().num_hidden_layers)
    with torch.no_grad():
        for name, tensor in own.items():
            origin = LAYER.sub(lambda m: f"{m.group(1)}.{layers[int(m.group(2))]}.", name)
            if origin not in source:
                continue
            if source[origin].shape != tensor.shape:
                raise UsageError(
                    f"init: target needs the target's sizes, but {name} is {list(tensor.shape)}, "
                    f"not {list(source[origin].shape)}; leave hidden_size and heads null"
                )
            tensor.copy_(source[origin])


def _copy_attention(network: SEDD, target: PreTrainedModel) -> None:
    """Copy attention and norms of the target's layers into SEDD's blocks.

    Their gated MLP and shared key heads have no exact counterpart there: key and value heads are
    repeated for their groups, and the MLP's `up` and `down` fill the rows they have.
    """
    text = target.config.get_text_config()
    own = network.config
    source = target.state_dict()
    queries = [name for name in source if name.endswith(QUERY)]
    equal = (own.hidden_size, own.n_heads) == (text.hidden_size, text.num_attention_heads)
    if not queries or not equal:
        raise UsageError(
            f"init: target copies layers of Llama-like targets of equal width and heads; "
            f"{target.config.model_type} with {text.hidden_size} and {text.num_attention_heads} "
            f"does not match {own.hidden_size} and {own.n_heads}"
        )
    layers = _spread(len(network.blocks), len(queries))
    for block, layer in zip(network.blocks, layers, strict=True):
        assert isinstance(block, Block)
        prefix = queries[layer].removesuffix(QUERY)
        weights = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in source.items()
            if name.startswith(prefix)
        }
        groups = text.num_attention_heads // text.num_key_value_heads
        _copy_block(block, weights, text.hidden_size // text.num_attention_heads, groups)


@torch.no_grad()
def _copy_block(block: Block, weights: Mapping[str, Tensor], head: int, groups: int) -> None:
    """Copy one layer's weights; `head` is the width of a head, `groups` the queries per key."""

    def repeated(weight: Tensor) -> Tensor:
        heads = weight.view(-1, head, weight.shape[1])
        return heads.repeat_interleave(groups, 0).flatten(0, 1)

    keys = repeated(weights["self_attn.k_proj"])
    values = repeated(weights["self_attn.v_proj"])
    block.attn_qkv.weight.copy_(torch.cat([weights["self_attn.q_proj"], keys, values]))
    block.attn_out.weight.copy_(weights["self_attn.o_proj"])
    block.norm1.weight.copy_(weights["input_layernorm"])
    block.norm2.weight.copy_(weights["post_attention_layernorm"])
    wide = block.get_parameter("mlp.0.weight")
    narrow = block.get_parameter("mlp.2.weight")
    n = min(len(weights["mlp.up_proj"]), len(wide))
    wide[:n].copy_(weights["mlp.up_proj"][:n])
    narrow[:, :n].copy_(weights["mlp.down_proj"][:, :n])
