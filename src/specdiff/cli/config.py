"""`--config FILE.yaml`: values of options; flags and environment variables take precedence.

The file maps names of options (draft_len or draft-len) to values. A mapping under a verb's name
applies to that verb alone, and takes precedence over the rest of the file.
"""

import json
from pathlib import Path
from typing import Any

import typer

from specdiff.errors import UsageError


def read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the values of the file become the verb's defaults."""
    if path is None:
        return None
    options = _options(ctx)
    values = _section(_mapping(path), str(ctx.info_name), _verbs(ctx))
    defaults = {}
    for key, value in values.items():
        option = options.get(_name(key))
        if option is None:
            names = ", ".join(options)
            raise UsageError(
                f"{path}: unknown option {key!r} of {ctx.info_name}; known are {names}"
            )
        if value is not None:
            defaults[str(option.name)] = _value(value, multiple=getattr(option, "multiple", False))
    ctx.default_map = defaults
    return path


def _options(ctx: typer.Context) -> dict[str, Any]:
    """The verb's options by name, without --config."""
    options = {}
    for option in ctx.command.params:
        if option.param_type_name == "option" and option.name != "config":
            flags = [flag for flag in option.opts if flag.startswith("--")]
            options.update({_name(flag.removeprefix("--")): option for flag in flags})
    return options


def _mapping(path: Path) -> dict[str, Any]:
    """The file's mapping. Raises UsageError."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path} must map names of options to values, not hold {values!r:.80}")
    return {str(key): value for key, value in values.items()}


def _section(values: dict[str, Any], verb: str, verbs: set[str]) -> dict[str, Any]:
    """The values for one verb, without the sections of others."""
    mappings = {key for key, value in values.items() if isinstance(value, dict | None)}
    sections = mappings & verbs
    common = {_name(key): value for key, value in values.items() if key not in sections}
    section = (values[verb] or {}) if verb in sections else {}
    return common | {_name(str(key)): value for key, value in section.items()}


def _verbs(ctx: typer.Context) -> set[str]:
    return set(getattr(ctx.find_root().command, "commands", ()))


def _name(key: str) -> str:
    return key.replace("-", "_")


def _value(value: Any, *, multiple: bool) -> Any:
    """A value as the command line has it: a list joined by commas, a mapping as JSON."""
    if multiple:
        return [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list):
        return ",".join(str(part) for part in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return value if isinstance(value, bool) else str(value)
