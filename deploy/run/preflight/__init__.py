"""The checks before any engine starts. `distill train` begins with them; `distill doctor` does only them.

Each check finds one cause of a failure that would otherwise end a run later, when its devices are in use.
The first failure ends the checks. :mod:`deploy.run.prepare` uses what the checks have loaded: prompts and
model facts.

:mod:`deploy.run.preflight.sequence` has the order of the checks and what they load; the other modules have
the checks themselves, as functions of a configuration and of what is loaded.
"""

from deploy.run.preflight.outcome import Check, failed
from deploy.run.preflight.sequence import OF_THE_MACHINE, Preflight

__all__ = ["OF_THE_MACHINE", "Check", "Preflight", "failed"]
