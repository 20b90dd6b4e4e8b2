"""The JSON of answers: choices, log probabilities, usage and the figures of speculation."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from specdiff.engine import RequestOutput
from specdiff.scoring import PromptScore
from specdiff.stats import Stats
from specdiff.text.generation import Chunk, Generation

Spell = Callable[[int], str]


def error(message: str, kind: str, *, param: str | None = None, code: int = 400) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(
    prompt_tokens: int, cached_tokens: int, generations: Sequence[Generation]
) -> dict[str, Any]:
    """The tokens of a request: its prompts, of which some were in the cache, and its answers."""
    completion = sum(len(generation.token_ids) for generation in generations)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def speculation(generations: Sequence[Generation]) -> dict[str, Any]:
    """The figures of speculation over the drafting rounds of a request, in vLLM's shape.

    `mean_acceptance_length` counts the bonus token; `acceptance_histogram[k]` is the number of
    rounds in which k draft tokens were accepted.
    """
    stats = Stats()
    for generation in generations:
        stats.merge(generation.stats)
    rounds = stats.rounds - stats.plain_rounds
    at_least = [rounds, *stats.passed, 0]
    histogram = [more - fewer for more, fewer in pairwise(at_least)]
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + stats.accepted / rounds if rounds else 1.0,
            "draft_acceptance_rate": stats.alpha,
            "acceptance_histogram": histogram,
            "num_spec_steps": rounds,
            "num_draft_tokens": stats.drafted,
            "num_accepted_draft_tokens": stats.accepted,
        }
    }


def round_record(
    output: RequestOutput, count: int, chunks: Sequence[Chunk], spell: Spell
) -> dict[str, Any]:
    """What was drafted in a round, and what became of it.

    `draft` and `tokens` are the drafted and the first `count` emitted tokens, of which the first
    `accepted` came from the draft. `text` is the round's part of the answer, in pieces; tokens that
    end inside a character have their text in a later piece. `seconds` are by stage, and shared by
    all requests of the batch.
    """
    return {
        "draft": [{"id": token, "text": spell(token)} for token in output.draft],
        "accepted": min(output.accepted, count),
        "tokens": [{"id": token, "text": spell(token)} for token in output.tokens[:count]],
        "text": [{"text": chunk.text, "accepted": chunk.accepted} for chunk in chunks],
        "seconds": output.seconds,
    }


def chat_logprobs(generation: Generation, first: int, end: int, spell: Spell) -> dict[str, Any]:
    """The log probabilities of tokens `first` to `end`, as chat completions give them."""
    entries = []
    for i in range(first, end):
        entry: dict[str, Any] = _entry(generation.token_ids[i], generation.logprobs[i], spell)
        entry["top_logprobs"] = [_entry(*pair, spell) for pair in generation.top_logprobs[i]]
        entries.append(entry)
    return {"content": entries}


def _entry(token: int, logprob: float, spell: Spell) -> dict[str, Any]:
    text = spell(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def completion_logprobs(
    generation: Generation, first: int, end: int, spell: Spell, offset: int
) -> dict[str, list[Any]]:
    """The log probabilities of tokens `first` to `end`, as completions give them.

    offset: where the generation begins in the text, in characters.
    """
    texts = [spell(token) for token in generation.token_ids[:end]]
    offsets = accumulate(map(len, texts), initial=offset)
    return {
        "tokens": texts[first:],
        "token_logprobs": [_finite(value) for value in generation.logprobs[first:end]],
        "top_logprobs": [_named(top, spell) for top in generation.top_logprobs[first:end]],
        "text_offset": [*offsets][first:-1],
    }


def prompt_logprobs(
    prompt: Sequence[int], score: PromptScore, spell: Spell, lengths: Sequence[int]
) -> dict[str, list[Any]]:
    """The log probabilities of an echoed prompt; its first token has none.

    lengths: of each token in the text, in characters.
    """
    return {
        "tokens": [spell(token) for token in prompt],
        "token_logprobs": [None, *[_finite(value) for value in score.logprobs]],
        "top_logprobs": [None, *[_named(top, spell) for top in score.top_logprobs]],
        "text_offset": [*accumulate(lengths, initial=0)][:-1],
    }


def _named(top: Sequence[tuple[int, float]], spell: Spell) -> dict[str, float]:
    """Log probabilities by text; of tokens with the same text, the most likely one's."""
    return {spell(token): _finite(value) for token, value in reversed(top)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; vLLM and OpenAI write -9999 for it."""
    return max(logprob, -9999.0)
