"""What the user reads about a wrong file, override, name or value."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distill.config import RunConfig
from distill.config.load import load_config
from distill.config.retired import RETIRED
from distill.config.tree import setting_names
from distill.errors import ConfigError
from tests.unit.config.settings import STUDENT


def message(load: Callable[..., RunConfig], text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(STUDENT + text, overrides)
    assert "\n" not in str(caught.value)
    assert "full_key" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ("learner.lerning_rate=1", "learner.lerning_rate must be the name of a setting; did you mean learner.learning_rate?"),
        ("learner.lr=1", "learner.lr must be the name of a setting; did you mean learner.learning_rate?"),
        ("learnr.num_updates=1", "learnr must be the name of a setting; did you mean learner?"),
        ("learner.max_policy_age=1", "did you mean replay.max_policy_age?"),
        ("learning_rate=1", "sft.learning_rate or proxy.learning_rate or critic.learning_rate or learner.learning_rate?"),
        ("student.init.source=teacher", "student.init.source must be the name of a setting; did you mean student.init.from?"),
        ("zzzz=1", "zzzz must be the name of a setting; use one of run_dir, seed, recipe, teacher"),
        ("learner.num_updates=many", "learner.num_updates=many must be an integer; correct the value (the default is 20)"),
        ("learner.num_updates=2.5", "learner.num_updates=2.5 must be an integer"),
        ("learner.num_updates=null", "learner.num_updates=null must be an integer"),
        ("learner.num_threads=few", "learner.num_threads=few must be an integer or null"),
        ("learner.learning_rate=fast", "learner.learning_rate=fast must be a number"),
        ("learner.learning_rate=nan", "learner.learning_rate=nan must be finite"),
        ("sft.enabled=maybe", "sft.enabled=maybe must be a boolean"),
        ("tracking.to=[tensorbord]", "tracking.to=tensorbord must contain only tensorboard, wandb, mlflow, trackio; did you mean tensorboard?"),
        ("tracking.to=wandb", "tracking.to=wandb must be a list, such as [first, second]; correct the value (the default is [tensorboard])"),
        ("tracking.to=[mlflow,mlflow]", "tracking.to=[mlflow, mlflow] must name each tracker once; remove the repeated name"),
        ("traking.to=[]", "traking must be the name of a setting; did you mean tracking?"),
        ("run_dir=???", "run_dir=??? must be given; replace ??? with a value"),
        ("student.init.num_layers=x", "student.init.num_layers=x must be an integer or null"),
        ("recipe.loss=revers_kl", "skew_forward_kl, skew_reverse_kl; did you mean reverse_kl?"),
        ("recipe.loss=${data.path}", "must be one of moment_gap, forward_kl"),
        ("recipe.student_text=x", "must be one of none, every_update, mixed; choose one of them"),
        ("learner=3", "learner=3 must be a section; write its settings, for example learner.num_updates=20"),
        ("recipe=3", "recipe=3 must be one of ammd, "),
        ("recipe=gkdd", "; did you mean gkd?"),
        ("corpus.seed=${nowhere}", "corpus.seed must be loadable (Interpolation key 'nowhere' not found); correct the value"),
        ("student.init={from: 'a", "line 1 must be YAML (found unexpected end of stream); correct the value"),
        ("foo", "'foo' must be name=value"),
        ("=3", "'=3' must be name=value"),
        ("recipe.beta=2", "recipe.beta=2.0 must lie in [0, 1]; correct the value (the default is 0.25)"),
    ],
)  # fmt: skip
def test_error_of_an_override(load, wrong, part):
    assert part in message(load, "", wrong)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "learner:\n  num_updates: [1\nseed: 3\n",
            "run.yaml line 4 must be YAML (expected ',' or ']', but got ':'); correct the YAML there",
        ),
        (
            "seed: 1\nseed: 2\n",
            "run.yaml line 3 must be YAML (found duplicate key seed); correct the YAML there",
        ),
        ("learner: 3\n", "learner=3 must be a section"),
        (
            "learner:\n  lerning_rate: 1\n",
            "learner.lerning_rate must be the name of a setting; did you mean learner.learning_rate?",
        ),
        (
            "? [seed]\n: 2\n",
            "run.yaml line 2 must be YAML (found a key that is not the name of a setting); correct",
        ),
        ("1: 2\n", "1 must be the name of a setting; use one of run_dir, seed, recipe, teacher"),
        (
            "seed: '${'\n",
            "seed must be loadable (no viable alternative at input '${'); correct the value",
        ),
    ],
)
def test_error_in_a_file(load, text, part):
    assert part in message(load, text)


@pytest.mark.parametrize(
    ("text", "wrong", "error", "remedies"),
    [
        (
            "{init: {from: teacher, num_layers: 10}}",
            "student.model=x",
            "student.model=x must be null when student.init.from is set; to load the student, write "
            "student.init.from=null student.init.num_layers=null; to cut it from the teacher, write student.model=null",
            ("student.init.from=null student.init.num_layers=null", "student.model=null"),
        ),
        (
            "{init: {from: teacher, layers: [0, 1]}}",
            "student.model=x",
            "student.model=x must be null when student.init.from is set; to load the student, write "
            "student.init.from=null student.init.layers=null; to cut it from the teacher, write student.model=null",
            ("student.init.from=null student.init.layers=null", "student.model=null"),
        ),
        (
            "{model: x}",
            "student.model=null",
            "student.model=null must name a checkpoint unless student.init.from is set; set it, or cut the student "
            "from the teacher with student.init.from=teacher student.init.num_layers=N",
            ("student.init.from=teacher student.init.num_layers=3", "student.model=y"),
        ),
        (
            "{model: x}",
            "student.init.num_layers=3",
            "student.init.num_layers=3 must be null unless student.init.from is set; set it to null, because a "
            "loaded student keeps all its layers; or set student.init.from=teacher",
            ("student.init.num_layers=null", "student.init.from=teacher student.model=null"),
        ),
    ],
)
def test_the_remedies_of_a_student_with_two_origins_or_none_work(load, text, wrong, error, remedies):
    with pytest.raises(ConfigError) as caught:
        load(f"student: {text}", [wrong])
    assert str(caught.value) == error
    for remedy in remedies:
        load(f"student: {text}", [wrong, *remedy.split()])


def test_errors_of_a_whole_file(load, tmp_path):
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
        with pytest.raises(
            ConfigError, match=r"run\.yaml must contain a mapping of sections; write `section:`"
        ):
            load(text)
    with pytest.raises(
        ConfigError,
        match=r"^recipe=kd must be a mapping of settings, because no presets are available here; write the fields$",
    ):
        (tmp_path / "named.yaml").write_text("recipe: kd")
        load_config(tmp_path / "named.yaml")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("recipe.off_policy_text=teacher", "recipe.off_policy_text must be the name of a setting; use its new name, recipe.teacher_text"),
        ("recipe.teacher=text", "recipe.teacher must be the name of a setting; use its new name, recipe.teacher_gives"),
        ("learner.text_rows_per_update=8", "learner.text_rows_per_update must be the name of a setting; use its new name, learner.teacher_rows_per_update"),
        ("recipe.teacher_text=teacher", "recipe.teacher_text=teacher must be one of sampled, reference, none; use its new name, sampled"),
        ("cluster.address=null", "cluster.address=null must be auto, local or the HOST:PORT of a Ray head, such as 10.0.0.1:6379; use its new name, local"),
        ("rollout.temperature=1", "rollout.temperature must be the name of a setting; leave it out: the objective needs text from the policy itself, so sampling is at temperature 1 without top-p"),
        ("rollout.top_p=1", "rollout.top_p must be the name of a setting; leave it out: the objective needs text from the policy itself, so sampling is at temperature 1 without top-p"),
        ("weights.backend=auto", "weights.backend must be the name of a setting; leave it out: every push goes through shared memory"),
    ],
)  # fmt: skip
def test_retired_settings_are_answered_with_what_to_write_instead(load, wrong, expected):
    assert message(load, "", wrong) == expected
    assert {wrong, wrong.partition("=")[0]} & set(RETIRED)


def test_no_setting_is_retired_and_every_new_name_is_a_setting():
    for retired, remedy in RETIRED.items():
        name, _, value = retired.partition("=")
        assert (name in setting_names()) == bool(value)
        _, renamed, new = remedy.partition("its new name, ")
        assert not renamed or value or new in setting_names()
