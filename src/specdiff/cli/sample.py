"""`specdiff sample`: text from the diffusion network alone, and its perplexity under the target."""

import statistics
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from specdiff.cli import params, terminal

if TYPE_CHECKING:
    from specdiff.text.sample import Sample


def sample(
    model: params.Model = "smollm2-135m",
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    quantize: params.Quantize = "auto",
    threads: params.Threads = "auto",
    drafter: Annotated[
        str,
        params.option("A SEDD or MDLM drafter: a folder, a hub id or sedd.", panel=params.DRAFTING),
    ] = "sedd",
    steps: Annotated[int, params.option("Network passes (T).", panel=params.DRAFTING)] = 32,
    sampler: Annotated[
        str, params.option("analytic or euler.", panel=params.DRAFTING)
    ] = "analytic",
    prefix: Annotated[str, params.option("Text before the sample.", panel=params.SAMPLING)] = "",
    suffix: Annotated[
        str,
        params.option("Text after it; for bidirectional networks.", panel=params.SAMPLING),
    ] = "",
    length: Annotated[int, params.option("Number of tokens.", panel=params.SAMPLING)] = 64,
    count: Annotated[int, params.option("Number of samples.", panel=params.SAMPLING)] = 1,
    seed: Annotated[
        int | None,
        params.option("Same seed, same samples.", panel=params.SAMPLING, variable="SEED"),
    ] = None,
    as_json: params.Json = False,
    quiet: params.Quiet = False,
    config: params.Config = None,
) -> None:
    """Write text by diffusion alone; its perplexity under the target goes to stderr.

    Example:  specdiff sample --prefix "The river" --length 24 --count 2 --steps 16
    """
    terminal.quiet_libraries()
    import specdiff
    from specdiff.text.sample import infill

    lm = specdiff.load(
        model,
        drafter,
        device=device,
        dtype=dtype,
        quantize=quantize,
        threads=params.thread_count(threads),
    )
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
