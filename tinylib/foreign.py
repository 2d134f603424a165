"""Checkpoints of other architectures, read through transformers: checked before a model is made, no code of theirs run."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from tinylib import bert
from tinylib.bert import weights_files
from tinylib.config import MOST
from tinylib.errors import UserError
from tinylib.stored import check_depth, check_new, first_line, tensor_names


def read_config(folder: Path):
    """Return transformers' config of a checkpoint; raise UserError unless it is an encoder with safe weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = bert.read_config(folder).get("model_type")
    try:
        told = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # an unknown kind is a ValueError, a value of a wrong type may be anything
        why = f"describes a {kind!r} model that transformers cannot read ({first_line(error)})"
        raise UserError(f"{folder / 'config.json'} {why}; choose a model that needs no code of its own") from None
    # an encoder is what is pretrained by filling blanks; GPT and the like only continue a text, T5 and the like have a decoder too
    if told.is_encoder_decoder or getattr(told, "is_decoder", False) or told.model_type not in MASKED:
        raise UserError(
            f"{folder / 'config.json'} describes a {kind!r} model, which is no encoder; a teacher is a BERT, RoBERTa, MPNet, "
            "DistilBERT, ELECTRA or another encoder"
        )
    _check_claims(folder, told)
    return told


def _check_claims(folder: Path, told) -> None:
    """Refuse a config.json that asks for more than the weights' files can hold, before transformers builds the model."""
    from transformers import AutoModel

    where, files = str(folder / "config.json"), weights_files(folder)
    built = told.architectures or [""]
    if not (isinstance(built, list) and isinstance(built[0], str)):
        raise UserError(f"{where}: architectures={built!r} must be a list of names; copy the checkpoint again")
    for name, value in told.to_dict().items():
        if isinstance(value, int) and abs(value) > MOST and not name.endswith("_id"):
            raise UserError(f"{where}: {name}={value} must be at most {MOST:,}; copy the checkpoint again")
    names = {name for file in files for name in tensor_names(file)}
    # each of ALBERT's layers runs the same weights
    depth = getattr(told, "num_hidden_layers", 0)
    check_depth(where, depth if type(depth) is int else MOST, range(1000) if told.model_type == "albert" else names)
    try:
        with quiet(), torch.device("meta"):  # shapes alone
            wanted = sum(p.numel() for p in AutoModel.from_config(told).parameters())
    except Exception as error:  # whatever an architecture says of a size that it cannot have
        raise UserError(f"{where} describes no {told.model_type!r} model ({first_line(error)}); copy it again") from None
    held = sum(_count(file) for file in files)
    check_new(where, max(0, wanted - held), held)


def _count(file: Path) -> int:
    """Return how many numbers a safetensors file holds, by its header."""
    with safe_open(file, framework="pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())


def read_model(
    folder: Path, told, names: tuple[str, ...], new_head: bool, eager: bool, generator: torch.Generator | None = None
) -> nn.Module:
    """Return a checkpoint's model in float32, with a classifier if there are ``names`` (of its labels).

    new_head: the classifier may lack what the checkpoint has none of, or of another shape; it starts from ``generator``. eager:
    with the attention that can tell its weights. Raises UserError for weights that are damaged, missing or of another model.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if names else AutoModel
    more = {"attn_implementation": "eager"} if eager else {}
    if new_head:
        told.num_labels, told.id2label = len(names), dict(enumerate(names))
        told.label2id = {name: i for i, name in enumerate(names)}
        told.problem_type = "regression" if len(names) == 1 else None
        more |= {"ignore_mismatched_sizes": True}  # the classifier of a task with more or fewer classes
    try:
        # transformers draws what a checkpoint lacks from the CPU's global state; torch.manual_seed would begin the GPUs' anew too
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed() if generator else 0)
            model, info = kind.from_pretrained(
                folder, config=told, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **more
            )
    except Exception as error:  # of safetensors, of torch for a wrong shape, of an architecture for a wrong size
        raise UserError(f"{folder} cannot be loaded as a {told.model_type!r} model ({first_line(error)}); copy it again") from None
    prefix = f"{model.base_model_prefix}."
    lost = [name for name in info["missing_keys"] if not _may_be_new(name, prefix, new_head, bool(names))]
    lost += [str(key[0]) for key in info["mismatched_keys"] if str(key[0]).startswith(prefix)]
    if lost:
        why = f"has no {sorted(lost)[0]!r} of the shape that config.json asks for"
        raise UserError(f"{folder / 'model.safetensors'} {why}; copy the checkpoint again")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            what = f"{name!r} holds NaN or infinite numbers, with which no model can compute"
            raise UserError(f"{folder / 'model.safetensors'}: {what}; copy the checkpoint again")
    return model.float()  # it comes in the precision that it was stored in


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from showing bars, and hints that are not about this package; what is wrong is checked and said here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _may_be_new(name: str, prefix: str, new_head: bool, classifier: bool) -> bool:
    """Tell whether a parameter that a checkpoint lacks may start anew: a head that was asked for, a pooler that nobody reads."""
    if classifier:
        return new_head and (not name.startswith(prefix) or ".pooler." in name)
    return name.startswith("pooler.")
