"""ONNX files as functions of numpy arrays, on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Network(NamedTuple):
    """One model.

    Attributes:
        run: Takes the input as fp32 and returns the outputs in the order of ``outputs``.
        input_shape: Of the only input; an axis of any length is ``None``.
        outputs: Their names.
    """

    run: Callable[[Floats], list[Floats]]
    input_shape: tuple[int | None, ...]
    outputs: tuple[str, ...]


def open_network(path: Path, *, threads: int = 1) -> Network:
    """Return the model of an ONNX file.

    Args:
        path: Of the file.
        threads: Of one call; one where several processes or threads look at a photo each.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no model that can be run, or has not one input of fp32.
        ModuleNotFoundError: Without onnxruntime, of the extra ``align``.
    """
    import onnxruntime

    with path.open("rb"):
        options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # errors are raised as well
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its own classes, which share no other base
        raise ValueError(f"{path}: no ONNX model that can be run: {error}") from None
    inputs: list[Any] = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise ValueError(
            f"{path}: its inputs are {[(i.name, i.type, i.shape) for i in inputs]}, must be one of "
            "four axes and fp32."
        )
    name = inputs[0].name

    def run(batch: Floats) -> list[Floats]:
        try:
            return [np.asarray(output) for output in session.run(None, {name: batch})]
        except Exception as error:
            raise ValueError(f"{path}: it cannot run on {batch.shape}: {error}") from None

    shape = tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape)
    return Network(run, shape, tuple(output.name for output in session.get_outputs()))
