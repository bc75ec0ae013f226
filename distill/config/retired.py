"""Settings and values of earlier versions, each with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping

_TEMPERATURE = (
    "the objective needs text from the policy itself, so sampling is at temperature 1 without top-p"
)

RETIRED: Mapping[str, str] = {
    "recipe.off_policy_text": "use its new name, recipe.teacher_text",
    "recipe.teacher": "use its new name, recipe.teacher_gives",
    "recipe.teacher_text=teacher": "use its new name, sampled",
    "learner.text_rows_per_update": "use its new name, learner.teacher_rows_per_update",
    "scoring.max_groups": "use its new name, scoring.max_num_seqs",
    "cluster.address=null": "use its new name, local",
    "rollout.temperature": f"leave it out: {_TEMPERATURE}",
    "rollout.top_p": f"leave it out: {_TEMPERATURE}",
    "weights.backend": "leave it out: every push goes through shared memory",
}
"""``setting`` or ``setting=value`` -> the remedy in the error that rejects it."""
