"""The house: a folder is a floor, and a file imports its own floor or lower ones only."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

FLOORS = (
    (
        "errors",
        "alignment",
        "cores",
        "definitions",
        "keyed",
        "words",
        "writing",
        "numerics",
        "pinned",
        "backbones",
        "protocols",
        "distributed",
    ),
    ("records", "margins", "losses", "data"),
    ("head", "config", "runtime"),
    ("model",),
    ("checkpoint", "evaluation"),
    ("monitoring",),
    ("training",),
    ("commands", "slurm", "status"),
)
"""The rooms of ``partialfc/``, bottom up: a folder, or a file that stands alone."""

HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = ("partialfc", "partialfc.__main__")
"""They hand out what is inside: from the rooms no one imports them."""

MODULES = sorted((ROOT / "partialfc").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports_of(path: Path, *, at_run_time: bool = True) -> set[str]:
    """Modules that a file names in an import, wherever the statement stands.

    ``at_run_time`` leaves out what a type checker alone reads.
    """
    tree = ast.parse(path.read_text())
    nodes = set(ast.walk(tree))
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                nodes -= set(ast.walk(node)) - {node}
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in NAMES else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def room_of(name: str) -> str:
    return name.split(".")[1]


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """Return one circle of a graph, or nothing."""
    order: dict[str, set[str]] = {name: set(to) for name, to in arrows.items()}
    sorter = graphlib.TopologicalSorter(order)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_its_floor():
    rooms = {room_of(name) for name in NAMES if name not in DOORS}
    assert rooms == set(HEIGHT)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_file_imports_its_own_floor_or_lower(path):
    name = module_name(path)
    for imported in imports_of(path, at_run_time=False):
        if imported.startswith("partialfc") and name not in DOORS:
            assert imported not in DOORS, f"{name} imports {imported}: name the room"
            assert HEIGHT[room_of(imported)] <= HEIGHT[room_of(name)], f"{name} imports {imported}"
        if imported.split(".")[0] == "nvidia":
            assert name.startswith("partialfc.data.loaders.dali"), f"{name} imports DALI"
        outside = ("launch", "tools", "tests", "pickle", "mxnet")
        assert imported.split(".")[0] not in outside, f"{name} imports {imported}"


def test_no_two_rooms_and_no_two_files_form_a_circle():
    files: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {room: set() for room in HEIGHT}
    for path in MODULES:
        name = module_name(path)
        if name in DOORS:
            continue
        files[name] = {to for to in imports_of(path) if to in NAMES and to != name}
        rooms[room_of(name)] |= {room_of(to) for to in files[name]} - {room_of(name)}
    assert circle_in(rooms) == []
    assert circle_in(files) == []


def test_settings_and_records_need_no_torch():
    """--help, the pack tools and a look at a run start without it."""
    modules = [
        "partialfc",
        "partialfc.__main__",
        "partialfc.errors",
        "partialfc.config",
        "partialfc.head.options",
        "partialfc.head.plan",
        "partialfc.records.metrics",
        "partialfc.records.ledger",
        "partialfc.records.console",
        "partialfc.data.packs.pack",
        "partialfc.checkpoint.folder",
        "partialfc.monitoring.exporter",
        "partialfc.monitoring.targets",
        "partialfc.runtime.preemption",
        "partialfc.slurm.submit",
        "partialfc.status.page",
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_start_does_not_wait_for_what_its_end_draws_with():
    """Every rank of every restart would import it, and a lost host costs that much longer."""
    code = (
        "import sys, partialfc.training.run\n"
        "late = {'matplotlib', 'jinja2', 'tensorboard', 'partialfc.records.report'}\n"
        "sys.exit(bool(late & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_changes_where_modules_are_found():
    for folder in ("partialfc", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "sys.path" not in path.read_text(), path


def test_modules_are_small():
    sizes = {module_name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert not {name: lines for name, lines in sizes.items() if lines > 400}


def test_nothing_that_was_written_is_trusted():
    """No unpickling; a torch.load that makes data only, in the one module that reads strangers."""
    for folder in ("partialfc", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            for banned in ("pickle.load", "allow_pickle=True", "weights_only=False"):
                assert banned not in text, f"{path}: {banned}"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert path.name == "foreign.py", f"{path}: torch.load"
                    assert "weights_only=True" in ast.unparse(node), f"{path}: {ast.unparse(node)}"


SUFFIXED = re.compile(r"[a-z][a-z0-9_]*_([A-Z1-9bkn]{1,4})")
LEGEND = re.compile(r"Shape suffix(?:es)?: (.*?)\.(?:\s|$)", re.DOTALL)


def letters_of(path: Path) -> set[str]:
    """Return the letters of the shape suffixes that a module's names have."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "id", getattr(node, "arg", getattr(node, "attr", None)))
        match = SUFFIXED.fullmatch(name) if isinstance(name, str) else None
        if match and (re.search("[A-Z]", match[1]) or match[1] in ("b", "n", "n1")):
            found |= set(re.sub(r"\d", "", match[1]))
    return found


def test_every_shape_suffix_is_explained_where_it_is_used():
    missing = {}
    for top in ("partialfc", "tools"):
        for path in sorted((ROOT / top).rglob("*.py")):
            legend = LEGEND.search(path.read_text().replace("\n# ", "\n"))
            known = set(re.findall(r"(\w) =", legend[1])) if legend else set()
            if left := letters_of(path) - known:
                missing[str(path.relative_to(ROOT))] = sorted(left)
    assert not missing
