"""`specdiff train --dry-run --json | python steps.py MINUTES FILE`: writes the number of steps that fits, with 15 % to spare."""

import json
import sys
from pathlib import Path

minutes, file = float(sys.argv[1]), Path(sys.argv[2])
told = sys.stdin.read()
if not told:
    sys.exit(1)  # the dry run has said why
seconds = json.loads(told)["seconds_per_step"]
steps = max(1, int(0.85 * 60 * minutes / seconds))
file.write_text(f"{steps}\n")
print(f"{1e3 * seconds:.0f} ms a step: {steps} steps in {minutes:g} minutes", file=sys.stderr)
