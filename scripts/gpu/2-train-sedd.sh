#!/usr/bin/env bash
# A SEDD drafter, distilled from the target in the training loop.
set -euo pipefail
. scripts/gpu/common.sh
train sedd
hand_over sedd 15MiB
