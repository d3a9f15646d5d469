"""The import floors of the architecture: a module imports its own floor or lower ones only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "settings": 0,
    "settings_file": 0,
    "config": 0,
    "config_losses": 0,
    "config_augment": 0,
    "config_margins": 0,
    "config_optimizers": 0,
    "config_run": 0,
    "schedule": 0,
    "sharding": 0,
    "permutation": 0,
    "metrics": 0,
    "console": 0,
    "preemption": 0,
    "config_monitor": 0,
    "exporter": 0,
    "targets": 0,
    "errors": 0,
    "beats": 0,
    "network": 0,
    "ledger": 0,
    "disk": 0,
    "data": 1,
    "backbones": 1,
    "margins": 1,
    "losses": 1,
    "sampling": 1,
    "tiles": 1,
    "row_format": 1,
    "row_rules": 1,
    "row_tile": 1,
    "staging": 1,
    "unsampled": 1,
    "row_optimizer": 1,
    "protocols": 1,
    "figures": 1,
    "report": 1,
    "environment": 1,
    "foreign": 1,
    "guidance": 1,
    "centers": 1,
    "tensor_file": 1,
    "checkpoint_folder": 1,
    "collectives": 2,
    "watchdog": 2,
    "pace": 2,
    "runtime": 2,
    "agreement": 2,
    "embedding": 2,
    "center_losses": 3,
    "embedding_losses": 3,
    "bad_images": 3,
    "margin_loss": 3,
    "head": 3,
    "build": 4,
    "saver": 4,
    "checkpoint": 4,
    "evaluation": 4,
    "trained": 4,
    "start": 4,
    "monitor": 4,
    "preflight": 5,
    "facts": 5,
    "train_step": 5,
    "training_data": 5,
    "recorder": 5,
    "train": 5,
    "finished": 5,
}

MODULES = sorted((ROOT / "partialfc").rglob("*.py"))


def floor_of(name: str) -> int:
    """Floor of ``partialfc.<name>...``; the package itself only hands out public names."""
    part = name.split(".")[1] if "." in name else ""
    return FLOORS[part] if part else 0


def imports_of(path: Path) -> list[str]:
    """Modules that a file imports at run time, wherever the statement stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_its_own_floor_or_lower(path):
    name = module_name(path)
    if name == "partialfc":
        return
    floor, imports = floor_of(name), imports_of(path)
    for imported in imports:
        if imported.startswith("partialfc."):
            assert floor_of(imported) <= floor, f"{name} (floor {floor}) imports {imported}"
        if floor < 2:
            assert not imported.startswith("torch.distributed"), f"{name} imports {imported}"
    if name not in ("partialfc.data.dali", "partialfc.data.dali_changes"):
        assert not any(i.startswith("nvidia") for i in imports), f"{name} imports DALI"
    for root in ("launch", "tools", "tests", "pickle", "mxnet"):
        assert not any(i.split(".")[0] == root for i in imports), f"{name} imports {root}"


def test_floor_0_needs_no_torch():
    """--help and the pack tools start without it."""
    modules = [f"partialfc.{name}" for name, floor in FLOORS.items() if floor == 0]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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
