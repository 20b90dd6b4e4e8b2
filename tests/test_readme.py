"""What the README shows runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from specdiff import decode
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, SamplingParams
from specdiff.verify import VERIFIERS

BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parent.parent / "README.md").read_text(),
    flags=re.DOTALL,
)


@pytest.mark.real
def test_the_python_session_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    assert "tau" not in capsys.readouterr().err


@pytest.mark.real
def test_the_session_inside_transformers_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(BLOCKS[1], scope)
    assert (
        scope["out"].shape == (2, scope["inputs"]["input_ids"].shape[1] + 16)
        or (scope["out"] == scope["tokenizer"].eos_token_id).any()
    )
    assert "The sky is" in capsys.readouterr().out


@pytest.mark.parametrize("name", VERIFIERS)
def test_the_example_drafter_is_lossless(name: str) -> None:
    scope: dict[str, type] = {}
    exec(BLOCKS[2], scope)
    target, rows, length = TableTarget.random(3, seed=1), 20_000, 3
    batch = Batch.of([[0, 1]] * rows, [SamplingParams(max_tokens=length)] * rows, range(rows))
    rounds = list(
        decode.decode(
            target, scope["Mine"](target.info), batch, verifier=VERIFIERS[name], draft_len=2
        )
    )
    tails = rounds[-1].batch.ids[:, 2:]
    code = (tails * torch.tensor([9, 3, 1])).sum(1)
    expected = torch.tensor(list(target.law([0, 1], length).values()), dtype=torch.float64) * rows
    chi2 = ((torch.bincount(code, minlength=27) - expected) ** 2 / expected).sum().item()
    assert chi2 < 65  # chi-square with 26 degrees of freedom, p = 3e-5
    assert sum(int(r.verification.accepted.sum()) for r in rounds) > 0
