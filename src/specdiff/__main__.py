"""`python -m specdiff`, and so `accelerate launch -m specdiff train ...`."""

from specdiff.cli import main

main()
