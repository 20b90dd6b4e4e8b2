"""Bad recipes are refused early, and the messages say what is wrong."""

from pathlib import Path

import pytest

from specdiff.errors import UsageError
from specdiff.training import recipe


def test_every_packaged_recipe_reads_back(tmp_path: Path) -> None:
    assert recipe.names() == [
        "autoregressive",
        "block",
        "sedd",
        "sedd-finetune",
        "sedd-pretrain",
        "target",
    ]
    for name in recipe.names():
        loaded = recipe.load(name)
        (tmp_path / "copy.yaml").write_text(recipe.as_yaml(loaded))
        assert recipe.load(str(tmp_path / "copy.yaml")) == loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["learning_rate=1"], r"unknown key 'learning_rate'; known are kind, init"),
        (["steps=0"], r"steps = 0: .*greater than or equal to 1"),
        (["steps=many"], r"steps = 'many'"),
        (["objective=magic"], r"objective = 'magic': .*score_entropy"),
        (["divergence=magic"], r"divergence 'magic' is unknown; known are forward"),
        (["weights=magic"], r"weights 'magic' is unknown; known are d_pace"),
        (["objective=score_entropy"], r"need attention: bidirectional"),
        (["time_conditioning=true"], r"time_conditioning: false"),
        (["process=uniform"], r"process: absorb"),
        (["attention=bidirectional", "process=uniform"], r"no MASK"),
        (["attention=bidirectional", "objective=score_entropy"], r"draft_vocab: null"),
        (["kind=target"], r"objective: denoise"),
        (
            ["kind=autoregressive", "objective=score_entropy", "draft_vocab=null"],
            r"diffusion network",
        ),
        (["draft_lens=[]"], r"draft_lens"),
        (["draft_lens=[0]"], r"draft_lens.0 = 0"),
        (["seed=8388608"], r"seed = 8388608: .*less than 8388608"),
        (["seed=-1"], r"seed = -1: .*greater than or equal to 0"),
        (["steps"], r"key=value, not 'steps'"),
        (["steps=[1"], r"not valid YAML"),
    ],
)
def test_bad_changes(changes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe.load("sedd", changes)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no recipe 'magic'; known are autoregressive, block, sedd"
    ):
        recipe.load("magic")
    for text, message in (
        ("- a\n", "key: value lines"),
        ("a: [", "not valid YAML"),
        ("kind: sedd\nsize: 3\n", "unknown key 'size'"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            recipe.load(str(tmp_path / "r.yaml"))
