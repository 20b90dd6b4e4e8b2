#!/usr/bin/env bash
# The target writes 50 M tokens of its own. Stopped when the time is up, it keeps what is finished.
set -euo pipefail
. scripts/gpu/common.sh
status=0
timeout --signal=INT --kill-after=60 "${minutes}m" \
    "$python" -m specdiff data --model "$model" --out "$gpu/corpus" --seed 1 "${data[@]}" || status=$?
if [[ $status == 124 ]]; then
    echo "time is up; the same call again goes on" >&2
elif [[ $status != 0 ]]; then
    exit "$status"
fi
hand_over corpus 24MiB
