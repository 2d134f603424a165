"""Fewer bits a weight: int8 and 4-bit ONNX files, and PyTorch's own int8 beside them.

A number x is stored as a whole number q = round(x/s), s being the scale of a row, a column or a block of weights; x ≈ s·q,
wrong by half a scale at most (Jacob et al. 2018, section 2.1). Every function here reads an ONNX file that ``export.to_onnx``
wrote and writes another one; what is not a weight matrix or a table stays in float32.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinylib.errors import UserError
from tinylib.export import feed, find, package
from tinylib.stored import first_line

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
# 5 kB in float32 for two labels, and the last step before the answer: not worth an error.
IN_FLOAT = ["classifier"]
SMALL = 4096  # weights; a table below it (the segments') would save nothing


def dynamic_int8(source: str | Path, target: str | Path, table_bits: int = 8) -> Path:
    """Write an int8 file: weights rounded once, activations at each call by the range they then have.

    Weight matrices: a scale a column (output), 7 bits of the 8 (``reduce_range``). Processors before VNNI (AVX2, AVX-512)
    add two products in 16 bits, and two full int8 products overflow there without a word; with 7 bits none can, and
    the logits are as near as with 8 (the activations' rounding outweighs it). Embedding tables: ``tables``.
    source: an ONNX file or its folder; table_bits: 8 or 4. Returns the target's path. Raises UserError for other bits,
    for a source that is missing or no ONNX file, and where a package is missing.
    """
    quantization = package("onnxruntime.quantization")
    _check(table_bits)  # now: the target may be the source
    with _quiet():
        quantization.quantize_dynamic(
            _read(source), Path(target), op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True,
            weight_type=quantization.QuantType.QInt8, nodes_to_exclude=IN_FLOAT,
            extra_options={"MatMulConstBOnly": True},  # the products of attention have no weights
        )  # fmt: skip
    return tables(target, target, table_bits)


def static_int8(
    source: str | Path, target: str | Path, batches: Iterable[dict[str, Tensor]], table_bits: int = 8
) -> Path:
    """Write an int8 file whose activations' ranges are fixed beforehand: the smallest and largest of ``batches``.

    batches: as ``train.loader`` gives them, of texts like those to come; some hundred texts are enough. What lies beyond
    the range is cut off, and what BERT's few outliers stretch is coarse: measured less exact than ``dynamic_int8`` and no
    faster on CPUs. The rest is as there. Raises UserError without batches.
    """
    quantization = package("onnxruntime.quantization")
    _check(table_bits)
    given = [feed(batch) for batch in batches]
    if not given:
        raise UserError("static int8 needs batches to calibrate on, and there are none; give some of the training texts")

    class Reader(quantization.CalibrationDataReader):
        left = iter(given)

        def get_next(self):
            return next(self.left, None)

    with _quiet():
        quantization.quantize_static(
            _read(source), Path(target), Reader(), op_types_to_quantize=["MatMul"], per_channel=True,
            reduce_range=True, quant_format=quantization.QuantFormat.QDQ, nodes_to_exclude=IN_FLOAT,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    return tables(target, target, table_bits)


def tables(source: str | Path, target: str | Path, bits: int = 8) -> Path:
    """Round the embedding tables alone: to int8 with a scale a row, or to 4 bits with a scale every 32 columns.

    They hold two thirds of TinyBERT's weights. A scale a row follows each word's own size: a third less error than one
    scale for the table, for four bytes a word. 4 bits need ONNX Runtime's own operator, two of them a byte: a table of
    odd width gets 8.
    Raises UserError as ``dynamic_int8`` does.
    """
    onnx = package("onnx")
    _check(bits)
    model = _read(source)
    graph, weights = model.graph, {w.name: w for w in model.graph.initializer}
    make, to_proto, nodes = onnx.helper.make_node, onnx.numpy_helper.from_array, []
    for node in graph.node:
        table = onnx.numpy_helper.to_array(weights[node.input[0]]) if node.input[0] in weights else np.zeros(0)
        if node.op_type != "Gather" or table.ndim != 2 or table.dtype != np.float32 or table.size < SMALL:
            nodes.append(node)
            continue
        (name, ids), out = node.input, node.output[0]
        graph.initializer.remove(weights[name])
        whole = bits == 8 or table.shape[1] % 2  # the operator gives as many columns as there are codes in the bytes
        codes, scales = _by_row(table) if whole else _by_block(table, bits)
        packed = codes if whole else _pack(codes, bits).reshape(len(table), -1)[:, : table.shape[1] * bits // 8]
        graph.initializer.extend([to_proto(packed, f"{name}_codes"), to_proto(scales, f"{name}_scales")])
        if whole:
            nodes += [
                make("Gather", [f"{name}_codes", ids], [f"{out}_codes"], name=f"{out}_codes"),
                make("Cast", [f"{out}_codes"], [f"{out}_float"], name=f"{out}_float", to=onnx.TensorProto.FLOAT),
                make("Gather", [f"{name}_scales", ids], [f"{out}_scales"], name=f"{out}_scales"),
                make("Mul", [f"{out}_float", f"{out}_scales"], [out], name=out),
            ]
        else:
            layout = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": bits, "domain": MICROSOFT}
            given = [f"{name}_codes", ids, f"{name}_scales"]
            nodes.append(make("GatherBlockQuantized", given, [out], name=out, **layout))
    return _write(model, nodes, target)


BLOCK = 32  # weights that share a scale


def weight_only(source: str | Path, target: str | Path, bits: int = 4, table_bits: int | None = None) -> Path:
    """Write a file whose weights have 4 or 8 bits and whose arithmetic stays in float: the smallest file, not the fastest.

    Every 32 weights of an output share a scale; each is unpacked when it is used (ONNX Runtime's MatMulNBits). Without
    rounded activations 8 bits are all but exact. table_bits: of the embedding tables (``tables``); as ``bits`` if None.
    Raises UserError as ``dynamic_int8`` does.
    """
    onnx = package("onnx")
    table_bits = bits if table_bits is None else table_bits
    _check(bits), _check(table_bits)
    model = _read(source)
    graph, weights, nodes = model.graph, {w.name: w for w in model.graph.initializer}, []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or node.name in IN_FLOAT:
            nodes.append(node)
            continue
        x, name = node.input
        matrix = onnx.numpy_helper.to_array(weights[name]).T  # (outputs, inputs)
        graph.initializer.remove(weights[name])
        codes, scales = _by_block(matrix, bits)
        kept = [(_pack(codes, bits), f"{name}_codes"), (scales.reshape(-1), f"{name}_scales")]
        graph.initializer.extend(onnx.numpy_helper.from_array(array, called) for array, called in kept)
        shape = {"N": matrix.shape[0], "K": matrix.shape[1], "bits": bits, "block_size": BLOCK}
        given = [x, f"{name}_codes", f"{name}_scales"]
        nodes.append(onnx.helper.make_node("MatMulNBits", given, [node.output[0]], name=node.name, domain=MICROSOFT, **shape))
    return tables(_write(model, nodes, target), target, table_bits)


def torch_dynamic_int8(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers compute in int8, by PyTorch itself: for comparison, not for keeping.

    The embeddings stay in float32, so the whole is not a quarter; the copy runs on a CPU and has no file format of its own.
    PyTorch has announced that it will remove this in favour of the package torchao; raises UserError where it is gone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the announcement
        try:
            from torch.ao.quantization import quantize_dynamic
        except ImportError:
            remedy = "use quantize.dynamic_int8 on an ONNX file instead"
            raise UserError(f"PyTorch {torch.__version__} has no quantize_dynamic any more; {remedy}") from None
        return quantize_dynamic(copy.deepcopy(model).cpu().eval(), {nn.Linear}, dtype=torch.qint8, inplace=True)


def _by_row(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes (R, C) and float32 scales (R, 1): the largest magnitude of a row is 127."""
    scales = np.abs(table).max(axis=1, keepdims=True) / 127
    scales[scales == 0] = 1  # a row of zeros: the padding's
    return np.rint(table / scales).astype(np.int8), scales.astype(np.float32)


def _by_block(matrix: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes (R, blocks, BLOCK), 0…2ᵇⁱᵗˢ − 1 with the zero in the middle, and float32 scales (R, blocks).

    The number of largest magnitude gets the lowest code, of which there is one more than on the other side. The last
    block is filled up with zeros.
    """
    R, C = matrix.shape
    middle, count = 2 ** (bits - 1), -(-C // BLOCK)
    blocks = np.pad(matrix, ((0, 0), (0, count * BLOCK - C))).reshape(R, count, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = largest / -middle
    scales[scales == 0] = 1
    codes = np.clip(np.rint(blocks / scales) + middle, 0, 2 * middle - 1)
    return codes.astype(np.uint8), scales[..., 0].astype(np.float32)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return 8-bit codes as they are, and of 4 bits two a byte, the first in the low half."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def _check(bits: int) -> None:
    if bits not in (4, 8):
        raise UserError(f"bits={bits} must be 4 or 8")


def _read(source: str | Path):
    path, onnx = find(source), package("onnx")
    try:
        model = onnx.load(path)
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); check the file and its permissions") from None
    except Exception as error:  # protobuf's own class
        raise UserError(f"{path} is no ONNX file ({type(error).__name__}); export the model again") from None
    if not model.graph.node:  # of an empty file protobuf makes an empty model
        raise UserError(f"{path} is no ONNX file (it holds no operators); export the model again")
    return model


def _write(model, nodes: list, target: str | Path) -> Path:
    onnx, graph = package("onnx"), model.graph
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # shapes that a tool noted down for tensors that may be gone
    if all(entry.domain != MICROSOFT for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    onnx.save(model, target)
    return Path(target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence ONNX Runtime's advice to run its own preparation first, for which a graph written by hand has no need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
