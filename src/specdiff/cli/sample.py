"""`specdiff sample`: text from the diffusion network alone, and what the target thinks of it."""

import math
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from specdiff.cli import terminal
from specdiff.cli.options import quiet_libraries


def sample(
    drafter: Annotated[
        str, typer.Option(help="A SEDD or MDLM drafter: a folder, a hub id, or sedd.")
    ] = "sedd",
    model: Annotated[
        str,
        typer.Option(help="The target that judges: hub id, folder, file.gguf or built-in name."),
    ] = "smollm2-135m",
    prefix: Annotated[str, typer.Option(help="Text in front.")] = "",
    suffix: Annotated[str, typer.Option(help="Text behind (needs a bidirectional network).")] = "",
    length: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    steps: Annotated[int, typer.Option(help="Network passes (T).")] = 32,
    sampler: Annotated[str, typer.Option(help="analytic or euler.")] = "analytic",
    count: Annotated[int, typer.Option(help="How many samples.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same samples.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No perplexity on stderr.")] = False,
) -> None:
    """Write text by diffusion alone; its perplexity under the target goes to stderr.

    Example:  specdiff sample --drafter louaaron/sedd-small --model gpt2 --prefix "Once" --suffix "the end." --steps 64
    """
    quiet_libraries()
    import specdiff
    from specdiff.text.sample import infill

    lm = specdiff.load(model, drafter, device=device, dtype=dtype)
    made = infill(
        lm, length=length, prefix=prefix, suffix=suffix, steps=steps, sampler=sampler, count=count, seed=seed,
    )  # fmt: skip
    judged = [s.perplexity for s in made if s.perplexity is not None]
    typical = math.exp(sum(map(math.log, judged)) / len(judged)) if judged else None
    if as_json:
        terminal.print_json(
            {
                "samples": [asdict(s) for s in made],
                "perplexity": typical,
                "model": model,
                "drafter": drafter,
            }
        )
        return
    print(
        "\n\n".join(s.text if s.text is not None else " ".join(map(str, s.token_ids)) for s in made)
    )
    if typical is not None and not quiet:
        print(
            f"perplexity under {model}: {typical:.1f} (geometric mean of {len(judged)})",
            file=sys.stderr,
        )
