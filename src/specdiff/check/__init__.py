"""The conformance suite: is this drafter, verifier or target lossless?

The tests and `specdiff check` run the same code. Every statistical check has a false-alarm chance
below 1e-5, so that a sound subject fails with a chance below 1e-4; seeds are fixed, so it always
fails or never does.
"""

from specdiff.check.drafters import Subject, check_drafter
from specdiff.check.findings import Finding
from specdiff.check.targets import check_target
from specdiff.check.verifiers import check_verifier

__all__ = ["Finding", "Subject", "check_drafter", "check_target", "check_verifier"]
