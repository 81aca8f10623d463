"""Things that packages offer by name: models, recipes, benchmarks, readers of inputs.

A package registers them as entry points in its pyproject.toml; nothing is imported until one is asked for. A name may
also be FILE.py:NAME, which takes NAME from a Python file of the user's own.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from itemizedclip.runtime.errors import UserError


@dataclass(frozen=True)
class Registry:
    """One group of entry points.

    Attributes:
        group: its name, such as itemizedclip.recipes.
        what: one of its things, for messages, such as "recipe".
    """

    group: str
    what: str

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All registered names, in alphabetical order; imports nothing."""
        return sorted(self._points)

    def load(self, name: str) -> Any:
        """What is registered under a name, or NAME of a Python file for FILE.py:NAME.

        Raises:
            UserError: no such name (the nearest is proposed), a file without it, or a package that is not installed.
        """
        if ".py:" in name:
            return _from_file(name, self.what)
        if name not in self._points:
            raise UserError(unknown_name(self.what, name, self.names()))
        try:
            return self._points[name].load()
        except ModuleNotFoundError as error:
            raise UserError(f"{self.what} {name}: {needs_extra(error)}") from error

    def summary(self, name: str) -> str:
        """First line of the docstring of what is registered, or what it needs to be installed."""
        try:
            return (self.load(name).__doc__ or "").strip().partition("\n")[0]
        except UserError as error:
            return str(error).partition(": ")[2]


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that does not exist; the nearest one is proposed."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"no {what} named {name}{hint}; there are: {', '.join(names)}"


def needs_extra(error: ModuleNotFoundError) -> str:
    """What to install when a wing's own packages are missing."""
    return f"needs the package {error.name}: {sys.executable} -m pip install -e '.[radiology]' in the project folder"


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
