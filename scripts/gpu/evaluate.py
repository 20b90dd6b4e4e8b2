"""Acceptance and speed of drafters on held-out prompts of a corpus, at temperature 0 and 1, into one JSON file.

    python scripts/gpu/evaluate.py --model smollm2-135m --data CORPUS --out results.json FOLDER ...

tau, alpha and the acceptance of each position are over all prompts at once; tokens a second at batch 1, plain and drafted decoding
alternating prompt by prompt in one process. What the file already holds for the same weights and settings is not measured again.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specdiff import catalog, engine
from specdiff.data.corpus import Corpus
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import TargetError, UnknownNameError
from specdiff.targets.causal import CausalTarget
from specdiff.text.lm import SpeculativeLM
from specdiff.text.load import tokenizer_of
from specdiff.training import evaluation
from specdiff.types import SamplingParams
from specdiff.verify import verifier


def speed(
    target: CausalTarget,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> dict[str, float]:
    """Tokens a second, the first prompt decoded once more, untimed, to warm up."""
    seconds, tokens = (
        dict.fromkeys(("plain", "drafted"), 0.0),
        dict.fromkeys(("plain", "drafted"), 0),
    )
    ways: dict[str, Drafter[Any]] = {"plain": NoDrafter(), "drafted": drafter}
    for i, prompt in enumerate([prompts[0], *prompts]):
        for name, way in ways.items():
            request = engine.Request(prompt, params, i)
            begin = time.perf_counter()
            made = 0
            for p in engine.run(
                target, way, [request], verifier=verifier("token"), draft_len=way.draft_len, rows=1
            ):
                if p.error is not None:
                    raise TargetError(p.error)
                made += len(p.tokens)
            if i:
                seconds[name] += time.perf_counter() - begin
                tokens[name] += made
    plain, drafted = (tokens[name] / seconds[name] for name in ("plain", "drafted"))
    return {
        "plain_tokens_per_second": plain,
        "tokens_per_second": drafted,
        "ratio": drafted / plain,
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", nargs="*", type=Path)
    p.add_argument("--model", required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--held-out", type=float, default=0.01)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument(
        "--timed", type=int, default=8, help="of these, decoded one by one for the speed"
    )
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--minutes", type=float, default=7)
    a = p.parse_args()
    end = time.monotonic() + 60 * a.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, folder = catalog.target(
        a.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device
    )
    assert isinstance(target, CausalTarget)
    corpus = Corpus(a.data)
    prompts = evaluation.held_out_prompts(corpus, corpus.split(a.held_out)[1], a.prompts)
    ends = SpeculativeLM(target, "none", tokenizer_of(folder), 2).end_ids
    about = {
        "target": a.model, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "dtype": str(target.info.dtype),
        "torch": torch.__version__, "prompts": len(prompts), "timed": a.timed, "tokens": a.tokens,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }  # fmt: skip
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    if results.get("about") != about:
        results = {"about": about, "drafters": {}}
    specs = {f"bundled {kind}": kind for kind in catalog.TRAINED} | {
        f.name: str(f.resolve()) for f in a.folders
    }
    for name, spec in specs.items():
        try:
            drafter = catalog.drafter(spec, target.info)
        except UnknownNameError:
            continue  # none is bundled for this target
        weights = (
            hashlib.sha256((Path(spec) / "model.safetensors").read_bytes()).hexdigest()
            if Path(spec).is_dir()
            else spec
        )
        if results["drafters"].get(name, {}).get("weights") != weights:
            results["drafters"][name] = {"weights": weights, "draft_len": drafter.draft_len}
        found = results["drafters"][name]
        for temperature in (0.0, 1.0):
            if f"{temperature:g}" in found:
                continue
            if time.monotonic() > end:
                return print("time is up; the same call again goes on")
            params = SamplingParams(a.tokens, temperature, stop_token_ids=ends)
            measured = evaluation.acceptance(
                target,
                drafter,
                prompts,
                temperature=temperature,
                max_tokens=a.tokens,
                stop_ids=ends,
            )
            measured |= {
                k: round(v, 3)
                for k, v in speed(target, drafter, prompts[: a.timed], params).items()
            }
            found[f"{temperature:g}"] = measured
            partial = a.out.with_name(f".{a.out.name}.partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(a.out)
            print(f"{name}, temperature {temperature:g}: {json.dumps(measured)}", flush=True)


if __name__ == "__main__":
    main()
