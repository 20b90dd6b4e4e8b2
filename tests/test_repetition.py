"""Where texts begin to repeat themselves."""

import torch

from specdiff.repetition import fresh, repeated


def test_repeated_8_grams() -> None:
    line = torch.arange(10)
    assert repeated(torch.arange(30)) == repeated(torch.zeros(8)) == repeated(torch.zeros(0)) == 0
    assert repeated(torch.zeros(12)) == 12
    assert repeated(torch.cat([line, line])) == 20
    assert repeated(torch.cat([line, torch.tensor([50, 51]), line[:8]])) == 16
    assert repeated(torch.cat([line[:7], torch.tensor([50]), line[:7]])) == 0


def test_what_comes_before_the_first_repeated_8_gram() -> None:
    line = list(range(10))
    assert fresh([]) == 0 and fresh(line) == 10
    assert fresh(line + line) == 17  # the eighth token of the second line completes it
    assert fresh([0] * 20) == 8
    assert fresh([*line[:7], 50, *line[:7]]) == 15
