"""Every error that a user can cause, one class a kind.

A message says what went wrong, where, why, and what to do next. Anything else that escapes the
library is a defect of the library.
"""

from __future__ import annotations


class FxpruneError(Exception):
    """Base class of all errors that fxprune raises on purpose."""


class CaptureError(FxpruneError):
    """The model could not be turned into a graph."""


class ExampleInputsError(FxpruneError):
    """The example inputs do not fit the model."""


class PinnedError(FxpruneError, ValueError):
    """The inputs differ from the example in something that the captured graph holds fixed."""


class RatioError(FxpruneError, ValueError):
    """A ratio lies outside ``0 <= ratio < 1``."""


class SelectionError(FxpruneError, ValueError):
    """A layer is unknown, or an argument that says what to narrow is malformed."""


class BudgetError(FxpruneError, ValueError):
    """A budget is malformed, contradicts another argument, or cannot be met."""


class ImportanceError(FxpruneError, ValueError):
    """An importance is unknown, or returned something that is no score."""


class CalibrationError(FxpruneError, ValueError):
    """Calibration data are empty, used up, or do not fit the model."""


class PlanError(FxpruneError):
    """A plan is malformed, or does not belong to the model that it is applied to."""


class TrainingError(FxpruneError):
    """A regulariser or the state of an optimiser does not fit the model."""


class AxisError(FxpruneError, LookupError):
    """A parameter, a dimension or an index that the graph does not have."""


class ChannelError(FxpruneError, ValueError):
    """Channels that a layer does not have, or cannot lose by itself."""


class ModeError(FxpruneError):
    """A result was put into a mode, or a mix of modes, in which its model could not be captured."""


class RewriteError(FxpruneError):
    """A graph could not be rewritten although every offending axis was frozen."""


class VerificationError(FxpruneError):
    """A pruned network does not compute what the masked original computes."""


class RuleError(FxpruneError, ValueError):
    """The rule of an operator or module is no rule, was registered twice, or does not fit what it is for."""


class CheckpointError(FxpruneError):
    """A checkpoint could not be read, or does not fit the model."""


class ModelSpecError(FxpruneError):
    """The name of a model on the command line could not be resolved."""


class OutputError(FxpruneError):
    """A result could not be written."""
