"""Missing packages of this machine, and where to put them. Exit code 1 if there are any."""

import importlib
import os
import sys

MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "typer": "typer",
    "rich": "rich",
    "jaxtyping": "jaxtyping",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "yaml": "PyYAML",
    "pydantic": "pydantic",
    "specdiff.training.prepare": "specdiff (src/ of this repository)",
}

missing = []
for module, package in MODULES.items():
    try:
        importlib.import_module(module)
    except Exception as error:  # a package of the wrong build raises anything
        missing.append(f"{package} ({type(error).__name__}: {error})")
if missing:
    print("missing here:", *missing, sep="\n  ")
    sys.exit(
        "put the wheels (with their dependencies) into runs/gpu/wheels, "
        "carry that folder, and repeat scripts/gpu/0-unpack.sh"
    )

import torch  # noqa: E402

device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"all packages are here; torch {torch.__version__}, {device}")
if not torch.cuda.is_available() and not os.environ.get("SPECDIFF_GPU_TINY"):
    sys.exit("there is no GPU; set SPECDIFF_GPU_TINY=1 to try the scripts without one")
