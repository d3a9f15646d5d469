"""Import what every stage imports, and take one step of the head: ``python -m ... DEVICE``.

In the first seconds it is known whether anything will be measured. Exit code 1 with the reason.
"""

import importlib
import sys
import time

MODULES = (
    "tools.bench.head",
    "tools.bench.scale",
    "tools.bench.train",
    "tools.bench._head.measure",
)


def main(arguments: list[str]) -> int:
    """Import, step, and say how long it took."""
    start = time.perf_counter()
    import torch

    from partialfc import ArcFace, PartialFC, RowSGD

    # By name, for mypy not to follow it into the tests, which are not typed.
    for name in (*MODULES, "tests.support.reference"):
        importlib.import_module(name)
        print(f"imported {name}")
    device = torch.device(arguments[0])
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        print(f"{properties.name}, capability {capability}, {properties.total_memory >> 30} GiB")
    made = PartialFC(50, 32, ArcFace(), optimizer=RowSGD(lr=0.1), device=device)
    embeddings = torch.randn(8, 32).to(device).requires_grad_()
    loss = made(embeddings, torch.randint(50, (8,)).to(device))
    loss.backward()
    made.optimizer.step()
    print(f"loss {loss.item():.3f}, {time.perf_counter() - start:.1f} s")
    return 0 if torch.isfinite(loss) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
