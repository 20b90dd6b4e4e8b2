"""User code: classes and functions named as `module:name` or `./file.py:name`."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdiff.drafters.base import Drafter
from specdiff.errors import DrafterError, SpecdiffError, UnknownNameError, UsageError


def attribute(head: str, name: str) -> Any:
    """The attribute `name` of a module, or of a `file.py`; either is imported, so its code runs.

    Raises UnknownNameError, or DrafterError if the code fails.
    """
    module = _import_file(Path(head)) if head.endswith(".py") else _import_module(head)
    value = getattr(module, name, None)
    if value is None:
        raise UnknownNameError(f"{head} defines no {name!r}")
    return value


def _import_file(path: Path) -> Any:
    file = path.expanduser()
    if not file.is_file():
        raise UnknownNameError(f"no drafter file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(f"specdiff_drafter_{path.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise DrafterError(
            f"the drafter file {path} raised {type(error).__name__} while being imported: {error}"
        ) from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnknownNameError(
            f"no module {error.name!r} (from the drafter {name}:...); is it installed, "
            "or did you mean a ./file.py?"
        ) from error
    except Exception as error:
        raise DrafterError(
            f"the module {name} raised {type(error).__name__} while being imported: {error}"
        ) from error


def built(build: Any, options: Mapping[str, Any], name: str) -> Drafter[Any]:
    """The drafter that `build(**options)` makes. `name` is what error messages call it.

    Raises UsageError for options it does not take, DrafterError for whatever else it raises.
    """
    try:
        drafter: Drafter[Any] = build(**options)
    except SpecdiffError:
        raise
    except TypeError as error:
        if options and "argument" in str(error):
            raise UsageError(
                f"drafter {name} does not take these options ({error}): "
                f"{json.dumps(dict(options), default=str)}"
            ) from error
        raise DrafterError(f"drafter {name} raised TypeError while being built: {error}") from error
    except Exception as error:
        raise DrafterError(
            f"drafter {name} raised {type(error).__name__} while being built: {error}"
        ) from error
    return drafter
