"""What installed packages offer by name: entry points, listed without importing anything.

A wing whose optional packages are not installed is listed too; who asks for it hears what to install. A name may be
FILE.py:NAME, which takes NAME from a Python file of the user's own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from itemizedclip.runtime.errors import UserError

T = TypeVar("T")


class MissingExtraError(UserError):
    """Optional packages are not installed.

    Attributes:
        remedy: the command that installs them.
    """

    remedy: str = ""


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The things of one entry-point group.

    Attributes:
        group: such as "itemizedclip.models".
        what: one of them, for messages, such as "model family".
        built_in: those of the core, as "module:name"; imported when they are asked for.
    """

    group: str
    what: str
    built_in: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported."""
        return sorted({*self.built_in, *self._points()})

    def load(self, name: str) -> T:
        """The thing of that name.

        Raises:
            MissingExtraError: it needs packages that are not installed.
            UserError: there is none.
        """
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        if ".py:" in name:
            return cast(T, _from_file(name, self.what))
        point = self._points().get(name)
        if point is None:
            raise UserError(self.unknown(name))
        try:
            return cast(T, point.load())
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", point.module.partition(".")[0]):
                raise
            remedy = f"pip install {_what_brings(package, point)}"
            missing = MissingExtraError(f"the {self.what} {name} needs the package {package}: {remedy}")
            missing.remedy = remedy
            raise missing from error

    def unknown(self, name: str) -> str:
        """The message about a name that is none."""
        return unknown_name(self.what, name, self.names())

    def summary(self, name: str) -> str:
        """First line of the docstring of the thing of that name, or what it needs to be installed."""
        try:
            return (inspect.getdoc(self.load(name)) or "").partition("\n")[0]
        except MissingExtraError as error:
            return f"needs {error.remedy}"

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that does not exist; the nearest one is proposed."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"no {what} named {name}{hint}; there are: {', '.join(names) or 'none'}"


def _what_brings(package: str, point: EntryPoint) -> str:
    """What to give to pip: the extra of the entry point's own distribution that lists the package, else the package."""
    requirements = (point.dist.requires if point.dist is not None else None) or []
    for requirement in requirements:
        found = re.fullmatch(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"].*", requirement)
        if found and re.sub(r"[-_.]+", "-", found[1]).lower() == re.sub(r"[-_.]+", "-", package).lower():
            name = point.dist.name if point.dist is not None else ""
            return f"-e '.[{found[2]}]'" if name == "itemizedclip" else f"'{name}[{found[2]}]'"
    return package


def _from_file(name: str, what: str) -> Any:
    path_text, _, attribute = name.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the Python file that defines the {what} {attribute}")
    module_name = f"_itemizedclip_user_{path.stem}"
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != str(path.resolve()):
        spec = importlib.util.spec_from_file_location(module_name, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Registered before it runs: dataclasses look their module up, and loader workers import it again.
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise UserError(f"{path}: defines no {attribute}; expected the {what} of that name")
    return getattr(module, attribute)
