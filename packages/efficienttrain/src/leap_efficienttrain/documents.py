"""Curricula as YAML documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import yaml

from leap_efficienttrain.stages import CurriculumFields, LearningRate, Stage
from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import write_text

__all__ = ["read", "write"]

NAMES = {"equivalent_epochs": "epochs"}


def write(curriculum: CurriculumFields, path: str | Path | None = None) -> str:
    """One document: the fields that differ from the defaults, and all of the stages' shares, sizes and magnitudes."""
    values = asdict(curriculum)
    document: dict[str, Any] = {}
    for entry in fields(CurriculumFields):
        value = values[entry.name]
        if entry.name == "stages":
            document["stages"] = [_changed(Stage, stage, keep=("share", "size", "randaug")) for stage in value]
        elif entry.name == "lr":
            document["lr"] = _changed(LearningRate, value, keep=("rule", "base", "final"))
        elif entry.name == "drop_path_reference":
            document |= {} if value is None else {"drop_path": {"reference": value}}
        elif value not in (None, ""):
            document[NAMES.get(entry.name, entry.name)] = value
    order = {"name": document.pop("name", None)} | document
    text = yaml.safe_dump({key: value for key, value in order.items() if value is not None}, sort_keys=False)
    if path is not None:
        write_text(Path(path), text)
    return text


def _changed(kind: type[Any], values: Mapping[str, Any], keep: tuple[str, ...]) -> dict[str, Any]:
    defaults = {entry.name: entry.default for entry in fields(kind)}
    return {name: value for name, value in values.items() if name in keep or value != defaults[name]}


def read(source: str | Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the curriculum in a YAML file, or in its text, with `changes` in place of some.

    Raises:
        UserError: it cannot be read, is no mapping, or a key, type or value is wrong.
    """
    text, where = _text(source)
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"{where} holds no `key: value` lines: expected base_size, unit, stages and so on")
    known = {NAMES.get(entry.name, entry.name): entry.name for entry in fields(CurriculumFields)}
    known["drop_path"] = known.pop("drop_path_reference")
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
        values[known[key]] = value
    if not isinstance(values.get("stages"), list):
        raise UserError(f"{where}: stages is {values.get('stages')!r}: expected a list of stages with share and size")
    numbered = enumerate(values["stages"], 1)
    values["stages"] = tuple(_made(Stage, stage, f"{where}, stage {number}") for number, stage in numbered)
    if "lr" in values:
        values["lr"] = _made(LearningRate, values["lr"], f"{where}, lr")
    if "drop_path_reference" in values:
        drop_path = values["drop_path_reference"]
        if not isinstance(drop_path, dict) or drop_path.keys() != {"reference"}:
            raise UserError(f"{where}: drop_path is {drop_path!r}: expected {{reference: EPOCHS}}")
        values["drop_path_reference"] = drop_path["reference"]
    kinds = {entry.name: str(entry.type) for entry in fields(CurriculumFields)}
    for name, value in values.items():
        if name not in ("stages", "lr"):
            _check_scalar(value, kinds[name], f"{where}: {name}")
    if unknown := changes.keys() - {entry.name for entry in fields(CurriculumFields)}:
        name = min(unknown)
        raise UserError(f"unknown field {name!r}: {did_you_mean(name, known.values())}")
    return {**values, **changes}


def _text(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and "\n" in source:
        return source, "the document"
    try:
        return Path(source).read_text(encoding="utf-8"), str(source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the curriculum {source}: {error}") from error


def _check_scalar(value: object, kind: str, where: str) -> None:
    """Raise a UserError where a value is not of the field's annotated kind."""
    prefixes: dict[str, tuple[str, tuple[type, ...]]] = {
        "int": ("a whole number", (int,)),
        "Number": ("a number", (int, float)),
        "": ("a string", (str,)),
    }
    expected, types = next(found for prefix, found in prefixes.items() if kind.startswith(prefix))
    if isinstance(value, bool) or not isinstance(value, types):
        raise UserError(f"{where} is {value!r}: expected {expected}")


def _made(kind: type[Any], values: object, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}: expected `key: value` pairs")
    known = {entry.name: entry for entry in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
        _check_scalar(value, str(known[key].type), f"{where}: {key}")
    missing = [name for name, entry in known.items() if entry.default is MISSING and name not in values]
    if missing:
        raise UserError(f"{where}: {' and '.join(missing)} missing")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
