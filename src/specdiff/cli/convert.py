"""`specdiff convert`: a block drafter's folder in another tool's format, and back."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from specdiff.nn.block_checkpoint import TargetTables

CONVERSION = "Conversion"


def convert(
    drafter: Annotated[
        str, typer.Argument(help="Folder or hub id of a block drafter.", metavar="DRAFTER")
    ],
    out: Annotated[Path, typer.Argument(help="New folder.", metavar="OUT")],
    to: Annotated[
        str,
        params.option("specdiff, speculators, dflash or transformers.", panel=CONVERSION),
    ],
    model: Annotated[
        str | None,
        params.option("The drafter's target (default: the one it names).", panel=CONVERSION),
    ] = None,
) -> None:
    """Convert a block drafter between formats: DFlash, DSpark and specdiff's own.

    The converted drafter computes the same logits; what a format cannot hold is an error.

    Example:  specdiff convert runs/block out --to speculators --model Qwen/Qwen3-0.6B
    """
    from specdiff import catalog, weights
    from specdiff.nn import block_formats
    from specdiff.nn.block import BlockNetwork

    quiet_libraries()
    if to not in block_formats.WRITTEN:
        raise UsageError(
            f"--to must be one of {', '.join(block_formats.WRITTEN)}, not {to!r}", param="to"
        )
    if (out / weights.CONFIG).exists():
        raise UsageError(f"{out} already holds a model; give a new folder", param="out")
    folder = weights.locate(drafter)
    if block_formats.form(weights.read_config(folder)) is None:
        raise UsageError(
            f"{folder} holds no block drafter; known formats are specdiff, speculators, dflash "
            "and deepspec",
            param="drafter",
        )
    BlockNetwork.from_pretrained(folder)  # a missing or misshapen tensor is an error here
    checkpoint = block_formats.read(folder)
    target = model or checkpoint.target
    if target is None:
        raise UsageError(f"{folder} does not name its target; give --model", param="model")
    if to == "specdiff":
        block_formats.write_own(out, checkpoint, catalog.same_target(target))
    else:
        block_formats.write(out, to, checkpoint, _tables(target))
    config = checkpoint.config
    print(
        f"{config.layers} layers, {config.draft_len} tokens per draft, target {target}",
        file=sys.stderr,
    )
    print(out)


def _tables(spec: str) -> "TargetTables":
    """What an export needs of the target, in the precision of its files."""
    import torch

    from specdiff import catalog
    from specdiff.errors import UnsupportedModelError
    from specdiff.models.loading import load_model
    from specdiff.nn.block_checkpoint import TargetTables

    folder = catalog.model_folder(spec)
    model: Any = load_model(folder, None, torch.device("cpu"))
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if type(embedding) is not torch.nn.Embedding or type(head) is not torch.nn.Linear:
        raise UnsupportedModelError(
            f"the target {spec!r} has no plain embedding and head that a drafter could borrow"
        )
    text = model.config.get_text_config()
    return TargetTables(
        name=catalog.hub_id(spec) or str(Path(folder).absolute()),
        architectures=model.config.architectures or [],
        layers=text.num_hidden_layers,
        max_positions=text.max_position_embeddings,
        embedding=embedding.weight.detach(),
        head=head.weight.detach(),
    )
