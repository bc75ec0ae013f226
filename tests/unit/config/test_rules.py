"""The rules of the sections: each can be broken, and each names its setting and a remedy."""

from __future__ import annotations

import ast
import inspect
import sys
import typing

import pytest

from distill.config import RunConfig, inputs, method, optimization, run, runtime
from distill.config.rules import bounded
from distill.config.tree import setting_names
from distill.errors import ConfigError
from tests.unit.config.settings import STUDENT, VALID, leaf_paths, replaced
from tests.unit.replay.builders import Settings

BROKEN = [
    "recipe.student_text=none recipe.teacher_text=none", "recipe.beta=-1", "recipe.gamma=0",
    "recipe.student_fraction=2", "recipe.fraction_step=2", "recipe.fraction_step=0.1",
    "evaluation.every=0 recipe=distillm", "recipe.jsd_beta=1", "recipe.lm_weight=-1", "recipe.skew=1",
    "recipe.student_text_loss=forward_kl", "recipe.long_weight=1 recipe.loss=reverse_kl",
    "critic.learning_rate=-1", "critic.ema=1", "critic.positions_per_step=0", "credit.cost_scale=0", "credit.cost_max=0",
    "credit.ratio_max=0", "credit.ppo_clip=-1", "credit.ppo_clip=0.2 credit.ratio=per_decision",
    "cluster.backend=in_process", "recipe.teacher_gives=text",
    "recipe.teacher_gives=text recipe.teacher_text=reference", "proxy.num_updates=-1",
    "proxy.rows_per_update=0",
    "recipe.long_weight=1 recipe.student_text=none", "student.model=x", "student.init.from=null student.init.num_layers=null", "student.init.from=other",
    "student.init.num_layers=0", "data.num_heldout=0", "sft.num_updates=0", "sft.rows_per_update=0",
    "corpus.max_new_tokens=0", "corpus.samples_per_prompt=0", "corpus.num_prompts=0", "rollout.samples_per_prompt=0",
    "rollout.max_new_tokens=0", "rollout.tensor_parallel_size=0", "replay.max_policy_age=-1", "replay.samples_per_insert=0",
    "replay.max_times_sampled=0", "replay.samples_per_insert=2 replay.max_times_sampled=2",
    "replay.min_size_to_sample=-1", "replay.segment_bytes=1", "replay.segment_bytes=2000000000",
    "replay.memory_bytes=9000000000", "critic.rank=0", "critic.bound=0", "critic.num_steps=0",
    "critic.warmup_updates=-1", "learner.num_updates=0", "learner.learning_rate=0",
    "learner.warmup_fraction=1", "weights.deadline_s=0", "checkpoint.every=0", "checkpoint.keep=0", "checkpoint.wait_for_room_s=-1", "checkpoint.wait_for_room_s=1800",
    "evaluation.every=-1", "evaluation.num_prompts=1 evaluation.num_prompts_during=1",
    "evaluation.num_prompts_during=129", "evaluation.shown_prompts=[]", "evaluation.best_metric=bleu", "cluster.object_store_bytes=1",
    "cluster.address=null", "cluster.address=http://10.0.0.1:8265", "cluster.address=somewhere",
    "replay.min_size_to_sample=17", "recipe.long_weight=1 rollout.samples_per_prompt=1",
    "data.num_heldout=100", "recipe.student_text=mixed",
    "replay.samples_per_insert=0.5 replay.max_policy_age=1",
    "recipe.teacher_text=none recipe.student_text=mixed recipe.loss=forward_kl recipe.anchor_weight=0",
    "critic.variance_penalty=0", "critic.max_grad_norm=0", "credit.cost_max=1 credit.form=exact",
    "credit.baseline=whiten credit.form=exact",
    "credit.ratio=token credit.form=exact replay.max_policy_age=1 credit.ratio_max=null",
    "credit.ratio_max=2 credit.form=exact replay.max_policy_age=1 credit.ratio=per_decision",
    "critic.zero_sum=true recipe=ammd_blackbox", "critic.warmup_updates=20", "teacher.model=", "run_dir=", "data.path=",
    "student.init.num_layers=3 student.init.from=null student.model=x", "student.init.layers=[0,1]",
    "student.init.num_layers=null student.init.layers=[0,2,1]", "recipe=imitkd recipe.anchor_weight=0.5",
    "recipe.loss_weight=0 recipe.anchor_weight=0", "recipe=opd recipe.lm_weight=1",
    "learner.beta1=1.5", "learner.final_fraction=7", "sft.warmup_fraction=5", "scoring.gpu_memory_utilization=9",
    "scoring.max_num_seqs=0", "rollout.replicas=0", "scoring.replicas=0", "scoring.check=-1", "rollout.max_num_seqs=0", "rollout.num_threads=0", "cluster.start_timeout_s=0", "cluster.max_restarts=-1",
    "tracking.to=[tensorbord]", "tracking.to=[wandb,wandb]", "tracking.project=", "tracking.project=a/b",
    "seed=-1", "data.path=", "data.format=messages data.answer_column=x", "corpus.seed=-1", "learner.weight_decay=-1", "learner.max_nonfinite=-1", "sft.learning_rate=0", "rollout.kv_cache_gib=0",
]  # fmt: skip
"""Overrides of a valid configuration. Each item breaks the rule of one of its settings."""
SECTIONS = [inputs, method, optimization, run, runtime]


def test_each_rule_is_broken_by_some_value(load, monkeypatch):
    rules = {
        (module.__name__, node.lineno, node.end_lineno)
        for module in SECTIONS
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("ConfigError", "bounded")
    }
    assert len(rules) > 60
    reached: set[tuple[str, int]] = set()

    def recording_rule(*arguments):
        caller = sys._getframe(1)
        reached.add((caller.f_globals["__name__"], caller.f_lineno))
        return ConfigError(*arguments)

    def recording_bound(*arguments, **options):
        caller = sys._getframe(1)
        place = caller.f_globals["__name__"], caller.f_lineno

        def errors():
            for error in bounded(*arguments, **options):
                reached.add(place)
                yield error

        return errors()

    for module in SECTIONS:
        monkeypatch.setattr(module, "ConfigError", recording_rule)
        monkeypatch.setattr(module, "bounded", recording_bound)
    for overrides in BROKEN:
        with pytest.raises(ConfigError):
            load(STUDENT, overrides.split())
    unbroken = sorted(
        f"{module}:{first}"
        for module, first, last in rules
        if not any(module == name and first <= line <= last for name, line in reached)
    )
    assert not unbroken, "no item of BROKEN breaks these rules first"


@pytest.mark.parametrize("overrides", BROKEN)
def test_a_broken_rule_names_the_setting(load, overrides):
    with pytest.raises(ConfigError) as caught:
        load(STUDENT, overrides.split())
    error, message = caught.value, str(caught.value)
    assert message == f"{error.name}={error.value} must {error.must}; {error.remedy}" and "\n" not in message
    assert error.must and error.remedy
    names = [override.split("=")[0] for override in overrides.split()]
    assert any(name in message for name in names)
    assert error.name in setting_names()


def test_every_field_has_a_docstring():
    undocumented = [
        f"{part.name}.{field.target.id}"
        for module in SECTIONS
        for part in ast.parse(inspect.getsource(module)).body
        if isinstance(part, ast.ClassDef) and part.name.endswith("Config")
        for field, below in zip(part.body, [*part.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if not (
            isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        )
    ]
    assert undocumented == []


def test_no_number_may_be_negative():
    """Clipping a gradient's norm to -1, for example, would reverse it and train away from the teacher."""
    assert not list(VALID.violations())
    for path, hint in leaf_paths(RunConfig):
        kinds = typing.get_args(hint) or (hint,)
        name = ".".join(path)
        if (int in kinds or float in kinds) and name not in (
            "critic.ratio_start",
            "recipe.fraction_tolerance",
        ):
            broken = [error for error in replaced(VALID, path, -1).violations() if error.name == name]
            assert broken, name
            assert all(error.value == -1 and error.must and error.remedy for error in broken), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_insert": 0.5},
         "replay.samples_per_insert=0.5 must be >= 1; set it to 1 to use each group once, because groups that are never used only grow old"),
        ({"samples_per_insert": 3, "max_times_sampled": 2},
         "replay.max_times_sampled=2 must be >= replay.samples_per_insert (3); "),
        ({"samples_per_insert": 2, "max_times_sampled": 2, "max_policy_age": 0},
         "replay.samples_per_insert=2 must be 1 when replay.max_policy_age=0"),
        ({"student_text": "mixed", "teacher_text": "none"},
         "recipe.teacher_text=none must be sampled or reference when recipe.student_text=mixed; "
         "choose the text of the updates that use no student text"),
    ],
)  # fmt: skip
def test_settings_that_starve_the_learner_are_rejected(settings, message):
    """The rate limiter and the batch plan rely on the configuration to reject them."""
    found = [str(error) for error in Settings(**settings).config.violations()]
    assert any(line.startswith(message) for line in found), found


def test_a_replay_without_student_text_can_insert_more_than_it_uses():
    config = Settings(student_text="none", samples_per_insert=0.5).config
    assert "replay.samples_per_insert" not in [error.name for error in config.violations()]


def test_a_list_of_prompts_to_show_is_not_empty():
    (error,) = inputs.EvaluationConfig(shown_prompts=[]).violations()
    assert str(error).startswith("evaluation.shown_prompts=[] must have at least one prompt; leave it out")
