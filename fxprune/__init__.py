"""fxprune: a compiler pass over ``torch.fx`` graphs that makes trained networks physically narrower."""

from . import functional, regularize
from .api import analyze, compensate, plan, prune
from .coupling.explain import Removal, removable
from .coupling.graph import CouplingGraph
from .coupling.groups import Group, Member
from .coupling.registry import register_module, register_rule, unregister
from .errors import FxpruneError, VerificationError
from .iterative import Step, schedule
from .measure import Count, count
from .module_registry import Registration
from .planning.budget import Budget
from .planning.plan import PruningPlan
from .planning.selection import Selection
from .saving import load, save
from .verify import Verdict, verify

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Count",
    "CouplingGraph",
    "FxpruneError",
    "Group",
    "Member",
    "PruningPlan",
    "Registration",
    "Removal",
    "Selection",
    "Step",
    "Verdict",
    "VerificationError",
    "analyze",
    "compensate",
    "count",
    "functional",
    "load",
    "plan",
    "prune",
    "register_module",
    "register_rule",
    "regularize",
    "removable",
    "save",
    "schedule",
    "unregister",
    "verify",
]
