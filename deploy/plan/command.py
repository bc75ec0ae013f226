"""`distill plan`: the predicted speed, limit and memory of a configuration, and the best split of more devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deploy.paths import absolute_path
from deploy.placement import place_locally
from deploy.plan.measured import Measured, measured
from deploy.plan.predict import Prediction, Split, best_splits, curve_sizes, fewest_devices, predict
from deploy.plan.probe import probe
from deploy.report.model import Column, Line, Paragraph, Report, Table
from deploy.report.run_files import read_run
from deploy.run.context import setup_of
from deploy.run.estimates import Estimates
from deploy.run.preflight import OF_THE_MACHINE, Preflight
from deploy.run.progress import Progress
from deploy.run.settings import config_to_resume
from deploy.run.training.clocks import STAGES
from distill.config import RunConfig
from distill.errors import ConfigError
from distill.machine.hardware import usable_cores

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is predicted of a configuration."""

    measured: Measured
    source: str
    """Where the service times come from."""
    prediction: Prediction
    memory: Mapping[str, int]
    """Bytes of one actor of each role, and of Ray."""
    splits: list[Split]

    def to_dict(self) -> dict[str, Any]:
        """For ``distill plan --json``."""
        found = self.measured
        return {
            "measured": {
                "from": self.source,
                "num_updates": found.num_updates,
                "sample_s": found.sample_s,
                "text_s": found.text_s,
                "row_s": found.row_s,
                "push_s": found.push_s,
                "between_s": found.between_s,
                "tokens_per_sample": found.tokens_per_sample,
            },
            "as_configured": self.prediction.to_dict(),
            "memory_bytes": dict(self.memory),
            "splits": [
                {"num_devices": each.num_devices, **each.prediction.to_dict()} for each in self.splits
            ],
        }


def make_plan(
    config: RunConfig,
    *,
    measured_run: str | None,
    num_devices: int | None,
    device_gib: float | None,
    progress: Progress,
) -> Plan:
    """Check a configuration, measure its devices or read them from ``measured_run``, and predict.

    ``num_devices``: GPUs, or machines like the measured one, of which each actor has its own. ``device_gib``: memory of
    each of them.

    Raises: ConfigError, which says what is lacking; what a training raises, where a probe fails.
    """
    if num_devices is not None and num_devices < fewest_devices(config):
        must = f"be >= {fewest_devices(config)}, for one engine of each kind and the learner"
        remedy = "give it more, or lower rollout.tensor_parallel_size and scoring.tensor_parallel_size"
        raise ConfigError("--devices", num_devices, must, remedy)
    preflight = Preflight(config)
    # A run that was measured may be planned on another machine than the one that will do it.
    preflight.run(leave_out=() if measured_run is None else OF_THE_MACHINE)
    preflight.require()
    if device_gib is not None:
        for lack in _lacking(preflight.estimates, config, device_gib):
            raise lack
    if measured_run is not None:
        theirs = config_to_resume(measured_run)
        found, source = (
            measured(read_run(theirs.run_dir), theirs),
            str(absolute_path(measured_run, "--measured")),
        )
    else:
        found, source = probe(config, progress), "a probe"
    progress.say("predicting")
    here = setup_of(config, place_locally(config, usable_cores()), None)
    sizes = curve_sizes(fewest_devices(config), num_devices) if num_devices is not None else []
    return Plan(
        measured=found,
        source=source,
        prediction=predict(found, config, here),
        memory=preflight.estimates.memory_of_actors(),
        splits=list(best_splits(found, config, sizes)),
    )


def _lacking(estimates: Estimates, config: RunConfig, device_gib: float) -> Iterator[ConfigError]:
    """The roles that need more memory than a device has, in one error."""
    need = {role: num_bytes / _GIB for role, num_bytes in estimates.memory_of_devices().items()}
    lacking = {role: gib for role, gib in need.items() if gib > device_gib}
    if lacking:
        parts = ", ".join(f"the {role} lacks {gib - device_gib:.1f} GiB" for role, gib in lacking.items())
        remedy = "use larger devices"
        if lacking.keys() - {"learner"}:
            engines = _sizes_that_fit(lacking, config, device_gib)
            remedy += f", or divide an engine's weights: {engines}"
        if "learner" in lacking:
            remedy += "; for the learner, lower learner.micro_batch_tokens or learner.vocabulary_chunk"
        yield ConfigError(
            "--device-gib", f"{device_gib:g}", f"be >= {max(lacking.values()):.1f} ({parts})", remedy
        )


def _sizes_that_fit(lacking: Mapping[str, float], config: RunConfig, device_gib: float) -> str:
    """The settings with which the engines would fit: tensor_parallel_size doubled as often as needed."""
    settings: dict[str, int] = {}
    for role, gib in lacking.items():
        if role == "learner":
            continue
        section = "rollout" if role in ("rollout", "sampler") else "scoring"
        size = present = getattr(config, section).tensor_parallel_size
        while gib * present / size > device_gib:
            size *= 2
        settings[section] = max(size, settings.get(section, 1))
    return " ".join(f"{section}.tensor_parallel_size={size}" for section, size in settings.items())


def plan_report(plan: Plan) -> Report:
    """The plan as it is printed."""
    found = plan.measured
    blocks: list[Paragraph | Table] = [
        Paragraph(
            (
                f"Measured in {found.num_updates} updates of {plan.source}: a sample of "
                f"{found.tokens_per_sample:.0f} tokens takes a rollout engine {found.sample_s:.3g} s, a text takes a "
                f"scoring engine {found.text_s:.3g} s, a row takes the learner {found.row_s:.3g} s, and a push "
                f"takes {found.push_s:.3g} s.",
            )
        ),
        _as_configured(plan.prediction),
        Table(
            (Column("role"), Column("GiB of one actor", numeric=True)),
            tuple(((role,), (f"{num_bytes / _GIB:.1f}",)) for role, num_bytes in plan.memory.items()),
            title="Memory",
            note="On a CPU, at the actor's peak.",
        ),
    ]
    if plan.splits:
        blocks.append(_curve(plan.splits))
    return Report("Plan", tuple(blocks))


def _as_configured(prediction: Prediction) -> Table:
    shares = [(stage, prediction.row.get(f"{stage}/busy_share", 0.0)) for stage in STAGES]
    rows: list[tuple[Line, ...]] = [
        (("tokens per second of the student's text",), (f"{prediction.tokens_per_s:.0f}",)),
        (("seconds of an update",), (f"{1 / prediction.updates_per_s:.3g}",)),
        *(((f"busy share of the {stage}",), (f"{share:.2f}",)) for stage, share in shares),
    ]
    note = prediction.advice.text if prediction.advice is not None else ""
    return Table(
        (Column("prediction"), Column("", numeric=True)),
        tuple(rows),
        title="As configured, on this machine",
        note=f"{note[:1].upper()}{note[1:]}." if note else "",
    )


def _curve(splits: list[Split]) -> Table:
    first = splits[0].prediction.updates_per_s
    rows: list[tuple[Line, ...]] = []
    for split in splits:
        found = split.prediction
        rows.append(
            (
                (str(split.num_devices),),
                (str(found.config.rollout.replicas),),
                (str(found.config.scoring.replicas),),
                (f"{found.tokens_per_s:.0f}",),
                (f"{found.updates_per_s / first:.2f}",),
                (found.advice.stage if found.advice is not None else "",),
            )
        )
    columns = ("devices", "rollout.replicas", "scoring.replicas", "tokens/s", "times as fast")
    return Table(
        (*(Column(name, numeric=True) for name in columns), Column("limit")),
        tuple(rows),
        title="The best split of more devices",
        note="Each actor has devices of its own, as fast as the measured ones. The learner has one.",
    )
