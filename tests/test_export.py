"""ONNX files: the same answers as PyTorch, fewer bytes, and the command that writes, loads and compares them."""

import copy
import importlib
import json
import logging
import math

import numpy as np
import onnx
import pytest
import torch
from conftest import shaken
from test_cli import LABELS, TEXTS, files, make_checkpoint, write_csv

from tinylib import cli, course, export, measure, quantize, text, train
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError

SIZES = {
    "vocab_size": 400, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "initializer_range": 0.2,
}  # fmt: skip
BATCHES = ((1, 1), (1, 3), (2, 17), (7, 64), (2, 512))


def random_model(**changes) -> Bert:
    config = BertConfig(**SIZES, head="classification", labels=("bad", "good", "neither")).replace(**changes)
    return Bert(config, torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def model() -> Bert:
    return random_model()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with a table and a classifier that tells its labels well apart, made without training."""
    folder = tmp_path_factory.mktemp("export")
    make_checkpoint(folder / "base", TEXTS, positions=512)
    write_csv(folder / "films.csv", zip(TEXTS, LABELS, strict=True))
    model = Bert.from_pretrained(folder / "base", labels=("negative", "positive"))
    prepared = course.prepare(folder / "films.csv", base=folder / "base")
    with torch.no_grad():  # the classifier by ridge regression on the pooled texts
        batch = prepared.examples("train").collate(list(range(len(prepared.labels["train"]))))
        pooled = torch.tanh(model.pooler(model.encode(batch["ids"], batch["mask"], batch["segments"]).hidden[:, 0]))
        ones = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1)
        wanted = 4 * torch.nn.functional.one_hot(batch["labels"]).float() - 2
        solved = torch.linalg.solve(ones.T @ ones + 0.1 * torch.eye(ones.shape[1]), ones.T @ wanted)
        model.classifier.weight.copy_(solved[:-1].T)
        model.classifier.bias.copy_(solved[-1])
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def prepared(place):
    return course.prepare(place / "films.csv", base=place / "model")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def batch_of(shape, vocabulary=400, seed=0):
    """Give ids, a padding mask and segments of a batch whose texts have different lengths."""
    (B, T), source = shape, torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=source)
    ids = torch.randint(vocabulary, (B, T), generator=source)
    return ids, torch.arange(T) < lengths[:, None], (torch.arange(T) >= lengths[:, None] // 2).long()


def answers(model: Bert, *batch):
    with torch.no_grad():
        return model(*batch).logits


# The float32 file


@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_logits_are_those_of_torch(model, file, shape):
    batch = batch_of(shape)
    torch.testing.assert_close(export.Onnx(file)(*batch), answers(model, *batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"head_dim": 8},  # heads were removed
        {"type_vocab_size": 1, "pad_token_id": None, "layer_norm_eps": 1e-5},
        {"num_attention_heads": 12, "hidden_size": 312, "intermediate_size": 1200},
    ],
    ids=str,
)
def test_other_models_are_exported_too(tmp_path, changes):
    model = shaken(random_model(**changes))
    assert export.difference_on_random(model, export.Onnx(export.to_onnx(model, tmp_path))) < 1e-4


def test_a_model_without_head_gives_its_last_layer(tmp_path):
    model = random_model(head=None, labels=())
    given = export.Onnx(export.to_onnx(model, tmp_path))
    (ids, mask, segments), wanted = batch_of((3, 20)), "last_hidden_state"
    assert given.output == wanted
    with torch.no_grad():
        torch.testing.assert_close(
            given(ids, mask, segments)[mask], model(ids, mask, segments).hidden[mask], atol=1e-4, rtol=1e-4
        )
    assert export.difference_on_random(model, given) < 1e-4
    with pytest.raises(UserError, match="has no classification head"):
        given.predict(text.Encoded((ids[0],), (segments[0],)))


def test_padding_changes_nothing(model, file):
    ids, _, _ = batch_of((1, 9))
    padded, mask = torch.nn.functional.pad(ids, (0, 30), value=7), torch.arange(39)[None] < 9
    torch.testing.assert_close(export.Onnx(file)(padded, mask), export.Onnx(file)(ids), atol=1e-5, rtol=1e-5)


def test_the_file_is_standard_and_says_what_it_takes(file):
    made = onnx.load(file)
    onnx.checker.check_model(made, full_check=True)
    assert [(entry.domain, entry.version) for entry in made.opset_import] == [("", export.OPSET)]
    for entry in made.graph.input:
        assert entry.name in export.INPUTS
        assert entry.type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert [d.dim_param for d in entry.type.tensor_type.shape.dim] == ["batch", "length"]
    names = {weight.name for weight in made.graph.initializer}
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert measure.file_size(file) < 1.1 * measure.weight_bytes(random_model())


def test_the_folder_is_complete_for_transformers(place, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    export.to_onnx(Bert.from_pretrained(place / "model"), tmp_path)
    assert {"model.onnx", "config.json", "tokenizer.json"} <= files(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "negative", 1: "positive"}
    assert AutoTokenizer.from_pretrained(tmp_path)("a fine story")["input_ids"]


def test_a_model_in_training_is_exported_and_compared_as_it_evaluates(tmp_path):
    model = random_model().train()
    assert export.difference_on_random(model, export.Onnx(export.to_onnx(model, tmp_path))) < 1e-4
    assert model.training


# Fewer bits


def separated(model, count=20):
    """Give texts on which the model's first label stands well off the second."""
    ids, mask, segments = batch_of((200, 24), seed=3)
    top = answers(model, ids, mask, segments).topk(2).values
    rows = (top[:, 0] - top[:, 1]).argsort(descending=True)[:count]
    return ids[rows], mask[rows], segments[rows]


def big_model() -> Bert:
    """Give a model of TinyBERT's widths, so that a file's fixed part does not count."""
    return random_model(
        vocab_size=4000, hidden_size=312, num_attention_heads=12, intermediate_size=1200, initializer_range=0.06
    )


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    model = big_model()
    return model, export.to_onnx(model, tmp_path_factory.mktemp("big"))


BITS = {
    "dynamic": (quantize.dynamic_int8, 0.27, 0.2),
    "dynamic, tables of 4 bits": (lambda a, b: quantize.dynamic_int8(a, b, table_bits=4), 0.24, 0.6),
    "static": (lambda a, b: quantize.static_int8(a, b, calibration()), 0.27, 0.4),
    "8 bits, float arithmetic": (lambda a, b: quantize.weight_only(a, b, bits=8), 0.3, 0.05),
    "4 bits, float arithmetic": (quantize.weight_only, 0.18, 0.6),
}


def calibration():
    for seed in range(4):
        ids, mask, segments = batch_of((8, 24), vocabulary=4000, seed=seed)
        yield {"ids": ids, "mask": mask, "segments": segments}


@pytest.mark.parametrize("name", BITS)
def test_fewer_bits_are_fewer_bytes_and_near_logits(big, tmp_path, name):
    (model, file), (make, share, error) = big, BITS[name]
    target = make(file, tmp_path / "small.onnx")
    assert target == tmp_path / "small.onnx"
    assert files(tmp_path) == {"small.onnx"}
    assert measure.file_size(target) < share * measure.file_size(file)
    given, batch = export.Onnx(target), separated(model)
    near, exact = given(*batch), answers(model, *batch)
    spread = float(exact.std())
    assert float((near - exact).abs().max()) < error * spread
    assert torch.equal(near.argmax(-1), exact.argmax(-1))
    for shape in ((1, 1), (7, 40)):
        assert given(*batch_of(shape)).isfinite().all()


def test_no_int8_product_can_overflow_sixteen_bits(big, tmp_path):
    graph = onnx.load(quantize.dynamic_int8(big[1], tmp_path / "small.onnx")).graph
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 2 * 6 + 1  # of each layer query, key, value, output, up, down; the pooler
    for node in products:
        assert np.abs(weights[node.input[1]]).max() <= 64
        assert 2 * 255 * 64 < 2**15


def test_tables_alone_are_rounded_by_row_within_half_a_step(big, tmp_path):
    model, file = big
    graph = onnx.load(quantize.tables(file, tmp_path / "small.onnx")).graph
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    name, table = "bert.embeddings.word_embeddings.weight", model.embeddings.word.weight.detach().numpy()
    codes, scales = weights[f"{name}_codes"], weights[f"{name}_scales"]
    assert codes.dtype == np.int8
    assert scales.shape == (len(table), 1)
    assert (np.abs(codes * scales - table) <= scales / 2 * 1.001).all()
    assert (codes[0] == 0).all(), "the padding's row is zero"
    assert float((export.Onnx(tmp_path / "small.onnx")(*batch_of((3, 30))) - answers(model, *batch_of((3, 30)))).abs().max()) < 0.1


def test_torch_int8_is_near_and_leaves_the_model_alone(model):
    batch = batch_of((4, 20))
    before = answers(model, *batch)
    small = quantize.torch_dynamic_int8(model)
    assert float((answers(small, *batch) - before).abs().max()) < 0.2 * float(before.std()) + 0.1
    assert torch.equal(answers(model, *batch), before)


def test_torch_int8_leaves_the_mode_and_the_weights_alone():
    own = random_model().train()
    before = {name: t.clone() for name, t in own.state_dict().items()}
    small = quantize.torch_dynamic_int8(own)
    assert not small.training
    assert own.training
    assert all(module.training for module in own.modules())
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.zero_()
    assert all(torch.equal(t, before[name]) for name, t in own.state_dict().items())


def test_quantising_leaves_the_log_as_it_was(file, tmp_path):
    logging.disable(logging.NOTSET)
    quantize.dynamic_int8(file, tmp_path / "a.onnx")
    assert logging.root.manager.disable == logging.NOTSET


def test_a_table_of_odd_width_gets_8_bits_where_others_get_4(tmp_path):
    for width, bits in ((33, 8), (34, 4)):
        model = random_model(hidden_size=width, num_attention_heads=1)
        small = quantize.weight_only(export.to_onnx(model, tmp_path), tmp_path / "small.onnx")
        sizes = {w.name: w.dims for w in onnx.load(small).graph.initializer}
        assert sizes["bert.embeddings.word_embeddings.weight_codes"] == [400, width * bits // 8]
        batch = batch_of((3, 20))
        assert float((export.Onnx(small)(*batch) - answers(model, *batch)).abs().max()) < 0.6


def test_tables_have_the_bits_asked_for_and_the_classifier_stays_in_float(file, tmp_path):
    for table_bits in (4, 8):
        made = onnx.load(quantize.weight_only(file, tmp_path / "small.onnx", bits=4, table_bits=table_bits)).graph
        sizes = {w.name: w.dims for w in made.initializer}
        assert sizes["bert.embeddings.word_embeddings.weight_codes"] == [400, 48 * table_bits // 8]
        assert [node.op_type for node in made.node if node.name == "classifier"] == ["MatMul"]


def test_bits_that_are_refused_leave_the_file_as_it_was(tmp_path):
    file = export.to_onnx(random_model(), tmp_path)
    before, batches = file.read_bytes(), [dict(zip(("ids", "mask", "segments"), batch_of((2, 9)), strict=True))]
    for make in (quantize.dynamic_int8, lambda a, b, **k: quantize.static_int8(a, b, batches, **k), quantize.weight_only):
        for bits in (0, 3):
            with pytest.raises(UserError, match=f"bits={bits} must be 4 or 8"):
                make(file, file, table_bits=bits)
    assert file.read_bytes() == before


# Running and comparing


def test_predict_keeps_the_order(place, prepared, tmp_path):
    model = Bert.from_pretrained(place / "model")
    given, encoded = export.Onnx(export.to_onnx(model, tmp_path)), prepared.encoded["train"]
    assert len(set(encoded.lengths.tolist())) > 1
    wanted = train.predict(model, encoded)
    torch.testing.assert_close(given.predict(encoded, batch_size=7), wanted, atol=1e-4, rtol=1e-4)


def test_compare_measures_both(place, prepared, tmp_path):
    model = Bert.from_pretrained(place / "model")
    file = export.to_onnx(model, tmp_path)
    same = export.compare(model, export.Onnx(file), prepared, "train")
    assert same.accuracy == same.model_accuracy == course.score(model, prepared, "train") > 0.9
    assert same.agreement == 1
    assert same.largest_difference < 1e-4
    assert same.examples == len(prepared.labels["train"])
    int8 = export.compare(model, export.Onnx(quantize.dynamic_int8(file, tmp_path / "int8.onnx")), prepared, "train")
    assert int8.agreement > 0.9
    assert 1e-4 < int8.largest_difference < 2
    other = Bert.from_pretrained(place / "model")
    other.classifier.weight.data.neg_()
    other.classifier.bias.data.neg_()
    opposite = export.compare(model, other, prepared, "train")
    assert opposite.agreement == 0
    assert opposite.accuracy == pytest.approx(1 - same.accuracy)
    assert opposite.model_accuracy == same.accuracy
    assert opposite.f1 < 0.1 < 0.9 < same.f1


def test_difference_on_random_ids_sees_a_changed_weight(file):
    changed = random_model()
    changed.layers[1].down.bias.data[0] += 1
    assert export.difference_on_random(changed, export.Onnx(file)) > 1e-3


def test_a_difference_that_is_no_number_is_not_lost(model, file):
    broken = random_model()
    broken.classifier.bias.data[1] = math.nan
    for exported in (model, export.Onnx(file)):
        assert math.isnan(export.difference_on_random(broken, exported))


def test_a_difference_is_that_of_evaluation_whichever_model_is_in_training():
    model = random_model()
    exported = random_model().train()
    assert export.difference_on_random(model, exported) == 0
    assert (model.training, exported.training) == (False, True)


def test_threads_and_latency(file):
    given = export.Onnx(file, threads=1)
    assert given.threads == 1
    ids = batch_of((1, 16))[0]
    assert measure.latency(lambda: given(ids), repeats=3, warmup=1).median > 0
    assert export.Onnx(file.parent).threads == torch.get_num_threads()


# What goes wrong


def test_bad_inputs_are_one_sentence(model, file, tmp_path):
    with pytest.raises(UserError, match="longer than max_position_embeddings=512"):
        export.Onnx(file)(torch.zeros(1, 513, dtype=torch.long))
    with pytest.raises(UserError, match="give ids of the model's own tokenizer"):
        export.Onnx(file)(torch.full((1, 3), 400))
    with pytest.raises(UserError, match="cannot take the id -1; give ids of the model's own tokenizer"):
        export.Onnx(file)(torch.tensor([[3, 7], [-1, 2]]))
    with pytest.raises(UserError, match="does not exist"):
        export.Onnx(tmp_path / "nothing.onnx")
    (tmp_path / "half.onnx").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be run by ONNX Runtime"):
        export.Onnx(tmp_path / "half.onnx")
    with pytest.raises(UserError, match="is no ONNX file"):
        quantize.dynamic_int8(tmp_path / "half.onnx", tmp_path / "b.onnx")
    (tmp_path / "half.onnx").write_bytes(b"")
    for make in (quantize.dynamic_int8, quantize.tables, quantize.weight_only):
        with pytest.raises(UserError, match="is no ONNX file .it holds no operators.; export the model again"):
            make(tmp_path / "half.onnx", tmp_path / "b.onnx")
    with pytest.raises(UserError, match="no texts to predict from"):
        export.Onnx(file).predict(text.Encoded((), ()))
    with pytest.raises(UserError, match="bits=3 must be 4 or 8"):
        quantize.weight_only(file, tmp_path / "b.onnx", bits=3)
    with pytest.raises(UserError, match="needs batches to calibrate on"):
        quantize.static_int8(file, tmp_path / "b.onnx", [])
    with pytest.raises(UserError, match="masked-LM head cannot be exported"):
        export.to_onnx(random_model(head="masked_lm", labels=()), tmp_path / "mlm")
    assert files(tmp_path) == {"half.onnx"}


@pytest.mark.parametrize("content", ["{", "[1]", "\ud800"])
def test_a_damaged_config_beside_the_file_is_one_sentence(file, tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match="config.json .*; export the model again"):
        export.Onnx(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_another(file, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(onnx, "load", refuse)
    with pytest.raises(UserError, match="model.onnx cannot be read .*Permission denied.*; check the file and its permissions"):
        quantize.tables(file, tmp_path / "b.onnx")


def test_a_full_memory_is_not_called_a_wrong_id(file, monkeypatch):
    given = export.Onnx(file)

    class Full:
        def run(self, *_):
            raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(given, "session", Full())
    with pytest.raises(UserError, match="the memory is full at 2 texts of 3 tokens; give fewer at a time"):
        given(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_sentence(place, tmp_path, monkeypatch, capsys, missing):
    real = importlib.import_module

    def absent(name, *rest):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert run(place, tmp_path / "out", "onnx") == 2
    said = capsys.readouterr().err
    assert f"the package {missing} is missing, which ONNX files need; python -m pip install onnx onnxruntime" in said
    assert said.count("\n") == 1
    assert files(tmp_path) == set()


# The command line


def run(place, out, layout, *more, model="model") -> int:
    return cli.main(["export", "--model", f"{place}/{model}", "--format", layout, "--out", str(out), *more])


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["hf", "onnx", "onnx-int8", "onnx-int4", "onnx-int8-static"])
def test_the_command_writes_loads_and_compares(place, prepared, tmp_path, capsys, layout):
    assert run(place, tmp_path / "out", layout, "--data", f"{place}/films.csv") == 0
    report, shown = metrics(tmp_path / "out"), capsys.readouterr().out
    file = tmp_path / "out" / ("model.safetensors" if layout == "hf" else "model.onnx")
    assert report["bytes"] == file.stat().st_size
    assert report["examples"] == len(prepared.labels["test"])
    assert {"accuracy", "f1", "model_accuracy", "agreement", "parameters", "seconds"} <= set(report)
    if layout in ("hf", "onnx"):
        assert report["agreement"] == 1
        assert max(report["random_difference"], report["largest_difference"]) < 1e-4
    for name in ("model accuracy", "agreement", "random difference", "bytes"):
        assert name in shown
    if layout != "onnx-int8-static":  # which cannot do without texts
        assert run(place, tmp_path / "out", layout) == 0, "an earlier export is replaced"
        assert "accuracy" not in metrics(tmp_path / "out")
    assert files(tmp_path) == {"out"}


def test_an_encoder_is_exported_without_data(place, tmp_path):
    assert run(place, tmp_path / "out", "onnx", model="base") == 0
    assert metrics(tmp_path / "out")["random_difference"] < 1e-4


BAD = [
    (["onnx-int8", "--data", "{p}/films.csv"], "base", "has no classification head"),
    (["onnx", "--data", "{p}/none.csv"], "model", "none.csv"),
    (["onnx"], "nothing", "nothing"),
    (["onnx-int8-static"], "model", "fixes ranges on the training texts of --data; give it, or take --format onnx-int8"),
    (["onnx", "--max-length", "0"], "model", "'0' is not a whole number"),
]


@pytest.mark.parametrize(("typed", "model", "said"), BAD, ids=str)
def test_bad_input_ends_with_code_2_and_leaves_nothing(place, tmp_path, capsys, typed, model, said):
    assert run(place, tmp_path / "out", *(word.format(p=place) for word in typed), model=model) == 2
    heard = capsys.readouterr().err
    assert said in heard
    assert heard.strip().count("\n") == 0
    assert files(tmp_path) == set()


def test_a_failure_half_way_leaves_the_old_export(place, tmp_path, monkeypatch):
    assert run(place, tmp_path / "out", "onnx") == 0
    before = metrics(tmp_path / "out")

    def fail(*_):
        raise UserError("no")

    monkeypatch.setattr(quantize, "dynamic_int8", fail)
    assert run(place, tmp_path / "out", "onnx-int8") == 2
    assert metrics(tmp_path / "out") == before
    assert files(tmp_path) == {"out"}


def test_an_export_that_answers_otherwise_is_not_written(place, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference_on_random", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match="answers otherwise"):
        run(place, tmp_path / "out", "onnx")
    assert files(tmp_path) == set()


@pytest.mark.parametrize("layout", ["onnx", "onnx-int8"])
def test_an_export_that_answers_nan_is_not_written(place, tmp_path, monkeypatch, layout):
    write = export.to_onnx

    def write_broken(model, folder):
        broken = copy.deepcopy(model)
        broken.classifier.bias.data[0] = math.nan
        return write(broken, folder)

    monkeypatch.setattr(export, "to_onnx", write_broken)
    with pytest.raises(RuntimeError, match="answers otherwise than .*: nan"):
        run(place, tmp_path / "out", layout)
    assert files(tmp_path) == set()
