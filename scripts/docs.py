"""API reference from the docstrings: python scripts/docs.py FOLDER [ROOM ...]  (default: all)"""

import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pdoc

import specdiff

MODULES = {module.name for module in pkgutil.iter_modules(specdiff.__path__)}
ROOMS = sorted(MODULES - {"__main__", *specdiff.__all__})


def main(folder: Path, rooms: Iterable[str] = ()) -> None:
    # public names load lazily, and pdoc documents only loaded ones
    for name in specdiff.__all__:
        setattr(specdiff, name, getattr(specdiff, name))
    pdoc.render.configure(docformat="google", footer_text=f"specdiff {specdiff.__version__}")
    pdoc.pdoc("specdiff", *(f"specdiff.{room}" for room in rooms or ROOMS), output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"), sys.argv[2:])
