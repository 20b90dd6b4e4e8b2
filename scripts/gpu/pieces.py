"""Folders as small compressed files, for transfers with a size limit. Needs only Python.

    python pieces.py split FOLDER PIECES --bytes 15MiB --without checkpoints
    python pieces.py join PIECES FOLDER

`--bytes` counts before compression: a piece is about 0.5 of it for token shards, 0.8 for weights.
Either command can be repeated: intact pieces stay, damaged or outdated ones are written again.
Pieces may lie in sub-folders of PIECES, in the groups in which they were transferred.
"""

import argparse
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

MANIFEST = "manifest.json"
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def split(folder: Path, pieces: Path, size: int, without: Sequence[str] = ()) -> None:
    """Write the files of `folder`, without hidden ones and paths that contain a name in `without`.

    The manifest is written last.
    """
    files = [path for path in sorted(folder.rglob("*")) if _included(path, folder, without)]
    if not files:
        sys.exit(f"pieces: {folder} holds no files")
    pieces.mkdir(parents=True, exist_ok=True)
    for outdated in pieces.rglob(MANIFEST):
        outdated.unlink()
    manifest: dict[str, list[dict[str, object]]] = {"files": [], "pieces": []}
    for file in files:
        stat = file.stat()
        path = file.relative_to(folder).as_posix()
        entry = {"path": path, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        manifest["files"].append(entry)
    old = _index(pieces)
    for number, content in enumerate(_chunks(files, size)):
        name = f"{number:05d}.piece"
        sha256 = hashlib.sha256(content).hexdigest()
        manifest["pieces"].append({"name": name, "sha256": sha256})
        path = old.pop(name, pieces / name)
        if _read(path, sha256) is None:
            _write(path, zlib.compress(content))
    for outdated in old.values():
        outdated.unlink()
    _write(pieces / MANIFEST, json.dumps(manifest, indent=1).encode())
    count = len(manifest["pieces"])
    total = sum(path.stat().st_size for path in _index(pieces).values())
    print(f"{folder}: {len(files)} files in {count} pieces, {total:,} bytes")


def join(pieces: Path, folder: Path) -> None:
    """Write the files, each whole or not at all, if every piece is there and intact."""
    path = next(iter(sorted(pieces.rglob(MANIFEST))), None)
    if path is None:
        sys.exit(f"pieces: {pieces} lacks {MANIFEST}; bring it, or repeat the split")
    manifest = json.loads(path.read_text())
    index = _index(pieces)
    missing = [p["name"] for p in manifest["pieces"] if p["name"] not in index]
    present = [p for p in manifest["pieces"] if p["name"] in index]
    damaged = [p["name"] for p in present if _read(index[p["name"]], p["sha256"]) is None]
    if missing or damaged:
        sys.exit(
            f"pieces: {pieces} is missing {', '.join(missing) or 'none'}; "
            f"damaged: {', '.join(damaged) or 'none'}"
        )
    contents = (_read(index[p["name"]], p["sha256"]) or b"" for p in present)
    buffer = b""
    for entry in manifest["files"]:
        place = folder / entry["path"]
        if not place.resolve().is_relative_to(folder.resolve()):
            sys.exit(f"pieces: {path} names {entry['path']}, outside the folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        remaining = entry["bytes"]
        with partial.open("wb") as file:
            while remaining:
                buffer = buffer or next(contents)
                count = file.write(buffer[:remaining])
                remaining -= count
                buffer = buffer[count:]
        # caches keyed by the modification time stay valid
        os.utime(partial, ns=(entry["mtime_ns"],) * 2)
        partial.replace(place)
    print(f"{folder}: {len(manifest['files'])} files")


def _included(path: Path, folder: Path, without: Sequence[str]) -> bool:
    names = path.relative_to(folder).parts
    return path.is_file() and not any(name.startswith(".") or name in without for name in names)


def _chunks(files: Sequence[Path], size: int) -> Iterator[bytes]:
    """The concatenated contents of the files, `size` bytes at a time."""
    buffer = b""
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(size - len(buffer)):
                buffer += chunk
                if len(buffer) == size:
                    yield buffer
                    buffer = b""
    if buffer:
        yield buffer


def _index(pieces: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(pieces.rglob("*.piece"))}


def _read(piece: Path, sha256: str) -> bytes | None:
    """The content of the piece; None if it is absent, damaged or another one."""
    try:
        content = zlib.decompress(piece.read_bytes())
    except (FileNotFoundError, zlib.error):
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _bytes(text: str) -> int:
    number = text.rstrip("KMGiB")
    size = int(number) * UNITS[text.removeprefix(number)]
    if size < 1:
        raise ValueError(text)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("split")
    one.add_argument("folder", type=Path)
    one.add_argument("pieces", type=Path)
    one.add_argument("--bytes", type=_bytes, default="15MiB", help="of a piece, before compression")
    one.add_argument("--without", nargs="*", default=(), help="names of files and folders to omit")
    other = verbs.add_parser("join")
    other.add_argument("pieces", type=Path)
    other.add_argument("folder", type=Path)
    a = parser.parse_args()
    if a.verb == "split":
        split(a.folder, a.pieces, a.bytes, a.without)
    else:
        join(a.pieces, a.folder)


if __name__ == "__main__":
    main()
