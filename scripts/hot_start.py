"""Hot starts against cold ones: python scripts/hot_start.py --out results.jsonl sedd FOLDER ...

Every setting decodes every prompt at batch 1, in turns, and is compared with the cold start of the
same drafter and number of passes: tau and tokens per second as ratios, per task and over all tasks,
with bootstrap intervals over the prompts (95 %). Runs that the file already holds are not repeated:
take another file for other tokens, draft lengths or verifiers.

sedd, or a folder of its kind: each weight, and the canvas, at each number of passes
a block drafter's folder: each weight
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

import specdiff
from specdiff import SpeculativeLM, catalog, decode
from specdiff.bench import suites
from specdiff.bench.suites import EncodedPrompt
from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.noise import row_seed
from specdiff.types import Batch, SamplingParams
from specdiff.verify import verifier

Key = tuple[str, int, str, float]  # drafter, passes, hot start, temperature
Run = dict[str, Any]
RESAMPLES = 2000


def settings(lm: SpeculativeLM, spec: str, a: argparse.Namespace) -> Iterator[tuple[int, Any]]:
    """Passes and hot start of every setting; each number of passes begins with the cold start."""
    drafter = catalog.drafter(spec, lm.target.info)
    weights = [0.0, *(weight for weight in a.weights if weight)]
    if isinstance(drafter, DenoisingDrafter):
        yield from product(a.steps, [*weights, "canvas"])
    else:
        yield from ((1, weight) for weight in weights)


def built(lm: SpeculativeLM, spec: str, passes: int, hot: float | str) -> Drafter[Any]:
    options: dict[str, Any] = {"hot_start": hot}
    if passes > 1:
        options["steps"] = passes
    return catalog.drafter(spec, lm.target.info, options)


def measured(
    lm: SpeculativeLM,
    drafter: Drafter[Any],
    prompt: EncodedPrompt,
    temperature: float,
    a: argparse.Namespace,
    repeat: int = 0,
) -> Run:
    params = SamplingParams(max_tokens=a.tokens, temperature=temperature, stop_token_ids=lm.end_ids)
    batch = Batch.of([prompt.ids], [params], [row_seed(a.seed + repeat, hash_of(prompt.id))])
    length = a.draft_len or drafter.draft_len
    tokens = rounds = 0
    begin = time.perf_counter()
    for last in decode.decode(
        lm.target, drafter, batch, verifier=verifier(a.verifier), draft_len=length
    ):
        tokens += int(last.emitted[0])
        rounds += 1
    return {"tokens": tokens, "rounds": rounds, "seconds": time.perf_counter() - begin}


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % (1 << 32)


def run(lm: SpeculativeLM, a: argparse.Namespace) -> None:
    """Append to the file a line for each run that it lacks."""
    prompts, _ = suites.encode(suites.read(a.suite, a.prompts), lm, 128)
    names = {(*key_of(line), line["prompt"], line["repeat"]) for line in lines(a.out)}
    for spec in a.drafters:
        drafters = {s: built(lm, spec, *s) for s in settings(lm, spec, a)}
        warm = argparse.Namespace(**{**vars(a), "tokens": 8})
        for drafter in drafters.values():
            measured(lm, drafter, prompts[0], 1.0, warm)
        everything = product(range(a.times), enumerate(prompts), a.temperatures)
        for repeat, (i, prompt), temperature in everything:
            order = list(drafters)
            for passes, hot in order[i % len(order) :] + order[: i % len(order)]:
                key = (spec, passes, str(hot), temperature)
                if (*key, prompt.id, repeat) in names:
                    continue
                line = {"drafter": spec, "passes": passes, "hot_start": str(hot)}
                line |= {"temperature": temperature, "prompt": prompt.id, "task": prompt.task}
                line |= {"repeat": repeat}
                line |= measured(lm, drafters[passes, hot], prompt, temperature, a, repeat)
                with a.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def lines(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(line: Run) -> Key:
    return line["drafter"], line["passes"], line["hot_start"], line["temperature"]


def parts(runs: list[Run]) -> set[tuple[str, int]]:
    return {(line["prompt"], line["repeat"]) for line in runs}


def totals(runs: list[Run]) -> torch.Tensor:
    """Tokens, rounds and seconds of each prompt [P, 3], by name."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for line in runs:
        values = (line["tokens"], line["rounds"], line["seconds"])
        sums[line["prompt"]] = [s + v for s, v in zip(sums[line["prompt"]], values, strict=True)]
    return torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)


def interval(hot: torch.Tensor, cold: torch.Tensor, by: int) -> str:
    """The ratio of tokens per round (by 1) or second (by 2), hot to cold, with its interval."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(hot), (RESAMPLES, len(hot)), generator=generator)
    ratios = []
    for picked in (torch.arange(len(hot))[None], drawn):
        one, other = (part[picked].sum(1) for part in (hot, cold))
        ratios.append(one[:, 0] / one[:, by] / (other[:, 0] / other[:, by]))
    low, high = ratios[1].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{float(ratios[0]):.3f} [{low:.3f}, {high:.3f}]"


def report(path: Path) -> None:
    """A Markdown table of all complete settings in the file."""
    groups: dict[tuple[Key, str], list[Run]] = defaultdict(list)
    for line in lines(path):
        for task in (line["task"], "all"):
            groups[key_of(line), task].append(line)
    print(
        "| drafter | passes | T | hot start | task | prompts | tau cold | tau | tau ratio | speed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (key, task), runs in groups.items():
        spec, passes, hot, temperature = key
        cold = groups.get(((spec, passes, "0.0", temperature), task), [])
        if hot == "0.0" or parts(cold) != parts(runs):
            continue
        one = totals(runs)
        other = totals(cold)
        taus = [float(part[:, 0].sum() / part[:, 1].sum()) for part in (other, one)]
        figures = f"{taus[0]:.3f} | {taus[1]:.3f} | {interval(one, other, 1)}"
        place = f"{Path(spec).name} | {passes} | {temperature:g} | {hot} | {task} | {len(one)}"
        print(f"| {place} | {figures} | {interval(one, other, 2)} |")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("drafters", nargs="*", default=["sedd"])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--suite", default="embedded")
    p.add_argument("--prompts", type=int, help="of the suite, spread over its tasks (all)")
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--times", type=int, default=1)
    p.add_argument("--draft-len", type=int, help="the drafter's own")
    p.add_argument("--verifier", default="token")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--threads", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    p.add_argument("--weights", type=float, nargs="*", default=[0.1, 0.3, 0.5, 0.8])
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    return p.parse_args()


if __name__ == "__main__":
    a = arguments()
    run(specdiff.load(a.model, "none", dtype=a.dtype, threads=a.threads), a)
    report(a.out)
