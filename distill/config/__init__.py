"""The configuration of a run: dataclasses with a meaning and a unit under each field.

Read by every part (each receives its own section), written to ``config.yaml`` in the run
folder. :mod:`distill.config.load` reads files, presets and overrides, and names a mistyped key;
the rules here are the ones that need nothing but the numbers. Imports neither torch nor
transformers, so ``distill --help`` and validation are instant.
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
    "WeightsConfig",
]
