"""A backbone as ONNX: fp32, fp16 and INT8, in the shape that insightface's ArcFaceONNX accepts.

It takes the first input [batch, 3, S, S], expects one output, and looks at the names of the first
eight nodes: a "Sub…" and a "Mul…" among them mean that the model normalises its images itself, and
they are given as 0 to 255; else it subtracts 127.5 and divides by 127.5.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor, nn

from partialfc.writing import atomic_write

OPSET = 18
INPUT, OUTPUT = "input.1", "embedding"
_LOOKED_AT = 8
_CALIBRATED_AT_ONCE = 16


class Normalised(nn.Module):
    """A backbone that takes pixels from 0 to 255."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings of RGB images [b, 3, S, S], any values from 0 to 255."""
        y: Tensor = self.backbone((x - 127.5) * (1 / 127.5))
        return y


def write_onnx(
    backbone: nn.Module, path: Path, *, image_size: int, inside: bool, metadata: dict[str, str]
) -> None:
    """Write a backbone in evaluation mode, fp32, with a free batch; the whole file or none.

    Args:
        backbone: On the CPU.
        path: Replaced if it exists.
        image_size: S.
        inside: Whether the normalisation of pixels is part of the model.
        metadata: Goes into the file.
    """
    module = Normalised(backbone) if inside else backbone
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 3, image_size, image_size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    first = {node.op_type for node in model.graph.node[:_LOOKED_AT]}
    if inside != {"Sub", "Mul"}.issubset(first):
        for node in model.graph.node[:_LOOKED_AT]:
            assert not inside, "the exporter folded the normalisation away"
            node.name = f"n{node.name}"
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    _save(model, path)


def write_fp16(source: Path, path: Path) -> None:
    """Write the same model with fp16 weights and arithmetic; input and output stay fp32."""
    model = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
    model.topological_sort()  # the casts come last
    _save(model.model, path)


def write_int8(source: Path, path: Path, images: NDArray[np.float32]) -> None:
    """Write the same model in INT8: weights by channel, activations by their range on images.

    Args:
        source: The fp32 model.
        path: Replaced if it exists.
        images: [N, 3, S, S] as the model takes them; some hundreds of the data it will see.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        logging.disable(logging.WARNING)  # a line for each vector, which has no channels
        try:
            quantize_static(
                prepared,
                made,
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=True,  # 7 bits: CPUs without VNNI add two products up in 16 bits
                calibrate_method=CalibrationMethod.MinMax,
            )
        finally:
            logging.disable(logging.NOTSET)
        model = onnx.load(made)
    for entry in onnx.load(source, load_external_data=False).metadata_props:
        if entry.key not in {kept.key for kept in model.metadata_props}:
            model.metadata_props.append(entry)
    _save(model, path)


def runner(path: Path, threads: int | None = None) -> Any:
    """Return a function from images [b, 3, S, S] to embeddings [b, D]: onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs: Sequence[NDArray[np.float32]] = session.run(None, {INPUT: images})
        return outputs[0]

    return run


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: NDArray[np.float32]) -> None:
        starts = range(0, len(images), _CALIBRATED_AT_ONCE)
        self._batches: Iterator[dict[str, Any]] = iter(
            [{INPUT: images[start : start + _CALIBRATED_AT_ONCE]} for start in starts]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def _save(model: onnx.ModelProto, path: Path) -> None:
    onnx.checker.check_model(model)
    with atomic_write(path) as partial:
        onnx.save(model, partial)
