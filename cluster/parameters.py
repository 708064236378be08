"""Parameters of notebooks: their defaults, other values from a file or the command line, checks."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

from cluster.models import UsageError, name_of

FROM_ZERO = {"seed", "sinks", "time_sinks", "real_question", "sweep"}
"""Whole numbers that may be 0; all others count something, and are at least 1."""
SHARES_FROM_ZERO = {"depth", "fall", "image_shares"}
"""Shares that may be 0; all others are in (0, 1]."""
CHOICES = {
    "null_images": ("pixels", "placeholders"),
    "shape": ("wide", "small", "qwen3-vl-8b"),
    "task": ("image", "rendered_text", "identical_image"),
}
"""Values of parameters that have only a few."""


def read_cells(notebook: Path) -> list[Any]:
    """Returns the cells of a notebook.

    Raises:
        UsageError: The file is not a notebook.
    """
    return list(_read(notebook, notebook.stat().st_mtime_ns))


@functools.cache
def _read(notebook: Path, changed: int) -> list[Any]:
    try:
        return list(nbformat.read(notebook, as_version=4).cells)  # type: ignore[no-untyped-call]
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise UsageError(f"{notebook} cannot be read as a notebook: {error}") from error


def defaults(notebook: Path) -> dict[str, Any]:
    """Returns the parameters of a notebook with their default values.

    Raises:
        UsageError: The file is not a notebook.
    """
    read_cells(notebook)
    return dict(_defaults(notebook, notebook.stat().st_mtime_ns))


@functools.cache
def _defaults(notebook: Path, changed: int) -> dict[str, Any]:
    inferred = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(about["default"]) for name, about in inferred.items()}


def select(notebooks: Path, only: Sequence[str]) -> list[Path]:
    """Returns the numbered notebooks of a folder, or those whose number or name is in `only`.

    Raises:
        UsageError: A number or a name is unknown.
    """
    numbered = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    names = [name for path in numbered for name in (path.stem, path.stem[:2])]
    if unknown := [name for name in only if name not in names]:
        raise UsageError(f"no notebook {', '.join(unknown)}; there are {', '.join(names[::2])}")
    return [path for path in numbered if not only or {path.stem, path.stem[:2]} & set(only)]


def check(value: Any, default: Any, name: str) -> Any:
    """Returns the value of a parameter, with whole numbers made floats where floats are expected.

    Args:
        value: The value.
        default: The parameter's default: the value, and each element of a list, has its type.
        name: The parameter's name; its range depends on it.

    Raises:
        UsageError: The value has another type, or is out of its range.
    """
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UsageError(
            f"parameter {name} is {value!r}, expected {type(default).__name__} "
            f"as its default {default!r}"
        )
    if isinstance(default, list):
        return _check_list(value, default, name)
    if type(value) is int:
        least = 0 if name in FROM_ZERO else 1
        if value < least:
            raise UsageError(f"parameter {name} has the value {value}, expected at least {least}")
    if isinstance(value, float):
        from_zero = name in SHARES_FROM_ZERO
        if not (math.isfinite(value) and 0 <= value <= 1 and (value or from_zero)):
            bounds = "from 0 to 1" if from_zero else "above 0 and at most 1"
            raise UsageError(f"parameter {name} has the value {value}, expected a share {bounds}")
    if name in CHOICES and value not in CHOICES[name]:
        raise UsageError(
            f"parameter {name} is {value!r}, expected one of {', '.join(CHOICES[name])}"
        )
    return value


def _check_list(values: list[Any], default: list[Any], name: str) -> list[Any]:
    if all(isinstance(each, str) for each in default):  # a list of names, which may be empty
        if not all(isinstance(value, str) and value for value in values):
            raise UsageError(f"parameter {name} is {values!r}, expected a list of names")
        return values
    if not values:
        raise UsageError(f"parameter {name} is an empty list, expected one as {default!r}")
    if isinstance(default[0], list):
        size = len(default[0])
        if not all(isinstance(value, list) and len(value) == size for value in values):
            raise UsageError(
                f"parameter {name} is {values!r}, expected lists of {size} as its default "
                f"{default!r}"
            )
    try:
        return [check(value, default[0], name) for value in values]
    except UsageError as error:
        raise UsageError(f"{error}; all of it is {values!r}") from None


def parse(text: str, default: Any, name: str) -> Any:
    """Returns the value that a word of the command line gives to a parameter with this default.

    Raises:
        UsageError: The word is not YAML.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        with contextlib.suppress(ValueError):
            return float(text)
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"-p {name} {text}: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Reads plain values only, and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                mark = node.value[at][0].start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", mark
                )
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Params:
    """The content of a parameter file.

    Attributes:
        models: Models that the notebooks are run with; empty: the notebooks' own.
        data: Folder of the published data sets; empty: none.
        sections: Values by parameter, by the number or name of a notebook.
    """

    models: tuple[str, ...] = ()
    data: str = ""
    sections: Mapping[str | int, Any] = dataclasses.field(default_factory=dict)


def read_params(file: Path | None) -> Params:
    """Returns the content of a parameter file; without a file, no models, data and sections.

    Raises:
        UsageError: The file is not YAML, gives a key twice, or does not hold what it should.
    """
    if file is None:
        return Params()
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, OSError) as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected a section of parameters per notebook")
    models, data = content.pop("models", []), content.pop("data", "")
    if not isinstance(models, list) or not all(isinstance(m, str) and m for m in models):
        raise UsageError(f"{file}: models is {models!r}, expected a list of names or folders")
    names = [name_of(model) for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{file}: two models are named {', '.join(twice)}")
    if not isinstance(data, str):
        raise UsageError(f"{file}: data is {data!r}, expected a folder")
    return Params(tuple(models), str(Path(data).expanduser().resolve()) if data else "", content)


def overrides(
    notebooks: Sequence[Path],
    selected: Sequence[Path],
    pairs: Sequence[Sequence[str]],
    file: Path | None,
) -> dict[Path, dict[str, Any]]:
    """Returns the parameters of each notebook that differ from its defaults.

    Args:
        notebooks: All notebooks: the section of one that is not run is checked too.
        selected: Those that are run.
        pairs: Name and value, for every selected notebook that has a parameter of that name.
        file: See `read_params`; sections are named by a notebook's number or its name.

    Raises:
        UsageError: A notebook or a parameter is unknown, or a value is refused by `check`.
    """
    known = {path: defaults(path) for path in notebooks}
    params = read_params(file)
    given = {"data": params.data} if params.data else {}
    chosen = {path: {n: v for n, v in given.items() if n in known[path]} for path in notebooks}
    for path, values in _by_notebook(params.sections, notebooks, file).items():
        for name, value in values.items():
            if name not in known[path]:
                raise UsageError(f"{file}: {path.stem} has no parameter {name!r}")
            try:
                chosen[path][name] = check(value, known[path][name], name)
            except UsageError as error:
                raise UsageError(f"{file}, {path.stem}: {error}") from None
    for name, text in pairs:
        takers = [path for path in selected if name in known[path]]
        if not takers:
            every = sorted({name for path in selected for name in known[path]})
            raise UsageError(f"no notebook has a parameter {name!r}; there are {', '.join(every)}")
        for path in takers:
            default = known[path][name]
            chosen[path][name] = check(parse(text, default, name), default, name)
    if params.models and any("model" in values for values in chosen.values()):
        raise UsageError(f"{file}: models are listed, so that no section or -p may name a model")
    return chosen


def _by_notebook(
    sections: Mapping[str | int, Any], notebooks: Sequence[Path], file: Path | None
) -> dict[Path, dict[Any, Any]]:
    """Returns the sections of a parameter file by notebook; each notebook has at most one."""
    found: dict[Path, dict[Any, Any]] = {}
    for section, values in sections.items():
        label = f"{section:02d}" if type(section) is int else section
        path = next((p for p in notebooks if label in (p.stem, p.stem[:2])), None)
        if path is None:
            raise UsageError(f"{file}: no notebook {section!r}")
        if path in found:
            raise UsageError(f"{file}: {path.stem} has two sections, expected one")
        if not isinstance(values, dict):
            raise UsageError(f"{file}: section {section} is {values!r}, expected name: value")
        found[path] = values
    return found
