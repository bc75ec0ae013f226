"""Shapes in signatures are checked while these tests run, unless the modules were imported before."""

from jaxtyping import install_import_hook

CHECKED = [
    "distill.objectives",
    "distill.credit",
    "learner.model.head",
    "learner.model.chunked",
    "learner.update.critics",
    "learner.update.positions",
    "learner.update.critic_step",
    "learner.update.credit_step",
    "learner.update.witness",
    "learner.update.losses",
    "learner.update.student_step",
    "learner.update.diagnostics",
    "learner.update.update",
]
install_import_hook(CHECKED, "beartype.beartype")
