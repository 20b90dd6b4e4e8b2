"""Acceptance and speed of drafters on held-out prompts of a corpus, at temperature 0 and 1.

    python scripts/gpu/evaluate.py --model smollm2-135m --data CORPUS --out results.json FOLDER ...

tau, alpha and the acceptance per position are over all prompts at once. Tokens per second are at
batch 1, with plain and drafted decoding alternating prompt by prompt in one process. Results that
the file already holds for the same weights and settings are not measured again.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specdiff import catalog, engine, files
from specdiff.data.corpus import Corpus
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import TargetError, UnknownNameError
from specdiff.targets.causal import CausalTarget
from specdiff.text.lm import SpeculativeLM
from specdiff.text.load import tokenizer_of
from specdiff.training import evaluation
from specdiff.types import SamplingParams
from specdiff.verify import verifier


def decode(target: CausalTarget, drafter: Drafter[Any], request: engine.Request) -> int:
    """Decode one request; returns the number of its tokens."""
    options = {"verifier": verifier("token"), "draft_len": drafter.draft_len, "rows": 1}
    tokens = 0
    for output in engine.run(target, drafter, [request], **options):
        if output.error is not None:
            raise TargetError(output.error)
        tokens += len(output.tokens)
    return tokens


def speed(
    target: CausalTarget,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> dict[str, float]:
    """Tokens per second; the first prompt is decoded once more at first, as warm-up."""
    drafters: dict[str, Drafter[Any]] = {"plain": NoDrafter(), "drafted": drafter}
    seconds = dict.fromkeys(drafters, 0.0)
    tokens = dict.fromkeys(drafters, 0)
    for i, prompt in enumerate([prompts[0], *prompts]):
        for name, each in drafters.items():
            begin = time.perf_counter()
            count = decode(target, each, engine.Request(prompt, params, i))
            if i:
                seconds[name] += time.perf_counter() - begin
                tokens[name] += count
    plain, drafted = (tokens[name] / seconds[name] for name in drafters)
    return {
        "plain_tokens_per_second": round(plain, 3),
        "tokens_per_second": round(drafted, 3),
        "ratio": round(drafted / plain, 3),
    }


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", nargs="*", type=Path)
    p.add_argument("--model", required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--held-out", type=float, default=0.01)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--timed", type=int, default=8, help="prompts decoded one by one for the speed")
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--minutes", type=float, default=7)
    return p.parse_args()


def weights_of(spec: str) -> str:
    """What identifies a drafter's weights: their digest, or the name of a bundled drafter."""
    return files.digest(Path(spec) / "model.safetensors") if Path(spec).is_dir() else spec


def main() -> None:
    a = arguments()
    end = time.monotonic() + 60 * a.minutes
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    target, folder = catalog.target(a.model, torch.bfloat16 if cuda else torch.float32, device)
    assert isinstance(target, CausalTarget)
    corpus = Corpus(a.data)
    prompts = evaluation.held_out_prompts(corpus, corpus.split(a.held_out)[1], a.prompts)
    ends = SpeculativeLM(target, "none", tokenizer_of(folder), 2).end_ids
    about = {
        "target": a.model,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(target.info.dtype),
        "torch": torch.__version__,
        "prompts": len(prompts),
        "timed": a.timed,
        "tokens": a.tokens,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    if results.get("about") != about:
        results = {"about": about, "drafters": {}}
    specs = {f"bundled {kind}": kind for kind in catalog.TRAINED}
    specs |= {path.name: str(path.resolve()) for path in a.folders}
    for name, spec in specs.items():
        try:
            drafter = catalog.drafter(spec, target.info)
        except UnknownNameError:
            continue  # none is bundled for this target
        weights = weights_of(spec)
        if results["drafters"].get(name, {}).get("weights") != weights:
            results["drafters"][name] = {"weights": weights, "draft_len": drafter.draft_len}
        record = results["drafters"][name]
        for temperature in (0.0, 1.0):
            if f"{temperature:g}" in record:
                continue
            if time.monotonic() > end:
                return print("time is up; repeat the command to resume")
            params = SamplingParams(a.tokens, temperature, stop_token_ids=ends)
            values = evaluation.acceptance(
                target,
                drafter,
                prompts,
                temperature=temperature,
                max_tokens=a.tokens,
                stop_ids=ends,
            )
            values |= speed(target, drafter, prompts[: a.timed], params)
            record[f"{temperature:g}"] = values
            files.write_json(a.out, results)
            print(f"{name}, temperature {temperature:g}: {json.dumps(values)}", flush=True)


if __name__ == "__main__":
    main()
