"""BERT (Devlin et al. 2019): one encoder, one forward path, in the Hugging Face file layout.

``Bert.from_pretrained`` reads any Hugging Face BERT checkpoint; ``save_pretrained`` writes one that
``transformers`` loads. Layers are numbered as in the TinyBERT paper: 0 is the embedding output, 1…L are the
Transformer layers.
"""

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinylib import models
from tinylib.attention import MultiHeadAttention
from tinylib.config import ACTIVATIONS, ARCHITECTURES, BertConfig, check_own_head
from tinylib.errors import UserError
from tinylib.models import TOKENIZER_FILES
from tinylib.stored import check_depth, check_new, read_json, read_tensors

HEADS = ("pooler", "classifier", "lm_transform", "lm_norm", "lm_bias")  # what stands on top of the encoder
VOCABULARIES = "tokenizer.json", "vocab.txt", "vocab.json"  # a tokenizer is there where one of these is

OUTPUT = "cls.predictions.decoder.weight"  # a masked LM's output matrix, in files that hold it beside the word table

# Our parameter names -> Hugging Face's. The first match wins.
RENAMES = (
    (r"^embeddings\.(word|position)\.", r"bert.embeddings.\1_embeddings."),
    (r"^embeddings\.segment\.", r"bert.embeddings.token_type_embeddings."),
    (r"^embeddings\.norm\.", r"bert.embeddings.LayerNorm."),
    (r"^layers\.(\d+)\.attention\.output\.", r"bert.encoder.layer.\1.attention.output.dense."),
    (r"^layers\.(\d+)\.attention\.", r"bert.encoder.layer.\1.attention.self."),
    (r"^layers\.(\d+)\.attention_norm\.", r"bert.encoder.layer.\1.attention.output.LayerNorm."),
    (r"^layers\.(\d+)\.up\.", r"bert.encoder.layer.\1.intermediate.dense."),
    (r"^layers\.(\d+)\.down\.", r"bert.encoder.layer.\1.output.dense."),
    (r"^layers\.(\d+)\.ffn_norm\.", r"bert.encoder.layer.\1.output.LayerNorm."),
    (r"^pooler\.", r"bert.pooler.dense."),
    (r"^lm_transform\.", r"cls.predictions.transform.dense."),
    (r"^lm_norm\.", r"cls.predictions.transform.LayerNorm."),
    (r"^lm_bias$", r"cls.predictions.bias"),
)


@dataclass(frozen=True)
class BertOutput:
    """What one forward pass returns: what was asked for and nothing else."""

    hidden: Tensor  # (B, T, C) output of the last layer
    logits: Tensor | None  # (B, labels) or (B, T, V), None without a head
    hidden_states: dict[int, Tensor]  # layer -> (B, T, C); 0 is the embedding output
    scores: dict[int, Tensor]  # layer -> (B, H, T, T), before mask and softmax
    relations: dict[int, Tensor] = field(default_factory=dict)  # layer -> (B, H, T, T), v·vᵀ/√D before mask and softmax


class Embeddings(nn.Module):
    """Add word, position and segment vectors and normalise (Devlin et al. 2019, figure 2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        C = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, C, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, C)
        self.segment = nn.Embedding(config.type_vocab_size, C)
        self.norm = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None) -> Float[Tensor, "B T C"]:
        """Return the normalised sum of the three vectors of each token.

        Raises UserError for more tokens than there are positions.
        """
        T = ids.shape[1]
        if T > self.position.num_embeddings:
            raise UserError(
                f"a sequence of {T} tokens is longer than "
                f"max_position_embeddings={self.position.num_embeddings}; cut it with max_length in encode"
            )
        one = segments is None or self.segment.num_embeddings == 1  # of a model that tells no second text from the first
        segment = self.segment.weight[0] if one else self.segment(segments)
        # Summed in transformers' order: what stands in the padding would magnify another order's rounding.
        return self.dropout(self.norm(self.word(ids) + segment + self.position.weight[:T]))


class EncoderLayer(nn.Module):
    """Attend, then transform each position; add and normalise after each (Vaswani et al. 2017, 3.1)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.attention = MultiHeadAttention(
            C, config.num_attention_heads, config.attention_probs_dropout_prob, config.head_width
        )
        self.attention_norm = nn.LayerNorm(C, eps=eps)
        self.up = nn.Linear(C, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, C)
        self.ffn_norm = nn.LayerNorm(C, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.gelu = ACTIVATIONS[config.hidden_act]

    def forward(
        self, x: Float[Tensor, "B T C"], mask: Bool[Tensor, "B 1 1 T"] | None, keep_scores: bool
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B H T T"] | None]:
        """Return the layer's output and, if asked for, its attention scores."""
        attended, scores = self.attention(x, mask=mask, keep_scores=keep_scores)
        x = self.attention_norm(x + self.dropout(attended))
        transformed = self.down(F.gelu(self.up(x), approximate=self.gelu))
        return self.ffn_norm(x + self.dropout(transformed)), scores


class _Undrawn(TorchFunctionMode):
    """While this is entered no initial weights are drawn: for tensors without memory PyTorch would load its compiler for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Bert(nn.Module):
    """Encode token ids; with a head, classify the sequence or predict masked tokens.

    ``generator`` draws the initial weights (normal, ``initializer_range``).
    """

    def __init__(self, config: BertConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.tokenizer_folder: Path | None = None  # where save_pretrained copies the tokenizer's files from
        C = config.hidden_size
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if config.head != "masked_lm":
            self.pooler = nn.Linear(C, C)
        if config.outputs:
            self.classifier = nn.Linear(C, config.outputs)
        if config.head == "masked_lm":
            self.lm_transform = nn.Linear(C, C)
            self.lm_norm = nn.LayerNorm(C, eps=config.layer_norm_eps)
            self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        if self.config.pad_token_id is not None:
            self.embeddings.word.weight[self.config.pad_token_id].zero_()

    def set_dropout(self, p: float) -> None:
        """Set every dropout of the model for training from here on; its config, which is what is saved, stays as it is.

        Raises UserError unless 0 ≤ p < 1.
        """
        if not 0 <= p < 1:
            raise UserError(f"p={p} must be at least 0 and below 1; BERT's is 0.1")
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, MultiHeadAttention):
                module.dropout = p

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep_hidden: Collection[int] = (),
        keep_scores: Collection[int] = (),
        keep_relations: Collection[int] = (),
    ) -> BertOutput:
        """Run the encoder and its head.

        ids: token ids; mask: True = real token (None: all); segments: 0 = first text (None: all), 1 = second.
        keep_hidden: layers 0…L whose output is returned; keep_scores: layers 1…L whose attention scores are
        returned (the other layers run PyTorch's fused attention and never hold them); keep_relations: layers 1…L
        whose value relations are returned (``MultiHeadAttention.value_relations``).
        Raises UserError for a layer that is not there and for more tokens than the model has positions.
        """
        out = self.encode(ids, mask, segments, keep_hidden, keep_scores, keep_relations)
        return replace(out, logits=self._logits(out.hidden))

    def encode(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep_hidden: Collection[int] = (),
        keep_scores: Collection[int] = (),
        keep_relations: Collection[int] = (),
    ) -> BertOutput:
        """Run the encoder alone: ``forward`` without the head (whose cost over a vocabulary can exceed the encoder's).

        Raises UserError as ``forward`` does.
        """
        check_layers(len(self.layers), keep_hidden=keep_hidden, keep_scores=keep_scores, keep_relations=keep_relations)
        x = self.embeddings(ids, segments)
        keys = None if mask is None else mask[:, None, None, :]  # a padding key must get no weight
        hidden_states = {0: x} if 0 in keep_hidden else {}
        scores: dict[int, Tensor] = {}
        relations: dict[int, Tensor] = {}
        for m, layer in enumerate(self.layers, start=1):
            if m in keep_relations:  # the layer itself keeps no values, so they are computed once more
                relations[m] = layer.attention.value_relations(x)
            x, layer_scores = layer(x, keys, m in keep_scores)
            if m in keep_hidden:
                hidden_states[m] = x
            if layer_scores is not None:
                scores[m] = layer_scores
        return BertOutput(x, None, hidden_states, scores, relations)

    def token_logits(self, hidden: Float[Tensor, "... C"]) -> Float[Tensor, "... V"]:
        """Return the masked-LM head's logits over the vocabulary at the given places only."""
        transformed = F.gelu(self.lm_transform(hidden), approximate=ACTIVATIONS[self.config.hidden_act])
        # tied: the output matrix is the table of input embeddings
        return F.linear(self.lm_norm(transformed), self.embeddings.word.weight, self.lm_bias)

    def _logits(self, x: Tensor) -> Tensor | None:
        if self.config.outputs:
            return self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))  # [CLS] stands first
        if self.config.head == "masked_lm":
            return self.token_logits(x)
        return None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        head: str | None = "stored",
        labels: tuple[str, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> "Bert":
        """Load a folder, a shipped name ("minilm-l6") or a hub name in the Hugging Face layout.

        ``head="stored"`` keeps the checkpoint's head. ``labels`` asks for a classifier with these classes (one name: for a
        regression head, which gives a score), ``head`` for another head: what the checkpoint has of it is kept where the
        shape fits, the rest starts from ``generator``. Raises UserError if a file is missing, damaged or of another model, and
        where a stored head is none that is known here.
        """
        folder = models.resolve(source)
        told, where = read_config(folder), str(folder / "config.json")
        config = BertConfig.from_dict(told, where=where)
        if labels is None and head == "stored":
            check_own_head(told, where)
        if labels is not None:
            config = config.replace(head=BertConfig.head_for(labels), labels=tuple(labels))
        elif head != "stored":
            config = config.replace(head=head, labels=config.labels if head in ("classification", "regression") else ())
        found = cls._matched(config, _read_weights(folder), folder, new_head=labels is not None or head != "stored")
        model = cls(config, generator)
        model.load_state_dict(model.state_dict() | found)
        model.tokenizer_folder = tokenizer_in(folder)
        return model.eval()

    @classmethod
    def _matched(cls, config: BertConfig, stored: dict[str, Tensor], folder: Path, new_head: bool) -> dict[str, Tensor]:
        """Return the tensors of a file under our names; raise UserError if they are not those of this config."""
        path, where, found = folder / "model.safetensors", str(folder / "config.json"), {}
        check_depth(where, config.num_hidden_layers, stored)
        with torch.device("meta"), _Undrawn():  # shapes alone: no memory is taken before the file is known to fill it
            own = cls(config).state_dict()
        plain = {to_hf(name): name for name in own}
        for name, tensor in stored.items():
            # A bare BertModel has no prefix; very old files call LayerNorm's parameters gamma and beta.
            full = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
            ours = plain.get(full) or plain.get(f"bert.{full}")
            if ours is None or (new_head and ours.startswith("classifier.") and tensor.shape != own[ours].shape):
                continue  # another model's part, or the classifier of a task with more or fewer classes
            if tensor.shape != own[ours].shape:
                raise UserError(
                    f"{path}: {name!r} has shape {tuple(tensor.shape)}, but config.json asks for "
                    f"{tuple(own[ours].shape)}; the two files are not of one model, copy both again"
                )
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {name!r} holds {tensor.dtype} numbers instead of weights; copy the checkpoint again")
            found[ours] = tensor.to(own[ours].dtype)
        # A head that was asked for may be new; a bare BertModel may lack its pooler, which nothing reads.
        heads = HEADS if new_head else ("pooler",) if config.head is None else ()
        lost = [name for name in own if name not in found and name.split(".")[0] not in heads]
        if lost:
            raise UserError(
                f"{path} has no {to_hf(lost[0])!r}, which a {ARCHITECTURES[config.head]} needs; "
                "copy the checkpoint again, or name the head it should get"
            )
        output = stored.get(OUTPUT) if config.head == "masked_lm" else None
        if output is not None and not torch.equal(output.float(), found["embeddings.word.weight"].float()):
            raise UserError(
                f"{path}: {OUTPUT!r} is not the word table, with which a masked LM is read here; "
                "choose one whose two are tied, or leave its head out: head=None"
            )
        new = sum(tensor.numel() for name, tensor in own.items() if name not in found)
        check_new(where, new, sum(tensor.numel() for tensor in stored.values()))
        return found

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write config.json, model.safetensors and the tokenizer's files, as ``transformers`` reads them.

        ``dtype`` stores the weights in another precision (torch.float16 halves the file); they load as float32 again.
        """
        folder = self.save_without_weights(folder)
        # A bare BertModel has no "bert." prefix in Hugging Face's layout.
        strip = (lambda n: n.removeprefix("bert.")) if self.config.head is None else (lambda n: n)
        stored = {strip(to_hf(n)): t.detach().cpu().to(dtype or t.dtype).contiguous() for n, t in self.state_dict().items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def save_without_weights(self, folder: str | Path) -> Path:
        """Write config.json and the tokenizer's files: what stands beside the weights, in whatever format those are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stored = json.dumps(self.config.to_dict(), indent=2) + "\n"
        (folder / "config.json").write_text(stored, encoding="utf-8")
        if self.tokenizer_folder and self.tokenizer_folder.resolve() != folder.resolve():
            copy_tokenizer(self.tokenizer_folder, folder)
        return folder


def check_layers(L: int, **asked: Collection[int]) -> None:
    """Raise UserError for a layer that a model of L layers does not have; ``asked`` are ``Bert.forward``'s arguments."""
    for name, wanted in asked.items():
        lowest = 0 if name == "keep_hidden" else 1  # the embeddings attend to nothing
        for m in wanted:
            if not lowest <= m <= L:
                raise UserError(f"{name} asks for layer {m}, but this model has layers {lowest} to {L}")


def tokenizer_in(folder: Path) -> Path | None:
    """Return the folder if it holds a tokenizer's files, of word pieces or byte-level, else None."""
    return folder if any((folder / name).is_file() for name in VOCABULARIES) else None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files beside a BERT that uses it; of another architecture's, its class is written down as well.

    Without that class transformers would go by the model beside it and read a byte-level vocabulary as BERT's word pieces.
    Raises UserError if a config.json is there and damaged.
    """
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    told = read_config(source) if (source / "config.json").exists() else {}
    if told.get("model_type", "bert") == "bert" and "tokenizer_class" not in told:
        return
    from transformers import AutoTokenizer

    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored["tokenizer_class"] = type(AutoTokenizer.from_pretrained(source, trust_remote_code=False)).__name__
    path.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_hf(name: str) -> str:
    """Return the Hugging Face name of one of our parameters."""
    for ours, theirs in RENAMES:
        if re.match(ours, name):
            return re.sub(ours, theirs, name)
    return name  # classifier.weight and classifier.bias are called the same


def read_config(folder: Path) -> dict:
    """Return the content of a checkpoint's config.json; raise UserError if there is none or if it is damaged."""
    path = folder / "config.json"
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; name the folder of a Hugging Face checkpoint") from None


def weights_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files: one, or the parts that an index names; raise UserError where one is missing."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists() and not path.exists():
        return _parts(folder, index)
    if not path.exists():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        remedy = (
            f"{pickled.name} is a pickle, which can run code; convert it with save_pretrained of transformers"
            if pickled
            else "copy the checkpoint again"
        )
        raise UserError(f"{folder} has no model.safetensors; {remedy}")
    return [path]


def _parts(folder: Path, index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    files = sorted({*named.values()}, key=str) if isinstance(named, dict) and named else [None]
    # an index may come from anybody: a name of another folder's file is no part of this checkpoint
    if not all(isinstance(file, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", file) for file in files):
        raise UserError(f"{index} does not name the .safetensors files of this folder; copy the checkpoint again")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing, though {index.name} names it; copy the checkpoint again")
    return [folder / file for file in files]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weights_files(folder) for name, tensor in read_tensors(file).items()}
