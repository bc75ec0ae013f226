"""Configuration: loading, messages, presets, round trip, rules."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import PRESETS
from distill.config import (
    RecipeConfig,
    RunConfig,
    StudentConfig,
    StudentInitConfig,
    inputs,
    method,
    optimization,
    run,
    runtime,
)
from distill.config.load import load_config
from distill.config.retired import RETIRED
from distill.config.tree import fingerprint, flatten, setting_names, to_yaml
from distill.errors import ConfigError
from tests.unit.replay.builders import Settings

STUDENT = "student: {init: {from: teacher, num_layers: 10}}\n"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    def load_text(text: str, overrides: Sequence[str] = ()) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, PRESETS)

    return load_text


def message(load: Callable[..., RunConfig], text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(STUDENT + text, overrides)
    assert "\n" not in str(caught.value)
    assert "full_key" not in str(caught.value)
    return str(caught.value)


# Layers


def test_overrides_lie_over_the_file(load):
    config = load(
        STUDENT + "learner:\n  num_updates: 7\n  learning_rate: 1e-5\n", ["learner.num_updates=40", "seed=3"]
    )
    assert (config.learner.num_updates, config.learner.learning_rate, config.seed) == (40, 1e-5, 3)


def test_from_is_written_from(load):
    config = load(STUDENT, ["student.init.num_layers=4"])
    assert config.student.init == StudentInitConfig(source="teacher", num_layers=4)
    assert "from: teacher" in to_yaml(config)
    assert "source" not in to_yaml(config)
    assert "student.init.from" in setting_names()


def test_an_empty_section_changes_nothing(load):
    assert load(STUDENT + "learner:\n") == load(STUDENT)
    assert load(STUDENT + "learner: {num_updates: 7}", ["learner="]).learner.num_updates == 7


def test_interpolation(load):
    assert load(STUDENT + "seed: 5\ncorpus: {seed: '${seed}'}").corpus.seed == 5


def test_recipe_by_name_in_file_and_override(load):
    assert load(STUDENT + "recipe: kd").recipe.lm_weight == 0.5
    config = load(STUDENT + "recipe: ammd", ["recipe=kd", "recipe.loss_weight=0.9"])
    assert (config.recipe.name, config.recipe.loss_weight, config.recipe.anchor_weight) == ("kd", 0.9, 0.0)


def test_a_later_recipe_replaces_the_whole_section(load):
    config = load(STUDENT + "recipe: ammd_paper", ["recipe=gkd"])
    assert config.recipe.long_weight == RecipeConfig().long_weight


def test_a_preset_stands_where_it_is_named(load):
    file_wins = load(STUDENT + "recipe: ammd_paper\ncritic: {features: both}")
    override_wins = load(STUDENT + "critic: {features: both}", ["recipe=ammd_paper"])
    assert (file_wins.critic.features, override_wins.critic.features) == ("both", "teacher")


def test_recipe_fields_in_the_file(load):
    assert load(STUDENT + "recipe: {beta: 0.5}").recipe == RecipeConfig(beta=0.5)


def test_a_preset_with_fields_on_top(load):
    in_file = load(STUDENT + "recipe: {preset: ammd_paper, beta: 0.1}\ncritic: {rank: 8}")
    assert in_file == load(STUDENT, ["recipe=ammd_paper", "recipe.beta=0.1", "critic.rank=8"])
    assert load(STUDENT + "recipe: {beta: 0.1}", ["recipe.preset=kd"]) == load(STUDENT + "recipe: kd")
    for written in ("[kd]", "3", "kdd"):
        with pytest.raises(ConfigError, match=r"recipe=.* must be one of ammd"):
            load(STUDENT + f"recipe: {{preset: {written}}}")


# Presets


@pytest.mark.parametrize("name", [path.stem for path in (PRESETS / "recipes").glob("*.yaml")])
def test_each_recipe_loads_under_its_own_name(load, name):
    assert load(STUDENT, [f"recipe={name}"]).recipe.name == name


def test_recipe_rows(load):
    ammd = load(STUDENT + "recipe: ammd")
    assert ammd == load(STUDENT)
    paper = load(STUDENT + "recipe: ammd_paper")
    assert paper.recipe == RecipeConfig(name="ammd_paper", beta=0.5, anchor_weight=0.1, long_weight=1.0)
    assert (ammd.critic.features, paper.critic.features) == ("ratio", "teacher")
    kd, gkd = load(STUDENT + "recipe: kd").recipe, load(STUDENT + "recipe: gkd").recipe
    assert (kd.teacher_text, kd.student_text, kd.loss, kd.loss_weight, kd.lm_weight, kd.anchor_weight) == (
        "reference", "none", "forward_kl", 0.5, 0.5, 0.0,
    )  # fmt: skip
    assert (gkd.teacher_text, gkd.student_text, gkd.student_fraction, gkd.loss, gkd.jsd_beta) == (
        "reference", "mixed", 0.5, "generalized_jsd", 0.5,
    )  # fmt: skip
    assert gkd.anchor_weight == 0.0


def test_demo_needs_no_more_than_it_makes():
    config = load_config(PRESETS / "demo.yaml", (), PRESETS)
    assert config.run_dir == "runs/demo"
    drawn = config.learner.num_updates * config.learner.teacher_rows_per_update
    assert config.corpus.num_prompts and drawn % config.corpus.num_prompts == 0  # whole epochs
    assert (config.learner.prompts_per_update, config.rollout.samples_per_prompt) == (16, 2)


def test_each_line_of_a_recipe_says_why():
    for path in (PRESETS / "recipes").glob("*.yaml"):
        for line in path.read_text().splitlines():
            assert line.startswith("#") or line.endswith(":") or "  # " in line, f"{path.name}: {line}"


# Messages


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("learner.lerning_rate=1", "learner.lerning_rate must be a setting; did you mean learner.learning_rate?"),
        ("learner.lr=1", "learner.lr must be a setting; did you mean learner.learning_rate?"),
        ("learnr.num_updates=1", "learnr must be a setting; did you mean learner?"),
        ("learner.max_policy_age=1", "did you mean replay.max_policy_age?"),
        ("learning_rate=1", "sft.learning_rate or proxy.learning_rate or critic.learning_rate or learner.learning_rate?"),
        ("student.init.source=teacher", "student.init.source must be a setting; did you mean student.init.from?"),
        ("zzzz=1", "zzzz must be a setting; there are run_dir, seed, recipe, teacher"),
        ("learner.num_updates=many", "learner.num_updates=many must be an integer; the default is 20"),
        ("learner.num_updates=2.5", "learner.num_updates=2.5 must be an integer"),
        ("learner.num_updates=null", "learner.num_updates=null must be an integer"),
        ("learner.num_threads=few", "learner.num_threads=few must be an integer or null"),
        ("learner.learning_rate=fast", "learner.learning_rate=fast must be a number"),
        ("learner.learning_rate=nan", "learner.learning_rate=nan must be finite"),
        ("sft.enabled=maybe", "sft.enabled=maybe must be a boolean"),
        ("run_dir=[a]", "run_dir=['a'] must be a text"),
        ("run_dir=???", "run_dir=??? must be given"),
        ("student.init.num_layers=x", "student.init.num_layers=x must be an integer or null"),
        ("recipe.loss=revers_kl", "skew_forward_kl, skew_reverse_kl; did you mean reverse_kl?"),
        ("recipe.loss=${data.path}", "must be one of moment_gap, forward_kl"),
        ("recipe.student_text=x", "must be one of none, every_update, mixed; choose one of them"),
        ("learner=3", "learner=3 must be a section; write its settings, such as learner.num_updates=20"),
        ("recipe=3", "recipe=3 must be a section"),
        ("recipe=gkdd", "; did you mean gkd?"),
        ("corpus.seed=${nowhere}", "corpus.seed must be loadable (Interpolation key 'nowhere' not found); correct the value"),
        ("run_dir='a", "\"run_dir='a\" line 1 must be YAML (found unexpected end of stream); put the value in quotes"),
        ("run_dir=${", "'run_dir=${' must be YAML (no viable alternative at input '${'); put the value in quotes"),
        ("foo", "'foo' must be name=value"),
        ("=3", "'=3' must be name=value"),
        ("recipe.beta=2", "recipe.beta=2.0 must lie in [0, 1]; 0.25 is the default"),
    ],
)  # fmt: skip
def test_messages_for_overrides(load, wrong, said):
    assert said in message(load, "", wrong)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "learner:\n  num_updates: [1\nseed: 3\n",
            "run.yaml line 4 must be YAML (did not find expected ',' or ']'); correct the YAML there",
        ),
        (
            "seed: 1\nseed: 2\n",
            "run.yaml line 3 must be YAML (found duplicate key seed); correct the YAML there",
        ),
        ("learner: 3\n", "learner=3 must be a section"),
        (
            "learner:\n  lerning_rate: 1\n",
            "learner.lerning_rate must be a setting; did you mean learner.learning_rate?",
        ),
        ("1: 2\n", "1 must be a setting; there are run_dir, seed, recipe, teacher"),
        (
            "seed: '${'\n",
            "run.yaml must be loadable (no viable alternative at input '${'); correct the value",
        ),
    ],
)
def test_messages_for_files(load, text, said):
    assert said in message(load, text)


def test_messages_for_whole_files(load, tmp_path):
    with pytest.raises(
        ConfigError, match=r"nowhere\.yaml must be a configuration file that exists; check the path$"
    ):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"must be a readable configuration file \(Is a directory\)$"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    with pytest.raises(ConfigError, match=r"must be a readable configuration file \(byte 12 is not UTF-8\)$"):
        load_config(tmp_path / "latin.yaml")
    for text in ("- a\n- b\n", "3"):
        with pytest.raises(ConfigError, match=r"run\.yaml must hold a mapping of sections; write `section:`"):
            load(text)
    with pytest.raises(
        ConfigError,
        match=r"^recipe=kd must be a mapping of settings: there are no presets here; write the fields$",
    ):
        (tmp_path / "named.yaml").write_text("recipe: kd")
        load_config(tmp_path / "named.yaml")


@pytest.mark.parametrize(
    ("wrong", "message_is"),
    [
        ("recipe.off_policy_text=teacher", "recipe.off_policy_text must be a setting; use its new name, recipe.teacher_text"),
        ("recipe.teacher=text", "recipe.teacher must be a setting; use its new name, recipe.teacher_gives"),
        ("learner.text_rows_per_update=8", "learner.text_rows_per_update must be a setting; use its new name, learner.teacher_rows_per_update"),
        ("recipe.teacher_text=teacher", "recipe.teacher_text=teacher must be one of sampled, reference, none; use its new name, sampled"),
        ("rollout.temperature=1", "rollout.temperature must be a setting; leave it out: the objective needs text from the policy itself, so sampling is at temperature 1 without top-p"),
        ("rollout.top_p=1", "rollout.top_p must be a setting; leave it out: the objective needs text from the policy itself, so sampling is at temperature 1 without top-p"),
        ("weights.backend=auto", "weights.backend must be a setting; leave it out: every push goes through shared memory"),
    ],
)  # fmt: skip
def test_retired_settings_are_answered_with_what_to_write_instead(load, wrong, message_is):
    assert message(load, "", wrong) == message_is
    assert {wrong, wrong.partition("=")[0]} & set(RETIRED)


def test_no_setting_is_retired_and_every_new_name_is_a_setting():
    for retired, remedy in RETIRED.items():
        name, _, value = retired.partition("=")
        assert (name in setting_names()) == bool(value)
        _, renamed, new = remedy.partition("its new name, ")
        assert not renamed or value or new in setting_names()


# Round trip and fingerprint


def leaf_paths(part: type, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    hints = typing.get_type_hints(part)
    paths: list[tuple[tuple[str, ...], object]] = []
    for field in dataclasses.fields(part):
        path, hint = (*prefix, field.name), hints[field.name]
        paths += leaf_paths(hint, path) if dataclasses.is_dataclass(hint) else [(path, hint)]
    return paths


def values(hint: object) -> st.SearchStrategy:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of([values(kind) for kind in typing.get_args(hint)])
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    return {
        int: st.one_of(st.integers(0, 100), st.integers(-(10**12), 10**12)),
        float: st.one_of(st.floats(0, 1), st.floats(allow_nan=False, allow_infinity=False)),
        bool: st.booleans(),
        types.NoneType: st.none(),
        # What YAML or OmegaConf could take for something else, and anything that can be encoded.
        str: st.one_of(
            st.sampled_from(["1e3", "null", "~", "yes", "0x1f", "- a", "a: b", "", " x ", "\\", "1_000"]),
            st.text(st.sampled_from("\\${}:#'\" \n\tab"), max_size=12),
            st.text(st.characters(codec="utf-8")),
        ),
    }[hint]


def replaced(part: object, path: tuple[str, ...], value: object):
    name, *rest = path
    return dataclasses.replace(
        part, **{name: replaced(getattr(part, name), tuple(rest), value) if rest else value}
    )


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Any settings that break no rule: a value that would is left at its default."""
    config = RunConfig(student=StudentConfig(init=StudentInitConfig(source="teacher", num_layers=1)))
    for path, hint in draw(st.lists(st.sampled_from(leaf_paths(RunConfig)), max_size=12, unique=True)):
        changed = replaced(config, path, draw(values(hint).filter(lambda value: value != "???")))
        if not list(changed.violations()):
            config = changed
    return config


@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_yaml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    loaded = load_config(path)
    assert loaded == config
    assert fingerprint(loaded) == fingerprint(config)
    assert to_yaml(loaded) == to_yaml(config)


def test_round_trip_of_what_looks_like_an_interpolation(load):
    for text in ("${seed}", "\\${seed}", "\\\\${seed}", "a${b", "$${x}", "\\\\"):
        config = dataclasses.replace(load(STUDENT), run_dir=text)
        assert load(to_yaml(config)).run_dir == text


def test_fingerprint_is_what_determines_the_numbers(load):
    config = load(STUDENT)
    same = load(STUDENT, ["run_dir=elsewhere", "cluster.address=auto", "cluster.start_timeout_s=5"])
    assert fingerprint(same) == fingerprint(config)
    assert len(fingerprint(config)) == 16
    for path, hint in leaf_paths(RunConfig):
        if path[0] in ("run_dir", "cluster"):
            continue
        old = config
        for name in path:
            old = getattr(old, name)
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        other = next((choice for choice in choices if choice != old), "other")
        new = other if isinstance(old, str) else 77 if old is None else not old if old is True else old + 1
        assert fingerprint(replaced(config, path, new)) != fingerprint(config), path


def test_fingerprint_does_not_depend_on_int_or_float(load):
    config = load(STUDENT)
    assert fingerprint(replaced(config, ("recipe", "loss_weight"), 1)) == fingerprint(config)


# Rules and documentation of the sections

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
    "recipe.long_weight=1 recipe.student_text=none", "student.model=x", "student.init.from=other",
    "student.init.num_layers=0", "data.num_heldout=0", "sft.num_updates=0", "sft.rows_per_update=0",
    "corpus.max_new_tokens=0", "corpus.samples_per_prompt=0", "corpus.num_prompts=0", "rollout.samples_per_prompt=0",
    "rollout.max_new_tokens=0",
    "rollout.tensor_parallel_size=0", "replay.max_policy_age=-1", "replay.samples_per_insert=0",
    "replay.max_times_sampled=0", "replay.samples_per_insert=2 replay.max_times_sampled=2",
    "replay.min_size_to_sample=-1", "replay.segment_bytes=1", "replay.segment_bytes=2000000000",
    "replay.memory_bytes=9000000000", "critic.rank=0", "critic.bound=0", "critic.num_steps=0",
    "critic.warmup_updates=-1", "learner.num_updates=0", "learner.learning_rate=0",
    "learner.warmup_fraction=1", "weights.deadline_s=0", "checkpoint.every=0", "checkpoint.keep=0",
    "evaluation.every=-1", "evaluation.num_prompts=1 evaluation.num_prompts_during=1",
    "evaluation.num_prompts_during=129", "evaluation.best_metric=bleu", "cluster.object_store_bytes=1",
    "replay.min_size_to_sample=17", "recipe.long_weight=1 rollout.samples_per_prompt=1",
    "data.num_heldout=100", "recipe.student_text=mixed",
    "replay.samples_per_insert=0.5 replay.max_policy_age=1",
    "recipe.teacher_text=none recipe.student_text=mixed recipe.loss=forward_kl recipe.anchor_weight=0",
    "critic.variance_penalty=0", "critic.max_grad_norm=0", "credit.cost_max=1 credit.form=exact",
    "credit.baseline=whiten credit.form=exact",
    "credit.ratio=token credit.form=exact replay.max_policy_age=1 credit.ratio_max=null",
    "credit.ratio_max=2 credit.form=exact replay.max_policy_age=1 credit.ratio=per_decision",
    "critic.zero_sum=true recipe=ammd_blackbox", "critic.warmup_updates=20", "teacher.model=''",
    "student.init.num_layers=3 student.init.from=null student.model=x", "recipe=imitkd recipe.anchor_weight=0.5",
    "recipe.loss_weight=0 recipe.anchor_weight=0", "recipe=opd recipe.lm_weight=1",
    "learner.beta1=1.5", "learner.final_fraction=7", "sft.warmup_fraction=5", "scoring.gpu_memory_utilization=9",
    "scoring.max_groups=0", "rollout.max_num_seqs=0", "rollout.num_threads=0", "cluster.start_timeout_s=0",
]  # fmt: skip
"""Overrides of a valid configuration, each breaking the rule named by one of its settings."""


SECTIONS = [inputs, method, optimization, run, runtime]


def test_each_rule_is_broken_by_some_value(load, monkeypatch):
    rules = {
        (module.__name__, node.lineno, node.end_lineno)
        for module in SECTIONS
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ConfigError"
    }
    assert len(rules) > 40
    reached: set[tuple[str, int]] = set()

    def recording_rule(*arguments):
        caller = sys._getframe(1)
        reached.add((caller.f_globals["__name__"], caller.f_lineno))
        return ConfigError(*arguments)

    for module in SECTIONS:
        monkeypatch.setattr(module, "ConfigError", recording_rule)
    for overrides in BROKEN:
        with pytest.raises(ConfigError):
            load(STUDENT, overrides.split())
    unbroken = sorted(
        f"{module}:{first}"
        for module, first, last in rules
        if not any(module == name and first <= line <= last for name, line in reached)
    )
    assert not unbroken, "rules without a value in BROKEN that breaks them first"


@pytest.mark.parametrize("overrides", BROKEN)
def test_a_broken_rule_names_the_setting(load, overrides):
    with pytest.raises(ConfigError) as caught:
        load(STUDENT, overrides.split())
    error, said = caught.value, str(caught.value)
    assert said == f"{error.name}={error.value} must {error.must}; {error.remedy}" and "\n" not in said
    assert error.must and error.remedy
    names = [override.split("=")[0] for override in overrides.split()]
    assert any(name in said for name in names)
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
    """Clipping a gradient's norm to -1, say, would turn it round and train away from the teacher."""
    config = RunConfig(student=StudentConfig(init=StudentInitConfig(source="teacher", num_layers=1)))
    assert not list(config.violations())
    for path, hint in leaf_paths(RunConfig):
        kinds = typing.get_args(hint) or (hint,)
        name = ".".join(path)
        if (int in kinds or float in kinds) and name not in (
            "critic.ratio_start",
            "recipe.fraction_tolerance",
        ):
            broken = [error for error in replaced(config, path, -1).violations() if error.name == name]
            assert broken, name
            assert all(error.value == -1 and error.must and error.remedy for error in broken), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples_per_insert": 0.5},
         "replay.samples_per_insert=0.5 must be >= 1; a group that is never used only grows old; 1 uses each once"),
        ({"samples_per_insert": 3, "max_times_sampled": 2},
         "replay.max_times_sampled=2 must be >= replay.samples_per_insert (3); "),
        ({"samples_per_insert": 2, "max_times_sampled": 2, "max_policy_age": 0},
         "replay.samples_per_insert=2 must be 1 when replay.max_policy_age=0"),
        ({"student_text": "mixed", "teacher_text": "none"},
         "recipe.teacher_text=none must be sampled or reference when recipe.student_text=mixed; "
         "the updates without student text need another"),
    ],
)  # fmt: skip
def test_settings_that_starve_the_learner_are_refused(settings, said):
    """Nothing behind the configuration refuses them: the rate limiter and the batch plan rely on it."""
    found = [str(error) for error in Settings(**settings).config.violations()]
    assert any(line.startswith(said) for line in found), found


def test_a_replay_that_no_student_text_enters_may_insert_more_than_it_uses():
    config = Settings(student_text="none", samples_per_insert=0.5).config
    assert "replay.samples_per_insert" not in [error.name for error in config.violations()]


def test_flatten():
    assert flatten({"a": {"b": 1, "c.d": 2}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_loading_imports_no_heavy_library():

    code = (
        "import distill.config.load, sys; "
        "print([name for name in ('torch', 'transformers', 'ray', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
