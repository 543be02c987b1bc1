"""Plain nested data to configuration records: kinds, defaults, strict types, typed overrides.

A section that offers a choice is a mapping with a `kind`; its field is annotated `spec.Config` and
the table it is looked up in goes by the field's name. Nothing is converted silently: an unknown
key, a wrong type or an impossible value is a ValueError of one line that names the key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sparse_pretrain import spec

LARGEST = 2**53  # where a float stops holding every whole number, and JSON readers lose digits
SMALLEST = 1e-37  # about the smallest normal float32, which every number ends up in
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True)
class Schema:
    """A tree of records below `root`; `tables` maps a field's name to kind -> class with .Config.

    `name` is what errors call the tree.
    """

    root: type
    tables: Mapping[str, Mapping[str, Any]]
    name: str = "config"

    def build(self, values: Any) -> Any:
        """The `root` record that nested plain data describes.

        Errors: ValueError naming the full key, what was expected and the value.
        """
        return self._build_section(self.root, self.fill(values), self.name)

    def fill(self, values: Any) -> dict[str, Any]:
        """`values` with every default filled in, each section's by its kind.

        Errors: ValueError for an unknown key or kind, naming it and the nearest known one.
        """
        return self._fill_section(self.root, as_mapping(values, self.name), self.name, None)

    def override(self, values: Any, overrides: Iterable[str]) -> dict[str, Any]:
        """`values` with each `x.y=text` set, the text parsed by the type of the field.

        Only what exists can be set. Kinds go first, the outer before the inner; a section whose
        kind changes keeps the given keys that its new kind has too, and takes the defaults of the
        new kind for the others.
        Errors: ValueError naming the key and what was expected.
        """
        given = _copy(as_mapping(values, self.name))
        pairs = [_split(text, self.name) for text in overrides]
        kinds = sorted((p for p in pairs if p[0][-1] == "kind"), key=lambda p: len(p[0]))
        for keys, text in kinds + [p for p in pairs if p[0][-1] != "kind"]:
            self._set(given, self.fill(given), keys, text)
        return given

    # --- filling and building

    def _fill_section(self, cls: type, given: Mapping, path: str, base: Any) -> dict[str, Any]:
        """`given` over the values of `base` (an instance or None) over the defaults of `cls`."""
        hints = spec.field_types(cls)
        for key in given:
            if key not in hints:
                raise ValueError(f"{path}.{key}: unknown key; {nearest(key, hints, path + '.')}")
        out: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            default = getattr(base, field.name) if base is not None else _default(field)
            if field.name in given:
                value, where = given[field.name], f"{path}.{field.name}"
                out[field.name] = self._fill(field.name, hints[field.name], value, where, default)
            elif default is not dataclasses.MISSING:
                out[field.name] = plain(default)
        return out

    def _fill(self, name: str, hint: Any, value: Any, path: str, default: Any) -> Any:
        hint = _section(hint)
        item = _item(hint)
        if item is not None:
            held = default if isinstance(default, Mapping) else {}
            return {
                key: self._fill(name, item, part, f"{path}.{key}", held.get(key))
                for key, part in as_mapping(value, path).items()
            }
        if not _is_section(hint) or value is None:
            return value
        value = as_mapping(value, path)
        cls = self._class(name, hint, value, path, default)
        base = default if type(default) is cls else None
        if hint is not spec.Config:
            return self._fill_section(cls, value, path, base)
        rest = {k: v for k, v in value.items() if k != "kind"}
        return {"kind": cls.KIND} | self._fill_section(cls, rest, path, base)

    def _class(self, name: str, hint: Any, value: Mapping, path: str, default: Any = None) -> Any:
        """The record class of a section; where it is a choice, the one that its kind names."""
        if hint is not spec.Config:
            return hint
        table = self.tables[name]
        kind = value.get("kind", getattr(default, "KIND", None))
        spec.require(kind is not None, f"{path}.kind: required; one of {', '.join(table)}")
        ok = isinstance(kind, str) and kind in table
        spec.require(ok, f"{path}.kind: unknown kind {kind!r}; {nearest(kind, table)}")
        cls = table[kind].Config
        assert getattr(cls, "KIND", None) == kind, f"{cls}: KIND must be {kind!r}"
        return cls

    def _build_section(self, cls: type, values: Mapping, path: str) -> Any:
        hints = spec.field_types(cls)
        built = {k: self._build(k, hints[k], v, f"{path}.{k}") for k, v in values.items()}
        return spec.build(cls, built, path)

    def _build(self, name: str, hint: Any, value: Any, path: str) -> Any:
        hint = _section(hint)
        item = _item(hint)
        if item is not None:
            return {k: self._build(name, item, v, f"{path}.{k}") for k, v in value.items()}
        if not _is_section(hint) or value is None:
            _check_numbers(value, path)
            return value
        cls = self._class(name, hint, value, path)
        if hint is spec.Config:
            value = {k: v for k, v in value.items() if k != "kind"}
        return self._build_section(cls, value, path)

    # --- overrides

    def _parts(self, name: str, hint: Any, value: Any, path: str) -> dict[str, Any] | None:
        """The annotation of each part of a section or a mapping; None for a plain value."""
        hint = _section(hint)
        item = _item(hint)
        if item is not None:
            return dict.fromkeys(value, item)
        if not _is_section(hint) or value is None:
            return None
        fields = spec.field_types(self._class(name, hint, value, path))
        return fields | {"kind": str} if hint is spec.Config else fields

    def _set(self, given: dict, full: Mapping, keys: Sequence[str], text: str) -> None:
        """Set one override in `given`; `full` is `given` with its defaults and says what exists."""
        value: Any = full
        name, hint, path = "", self.root, self.name
        for depth, key in enumerate(keys):
            parts = self._parts(name, hint, value, path)
            if parts is None:
                raise ValueError(f"{path}: is a value, it has no key {key!r}")
            if key not in parts:
                tree = [f"{self.name}.{k}" for k in flat(full)]
                raise ValueError(f"{path}.{key}: unknown key; {_near_key(key, path, parts, tree)}")
            path, child = f"{path}.{key}", value.get(key)
            # the parts of a mapping are looked up in the table that goes by the mapping's name
            field = name if _item(_section(hint)) is not None else key
            if depth + 1 < len(keys):
                if not isinstance(given.get(key), dict):
                    # a mapping replaces its default whole, so it starts as a copy of all of it
                    whole = _item(_section(parts[key])) is not None
                    given[key] = _copy(child) if whole else {}
                name, hint, value, given = field, parts[key], child, given[key]
                continue
            below = self._parts(field, parts[key], child, path)
            if below:
                example = f"--{path}.{next(iter(below))}=VALUE"
                raise ValueError(f"{path}: is a section; set one of its keys, as in {example}")
            if key == "kind" and _section(hint) is spec.Config:
                cls = self._class(name, spec.Config, {"kind": text}, path.removesuffix(".kind"))
                known = spec.field_types(cls)
                for old in [k for k in given if k not in known]:
                    del given[old]
            given[key] = parse(text, parts[key], path)


def nearest(key: Any, known: Iterable[str], prefix: str = "") -> str:
    """'did you mean X?' for a close match, else the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(str(key), known, 1, 0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"known are {', '.join(known)}" if known else "there are none"


def _near_key(key: str, path: str, known: Iterable[str], tree: Iterable[str]) -> str:
    """As `nearest`; a key of that very name elsewhere in the tree is the better guess."""
    elsewhere = [k for k in tree if k.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return nearest(key, known, path + ".")


def parse(text: str, hint: Any, path: str) -> Any:
    """The value that a command line's text means for a field of this type; lists are `a,b`.

    Errors: ValueError naming `path`, the type and the text.
    """
    arms = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if type(None) in arms and text.strip().lower() in ("none", "null"):
            return None
        return parse(text, next(a for a in arms if a is not type(None)), path)
    if typing.get_origin(hint) is tuple:
        inner = text.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            inner = inner[1:-1]
        parts = [p.strip().strip("'\"") for p in inner.split(",") if p.strip()]
        kinds = arms[:1] * len(parts) if arms[1:] == (Ellipsis,) else arms
        ok = len(kinds) == len(parts)
        spec.require(ok, f"{path}: expected {len(kinds)} values, got {len(parts)}: {text!r}")
        return tuple(
            parse(p, k, f"{path}[{i}]") for i, (p, k) in enumerate(zip(parts, kinds, strict=True))
        )
    if hint is bool:
        ok = text.strip().lower() in _TRUE + _FALSE
        spec.require(ok, f"{path}: expected true or false, got {text!r}")
        return text.strip().lower() in _TRUE
    if hint in (int, float):
        value = _number(text)
        ok = value is not None and (hint is float or isinstance(value, int))
        spec.require(ok, f"{path}: expected {hint.__name__}, got {text!r}")
        return hint(value)
    return text


def _number(text: str) -> int | float | None:
    """An int where the text is one, also as 1e6; None for what is no number."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() and abs(value) <= LARGEST else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys; tuples become lists, as in JSON."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def walk(config: spec.Config, path: str = "config") -> Iterator[tuple[str, spec.Config]]:
    """Every record of a tree with its dotted name, parents first."""
    yield path, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, part in parts:
            if isinstance(part, spec.Config):
                yield from walk(part, f"{path}.{field.name}" + (f".{key}" if key else ""))


def plain(value: Any) -> Any:
    """Records inside `value` as mappings, those chosen by kind with it; all else as it is."""
    if isinstance(value, spec.Config):
        kind = getattr(value, "KIND", None)
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return ({"kind": kind} if kind else {}) | fields
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def as_mapping(value: Any, path: str) -> Mapping[str, Any]:
    """A mapping, a record or a ConfigDict as a mapping with text keys.

    Errors: ValueError naming `path` for anything else.
    """
    if isinstance(value, spec.Config):
        value = plain(value)
    elif hasattr(value, "to_dict") and not isinstance(value, Mapping):
        value = value.to_dict()
    got = f"got {type(value).__name__} {str(value)[:40]!r}"
    spec.require(isinstance(value, Mapping), f"{path}: expected a section, {got}")
    for key in value:
        spec.require(isinstance(key, str), f"{path}: keys are text, got {key!r}")
    return value


def _split(text: str, name: str) -> tuple[list[str], str]:
    key, equals, value = text.partition("=")
    keys = key.split(".")
    ok = bool(equals) and all(keys)
    spec.require(ok, f"{name}.{key}: expected --{name}.KEY=VALUE, got --{name}.{text}")
    return keys, value


def _check_numbers(value: Any, path: str) -> None:
    for i, number in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        where = f"{path}[{i}]" if isinstance(value, (list, tuple)) else path
        if isinstance(number, float):
            spec.require(math.isfinite(number), f"{where}: must be finite, got {number}")
            ok = number == 0 or SMALLEST <= abs(number) <= 1 / SMALLEST
            spec.require(ok, f"{where}: {number} is beyond what float32 holds")
        elif isinstance(number, int):
            # not printed: past 4300 digits Python refuses to
            spec.require(abs(number) <= LARGEST, f"{where}: must be at most 2**53 = {LARGEST}")


def _copy(value: Any) -> Any:
    value = plain(value)
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _section(hint: Any) -> Any:
    """The record class inside `X | None`; any other annotation as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((arm for arm in typing.get_args(hint) if _is_section(arm)), hint)
    return hint


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, spec.Config)


def _item(hint: Any) -> Any:
    """The annotation of a mapping's values; None for any other annotation."""
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return typing.get_args(hint)[1]
    return None
