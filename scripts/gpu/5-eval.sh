#!/usr/bin/env bash
# Acceptance and speed of every drafter, trained here or bundled, against plain decoding: runs/gpu/results.json.
set -euo pipefail
. scripts/gpu/common.sh
folders=()
for config in "$gpu"/*/config.json; do [[ ! -e $config ]] || folders+=("${config%/config.json}"); done
"$python" scripts/gpu/evaluate.py --model "$model" --data "$gpu/corpus" --held-out "$held_out" --out "$gpu/results.json" \
    --minutes "$minutes" "${measure[@]}" "${folders[@]}"
[[ -z ${OUT:-} ]] || cp "$gpu/results.json" "$OUT"
