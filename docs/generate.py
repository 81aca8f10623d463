"""Pages of the site that are made, not written: the flags of every command, the API, files of the project folder.

    python docs/generate.py        writes docs/generated/, which is never committed

The flags are asked from the commands themselves (`--help`), the API from the packages that are installed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"

MOUNTED = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "tests/golden/README.md": "golden-vectors.md",
    "docs/search.md": "searching.md",
}
"""File of the project folder → its page below generated/project/."""

ROOMS = ("runtime", "models", "objectives", "data", "evaluation", "training", "viewer", "search")
"""Rooms of the core in the API reference, from the ground up; commands and wings have their flags instead."""

WINGS = ("itemizedclip_2d", "itemizedclip_radiology")


# --- flags: what a command says when it is asked --------------------------------------------------------------------


@dataclass
class Flag:
    """One flag, as --help shows it.

    Attributes:
        names: such as "--logs-dir PATH, --logs PATH".
        text: what it does, without the default.
        default: as it is shown, None when there is none to show.
    """

    names: str
    text: str
    default: str | None = None


@dataclass
class Help:
    """One screen of --help.

    Attributes:
        usage: first line.
        description: Markdown paragraphs.
        groups: (title, description, flags).
        subcommands: name → summary.
    """

    usage: str
    description: str = ""
    groups: list[tuple[str, str, list[Flag]]] = field(default_factory=list)
    subcommands: dict[str, str] = field(default_factory=dict)

    def flags(self) -> list[Flag]:
        return [flag for _, _, flags in self.groups for flag in flags]


class UnreadableHelpError(RuntimeError):
    """A help text that this file does not understand: mend `read_help`."""


def ask(main: Callable[[list[str]], object], argv: Sequence[str]) -> tuple[int, str]:
    """(exit status, what is printed) of a command, in this process."""
    os.environ["COLUMNS"] = "129"  # the widest at which tyro draws its boxes below each other
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # boxes are drawn where the encoding has them
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(list(argv))
        except SystemExit as stop:
            status = stop.code
    out.seek(0)
    return (status if isinstance(status, int) else 0 if status is None else 1), out.read()


def ask_help(main: Callable[[list[str]], object], *before: str) -> Help:
    """The help of a command, read."""
    status, text = ask(main, [*before, "--help"])
    if status:
        raise UnreadableHelpError(f"{main} {' '.join(before)} --help ends with {status}:\n{text}")
    return read_help(text)


def read_help(text: str) -> Help:
    """Help as tyro draws it: paragraphs, then boxes of rows `flag  text (default: value)`."""
    head, *boxes = re.split(r"^╭─", text, flags=re.MULTILINE)
    usage, _, description = head.partition("\n")
    found = Help(re.sub(r"^usage:\s*", "", usage).strip(), description.strip())
    for box in boxes:
        title, *rows = box.splitlines()
        title = title.strip("─╮ ")
        inner = [row[1:].rstrip().removesuffix("│").rstrip() for row in rows if row.startswith("│")]
        about, flags = _read_rows(inner, title)
        if "subcommands" in title:
            found.subcommands |= dict(_points(inner))
        elif flags:
            found.groups.append((title, about, flags))
    seen = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(flag.names for flag in found.flags())))
    drawn = {name for row in re.findall(r"^│ (-.*)$", text, re.MULTILINE) for name in _leading_flags(row)}
    if drawn - seen - {"--help"}:
        raise UnreadableHelpError(f"{found.usage}: not understood: {', '.join(sorted(drawn - seen))}")
    return found


def _leading_flags(row: str) -> list[str]:
    return re.findall(r"--[a-z][\w-]*", re.split(r" {2,}", row.strip())[0])


def _read_rows(rows: Iterable[str], title: str) -> tuple[str, list[Flag]]:
    about: list[str] = []
    flags: list[Flag] = []
    for row in rows:
        if set(row.strip()) <= {"─"}:
            continue
        if row.startswith(" -") or (title.startswith("positional") and re.match(r" \S", row)):
            names, *text = re.split(r" {2,}", row.strip(), maxsplit=1)
            flags.append(Flag(names, "".join(text)))
        elif flags:
            flags[-1].text += f" {row.strip()}"
        else:
            about.append(row.strip())
    for flag in flags:
        flag.text = flag.text.strip()
        match = re.fullmatch(r"(.*?)\s*\((default|repeatable|required)(?:: (.*))?\)", flag.text, re.DOTALL)
        if match:
            flag.text = match[1]
            flag.default = match[3] if match[2] == "default" else match[2]
    return " ".join(about), [flag for flag in flags if flag.names != "-h, --help"]


def _points(rows: Iterable[str]) -> Iterator[tuple[str, str]]:
    for row in rows:
        match = re.match(r"\s*• (\S+)\s*(.*)", row)
        if match:
            yield match[1], match[2]


VARIES = "differs, see the tables below"
"""Default of a flag that recipes set."""


# --- flags: pages ----------------------------------------------------------------------------------------------------


def flag_markdown(flag: Flag) -> str:
    """A flag as a definition with a place to link to."""
    names = flag.names.replace("{None}|", "")
    default = f" Default: `{flag.default}`." if flag.default not in (None, "required", "", "None", "''") else ""
    if flag.default == VARIES:
        default = f" Default: {VARIES}."
    needed = " **Must be given.**" if flag.default == "required" else ""
    return f"::::{{option}} {names}\n{_prose(flag.text)}{needed}{default}\n::::\n"


def _prose(text: str) -> str:
    """Text of a help as Markdown: nothing in it is markup but `code`, and flags are code."""
    if "`" not in text:
        text = re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]{}$|~\\])", r"\\\1", part) for part in parts)


def groups_markdown(groups: Iterable[tuple[str, str, list[Flag]]], level: int) -> str:
    """Groups of flags below headings of a level."""
    written = []
    for title, about, flags in groups:
        shown = title.removesuffix(" options").strip().capitalize() or "Options"
        heading = "" if shown.lower() in ("options", "positional arguments") else f"{'#' * level} {shown}\n\n"
        written.append(f"{heading}{_prose(about)}\n\n" + "\n".join(map(flag_markdown, flags)))
    return "\n".join(written)


def description_markdown(text: str) -> str:
    """The paragraphs of a help; lines that are laid out by hand stay so."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        laid_out = any(line.startswith("  ") for line in block.splitlines())
        blocks.append(f"```text\n{block}\n```" if laid_out else _prose(block))
    return "\n\n".join(blocks)


def help_markdown(program: str, shown: Help, level: int) -> str:
    """One command's help: how it is called, what it does, its flags."""
    body = [
        f"```{{program}} {program}\n```\n",
        f"```text\n{shown.usage}\n```\n",
        description_markdown(shown.description),
    ]
    return "\n".join([*body, "", groups_markdown(shown.groups, level)])


def command_page(program: str, summary: str, main: Callable[[list[str]], object], names: Sequence[str] = ()) -> str:
    """The page of a command; of one that begins with a name, what all names share and what each adds."""
    title = f"# `{program}`\n\n{_prose(sentence(summary))}\n"
    if not names:
        shown = ask_help(main)
        parts = [title, help_markdown(program, shown, 2)]
        for name, about in shown.subcommands.items():
            below = ask_help(main, name)
            parts.append(f"\n## `{name}`\n\n{_prose(about)}\n\n{help_markdown(f'{program} {name}', below, 3)}")
        return "\n".join(parts)
    helps = {name: ask_help(main, name) for name in names}
    return title + "\n" + named_pages(program, helps)


def named_pages(program: str, helps: dict[str, Help]) -> str:
    """Flags that all names share once, then what each has of its own and the values it changes."""
    first = next(iter(helps.values()))
    facts = {name: {flag.names: flag for flag in shown.flags()} for name, shown in helps.items()}
    shared = {
        names
        for names, flag in facts[next(iter(facts))].items()
        if all(names in own and own[names].text == flag.text for own in facts.values())
    }
    common_default = {
        names: values.pop() if len(values := {own[names].default for own in facts.values()}) == 1 else VARIES
        for names in shared
    }
    groups = []
    for title, about, flags in first.groups:
        kept = [Flag(flag.names, flag.text, common_default[flag.names]) for flag in flags if flag.names in shared]
        if kept:
            groups.append((title, about, kept))
    parts = [f"```{{program}} {program}\n```\n", "## Flags that all of them take\n", groups_markdown(groups, 3)]
    for name, shown in helps.items():
        parts.append(
            f"\n## `{name}`\n\n```{{program}} {program} {name}\n```\n\n{description_markdown(shown.description)}\n"
        )
        changed = [
            flag
            for flag in shown.flags()
            if flag.names in shared and len({o[flag.names].default for o in facts.values()}) > 1
        ]
        if changed:
            cells = (
                f"| `{_cell(flag.names.replace('{None}|', ''))}` | `{_cell(flag.default or '')}` |" for flag in changed
            )
            parts.append("| flag | default here |\n|---|---|\n" + "\n".join(cells) + "\n")
        own = [(t, a, [flag for flag in flags if flag.names not in shared]) for t, a, flags in shown.groups]
        parts.append(groups_markdown([group for group in own if group[2]], 3))
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands() -> Iterator[tuple[str, str, Callable[[list[str]], object], list[str]]]:
    """(program, summary, its main, names it begins with) of every command a user has."""
    from itemizedclip.commands.cli import COMMANDS
    from itemizedclip.runtime.registry import Registry

    for name, (module_name, summary) in COMMANDS.items():
        module = importlib.import_module(module_name)
        registry = next((value for value in vars(module).values() if isinstance(value, Registry)), None)
        names = list(registry.names()) if registry else list(getattr(module, "PREPARATIONS", {}))
        yield f"itemizedclip {name}", summary, module.main, names
    for path in sorted([*ROOT.glob("2D_images_tasks/src/**/*.py"), *ROOT.glob("Radiology_Tasks/src/open_*/*.py")]):
        if any(part in WINGS for part in path.parts):
            continue
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").removesuffix(" (see --help).")
        yield path.relative_to(ROOT).as_posix(), summary, partial(run_script, path), names_of_script(path)
    for module_name in sorted(modules_in_the_pages()):
        module = importlib.import_module(module_name)
        summary = (inspect.getdoc(module) or "").partition("\n\n")[0]
        yield f"python -m {module_name}", summary, module.main, []


def run_script(path: Path, argv: Sequence[str]) -> None:
    """A script, run as a user runs it."""
    before, sys.argv = sys.argv, [str(path), *argv]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def names_of_script(path: Path) -> list[str]:
    """What a script wants to be told first, such as coco or flickr; it says so when it is not."""
    status, said = ask(partial(run_script, path), ["--help"])
    expected = re.search(r"expected a command first: (.*)", said) if status else None
    return expected[1].strip().split(" or ") if expected else []


def modules_in_the_pages() -> set[str]:
    """Modules of the wings that the pages tell users to run with `python -m`."""
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return set(re.findall(rf"python3? -m ((?:{'|'.join(WINGS)})[\w.]*\w)", text))


def sentence(text: str) -> str:
    """One line, a capital first and a full stop last."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _short(program: str) -> str:
    """A program's name for the side bar."""
    if program.startswith("python -m "):
        return ".".join(program.split(".")[-2:])
    return "/".join(program.split("/")[-2:])


def write_flags(folder: Path) -> None:
    """One page per command, and their list."""
    folder.mkdir(parents=True)
    rows, pages = [], []
    for program, summary, main, names in commands():
        page = re.sub(r"[^\w.-]+", "-", program.removesuffix(".py"))
        (folder / f"{page}.md").write_text(command_page(program, summary, main, names), encoding="utf-8")
        rows.append(f"| [`{program}`]({page}.md) | {_prose(sentence(summary))} |")
        pages.append(f"{_short(program)} <{page}>")
    text = [
        "# Every flag of every command", "",
        "Made from the commands themselves: `--help` says the same. An unknown flag is an error, never ignored.", "",
        "| command | what it does |", "|---|---|", *rows, "",
        "```{toctree}", ":hidden:", "", *pages, "```", "",
    ]  # fmt: skip
    (folder / "index.md").write_text("\n".join(text), encoding="utf-8")


# --- API -------------------------------------------------------------------------------------------------------------


def modules_below(package: str) -> list[str]:
    """The package and every module in it, by name; nothing is imported but packages."""
    root = importlib.import_module(package)
    return [package, *sorted(found.name for found in pkgutil.walk_packages(root.__path__, f"{package}."))]


def api_page(package: str, title: str, intro: str = "") -> str:
    """A page with every module of a package that documents something."""
    parts = [f"# {title}\n", intro]
    for name in modules_below(package):
        inside = name.removeprefix(package).lstrip(".")
        heading = f"## `{inside}`\n\n" if inside else ""
        members = "   :members:\n   :member-order: bysource\n" if inside else ""
        parts.append(f"{heading}```{{eval-rst}}\n.. automodule:: {name}\n{members}```\n")
    return "\n".join(parts)


def public_page(package: ModuleType) -> str:
    """The functions of `import itemizedclip as ic`, whatever `__all__` lists."""
    parts = ["# Python API\n", "```{eval-rst}\n.. automodule:: itemizedclip\n   :no-members:\n```\n"]
    for name in getattr(package, "__all__", []):
        if callable(getattr(package, name)):
            kind = "class" if inspect.isclass(getattr(package, name)) else "function"
            parts.append(f"## {name}\n\n```{{eval-rst}}\n.. auto{kind}:: itemizedclip.{name}\n```\n")
    return "\n".join(parts)


def write_api(folder: Path) -> None:
    """The public API and the rooms of the core."""
    folder.mkdir(parents=True)
    pages = {"public": public_page(importlib.import_module("itemizedclip"))}
    pages |= {room: api_page(f"itemizedclip.{room}", f"itemizedclip.{room}") for room in ROOMS}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    rooms = [
        "# Inside the package\n", "Its rooms from the ground up: a room uses those above it in this list.\n",
        "```{toctree}", ":maxdepth: 1", "", *ROOMS, "```", "",
    ]  # fmt: skip
    (folder / "index.md").write_text("\n".join(rooms), encoding="utf-8")


# --- files of the project folder -------------------------------------------------------------------------------------


def mount(folder: Path) -> None:
    """Copy pages that live elsewhere; their links still lead where they led."""
    folder.mkdir(parents=True)
    for source, page in MOUNTED.items():
        if (ROOT / source).exists():
            text = relinked((ROOT / source).read_text(encoding="utf-8"), (ROOT / source).parent, folder)
            (folder / page).write_text(text, encoding="utf-8")


def relinked(text: str, origin: Path, place: Path) -> str:
    """Markdown whose relative links, written for `origin`, are read from `place`.

    Links to mounted files lead to their pages, links to other files of the project become their names.
    """

    def changed(match: re.Match[str]) -> str:
        shown, target, anchor = match[1], match[2], match[3] or ""
        goal = (origin / target).resolve()
        mounted = {(ROOT / source).resolve(): GENERATED / "project" / page for source, page in MOUNTED.items()}
        goal = mounted.get(goal, goal)
        if goal.suffix == ".png" or goal.is_relative_to(DOCS) or not (origin / target).exists():
            return f"[{shown}]({os.path.relpath(goal, place)}{anchor})"  # a dead link stays one, and is found
        return shown if "`" in shown else f"`{goal.relative_to(ROOT)}`"

    return re.sub(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)", changed, text)


def mend_links(app: object, page: str, source: list[str]) -> None:
    """Mend links of written pages to files outside docs/ (event source-read); the index lists new pages too."""
    if not page.startswith("generated/"):
        place = (DOCS / page).parent
        source[0] = relinked(source[0], place, place)
    if page == "index":
        listed = source[0].split()
        others = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in {*listed, "index", "search"})
        source[0] = source[0].replace("\ntroubleshooting\n", "\n" + "\n".join([*others, "troubleshooting"]) + "\n")


def main() -> None:
    """Write everything anew."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    write_flags(GENERATED / "flags")
    write_api(GENERATED / "api")
    mount(GENERATED / "project")


if __name__ == "__main__":
    main()
