"""The house keeps its plan: the order of rooms, an import that loads nothing heavy, wheels that hold what they must.

The order, from the ground: runtime, models < objectives, data < evaluation < training, viewer < search < commands.
An import leads to a lower floor or stays in its room; models may use runtime. The wings stand on the core, know nothing
of each other, and the core knows no wing: it finds them by entry points.
"""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
CORE = "itemizedclip"
WINGS = {
    "itemizedclip_2d": ROOT / "2D_images_tasks" / "src",
    "itemizedclip_radiology": ROOT / "Radiology_Tasks" / "src",
}

FLOORS = (
    ("runtime", "models"),
    ("objectives", "data"),
    ("evaluation",),
    ("training", "viewer"),
    ("search",),
    ("commands",),
    ("api", "__init__", "__main__"),  # the doors of the package: they may open every room
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

ALLOWED: dict[str, str] = {}
"""Arrows known to be wrong, "file imports module" → why it is still so. This may only get shorter: an entry that is no
longer true fails the test, and is to be deleted."""

NAMES_A_WING: dict[str, str] = {}
"""Files of the core that may name a wing in a string, and why."""

HEAVY = {
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
    "open_clip",
    "transformers",
    "timm",
}
"""What takes from tenths of a second to seconds to import."""

ModuleName = str


# --- the arrows of a file --------------------------------------------------------------------------------------------


def arrows(tree: ast.Module, package: str) -> Iterator[tuple[int, ModuleName]]:
    """(line, module of ours that this file asks for), by import statement or by name in a string.

    Args:
        tree: the file.
        package: package the file lies in, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module in (CORE, *WINGS):  # `from itemizedclip import training` asks for the room
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            elif is_ours(module):
                yield node.lineno, module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "itemizedclip.commands.train" or "itemizedclip.commands.train:main": what importlib is given. Two words
            # alone, such as "itemizedclip.recipes", name a group of entry points.
            name = re.fullmatch(r"(\w+(?:\.\w+){2,})(?::\w+)?", node.value)
            if name is not None and is_ours(name[1]):
                yield node.lineno, name[1]


def is_ours(module: ModuleName) -> bool:
    return module.partition(".")[0] in (CORE, *WINGS)


def room_of(module: ModuleName) -> str:
    """The room of a module of the core, such as "training" of itemizedclip.training.engine."""
    _, _, inside = module.partition(".")
    room = inside.partition(".")[0]
    return room if room in FLOOR_OF else "__init__"  # `from itemizedclip import load`: a name of the package itself


def is_wrong(source: ModuleName, target: ModuleName) -> bool:
    """Whether the house forbids `source` to import `target`."""
    home, goal = source.partition(".")[0], target.partition(".")[0]
    if home != CORE:
        return goal not in (home, CORE)
    if goal != CORE:
        return True
    room, other = room_of(source), room_of(target)
    downwards = FLOOR_OF[other] < FLOOR_OF[room] or FLOOR_OF[room] == len(FLOORS) - 1
    return not (room == other or downwards or (room, other) == ("models", "runtime"))


def files_of_the_house() -> Iterator[tuple[Path, ModuleName]]:
    """Every Python file of the three packages, and its module name."""
    for package, parent in {CORE: ROOT, **WINGS}.items():
        for path in sorted((parent / package).rglob("*.py")):
            parts = path.relative_to(parent).with_suffix("").parts
            yield path, ".".join(parts)


def wrong_arrows() -> dict[str, list[int]]:
    """The arrows that the house forbids, as "file imports module" → lines."""
    found: dict[str, list[int]] = {}
    for path, module in files_of_the_house():
        package = module.removesuffix(".__init__") if path.name == "__init__.py" else module.rpartition(".")[0]
        for line, target in arrows(ast.parse(path.read_text(encoding="utf-8")), package):
            if is_wrong(module, target):
                found.setdefault(f"{path.relative_to(ROOT).as_posix()} imports {target}", []).append(line)
    return found


# --- the order of rooms ----------------------------------------------------------------------------------------------


def test_every_room_has_its_floor():
    rooms = {path.relative_to(ROOT / CORE).parts[0].removesuffix(".py") for path in (ROOT / CORE).rglob("*.py")}
    assert sorted(rooms - set(FLOOR_OF)) == [], "say in FLOORS where these stand"


def test_no_arrow_leads_upwards():
    found = wrong_arrows()
    new = [arrow.replace(" imports", f":{lines[0]} imports") for arrow, lines in found.items() if arrow not in ALLOWED]
    assert new == [], "arrows upwards, sideways or into a wing:\n" + "\n".join(new)
    gone = sorted(set(ALLOWED) - set(found))
    assert gone == [], "no longer true; delete from ALLOWED:\n" + "\n".join(gone)


@pytest.mark.parametrize(
    ("source", "target", "wrong"),
    [
        ("itemizedclip.runtime.files", "itemizedclip.models.factory", True),
        ("itemizedclip.models.factory", "itemizedclip.runtime.files", False),
        ("itemizedclip.objectives.loss", "itemizedclip.data.items", True),  # neighbours on one floor
        ("itemizedclip.evaluation.ranks", "itemizedclip.training.engine", True),
        ("itemizedclip.training.engine", "itemizedclip.evaluation.ranks", False),
        ("itemizedclip.training.engine", "itemizedclip.load", True),  # the package's own door
        ("itemizedclip.search.index", "itemizedclip_2d.rsicd", True),
        ("itemizedclip_2d.rsicd", "itemizedclip.commands.train", False),
        ("itemizedclip_2d.rsicd", "itemizedclip_radiology.data", True),
        ("itemizedclip.api", "itemizedclip.commands.train", False),
    ],
)
def test_the_order_itself(source, target, wrong):
    assert is_wrong(source, target) is wrong


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import itemizedclip.training.engine as e", "itemizedclip.training.engine"),
        ("from itemizedclip import training", "itemizedclip.training"),
        ("def f():\n    from ..training import engine", "itemizedclip.training"),
        ("from . import files", "itemizedclip.runtime"),
        ('import_module("itemizedclip.training.engine")', "itemizedclip.training.engine"),
        ('COMMAND = "itemizedclip.commands.train:main"', "itemizedclip.commands.train"),
        ('GROUP = "itemizedclip.recipes"', None),
        ("import torch", None),
    ],
)
def test_every_form_of_import_is_seen(text, expected):
    found = [target for _, target in arrows(ast.parse(text), "itemizedclip.runtime")]
    assert found == ([] if expected is None else [expected])


def test_the_core_names_no_wing():
    named = {}
    for path in sorted((ROOT / CORE).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for place in (*WINGS, *(folder.relative_to(ROOT).parts[0] for folder in WINGS.values())):
            lines = [string.lineno for string in strings if place in string.value]
            if lines:
                named.setdefault(path.relative_to(ROOT).as_posix(), []).append(f"{place} in line {lines[0]}")
    assert {file: places for file, places in named.items() if file not in NAMES_A_WING} == {}
    assert sorted(set(NAMES_A_WING) - set(named)) == [], "no longer true; delete from NAMES_A_WING"


# --- import time -----------------------------------------------------------------------------------------------------


def packages_loaded_by(code: str) -> set[str]:
    """Top-level packages outside the standard library that a new interpreter loads for this code."""
    program = f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stderr.split()} - set(sys.stdlib_module_names)


def test_import_loads_nothing_but_itself():
    assert packages_loaded_by("import itemizedclip; itemizedclip.__version__; dir(itemizedclip)") == {CORE}


def test_the_list_of_commands_loads_nothing_heavy():
    loaded = packages_loaded_by("from itemizedclip.commands import cli; cli.main(['--help'])")
    assert CORE in loaded
    assert loaded & HEAVY == set()


def test_flags_of_runs_load_no_towers():
    """What takes most of the time to import is loaded when a model is made, not for --help or a wrong flag."""
    loaded = packages_loaded_by(
        "import itemizedclip.commands.demo, itemizedclip.commands.explain, itemizedclip_2d.recipes, "
        "itemizedclip_radiology.recipes"
    )
    assert loaded & {"open_clip", "timm", "transformers", "sklearn", "torchvision"} == set()


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy without what earlier builds left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (CORE, "2D_images_tasks", "Radiology_Tasks", "tests", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build", "visualizations")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir",
               "--disable-pip-version-check", "--wheel-dir", str(folder), str(source)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_holds_three_packages_whole_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    wanted = {
        path.relative_to(parent).as_posix()
        for package, parent in {CORE: ROOT, **WINGS}.items()
        for path in (parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {PurePosixPath(name).parts[0] for name in held} == {CORE, *WINGS}
    assert held == wanted
    for package in (CORE, *WINGS):
        assert f"{package}/py.typed" in held
    assert [name for name in held if name.endswith("builtin_vocab.txt")]


@pytest.mark.slow
def test_what_the_wheel_announces_is_in_it(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    announced = configparser.ConfigParser(delimiters=("=",))
    announced.optionxform = str  # type: ignore[assignment,method-assign]
    announced.read_string(wheel.read(name).decode())
    assert announced["console_scripts"]["itemizedclip"]
    for group in announced.sections():
        for target in announced[group].values():
            module, _, function = target.partition(":")
            tree = ast.parse(wheel.read(module.replace(".", "/") + ".py"))
            assert function in {getattr(node, "name", None) for node in tree.body}, f"{group}: {target}"


# --- what the documents say ------------------------------------------------------------------------------------------


def message_templates() -> set[str]:
    """Every string of the product, with "…" in the place of what differs from case to case."""
    return {
        comparable(template(node))
        for path, _ in files_of_the_house()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)
    }


def template(node: ast.expr) -> str:
    """A string, a formatted one, or a sum of them."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return re.sub(r"%[sdr]|%\.\df", "…", node.value) if is_text else "…"


def comparable(message: str) -> str:
    """One "…" for several, one space for white space."""
    return re.sub(r"…(?:\s*…)+", "…", " ".join(message.split()))


def test_messages_explained_in_the_documents_are_those_of_the_code():
    """Each message in a ```text block of docs/troubleshooting.md is, word for word, one that the code can say."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [comparable(block) for block in re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)]
    assert len(messages) > 20
    said = message_templates()
    assert [message for message in messages if message not in said] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_paths_in_the_documents_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = (ROOT, *WINGS.values(), ROOT / CORE, *(ROOT / CORE / room for rooms in FLOORS for room in rooms))
    named = re.findall(r"`([\w./-]+\.(?:py|sh|md|toml)|[\w.]+/[\w./]*)`", text) + re.findall(r"\]\(([^)#:]+)\)", text)
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


# --- nothing executes data -------------------------------------------------------------------------------------------

SAFE_LOADS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def test_files_are_loaded_without_running_what_they_hold():
    found = 0
    for folder in (ROOT / CORE, *(base / name for name, base in WINGS.items())):
        for path in folder.rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if not isinstance(call, ast.Call):
                    continue
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert "trust_remote_code" not in given, path
                wanted = SAFE_LOADS.get(ast.unparse(call.func))
                if wanted and given.get("pickle_module") == "_PICKLE":
                    continue  # an unpickler that calls nothing of a file; tests/radiology/test_pickled_module.py
                if wanted:
                    found += 1
                    assert given.get(wanted[0]) == str(wanted[1]), f"{path}:{call.lineno}"
    assert found >= 4
