"""A dataclass to YAML and back, with the key and the line in every complaint."""

from __future__ import annotations

import contextlib
import re
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path

import tyro
import yaml

from leap_shared.cli.output import plain
from leap_shared.errors import UserError, did_you_mean

__all__ = ["dump", "load"]

FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
LINE_BREAK = re.compile("[\r\n\x85\u2028\u2029]")
UNWRITTEN = ("config", "json")


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, which PyYAML alone takes for text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number or a line break."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - overrides
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if LINE_BREAK.search(data) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def dump(command: object, verb: str) -> str:
    """YAML that `load` turns into an equal `command`."""
    values = {name: value for name, value in plain(command, finite=False).items() if name not in UNWRITTEN}
    return yaml.dump({"verb": verb, **values}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load(path: Path, kind: type[object], verb: str) -> object:
    """Instance of the dataclass `kind` with the file's values; what has no value is tyro.MISSING, for flags to fill.

    Raises:
        UserError: the file is unreadable or no YAML mapping, is for another verb, or has an unknown key or wrong type.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node() or yaml.MappingNode("tag:yaml.org,2002:map", [])
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} holds no `key: value` lines: expected the fields of `{verb}`")
        own = [pair for pair in root.value if pair[0].value == "verb"]
        if own and own[0][1].value != verb:
            raise UserError(
                f"{path} is a config of `{own[0][1].value}`, not of `{verb}`: run that verb or another file"
            )
        root.value = [pair for pair in root.value if pair not in own]
        return _Reader(path, loader).instance(root, kind, "", MISSING)
    except UserError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error


class _MismatchError(Exception):
    """This node does not hold this type; a union may have another."""


class _Reader:
    def __init__(self, path: Path, loader: _Loader) -> None:
        self.path = path
        self.loader = loader

    def instance(self, node: yaml.Node, kind: type[object], prefix: str, default: object) -> object:
        """Dataclass whose values come from `node`, else from `default`, else from the class; never runs its checks."""
        if not isinstance(node, yaml.MappingNode):
            raise _MismatchError
        hints = typing.get_type_hints(kind)
        known = {field.name: field for field in fields(typing.cast("typing.Any", kind)) if field.init}
        given: dict[str, object] = {}
        for key_node, value_node in node.value:
            name, where = str(key_node.value), f"{self.path}, line {key_node.start_mark.line + 1}"
            key = prefix + name
            if name not in known:
                raise UserError(f"{where}: unknown key {key!r}: {did_you_mean(name, known)}")
            if name in given:
                raise UserError(f"{where}: key {key!r} is given twice: keep one")
            field_default = self._default(known[name], default)
            try:
                given[name] = self.value(value_node, hints[name], key, field_default)
            except _MismatchError:
                found = self.loader.construct_object(value_node, deep=True)
                raise UserError(
                    f"{where}: {key} is {found!r} ({type(found).__name__}), expected {_describe(hints[name])}"
                ) from None
        result = object.__new__(kind)
        for name, field in known.items():
            object.__setattr__(result, name, given[name] if name in given else self._default(field, default))
        return result

    def _default(self, field: typing.Any, parent: object) -> object:
        if parent is not MISSING and parent is not tyro.MISSING:
            return getattr(parent, field.name)
        if field.default_factory is not MISSING:
            return field.default_factory()
        return tyro.MISSING if field.default is MISSING else field.default

    def value(self, node: yaml.Node, hint: typing.Any, key: str, default: object) -> object:
        """The Python value of `node` as the type `hint`; _MismatchError where it is none."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            for option in arguments:
                with contextlib.suppress(_MismatchError):
                    return self.value(node, option, key, default)
            raise _MismatchError
        if is_dataclass(hint):
            kind = typing.cast("type[object]", hint)
            return self.instance(node, kind, f"{key}.", default if isinstance(default, kind) else MISSING)
        if origin in (tuple, list):
            if not isinstance(node, yaml.SequenceNode):
                raise _MismatchError
            count = len(node.value)
            options = arguments if origin is tuple and arguments[-1] is not ... else arguments[:1] * count
            if len(options) != count:
                raise _MismatchError
            return origin(
                self.value(item, option, key, MISSING) for item, option in zip(node.value, options, strict=True)
            )
        if origin is dict:
            if not isinstance(node, yaml.MappingNode):
                raise _MismatchError
            pairs = [(self.value(name, arguments[0], key, MISSING), name.value, item) for name, item in node.value]
            return {name: self.value(item, arguments[1], f"{key}.{text}", MISSING) for name, text, item in pairs}
        return _scalar(self.loader.construct_object(node, deep=True), hint)


def _scalar(found: object, hint: typing.Any) -> object:
    if hint is typing.Any or (hint in (None, type(None)) and found is None):
        return found
    if typing.get_origin(hint) is typing.Literal:
        for choice in typing.get_args(hint):
            if choice == found and type(choice) is type(found):
                return choice
        raise _MismatchError
    if isinstance(hint, type):
        if issubclass(hint, Enum) and isinstance(found, str) and found in hint.__members__:
            return hint[found]
        if hint is float and type(found) is int:
            return float(found)
        if issubclass(hint, Path) and isinstance(found, str):
            return hint(found)
        if type(found) is hint:
            return found
    raise _MismatchError


def _describe(hint: typing.Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
