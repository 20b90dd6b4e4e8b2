"""Measurements of the core that `specdiff bench` does not make: python scripts/measure.py NAME

forward   ragged forward against a DynamicCache forward
linear    products of few rows: the stock kernel against ours
host      host time per round outside the networks
reuse     a conversation's next turn, read again whole against read where it is new
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

import specdiff
from specdiff import SpeculativeLM, catalog, decode
from specdiff.models.cache import RaggedCache
from specdiff.nn.linear import linear
from specdiff.types import Batch, SamplingParams
from specdiff.verify import verifier

SHAPES = ((45, 1536, 576), (45, 576, 1536), (90, 576, 576), (1, 49152, 576))  # count, out, in
TEXT = "The river ran past the mill, the old bridge and the school, and on to the sea. "


def compare(label: str, times: int, first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Print the median of each and of the ratio, from alternating runs after one of warm-up."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        seconds.append((middle - begin, time.perf_counter() - middle))
    one, other = (1e3 * statistics.median(column) for column in zip(*seconds[1:], strict=True))
    ratio = statistics.median(b / a for a, b in seconds[1:])
    print(f"{label} {one:.1f} ms, ours {other:.1f} ms, ratio {ratio:.3f}", flush=True)


@torch.inference_mode()
def forward(lm: SpeculativeLM, a: argparse.Namespace) -> None:
    model = lm.target.model
    stock = type(model).from_pretrained(catalog.model_folder(a.model), dtype=model.dtype).eval()
    context = torch.randint(lm.target.info.vocab_size, (1, a.context))
    dynamic = DynamicCache(config=model.config)
    stock(context, past_key_values=dynamic)
    cache = RaggedCache(1, a.context + 64)
    lm.target.ragged.forward(cache, context, torch.arange(a.context)[None], last=1)

    def theirs(ids: torch.Tensor) -> None:
        stock(ids, past_key_values=dynamic)
        dynamic.crop(-ids.shape[1])

    for n in (1, 8, 16, 32):
        ids = context[:, :n]
        positions = torch.arange(a.context, a.context + n)[None]
        ours = partial(lm.target.ragged.forward, cache, ids, positions)
        compare(f"{n} tokens: DynamicCache", a.times, partial(theirs, ids), ours)


def products(function: Any, x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [function(x, weight) for weight in weights]


@torch.inference_mode()
def few_rows(lm: SpeculativeLM, a: argparse.Namespace) -> None:
    """All weights of one kind of layer in turn, so that none stays in the processor's cache."""
    for count, out, wide in SHAPES:
        weights = [torch.randn(out, wide) for _ in range(count)]
        for rows in (1, 2, 5, 9, 16, 17, 33):
            x = torch.randn(1, rows, wide)
            label = f"{wide} -> {out}, {count} times, {rows} rows: stock"
            theirs = partial(products, torch.nn.functional.linear, x, weights)
            compare(label, a.times, theirs, partial(products, linear, x, weights))


def host(lm: SpeculativeLM, a: argparse.Namespace) -> None:
    inside = 0.0

    def timed(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal inside
        begin = time.perf_counter()
        result = call(*args, **options)
        inside += time.perf_counter() - begin
        return result

    network = lm.drafter.denoiser.model
    for owner, name in ((lm.target.model, "forward"), (network, "hidden"), (network, "logits")):
        setattr(owner, name, partial(timed, getattr(owner, name)))
    prompt = lm.encode("Explain how rain forms, step by step.")
    for name in ("token", "block", "match"):
        for sampling in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9}):
            batch = Batch.of([prompt], [SamplingParams(a.tokens, **sampling)], [1], slots=512)
            options = {"verifier": verifier(name), "draft_len": 4}
            shares = []
            for step in decode.decode(lm.target, lm.drafter, batch, **options):
                shares.append(1 - inside / sum(step.seconds.values()))
                inside = 0.0
            print(f"{name} {sampling}: {100 * statistics.median(shares[2:]):.1f} % of a round")


def reuse(lm: SpeculativeLM, a: argparse.Namespace) -> None:
    """With --tokens 1: the wait for the first piece."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": a.tokens, "ignore_eos": True}
    talk = specdiff.Conversation(lm, **options)
    list(talk.say(TEXT * (a.context // 20) + "Sum this up."))

    def again() -> None:
        messages = [*talk.messages, {"role": "user", "content": "And then?"}]
        lm.generate(lm.render(messages), **options)

    compare("a turn: read again", a.times, again, lambda: list(talk.say("And then?")))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = {"forward": forward, "linear": few_rows, "host": host, "reuse": reuse}
    p.add_argument("name", choices=commands)
    p.add_argument("--model", default="smollm2-135m")
    for option, default in {"context": 256, "times": 9, "tokens": 24}.items():
        p.add_argument(f"--{option}", type=int, default=default)
    a = p.parse_args()
    commands[a.name](specdiff.load(a.model, "sedd" if a.name == "host" else "none"), a)
