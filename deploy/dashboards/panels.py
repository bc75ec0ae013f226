"""The dashboards of a run: what each panel shows, and what to do when it looks wrong.

The queries take the names from :mod:`deploy.run.telemetry.names`, which the exporter uses as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.run.telemetry import names
from deploy.run.telemetry.names import Exported
from deploy.run.training.clocks import REMEDIES
from distill.run.alarms import WEAK

RUN = "$run_id"
"""The variable of every dashboard; a test puts a run's id in its place."""
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and the legend of its series."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    unit: str
    """In Grafana's names of units."""
    description: str
    """What it shows, and what to do when it looks wrong."""
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class DashboardSpec:
    uid: str
    title: str
    rows: dict[str, tuple[Panel, ...]]

    @property
    def panels(self) -> list[Panel]:
        return [panel for panels in self.rows.values() for panel in panels]


def _column(name: str, legend: str = "") -> Query:
    """A column of metrics.parquet."""
    return Query(f'ray_{names.of_column(name)}{{run_id="{RUN}"}}', legend or name)


def _gauge(metric: Exported, legend: str) -> Query:
    return Query(f'{metric.in_prometheus}{{run_id="{RUN}"}}', legend)


def _rate(metric: Exported, by: str, legend: str) -> Query:
    return Query(f'sum by ({by}) (rate({metric.in_prometheus}{{run_id="{RUN}"}}{_RATE}))', legend)


def _rate_of_column(name: str, legend: str) -> Query:
    """Of a column that only grows."""
    return Query(f'rate(ray_{names.of_column(name)}{{run_id="{RUN}"}}{_RATE})', legend)


def _of_engines(name: str, legend: str) -> Query:
    """A gauge of vLLM's own. Prometheus derives the labels of the run from its ``model_name``."""
    return Query(f'ray_vllm_{name}{{run_id="{RUN}"}}', legend)


def _rate_of_engines(name: str, legend: str) -> Query:
    return Query(f'sum by (member) (rate(ray_vllm_{name}_total{{run_id="{RUN}"}}{_RATE}))', legend)


THROUGHPUT = DashboardSpec(
    "distill-throughput",
    "distill: throughput",
    {
        "Which stage limits the run": (
            Panel(
                title="Limiting stage",
                unit="short",
                description="1 for the stage whose actors are busy for the largest part of an update. Only a faster "
                "limiting stage makes the run faster. "
                + " ".join(f"{stage.capitalize()}: {remedy}." for stage, remedy in REMEDIES.items()),
                queries=(_gauge(names.LIMITS, "{{stage}}"),),
            ),
            Panel(
                title="What would make it faster",
                unit="none",
                description="The change with the largest predicted gain, and how many times as fast the run would be: 1 "
                "when no setting would help. It is computed from the busy shares, and `distill plan` tries others.",
                queries=(Query(f'{names.ADVICE.in_prometheus}{{run_id="{RUN}"}} > 0', "{{advice}}"),),
            ),
            Panel(
                title="Busy share of each stage",
                unit="percentunit",
                description="Part of the time in which an actor of the stage works, on average. In lock-step the "
                "shares add up to about 1; raise replay.max_policy_age to let the stages work at the same time.",
                queries=tuple(_column(f"{stage}/busy_share", stage) for stage in names.LIMIT_STAGES),
            ),
            Panel(
                title="Seconds per second by role and state",
                unit="percentunit",
                description="busy: the engine works. storing: rows are built and written. starved: the replay has no work to "
                "do. blocked: admission waits for the learner. A pool that is starved or blocked for most of the "
                "time has too many actors: lower its replicas with `distill scale`.",
                queries=(_rate(names.ACTOR_SECONDS, "role, state", "{{role}} {{state}}"),),
            ),
        ),
        "Tokens": (
            Panel(
                title="Tokens per second by role",
                unit="short",
                description="rollout: tokens that the student wrote. teacher: tokens that the teacher read. learner: "
                "tokens that the student read in updates. A role whose rate falls while its busy share stays at 1 "
                "has a slower machine, or longer texts.",
                queries=(_rate(names.ACTOR_TOKENS, "role", "{{role}}"),),
            ),
            Panel(
                title="Tokens per second of each actor",
                unit="short",
                description="Actors of one pool should be alike. One that is slower than the others shares its cores or "
                "its GPU with something else: look at its machine.",
                queries=(_rate(names.ACTOR_TOKENS, "member", "{{member}}"),),
            ),
            Panel(
                title="Bytes per second by hop",
                unit="Bps",
                description="Rows that rollout actors and scoring actors write for the next stage. Hidden states are by "
                "far the largest part: a narrower teacher or shorter responses make it smaller. It should stay far "
                "below the speed of a memory copy.",
                queries=(
                    _rate_of_column("rollout/num_bytes", "rollout to scoring"),
                    _rate_of_column("teacher/num_bytes", "scoring to learner"),
                ),
            ),
            Panel(
                title="Bytes of a push",
                unit="bytes",
                description="The file of the weights, in the number format of the rollout engines. Half of it is saved "
                "by rollout.dtype=bfloat16 where the engine computes in that format.",
                queries=(_column("weights/num_bytes", "learner to engines"),),
            ),
            Panel(
                title="Seconds of an update",
                unit="s",
                description="update: one update with its rollouts and scoring, without evaluations and checkpoints. push: the weights' way to all "
                "engines. A push that takes more than a tenth of an update is worth a look: fewer bytes "
                "(rollout.dtype) or fewer engines on a node.",
                queries=(_column("timing/update_s", "update"), _column("timing/push_s", "push")),
            ),
        ),
        "vLLM engines": (
            Panel(
                title="Requests in each engine",
                unit="short",
                description="vLLM's own count of what it computes and what waits for room. Requests that wait all the "
                "time: raise max_num_seqs or kv_cache_gib of the engine, or its replicas.",
                queries=(
                    _of_engines("num_requests_running", "{{member}} running"),
                    _of_engines("num_requests_waiting", "{{member}} waiting"),
                ),
            ),
            Panel(
                title="KV cache in use",
                unit="percentunit",
                description="Part of each engine's key-value cache that holds a sequence. Near 1, vLLM preempts "
                "sequences and computes them again: raise kv_cache_gib or gpu_memory_utilization.",
                queries=(_of_engines("kv_cache_usage_perc", "{{member}}"),),
            ),
            Panel(
                title="Tokens per second inside vLLM",
                unit="short",
                description="Tokens that each engine read and wrote. A rollout engine that reads far more than its prompts "
                "computes prefixes again after pushes: weights.on_push=keep_kv avoids that.",
                queries=(
                    _rate_of_engines("prompt_tokens", "{{member}} read"),
                    _rate_of_engines("generation_tokens", "{{member}} wrote"),
                ),
            ),
        ),
        "Replay": (
            Panel(
                title="Age of the student's text",
                unit="short",
                description="Updates between the weights that wrote a token and the update that uses it. It cannot "
                "exceed replay.max_policy_age. If the largest is always at the bound, the rollouts are far ahead of "
                "the learner, and a lower bound costs no speed.",
                queries=(_column("policy/age_max", "largest"), _column("policy/age_mean", "mean")),
            ),
            Panel(
                title="Groups of student text by state",
                unit="short",
                description="Where the groups are. Many that are generated and not scored: the teacher limits the run. "
                "Many that are scored: the learner does.",
                queries=tuple(
                    _column(f"replay/student_text.{state}", state)
                    for state in ("dispatched", "generated", "scored")
                ),
            ),
            Panel(
                title="Rows in the replay",
                unit="bytes",
                description="Bytes of rows that may still be used. If it grows without end, report a bug; if it is near "
                "replay.memory_bytes, rows move to the disk.",
                queries=(_column("replay/bytes", "rows"),),
            ),
            Panel(
                title="Samples per insert",
                unit="short",
                description="How often each group of student text is used, on average. It should be "
                "replay.samples_per_insert after the first updates.",
                queries=(_column("replay/samples_per_insert", "samples per insert"),),
            ),
        ),
    },
)

LEARNING = DashboardSpec(
    "distill-learning",
    "distill: learning",
    {
        "Distance to the teacher": (
            Panel(
                title="Moment-matching distance",
                unit="short",
                description="The critics' value of the difference between student and teacher, on the teacher's text "
                "(off) and on the student's own (on). Both should fall. If they fall while the total variation "
                "stays, the critics are too weak: see their tightness.",
                queries=(
                    _column("critic/teacher_text.d_mm", "off"),
                    _column("critic/student_text.d_mm", "on"),
                ),
            ),
            Panel(
                title="Total variation",
                unit="percentunit",
                description="Half the sum of the absolute differences of the two next-token distributions, mean over "
                "tokens. It should fall. If it rises on the student's text alone, raise recipe.beta.",
                queries=(
                    _column("policy/teacher_text.tv", "teacher's text"),
                    _column("policy/student_text.tv", "student's text"),
                ),
            ),
            Panel(
                title="KL divergences",
                unit="short",
                description="In nats per token. A forward KL that rises says that the student no longer covers what "
                "the teacher says: lower learner.learning_rate.",
                queries=(
                    _column("policy/teacher_text.forward_kl", "forward, teacher's text"),
                    _column("policy/student_text.reverse_kl", "reverse, student's text"),
                ),
            ),
        ),
        "Critics and student": (
            Panel(
                title="Tightness of the critics",
                unit="percentunit",
                description="The critic's value / the largest that any critic could reach on the same text. Below "
                f"{WEAK} the critic cannot be trusted: raise critic.rank or critic.learning_rate, or use "
                "critic.features=ratio.",
                queries=(
                    _column("critic/teacher_text.tightness", "off"),
                    _column("critic/student_text.tightness", "on"),
                ),
            ),
            Panel(
                title="Entropy of the student",
                unit="short",
                description="In nats per token. A fall to near 0 means that the student repeats itself: lower "
                "recipe.beta or learner.learning_rate.",
                queries=(
                    _column("policy/teacher_text.entropy", "teacher's text"),
                    _column("policy/student_text.entropy", "student's text"),
                ),
            ),
            Panel(
                title="Gradient norms",
                unit="short",
                description="Before clipping. A norm that stays far above learner.max_grad_norm means that every step "
                "is clipped: lower learner.learning_rate.",
                queries=(_column("policy/grad_norm", "student"), _column("critic/grad_norm", "critics")),
            ),
            Panel(
                title="Length of the student's responses",
                unit="short",
                description="Tokens. If it grows to rollout.max_new_tokens, the student has forgotten how to stop: look "
                "at the share of truncated ones, and raise recipe.anchor_weight.",
                queries=(_column("policy/response_length", "tokens"),),
            ),
            Panel(
                title="Truncated responses",
                unit="percentunit",
                description="Part of the responses that the limit cut. Raise rollout.max_new_tokens if the teacher's "
                "answers are that long.",
                queries=(_column("policy/truncated_share", "truncated"),),
            ),
            Panel(
                title="Learning rate",
                unit="sci",
                description="Of the student, by its schedule.",
                queries=(_column("policy/learning_rate", "student"),),
            ),
        ),
    },
)

HEALTH = DashboardSpec(
    "distill-health",
    "distill: health",
    {
        "Run": (
            Panel(
                title="Updates done",
                unit="short",
                description="A flat line means that the run waits or has ended: `distill report RUN` says which.",
                queries=(_gauge(names.UPDATE, "updates"),),
            ),
            Panel(
                title="Alarms",
                unit="short",
                description="Alarms raised so far; events.jsonl in the run folder has their text and what to do.",
                queries=(_gauge(names.ALARMS, "alarms"),),
            ),
            Panel(
                title="Failures of actors",
                unit="short",
                description="Rollout and teacher actors that died or hung and were started again. `member_failed` in "
                "events.jsonl says by what; if the lines rise, look at the memory below.",
                queries=(
                    _column("rollout/num_failures", "rollout"),
                    _column("teacher/num_failures", "scoring"),
                ),
            ),
            Panel(
                title="Skipped updates",
                unit="short",
                description="Updates with a loss, gradient or score that was NaN or infinite, with learner.on_nonfinite=skip. "
                "`update_skipped` in events.jsonl names the file of each, with which `distill replay-batch` says which "
                "tensor was the first. If the line keeps rising, lower learner.learning_rate.",
                queries=(_column("learner/num_nonfinite", "skipped"),),
            ),
            Panel(
                title="Draws given back and answers refused",
                unit="short",
                description="Expired: groups that were drawn again because their text had become too old. Refused: "
                "samples that came too late, because their work had been given to another actor. Both are 0 unless "
                "an actor was slow or lost: look at the tokens of each actor.",
                queries=(
                    _column("replay/num_expired", "expired"),
                    _column("replay/num_refused", "refused"),
                ),
            ),
        ),
        "Machine": (
            Panel(
                title="Memory by role",
                unit="bytes",
                description="Proportional set size of the processes. A line that grows steadily is a leak: report it "
                "with this panel.",
                queries=(_gauge(names.MEMORY, "{{process}}"),),
            ),
            Panel(
                title="Free space",
                unit="bytes",
                description="On the disk of the run folder, and in shared memory. If shared memory runs out, lower "
                "replay.memory_bytes; if the disk does, lower checkpoint.keep.",
                queries=(_gauge(names.FREE, "{{medium}}"),),
            ),
        ),
    },
)

DASHBOARDS = (THROUGHPUT, LEARNING, HEALTH)
