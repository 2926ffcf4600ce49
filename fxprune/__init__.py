"""fxprune: a compiler pass over ``torch.fx`` graphs that makes trained networks physically narrower."""

from .api import analyze, plan, prune
from .cost import Count, count
from .coupling.graph import CouplingGraph
from .coupling.groups import Group, Member
from .errors import FxpruneError
from .planning.plan import PruningPlan

__version__ = "0.1.0"
__all__ = [
    "Count",
    "CouplingGraph",
    "FxpruneError",
    "Group",
    "Member",
    "PruningPlan",
    "analyze",
    "count",
    "plan",
    "prune",
]
