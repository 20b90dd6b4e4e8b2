#!/usr/bin/env bash
# A SEDD drafter, taught by the target in the loop.
set -euo pipefail
. scripts/gpu/common.sh
train sedd
hand_over sedd 15MiB
