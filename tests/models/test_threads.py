"""Many threads on one target: every text is as alone, and no stream leaves anything in place."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import SUPPORTED, VOCAB, model
from transformers import PreTrainedModel

import specdiff
import tiny
from specdiff import decode
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.nn.small_lm import SmallLM
from specdiff.targets.causal import CausalTarget, attached
from specdiff.types import Draft

THREADS, CALLS, NEW = 8, 10, 10
FAMILIES = ("Llama, SmolLM2", "GPT-Neo", "Gemma 3")


@pytest.fixture(params=FAMILIES)
def net(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model(next(f for f in SUPPORTED if f.name == request.param))


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads change places after every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(call: Callable[[int], Any]) -> list[Any]:
    """call(i) for every i, in threads that start at once."""
    barrier = threading.Barrier(THREADS)

    def several(thread: int) -> list[Any]:
        barrier.wait()
        return [call(i) for i in range(thread, THREADS * CALLS, THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(several, range(THREADS)))
    return [answers[i % THREADS][i // THREADS] for i in range(THREADS * CALLS)]


def prompt(i: int) -> list[int]:
    """Prompts of one to 17 tokens."""
    return torch.randint(
        VOCAB, (1 + 5 * i % 17,), generator=torch.Generator().manual_seed(i)
    ).tolist()


def drafters(target: CausalTarget, net: PreTrainedModel) -> list[Drafter[Any]]:
    """From the text, and by a network that is shared as the target is."""
    return [
        NGramDrafter(target.info),
        AutoregressiveDrafter(SmallLM(net.config, tiny.copy_of(net)).eval(), target.info),
    ]


def test_decode(net: PreTrainedModel) -> None:
    target = CausalTarget(tiny.copy_of(net))
    shared = drafters(target, net)
    texts = [tiny.plain(net, prompt(i), NEW) for i in range(THREADS * CALLS)]

    def call(i: int) -> list[int]:
        return tiny.decoded(
            target,
            shared[i // THREADS % 2],
            tiny.batch_of([prompt(i)], NEW, temperature=0.0),
            draft_len=3,
        )[0]

    assert together(call) == texts


def test_generate_of_one_lm(net: PreTrainedModel) -> None:
    lm = specdiff.SpeculativeLM(CausalTarget(tiny.copy_of(net)), "ngram", None, 64)
    texts = [tiny.plain(net, prompt(i), NEW)[len(prompt(i)) :] for i in range(THREADS * CALLS)]
    options: dict[str, Any] = {"max_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
    assert together(lambda i: list(lm.generate(prompt(i), **options).token_ids)) == texts


def test_custom_generate(net: PreTrainedModel) -> None:
    """The first calls test and attach the model, all at once."""
    texts = [tiny.plain(net, prompt(i), NEW) for i in range(THREADS * CALLS)]
    options: dict[str, Any] = {
        "custom_generate": specdiff.custom_generate,
        "drafter": "ngram",
        "trust_remote_code": True,
    }
    assert together(lambda i: tiny.plain(net, prompt(i), NEW, **options)) == texts


def test_two_targets_of_one_model() -> None:
    net = model(next(f for f in SUPPORTED if f.name == "GPT-Neo"))
    texts = [tiny.plain(net, prompt(i), NEW) for i in range(THREADS * CALLS)]
    targets = [CausalTarget(net), CausalTarget(net)]

    def call(i: int) -> list[int]:
        return tiny.decoded(
            targets[i % 2],
            NGramDrafter(targets[i % 2].info),
            tiny.batch_of([prompt(i)], NEW, temperature=0.0),
        )[0]

    assert together(call) == texts


@pytest.mark.parametrize("attach", [CausalTarget, attached])
def test_the_last_streams_cache_is_given_up(
    net: PreTrainedModel, attach: Callable[[PreTrainedModel], CausalTarget]
) -> None:
    """At once, without the garbage collector."""
    target = attach(net)
    batch = tiny.batch_of([prompt(3), prompt(5)])
    cache = target.open(2, 40)
    target.admit(
        cache,
        torch.arange(2),
        [torch.tensor(prompt(3)), torch.tensor(prompt(5))],
        torch.zeros(2, dtype=torch.long),
    )
    target.score(cache, batch, Draft(torch.zeros(2, 3, dtype=torch.long)))
    stores = [
        weakref.ref(store) for store in (*cache.store.keys.values(), *cache.store.values.values())
    ]
    assert stores
    assert all(store() is not None for store in stores)
    del cache
    assert [store() for store in stores] == [None] * len(stores)


def test_streams_that_take_turns_in_one_thread(net: PreTrainedModel) -> None:
    """A round of one, a round of the other, each in a cache of its own size."""
    target = CausalTarget(tiny.copy_of(net))
    prompts = [prompt(i) for i in range(6)]
    streams = [
        decode.decode(
            target,
            NGramDrafter(target.info),
            tiny.batch_of([p], NEW + 7 * i, temperature=0.0),
            draft_len=3,
        )
        for i, p in enumerate(prompts)
    ]
    texts: dict[int, list[int]] = {}
    running = dict(enumerate(streams))
    while running:
        for i, stream in list(running.items()):
            last = next(stream, None)
            if last is None:
                del running[i]
            else:
                texts[i] = tiny.rows_of(last.batch)[0]
    assert texts == {i: tiny.plain(net, p, NEW + 7 * i) for i, p in enumerate(prompts)}
