"""Options of the command line: --help, environment variables and --config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_cli import here  # noqa: F401

Here = Callable[..., tuple[int, str, str]]


class Odd(Exception):  # noqa: N818
    pass


# --help


@pytest.mark.parametrize(
    "verb",
    ["generate", "chat", "sample", "check", "data", "train", "convert", "bench", "env", "serve"],
)
def test_every_option_is_one_line_of_help(
    here: Here, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    rows = [row for row in here(verb, "--help")[1].splitlines() if row.startswith("│")]
    assert rows and all(len(row) == 100 for row in rows)
    first = ("-", "PROMPT", "DRAFTER", "OUT", "report ", "compare ")
    assert [row for row in rows if not row.strip("│* ").startswith(first)] == []


def test_help_groups_options_and_names_the_variables_once(here: Here) -> None:
    text = here("generate", "--help")[1]
    for panel in ("Model", "Drafting", "Sampling", "Output"):
        assert f"─ {panel} ─" in text
    assert text.count("SPECDIFF_") == 1 and "MAX_TOKENS" in text


# environment variables and --config


def unknown_model(err: str) -> str:
    return err.split("no model folder '")[1].split("'")[0]


@pytest.mark.parametrize("verb", ["generate hi", "chat", "sample", "bench", "data --out x"])
def test_one_variable_names_the_model_of_every_verb(
    here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDIFF_MODEL", "./variable")
    monkeypatch.setenv("SPECDIFF_GENERATE_MODEL", "./other")
    extra = ["--tokens", "9"] if verb.startswith("data") else []
    assert unknown_model(here(*verb.split(), *extra)[2]) == "./variable"


def test_a_flag_precedes_the_environment_and_it_the_file(
    here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("model: ./file\nmax-tokens: 4\nchat: {model: ./section}\nsample:\n")
    file = ("--config", str(path))
    assert unknown_model(here("hi", *file)[2]) == "./file"
    path.write_text("model: ./file\nchat: {model: ./section}\n")
    assert unknown_model(here("chat", *file)[2]) == "./section"
    assert unknown_model(here("sample", *file)[2]) == "./file"
    monkeypatch.setenv("SPECDIFF_MODEL", "./variable")
    assert unknown_model(here("hi", *file)[2]) == "./variable"
    assert unknown_model(here("hi", *file, "--model", "./flag")[2]) == "./flag"


def test_values_of_a_config_file(here: Here, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    path = tmp_path / "options.yaml"
    path.write_text(
        "max_tokens: 4\ndraft-len: 3\ntemperature: 0\ntop_p: 0.5\njson: true\nraw: true\n"
        "stop: [one, two words]\nallowed_token_ids: [3, 4]\nmodel_options: {device_map: auto}\n"
        "system: null\n"
    )

    def load(*arguments: Any, **keywords: Any) -> Any:
        options.update(keywords)
        return Recorder()

    class Recorder:
        def stream(self, *arguments: Any, **keywords: Any) -> None:
            options.update(keywords)
            raise Odd("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdiff.load", load)
        assert "enough" in here("hi", "--config", str(path))[2]
    assert options["max_tokens"] == 4 and options["draft_len"] == 3
    assert options["temperature"] == 0 and options["top_p"] == 0.5 and options["raw"] is True
    assert tuple(options["stop"]) == ("one", "two words")
    assert options["allowed_token_ids"] == (3, 4)
    assert options["model_options"] == {"device_map": "auto"} and "system" not in options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hope: 1", "unknown option 'hope' of generate; known are model, device, dtype,"),
        ("prompt: hi", "unknown option 'prompt' of generate"),
        ("config: a.yaml", "unknown option 'config' of generate"),
        ("generate: {hope: 1}", "unknown option 'hope' of generate"),
        ("- model", "must map names of options to values, not hold ['model']"),
        ("a: [", "is not valid YAML: "),
        ("a: \udcff", "is not valid YAML: "),
        ("max_tokens: many", "Invalid value for '--max-tokens'"),
    ],
)
def test_a_bad_config_file(here: Here, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    code, out, err = here("hi", "--config", str(path))
    assert code == 2 and out == "" and message in err
    assert str(path) in err or message.startswith("Invalid")
    assert "cannot read" in here("hi", "--config", str(tmp_path))[2]
    assert "No such file" in here("hi", "--config", str(tmp_path / "none.yaml"))[2]
