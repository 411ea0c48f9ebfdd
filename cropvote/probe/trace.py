"""The walk: one plain call of a fake model that sees every module at once, and finds the cut points.

A site is valid only where every path from the input to the output passes through it: the network is then front, site
and tail, and nothing of a sample reaches its prediction around the views. The walk follows the data through every
operation. Each tensor carries one bit per module, set while a path from the input leads to it that avoids that module;
the module clears its own bit in what it returns; a bit still set in the model's output is a path around that module.
Each argument of the call has bits of its own, so that it can be told which one finds the way.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import storage_key, tree_leaves, tree_map
from ..errors import CheckUnavailableError, PlainModelError, RowsError, SurgeryError
from ..images import BATCH, INPUT, Example, Spec, map_first_tensor
from ..layouts import AXES, LAYOUTS, Layout
from ..outputs import format_path, prediction_paths, tensors_of
from ..swapping import carrier_of, is_swapped, restore_forward, swap_forward, use_counts
from .fakes import RandomState, first_line
from .taint import TaintMode, ours, tensors_in

__all__: list[str] = []


def _inert(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
    return base.forward(module, *args, **kwargs)


def _is_batch(leaf: Any) -> bool:
    """Whether an argument of a call has a row per sample."""
    return isinstance(leaf, Spec) and leaf.shape[:1] == (-1,)


class _Seen(NamedTuple):
    """What the walk saw of a module's last call."""

    output: Any
    group: int
    moves: int  # how many of the walk's moves came before


class _Move(NamedTuple):
    """An operation that may put samples' data into another order."""

    operation: str
    inside: tuple[str, ...]  # the modules that were running


#: What picks or reorders; a table of positions or biases, which holds nothing of the images, may be picked from.
_MOVING = {"flip", "gather", "index", "index_select", "masked_select", "roll", "scatter", "sort", "take", "topk"}


class Walk:
    """What one plain call of a fake model, in its present mode, shows of every module."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model, self.example = model, example
        self.numbers_before = RandomState()
        named = model.named_modules(remove_duplicate=False)
        self.modules = {name: m for name, m in named if name and not isinstance(m, torch.jit.ScriptModule)}
        standings = use_counts(model)
        self.holders = {name: carrier_of(module, standings) for name, module in self.modules.items()}
        self.calls: dict[nn.Module, int] = {}
        self.seen: dict[nn.Module, _Seen] = {}
        self._grown: tuple[dict[nn.Module, tuple[int, ...]], ...] | None = None
        self._walk()

    def inputs(self, taint: TaintMode, bits: int, width: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call; what belongs to samples carries ``bits``, the n-th such tensor n widths higher."""
        batches = itertools.count()

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Spec):
                return leaf
            tensor = leaf.fake()
            if _is_batch(leaf):
                taint.set(tensor, bits << width * next(batches))
            return tensor

        return tree_map(fake, self.example[:2])

    def _walk(self) -> None:
        """Run once, every module's output replaced by a clone that clears the module's bit."""
        bit = {module: 1 << i for i, module in enumerate(dict.fromkeys(self.modules.values()))}
        width = len(bit) + 1  # one bit more, which no module clears
        sources = range(sum(map(_is_batch, tree_leaves(self.example[:2]))))
        clear = {module: ~sum(own << width * source for source in sources) for module, own in bit.items()}
        groups: dict[tuple[int, int], int] = {}
        keep: list[Tensor] = []
        stores: list[Any] = []  # the address of a freed storage would be given out again
        running: list[nn.Module] = []
        self.moves: list[_Move] = []
        handed_on: dict[int, list[nn.Module]] = {}  # modules that returned their input itself, by its storage
        self.changed_later: set[nn.Module] = set()

        def wrote(tensors: list[Tensor]) -> None:
            for tensor in tensors:
                self.changed_later.update(handed_on.get(storage_key(tensor)[1], ()))

        taint = TaintMode(lambda operation, args, taint: self._watch(operation, args, taint, running), wrote)

        def look(module: nn.Module, args: Any, output: Any) -> Any:
            return ours(see, module, args, output)

        def see(module: nn.Module, args: Any, output: Any) -> Any:
            running.remove(module)
            self.calls[module] = self.calls.get(module, 0) + 1
            self.seen[module] = _Seen(output, len(keep), len(self.moves))
            if not isinstance(output, Tensor):
                return None
            storage, key = storage_key(output)
            if any(storage_key(x)[1] == key for x in tensors_in(args)):
                handed_on.setdefault(key, []).append(module)
                stores.append(storage)
            group = groups.get((id(output), output._version), len(keep))
            clone = output.clone()
            taint.set(clone, taint.of(output) & clear[module])
            keep.append(clone)
            groups[id(clone), clone._version] = group
            self.seen[module] = _Seen(output, group, len(self.moves))
            return clone

        hooks = []
        try:
            hooks = [module.register_forward_hook(look) for module in bit]
            hooks += [module.register_forward_pre_hook(lambda module, args: running.append(module)) for module in bit]
            with taint:
                args, kwargs = self.inputs(taint, (1 << width) - 1, width)
                self.output = self.model(*args, **kwargs)
        except CheckUnavailableError:
            raise
        except Exception as error:
            hint = " (Without input_size= the first call is checked, with all its arguments.)"
            raise PlainModelError(
                f"{type(self.model).__name__} itself, without any split, failed on {self.asked()} (the check has "
                f"shapes and no values): {first_line(error)}"
                f"{hint if self.example.channels_first and isinstance(error, TypeError) else ''}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self.found = dict(tensors_of(self.output))
        self.numbers = [format_path(place) for place, x in self.found.items() if x.numel() == 1 and taint.of(x)]
        try:
            self.predictions = prediction_paths(self.output)
            around = taint.of(self.found[self.predictions[0]])
        except RowsError as error:
            self.predictions = []
            self.unclear = str(error)
            around = taint.of(list(self.found.values()))
        found = {module: [s for s in sources if around >> width * s & own] for module, own in bit.items()}
        self.around = {module: which for module, which in found.items() if which}  # by which of the call's batches

    def _watch(self, operation: str, args: Any, taint: TaintMode, running: list[nn.Module]) -> None:
        """Remember what may move the images' data: a pick from it, or several parts of it put together."""
        if operation == "cat":
            moves = sum(taint.of(x) > 0 for x in tensors_in(args)) > 1
        else:
            moves = operation in _MOVING and taint.of(args[0]) > 0
        if moves:
            names = {module: name for name, module in self.modules.items()}
            self.moves.append(_Move(operation, tuple(names[module] for module in running)))

    def operations(self, names: list[str] | None = None) -> list[str]:
        """The operations of a plain call; with the class of such sites' carriers and of the model swapped, or not."""
        found: list[str] = []
        swapped = [] if names is None else [self.model, *dict.fromkeys(self.holders[name] for name in names)]
        try:
            for module in swapped:
                swap_forward(module, _inert)
            self.numbers_before.put_back()  # what is drawn in Python decides alike in every run
            with TaintMode(lambda operation, args, taint: found.append(operation)):
                args, kwargs = self.inputs(TaintMode(), 0)
                self.model(*args, **kwargs)
        except SurgeryError:
            raise
        except Exception as error:
            return [*found, first_line(error)]
        finally:
            for module in swapped:
                if is_swapped(module):
                    restore_forward(module)
        return found

    def axes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The axes of a module's output that grow with the image's height, and with its width, where that shows."""
        if self._grown is None:
            self._grown = (self._grow(2), self._grow(3))
        base, found = self.shape(name), []
        for shapes in self._grown:
            shape = shapes.get(self.holders[name], ())
            found.append(tuple(i for i, (m, n) in enumerate(zip(base, shape, strict=False)) if m != n))
            if len(shape) != len(base) or not found[-1]:
                return None
        return found[0], found[1]

    def image_layout(self) -> Layout | None:
        """Where the channels of the images are, or None.

        The model takes images of another height or width further than images of other channels, which its first
        convolution refuses; or only one end of the shape is as long as that convolution's channels.
        """
        reached = [len(self._grow(axis)) for axis in (1, 2, 3)]
        least = min(reached)
        axes = tuple(i for i, count in enumerate(reached) if count > least)
        if len(axes) == 2:
            return AXES.get((axes[:1], axes[1:]))
        first = next((module for module in self.calls if isinstance(module, nn.Conv2d)), None)
        ends = [] if first is None else [self.shape(INPUT)[i] == first.in_channels for i in (0, 2)]
        return LAYOUTS[ends.index(True)] if ends.count(True) == 1 else None

    def _grow(self, axis: int) -> dict[nn.Module, tuple[int, ...]]:
        """What the modules return for images of twice the length along an axis, as far as the model takes them."""
        shapes: dict[nn.Module, tuple[int, ...]] = {}

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[module] = tuple(output.shape[1:])

        hooks = [module.register_forward_hook(look) for module in dict.fromkeys(self.holders.values())]
        try:
            args, kwargs = map_first_tensor(lambda x: torch.cat([x, x], axis), *self.inputs(TaintMode(), 0))
            self.model(*args, **kwargs)
        except CheckUnavailableError:
            raise
        except Exception:  # the network behind some module is made for one size: those before it were seen
            return shapes
        finally:
            for hook in hooks:
                hook.remove()
        return shapes

    def asked(self) -> str:
        shapes = [(BATCH, *leaf.shape[1:]) for leaf in tree_leaves(self.example[:2]) if isinstance(leaf, Spec)]
        mode = "training" if self.model.training else "eval"
        return f"an input of shape {', '.join(map(str, shapes))} in {mode} mode"

    def shape(self, name: str) -> tuple[int, ...]:
        if name == INPUT:
            return next(leaf.shape[1:] for leaf in tree_leaves(self.example[:2]) if isinstance(leaf, Spec))
        seen = self.seen.get(self.holders[name])
        return tuple(seen.output.shape[1:]) if seen and isinstance(seen.output, Tensor) else ()

    def why_not_images(self) -> str:
        """Why the model's input is no batch of images, or nothing."""
        shape = self.shape(INPUT)
        return "" if len(shape) == 3 else f"the first tensor of the call has {1 + len(shape)} axes; images have 4."

    def why_not_cut(self, name: str) -> str:
        """Why a module is no cut point, on every path once, or nothing."""
        holder = self.holders[name]
        calls = self.calls.get(holder, 0)
        if calls == 0:
            return f"it is never called in the model's forward (on {self.asked()})."
        if calls > 1:
            return f"it is called {calls} times in one forward, so each call would split again."
        output = self.seen[holder].output
        if not isinstance(output, Tensor):
            return f"it returns {type(output).__name__}; a site returns one tensor, a map of features."
        if output.dim() not in (3, 4):
            return (
                f"it returns shape {tuple(output.shape)}; a site returns a map, (N, C, H, W), or the tokens of one, "
                f"(N, L, C)."
            )
        if output.shape[0] != BATCH:
            return (
                f"its first axis has length {output.shape[0]} for {BATCH} samples; a site returns one map per sample."
            )
        if not output.numel():
            return f"its shape is {tuple(output.shape)}, which holds no values."
        if holder in self.changed_later:
            return (
                "it returns its input itself, which the model changes in place afterwards under another name, and the "
                "views would miss the change."
            )
        around = self.around.get(holder)
        several = sum(map(_is_batch, tree_leaves(self.example[:2]))) > 1
        if around and several and (around[0] > 0 or self.why_not_images()):
            return (
                f"the model's output also depends on the argument {self._argument(around[0])!r} by a path around it, "
                f"and only what passes the site is cut into views. In the model's own forward, split_views the map, "
                f"repeat_interleave the other tensor to one row per view, and vote."
            )
        if around:
            return (
                "the model's output also depends on the images by a path around it (a skip connection, a parallel "
                "branch or a gate), so a sample would reach its prediction past the views."
            )
        return ""

    def _argument(self, source: int) -> str:
        """The name of one of the call's batches of tensors, the images being number 0."""
        args, kwargs = self.example[:2]
        values = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
        return [name for name, value in values.items() for leaf in tree_leaves(value) if _is_batch(leaf)][source]

    def why_not_votable(self) -> str:
        """Why there is nothing to vote over, or nothing."""
        if self.numbers:
            asked = "labels" in self.example.kwargs
            return (
                f"the model returns a number for the whole batch ({self.numbers[0] or 'its output'}), computed before "
                f"the vote. "
                + (
                    "Call it without labels=, and compute the loss from its logits with CropVoteLoss (in Hugging "
                    "Face's Trainer: compute_loss_func=)."
                    if asked
                    else "Let it return predictions, (N, K), and compute the rest from them."
                )
            )
        if not self.predictions:
            return self.unclear
        for place in self.predictions:
            shape = tuple(self.found[place].shape)
            if len(shape) != 2 or shape[0] != BATCH:
                return (
                    f"the model returns shape {shape} for {BATCH} samples; cropvote votes over one row of K outputs "
                    f"per sample, (N, K){': for one output, (N, 1)' if shape == (BATCH,) else ''}."
                )
        return ""
