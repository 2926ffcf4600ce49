"""fxprune: a compiler pass over ``torch.fx`` graphs that makes trained networks physically narrower.

Nothing is imported before it is used, torch included, so that ``fxprune --help`` need not wait for it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional, regularize
    from .api import analyze, compensate, plan, prune
    from .calls import Calls, Returned
    from .coupling.explain import Removal, removable
    from .coupling.graph import CouplingGraph
    from .coupling.groups import Group, Member
    from .coupling.registry import register_module, register_rule, unregister
    from .dead_channels import lossless
    from .errors import FxpruneError, VerificationError
    from .exporting import export
    from .iterative import Step, schedule
    from .measure import Count, count
    from .module_registry import Registration
    from .planning.budget import Budget
    from .planning.plan import PruningPlan
    from .planning.selection import Selection
    from .pretrained import Saved, from_pretrained, save_pretrained
    from .saving import load, save
    from .verification import Verdict, verify

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Calls",
    "Count",
    "CouplingGraph",
    "FxpruneError",
    "Group",
    "Member",
    "PruningPlan",
    "Registration",
    "Removal",
    "Returned",
    "Saved",
    "Selection",
    "Step",
    "Verdict",
    "VerificationError",
    "analyze",
    "compensate",
    "count",
    "export",
    "from_pretrained",
    "functional",
    "load",
    "lossless",
    "plan",
    "prune",
    "register_module",
    "register_rule",
    "regularize",
    "removable",
    "save",
    "save_pretrained",
    "schedule",
    "unregister",
    "verify",
]

_MODULES = {
    "analyze": "api",
    "compensate": "api",
    "plan": "api",
    "prune": "api",
    "Calls": "calls",
    "Returned": "calls",
    "Removal": "coupling.explain",
    "removable": "coupling.explain",
    "CouplingGraph": "coupling.graph",
    "Group": "coupling.groups",
    "Member": "coupling.groups",
    "register_module": "coupling.registry",
    "register_rule": "coupling.registry",
    "unregister": "coupling.registry",
    "lossless": "dead_channels",
    "FxpruneError": "errors",
    "VerificationError": "errors",
    "export": "exporting",
    "Step": "iterative",
    "schedule": "iterative",
    "Count": "measure",
    "count": "measure",
    "Registration": "module_registry",
    "Budget": "planning.budget",
    "PruningPlan": "planning.plan",
    "Selection": "planning.selection",
    "Saved": "pretrained",
    "from_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "load": "saving",
    "save": "saving",
    "Verdict": "verification",
    "verify": "verification",
}
"""Where the public names are that are no modules."""


if not TYPE_CHECKING:  # so that a type checker knows what there is not

    def __getattr__(name: str) -> Any:
        """The public name, or the submodule, of this name: imported when it is asked for."""
        if name in _MODULES:
            value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
