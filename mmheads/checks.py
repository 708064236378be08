"""Checks of what users and files give: settings, and JSON read into dataclasses and models."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

ONLY_KNOWN_FIELDS = ConfigDict(extra="forbid")
"""For `__pydantic_config__` of a dataclass: `parse` refuses fields that it does not have."""

DAMAGED = "its weights are damaged, or float16 is too narrow for it: load it in bfloat16 or float32"
"""What may be wrong with a model that gives values that are not finite."""


def expect(holds: object, name: str, value: object, expected: str) -> None:
    """Raise ValueError with the name and value of a setting unless something holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def expect_one_of(name: str, value: object, known: Collection[object]) -> None:
    """Raise ValueError unless a setting has one of its known values."""
    expect(value in known, name, value, f"one of {tuple(known)}")


def parse(kind: type[T], content: object) -> T:
    """Return what a JSON text or JSON value describes, checked down to the types of its fields.

    Args:
        kind: A dataclass, a pydantic model, or another type that pydantic knows.
        content: JSON as str or bytes; anything else is a value that JSON can hold.

    Raises:
        ValueError: The text is not JSON, or a field is missing, unknown, or of another type.
    """
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    try:
        value: T = _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(first_problem(error, kind)) from error
    return value


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(TypeAdapter)


def first_problem(error: ValidationError, kind: type[Any]) -> str:
    """The first thing that is wrong, as a sentence."""
    about = error.errors(include_url=False)[0]
    field = ".".join(map(str, about["loc"]))
    match about["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            names = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
            return f"unknown field {field!r}; expected some of {', '.join(names)}"
        case "missing":
            names = ", ".join(map(str, about["input"]))
            return f"the field {field!r} is missing; there are {names:.300}"
        case "json_invalid":
            return f"{about['msg']}; expected one JSON object"
    message = about["msg"].removeprefix("Value error, ")
    value = str(about["input"])[:80]
    return f"{field} is {value}: {message}" if field else f"{value}: {message}"
