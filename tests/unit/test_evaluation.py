"""Divergences and their aggregation against slow references close to the maths."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import evaluation as evaluation_module
from distill.config import EVALUATION_METRICS
from distill.errors import Diverged
from distill.evaluation import (
    EXTRA_METRICS,
    METRICS,
    Evaluation,
    ScoredChunk,
    _PromptSums,
    direction,
    divergences,
    is_better,
    load_evaluation,
    measure,
    paired_difference,
    rouge_l,
    save_evaluation,
)
from distill.schema import Trajectory, trajectory_batch

# Divergences


def slow_divergences(policy: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """One position, token by token, in the words of the definition."""
    tv = forward = reverse = entropy = jsd = 0.0
    for p, q in zip(policy, teacher, strict=True):
        tv += abs(p - q) / 2
        if q > 0:
            forward += q * (math.log(q) - math.log(p)) if p > 0 else math.inf
        if p > 0:
            reverse += p * (math.log(p) - math.log(q)) if q > 0 else math.inf
            entropy -= p * math.log(p)
        jsd += sum(x * math.log(2 * x / (p + q)) / 2 for x in (p, q) if x > 0)
    return {"tv": tv, "forward_kl": forward, "reverse_kl": reverse, "jsd": jsd, "entropy": entropy}


def check_against_slow(policy_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> None:
    found = divergences(policy_logprobs, teacher_logprobs)
    for i in range(len(policy_logprobs)):
        expected = slow_divergences(
            policy_logprobs[i].double().exp().numpy(), teacher_logprobs[i].double().exp().numpy()
        )
        for name, value in expected.items():
            assert found[name][i].item() == pytest.approx(value, rel=1e-4, abs=2e-6), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    positions=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    masked=st.integers(0, 5),
)
def test_divergences_are_those_of_the_definition(seed, positions, vocabulary, scale, masked):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, positions, vocabulary + masked, generator=generator) * scale
    logits[:, :, vocabulary:] = -math.inf
    check_against_slow(*logits.log_softmax(-1))


def test_blocks_of_rows_do_not_show(monkeypatch):
    policy, teacher = torch.randn(2, 11, 7).log_softmax(-1)
    whole = divergences(policy, teacher)
    monkeypatch.setattr(evaluation_module, "_BLOCK_NUMBERS", 3 * 7)
    blocked = divergences(policy, teacher)
    assert all(torch.equal(whole[name], blocked[name]) for name in whole)


def test_known_values():
    policy, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    found = {name: value.item() for name, value in divergences(policy, teacher).items()}
    assert found["tv"] == pytest.approx(0.25)
    assert found["forward_kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["reverse_kl"] == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert found["entropy"] == pytest.approx(math.log(2))


def test_mass_on_an_excluded_token_is_an_infinite_kl_never_nan():
    both, first = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    found = divergences(both, first)
    assert found["reverse_kl"].item() == math.inf
    assert found["forward_kl"].item() == pytest.approx(math.log(2))
    assert divergences(first, both)["forward_kl"].item() == math.inf


def test_equal_policies_have_no_divergence_and_bf16_is_accepted():
    policy = torch.randn(4, 100).log_softmax(-1).bfloat16()
    found = divergences(policy, policy)
    assert all((found[name] == 0).all() for name in ("tv", "forward_kl", "reverse_kl", "jsd"))
    assert found["tv"].dtype == torch.float32


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="common prefix"):
        divergences(torch.zeros(2, 5), torch.zeros(2, 6))


# ROUGE-L


@pytest.mark.parametrize(
    ("text", "target", "f1"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("a b c d", "a x c y z w", 0.4),  # LCS 2: precision 2/4, recall 2/6
        ("cats running", "cat run", 0.0),  # no stemmer
        ("", "the cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_rouge_l_of_known_strings(text, target, f1):
    assert rouge_l(text, target) == pytest.approx(f1)


# Standard errors


def evaluation_of(metric: str, per_prompt: dict[int, list[float]], label: str = "e") -> Evaluation:
    sums = _PromptSums(np.array(sorted(per_prompt)))
    for prompt, values in per_prompt.items():
        sums.add(metric, np.full(len(values), prompt), np.array(values))
    return Evaluation(label, sums.table())


def test_equal_lengths_give_the_textbook_standard_error():
    found = evaluation_of("entropy", {i: [float(i), float(i)] for i in (1, 2, 3, 4)}).estimate("entropy")
    assert found.value == 2.5
    assert found.stderr == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)


def test_unequal_lengths_weigh_tokens_exactly():
    found = evaluation_of("entropy", {0: [1.0], 1: [1.0, 2.0]}).estimate("entropy")
    assert found.value == pytest.approx(4 / 3)
    assert found.stderr == pytest.approx(2 / 9)  # residuals -1/9 and 1/9; sqrt(2 · 2/81)


def test_standard_error_is_the_spread_over_resampled_prompts():
    random = np.random.default_rng(0)

    def draw() -> Evaluation:
        texts = {}
        for prompt in range(40):
            level = random.normal()  # shared by the prompt's tokens: they are not independent
            texts[prompt] = list(level + random.normal(size=random.integers(1, 30)))
        return evaluation_of("entropy", texts)

    estimates = [draw().estimate("entropy") for _ in range(300)]
    spread = np.std([found.value for found in estimates])
    assert np.mean([found.stderr for found in estimates]) == pytest.approx(spread, rel=0.12)


def test_one_prompt_has_no_standard_error_and_none_no_value():
    one = evaluation_of("entropy", {3: [1.0, 2.0]})
    assert one.estimate("entropy").value == 1.5
    assert math.isnan(one.estimate("entropy").stderr)
    assert math.isnan(one.value("length"))
    assert one.to_dict()["stderr"]["entropy"] is None
    assert one.to_dict()["length"] is None


def test_pairing_removes_the_variance_between_prompts():
    before = evaluation_of("teacher_text.tv", {0: [0.1], 1: [0.5], 2: [0.9]})
    after = evaluation_of("teacher_text.tv", {0: [0.05], 1: [0.45], 2: [0.85]})
    difference = paired_difference(before, after)
    assert set(difference) == {"teacher_text.tv"}
    assert difference["teacher_text.tv"].value == pytest.approx(-0.05)
    assert difference["teacher_text.tv"].stderr == pytest.approx(0, abs=1e-12)
    assert after.estimate("teacher_text.tv").stderr > 0.2


def test_paired_standard_error_exactly():
    before = evaluation_of("entropy", {0: [1.0], 1: [2.0], 2: [4.0]})
    after = evaluation_of("entropy", {0: [2.0], 1: [2.0], 2: [7.0]})
    found = paired_difference(before, after)["entropy"]
    assert found.value == pytest.approx(4 / 3)
    assert found.stderr == pytest.approx(np.std([1, 0, 3], ddof=1) / math.sqrt(3))


def test_pairing_is_by_prompt_and_on_the_shared_ones():
    before = evaluation_of("entropy", {5: [1.0], 1: [2.0], 9: [100.0]})
    after = evaluation_of("entropy", {0: [-50.0], 1: [3.0], 5: [2.0]})
    assert paired_difference(before, after)["entropy"].value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least two prompts"):
        paired_difference(before, evaluation_of("entropy", {9: [1.0]}))


def test_the_paired_error_with_text_of_other_lengths_is_the_spread_of_differences():
    random = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(300):
        level = random.normal(size=30) * 3
        both = [
            {i: list(level[i] + shift + random.normal(size=random.integers(5, 30))) for i in range(30)}
            for shift in (0.0, 0.5)
        ]
        found = paired_difference(*(evaluation_of("entropy", texts) for texts in both))["entropy"]
        values.append(found.value)
        errors.append(found.stderr)
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


# Measuring


VOCABULARY = 6


def row(
    source: str, prompt: int, sample: int, tokens: list[int], mask: list[bool] | None = None
) -> Trajectory:
    student = source == "student"
    return Trajectory(
        draw_id=f"heldout-0-{prompt}",
        source=source,
        prompt_index=prompt,
        sample_index=sample,
        prompt_tokens=[1, 2],
        response_tokens=tokens,
        loss_mask=mask,
        behavior_logprobs=[-1.0] * len(tokens) if student else None,
        policy_versions=[(0, 3)] if student else None,
        finish_reason="length" if len(tokens) == 4 else "stop",
    )


TEACHER = [
    [row("teacher", 2, 0, [1, 2, 3])],
    [row("teacher", 7, 0, [4]), row("teacher", 5, 0, [1, 1, 2, 2, 3, 3])],
]
STUDENT = [
    [row("student", 5, 0, [1, 2, 3, 4]), row("student", 5, 1, [2])],
    [row("student", 7, 0, [4, 5])],
    [row("student", 2, 0, [3, 3, 3]), row("student", 2, 1, [1, 2, 3])],
]


def batches(groups: list[list[Trajectory]]) -> list:
    return [trajectory_batch(group) for group in groups]


class FakePolicies:
    """Both policies at every position, from a seed; yields them packed, shuffled, in chunks."""

    def __init__(self, num_rows: int = 5, num_steps: int = 6, chunk: int = 4):
        random = torch.Generator().manual_seed(0)
        shape = (2, num_rows, num_steps, VOCABULARY)
        self.policy, self.teacher = torch.randn(*shape, generator=random).log_softmax(-1)
        self.chunk = chunk
        self.seed = 0

    def __call__(self, rows):
        lengths = [len(tokens) for batch in rows for tokens in batch["response_tokens"].to_pylist()]
        places = np.array([(i, t) for i, length in enumerate(lengths) for t in range(length)])
        np.random.default_rng(self.seed).shuffle(places)
        for start in range(0, len(places), self.chunk):
            i, t = torch.from_numpy(places[start : start + self.chunk]).T
            yield ScoredChunk(i, t, self.policy[i, t], self.teacher[i, t])


def decode(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def measured(policies=None, **changes) -> Evaluation:
    arguments = {
        "teacher_rows": batches(TEACHER),
        "student_rows": batches(STUDENT),
        "score": policies or FakePolicies(),
        "decode": decode,
        "references": {2: "w1 w2 w3", 5: "w9"},
    }
    return measure("step-3", **(arguments | changes))


def test_values_are_means_over_tokens_by_a_slow_loop():
    policies = FakePolicies()
    found = measured(policies)
    for name, groups in (("teacher_text", TEACHER), ("student_text", STUDENT)):
        rows = [trajectory for group in groups for trajectory in group]
        per_position = [
            slow_divergences(policies.policy[i, t].exp().numpy(), policies.teacher[i, t].exp().numpy())
            | {
                "early": t < len(r.response_tokens) // 3,
                "late": t >= len(r.response_tokens) - len(r.response_tokens) // 3,
            }
            for i, r in enumerate(rows)
            for t in range(len(r.response_tokens))
        ]
        for metric in ("tv", "forward_kl", "reverse_kl"):
            expected = np.mean([position[metric] for position in per_position])
            assert found.value(f"{name}.{metric}") == pytest.approx(expected, rel=1e-5)
        for part in ("early", "late"):
            expected = np.mean([position["tv"] for position in per_position if position[part]])
            assert found.value(f"{name}.tv_{part}") == pytest.approx(expected, rel=1e-5)
        if name == "student_text":
            expected = np.mean([position["entropy"] for position in per_position])
            assert found.value("entropy") == pytest.approx(expected, rel=1e-5)
    assert found.value("length") == pytest.approx(np.mean([4, 1, 2, 3, 3]))
    assert found.value("truncated") == pytest.approx(1 / 5)
    assert found.prompt_indices.tolist() == [2, 5, 7]


def test_rouge_is_with_the_answers_of_the_same_prompt():
    found = measured()
    sums, weights = found.per_prompt("rouge_l.reference")
    assert weights.tolist() == [2, 2, 0]  # prompt 7 has no reference
    assert sums[0] == pytest.approx(1 / 3 + 1)
    sums, weights = found.per_prompt("rouge_l.teacher")
    assert weights.tolist() == [2, 2, 1]
    assert sums[2] == pytest.approx(2 / 3)  # "w4 w5" against "w4"


def test_order_and_size_of_chunks_do_not_show():
    first, second = FakePolicies(chunk=4), FakePolicies(chunk=100)
    second.seed = 9
    left, right = measured(first), measured(second)
    for metric in METRICS:
        assert left.estimate(metric) == pytest.approx(right.estimate(metric), rel=1e-6)


def test_masked_tokens_do_not_count():
    masked = [[row("teacher", 2, 0, [1, 2, 3], [True, False, True])], *TEACHER[1:]]
    _, weights = measured(teacher_rows=batches(masked)).per_prompt("teacher_text.tv")
    assert weights.tolist() == [2, 6, 1]


def test_one_source_alone():
    found = measured(student_rows=[])
    assert found.value("teacher_text.tv") > 0
    assert found.to_dict()["student_text"]["tv"] is None
    assert found.to_dict()["length"] is None


def test_a_token_never_or_twice_scored_is_refused():
    class Forgets(FakePolicies):
        def __call__(self, rows):
            yield from list(super().__call__(rows))[1:]

    class Repeats(FakePolicies):
        def __call__(self, rows):
            chunks = list(super().__call__(rows))
            yield from [*chunks, chunks[0]]

    class Invents(FakePolicies):
        def __call__(self, rows):
            yield ScoredChunk(torch.tensor([1]), torch.tensor([5]), self.policy[0, :1], self.teacher[0, :1])

    with pytest.raises(ValueError, match=r"must be scored once, was scored 0 times \(4 tokens"):
        measured(Forgets())
    with pytest.raises(ValueError, match="was scored 2 times"):
        measured(Repeats())
    with pytest.raises(ValueError, match="no token 5 of row 1"):
        measured(Invents())


def test_a_divergence_that_is_not_finite_stops_with_its_place():
    policies = FakePolicies()
    policies.policy[0, 1, 0] = -math.inf
    with pytest.raises(
        Diverged,
        match=r"^teacher_text: forward_kl at token 1 of heldout-0-2/0=inf must be finite \(1 tokens are not\); "
        "mask the same tail of both vocabularies$",
    ):
        measured(policies)


def test_rows_of_another_source_or_other_prompts_are_refused():
    with pytest.raises(ValueError, match="teacher_text must be rows of source teacher, got student"):
        measured(teacher_rows=batches(STUDENT))
    with pytest.raises(
        ValueError, match="student_text must answer the prompts of teacher_text, lacks 1 of 3"
    ):
        measured(student_rows=batches(STUDENT[:2]))
    with pytest.raises(ValueError, match="must have rows"):
        measured(student_rows=[], teacher_rows=[])


# What is kept


def test_to_dict_has_exactly_its_keys():
    found = measured().to_dict()
    assert set(found) == {
        "teacher_text", "student_text", "rouge_l", "entropy", "length", "num_prompts", "stderr",
    }  # fmt: skip
    assert (
        set(found["teacher_text"]) == set(found["student_text"]) == {"tv", "forward_kl", "reverse_kl", "jsd"}
    )
    assert set(found["rouge_l"]) == {"teacher", "reference"}
    assert set(found["stderr"]) == set(METRICS)
    assert set(METRICS) == {*EVALUATION_METRICS, "entropy", "length"}
    assert found["num_prompts"] == 3
    json.dumps(found, allow_nan=False)


def test_saved_and_loaded(tmp_path):
    found = measured()
    path = save_evaluation(tmp_path / "evaluations", found)
    assert path == tmp_path / "evaluations" / "step-3.parquet"
    loaded = load_evaluation(path)
    assert loaded.label == "step-3"
    assert loaded.table.equals(found.table)
    assert [p.name for p in path.parent.iterdir()] == ["step-3.parquet"]


def test_labels_and_foreign_files_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(ValueError, match="names a file"):
        save_evaluation(tmp_path, Evaluation("../evil", measured().table))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="must be an evaluation of version 1"):
        load_evaluation(tmp_path / "other.parquet")
    with pytest.raises(KeyError, match="no metric"):
        measured().value("teacher_text.vt")


def test_best_metric():
    assert direction("teacher_text.tv") == -1
    assert direction("rouge_l.reference") == 1
    assert direction("entropy") == direction("length") == 0
    assert is_better("teacher_text.tv", 0.2, 0.3)
    assert not is_better("teacher_text.tv", 0.3, 0.3)
    assert is_better("rouge_l.teacher", 0.4, 0.3)
    assert is_better("rouge_l.teacher", 0.0, None)
    assert not is_better("teacher_text.tv", math.nan, None)
    assert is_better("teacher_text.tv", 9.0, math.nan)
    assert all(direction(name) for name in EVALUATION_METRICS)
    assert "truncated" in EXTRA_METRICS


def test_reading_an_evaluation_loads_no_torch():
    code = "import sys, distill.evaluation; sys.exit(bool({'torch', 'transformers', 'rouge_score'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
