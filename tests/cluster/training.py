"""A small training on real handwriting, for what surrounds it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.support.places import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def arguments(packs: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        "configs/omniglot.toml",
        f"data.train={packs / 'train.rec'}",
        "data.loader=torch",
        "verification.pairs=[]",
        "verification.identification=[]",
        "verification.every_steps=0",
        f"run.folder={folder}",
        "run.epochs=",
        "schedule.warmup_steps=2",
        "data.global_batch=48",
        "backbone.name=convnet_s",
        "log.every_steps=1",
        "log.tensorboard=false",
        *overrides,
    ]


def torchrun(ranks: int, words: list[str], **keywords) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, f"--nproc-per-node={ranks}", "launch/train.py", *words]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **keywords
    )


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    found = (json.loads(line) for line in lines)
    return {record["step"]: record["loss"] for record in found if "loss" in record}


def last_step(folder: Path) -> int:
    return max(losses(folder), default=0)


def final_tensors(folder: Path, step: int) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted((folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        for name, value in load_file(path).items():
            tensors[f"{path.name}:{name}"] = value
    assert tensors
    return tensors


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    """The same losses and the same final tensors, bit for bit."""
    assert losses(one) == losses(other)
    expected, found = final_tensors(one, step), final_tensors(other, step)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name
