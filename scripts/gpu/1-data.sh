#!/usr/bin/env bash
# The target writes 50 M tokens. When the time is up, the finished rows are stored.
set -euo pipefail
. scripts/gpu/common.sh
status=0
timeout --signal=INT --kill-after=60 "${minutes}m" \
    "$python" -m specdiff data --model "$model" --out "$gpu/corpus" --seed 1 "${data[@]}" || status=$?
if [[ $status == 124 ]]; then
    echo "time is up; repeat the command to resume" >&2
elif [[ $status != 0 ]]; then
    exit "$status"
fi
hand_over corpus 24MiB
