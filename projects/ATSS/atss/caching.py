"""Values that are computed at first use and kept in their object."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable)


class cached_property:
    """functools.cached_property without the lock that it has in Python 3.11, at which torch.compile
    breaks the graph."""

    def __init__(self, compute: Callable[[Any], Any]):
        self.compute, self.name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


def cached(compute: F) -> F:
    """Cache a method's values by arguments, in the object's ``_cache``."""

    @wraps(compute)
    def get(instance: Any, *args: Any) -> Any:
        values = instance.__dict__.setdefault("_cache", {})
        key = compute.__name__, *args
        if key not in values:
            values[key] = compute(instance, *args)
        return values[key]

    return cast(F, get)
