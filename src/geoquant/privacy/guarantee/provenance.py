"""Where numbers come from, as types: private weights, public values, and what a mechanism released.

In guaranteed mode scales, orders, allocations, kept sets and metrics must be functions of public or released values.
`Private` therefore is no tensor: nothing can be computed from it, indexed or printed. Only a mechanism opens it, or
`declassify`, which ends every guarantee for these weights. `derive` is the one door for computing things: it unwraps
`Public` and `Released` arguments and refuses everything else that holds numbers of unknown origin.

What these types cannot see is a tensor that somebody labels `Public` and is not: say moments of public text, taken
through the private model. `source` is there to be read by a person.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from geoquant.errors import UserError

__all__ = ["Origin", "Private", "Public", "Released", "derive", "open_for_mechanism", "private"]


class Origin:
    """What has happened to one set of private weights. Not frozen: it is the memory that a guarantee depends on."""

    def __init__(self, name: str):
        self.name = name
        self.declassified: list[str] = []
        self.released = False

    def claim(self) -> None:
        """Called once by the mechanism that releases these weights. Raises UserError if a guarantee is out of reach."""
        if self.declassified:
            raise UserError(
                f"no guarantee can be given for {self.name}",
                got=f"declassified: {'; '.join(self.declassified)}",
                fix="load the weights again and release them without looking at them",
            )
        if self.released:
            raise UserError(
                f"{self.name} was released before, and a second release adds to the first",
                fix="release everything in one call: its epsilon covers all of it",
            )
        self.released = True


class Private:
    """A tensor that depends on private data. Its name, shape and type are public; its values are not to be had."""

    __slots__ = ("__values", "name", "origin")
    __hash__ = None

    def __init__(self, values: Tensor, origin: Origin, name: str = "weights"):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(f"private weights are a floating-point tensor, got {type(values).__name__}")
        self.__values, self.origin, self.name = values, origin, name

    @property
    def shape(self) -> torch.Size:
        return self.__values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.__values.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def declassify(self, reason: str) -> Tensor:
        """The values. From now on no mechanism gives a guarantee for anything of the same origin."""
        if not reason.strip():
            raise UserError("private weights are not opened without a reason", fix="say what they are needed for")
        self.origin.declassified.append(f"{self.name}: {reason}")
        return self.__values

    def __repr__(self) -> str:
        return f"Private({self.name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise _refusal(self.name)

    __array__ = __float__ = __int__ = __index__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _refuse
    __rmatmul__ = __pow__ = __neg__ = __abs__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __reduce_ex__ = __copy__ = __deepcopy__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: object, args: object = (), kwargs: object = None
    ) -> NoReturn:
        raise _refusal(next(x.name for x in _leaves([args, kwargs]) if isinstance(x, Private)))


def _refusal(name: str) -> TypeError:
    return TypeError(
        f"{name} is private: nothing may be computed from it before a mechanism has released it; "
        "take scales, orders, allocations, kept columns and metrics from public or released values"
    )


def private(tensors: Mapping[str, Tensor], name: str) -> dict[str, Private]:
    """All private tensors of one model, of one origin. name: of the model, for messages."""
    origin = Origin(name)
    return {key: Private(values, origin, key) for key, values in tensors.items()}


def open_for_mechanism(held: Private) -> Tensor:
    """The values, for the files that add noise to them and for no others (a test reads who imports this)."""
    return held._Private__values


class Spoken:
    """What can speak for a released value: the `Guarantee` of statement.py, which stands above this file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Public:
    """Values that do not depend on private data, and where they are from, in words: these go into the statement."""

    values: Any
    source: str

    def __post_init__(self) -> None:
        _no_private(self.values, "a public value")
        if not self.source.strip():
            raise UserError("a public value must say where it is from", fix="for example source='the public base'")


@dataclasses.dataclass(frozen=True, eq=False)
class Released:
    """What a mechanism let out, or a function of it and of public values; `guarantee` speaks for it."""

    values: Any
    guarantee: Spoken

    def __post_init__(self) -> None:
        _no_private(self.values, "a released value")
        if not isinstance(self.guarantee, Spoken):
            raise TypeError(f"a released value carries the guarantee of its mechanism, got {self.guarantee!r}")


def derive(function: Callable, *args: object, **kwargs: object) -> Public | Released:
    """`function` of public and released values, wrapped again.

    Arguments are `Public`, `Released`, or plain intent (numbers, names, frozen settings without tensors), also inside
    lists, tuples and dicts. One released argument makes the result released, under the same guarantee: what is computed
    from it is post-processing.

    Raises TypeError for `Private` and for tensors without provenance, in arguments, partials and closures alike, and
    UserError where two different guarantees would have to be added up.
    """
    for leaf in _leaves((args, kwargs, _captured(function))):
        if isinstance(leaf, Private):
            raise _refusal(leaf.name)
        if isinstance(leaf, Tensor | np.ndarray):
            raise TypeError(
                "in guaranteed mode every tensor says where it is from: got a bare tensor; "
                "wrap it in Public(values, source) if no private data went into it"
            )
    wrapped = [leaf for leaf in _leaves((args, kwargs), dataclass=False) if isinstance(leaf, Public | Released)]
    made = function(*_unwrapped(args), **_unwrapped(kwargs))
    guarantees = list({id(x.guarantee): x.guarantee for x in wrapped if isinstance(x, Released)}.values())
    if len(guarantees) > 1:
        raise UserError(
            "these values were released by different mechanisms, whose guarantees would have to be added up",
            fix="release all private weights in one call",
        )
    if guarantees:
        return Released(made, guarantees[0])
    sources = dict.fromkeys(x.source for x in wrapped if isinstance(x, Public))
    return Public(made, " and ".join(sources) or "no data at all")


def _captured(function: Callable) -> list[object]:
    """What a function brings along: arguments of partials, variables of closures, the object of a method."""
    found: list[object] = []
    while isinstance(function, functools.partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a variable that was never assigned
            found.append(cell.cell_contents)
    found += getattr(function, "__defaults__", None) or ()
    bound = getattr(function, "__self__", None)
    return [*found, bound] if bound is not None and not isinstance(bound, type) else found


def _leaves(value: object, dataclass: bool = True) -> Iterator[object]:
    """Everything inside lists, tuples, dicts and (frozen settings) dataclasses; wrapped values are leaves."""
    if isinstance(value, Public | Released | Private):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _leaves(item, dataclass)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item, dataclass)
    elif dataclass and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), dataclass)
    else:
        yield value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Public | Released):
        return value.values
    if isinstance(value, list | tuple):
        return type(value)(map(_unwrapped, value))
    if isinstance(value, Mapping):
        return {key: _unwrapped(item) for key, item in value.items()}
    return value


def _no_private(values: object, what: str) -> None:
    for leaf in _leaves(values):
        if isinstance(leaf, Private):
            raise TypeError(f"{leaf.name} is private and cannot be {what}; only a mechanism releases it")
