"""A run in fields: what they mean, how they are given, which values go together."""

from ki_ds.config.paper import Task
from ki_ds.config.parsing import load, of_groups, parse, save, to_yaml
from ki_ds.config.rules import check_entries, differences, is_operational, validate
from ki_ds.config.schema import (
    DataConfig,
    EngineConfig,
    InheritConfig,
    LossConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    Precision,
    RunConfig,
    SourceConfig,
    TeacherConfig,
    TeacherEntry,
    TrainConfig,
    flatten,
    inherit_steps,
)

__all__ = [
    "DataConfig",
    "EngineConfig",
    "InheritConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "Precision",
    "RunConfig",
    "SourceConfig",
    "Task",
    "TeacherConfig",
    "TeacherEntry",
    "TrainConfig",
    "check_entries",
    "differences",
    "flatten",
    "inherit_steps",
    "is_operational",
    "load",
    "of_groups",
    "parse",
    "save",
    "to_yaml",
    "validate",
]
