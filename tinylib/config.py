"""The sizes of a BERT, under the names of Hugging Face's config.json, checked once when they are read."""

import re
from dataclasses import dataclass, fields, replace

from tinylib.errors import UserError

CLASSIFIER = "ForSequenceClassification"  # what the classifiers of all architectures are called
ARCHITECTURES = {
    None: "BertModel",
    "classification": f"Bert{CLASSIFIER}",
    "regression": f"Bert{CLASSIFIER}",  # of one label: transformers' problem_type tells the two apart
    "masked_lm": "BertForMaskedLM",
}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # name -> F.gelu's argument
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
MOST = 10**8  # of each count: their products stay within 64 bits
MOST_LABELS = 10_000  # of a config.json that numbers them and does not name them


@dataclass(frozen=True)
class BertConfig:
    """Hold the sizes of a BERT; raise UserError for a value that cannot be."""

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
    pad_token_id: int | None = 0
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    head: str | None = None  # None, "classification", "regression" (one output, a score) or "masked_lm"
    labels: tuple[str, ...] = ()  # the classes' names; of a regression the one name of what it gives
    head_dim: int | None = None  # D; None: C/H, the only layout that transformers' BERT knows

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
            if getattr(self, name) > MOST:
                raise UserError(f"{name}={getattr(self, name)} must be at most {MOST:,}; no BERT comes near it")
        if self.head_dim is not None and self.head_dim < 1:
            raise UserError(f"head_dim={self.head_dim} must be at least 1, or left out for hidden_size / num_attention_heads")
        if self.head_dim is not None and self.head_dim * self.num_attention_heads > MOST:
            heads = self.num_attention_heads
            raise UserError(f"head_dim={self.head_dim} times num_attention_heads={heads} must be at most {MOST:,}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            up = self.num_attention_heads * -(-self.hidden_size // self.num_attention_heads)
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}; try hidden_size={up}"
            )
        self._check_numbers()
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.head not in ARCHITECTURES:
            raise UserError(f"head={self.head!r} is not one of {', '.join(map(repr, ARCHITECTURES))}")
        if self.head == "classification" and len(self.labels) < 2:
            raise UserError(
                f"head='classification' needs at least two labels, got {self.labels}; name them in labels=(…)"
            )
        if self.head == "regression" and len(self.labels) != 1:
            raise UserError(f"head='regression' gives one score, got labels={self.labels}; name that one: labels=('score',)")
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels={self.labels} holds a name twice; give each class its own")

    def _check_numbers(self) -> None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1; BERT's is 0.1")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0 <= getattr(self, name) <= 1:  # NaN fails too
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and at most 1")
        pad, V = self.pad_token_id, self.vocab_size
        if pad is not None and not 0 <= pad < V:
            raise UserError(f"pad_token_id={pad} must be a token of the vocabulary, 0 to {V - 1}")

    @classmethod
    def bert_base(cls, **changes) -> "BertConfig":
        """Return 12 layers, 768 wide: 110 M parameters (Devlin et al. 2019, section 3)."""
        return cls(**changes)

    @classmethod
    def minilm_l6(cls, **changes) -> "BertConfig":
        """Return 6 layers, 384 wide: 22.7 M parameters, the course's teacher."""
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        return cls(**(sizes | changes))

    @classmethod
    def tinybert4(cls, **changes) -> "BertConfig":
        """Return 4 layers, 312 wide, 12 heads, FFN 1200: 14.4 M parameters (Jiao et al. 2020, sec. 4.2)."""
        sizes = {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}
        return cls(**(sizes | changes))

    @classmethod
    def tinybert6(cls, **changes) -> "BertConfig":
        """Return 6 layers, 768 wide: 67 M parameters (Jiao et al. 2020, section 4.2)."""
        return cls(**({"num_hidden_layers": 6} | changes))

    @classmethod
    def parse(cls, shape: str, **changes) -> "BertConfig":
        """Read "4x312" (layers x width); the paper's shapes get the paper's other sizes.

        Other widths get 12 heads where 12 divides them (else the largest divisor below) and an FFN of four
        times the width. Raises UserError for a shape that is written otherwise.
        """
        match = re.fullmatch(r"(\d{1,18})[xX×](\d{1,18})", shape.strip())  # Python reads no number of thousands of digits
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

    @staticmethod
    def head_for(labels: tuple[str, ...]) -> str:
        """Return the head that gives these labels: one name is a regression's, several are classes."""
        return "regression" if len(labels) == 1 else "classification"

    @property
    def outputs(self) -> int:
        """Return K, the numbers that the head gives for a text: a logit a class, one score of a regression, 0 of other heads."""
        return len(self.labels) if self.head in ("classification", "regression") else 0

    @property
    def unnamed(self) -> bool:
        """Tell whether the labels have the names that transformers gives where nobody did: LABEL_0, LABEL_1, …."""
        return self.labels == tuple(f"LABEL_{n}" for n in range(len(self.labels)))

    @property
    def head_width(self) -> int:
        """Return D, the columns of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def replace(self, **changes) -> "BertConfig":
        """Return a copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, stored: dict, where: str = "config.json") -> "BertConfig":
        """Read the content of a config.json; raise UserError, beginning with ``where``, if it is no BERT."""
        kind = stored.get("model_type", "bert")
        if kind != "bert":
            raise UserError(
                f"{where} describes a {kind!r} model, and only 'bert' can be read; choose a BERT checkpoint"
            )
        if stored.get("position_embedding_type", "absolute") != "absolute" or stored.get("is_decoder"):
            raise UserError(f"{where} asks for relative positions or a decoder; choose an encoder with absolute ones")
        known = [f.name for f in fields(cls) if f.name in stored and f.name not in ("head", "labels")]
        try:
            head, labels = cls._told_head(stored)
            sizes = {name: cls._typed(name, stored[name]) for name in known}
            return cls(**sizes, head=head, labels=labels)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def _told_head(cls, stored: dict) -> tuple[str | None, tuple[str, ...]]:
        """Return the head that a config.json names, and its labels in the order of their numbers."""
        built, names = stored.get("architectures") or ["BertModel"], stored.get("id2label") or {}
        if not (isinstance(built, list) and isinstance(built[0], str)):
            raise UserError(f"architectures={built!r} must be a list of names; copy the checkpoint again")
        named = {name: head for head, name in reversed(ARCHITECTURES.items())}  # of two with one name, the first
        if named.get(built[0]) != "classification":
            return named.get(built[0]), ()
        if not (isinstance(names, dict) and set(names) == {str(i) for i in range(len(names))}):
            raise UserError(f'id2label={names!r} must number the labels from 0, {{"0": "no", "1": "yes"}}; correct it')
        # transformers leaves the names out where there are two and nobody named them, and so do files that were written by hand
        count = 2 if stored.get("num_labels") is None else stored["num_labels"]
        if not names and not (type(count) is int and 1 <= count <= MOST_LABELS):
            raise UserError(f"num_labels={count!r} must be a whole number from 1 to {MOST_LABELS:,}, or id2label name the labels")
        labels = tuple(str(names[str(i)]) for i in range(len(names))) or tuple(f"LABEL_{i}" for i in range(count))
        return cls.head_for(labels), labels

    @classmethod
    def _typed(cls, name: str, value: object) -> int | float | str | None:
        kind = type(getattr(cls, name))  # of the default
        if kind is float and type(value) is int and abs(value) <= MOST:
            return float(value)
        if name == "head_dim":
            kind = int
        if type(value) is kind or (name in ("pad_token_id", "head_dim") and value is None):
            return value
        words = {int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{name}={value!r} must be {words[kind]}; {getattr(cls, name)!r} is BERT-base's")

    def to_dict(self) -> dict:
        """Return the content of a config.json that ``transformers`` reads."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("head", "labels")}
        if self.head_dim is None:  # a key that transformers' BERT does not know
            del stored["head_dim"]
        stored |= {"model_type": "bert", "architectures": [ARCHITECTURES[self.head]]}
        if self.labels:
            stored["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
            stored["label2id"] = {name: i for i, name in enumerate(self.labels)}
        if self.head == "regression":
            stored["problem_type"] = "regression"
        return stored


def check_own_head(stored: dict, where: str = "config.json") -> None:
    """Raise UserError, beginning with ``where``, for a checkpoint whose own head would be lost or misread here.

    stored: the content of its config.json, of a BERT or another encoder. Its encoder can be read all the same, and so can a
    classifier to be trained anew.
    """
    built, encoder = (stored.get("architectures") or ["BertModel"])[0], "teach it a task (tinylib teach), or load its encoder alone"
    if built not in ARCHITECTURES.values() and built.startswith("BertFor") and built != "BertForPreTraining":
        raise UserError(f"{where} describes a {built}, whose head is not known here; {encoder}")
    if built.endswith(CLASSIFIER) and stored.get("problem_type") == "multi_label_classification":
        raise UserError(f"{where} describes a classifier that gives a text several labels, and here it gets one; {encoder}")
