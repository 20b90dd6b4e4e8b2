"""Answers on the screen as they are written, and the line below them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.text.generation import Chunk, Generation


def show(piece: "Chunk", out: "Console", show_accepted: bool) -> None:
    """The piece's text, coloured where it was drafted and that is wanted; into a pipe, exactly as it is."""
    if out.is_terminal:
        out.out(
            piece.text,
            style="green" if show_accepted and piece.accepted else None,
            end="",
            highlight=False,
        )
    else:
        out.file.write(piece.text)
    out.file.flush()


def footer(name: str, answer: "Generation", seconds: float) -> str:
    """How fast, and how much of it was drafted."""
    s = answer.stats
    drafted = (
        f"tau {s.tau:.2f}, accepted {s.accepted} of {s.drafted} drafted tokens in {s.rounds} rounds"
    )
    if s.plain_rounds:
        drafted += f" ({s.plain_rounds} without drafting)"
    if s.faults:
        drafted += "; the drafter broke, and rested from then on"
    rate = len(answer.token_ids) / max(seconds, 1e-9)
    return f"{name}: {len(answer.token_ids)} tokens in {seconds:.1f} s, {rate:.1f} tok/s; {drafted}"
