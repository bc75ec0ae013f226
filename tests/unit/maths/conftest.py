"""Shapes in signatures are checked while these tests run, where nobody imported the modules before."""

from jaxtyping import install_import_hook

CHECKED = [
    "distill.objectives",
    "distill.credit",
    "learner.vocabulary",
    "learner.critics",
    "learner.positions",
    "learner.critic_step",
    "learner.credit_step",
    "learner.witness",
    "learner.losses",
    "learner.student_step",
    "learner.update",
]
install_import_hook(CHECKED, "beartype.beartype")
