"""What installed packages offer by name: entry points, listed without importing anything.

A wing whose optional packages are not installed is listed too; who asks for it hears what to install.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

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
        built_in: those of the core.
    """

    group: str
    what: str
    built_in: Mapping[str, T] = field(default_factory=dict)

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
            return self.built_in[name]
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
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"no {self.what} named {name}{hint}; there are {', '.join(self.names()) or 'none'}"

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


def _what_brings(package: str, point: EntryPoint) -> str:
    """What to give to pip: the extra of the entry point's own distribution that lists the package, else the package."""
    requirements = (point.dist.requires if point.dist is not None else None) or []
    for requirement in requirements:
        found = re.fullmatch(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"].*", requirement)
        if found and re.sub(r"[-_.]+", "-", found[1]).lower() == re.sub(r"[-_.]+", "-", package).lower():
            name = point.dist.name if point.dist is not None else ""
            return f"-e '.[{found[2]}]'" if name == "itemizedclip" else f"'{name}[{found[2]}]'"
    return package
