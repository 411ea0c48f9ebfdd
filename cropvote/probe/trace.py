"""The trace: one plain call of a fake model that sees every module at once, and what it shows.

A site is valid only if every path from the input to the output passes through it: the network is then front, site and
tail, and nothing of a sample reaches its prediction around the views. The trace follows the data through every
operation. Each tensor carries one bit per module, set if a path from the input leads to it that avoids that module; the
module clears its own bit in what it returns; a bit still set in the model's output is a path around that module. Each
argument of the call has bits of its own, so that an error can name the argument that goes around.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import storage_key, tree_leaves, tree_map
from ..errors import CheckUnavailableError, PlainModelError, Reason, RowsError
from ..images import BATCH, INPUT, Example, Spec
from ..outputs import KeyPath, format_path, prediction_paths, tensors_of
from ..swapping import carrier_of, use_counts
from .fakes import RandomState, first_line
from .mode import ours, tensors_in
from .taint import Taint

__all__: list[str] = []

#: Operations that pick or reorder. Picking from a table of positions or biases, which holds no image data, is harmless.
_MOVING = {"flip", "gather", "index", "index_select", "masked_select", "roll", "scatter", "sort", "take", "topk"}


class Return(NamedTuple):
    """What a module returned in its last call."""

    output: Any
    group: int  # the same for modules that returned the same tensor; ascends in forward order
    n_moves: int  # how many of the trace's moves came before


class Move(NamedTuple):
    """An operation that may put image data into another order."""

    operation: str
    inside: tuple[str, ...]  # the modules that were running


@dataclass(eq=False)
class Trace:
    """What one plain call of a fake model, in its present mode, showed.

    Fields:
        model: the fake model.
        example: the arguments of the call.
        modules: every module inside the model, by name.
        carriers: the module that would carry the split of each site, by the site's name.
        calls: how often each module was called.
        returns: what each module returned, in forward order.
        moves: the operations that may have moved image data, in order.
        changed_later: the modules that returned data which was written afterwards under another name.
        tensors: the tensors in the model's output, by their paths.
        predictions: the paths of those to vote over; empty if ``no_predictions`` says why.
        scalars: the names of the outputs that are one number for the whole batch.
        around: the arguments whose data reached the prediction around a module, by module.
        numbers: the random numbers' state before the call.
        memo: verdicts and shapes that were computed from this trace, so that none is computed twice.
    """

    model: nn.Module
    example: Example
    modules: dict[str, nn.Module] = field(default_factory=dict)
    carriers: dict[str, nn.Module] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    returns: dict[nn.Module, Return] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    changed_later: set[nn.Module] = field(default_factory=set)
    tensors: dict[KeyPath, Tensor] = field(default_factory=dict)
    predictions: list[KeyPath] = field(default_factory=list)
    no_predictions: Reason | None = None
    scalars: list[str] = field(default_factory=list)
    around: dict[nn.Module, list[int]] = field(default_factory=dict)
    numbers: RandomState = field(default_factory=RandomState)
    memo: dict[Any, Any] = field(default_factory=dict)

    def shape(self, site: str) -> tuple[int, ...]:
        """Return the shape of a site's map without the batch; () if the site returned no tensor."""
        if site == INPUT:
            arguments = (*self.example.args, *self.example.kwargs.values())
            return next(leaf.shape[1:] for leaf in arguments if isinstance(leaf, Spec) and leaf.shape)
        record = self.returns.get(self.carriers[site])
        return tuple(record.output.shape[1:]) if record and isinstance(record.output, Tensor) else ()

    def turn(self, site: str) -> int:
        """Return when the forward reaches a site; the same for modules that return the same tensor."""
        if site == INPUT:
            return -1
        record = self.returns.get(self.carriers[site])
        return record.group if record else 1 << 60

    def describe_call(self) -> str:
        """Return the call as text, for errors."""
        shapes = [(BATCH, *leaf.shape[1:]) for leaf in tree_leaves(self.example[:2]) if isinstance(leaf, Spec)]
        mode = "training" if self.model.training else "eval"
        return f"an input of shape {', '.join(map(str, shapes))} in {mode} mode"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_batch(leaf: Any) -> bool:
    """Return whether an argument of a call has a row per sample."""
    return isinstance(leaf, Spec) and leaf.shape[:1] == (-1,)


def fake_arguments(
    example: Example, taint: Taint, bits: int = 0, width: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call; the n-th that has a row per sample carries ``bits``, n widths higher."""
    batches = itertools.count()

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Spec):
            return leaf
        tensor = leaf.fake()
        if is_batch(leaf):
            taint.set(tensor, bits << width * next(batches))
        return tensor

    return tree_map(fake, example[:2])


def record_trace(model: nn.Module, example: Example) -> Trace:
    """Run a fake model once, every module's output replaced by a clone that clears the module's bit.

    Raises:
        PlainModelError: the model does not run on images of that size.
    """
    trace = Trace(model, example)
    named = model.named_modules(remove_duplicate=False)
    trace.modules = {name: m for name, m in named if name and not isinstance(m, torch.jit.ScriptModule)}
    counts = use_counts(model)
    trace.carriers = {name: carrier_of(module, counts) for name, module in trace.modules.items()}
    names = {module: name for name, module in trace.modules.items()}

    bit = {module: 1 << i for i, module in enumerate(dict.fromkeys(trace.modules.values()))}
    width = len(bit) + 1  # one bit more, which no module clears
    arguments = range(sum(map(is_batch, tree_leaves(example[:2]))))
    clear = {module: ~sum(own << width * i for i in arguments) for module, own in bit.items()}
    groups: dict[tuple[int, int], int] = {}
    clones: list[Tensor] = []
    stores: list[Any] = []  # kept, since the address of a freed storage would be given out again
    running: list[nn.Module] = []
    handed_on: dict[int, list[nn.Module]] = {}  # the modules that returned a storage

    def watch(operation: str, args: Any, taint: Taint) -> None:
        if operation == "cat":  # several parts of the image put together
            moves = sum(taint.of(x) > 0 for x in tensors_in(args)) > 1
        else:
            moves = operation in _MOVING and taint.of(args[0]) > 0
        if moves:
            trace.moves.append(Move(operation, tuple(names[module] for module in running)))

    def wrote(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            trace.changed_later.update(handed_on.get(storage_key(tensor)[1], ()))

    taint = Taint(watch, wrote)

    def record(module: nn.Module, args: Any, output: Any) -> Any:
        running.remove(module)
        trace.calls[module] = trace.calls.get(module, 0) + 1
        if not isinstance(output, Tensor):
            trace.returns[module] = Return(output, len(clones), len(trace.moves))
            return None
        storage, key = storage_key(output)
        handed_on.setdefault(key, []).append(module)  # the model gets a clone: whoever writes there has another name
        stores.append(storage)
        group = groups.get((id(output), _version(output)), len(clones))
        trace.returns[module] = Return(output, group, len(trace.moves))
        clone = output.clone()
        taint.set(clone, taint.of(output) & clear[module])
        clones.append(clone)
        groups[id(clone), _version(clone)] = group
        return clone

    hooks = [module.register_forward_hook(lambda *call: ours(record, *call)) for module in bit]
    hooks += [module.register_forward_pre_hook(lambda module, args: running.append(module)) for module in bit]
    try:
        with taint:
            args, kwargs = fake_arguments(example, taint, (1 << width) - 1, width)
            output = model(*args, **kwargs)
    except CheckUnavailableError:
        raise
    except Exception as error:
        hint = " (Without input_size= the first call is checked, with all its arguments.)"
        raise PlainModelError(
            "CV414",
            f"{type(model).__name__} itself, without any split, failed on {trace.describe_call()} (the check has "
            f"shapes and no values): {first_line(error)}"
            f"{hint if example.channels_first and isinstance(error, TypeError) else ''}",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()

    trace.tensors = dict(tensors_of(output))
    trace.scalars = [format_path(path) for path, x in trace.tensors.items() if x.numel() == 1 and taint.of(x)]
    try:
        trace.predictions = prediction_paths(output)
        left = taint.of(trace.tensors[trace.predictions[0]])
    except RowsError as error:
        trace.no_predictions = Reason(error.code, error.message)
        left = taint.of(list(trace.tensors.values()))
    around = {module: [i for i in arguments if left >> width * i & own] for module, own in bit.items()}
    trace.around = {module: which for module, which in around.items() if which}
    return trace
