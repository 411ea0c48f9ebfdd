"""Every error the library raises, so that one ``except CropVoteError`` is enough.

```
CropVoteError                     anything cropvote refuses
├── ViewsError      ValueError    views that cannot be made, or that do not fit a map
├── RowsError       ValueError    rows, views and targets that do not match
├── OptionError     ValueError    an option outside its list, or two that exclude each other
├── SurgeryError    ValueError    a model in a state that allows no injection, removal or call
│   ├── PlainModelError           the model itself, without any split, that does not run
│   └── CheckUnavailableError     a PyTorch that checks cannot follow
├── SiteError       ValueError    a module that is not a valid site, with the reason
├── UnknownSiteError LookupError  no module of that name, with the nearest names
├── InputTypeError  TypeError     an argument of the wrong type
└── MissingExtraError ImportError a package that is installed only on request
```

Each also derives from the builtin named beside it, which is what a caller who has
never heard of cropvote would catch. Messages begin with a code, such as [CV101],
under which the troubleshooting page explains them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CheckUnavailableError",
    "CropVoteError",
    "InputTypeError",
    "MissingExtraError",
    "OptionError",
    "PlainModelError",
    "RowsError",
    "SiteError",
    "SurgeryError",
    "UnknownSiteError",
    "ViewsError",
]


class CropVoteError(Exception):
    """Base of every error that cropvote raises.

    It holds a code, under which the troubleshooting page explains it, and a message: what was asked, what was found,
    what to do. ``str(error)`` is both.

    Example:
        >>> from cropvote import CropVoteError, ten_crop
        >>> try:
        ...     ten_crop(scale=float("nan"))
        ... except CropVoteError as error:
        ...     print(error)
        [CV207] scale must be finite, got nan.
    """

    @property
    def code(self) -> str:
        """The entry in the troubleshooting page."""
        return str(self.args[0])

    @property
    def message(self) -> str:
        """The text without the code."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


class Reason(NamedTuple):
    """Why a module is not a site: what the error would say."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


class ViewsError(CropVoteError, ValueError):
    """Views that cannot be made, or that do not fit the map they are given."""


class RowsError(CropVoteError, ValueError):
    """Rows, views and targets whose numbers or shapes do not match."""


class OptionError(CropVoteError, ValueError):
    """An option outside its list, or two options that exclude each other."""


class SurgeryError(CropVoteError, ValueError):
    """A model in a state that allows no injection, no removal or no call."""


class PlainModelError(SurgeryError):
    """A model that, without any split, does not run on the input it is checked with, or cannot be copied."""


class CheckUnavailableError(SurgeryError):
    """This PyTorch does something that a check of a model cannot follow; everything but checks still works."""


class SiteError(CropVoteError, ValueError):
    """A module that exists but is not a valid site; the message holds the reason."""


class UnknownSiteError(CropVoteError, LookupError):
    """No module has the name asked for; the message holds the nearest names."""


class InputTypeError(CropVoteError, TypeError):
    """An argument of a type that cropvote cannot use."""


class MissingExtraError(CropVoteError, ImportError):
    """A package that cropvote needs for this alone, and that is not installed; the message names the extra."""
