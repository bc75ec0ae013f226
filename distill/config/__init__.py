"""The configuration of a run: dataclasses in which a docstring below each field documents it.

Every component receives its own section, and the whole configuration is written to ``config.yaml`` in the run
folder. :mod:`distill.config.load` reads files, presets and overrides and suggests a name for a mistyped one.
The rules in this package need only the values of the settings; ``deploy/run/preflight/`` checks those that
need models, data or the machine. Neither torch nor transformers is imported, so ``distill --help`` and the
validation are instant.
"""

from distill.config.inputs import (
    EVALUATION_METRICS,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    StudentConfig,
    StudentInitConfig,
    TeacherConfig,
)
from distill.config.method import CreditConfig, CriticConfig, Loss, RecipeConfig
from distill.config.optimization import LearnerConfig, ProxyConfig, SftConfig
from distill.config.run import MethodConfig, RunConfig
from distill.config.runtime import (
    CheckpointConfig,
    ClusterConfig,
    ReplayConfig,
    RolloutConfig,
    ScoringConfig,
    TrackingConfig,
    WeightsConfig,
)

__all__ = [
    "EVALUATION_METRICS",
    "CheckpointConfig",
    "ClusterConfig",
    "CorpusConfig",
    "CreditConfig",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "Loss",
    "MethodConfig",
    "ProxyConfig",
    "RecipeConfig",
    "ReplayConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoringConfig",
    "SftConfig",
    "StudentConfig",
    "StudentInitConfig",
    "TeacherConfig",
    "TrackingConfig",
    "WeightsConfig",
]
