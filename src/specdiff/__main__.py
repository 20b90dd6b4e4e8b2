"""`python -m specdiff`, and so `accelerate launch -m specdiff train ...`."""

from specdiff.cli import main

if __name__ == "__main__":  # not in a process that multiprocessing spawns
    main()
