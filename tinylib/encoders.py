"""Any encoder as a teacher: RoBERTa, MPNet, DistilBERT, ELECTRA, ALBERT, and what else transformers can load, behind ``Bert``'s
interface.

``load`` decides which class reads a folder: a BERT gets our own ``Bert``, any other encoder is loaded through transformers and
wrapped in ``Encoder``. Nothing is unpickled and no code of a checkpoint runs.

Attention scores before the softmax are computed from what the query and key projections of each layer return
(``PARTS`` says where they are). Of an architecture that is not listed there (DeBERTa with its disentangled attention,
ModernBERT with its rotations, …) only the weights after the softmax can be had; their logarithm stands in for the scores,
since softmax(log p) = p, and the attention loss is taken on probabilities (``layers.fitting``): their divergence.
"""

import contextlib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tinylib import foreign, models
from tinylib.attention import attention_scores
from tinylib.bert import Bert, BertConfig, BertOutput, check_layers, copy_tokenizer, read_config, tokenizer_in
from tinylib.config import CLASSIFIER, check_own_head
from tinylib.errors import UserError


@dataclass(frozen=True)
class Parts:
    """Where an architecture keeps its layers, and each layer the parts that ``bert.EncoderLayer`` has under its names."""

    layers: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str


_ROBERTA = Parts(
    "encoder.layer", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
PARTS = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "electra"), _ROBERTA),
    "mpnet": Parts(
        "encoder.layer", "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm",
        "intermediate.dense", "output.dense", "output.LayerNorm",
    ),
    "distilbert": Parts(
        "transformer.layer", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
        "ffn.lin1", "ffn.lin2", "output_layer_norm",
    ),
    "albert": Parts(
        "encoder.albert_layer_groups", "attention.query", "attention.key", "attention.value", "attention.dense",
        "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm",
    ),
}  # fmt: skip
# from the width of the embedding tables to that of the layers, where the two differ
TABLE_MAPS = ("embeddings_project", "encoder.embedding_hidden_mapping_in", "embeddings.embed_proj")
# heads that, as BERT's, are a matrix, tanh and a matrix on the first token
TANH_HEADS = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), ("classifier.dense", "classifier.out_proj")),
    "albert": ("albert.pooler", "classifier"),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
MOST_POSITIONS = 512  # of a model whose config names no limit


class Encoder(nn.Module):
    """An encoder of transformers behind ``Bert``'s interface: layer 0 is the embedding output, 1…L are the Transformer layers.

    ``config`` describes it in a BERT's terms: sizes, usable positions (RoBERTa: 512 of its 514), padding token, head, labels.
    ``has_scores`` tells whether ``keep_scores`` gives the scores before the softmax or the logarithm of the weights after it.
    Raises UserError for a model whose own config does not name its sizes.
    """

    def __init__(self, model: nn.Module, labels: tuple[str, ...] = ()):
        super().__init__()
        self.model = model
        self.config = _describe(model, labels)
        self.tokenizer_folder: Path | None = None
        self.has_scores = _has_scores(model.config)
        self._sees_segments = _sees_segments(model)

    @property
    def kind(self) -> str:
        """Return the architecture's name in config.json, such as "roberta"."""
        return self.model.config.model_type

    @property
    def base(self) -> nn.Module:
        """Return the encoder without its head."""
        return self.model.base_model

    @property
    def layers(self) -> list[SimpleNamespace]:
        """Return each layer's matrices and norms under the names of ``bert.EncoderLayer``; UserError where they are unknown."""
        if not self.has_scores:
            raise UserError(f"the layers of a {self.kind!r} model cannot be cut to size; choose start='embeddings'")
        parts, found = PARTS[self.kind], []
        for layer in _layers(self.base):
            own = {f.name: attrgetter(getattr(parts, f.name))(layer) for f in fields(Parts) if f.name != "layers"}
            inner = {name: own.pop(name) for name in ("query", "key", "value", "output")}
            found.append(SimpleNamespace(attention=SimpleNamespace(heads=self.config.num_attention_heads, **inner), **own))
        return found

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep_hidden: Collection[int] = (),
        keep_scores: Collection[int] = (),
        keep_relations: Collection[int] = (),
    ) -> BertOutput:
        """Run the encoder and its head; arguments and errors are those of ``Bert.forward``.

        ``keep_scores`` gives q·kᵀ/√D, of MPNet with its position bias; without ``has_scores`` log p (p the attention weight, the
        smallest normal number at the least). Value relations of such a model raise UserError.
        """
        check_layers(self.config.num_hidden_layers, keep_hidden=keep_hidden, keep_scores=keep_scores, keep_relations=keep_relations)
        inputs = self._inputs(ids, mask, segments)
        wanted = {"query": keep_scores, "key": keep_scores, "value": keep_relations}
        hooked = [part for part, layers in wanted.items() if layers]
        if not self.has_scores:
            if keep_relations:
                raise UserError(f"the values of a {self.kind!r} model cannot be read; choose attention_on='divergence'")
            inputs, hooked = inputs | {"output_attentions": bool(keep_scores)}, []
        with self._recorded(hooked) as found:
            out = self.model(**inputs, output_hidden_states=True, return_dict=True)
        states = out.hidden_states
        scores = {m: self._scores(m, found, out) for m in keep_scores}
        relations = {m: attention_scores(v, v) for m in keep_relations for v in [self._split(found["value"][m - 1])]}
        return BertOutput(states[-1], out.get("logits"), {m: states[m] for m in keep_hidden}, scores, relations)

    def _inputs(self, ids: Tensor, mask: Tensor | None, segments: Tensor | None) -> dict[str, Tensor]:
        if ids.shape[1] > self.config.max_position_embeddings:
            raise UserError(
                f"a sequence of {ids.shape[1]} tokens is longer than the {self.config.max_position_embeddings} positions of "
                f"this {self.kind!r} model; cut it with max_length in encode"
            )
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if self.config.pad_token_id is not None:  # RoBERTa and MPNet count positions over what is no padding token
            ids = ids.masked_fill(~mask, self.config.pad_token_id)
        more = {"token_type_ids": segments} if self._sees_segments and segments is not None else {}
        return {"input_ids": ids, "attention_mask": mask.long()} | more

    @contextlib.contextmanager
    def _recorded(self, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
        """Give lists that fill with what these projections return, layer by layer, while the model runs."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = []
        for name, kept in found.items():
            # a set: ALBERT runs one layer many times, and the n-th run is layer n
            for module in {getattr(layer.attention, name) for layer in self.layers}:
                hooks.append(module.register_forward_hook(lambda _module, _inputs, out, kept=kept: kept.append(out)))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _split(self, x: Float[Tensor, "B T HD"]) -> Float[Tensor, "B H T D"]:
        B, T, _ = x.shape
        return x.view(B, T, self.config.num_attention_heads, -1).transpose(1, 2)

    def _scores(self, m: int, found: dict[str, list[Tensor]], out) -> Float[Tensor, "B H T T"]:
        if not self.has_scores:  # p is 0 where the architecture looks nowhere near, and log 0 is no number to learn from
            weights = out.attentions[m - 1]
            weights = weights.to(torch.promote_types(weights.dtype, torch.float32))  # in float16 that smallest number would be 0
            return weights.clamp(min=torch.finfo(torch.float32).tiny).log()
        scores = attention_scores(*(self._split(found[name][m - 1]) for name in ("query", "key")))
        if self.kind == "mpnet":  # one bias for each head and distance, the same in every layer (Raffel et al. 2020, section 2.1)
            scores = scores + self.base.encoder.compute_position_bias(out.hidden_states[0])
        return scores

    def embedding_tables(self) -> tuple[dict[str, Tensor], nn.LayerNorm | None]:
        """Return the tables (rows, C) under the names of ``bert.Embeddings``, as far as there are any, and their norm.

        ELECTRA and ALBERT keep narrower tables and map their normalised sum to the layers' width; here the tables are mapped,
        and there is no norm. Positions begin at 0 (RoBERTa's first two rows stand for no position). Raises UserError where it
        is not known how a model maps them.
        """
        inside, C = getattr(self.base, "embeddings", None), self.config.hidden_size
        found = {"word": self.base.get_input_embeddings()}
        for name, theirs in (("position", "position_embeddings"), ("segment", "token_type_embeddings")):
            if isinstance(table := getattr(inside, theirs, None), nn.Embedding):
                found[name] = table
        tables = {name: table.weight.detach() for name, table in found.items()}
        # of a model that tells no second text from the first, both segments are alike: one row twice, or nothing added
        segment = tables.get("segment", tables["word"].new_zeros(1, tables["word"].shape[1]))
        tables["segment"] = segment if len(segment) >= 2 else segment[:1].expand(2, -1)
        if "position" in tables:
            first = _first_position(found["position"])
            tables["position"] = tables["position"][first : first + self.config.max_position_embeddings]
        if tables["word"].shape[1] != C:
            matrix = self._table_map()
            return {name: table @ matrix.T for name, table in tables.items()}, None
        norm = getattr(inside, "LayerNorm", None)
        return tables, norm if isinstance(norm, nn.LayerNorm) and norm.bias is not None else None

    def _table_map(self) -> Float[Tensor, "C E"]:
        for name in TABLE_MAPS:
            with contextlib.suppress(AttributeError):
                return attrgetter(name)(self.base).weight.detach()
        remedy = "choose start='random'"
        raise UserError(f"how a {self.kind!r} model maps its word table to its layers' width is not known here; {remedy}")

    def tanh_head(self) -> tuple[nn.Linear, nn.Linear] | None:
        """Return the two matrices of a head like BERT's (``TANH_HEADS``), or None."""
        names = TANH_HEADS.get(self.kind) if self.config.outputs else None
        return names and tuple(attrgetter(name)(self.model) for name in names)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, the weights as safetensors and the tokenizer's files, as transformers reads them."""
        with foreign.quiet():
            self.model.save_pretrained(folder)
        if self.tokenizer_folder:
            copy_tokenizer(self.tokenizer_folder, Path(folder))
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, labels: tuple[str, ...] | None = None, generator: torch.Generator | None = None
    ) -> "Encoder":
        """Load a folder or a hub name in float32, with the checkpoint's classifier if it has one.

        ``labels`` asks for a classifier with these classes, none of them (an empty tuple) for the encoder alone: what the
        checkpoint has of a classifier is kept where the shape fits, the rest starts from ``generator``. Raises UserError for a
        model that is no encoder, for files that are missing or damaged, and where a stored classifier gives several labels.
        """
        folder = models.resolve(source)
        told = foreign.read_config(folder)
        if labels is None:
            check_own_head(told.to_dict(), str(folder / "config.json"))
        names = tuple(labels or ())
        if labels is None and (told.architectures or [""])[0].endswith(CLASSIFIER):
            names = tuple(str(told.id2label[i]) for i in sorted(told.id2label))
        # of an architecture whose scores cannot be had: only eager attention gives its weights
        eager = not _has_scores(told)
        model = foreign.read_model(folder, told, names, bool(labels), eager, generator)
        try:
            encoder = cls(model, names)
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None
        if not encoder.has_scores:
            encoder._probe(folder)
        encoder.tokenizer_folder = tokenizer_in(folder)
        return encoder.eval()

    @torch.inference_mode()
    def _probe(self, folder: Path) -> None:
        """Run an unlisted architecture once, so that one that cannot teach is refused before the work begins."""
        T, L, sizes = 3, self.config.num_hidden_layers, self.config
        try:
            inputs = self._inputs(torch.full((1, T), sizes.vocab_size - 1), None, None)
            out = self.model.eval()(**inputs, output_hidden_states=True, output_attentions=True, return_dict=True)
            states, weights = [tuple(x.shape) for x in out.hidden_states], [tuple(x.shape) for x in out.attentions]
        except Exception:  # whatever the architecture wants that a teacher is not given
            states, weights = [], []
        if states != [(1, T, sizes.hidden_size)] * (L + 1) or weights != [(1, sizes.num_attention_heads, T, T)] * L:
            raise UserError(
                f"{folder} holds a {self.kind!r} model, which does not give the states and attention weights of each layer for "
                "every pair of tokens, so it cannot be a teacher; choose a RoBERTa, MPNet, DistilBERT, ELECTRA or DeBERTa"
            )


Teacher = Bert | Encoder


def load(
    source: str | Path, labels: tuple[str, ...] | None = None, generator: torch.Generator | None = None
) -> Bert | Encoder:
    """Load a model of any encoder architecture, with its own head, a classifier of ``labels``, or (an empty tuple) no head.

    The one place that decides which class reads a folder. Raises UserError as ``from_pretrained`` of the two classes.
    """
    folder = models.resolve(source)
    own = read_config(folder).get("model_type", "bert") == "bert"
    if own and labels == ():
        return Bert.from_pretrained(folder, head=None)
    return (Bert if own else Encoder).from_pretrained(folder, labels=labels, generator=generator)


def _describe(model: nn.Module, labels: tuple[str, ...]) -> BertConfig:
    """Return the sizes of an encoder of transformers in a BERT's terms."""
    told, words = model.config, model.base_model.get_input_embeddings()
    if nameless := [name for name in SIZES if not isinstance(getattr(told, name, None), int)]:
        why = f"a {told.model_type!r} model names no {nameless[0]} and has no layers of attention like a BERT's"
        raise UserError(f"{why}; choose a RoBERTa, MPNet, DistilBERT, ELECTRA or DeBERTa")
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    positions = getattr(told, "max_position_embeddings", None) or MOST_POSITIONS
    if isinstance(table, nn.Embedding):
        positions = table.num_embeddings - _first_position(table)
    sizes = {name: getattr(told, name) for name in SIZES}
    return BertConfig(
        vocab_size=words.num_embeddings, **sizes, max_position_embeddings=positions,
        intermediate_size=getattr(told, "intermediate_size", None) or getattr(told, "hidden_dim", 4 * told.hidden_size),
        # two, for a student: a tokenizer may tell first and second texts apart where the teacher does not
        type_vocab_size=max(2, getattr(told, "type_vocab_size", None) or 0),
        layer_norm_eps=getattr(told, "layer_norm_eps", 1e-12), pad_token_id=told.pad_token_id,
        head=BertConfig.head_for(labels) if labels else None, labels=labels,
    )  # fmt: skip


def _layers(base: nn.Module) -> list[nn.Module]:
    """Return the layers in the order in which they run."""
    told, found = base.config, list(attrgetter(PARTS[base.config.model_type].layers)(base))
    if told.model_type == "albert":  # each group of layers shares one set of weights (Lan et al. 2020, section 3.1)
        share = told.num_hidden_layers / told.num_hidden_groups
        return [found[int(n / share)].albert_layers[0] for n in range(told.num_hidden_layers)]
    return found


def _has_scores(told) -> bool:
    """Tell whether an architecture's scores are q·kᵀ/√D (plus MPNet's bias), from its config."""
    plain = getattr(told, "position_embedding_type", None) in (None, "absolute")  # else the positions enter the scores
    return told.model_type in PARTS and plain and getattr(told, "inner_group_num", 1) == 1


def _sees_segments(model: nn.Module) -> bool:
    more_than_one = (getattr(model.config, "type_vocab_size", None) or 0) >= 2
    return more_than_one and "token_type_ids" in inspect.signature(model.forward).parameters


def _first_position(table: nn.Embedding) -> int:
    """Return the row of a text's first token: RoBERTa and MPNet count from behind the padding token's number."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
