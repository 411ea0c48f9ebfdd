"""What an injected model remembers, and the forwards that it and its sites get."""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_in_backward, is_jit_tracing, is_recorded
from ..call import Call, call_by, check_splits_ran, current, cut_views, running, vote_output
from ..cuts import Cuts, parts_of
from ..errors import CropVoteError, RowsError, SiteError, SurgeryError, ViewsError
from ..images import INPUT, first_tensor, map_first_tensor
from ..layouts import Layout, Tokens, token_count
from ..options import Settings
from ..probe.trial import Split
from ..tracking import Tracked, Watch, plain, track, track_all
from .checking import TENSOR, check_call, check_recorded, explain_failure, has_compiled_parts, is_traced

__all__: list[str] = []

#: What of a call's arguments can change the model's control flow.
ArgumentKey = tuple[tuple[str, Any], ...]
#: The memo key of a checked call: training or not, and its arguments.
CallKey = tuple[bool, ArgumentKey]
FLAGS = (bool, int, float, str, type(None))
#: How many kinds of call, and how many sizes of image, are remembered.
MOST_CALLS, MOST_SIZES = 64, 256


class Injection:
    """What an injected model and its sites share, and copies of them keep: a plain attribute of all.

    It is ``_cropvote`` in the model, and ``_cropvote_split`` in the modules that carry a split, whose index among the
    sites, in forward order, is their ``_cropvote_index``.

    Fields:
        sites: the names of the sites, in forward order, as the views of the settings are.
        user_layouts: the layout that the user stated for each site, or None.
        layouts: the layouts known at each site: several if images of other sizes give other grids of tokens.
        layouts_by_size: the layout at each site, by the shape of an image, if they are grids of tokens.
        settings: the options.
        input_size: the size of the images, if the user stated it.
        parameters: the names of the forward's arguments, with the defaults of flags.
        check: False if the user said so: nothing is checked on a fake copy.
        checked: the kinds of call for which the sites are known to be valid.
        tracking: whether calls that could hide a path are tracked; if not, they are checked once for each size.
        tracked_once: whether such a call has run to its end.
        checked_sizes: the mode and the shape of an image of such calls that were checked.
        site_error: why the site is invalid, if it is.
        used_cuts: the last few cuts of calls with gradients.
        draws: the states of the random numbers from which the last calls drew views.
        root: the model that votes, whose mode decides.
    """

    def __init__(
        self,
        user_layouts: dict[str, Layout | None],
        settings: Settings,
        parameters: dict[str, Any],
        check: bool = True,
        input_size: int | tuple[int, ...] | None = None,
    ) -> None:
        self.sites = tuple(user_layouts)
        self.user_layouts = user_layouts
        self.layouts = tuple(() if layout is None else (layout,) for layout in user_layouts.values())
        self.layouts_by_size: dict[tuple[int, ...], tuple[Layout, ...]] = {}
        self.settings = settings
        self.input_size = input_size
        self.parameters = parameters
        self.images_only: ArgumentKey = ((next(iter(parameters), "*0"), TENSOR),)
        self.check = self.tracking = check
        self.tracked_once = False
        self.checked: dict[CallKey, None] = {}
        self.checked_sizes: dict[tuple[bool, tuple[int, ...]], None] = {}
        self.site_error: tuple[str, str] | None = None
        self.used_cuts: tuple[Cuts, ...] = ()
        self.draws: deque[int] = deque(maxlen=1000)
        self.root: weakref.ref[nn.Module] | None = None
        if not check:
            self.layouts = tuple(known or ("NCHW",) for known in self.layouts)

    @property
    def site(self) -> str:
        """Return the sites as text."""
        return repr(self.sites[0]) if len(self.sites) == 1 else " and ".join(map(repr, self.sites))

    @property
    def on_tokens(self) -> bool:
        """Return whether a site's map is a grid of tokens."""
        return any(isinstance(layout, Tokens) for layouts in self.layouts for layout in layouts)

    def set_root(self, model: nn.Module) -> None:
        """Follow the mode of the model that votes; a shallow copy of it follows the first one's."""
        if self.root is None or self.root() is None:
            self.root = weakref.ref(model)

    @property
    def is_orphan(self) -> bool:
        """Return whether it belongs to a copy of part of a model, with which no model ever voted."""
        return self.root is None

    def training(self, module: nn.Module) -> bool:
        """Return the mode of the model that votes, for it or for the module that carries its split.

        Raises:
            SurgeryError: ``module`` is a shallow copy of that model, in the other mode.
        """
        root = None if self.root is None else self.root()
        if root is None:
            return module.training
        if module is not root and "_cropvote" in module.__dict__ and module.training != root.training:
            raise SurgeryError(
                "CV419",
                f"this {type(module).__name__} is a shallow copy of an injected model, with which it shares the site, "
                f"and the two are in different modes: use copy.deepcopy.",
            )
        return root.training

    def __repr__(self) -> str:
        """Return the sites and the settings that differ from the defaults, as ``repr(model)`` shows them."""
        defaults = vars(Settings(views=self.settings.views))
        changed = {k: v for k, v in vars(self.settings).items() if not k.startswith("_") and v != defaults[k]}
        options = {"after": dict(zip(self.sites, parts_of(self.settings.views), strict=True)), **changed}
        return f"cropvote: {', '.join(f'{name}={value!r}' for name, value in options.items())}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which a copy finds for itself, and without what only this process needs."""
        return {**self.__dict__, "root": None, "used_cuts": (), "draws": deque(maxlen=1000)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if set(state) != set(Injection({}, Settings(), {}).__dict__):
            raise SurgeryError(
                "CV411",
                "this model was pickled by another version of cropvote: load its state_dict into a newly "
                "injected model.",
            )
        self.__dict__.update(state)

    # --- which calls were checked

    def argument_key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentKey:
        """Return the arguments that can change the model's control flow; those left at their defaults are skipped."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and self.parameters:
            return self.images_only
        names = (*self.parameters, *(f"*{i}" for i in range(len(self.parameters), len(args))))
        key: list[tuple[str, Any]] = []
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            if isinstance(value, Tensor):
                key.append((name, TENSOR))
            elif not isinstance(value, FLAGS) or value != self.parameters.get(name, TENSOR):
                key.append((name, _kind(value)))
        return tuple(key)

    def in_order(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments in the forward's order, whatever the caller's."""
        if len(kwargs) < 2:
            return kwargs
        return {**{name: kwargs[name] for name in self.parameters if name in kwargs}, **kwargs}

    def add_checked(
        self,
        modes: frozenset[bool],
        key: ArgumentKey,
        image: tuple[int, ...],
        splits: list[Split],
        counted: bool = True,
    ) -> None:
        """Remember the layouts that a check found, and if ``counted`` that such calls were checked."""
        layouts = [split.layout for split in splits]
        self.layouts = tuple(
            known if layout in known else (*known, layout) for known, layout in zip(self.layouts, layouts, strict=True)
        )
        if self.on_tokens:
            self.layouts_by_size = _last({**self.layouts_by_size, tuple(image): tuple(layouts)}, MOST_SIZES)
        if counted:
            self.checked = _last({**self.checked, **{(mode, key): None for mode in modes}}, MOST_CALLS)

    def ensure_checked(
        self, model: nn.Module, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Check the sites unless such a call was checked, and look up the grids of an image of this size."""
        if not self.check:
            return
        key = (model.training, self.argument_key(args, kwargs))
        if key not in self.checked or self.site_error:
            check_call(self, model, args, kwargs)
        if not self.on_tokens:
            return
        image = first_tensor(args, kwargs).shape[1:]
        layouts = self._layouts_for(image)
        if layouts is None:
            check_call(self, model, args, kwargs)
            layouts = self._layouts_for(image)
        if call is not None:
            call.layouts = layouts

    def _layouts_for(self, image: tuple[int, ...]) -> tuple[Layout, ...] | None:
        """Return the layout at each site for an image of this shape, if it is known."""
        if is_jit_tracing():
            raise SurgeryError("CV505", "torch.jit.trace would freeze the grid of the tokens: use torch.export.")
        for known, layouts in self.layouts_by_size.items():  # one by one, since a compiler's sizes are symbols
            if len(known) == len(image) and all(m == n for m, n in zip(known, image, strict=True)):
                return layouts
        return None

    # --- one forward

    def vote(self, model: nn.Module, base: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the model, check what it did, and vote."""
        self.ensure_checked(model, call, args, kwargs)
        images = args[0] if args and type(args[0]) is Tensor and args[0].dim() else first_tensor(args, kwargs)
        if torch.is_grad_enabled():
            self.check_recomputation(call.cuts)
        one_row = call.cuts.keep_number or (type(images.shape[0]) is int and images.shape[0] == 1)  # traced: a tensor
        if one_row and self.check and not is_traced():
            return self._vote_on_one_row(model, base, call, args, kwargs, images)
        return self._vote(model, base, call, args, kwargs, images)

    def _vote(
        self, model: nn.Module, base: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor
    ) -> Any:
        given = args, kwargs
        if self.sites[0] == INPUT:
            args, kwargs = map_first_tensor(lambda x: self.split(0, x, call), args, kwargs)
        try:
            output = base.forward(model, *args, **kwargs)
        except CropVoteError:
            raise
        except RuntimeError as error:
            explain_failure(self, model, *given, error)
            raise
        if call.ran != list(range(len(call.cuts.at))):
            check_splits_ran(call, not call.requested and has_compiled_parts(model))
        return vote_output(call, output, images)

    def _vote_on_one_row(
        self, model: nn.Module, base: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor
    ) -> Any:
        """Run a call in which a path around a site would not fail: with tracked data, or checked at this size.

        Raises:
            SiteError: data of the images reached the prediction by a path around a site.
        """
        if self.tracking and type(images) is Tensor and not has_compiled_parts(model):
            before = None if self.tracked_once and not model.training else _State(model, images)
            try:
                with Watch() as watch:
                    given = track_all(args, images.shape[0]), track_all(kwargs, images.shape[0])
                    output = self._vote(model, base, call, *given, images)
            except CropVoteError:
                raise
            except Exception:  # the model may not take tensors of another class: run it as it is
                call.ran, call.leaked = [], False
                if before is not None:
                    before.put_back()
                output = self._vote_checked(model, base, call, args, kwargs, images)
                self.tracking = False
                return output
            else:
                self.tracked_once = True
                if not call.leaked and not watch.wrote:
                    return output
                check_call(self, model, args, kwargs)  # which says where the path is
                if call.leaked:
                    raise SiteError(
                        "CV154",
                        f"after={self.site}: in this call the prediction also depends on the images by a path around "
                        f"it, which is not there every time (it depends on a count, a random number or the time).",
                    )
                self.tracking = False  # ordinary tensors do not remember what was written into them
                return output
        return self._vote_checked(model, base, call, args, kwargs, images)

    def _vote_checked(
        self, model: nn.Module, base: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor
    ) -> Any:
        """Run a call whose sites are checked once for each size of image."""
        size = (model.training, tuple(images.shape[1:]))
        if size not in self.checked_sizes:
            check_call(self, model, args, kwargs)
            self.checked_sizes = _last({**self.checked_sizes, size: None}, MOST_SIZES)
        return self._vote(model, base, call, args, kwargs, images)

    def check_recomputation(self, cuts: Cuts) -> None:
        """Remember the cuts of a call with gradients; checkpointing must run it again with the same.

        Raises:
            RowsError: a backward pass runs a part again, with cuts that no call had.
        """
        known = any(used is cuts for used in self.used_cuts)
        if not is_in_backward():
            if not known:
                self.used_cuts = (*self.used_cuts[-7:], cuts)
        elif self.used_cuts and not known:
            raise RowsError(
                "CV321",
                "checkpointing runs a part of the model again in the backward pass, and meanwhile the model's mode, "
                "eval_views, train_views or enabled has changed: change it after backward().",
            )

    def check_draw(self) -> None:
        """Remember the random numbers from which views are drawn; checkpointing must draw from the same again.

        Raises:
            RowsError: a backward pass runs a part again, with other random numbers.
        """
        state = hash(torch.get_rng_state().numpy().tobytes())
        if not is_in_backward():
            self.draws.append(state)
        elif self.draws and state not in self.draws:
            raise RowsError(
                "CV322",
                "checkpointing runs a part of the model again in the backward pass with other random numbers, so "
                "train_views would draw other views there: use checkpoint(..., preserve_rng_state=True), which is "
                "PyTorch's default.",
            )

    def split(self, index: int, x: Tensor, call: Call) -> Tensor:
        """Cut the views of a call at one site."""
        call.ran.append(index)
        is_tracked = type(x) is Tracked
        if is_tracked:
            call.leaked |= x.passed < index  # type: ignore[attr-defined]
            x = plain(x)
        layout = call.layouts[index] if call.layouts else self.layout_of(index, x)
        if call.cuts.at[index].n_random is not None and type(x) is Tensor and not is_recorded():
            self.check_draw()
        try:
            views = cut_views(call.cuts.at[index], x, layout)
        except ViewsError as error:
            where = f"at the site {self.sites[index]!r}, on a map {tuple(x.shape)}"
            lone = self.sites[index] == INPUT and x.dim() == 3
            advice = " For a single image, add the axis of the batch: image[None]." if lone else ""
            raise ViewsError(error.code, f"{where}: {error.message}{advice}") from error
        return track(views, index + 1) if is_tracked and index < len(call.cuts.at) - 1 else views

    def layout_of(self, index: int, x: Tensor) -> Layout:
        """Return the layout at a site; if several grids of tokens are known, the one with this number of tokens.

        Raises:
            SurgeryError: the site was not yet checked.
        """
        layouts = self.layouts[index]
        for layout in layouts:
            if not isinstance(layout, Tokens) or token_count(layout) == x.shape[1]:
                return layout
        if not layouts:
            raise SurgeryError(
                "CV420",
                f"the site {self.site} was not yet checked, so where its channels are is not known: call the model "
                f"itself once, or pass input_size= to inject_crop_vote.",
            )
        return layouts[0]  # which the split refuses


def vote_forward(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the injected model's forward."""
    injection: Injection | None = module.__dict__.get("_cropvote")
    if injection is None:  # a new instance of the swapped class
        return base.forward(module, *args, **kwargs)
    kwargs = injection.in_order(kwargs)
    if torch.compiler.is_compiling():
        return _recorded_forward(module, base, injection, args, kwargs)
    with running(injection.settings, injection.training(module)) as call:
        if not call.cuts.at:
            return base.forward(module, *args, **kwargs)
        return injection.vote(module, base, call, args, kwargs)


def _recorded_forward(
    module: nn.Module, base: Any, injection: Injection, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the injected model's forward under a compiler, which knows no stack of calls."""
    call = call_by(injection.settings, injection.training(module))
    if not call.cuts.at:
        return base.forward(module, *args, **kwargs)
    images = first_tensor(args, kwargs)
    injection.ensure_checked(module, None, args, kwargs)
    check_recorded(injection, module)
    if injection.sites[0] == INPUT:
        args, kwargs = map_first_tensor(lambda x: injection.split(0, x, call), args, kwargs)
    return vote_output(call, base.forward(module, *args, **kwargs), images)


def split_forward(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module that carries a split."""
    output = base.forward(module, *args, **kwargs)
    injection: Injection | None = module.__dict__.get("_cropvote_split")
    if injection is None or injection.is_orphan:
        return output
    call = None if torch.compiler.is_compiling() else current(injection.settings)
    if call is None:  # a part of the model runs by itself, or again in the backward pass, or a compiler records
        call = call_by(injection.settings, injection.training(module))
        if not torch.compiler.is_compiling() and is_in_backward():
            injection.check_recomputation(call.cuts)
    return injection.split(module.__dict__["_cropvote_index"], output, call) if call.cuts.at else output


class _State:
    """What a call changes besides its result: the buffers, and the random numbers."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.numbers = torch.get_rng_state()
        self.on_device = (torch.cuda.get_rng_state(images.device), images.device) if images.is_cuda else None

    @torch.no_grad()
    def put_back(self) -> None:
        for module, name, buffer, value in self.buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)
        torch.set_rng_state(self.numbers)
        if self.on_device is not None:
            torch.cuda.set_rng_state(*self.on_device)


def _last(memo: dict[Any, Any], most: int) -> dict[Any, Any]:
    """Return the last entries of a memo."""
    return dict(list(memo.items())[-most:])


def _kind(value: Any) -> Any:
    """Return what of an argument can open a path and has few values: a switch, and what a container holds.

    Numbers and texts may count; a path that one of them opens is found in the call itself.
    """
    if isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, (bool, Enum, type(None))):
        return value
    if isinstance(value, Mapping):
        return tuple((key, _kind(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_kind(item) for item in value)
    return type(value).__name__


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """Return the names of the forward's arguments, in order, with the defaults of those that are flags or numbers."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind not in kinds]
    return {p.name: p.default if isinstance(p.default, FLAGS) else TENSOR for p in parameters}
