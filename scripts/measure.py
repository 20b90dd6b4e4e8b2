"""The core's own figures, as ratios in one process: alternating, medians with min and max.

    python scripts/measure.py forward      ragged forward against a DynamicCache forward
    python scripts/measure.py linear       few-row products: the stock kernel against ours
    python scripts/measure.py host         host time per round outside the networks
    python scripts/measure.py draft-cost   SEDD draft cost against window, blocks and gamma (untrained networks)
    python scripts/measure.py data         writing a corpus: transformers' batched generate against our engine
    python scripts/measure.py plug         inside transformers' generate: its own loop, prompt lookup, and custom_generate
    python scripts/measure.py reuse        a conversation's next turn: read again, or only what is new
    python scripts/measure.py acceptance   tau and break-even tau of a drafter on held-out prompts, temperature 0 and 1

Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

import specdiff
from specdiff import decode, stats
from specdiff.data.corpus import Corpus
from specdiff.drafters.base import NoDrafter
from specdiff.drafters.sedd import SEDDDenoiser, SEDDState
from specdiff.models.cache import RaggedCache
from specdiff.nn.ddit import SEDD
from specdiff.nn.linear import linear
from specdiff.nn.sedd_config import SEDDConfig
from specdiff.training.recipe import Recipe
from specdiff.types import Batch, Context, Round, SamplingParams
from specdiff.verify import verifier


def alternate(
    candidates: dict[str, Callable[[], Any]],
    times: int,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(times + warm):
        for name, run in candidates.items():
            begin = clock()
            run()
            if i >= warm:
                seconds[name].append(clock() - begin)
    return seconds


def spread(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):6.1f} ms ({1e3 * min(values):.1f}-{1e3 * max(values):.1f})"


@torch.inference_mode()
def forward(a: argparse.Namespace) -> None:
    from transformers import DynamicCache

    lm = specdiff.load(a.model, "none", dtype=a.dtype)
    model, ragged = lm.target.model, lm.target.ragged
    context = torch.randint(lm.target.info.vocab_size, (1, a.context))
    dynamic = DynamicCache(config=model.config)
    stock = (
        type(model)
        .from_pretrained(specdiff.catalog.model_folder(a.model), dtype=model.dtype)
        .eval()
    )  # transformers' own attention
    stock(context, past_key_values=dynamic)
    cache = RaggedCache(1, a.context + 64)
    ragged.forward(cache, context, torch.arange(a.context)[None], last=1)
    print(f"{'n':>4} {'dynamic cache':>28} {'ragged cache':>28}  ratio")
    for n in (1, 8, 16, 32):
        ids = torch.randint(lm.target.info.vocab_size, (1, n))
        at = torch.arange(a.context, a.context + n)[None]

        def plain(ids: torch.Tensor = ids, n: int = n) -> None:
            stock(ids, past_key_values=dynamic)
            dynamic.crop(-n)

        result = alternate(
            {"dynamic": plain, "ragged": lambda ids=ids, at=at: ragged.forward(cache, ids, at)},
            a.times,
        )
        ratio = statistics.median(result["ragged"]) / statistics.median(result["dynamic"])
        print(
            f"{n:4} {spread(result['dynamic']):>28} {spread(result['ragged']):>28}  {ratio:.3f}",
            flush=True,
        )


@torch.inference_mode()
def few_rows(a: argparse.Namespace) -> None:
    """All of one SmolLM2 layer kind's weights at once, so that nothing stays in cache; and the output head."""
    shapes = {
        "576 -> 1536 x 45": (45, 1536, 576),
        "1536 -> 576 x 45": (45, 576, 1536),
        "576 -> 576 x 90": (90, 576, 576),
        "head": (1, 49152, 576),
    }
    for rows in (1, 2, 5, 9, 16, 17, 33):
        told = []
        for name, (count, out, wide) in shapes.items():
            weights, x = [torch.randn(out, wide) for _ in range(count)], torch.randn(1, rows, wide)
            candidates = {"stock": torch.nn.functional.linear, "ours": linear}
            calls = {
                k: (lambda f=f, w=weights, x=x: [f(x, each) for each in w])
                for k, f in candidates.items()
            }
            ms = {k: 1e3 * statistics.median(v) for k, v in alternate(calls, a.times).items()}
            told.append(f"{name}: {ms['stock']:.1f} -> {ms['ours']:.1f} ms")
        print(f"{rows:3} rows  " + "   ".join(told), flush=True)


class Meter:
    """Seconds spent inside wrapped calls: what is left of a round is the host's."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            return result

        return timed


def host(a: argparse.Namespace) -> None:
    lm = specdiff.load(a.model, a.drafter, dtype=a.dtype)
    meter = Meter()
    lm.target.ragged.model.forward = meter.wrap(lm.target.ragged.model.forward)
    lm.drafter.denoiser.model.hidden = meter.wrap(lm.drafter.denoiser.model.hidden)
    lm.drafter.denoiser.model.logits = meter.wrap(lm.drafter.denoiser.model.logits)
    for name in ("token", "block", "match"):
        for options in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9}):
            prompt = lm.encode("Explain how rain forms, step by step.")
            batch = Batch.of(
                [prompt],
                [SamplingParams(max_tokens=a.tokens, **options)],
                [1],
                slots=len(prompt) + a.tokens + 64,
            )
            shares = []
            for last in decode.decode(
                lm.target, lm.drafter, batch, verifier=verifier(name), draft_len=a.draft_len
            ):
                total = sum(last.seconds.values())
                shares.append((total - meter.seconds, total))
                meter.seconds = 0.0
            shares = shares[2:]
            outside, total = (
                statistics.median(s[0] for s in shares),
                statistics.median(s[1] for s in shares),
            )
            share = 100 * outside / total
            print(
                f"{name:6} {options!s:36} host {1e3 * outside:5.2f} ms of {1e3 * total:6.1f} ms a round = {share:.1f} %",
                flush=True,
            )


@torch.inference_mode()
def draft_cost(a: argparse.Namespace) -> None:
    """One propose in the steady state: two newly committed tokens where the context is cached, the whole window where not."""
    lm = specdiff.load(a.model, "none", dtype=a.dtype)
    info = lm.target.info
    prompt = torch.randint(info.vocab_size, (a.context,)).tolist()
    gammas = (4, 8, 16, 32)
    plain = RaggedCache(1, a.context + 64)
    lm.target.ragged.forward(plain, torch.tensor([prompt]), torch.arange(a.context)[None], last=1)

    def score(n: int) -> Callable[[], Any]:
        at = torch.arange(a.context, a.context + n)[None]
        return lambda: lm.target.ragged.forward(plain, torch.zeros_like(at), at)

    target = {
        n: statistics.median(s)
        for n, s in alternate({n: score(n) for n in (1, *(g + 1 for g in gammas))}, a.times).items()
    }
    print("target, ms: " + ", ".join(f"n={n} {1e3 * s:.1f}" for n, s in target.items()))
    print(f"{'context':>16} {'blocks':>6} {'gamma':>6} {'draft':>26}  break-even tau")
    for attention, window in (
        ("causal-context", 128),
        ("bidirectional", 32),
        ("bidirectional", 64),
        ("bidirectional", 128),
    ):
        for blocks in (2, 3, 4):
            config = SEDDConfig(
                tokens=info.vocab_size, hidden_size=info.hidden_size, n_blocks=blocks, n_heads=info.hidden_size // 64, cond_dim=128,
                borrow_embeddings=True, draft_vocab_size=a.draft_vocab, attention=attention, context_window=window, time_conditioning=False,
            )  # fmt: skip
            network = SEDD(config).eval()
            network.draft_vocab.copy_(torch.arange(a.draft_vocab))
            denoiser = SEDDDenoiser(network, info, window=window)
            batch = Batch.of([prompt], [SamplingParams(max_tokens=64)], [0])
            context = Context(batch, None, torch.zeros(1, dtype=torch.long), None)
            state = denoiser.open(1, a.context + 64)

            def propose(
                gamma: int, d: SEDDDenoiser = denoiser, s: SEDDState = state, c: Context = context
            ) -> None:
                s.read.clamp_(max=a.context - 2)
                canvas = torch.full((1, gamma), d.mask_id)
                d.denoise(c, s, canvas, torch.zeros_like(canvas, dtype=torch.bool))

            result = alternate({g: (lambda g=g: propose(g)) for g in gammas}, a.times)
            for gamma, seconds in result.items():
                tau = (statistics.median(seconds) + target[gamma + 1]) / target[1]
                name = "cached 128" if attention == "causal-context" else f"window {window}"
                print(
                    f"{name:>16} {blocks:6} {gamma:6} {spread(seconds):>26}  {tau:.2f}", flush=True
                )


def held_out(folder: str, count: int) -> list[list[int]]:
    """Prompts of texts that recipes hold out, up to where the answer begins."""
    corpus = Corpus(folder)
    rows = corpus.split(Recipe.model_fields["held_out"].default)[1][:count]
    return [row.tokens[: row.prompt_length].tolist() for row in (corpus[i] for i in rows)]


def data(a: argparse.Namespace) -> None:
    """Equal prompts, equal batch, temperature 1, end of text ignored. CPU seconds of this process too: the machine may be shared."""
    from specdiff import engine
    from specdiff.data import memory

    memory.keep_freed()  # as 'specdiff data' does; both sides profit
    lm = specdiff.load(a.model, "none", dtype=a.dtype)
    stock = (
        type(lm.target.model)
        .from_pretrained(specdiff.catalog.model_folder(a.model), dtype=lm.target.model.dtype)
        .eval()
    )
    stock.generation_config.eos_token_id = None
    for rows in a.rows:
        lengths = [16 + (7 * i) % 32 for i in range(rows)]
        prompts = [torch.randint(3, lm.target.info.vocab_size, (n,)).tolist() for n in lengths]
        ids = torch.tensor(
            [[0] * (max(lengths) - n) + p for n, p in zip(lengths, prompts, strict=True)]
        )
        mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
        asked = [
            engine.Request(p, SamplingParams(max_tokens=a.tokens), i) for i, p in enumerate(prompts)
        ]

        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            out = stock.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=a.tokens,
                pad_token_id=0,
            )
            assert out.shape[1] == ids.shape[1] + a.tokens

        def ours(asked: list[engine.Request] = asked, rows: int = rows) -> None:
            turns = engine.serve(
                lm.target, lm.drafter, asked, verifier=verifier("match"), draft_len=0, rows=rows
            )
            assert sum(len(turn.finished()) for turn in turns) == rows

        for clock in (time.perf_counter, time.process_time):
            s = {
                k: statistics.median(v)
                for k, v in alternate({"hf": theirs, "ours": ours}, a.times, 1, clock).items()
            }
            rate = {k: rows * a.tokens / v for k, v in s.items()}
            print(
                f"{rows:4} rows, {clock.__name__:12}: transformers {rate['hf']:.1f} tok/s, ours {rate['ours']:.1f} tok/s, "
                f"ratio {rate['ours'] / rate['hf']:.2f}",
                flush=True,
            )


PROMPTS = (
    "Explain how rain forms, step by step.",
    "List five animals, and say why you like each.",
    "What is a good name for a small black cat, and why?",
    "Copy this twice: the quick brown fox jumps over the lazy dog, and the lazy dog sleeps on under the quick brown fox.",
)


def plug(a: argparse.Namespace) -> None:
    """Greedy tokens/s as ratios to an untouched model's own generate, prompts one by one and in one left-padded batch."""
    lm = specdiff.load(a.model, "none", dtype=a.dtype)
    net, pad = lm.target.model, lm.tokenizer.pad_token_id
    stock = (
        type(net).from_pretrained(specdiff.catalog.model_folder(a.model), dtype=net.dtype).eval()
    )
    net.generation_config.eos_token_id = stock.generation_config.eos_token_id = None
    asked = [lm.encode(p) for p in PROMPTS]
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "transformers": (stock, {}),
        "prompt lookup": (stock, {"prompt_lookup_num_tokens": 4}),
        "plain, our attention": (net, {}),
        "auto": (net, {"custom_generate": specdiff.custom_generate, "drafter": "auto"}),
        "ngram": (net, {"custom_generate": specdiff.custom_generate, "drafter": "ngram"}),
        "ngram, 4": (
            net,
            {"custom_generate": specdiff.custom_generate, "drafter": "ngram", "draft_len": 4},
        ),
    }
    for batches in ([[p] for p in asked], [asked]):
        told = {name: stats.Stats() for name in ways}

        def run(
            name: str, batches: list[list[list[int]]] = batches, told: dict[str, stats.Stats] = told
        ) -> None:
            model, options = ways[name]
            for batch in batches:
                width = max(map(len, batch))
                ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
                given = (
                    {**options, "stats": told[name]} if "custom_generate" in options else options
                )
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=a.tokens,
                    pad_token_id=pad,
                    **given,
                )
                assert out.shape[1] == width + a.tokens

        calls = {
            name: (lambda name=name: run(name))
            for name in ways
            if len(batches[0]) == 1 or name != "prompt lookup"
        }
        seconds = alternate(calls, a.times, 1)
        for name, taken in seconds.items():
            ratios = [s / t for s, t in zip(seconds["transformers"], taken, strict=True)]
            rate = len(asked) * a.tokens / statistics.median(taken)
            told_of = (
                f", tau {told[name].tau:.2f}, alpha {told[name].alpha:.2f}"
                if told[name].rounds
                else ""
            )
            print(
                f"batch {len(batches[0])}, {name:20}: {rate:6.1f} tok/s, ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f}){told_of}",
                flush=True,
            )


def reuse(a: argparse.Namespace) -> None:
    """The first piece, and all of a turn: the conversation read again, against a Conversation that reads what is new."""
    lm = specdiff.load(a.model, a.drafter, dtype=a.dtype)
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": a.tokens, "ignore_eos": True}
    words = "The river ran past the mill, the old bridge and the school, and nobody in the village knew where it went. "
    talk = specdiff.Conversation(lm, **asked)
    list(talk.say(words * (a.context // 24) + "Sum this up."))
    taken: dict[str, list[tuple[float, float]]] = {"read again": [], "reused": []}
    for _ in range(a.times):
        prompt = lm.render([*talk.messages, {"role": "user", "content": "And then?"}])
        for name, pieces in zip(
            taken, (lm.stream(prompt, **asked), talk.say("And then?")), strict=True
        ):
            begin = time.perf_counter()
            next(pieces)
            first = time.perf_counter() - begin
            list(pieces)
            taken[name].append((first, time.perf_counter() - begin))
    for i, what in enumerate(("first piece", f"{a.tokens} tokens")):
        fresh, held = ([t[i] for t in taken[name]] for name in taken)
        ratios = [f / h for f, h in zip(fresh, held, strict=True)]
        print(
            f"{len(prompt)} prompt tokens, {what}: {spread(fresh)} read again, {spread(held)} reused, {statistics.median(ratios):.2f}x"
        )


class Ledger:
    """One way of decoding over all prompts: Stats, the same up to the first repeated 8-gram, and seconds of every round."""

    def __init__(self) -> None:
        self.all, self.fresh, self.rounds = stats.Stats(), stats.Stats(), list[float]()

    def run(self, rounds: Iterable[Round]) -> None:
        tokens: list[int] = []
        for r in rounds:
            n, accepted, drafted = (
                int(r.emitted),
                int(r.verification.accepted),
                r.draft.tokens.shape[1],
            )
            self.rounds.append(sum(r.seconds.values()))
            self.all.add(drafted, accepted, n, r.seconds)
            tokens += r.verification.tokens[0, :n].tolist()
            grams = [tuple(tokens[k : k + 8]) for k in range(len(tokens) - 7)]
            if len(set(grams)) == len(grams):
                self.fresh.add(drafted, accepted, n, {})


def acceptance(a: argparse.Namespace) -> None:
    """tau, and the tau at which this drafter would break even: median seconds of its rounds over those of plain rounds."""
    lm = specdiff.load(a.model, a.drafter, dtype=a.dtype)
    for temperature in (0.0, 1.0):
        tallies = {name: Ledger() for name in ("plain", "token", "block", "match")}
        for i, prompt in enumerate(held_out(a.data, a.prompts)):
            params = SamplingParams(
                max_tokens=a.tokens, temperature=temperature, stop_token_ids=lm.end_ids
            )
            for name, tally in tallies.items():
                batch = Batch.of([prompt], [params], [i], slots=len(prompt) + a.tokens + 64)
                if name == "plain":
                    tally.run(decode.decode(lm.target, NoDrafter(), batch))
                else:
                    tally.run(
                        decode.decode(
                            lm.target,
                            lm.drafter,
                            batch,
                            verifier=verifier(name),
                            draft_len=a.draft_len,
                        )
                    )
        plain = tallies.pop("plain")
        for name, tally in tallies.items():
            even = statistics.median(tally.rounds) / statistics.median(plain.rounds)
            rate = tally.all.tokens / sum(tally.rounds) / (plain.all.tokens / sum(plain.rounds))
            row = {
                "temperature": temperature,
                "verifier": name,
                "draft_len": a.draft_len,
                "tokens": tally.all.tokens,
            }
            row |= {
                "tau": tally.all.tau,
                "tau_before_loop": tally.fresh.tau,
                "break_even_tau": even,
                "speed_vs_plain": rate,
            }
            row |= {"alpha": tally.all.alpha, "per_position": tally.all.per_position}
            print(json.dumps(row, default=float), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "what",
        choices=("forward", "linear", "host", "draft-cost", "data", "plug", "reuse", "acceptance"),
    )
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--drafter", default="sedd")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--draft-len", type=int, default=4)
    p.add_argument("--draft-vocab", type=int, default=8192)
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--times", type=int, default=9)
    p.add_argument("--tokens", type=int, default=96)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--rows", type=int, nargs="+", default=[16, 64], help="batch sizes (data)")
    p.add_argument("--data", help="corpus folder whose last rows are held out (acceptance)")
    a = p.parse_args()
    commands = {
        "forward": forward, "linear": few_rows, "host": host, "draft-cost": draft_cost, "data": data, "plug": plug,
        "reuse": reuse, "acceptance": acceptance,
    }  # fmt: skip
    commands[a.what](a)


if __name__ == "__main__":
    main()
