"""Running a model over batches of data without leaving a trace, and adding up what is measured."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn

from ..capture.patches import PlainAttention
from ..coupling.groups import Member
from ..errors import ExampleInputsError, ImportanceError
from ..files import told
from ..inputs import equal, normalize
from ..random_numbers import drawn

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""``loss(model, batch)``: a tensor of one number."""

Sums = dict[Any, torch.Tensor]
"""What was added up over batches; keys begin with the name of a parameter."""


def supervised(loss_fn: Callable[[Any, Any], torch.Tensor]) -> Loss:
    """A loss of model and batch made of one of output and target; batches are pairs ``(inputs, target)``.

    ``inputs`` is a tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        ImportanceError: when a batch is no pair.
    """

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ImportanceError(
                f"a loss of output and target needs batches (inputs, target), got {kind(batch)}. For other "
                f"batches give a function loss(model, batch)."
            )
        return loss_fn(_called(model, batch[0]), batch[1])

    return loss


def as_loss(loss: Any, owner: str) -> Loss:
    """``loss`` as a function of model and batch.

    A loss module (``nn.CrossEntropyLoss()``) and a function of ``torch.nn.functional`` are functions of
    output and target; anything else is one of model and batch.
    """
    if not callable(loss):
        raise ImportanceError(
            f"{owner} needs a loss, got {kind(loss)}: a function loss(model, batch) that returns one "
            f"number, or a loss of output and target such as torch.nn.CrossEntropyLoss()."
        )
    if isinstance(loss, type):
        raise ImportanceError(
            f"{owner} was given the class {loss.__name__} as loss; make one: {loss.__name__}()."
        )
    if isinstance(loss, nn.Module) or getattr(loss, "__module__", "") == "torch.nn.functional":
        return supervised(loss)
    return loss


def as_data(data: Any, owner: str) -> Iterable[Any]:
    """``data`` if it can be gone through batch by batch."""
    if isinstance(data, (torch.Tensor, Mapping, str)):
        raise ImportanceError(
            f"{owner} goes through data batch by batch, and got one {kind(data)}. For a single batch give a "
            f"list that holds it."
        )
    if not isinstance(data, Iterable):
        raise ImportanceError(
            f"{owner} needs data: batches in a list or a data loader. Got {kind(data)}. Without data, use a "
            f"criterion that only needs weights, such as 'l2'."
        )
    return data


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` on ``batch``: a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    inputs = tuple(batch) if type(batch) is list else batch
    try:
        return _called(model, inputs)
    except TypeError as error:
        if not isinstance(inputs, tuple) or len(inputs) < 2:
            raise
        raise ImportanceError(
            f"the model does not take a batch as its inputs, which is a {kind(batch)}: {error}. If it holds "
            f"targets, too, say how it is run: forward=lambda model, batch: model(batch[0])."
        ) from error


def _called(model: nn.Module, inputs: Any) -> Any:
    try:
        args, kwargs = normalize(inputs)
    except ExampleInputsError as error:
        raise ImportanceError(f"a batch cannot be given to the model: {error}") from error
    return model(*args, **kwargs)


def kind(value: Any) -> str:
    """What a batch is, in a word or two, for messages."""
    if isinstance(value, torch.Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def parameter_names(model: nn.Module) -> Callable[[Member], str | None]:
    """A function from a member to the (first) name of its parameter; None if the model has none like it."""
    named = list(model.named_parameters(remove_duplicate=False))
    by_tensor: dict[int, str] = {}
    for name, parameter in named:
        by_tensor.setdefault(id(parameter), name)
    by_name = {name: by_tensor[id(parameter)] for name, parameter in named}
    return lambda member: by_tensor.get(id(member.tensor), by_name.get(member.axis.name))


def collect(
    owner: str,
    model: nn.Module,
    data: Iterable[Any],
    step: Callable[[Any, Sums], None],
    seed: int,
    gradients: bool = True,
) -> tuple[Sums, int]:
    """What ``step(batch, sums)`` adds up over all batches of all ranks, and the number of batches.

    The model runs in evaluation mode. When it is over, also by an error, its modes, buffers, gradients and
    ``requires_grad`` are what they were, and so is the state of torch's random generators. Where
    ``torch.distributed`` is initialised, every rank gives its own data, and all get the same sums.

    Args:
        owner: the criterion, for messages and progress.
        model: the model.
        data: batches.
        step: is called for each batch.
        seed: for dropout and the like, and the shuffling of data loaders.
        gradients: whether gradients for all parameters are needed; if not, ``step`` runs without.

    Raises:
        ImportanceError: without a batch, where a sum is not finite, where another rank failed.
    """
    sums: Sums = {}
    count = 0
    try:
        if any(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()]):
            raise ImportanceError(
                f"{owner} has to run the model, which is on the meta device: load weights first."
            )
        with _undisturbed(model, seed, gradients):
            for batch in progress(data, owner):
                step(batch, sums)
                count += 1
    except Exception as error:
        across_ranks({}, 0, told(error))
        raise
    sums, count = across_ranks(sums, count, "")
    if not count:
        raise ImportanceError(
            f"{owner} got no batch: the data is empty. An iterator that was used before is empty, too; give "
            f"a list or a data loader."
        )
    for (name, *_), value in sums.items():
        if not bool(torch.isfinite(value).all()):
            raise ImportanceError(
                f"{owner} met NaN or infinity at the parameter {name!r}. Look at the loss and the data; in "
                f"float16 gradients overflow easily, use bfloat16 or float32."
            )
    return sums, count


def add(sums: Sums, key: Any, value: torch.Tensor) -> None:
    """Add ``value`` to the sum under ``key``, in single precision or better."""
    value = value.detach()
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    sums[key] = sums[key] + value if key in sums else value.clone()


def derivatives(
    owner: str, loss: torch.Tensor, parameters: Mapping[str, torch.Tensor], again: bool = False
) -> dict[str, torch.Tensor]:
    """Derivatives of a loss by the parameters that it depends on; ``again`` if they are to be derived, too.

    Raises:
        ImportanceError: if the loss is no number, or depends on no parameter.
    """
    value: Any = loss
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise ImportanceError(
            f"{owner}: the loss must be a real number as a tensor of one element, got {kind(value)}. Take "
            f"its mean or its sum over the batch."
        )
    found: tuple[torch.Tensor | None, ...] = ()
    if value.requires_grad:
        found = torch.autograd.grad(
            value.reshape(()), list(parameters.values()), allow_unused=True, create_graph=again
        )
    if all(gradient is None for gradient in found):
        raise ImportanceError(
            f"{owner}: the loss does not depend on the parameters of the model. Was it computed under "
            f"torch.no_grad, from detached outputs, or with another model than the one that was given?"
        )
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Real parameters by their first name."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point()}


# -- no trace -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(model: nn.Module, seed: int, gradients: bool) -> Iterator[None]:
    """Evaluation mode, seeded; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with drawn(seed), torch.set_grad_enabled(gradients), PlainAttention():
            model.eval()
            gc.enable()  # it rests while a plan is made, and would let go of no batch
            for parameter, _, _ in parameters:
                parameter.grad = None
                if gradients and parameter.is_floating_point():
                    _require_gradient(parameter)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required, gradient in parameters:
            parameter.grad = gradient
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not equal(buffer, value):
                    buffer.copy_(value)


def _require_gradient(parameter: nn.Parameter) -> None:
    try:
        parameter.requires_grad_(True)
    except RuntimeError as error:
        raise ImportanceError(f"a parameter of the model cannot have a gradient: {error}") from error


def progress(data: Iterable[Any], owner: str) -> Iterable[Any]:
    """The batches; on a terminal, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(data, owner, console=console, transient=True, disable=not console.is_terminal)


def across_ranks(sums: Sums, count: int, failure: str = "") -> tuple[Sums, int]:
    """Add up over all ranks of ``torch.distributed``, if it is initialised.

    A rank that failed takes part, so that no other waits for it.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return sums, count
    mine = (failure, count, {key: (tuple(value.shape), value.dtype) for key, value in sums.items()})
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    failed = [(rank, other[0]) for rank, other in enumerate(everyone) if other[0]]
    if failed:
        if failure:
            return sums, count  # it raises its own
        rank, what = failed[0]
        raise ImportanceError(f"rank {rank} failed while the scores were measured: {what}")
    shapes: dict[Any, list[Any]] = {}
    for _, _, keys in everyone:
        for key, described in keys.items():
            shapes.setdefault(key, []).append(described)
    device = next((value.device for value in sums.values()), torch.device("cpu"))
    if distributed.get_backend() == "nccl" and device.type == "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    total: Sums = {}
    for key in sorted(shapes, key=str):
        shape = torch.broadcast_shapes(*(shape for shape, _ in shapes[key]))
        own = sums.get(key, torch.zeros((), dtype=shapes[key][0][1], device=device))
        total[key] = own.expand(shape).clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total[key])
    return total, sum(count for _, count, _ in everyone)
