#!/usr/bin/env bash
# The paper's baseline at equal size: an autoregressive drafter, distilled in the same way.
set -euo pipefail
. scripts/gpu/common.sh
train autoregressive
hand_over autoregressive 15MiB
