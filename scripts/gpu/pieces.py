"""A folder as small compressed files, for transfers that take only small ones. Needs nothing but Python.

    python pieces.py split FOLDER PIECES --bytes 15MiB --without checkpoints
    python pieces.py join PIECES FOLDER

`--bytes` counts before compression: a piece is about 0.5 of it for token shards, 0.8 for weights. Repeating either command
goes on: intact pieces are kept, damaged or outdated ones written anew. Pieces may lie in sub-folders of PIECES, as carried.
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
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def split(folder: Path, pieces: Path, size: int, without: Sequence[str] = ()) -> None:
    """Write `folder`'s files, hidden ones and those on a path named in `without` left out; the manifest comes last."""
    files = [
        f
        for f in sorted(folder.rglob("*"))
        if f.is_file() and _wanted(f.relative_to(folder), without)
    ]
    if not files:
        sys.exit(f"pieces: {folder} holds no files")
    entries = [
        {
            "path": f.relative_to(folder).as_posix(),
            "bytes": (s := f.stat()).st_size,
            "mtime_ns": s.st_mtime_ns,
        }
        for f in files
    ]
    pieces.mkdir(parents=True, exist_ok=True)
    for outdated in pieces.rglob(MANIFEST):
        outdated.unlink()
    found, named = _found(pieces), []
    for i, content in enumerate(_cut(files, size)):
        entry = {"name": f"{i:05d}.piece", "sha256": hashlib.sha256(content).hexdigest()}
        named.append(entry)
        place = found.pop(entry["name"], pieces / entry["name"])
        if _read(place, entry["sha256"]) is None:
            _write(place, zlib.compress(content))
    for outdated in found.values():
        outdated.unlink()
    _write(pieces / MANIFEST, json.dumps({"files": entries, "pieces": named}, indent=1).encode())
    print(
        f"{folder}: {len(files)} files in {len(named)} pieces, {sum(f.stat().st_size for f in _found(pieces).values()):,} bytes"
    )


def join(pieces: Path, folder: Path) -> None:
    """Write the files back, each whole or not at all; only once every piece is there and intact, else say what is not."""
    manifest = next(iter(sorted(pieces.rglob(MANIFEST))), None)
    if manifest is None:
        sys.exit(f"pieces: {pieces} lacks {MANIFEST}; bring it, or repeat the split")
    told, found = json.loads(manifest.read_text()), _found(pieces)
    absent = [p["name"] for p in told["pieces"] if p["name"] not in found]
    damaged = [
        p["name"]
        for p in told["pieces"]
        if p["name"] in found and _read(found[p["name"]], p["sha256"]) is None
    ]
    if absent or damaged:
        sys.exit(
            f"pieces: {pieces} is missing {', '.join(absent) or 'none'}; damaged: {', '.join(damaged) or 'none'}"
        )
    contents, buffer = (_read(found[p["name"]], p["sha256"]) or b"" for p in told["pieces"]), b""
    for entry in told["files"]:
        place = folder / entry["path"]
        if not place.resolve().is_relative_to(folder.resolve()):
            sys.exit(f"pieces: {manifest} names {entry['path']}, outside the folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        partial, left = place.with_name(f".{place.name}.partial"), entry["bytes"]
        with partial.open("wb") as file:
            while left:
                buffer = buffer or next(contents)
                left -= file.write(taken := buffer[:left])
                buffer = buffer[len(taken) :]
        os.utime(
            partial, ns=(entry["mtime_ns"],) * 2
        )  # what is cached by a file's time stays valid
        partial.replace(place)
    print(f"{folder}: {len(told['files'])} files")


def _wanted(path: Path, without: Sequence[str]) -> bool:
    return not any(part.startswith(".") or part in without for part in path.parts)


def _cut(files: Sequence[Path], size: int) -> Iterator[bytes]:
    """The files' contents behind one another, `size` bytes at a time."""
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


def _found(pieces: Path) -> dict[str, Path]:
    return {p.name: p for p in sorted(pieces.rglob("*.piece"))}


def _read(piece: Path, sha256: str) -> bytes | None:
    """The piece's content, or None if it is absent or not what it should be."""
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
    number, unit = text.rstrip("KMGiB"), text[len(text.rstrip("KMGiB")) :]
    size = int(number) * (UNITS[unit] if unit else 1)
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
    one.add_argument("--without", nargs="*", default=(), help="names of files and folders left out")
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
