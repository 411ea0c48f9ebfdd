"""What an injected model remembers: its sites, its settings, and for which calls the sites were found to be valid."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..calling.options import Settings
from ..errors import InputTypeError, RowsError, SiteError, SurgeryError
from ..layouts import Layout, Tokens, token_count
from ..plans import parts_of
from .fakes import example_from_call
from .probe import check_sites
from .trials import Split
from .walk import INPUT

__all__: list[str] = []

TENSOR = "a tensor"
#: A kind of call: training or not, and the arguments, with what opens a path through the model: that one is a tensor,
#: or the value of a flag.
Arguments = tuple[tuple[str, Any], ...]
Call = tuple[bool, Arguments]
#: A kind of call, and the image's shape.
Size = tuple[Call, tuple[int, ...]]
FLAGS = (bool, int, float, str, type(None))


class Injection:
    """What an injected model and its sites share, and copies of them keep: a plain attribute of all.

    It is ``_cropvote`` in the model, and ``_cropvote_split`` in the modules that carry a split, whose number among the
    sites, in forward order, is their ``_cropvote_place``.
    """

    def __init__(self, stated: dict[str, Layout | None], settings: Settings, parameters: dict[str, Any]) -> None:
        self.sites = tuple(stated)  # in forward order, as the views of the settings are
        self.stated = stated  # the layouts, by the user, or None
        #: of each site the stated or found ones: several where images of other sizes give grids of other sizes
        self.layouts = tuple(() if layout is None else (layout,) for layout in stated.values())
        self.settings = settings
        self.parameters = parameters  # the names of the forward's arguments, with the defaults of flags
        self.checked: frozenset[Call] = frozenset()  # the kinds of call for which the site is known to be valid
        self.sizes: frozenset[Size] = frozenset()  # and with which sizes of image
        self.failure = ""
        self.root: weakref.ref[nn.Module] | None = None  # the model that votes, whose mode decides

    @property
    def site(self) -> str:
        """The sites, in words."""
        return repr(self.sites[0]) if len(self.sites) == 1 else " and ".join(map(repr, self.sites))

    @property
    def on_tokens(self) -> bool:
        """Whether a site's map is a grid of tokens."""
        return any(isinstance(layout, Tokens) for layouts in self.layouts for layout in layouts)

    def adopt(self, model: nn.Module) -> None:
        """Follow the mode of the model that votes; a shallow copy of it follows the first one's."""
        if self.root is None or self.root() is None:
            self.root = weakref.ref(model)

    @property
    def is_orphan(self) -> bool:
        """Whether it belongs to a copy of a part of a model, with which no model ever voted."""
        return self.root is None

    def training(self, module: nn.Module) -> bool:
        """The mode of the model that votes, for it or for the module that carries its split.

        Raises:
            SurgeryError: ``module`` is a shallow copy of that model, in the other mode.
        """
        root = None if self.root is None else self.root()
        if root is None:
            return module.training
        if module is not root and "_cropvote" in module.__dict__ and module.training != root.training:
            raise SurgeryError(
                f"this {type(module).__name__} is a shallow copy of an injected model, with which it shares the site, "
                f"and the two are in different modes: use copy.deepcopy."
            )
        return root.training

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which a copy finds for itself."""
        return {**self.__dict__, "root": None}

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """What of a call's arguments may open another path through the model; a default is as good as nothing."""
        names = (*self.parameters, *(f"*{i}" for i in range(len(self.parameters), len(args))))
        found: list[tuple[str, Any]] = []
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            if isinstance(value, Tensor):
                found.append((name, TENSOR))
            elif not isinstance(value, FLAGS) or value != self.parameters.get(name, TENSOR):
                found.append((name, _kind(value)))
        return tuple(found)

    def mark(self, modes: frozenset[bool], arguments: Arguments, size: tuple[int, ...]) -> None:
        """Remember that such calls were checked, with images of this size."""
        calls = frozenset((mode, arguments) for mode in modes)
        self.checked |= calls
        self.sizes |= {(call, tuple(size)) for call in calls}

    def is_checked(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether such a call was checked; for one image or one view also at this size."""
        call = (training, self.arguments(args, kwargs))
        if call not in self.checked:
            return False
        first = first_tensor(args, kwargs)
        if self.on_tokens:  # as many tokens may be another grid
            if torch._C._get_tracing_state() is not None:
                raise SurgeryError("torch.jit.trace would freeze the grid of the tokens: use torch.export.")
            known = [shape for kind, shape in self.sizes if kind == call]
            # one by one, since a compiler's sizes are symbols
            return any(all(m == n for m, n in zip(shape, first.shape[1:], strict=True)) for shape in known)
        if is_traced():
            return True
        broadcasts = first.shape[0] == 1 or self.settings.rows(training) == 1  # or a split that did not run hides
        return not broadcasts or (call, tuple(first.shape[1:])) in self.sizes

    def layout_at(self, place: int, x: Tensor) -> Layout | None:
        """The layout of the map at a site, of several grids that with so many tokens; None before the first check."""
        layouts = self.layouts[place]
        for layout in layouts:
            if not isinstance(layout, Tokens) or token_count(layout) == x.shape[1]:
                return layout
        return layouts[0] if layouts else None  # which the split refuses

    def learn(self, splits: list[Split]) -> None:
        """Remember the layouts of a check.

        Raises:
            SurgeryError: a map that cannot be told from the one of another check.
        """
        found = []
        for split, known in zip(splits, self.layouts, strict=True):
            for before in known:
                if before != split.layout and not _can_be_told(before, split.layout):
                    raise SurgeryError(
                        f"the map at {split.name!r} is {split.layout} for these images, but was {before} when it was "
                        f"checked: remove_crop_vote, and inject again with input_size= for this size."
                    )
            found.append(known if split.layout in known else (*known, split.layout))
        self.layouts = tuple(found)

    def check_carriers(self, model: nn.Module) -> None:
        """Where the splits that run cannot be counted: whether the modules that carry them are still there.

        Raises:
            RowsError: one was replaced since.
        """
        there = [m for m in model.modules() if getattr(m, "_cropvote_split", None) is self]
        if len(there) < len(self.sites) - (self.sites[0] == INPUT):
            raise RowsError(
                f"of the modules that carry the splits after {self.site}, {len(there)} are left: one was replaced "
                f"since the model was checked. remove_crop_vote, and inject again."
            )

    def check_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the site with the shapes of a real call; the mark is kept by copies.

        Raises:
            SiteError: it is no valid site for such a call.
            SurgeryError: the call runs under a compiler, or the map is another than the one checked before.
        """
        if self.failure:
            raise SiteError(self.failure)
        if is_traced():
            mode = "training" if model.training else "eval"
            raise SurgeryError(
                f"the site {self.site} was not yet checked in {mode} mode with such arguments, and cannot be while "
                f"the model is compiled, exported, traced or vmapped: pass input_size= to inject_crop_vote, or call it "
                f"once as it is."
            )
        arguments = self.arguments(args, kwargs)
        samples, *image = first_tensor(args, kwargs).shape
        sizes = {size for _, size in self.sizes}
        tokens = [layout for layout in self.stated.values() if isinstance(layout, Tokens)]
        if tokens and sizes and tuple(image) not in sizes:
            raise SurgeryError(
                f"{tokens[0]} was stated for images of another shape than {tuple(image)}: remove_crop_vote, and "
                f"inject again with the tokens of these."
            )
        try:
            example = example_from_call(args, kwargs, samples)
            plan = dict(zip(self.sites, parts_of(self.settings.views), strict=True))
            maps = [next((x for x in layouts if not isinstance(x, Tokens)), None) for layouts in self.layouts]
            known = {name: stated or found for (name, stated), found in zip(self.stated.items(), maps, strict=True)}
            modes, splits = check_sites(model, plan, known, example)
        except SiteError as error:
            # of several arguments, another's first axis may have the batch's length by chance
            if len(arguments) == 1 and not self.checked:
                self.failure = str(error)
            raise
        order = tuple(split.name for split in splits)
        if order != self.sites:
            raise SurgeryError(
                f"the forward reaches {' before '.join(map(repr, order))}, which the model defines in another order: "
                f"remove_crop_vote, and inject again with input_size=, which tells it before."
            )
        self.learn(splits)
        tensors = sum(kind == TENSOR for _, kind in arguments)
        if tensors == 1 or samples > 1:  # with one sample, an argument of length 1 may be of the sample or of the model
            self.mark(modes, arguments, tuple(image))


def _can_be_told(one: Layout, other: Layout) -> bool:
    """Whether the number of tokens tells which of two grids it is."""
    return isinstance(one, Tokens) and isinstance(other, Tokens) and token_count(one) != token_count(other)


def _kind(value: Any) -> Any:
    """What of an argument may open a path: a flag's value, whether a number is 0, what a container holds."""
    if isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, float):
        return bool(value)
    if isinstance(value, (*FLAGS, Enum)):
        return value
    if isinstance(value, Mapping):
        return tuple((key, _kind(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_kind(item) for item in value)
    return type(value).__name__


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """The names of the forward's arguments, in order, with the defaults of those that are flags or numbers."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind not in kinds]
    return {p.name: p.default if isinstance(p.default, FLAGS) else TENSOR for p in parameters}


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The batch of images."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    raise InputTypeError("the model was called without a tensor; cropvote reads the batch from the first one.")


def is_traced() -> bool:
    """Whether the call is compiled, exported, traced or vmapped, so that no check can run."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._functorch.maybe_current_level() is not None
    )
