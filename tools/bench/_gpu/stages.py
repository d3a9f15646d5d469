"""What tools/bench/gpu.py runs, in the order of its worth, each with its time; torch is not needed.

A stage ends at its limit whatever it is at, so a late one cannot starve those behind it; what it
has measured until then is written. ``rest`` gets what the others leave.
"""

from dataclasses import dataclass, replace

PARALLEL = ("tensor_parallel", "tensor_parallel_bf16")
"""Baselines of _head/tensor_parallel.py, which needs torch."""

TOTAL = 465.0
"""Seconds in all: eight minutes, less what a stop at a limit may take."""

PATIENCE = 20
"""Times as long as on a GPU a trial at small sizes may take, on a CPU that others use."""

Command = list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the whole.

    Attributes:
        name: For --part, and of its files.
        shows: What it is for, in a few words.
        seconds: Its limit; 0 for what is left.
        commands: Words behind ``python``, one after the other; those with ``{left}`` end by
            themselves when so many seconds have passed.
    """

    name: str
    shows: str
    seconds: float
    commands: tuple[Command, ...]


def stages(device: str, out: str, *, small: bool, kernels: bool) -> list[Stage]:
    """Return the stages.

    Args:
        device: cuda, or cpu to try the commands.
        out: Folder of the records.
        small: A hundredth of the sizes, to find what is misspelt.
        kernels: Whether Triton is there.
    """

    def few(usual: str, tried: str) -> str:
        return tried if small else usual

    def bench(tool: str, record: str, *words: str) -> Command:
        path = f"tools/bench/{tool}.py"
        return [path, "--device", device, *words, "--budget", "{left}", "--json", f"{out}/{record}"]

    def head(record: str, *words: str) -> Command:
        times = ["--steps", few("5", "1"), "--seconds", few("0.5", "0"), "--longest", "4"]
        return bench("head", record, *times, "--dim", few("512", "16"), "--dtype", "bf16", *words)

    def scale(record: str, identities: str, rate: str, *words: str) -> Command:
        size = ["--identities", few(identities, "100"), "--rate", few(rate, "0.1")]
        size += ["--dim", few("512", "16"), "--batch", few("4096", "4")]
        times = ["--seconds", few("1", "0")]
        return bench("scale", record, *size, *times, "--state", "fp16+int8", *words)

    passes = "tiles,fused" if device == "cuda" and kernels else "tiles"
    heads = passes.replace("tiles", "ours")
    batch, million = few("4096", "4"), few("1000000", "24")
    size = ["--classes", million, "--batch", batch]
    tests = ["tests/head/test_kernels.py", "tests/head/test_fused_kernels.py", "tests/gpu"]
    chosen = ["-k", "cuda or gpu"]
    if small:
        tests, chosen = ["tests/gpu/test_nccl.py"], []
    train = ["--batch", few("512", "8"), "--rate", few("0.1,1", "0.5"), "--classes", million]
    train += ["--heads", few(f"{heads},textbook_tf32", "ours,textbook")]
    if small:
        train += ["--backbone", "convnet_s", "--size", "32", "--dim", "16"]
        train += ["--steps", "1", "--seconds", "0"]
    every = [
        Stage(
            name="imports",
            shows="packages, the device, one step of the head",
            seconds=20,
            commands=(["-m", "tools.bench._gpu.start", device],),
        ),
        Stage(
            name="tests",
            shows="numbers of real kernels, NCCL, DALI where it is",
            seconds=110,
            commands=(["-m", "pytest", "-q", "--continue-on-collection-errors", *tests, *chosen],),
        ),
        Stage(
            name="head",
            shows="the head against the textbook head, r 1, 0.1, 0.01",
            seconds=75,
            commands=(
                head(
                    "head_gpu_textbook.json",
                    *(*size, "--rate", few("1,0.1,0.01", "0.5"), "--passes", passes),
                ),
            ),
        ),
        Stage(
            name="baselines",
            shows="the same step by others' kernels, r 1, no margin",
            seconds=120,
            commands=(
                head(
                    "head_gpu_baselines.json",
                    *(*size, "--rate", "1", "--only", "ours", "--passes", passes),
                    *("--margin", "normalized_softmax", "--with", "all"),
                ),
            ),
        ),
        Stage(
            name="train",
            shows="images/s of a whole step",
            seconds=50,
            commands=(bench("train", "train_gpu.json", *train),),
        ),
        Stage(
            name="scale",
            shows="1e7 to 1e8 identities",
            seconds=85,
            commands=(
                scale(
                    "scale_gpu_device.json", "1e7,5e7", "0.01", "--passes", passes.split(",")[-1]
                ),
                scale("scale_gpu_states.json", "1e8", "0.01", "--place", "states"),
            ),
        ),
        Stage(
            name="rest",
            shows="several GPUs, more sizes, formats and margins, in the time that is left",
            seconds=0,
            commands=(
                head(
                    "head_gpu_several.json",
                    *(*size, "--rate", "1", "--only", "ours", "--passes", passes, "--world"),
                    *("gpus", "--margin", "normalized_softmax", "--with", ",".join(PARALLEL)),
                ),
                head(
                    "head_gpu_fp16_int8.json",
                    *(*size, "--rate", "1,0.1", "--only", "ours", "--passes", passes),
                    *("--centers", "fp16", "--momentum", "int8"),
                ),
                head(
                    "head_gpu_fp8_int8.json",
                    *(*size, "--rate", "1,0.1", "--only", "ours", "--passes", passes),
                    *("--centers", "fp8", "--momentum", "int8"),
                ),
                head(
                    "head_gpu.json",
                    *("--classes", few("1000000,100000,10000000", "24"), "--only", "ours"),
                    *("--batch", few("1024,4096,8192", "4"), "--passes", passes),
                    *("--rate", few("0.1,0.01,1", "0.1")),
                ),
                head(
                    "margins_gpu.json",
                    *(*size, "--rate", "0.1", "--margins", few("all", "arcface")),
                ),
            ),
        ),
    ]
    patience = PATIENCE if small else 1
    return [replace(stage, seconds=stage.seconds * patience) for stage in every]
