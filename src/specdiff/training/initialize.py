"""Where a run's network begins: from scratch, from the target's own layers, or from an earlier drafter.

Shapes: V target vocabulary, C draft vocabulary, H width.
"""

import re
from collections.abc import Sequence
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


def sedd(recipe: Recipe, corpus: Corpus, rows: Sequence[int], target: PreTrainedModel) -> SEDD:
    """A SEDD network as the recipe says. Raises ConfigError or UsageError where it does not fit the target."""
    text = target.config.get_text_config()
    if recipe.init not in (None, "target"):
        assert recipe.init is not None
        network = SEDD.from_pretrained(recipe.init)
        _fits(network.config.tokens, text.vocab_size, recipe.init)
        if network.config.attention != recipe.attention or network.config.process != recipe.process:
            raise UsageError(
                f"{recipe.init} is a network of attention {network.config.attention!r} and process {network.config.process!r}, "
                f"but the recipe says {recipe.attention!r} and {recipe.process!r}"
            )
        for block in network.blocks:
            assert isinstance(block, Block)
            block.dropout = recipe.dropout  # the run's, not the one the checkpoint was trained with
        network.config = replace(network.config, output=_output(recipe))
        return _borrow_from(network, target) if network.config.borrow_embeddings else network
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
    )
    network = SEDD(config)
    if vocab is not None:
        network.draft_vocab.copy_(vocab)
    if config.borrow_embeddings:
        _borrow_from(network, target)
        _open(network, corpus.counts(rows, text.vocab_size), _final_norm(target))
    if recipe.init == "target":
        _copy_attention(network, target)
    return network


def _output(recipe: Recipe) -> str:
    """What the objective makes of the output: cross-entropy and distillation leave a score's scale free."""
    return "score" if recipe.objective == "score_entropy" else "denoiser"


def autoregressive(
    recipe: Recipe, corpus: Corpus, rows: Sequence[int], target: PreTrainedModel
) -> SmallLM:
    """A causal LM of the target's family with fewer layers, or an earlier drafter."""
    text = target.config.get_text_config()
    if recipe.init not in (None, "target"):
        assert recipe.init is not None
        network = SmallLM.from_pretrained(recipe.init)
        if not network.borrows:
            _fits(network.vocab_size, text.vocab_size, recipe.init)
            return network
        return _borrow_from(network, target)
    config = type(text).from_dict(
        {key: value for key, value in text.to_dict().items() if not key.startswith("_")}
    )  # without its folder
    names = {"num_hidden_layers", "n_layer", "num_layers"} & set(config.to_dict())
    for name in names:
        setattr(config, name, recipe.blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: recipe.blocks]
    if recipe.hidden_size and recipe.hidden_size != config.hidden_size:
        if recipe.borrow_embeddings:
            raise UsageError(
                f"hidden_size {recipe.hidden_size} with borrowed embeddings of width {config.hidden_size}; leave it null"
            )
        heads = recipe.heads or max(1, recipe.hidden_size // 64)
        if recipe.hidden_size % heads:
            raise UsageError(f"hidden_size {recipe.hidden_size} is not a multiple of heads {heads}")
        config.hidden_size = recipe.hidden_size
        config.intermediate_size = 4 * recipe.hidden_size
        config.num_attention_heads = config.num_key_value_heads = heads
        config.head_dim = recipe.hidden_size // heads
    vocab = (
        most_frequent(corpus, rows, text.vocab_size, recipe.draft_vocab)
        if recipe.borrow_embeddings
        else None
    )
    config.borrow_embeddings, config.draft_vocab_size = (
        recipe.borrow_embeddings,
        None if vocab is None else len(vocab),
    )
    network = SmallLM(config)
    if vocab is not None:
        network.draft_vocab.copy_(vocab)
    if recipe.init == "target":
        _copy_layers(network.net, target)
    return _borrow_from(network, target) if recipe.borrow_embeddings else network


def _fits(found: int, wanted: int, where: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"{where} writes a vocabulary of {found} tokens, but the target has {wanted}; start from a drafter of this target"
        )


def _borrow_from(network: Network, target: PreTrainedModel) -> Network:
    head: Any = target.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UsageError(
            f"{target.config.model_type} has no plain output matrix to borrow; train with borrow_embeddings=false"
        )
    table: Any = target.get_input_embeddings()
    network.borrow(table.weight.detach(), head.weight.detach())
    return network


def _final_norm(target: PreTrainedModel) -> Tensor | None:
    """The weight of the norm before the target's head, whatever its family calls it."""
    norms = [
        m for name, m in target.base_model.named_children() if "norm" in name or name == "ln_f"
    ]
    return norms[-1].get_parameter("weight").detach().float() if norms else None


def _open(network: SEDD, counts: Int[Tensor, "V"], norm: Float[Tensor, "H"] | None) -> None:
    """Open gates, a read-out that already knows word frequencies, and a MASK embedding of the table's size.

    From the authors' zeros, a short run spends its budget learning to open its gates (LAB.md).
    """
    width = network.config.hidden_size
    table = network.vocab_embed
    assert isinstance(table, BorrowedEmbedding)
    columns = counts[network.draft_vocab] if network.config.draft_vocab_size is not None else counts
    with torch.no_grad():
        table.mask_embedding.normal_(std=table.weight.std().item())
        for block in network.blocks:
            gates = block.get_parameter("adaLN_modulation.bias").view(6, width)
            gates[2], gates[5] = 1.0, 1.0
        if norm is not None:
            network.output_layer.norm_final.weight.copy_(0.1 * norm)
    shift = unigram_shift(network.head.float(), columns)
    with torch.no_grad():
        network.output_layer.adaLN_modulation.bias[:width].copy_(
            shift
        )  # the head may lie on another device


def unigram_shift(head: Float[Tensor, "C H"], counts: Int[Tensor, "C"]) -> Float[Tensor, "H"]:
    """The state whose read-out is nearest to the corpus's word frequencies: training need not spend steps on those."""
    shift = torch.zeros(head.shape[1], device=head.device, requires_grad=True)
    frequency = (counts.float() / counts.sum()).to(head.device)
    optimizer = torch.optim.LBFGS([shift], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            -(frequency * torch.log_softmax(head @ shift, -1)).sum() + 1e-4 * shift.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return shift.detach()


def _spread(blocks: int, layers: int) -> list[int]:
    """Which of the target's layers a shallow network begins with: the first and the last, others evenly between."""
    return [round(i * (layers - 1) / max(1, blocks - 1)) for i in range(blocks)]


LAYER = re.compile(r"(layers|h)\.(\d+)\.")


def _copy_layers(network: nn.Module, target: PreTrainedModel) -> None:
    """Chosen layers, final norm and positions of the target, by name; raises UsageError where a shape differs."""
    source = target.state_dict()
    layers = target.config.get_text_config().num_hidden_layers
    own = network.state_dict()
    blocks = 1 + max(int(m.group(2)) for k in own if (m := LAYER.search(k)))
    chosen = _spread(blocks, layers)
    with torch.no_grad():
        for name, tensor in own.items():
            origin = LAYER.sub(lambda m: f"{m.group(1)}.{chosen[int(m.group(2))]}.", name)
            if origin not in source:
                continue
            if source[origin].shape != tensor.shape:
                raise UsageError(
                    f"init: target needs the target's sizes, but {name} is {list(tensor.shape)}, not {list(source[origin].shape)}"
                )
            tensor.copy_(source[origin])


def _copy_attention(network: SEDD, target: PreTrainedModel) -> None:
    """Attention and norms of the target's layers; its gated MLP and shared key heads have no exact place in SEDD's block.

    Key/value heads are repeated for their groups; of the gated MLP, `up` and `down` fill the rows they have.
    """
    text = target.config.get_text_config()
    source = target.state_dict()
    found = [k for k in source if k.endswith("self_attn.q_proj.weight")]
    if (
        not found
        or network.config.hidden_size != text.hidden_size
        or network.config.n_heads != text.num_attention_heads
    ):
        raise UsageError(
            f"init: target copies layers of Llama-like targets of equal width and heads; {target.config.model_type} with "
            f"{text.hidden_size} and {text.num_attention_heads} does not match {network.config.hidden_size} and {network.config.n_heads}"
        )
    groups = text.num_attention_heads // text.num_key_value_heads
    head = text.hidden_size // text.num_attention_heads
    for block, layer in zip(network.blocks, _spread(len(network.blocks), len(found)), strict=True):
        assert isinstance(block, Block)
        prefix = found[layer].removesuffix("self_attn.q_proj.weight")

        of = {
            name.removeprefix(prefix).removesuffix(".weight"): w
            for name, w in source.items()
            if name.startswith(prefix)
        }
        keys, values = (
            of[name].view(-1, head, of[name].shape[1]).repeat_interleave(groups, 0).flatten(0, 1)
            for name in ("self_attn.k_proj", "self_attn.v_proj")
        )
        up, down = of["mlp.up_proj"], of["mlp.down_proj"]
        wide, narrow = block.get_parameter("mlp.0.weight"), block.get_parameter("mlp.2.weight")
        n = min(len(up), len(wide))
        with torch.no_grad():
            block.attn_qkv.weight.copy_(torch.cat([of["self_attn.q_proj"], keys, values]))
            block.attn_out.weight.copy_(of["self_attn.o_proj"])
            block.norm1.weight.copy_(of["input_layernorm"])
            block.norm2.weight.copy_(of["post_attention_layernorm"])
            wide[:n].copy_(up[:n])
            narrow[:, :n].copy_(down[:, :n])
