"""A run in fields: what they mean, how they are given, which values go together."""

from ki_ds.config.schema import (
    DataConfig as DataConfig,
)
from ki_ds.config.schema import (
    EngineConfig as EngineConfig,
)
from ki_ds.config.schema import (
    InheritConfig as InheritConfig,
)
from ki_ds.config.schema import (
    LossConfig as LossConfig,
)
from ki_ds.config.schema import (
    ModelConfig as ModelConfig,
)
from ki_ds.config.schema import (
    MonitorConfig as MonitorConfig,
)
from ki_ds.config.schema import (
    OptimConfig as OptimConfig,
)
from ki_ds.config.schema import (
    Precision as Precision,
)
from ki_ds.config.schema import (
    RunConfig as RunConfig,
)
from ki_ds.config.schema import (
    SourceConfig as SourceConfig,
)
from ki_ds.config.schema import (
    Task as Task,
)
from ki_ds.config.schema import (
    TeacherConfig as TeacherConfig,
)
from ki_ds.config.schema import (
    TrainConfig as TrainConfig,
)
from ki_ds.config.schema import (
    differences as differences,
)
from ki_ds.config.schema import (
    flatten as flatten,
)
from ki_ds.config.schema import (
    inherit_steps as inherit_steps,
)
from ki_ds.config.schema import (
    load as load,
)
from ki_ds.config.schema import (
    of_groups as of_groups,
)
from ki_ds.config.schema import (
    parse as parse,
)
from ki_ds.config.schema import (
    save as save,
)
from ki_ds.config.schema import (
    to_yaml as to_yaml,
)
from ki_ds.config.schema import (
    validate as validate,
)
