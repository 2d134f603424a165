"""A model for other programs: an ONNX file beside config.json and tokenizer, run by ONNX Runtime, compared with the original.

The graph is written operator by operator from the weights. It holds only standard operators, so any ONNX runtime can read
it, and none of the guards that a traced graph carries; ONNX Runtime fuses bias with GELU, and products with their scale,
by itself when it loads the file. ``compare`` and ``difference_on_random`` are there because a second account of the same
forward path must be held against the first.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tinylib import metrics, models, tasks, train
from tinylib.bert import Bert, to_hf
from tinylib.config import ACTIVATIONS
from tinylib.course import Prepared
from tinylib.errors import UserError, is_full_memory
from tinylib.stored import first_line, read_json
from tinylib.text import Encoded

FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # transformers' names
OPSET = 20  # the first with Gelu as one operator (ONNX 1.15, ONNX Runtime 1.17)
SHAPES = ((1, 3), (2, 16), (7, 64), (1, 512))  # batch, length: what an export is compared on


def package(name: str):
    """Import onnx, onnxruntime or a part of them; raise UserError with pip's line where they are not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        remedy = "python -m pip install onnx onnxruntime"
        raise UserError(f"the package {error.name} is missing, which ONNX files need; {remedy}") from None


def to_onnx(model: Bert, folder: str | Path) -> Path:
    """Write ``model.onnx`` in float32, config.json and the tokenizer's files; return the ONNX file's path.

    Inputs, int64 (batch, length), both free: ``input_ids``, ``attention_mask`` (1 = real token), ``token_type_ids``.
    Output: ``logits`` (batch, labels), or ``last_hidden_state`` (batch, length, width) of a model without head. A text
    of padding alone is not provided for. Raises UserError for a masked-LM head and where the package onnx is missing.
    """
    onnx = package("onnx")
    if model.config.head == "masked_lm":
        raise UserError("a model with a masked-LM head cannot be exported to ONNX; load it with head=None or as a classifier")
    graph = _Graph(model, onnx)
    x = graph.embeddings()
    mask = graph.mask()
    for m in range(model.config.num_hidden_layers):
        x = graph.layer(f"layers.{m}", x, mask)
    path = model.save_without_weights(folder) / FILE
    onnx.save(graph.finish(x), path)
    return path


class _Graph:
    """The nodes and weights of a BERT, in the order of computation; the weights have Hugging Face's names."""

    def __init__(self, model: Bert, onnx):
        self.onnx, self.config, self.nodes, self.constants = onnx, model.config, [], {}
        self.state = {name: t.detach().float().cpu().numpy() for name, t in model.state_dict().items()}

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes) -> str:
        """Append a node and return the name of its output, which is the node's own."""
        name = name or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Keep an array under a name, once, and return the name."""
        if name not in self.constants:  # "C" order: the file holds a transposed matrix as it is to be read
            self.constants[name] = self.onnx.numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def number(self, *value: int) -> str:
        """Keep whole numbers, as shapes and axes are given."""
        return self.constant("_".join(["int", *map(str, value)]), np.array(value, np.int64))

    def weight(self, name: str) -> str:
        """Keep a weight of the model as it is."""
        return self.constant(to_hf(name), self.state[name])

    def linear(self, name: str, x: str) -> str:
        """x·Wᵀ + b, with Wᵀ in the file."""
        product = self.node("MatMul", x, self.constant(to_hf(f"{name}.weight"), self.state[f"{name}.weight"].T), name=name)
        return self.node("Add", product, self.weight(f"{name}.bias"))

    def norm(self, name: str, x: str) -> str:
        """Normalise over the width."""
        weights = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.node("LayerNormalization", x, *weights, axis=-1, epsilon=self.config.layer_norm_eps)

    def embeddings(self) -> str:
        """Sum of the three vectors of each token, normalised; in the order of ``bert.Embeddings``."""
        scalars = {name: self.constant(name, np.array(n, np.int64)) for name, n in (("zero", 0), ("one", 1))}
        length = self.node("Gather", self.node("Shape", "input_ids"), scalars["one"])
        places = self.node("Range", scalars["zero"], length, scalars["one"])
        segments = "token_type_ids"
        if self.config.type_vocab_size == 1:  # as bert.Embeddings: there is nothing to tell apart
            segments = self.node("Mul", segments, scalars["zero"])
        tables = [self.weight(f"embeddings.{name}.weight") for name in ("word", "segment", "position")]
        rows = [
            self.node("Gather", table, ids, name=f"embeddings.{ids}")
            for table, ids in zip(tables, ("input_ids", segments, places), strict=True)
        ]
        return self.norm("embeddings.norm", self.node("Add", self.node("Add", rows[0], rows[1]), rows[2]))

    def mask(self) -> str:
        """(batch, 1, 1, length): 0 where a key may be seen, else float32's lowest number, which softmax makes 0."""
        one = self.constant("float_1", np.array(1, np.float32))
        lowest = self.constant("lowest", np.array(np.finfo(np.float32).min))
        keys = self.node("Unsqueeze", "attention_mask", self.number(1, 2))
        hidden = self.node("Sub", one, self.node("Cast", keys, to=self.onnx.TensorProto.FLOAT))
        return self.node("Mul", hidden, lowest)

    def layer(self, name: str, x: str, mask: str) -> str:
        """One encoder layer, as ``bert.EncoderLayer`` computes it."""
        x = self.norm(f"{name}.attention_norm", self.node("Add", x, self.attention(f"{name}.attention", x, mask)))
        up = self.node("Gelu", self.linear(f"{name}.up", x), approximate=ACTIVATIONS[self.config.hidden_act])
        return self.norm(f"{name}.ffn_norm", self.node("Add", x, self.linear(f"{name}.down", up)))

    def attention(self, name: str, x: str, mask: str) -> str:
        """Self-attention of ``attention.attend``, step by step."""
        H, D = self.config.num_attention_heads, self.config.head_width

        def split(part: str, *order: int) -> str:
            cut = self.node("Reshape", self.linear(f"{name}.{part}", x), self.number(0, 0, H, D))  # 0: as it is
            return self.node("Transpose", cut, perm=order)

        q, k, v = split("query", 0, 2, 1, 3), split("key", 0, 2, 3, 1), split("value", 0, 2, 1, 3)
        root = self.constant("sqrt_head_width", np.array(math.sqrt(D), np.float32))
        scores = self.node("Div", self.node("MatMul", q, k), root)
        weights = self.node("Softmax", self.node("Add", scores, mask), axis=-1)
        mixed = self.node("Transpose", self.node("MatMul", weights, v), perm=(0, 2, 1, 3))
        return self.linear(f"{name}.output", self.node("Reshape", mixed, self.number(0, 0, H * D)))

    def finish(self, x: str):
        """Add the head and return the model."""
        make, floats, axes = self.onnx.helper, self.onnx.TensorProto.FLOAT, ["batch", "length"]
        output, shape = "last_hidden_state", [*axes, self.config.hidden_size]
        if self.config.outputs:
            first = self.node("Gather", x, self.constant("zero", np.array(0, np.int64)), axis=1)  # [CLS]
            x = self.linear("classifier", self.node("Tanh", self.linear("pooler", first)))
            output, shape = "logits", ["batch", self.config.outputs]
        self.nodes.append(make.make_node("Identity", [x], [output], name=output))
        inputs = [make.make_tensor_value_info(name, self.onnx.TensorProto.INT64, axes) for name in INPUTS]
        outputs = [make.make_tensor_value_info(output, floats, shape)]
        graph = make.make_graph(self.nodes, "bert", inputs, outputs, list(self.constants.values()))
        opsets = [make.make_opsetid("", OPSET)]
        # The oldest file format that has this opset: the newest that onnx knows may be too new for the runtime.
        made = make.make_model(graph, opset_imports=opsets, ir_version=make.find_min_ir_version_for(opsets))
        made.producer_name = "tinylib"
        return made


def feed(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return a batch of ``train.loader`` under the names, and in the type, of the ONNX file's inputs."""
    given = (batch["ids"], batch["mask"], batch["segments"])
    return {name: t.cpu().long().contiguous().numpy() for name, t in zip(INPUTS, given, strict=True)}


def find(source: str | Path) -> Path:
    """Return the path of an ONNX file, or of the one in a folder; raise UserError if it is not there."""
    path = models.expanded(source)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; name an ONNX file, or a folder that tinylib export wrote")
    return path


class Onnx:
    """An ONNX file in ONNX Runtime on the CPU: called like the model that it was made from.

    source: the file, or its folder. threads: how many compute; as many as PyTorch's if None. Raises UserError if the file
    is missing, or damaged, or the config.json beside it, and where the package onnxruntime is missing.
    """

    def __init__(self, source: str | Path, threads: int | None = None):
        runtime, self.file = package("onnxruntime"), find(source)
        self.threads = threads or torch.get_num_threads()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3  # errors alone: what it has to say of its own graph helps no user
        try:
            self.session = runtime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own classes, one for each kind of damage
            raise UserError(f"{self.file} cannot be run by ONNX Runtime ({first_line(error)}); export it again") from None
        self.output = self.session.get_outputs()[0].name
        beside = self.file.parent / "config.json"
        self.config = read_json(beside, "export the model again") if beside.is_file() else {}

    def __call__(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Return the logits (B, K), or the last layer's output (B, T, C) of a model without head.

        The arguments are those of ``bert.Bert``. Raises UserError for ids that the model cannot take, and where the memory is full.
        """
        longest = self.config.get("max_position_embeddings", ids.shape[1])
        if ids.shape[1] > longest:
            raise UserError(f"a sequence of {ids.shape[1]} tokens is longer than max_position_embeddings={longest}; cut it")
        if ids.numel() and int(ids.min()) < 0:  # ONNX counts those from the end of the table
            raise UserError(f"{self.file} cannot take the id {int(ids.min())}; give ids of the model's own tokenizer")
        mask = torch.ones_like(ids) if mask is None else mask
        batch = {"ids": ids, "mask": mask, "segments": torch.zeros_like(ids) if segments is None else segments}
        try:
            return torch.from_numpy(self.session.run(None, feed(batch))[0])
        except Exception as error:
            if is_full_memory(error):
                full = f"the memory is full at {ids.shape[0]} texts of {ids.shape[1]} tokens"
                raise UserError(f"{self.file}: {full}; give fewer at a time, or close what else runs") from None
            remedy = "give ids of the model's own tokenizer"
            raise UserError(f"{self.file} cannot take these ids ({first_line(error)}); {remedy}") from None

    def predict(self, encoded: Encoded, batch_size: int = 64, label: str | None = None) -> Float[Tensor, "N K"]:
        """Return the logits of every text, in the order given, computed in batches of like length, as ``train.predict``.

        An int8 file rounds by the largest number of the whole batch, so there a text's logits depend a little on its
        neighbours; ``batch_size=1`` gives what a service that takes one text at a time would answer.
        Raises UserError for a file without a classification head, and for no texts.
        """
        if self.output != "logits":
            raise UserError(f"{self.file} has no classification head; export a fine-tuned classifier")
        if not len(encoded):
            raise UserError("there are no texts to predict from; give at least one")
        batches = train.loader(train.Examples(encoded), batch_size, shuffle=False)
        rows, logits = [], []
        for batch in tqdm(batches, desc=label, disable=label is None, leave=False):
            rows.append(batch["rows"])
            logits.append(self(batch["ids"], batch["mask"], batch["segments"]))
        return torch.cat(logits)[torch.cat(rows).argsort()]


@dataclass(frozen=True)
class Comparison:
    """An exported model beside the one that it was made from, on one split."""

    accuracy: float  # of the exported model
    f1: float
    model_accuracy: float
    agreement: float  # share of the texts that both give the same label
    largest_difference: float  # of any logit
    examples: int


@dataclass(frozen=True)
class ScoreComparison:
    """An exported regression beside the one that it was made from, on one split."""

    pearson: float  # of the exported model
    spearman: float
    rmse: float
    model_pearson: float
    largest_difference: float  # of any score
    examples: int


def compare(
    model: Bert,
    exported: Onnx | Bert,
    prepared: Prepared,
    split: str = "test",
    batch_size: int = 64,
    progress: bool = False,
) -> Comparison | ScoreComparison:
    """Measure a classifier (or a regression) and its export on a whole split."""
    truth, encoded = prepared.labels[split], prepared.encoded[split]
    labels = (f"the model on {split}", f"the export on {split}") if progress else (None, None)
    before = train.predict(model, encoded, batch_size, labels[0])
    predict = exported.predict if isinstance(exported, Onnx) else functools.partial(train.predict, exported)
    after = predict(encoded, batch_size, labels[1])
    largest = float((before - after).abs().max())
    one, two = tasks.told(before), tasks.told(after)
    if tasks.figure(before) == "pearson":
        figures = {name: metric(truth, two) for name, metric in metrics.SCORE_METRICS.items()}
        return ScoreComparison(**figures, model_pearson=metrics.pearson(truth, one), largest_difference=largest, examples=len(one))
    return Comparison(
        metrics.accuracy(truth, two), metrics.classification_report(truth, two)["f1"], metrics.accuracy(truth, one),
        float((one == two).double().mean()), largest, len(truth),
    )  # fmt: skip


@torch.inference_mode()
def difference_on_random(model: Bert, exported: Onnx | Bert, seed: int = 0) -> float:
    """Return the largest difference of any output on random ids: several batches and lengths, with padding and both segments."""
    config, source, largest = model.config, torch.Generator().manual_seed(seed), 0.0
    device, modes = next(model.parameters()).device, {m: m.training for m in (model, exported) if isinstance(m, Bert)}
    for m in modes:
        m.eval()
    for B, longest in SHAPES:
        T = min(longest, config.max_position_embeddings)
        ids = torch.randint(config.vocab_size, (B, T), generator=source)
        lengths = torch.randint(1, T + 1, (B,), generator=source)
        mask = torch.arange(T) < lengths[:, None]
        segments = (torch.arange(T) >= lengths[:, None] // 2).long() % config.type_vocab_size
        wanted, given = (_outputs(m, device)(ids, mask, segments) for m in (model, exported))
        if config.head is None:  # what stands in the padding is nobody's
            wanted, given = wanted[mask], given[mask]
        # torch's maximum keeps a NaN, which Python's max would drop
        largest = float(torch.maximum(torch.tensor(largest), (wanted - given).abs().max()))
    for m, training in modes.items():
        m.train(training)
    return largest


def _outputs(model: Bert | Onnx, device: torch.device) -> Callable[..., Tensor]:
    """Return a function of ids, mask and segments to logits, or to the last layer's output, on the CPU."""
    if isinstance(model, Onnx):
        return model

    def run(*batch: Tensor) -> Tensor:
        out = model.to(device)(*(t.to(device) for t in batch))
        return (out.hidden if out.logits is None else out.logits).cpu()

    return run
