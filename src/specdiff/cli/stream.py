"""Streamed answers on the screen, and the footer below them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.text.comparison import Comparison
    from specdiff.text.generation import Chunk, Generation


def show(chunk: "Chunk", out: "Console", show_accepted: bool) -> None:
    """Print a chunk's text; a terminal may color drafted text, a pipe gets the text unchanged."""
    if out.is_terminal:
        style = "green" if show_accepted and chunk.accepted else None
        out.out(chunk.text, style=style, end="", highlight=False)
    else:
        out.file.write(chunk.text)
    out.file.flush()


def footer(name: str, answer: "Generation", seconds: float) -> str:
    """Speed and acceptance of an answer, in one line."""
    s = answer.stats
    drafting = (
        f"tau {s.tau:.2f}, accepted {s.accepted} of {s.drafted} drafted tokens in {s.rounds} rounds"
    )
    if s.plain_rounds:
        drafting += f" ({s.plain_rounds} without drafting)"
    if s.faults:
        drafting += "; the drafter failed and was disabled for the rest of the request"
    count = len(answer.token_ids)
    rate = count / max(seconds, 1e-9)
    return f"{name}: {count} tokens in {seconds:.1f} s, {rate:.1f} tok/s; {drafting}"


def verdict(comparison: "Comparison", temperature: float, verifier: str) -> str:
    """A comparison with plain decoding, in two lines."""
    c = comparison
    if c.same_tokens:
        tokens = "the same tokens"
    elif temperature > 0 and not verifier.startswith("match"):
        tokens = (
            f"different tokens from position {c.first_difference} on, of the same distribution "
            "(--verifier match --seed N gives the same tokens)"
        )
    else:
        tokens = (
            f"DIFFERENT TOKENS from position {c.first_difference} on "
            "(near-ties in a low-precision dtype can cause this)"
        )
    speed = "faster" if c.ratio >= 1 else "SLOWER"
    if c.break_even_tau is not None:
        speed += f", break-even tau {c.break_even_tau:.2f}"
    return (
        f"plain: {c.plain_tokens_per_second:.1f} tok/s, {tokens}\n"
        f"speculative / plain: {c.ratio:.2f}x "
        f"({speed}; medians of alternating runs in this process)"
    )
