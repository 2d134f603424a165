"""BERT (Devlin et al. 2019): one encoder, one forward path, in the Hugging Face file layout.

``Bert.from_pretrained`` reads any Hugging Face BERT checkpoint; ``save_pretrained`` writes one that ``transformers`` loads.
Layers are numbered as in the TinyBERT paper: 0 is the embedding output, 1…L are the Transformer layers.
"""

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinylib import models
from tinylib.attention import MultiHeadAttention
from tinylib.errors import UserError

ARCHITECTURES = {
    None: "BertModel",
    "classification": "BertForSequenceClassification",
    "masked_lm": "BertForMaskedLM",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # name -> F.gelu's `approximate`

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
class BertConfig:
    """Hold the sizes of a BERT, under Hugging Face's field names, checked once when made."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    head: str | None = None  # None, "classification" or "masked_lm"
    labels: tuple[str, ...] = field(default=())

    def __post_init__(self):
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            up = self.num_attention_heads * -(-self.hidden_size // self.num_attention_heads)
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}; "
                f"try hidden_size={up}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.head not in ARCHITECTURES:
            raise UserError(f"head={self.head!r} is not one of None, 'classification', 'masked_lm'")
        if self.head == "classification" and len(self.labels) < 2:
            raise UserError(f"head='classification' needs at least two labels, got {self.labels}; name them in labels=(…)")

    @classmethod
    def bert_base(cls, **changes) -> "BertConfig":
        """12 layers, 768 wide: 110 M parameters (Devlin et al. 2019, section 3)."""
        return cls(**changes)

    @classmethod
    def minilm_l6(cls, **changes) -> "BertConfig":
        """6 layers, 384 wide: 22.7 M parameters, the course's teacher."""
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        return cls(**(sizes | changes))

    @classmethod
    def tinybert4(cls, **changes) -> "BertConfig":
        """4 layers, 312 wide, 12 heads, FFN 1200: 14.4 M parameters (Jiao et al. 2020, section 4.1)."""
        sizes = {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}
        return cls(**(sizes | changes))

    @classmethod
    def tinybert6(cls, **changes) -> "BertConfig":
        """6 layers, 768 wide: 67 M parameters (Jiao et al. 2020, section 4.1)."""
        return cls(**({"num_hidden_layers": 6} | changes))

    @classmethod
    def parse(cls, shape: str, **changes) -> "BertConfig":
        """Read "4x312" (layers x width); the paper's shapes get the paper's other sizes.

        Other widths get 12 heads where 12 divides them (else the largest divisor up to 12) and an FFN four times as wide.
        """
        match = re.fullmatch(r"(\d+)[xX×](\d+)", shape.strip())
        if not match:
            raise UserError(f"student shape {shape!r} is not LAYERSxWIDTH; write for example 4x312")
        layers, width = int(match[1]), int(match[2])
        heads = next((h for h in range(12, 0, -1) if width and width % h == 0), 1)
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": 1200 if width == 312 else 4 * width,
        }
        return cls(**(sizes | changes))

    def replace(self, **changes) -> "BertConfig":
        """Return a copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, stored: dict, where: str = "config.json") -> "BertConfig":
        """Read a Hugging Face ``config.json``; raise UserError if it is not a BERT that we can run."""
        kind = stored.get("model_type", "bert")
        if kind != "bert":
            raise UserError(f"{where} describes a {kind!r} model; Bert.from_pretrained reads model_type 'bert' only")
        if stored.get("position_embedding_type", "absolute") != "absolute" or stored.get("is_decoder"):
            raise UserError(f"{where} asks for relative positions or a decoder; only BERT's absolute encoder is supported")
        sizes = {f.name: stored[f.name] for f in fields(cls) if f.name in stored and f.name not in ("head", "labels")}
        named = {name: head for head, name in ARCHITECTURES.items()}
        head = named.get((stored.get("architectures") or ["BertModel"])[0])
        id2label = {int(i): str(name) for i, name in (stored.get("id2label") or {}).items()}
        labels = tuple(id2label[i] for i in sorted(id2label)) if head == "classification" else ()
        if head == "classification" and not labels:
            labels = tuple(f"LABEL_{i}" for i in range(stored.get("num_labels", 2)))
        return cls(**sizes, head=head, labels=labels)

    def to_dict(self) -> dict:
        """Return the content of a Hugging Face ``config.json``."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("head", "labels")}
        stored |= {"model_type": "bert", "architectures": [ARCHITECTURES[self.head]], "position_embedding_type": "absolute"}
        if self.labels:
            stored["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
            stored["label2id"] = {name: i for i, name in enumerate(self.labels)}
        return stored


@dataclass(frozen=True)
class BertOutput:
    """What one forward pass returns: what was asked for and nothing else."""

    hidden: Tensor  # (B, T, C) output of the last layer
    logits: Tensor | None  # (B, labels) or (B, T, V), None without a head
    hidden_states: dict[int, Tensor]  # layer -> (B, T, C); 0 is the embedding output
    scores: dict[int, Tensor]  # layer -> (B, H, T, T), before mask and softmax


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
        """Return the normalised sum of the three vectors of each token."""
        T = ids.shape[1]
        if T > self.position.num_embeddings:
            raise UserError(
                f"a sequence of {T} tokens is longer than max_position_embeddings={self.position.num_embeddings}; "
                "cut it with max_length when encoding"
            )
        segment = self.segment.weight[0] if segments is None else self.segment(segments)
        return self.dropout(self.norm(self.word(ids) + self.position.weight[:T] + segment))


class EncoderLayer(nn.Module):
    """Attend, then transform each position; add and normalise after each (post-LayerNorm, Vaswani et al. 2017)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.attention = MultiHeadAttention(C, config.num_attention_heads, config.attention_probs_dropout_prob)
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
        if config.head == "classification":
            self.classifier = nn.Linear(C, len(config.labels))
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
        self.embeddings.word.weight[self.config.pad_token_id].zero_()

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep_hidden: Collection[int] = (),
        keep_scores: Collection[int] = (),
    ) -> BertOutput:
        """Run the encoder and its head.

        ids: token ids; mask: True = real token (None: all are); segments: 0 for the first text, 1 for the second.
        keep_hidden: layers 0…L whose output is returned; keep_scores: layers 1…L whose attention scores are returned
        (the other layers run PyTorch's fused attention and never hold them).
        """
        self._check_layers(keep_hidden, keep_scores)
        x = self.embeddings(ids, segments)
        keys = None if mask is None else mask[:, None, None, :]  # a padding key must get no weight
        hidden_states = {0: x} if 0 in keep_hidden else {}
        scores: dict[int, Tensor] = {}
        for m, layer in enumerate(self.layers, start=1):
            x, layer_scores = layer(x, keys, m in keep_scores)
            if m in keep_hidden:
                hidden_states[m] = x
            if layer_scores is not None:
                scores[m] = layer_scores
        return BertOutput(x, self._logits(x), hidden_states, scores)

    def _check_layers(self, keep_hidden: Collection[int], keep_scores: Collection[int]) -> None:
        L = len(self.layers)
        for name, wanted, lowest in (("keep_hidden", keep_hidden, 0), ("keep_scores", keep_scores, 1)):
            for m in wanted:
                if not lowest <= m <= L:
                    raise UserError(f"{name} asks for layer {m}, but this model has layers {lowest} to {L}")

    def _logits(self, x: Tensor) -> Tensor | None:
        if self.config.head == "classification":
            return self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))  # [CLS] stands first
        if self.config.head == "masked_lm":
            transformed = self.lm_norm(F.gelu(self.lm_transform(x)))
            return F.linear(transformed, self.embeddings.word.weight, self.lm_bias)  # tied to the input embeddings
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

        ``head="stored"`` keeps the checkpoint's head; naming another one starts it from ``generator``. ``labels`` names the
        classes of a new classification head. Raises UserError if a file is missing, damaged or of another shape.
        """
        folder = models.resolve(source)
        config = BertConfig.from_dict(_read_config(folder), where=str(folder / "config.json"))
        if labels is not None:
            config = config.replace(head="classification", labels=tuple(labels))
        elif head != "stored":
            config = config.replace(head=head, labels=config.labels if head == "classification" else ())
        model = cls(config, generator)
        model._load(_read_weights(folder), folder)
        model.tokenizer_folder = folder if (folder / "tokenizer.json").exists() or (folder / "vocab.txt").exists() else None
        return model.eval()

    def _load(self, stored: dict[str, Tensor], folder: Path) -> None:
        own = self.state_dict()
        plain = {to_hf(name): name for name in own}
        found = {}
        for name, tensor in stored.items():
            # A bare BertModel is saved without the prefix; very old files call LayerNorm's parameters gamma and beta.
            full = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
            ours = plain.get(full) or plain.get(f"bert.{full}")
            if ours is not None:
                found[ours] = tensor.to(own[ours].dtype)
        missing = [n for n in own if n not in found]
        fresh = [n for n in missing if n.split(".")[0] in ("pooler", "classifier", "lm_transform", "lm_norm", "lm_bias")]
        if len(missing) > len(fresh):
            lost = sorted(set(missing) - set(fresh))[0]
            raise UserError(f"{folder / 'model.safetensors'} has no {to_hf(lost)!r}; it is not a complete BERT checkpoint")
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                if name.startswith("classifier."):  # another task's head: start this one fresh
                    continue
                raise UserError(
                    f"{folder / 'model.safetensors'}: {to_hf(name)!r} has shape {tuple(tensor.shape)}, but config.json asks "
                    f"for {tuple(own[name].shape)}; the two files are not of one model"
                )
            own[name] = tensor
        self.load_state_dict(own)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors and the tokenizer's files, as ``transformers`` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        # A bare BertModel has no "bert." prefix in Hugging Face's layout.
        strip = (lambda n: n.removeprefix("bert.")) if self.config.head is None else (lambda n: n)
        tensors = {strip(to_hf(n)): t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if self.tokenizer_folder and self.tokenizer_folder.resolve() != folder.resolve():
            for name in TOKENIZER_FILES:
                if (self.tokenizer_folder / name).exists():
                    shutil.copyfile(self.tokenizer_folder / name, folder / name)
        return folder


def to_hf(name: str) -> str:
    """Return the Hugging Face name of one of our parameters."""
    for ours, theirs in RENAMES:
        if re.match(ours, name):
            return re.sub(ours, theirs, name)
    return name  # classifier.weight and classifier.bias are called the same


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; name the folder of a Hugging Face checkpoint") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy the checkpoint again") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    if not path.exists():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        remedy = (
            f"{pickled.name} is a pickle, which can run code: convert it with transformers' save_pretrained first"
            if pickled
            else "copy the checkpoint again"
        )
        raise UserError(f"{folder} has no model.safetensors; {remedy}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from None
