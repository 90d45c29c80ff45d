"""The inheritance loss for one's own training loop: `from ki_ds.loss import inheritance_loss`."""

from ki_ds.objective.loss import *  # noqa: F403
from ki_ds.objective.loss import __all__ as __all__
