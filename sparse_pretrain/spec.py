"""The base of every configuration section: a frozen dataclass built strictly from plain data."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


class Config:
    """Base of all configuration sections; subclasses are frozen keyword-only dataclasses."""

    if typing.TYPE_CHECKING:  # every subclass is a dataclass; one chosen by name has a KIND
        KIND: typing.ClassVar[str]
        __dataclass_fields__: typing.ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The section as nested plain data; sections chosen by name carry their `kind`."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        kind = getattr(value, "KIND", None)
        return ({"kind": kind} if kind else {}) | value.to_dict()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def field_types(cls: type) -> dict[str, Any]:
    """Name -> resolved annotation of every field of a Config class."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def build(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
    """A `cls` from plain data; unknown keys and wrong types fail with the key's full name.

    Errors: ValueError naming the key and what was expected.
    """
    types_ = field_types(cls)
    unknown = sorted(set(values) - set(types_))
    if unknown:
        known = ", ".join(sorted(types_))
        raise ValueError(f"{path}.{unknown[0]}: unknown key; known keys are {known}")
    kwargs = {}
    for name, value in values.items():
        kwargs[name] = coerce(value, types_[name], f"{path}.{name}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in kwargs
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{path}.{missing[0]}: required and not given")
    try:
        return cls(**kwargs)
    except ValueError as e:
        raise ValueError(f"{path}.{e}") from None


def coerce(value: Any, annotation: Any, path: str) -> Any:
    """`value` as `annotation`: whole floats become ints and ints floats; nothing else is converted.

    Errors: ValueError naming `path`, the expected type and the value.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        for choice in rest[:-1]:
            try:
                return coerce(value, choice, path)
            except ValueError:
                continue
        return coerce(value, rest[-1], path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}: expected a list of {args[0].__name__}, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ValueError(f"{path}: expected {len(args)} values, got {len(value)}: {value!r}")
        pairs = enumerate(zip(value, args, strict=True))
        return tuple(coerce(v, a, f"{path}[{i}]") for i, (v, a) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: expected a mapping, got {value!r}")
        return {k: coerce(v, args[1], f"{path}.{k}") for k, v in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, Config):
        if isinstance(value, annotation):
            return value
        if isinstance(value, Mapping):
            return build(annotation, value, path)
        raise ValueError(f"{path}: expected a section, got {value!r}")
    if annotation is bool:
        if isinstance(value, bool):
            return value
    elif annotation is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, annotation):
        return value
    name = getattr(annotation, "__name__", str(annotation))
    raise ValueError(f"{path}: expected {name}, got {type(value).__name__} {value!r}")


def require(ok: bool, message: str) -> None:
    """ValueError(message) unless `ok`; the message starts with the field's name."""
    if not ok:
        raise ValueError(message)


def positive(config: Config, *names: str) -> None:
    """ValueError naming the first of `names` that is not above zero."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}: must be positive, got {value}")


def at_most(config: Config, limit: int, *names: str) -> None:
    """ValueError naming the first of `names` that is above `limit`.

    Sizes need a bound so that a slip of the keyboard is refused at once, and not by whatever
    overflows or runs out of memory first.
    """
    for name in names:
        value = getattr(config, name)
        require(value <= limit, f"{name}: must be at most {limit}, got {value}")
