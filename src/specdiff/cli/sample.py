"""`specdiff sample`: text from the diffusion network alone, and its perplexity under the target."""

import statistics
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from specdiff.cli import terminal
from specdiff.cli.terminal import quiet_libraries

if TYPE_CHECKING:
    from specdiff.text.sample import Sample


def sample(
    drafter: Annotated[
        str, typer.Option(help="A SEDD or MDLM drafter: a folder, a hub id, or sedd.")
    ] = "sedd",
    model: Annotated[
        str,
        typer.Option(help="The target that scores it: hub id, folder, file.gguf or built-in name."),
    ] = "smollm2-135m",
    prefix: Annotated[str, typer.Option(help="Text before the sample.")] = "",
    suffix: Annotated[
        str, typer.Option(help="Text after the sample; for bidirectional networks.")
    ] = "",
    length: Annotated[int, typer.Option(help="Number of tokens.")] = 64,
    steps: Annotated[int, typer.Option(help="Network passes (T).")] = 32,
    sampler: Annotated[str, typer.Option(help="analytic or euler.")] = "analytic",
    count: Annotated[int, typer.Option(help="Number of samples.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same samples.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No perplexity on stderr.")] = False,
) -> None:
    """Write text by diffusion alone; its perplexity under the target goes to stderr.

    Example:  specdiff sample --prefix "The river" --length 24 --count 2 --steps 16
    """
    quiet_libraries()
    import specdiff
    from specdiff.text.sample import infill

    lm = specdiff.load(model, drafter, device=device, dtype=dtype)
    samples = infill(
        lm,
        length=length,
        prefix=prefix,
        suffix=suffix,
        steps=steps,
        sampler=sampler,
        count=count,
        seed=seed,
    )
    perplexities = [s.perplexity for s in samples if s.perplexity is not None]
    mean = statistics.geometric_mean(perplexities) if perplexities else None
    if as_json:
        report = {"samples": [asdict(s) for s in samples], "perplexity": mean}
        terminal.print_json({**report, "model": model, "drafter": drafter})
        return
    print("\n\n".join(_text(s) for s in samples))
    if mean is not None and not quiet:
        line = f"perplexity under {model}: {mean:.1f} (geometric mean of {len(perplexities)})"
        print(line, file=sys.stderr)


def _text(sample: "Sample") -> str:
    """Its text, or token ids where the target has no tokenizer."""
    return " ".join(map(str, sample.token_ids)) if sample.text is None else sample.text
