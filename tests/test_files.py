"""Files appear whole or not at all, and say why they cannot be written."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdiff import files
from specdiff.errors import StorageError
from specdiff.unicode import valid


def test_a_write_beyond_the_limit_keeps_the_old_content(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "a.txt", "old\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from specdiff import files, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for write in files.write_text, files.append_line:\n"
        "    try: write(Path(sys.argv[1]), 'x' * 1000)\n"
        "    except errors.StorageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("ulimit -f") == 2
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_tied_tensors_are_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    x = torch.arange(3.0)
    files.write_tensors(tmp_path / "t.safetensors", {"a": x, "b": x})
    assert {name: t.tolist() for name, t in load_file(tmp_path / "t.safetensors").items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2],
    }


def test_a_staged_folder_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    with files.staged_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(ValueError, match="stop"), files.staged_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("2")
        raise ValueError("stop")
    assert (tmp_path / "f" / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_is_locked_for_one_process(tmp_path: Path) -> None:
    held = files.lock(tmp_path)
    with pytest.raises(StorageError, match="another process"):
        files.lock(tmp_path)
    held.release()
    files.lock(tmp_path).release()


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(StorageError, match="a/b"):
        files.write_text(tmp_path / "a" / "b", "x")


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert valid("a\udcffb") == "a\ufffdb"
    assert valid("\ud83d\ude00") == "\U0001f600"
    text = "déjà \U0001f600"
    assert valid(text) is text
