"""The number of training steps that fits a time limit, with a reserve of 15 %.

specdiff train ... --dry-run --json | python steps.py MINUTES FILE
"""

import json
import sys
from pathlib import Path

minutes = float(sys.argv[1])
file = Path(sys.argv[2])
forecast = sys.stdin.read()
if not forecast:
    sys.exit(1)  # the dry run has printed its error
seconds = json.loads(forecast)["seconds_per_step"]
steps = max(1, int(0.85 * 60 * minutes / seconds))
file.write_text(f"{steps}\n")
print(f"{1e3 * seconds:.0f} ms a step: {steps} steps in {minutes:g} minutes", file=sys.stderr)
