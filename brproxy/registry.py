"""Names to classes: a folder of modules, each of which registers what it holds.

A new policy, predictor, dialect or trace format is one file in its folder; nothing else names it. The
registry imports the folder on first use, so no list of modules has to be kept.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from brproxy.types import InvalidInputError

T = TypeVar("T")
C = TypeVar("C", bound="Configurable")


class Configurable(Protocol):
    """A thing that is built from an instance of its own ``Params``: its TOML table."""

    Params: ClassVar[type[Any]]

    def __init__(self, params: Any) -> None: ...


class UnknownNameError(InvalidInputError):
    """A name that no module of the folder registers; the text lists those that are."""


class Registry(Generic[T]):
    """The things of one ``kind`` ("policy", …) that the modules of ``package`` register by name."""

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its target under ``name``; raises ValueError if that is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                msg = f"{self._kind} {name!r} is registered twice"
                raise ValueError(msg)
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> tuple[str, ...]:
        """Return every registered name, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def get(self, name: str) -> T:
        """Return what is registered as ``name``; raises UnknownNameError."""
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            allowed = ", ".join(self.names())
            msg = f"unknown {self._kind} {name!r}; allowed: {allowed}"
            raise UnknownNameError(msg) from None

    def _load(self) -> None:
        if self._loaded:
            return
        # Set first: a module of the folder may ask the registry for another while it is imported.
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def make_configurable(registry: Registry[type[C]], name: str, params: object | None) -> C:
    """Build what is registered as ``name`` with ``params``, None for its defaults.

    Raises UnknownNameError, and TypeError for the parameters of something else.
    """
    cls = registry.get(name)
    chosen = cls.Params() if params is None else params
    if not isinstance(chosen, cls.Params):
        msg = f"{name!r} takes {cls.Params.__qualname__}, got {type(chosen).__qualname__}"
        raise TypeError(msg)
    return cls(chosen)
