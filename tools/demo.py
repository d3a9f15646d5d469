"""The whole of partialfc in three minutes: render a pack of faces, train on it, verify on others.

Two processes on a CPU, one per GPU where there are GPUs. Everything lies in packs/demo and
runs/demo; a run of the demo before is replaced.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from partialfc.cores import usable_cores
from tools._faces.packs import write_demo_packs

ROOT = Path(__file__).resolve().parents[1]

IDENTITIES = 1200
IMAGES_PER_IDENTITY = 14


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return the exit code of the training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "override", nargs="*", help="key.sub=value, as of launch/train.py, on top of the demo's"
    )
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    started = time.monotonic()
    render()
    shutil.rmtree("runs/demo", ignore_errors=True)
    import torch

    gpus = torch.cuda.device_count()
    ranks = 1 << min(gpus, 8).bit_length() - 1 if gpus else 2  # a power of 2 divides the batch
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={ranks}", "launch/train.py", "configs/demo.toml", *options.override),
    ]
    print(f"\n$ {' '.join(['torchrun', *command[3:]])}\n", flush=True)
    # Left out, torchrun would set it to 1 with a warning of eight lines.
    threads = str(max(1, usable_cores() // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code == 0:
        print(f"The demo took {time.monotonic() - started:.0f} s. Look at runs/demo/training.png.")
    return code


def render() -> None:
    """Write packs/demo, in the repository's folder."""
    write_demo_packs(
        Path("packs/demo"),
        identities=IDENTITIES,
        images_per_identity=IMAGES_PER_IDENTITY,
        verification_identities=200,
        pairs=2000,
        seed=2048,
        workers=usable_cores(),
    )


if __name__ == "__main__":
    sys.exit(main())
