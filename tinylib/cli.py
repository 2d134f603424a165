"""The command line: doctor, fetch, teach, general, distill, prune, evaluate, export.

A mistake of the user's ends with exit code 2 and one sentence; what a command makes appears in ``--out``
whole or not at all.
"""

import argparse
import contextlib
import errno
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tinylib import __version__, interrupt, options, processes
from tinylib.errors import UserError, UserNote, is_full_memory, plain

# torch and what stands on it are imported only once a command is to run, so that --help answers at once.


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a UserError: one sentence, like every other one."""

    def error(self, message: str):
        raise UserError(f"{message}; {self.prog} --help lists what can be given")


PRECISIONS = ("highest", "high", "medium", "bfloat16")  # train.PRECISIONS: --help must not wait for torch
CACHE_DTYPES = ("float16", "int8")  # rowwise.FORMATS
CLOSED_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    text = "Compress a BERT: teach, distil, prune, measure, export."
    parser = Parser(prog="tinylib", description=text, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinylib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    command("doctor", "check this machine and say what to do about what is missing")
    sub = command("fetch", "put a shipped model's weights into the cache, for work without internet")
    sub.add_argument("model", nargs="?", default="minilm-l6", help="shipped name (default: minilm-l6)")
    _teach_options(command("teach", "fine-tune a pretrained BERT on labelled texts"))
    text = "train a small student to be like a pretrained teacher inside, on unlabelled text (stage 1)"
    _general_options(command("general", text))
    _distill_options(command("distill", "train a small student to do what the teacher does (stage 2)"))
    text = "remove the least important part of a model, then recover on the training split"
    _prune_options(command("prune", text))

    sub = command("evaluate", "measure a classifier on a split")
    sub.add_argument("--model", type=_named, required=True, metavar="DIR")
    sub.add_argument("--data", type=_named, required=True, help=DATA)
    sub.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default test")
    sub.add_argument("--max-length", type=options.count, default=None, help=CUT)
    sub.add_argument("--seed", type=options.seed, default=0, help="of the 80/10/10 split of a single file")
    sub.add_argument("--json", action="store_true", help="print JSON and nothing else")

    sub = command("export", "write a model for use elsewhere")
    sub.add_argument("--model", type=_named, required=True, metavar="DIR")
    layout = (
        "hf: config.json, model.safetensors and tokenizer (default); onnx: the same with model.onnx in float32 instead; "
        "onnx-int8: a quarter of its size and the fastest; onnx-int4: the smallest, not faster than float32; onnx-int8-static: "
        "as onnx-int8, with the activations' ranges fixed beforehand on texts of --data, and a little less exact"
    )
    sub.add_argument("--format", choices=LAYOUTS, default="hf", help=layout)
    sub.add_argument("--data", type=_named, help=f"measure model and export on its test split: {DATA}")
    sub.add_argument("--max-length", type=options.count, default=None, help=CUT)
    sub.add_argument("--seed", type=options.seed, default=0, help="of the 80/10/10 split of a single file")
    sub.add_argument("--out", type=_path, required=True, metavar="DIR")
    return parser


CUT = "tokens a text is cut to (default: 64; on a GPU, pairs 128, as in the paper)"
LAYOUTS = "hf", "onnx", "onnx-int8", "onnx-int4", "onnx-int8-static"
DATA = "shipped name, hub name (glue/sst2), file, or folder with train, validation and test files"


def _teach_options(sub: argparse.ArgumentParser) -> None:
    base = "folder, hub name or shipped name (minilm-l6)"
    sub.add_argument("--base", type=_named, required=True, metavar="MODEL", help=base)
    _data_and_out(sub)
    sub.add_argument("--epochs", type=options.count, default=3, help="passes over the training split (default 3)")
    rate = "learning rate (default 5e-5; take 2e-5 for BERT-base)"
    sub.add_argument("--lr", type=options.rate, default=5e-5, help=rate)
    _run_options(sub)
    _logs_option(sub)
    _resume_option(sub)


def _general_options(sub: argparse.ArgumentParser) -> None:
    teacher = "a pretrained encoder: folder, hub name or shipped name (default minilm-l6)"
    sub.add_argument("--teacher", type=_named, default="minilm-l6", metavar="MODEL", help=teacher)
    sub.add_argument("--student", type=_named, default="4x312", metavar="LAYERSxWIDTH", help="the student's shape (default 4x312)")
    corpus = "shipped name (corpus), .txt or .parquet file, or folder of them (default corpus)"
    sub.add_argument("--corpus", type=_named, default="corpus", help=corpus)
    sub.add_argument("--out", type=_path, required=True, metavar="DIR")
    start = "what of the teacher it starts from: random, embeddings, teacher, states or fitted (default: states where layers fit)"
    sub.add_argument("--start", type=_named, default=None, help=start)
    layers = "teacher layer of each student layer (default: uniform)"
    sub.add_argument("--layer-map", type=_layers, metavar="2,3,5,6", help=layers)
    sub.add_argument("--steps", type=options.count, default=None, metavar="N", help="steps of the optimiser (default 3600)")
    sub.add_argument("--batch-size", type=options.count, default=32, help="sequences a step (default 32)")
    sub.add_argument("--lr", type=options.rate, default=None, help="learning rate (default 1e-3)")
    sub.add_argument("--max-length", type=options.count, default=128, help="tokens of a packed sequence (the paper: 128)")
    sub.add_argument("--measure-every", type=options.count, default=None, metavar="N", help="steps between validation losses (500)")
    sub.add_argument("--checkpoint-every", type=options.count, default=200, metavar="N", help="steps between checkpoints (200)")
    sub.add_argument("--seed", type=options.seed, default=0)
    _precision_option(sub)
    _logs_option(sub)
    _resume_option(sub)


def _distill_options(sub: argparse.ArgumentParser) -> None:
    teacher = "a fine-tuned classifier: folder, hub name or shipped name"
    sub.add_argument("--teacher", type=_named, required=True, metavar="MODEL", help=teacher)
    _data_and_out(sub)
    shape = "the student's shape (default 4x312, or that of --general)"
    sub.add_argument("--student", type=_named, default=None, metavar="LAYERSxWIDTH", help=shape)
    start = "general (default: the shipped one where it fits, else states), states, fitted, teacher, embeddings or random"
    sub.add_argument("--start", type=_named, default=None, help=start)
    sub.add_argument("--general", type=_path, metavar="DIR", help="start from this general student instead")
    copies = "augmented copies of each training text (default 0; for GLUE on a GPU the paper's 10 to 30)"
    sub.add_argument("--augment", type=options.count_from_0, default=None, metavar="N", help=copies)
    extra = "texts without labels to learn from as well: .txt with one a line, or a table with a column text (and text_pair)"
    sub.add_argument("--unlabelled", type=_path, metavar="FILE", help=extra)
    weak = "go on with a teacher that is no better than the largest class"
    sub.add_argument("--allow-weak-teacher", action="store_true", help=weak)
    share = "share of the student's weights to prune while the prediction step runs (default 0)"
    sub.add_argument("--sparsity", type=options.share, default=0.0, help=share)
    matching = "passes in which layers are matched (default 3; on a GPU the paper's 20, for GLUE's tasks 10 to 50)"
    sub.add_argument("--epochs-intermediate", type=options.count_from_0, default=None, metavar="N", help=matching)
    answers = "passes in which soft targets are learnt (default 2; on a GPU the paper's 3)"
    sub.add_argument("--epochs-prediction", type=options.count_from_0, default=None, metavar="N", help=answers)
    layers = "teacher layer of each student layer (default: uniform)"
    sub.add_argument("--layer-map", type=_layers, metavar="2,3,5,6", help=layers)
    sub.add_argument("--temperature", type=options.rate, default=1.0, help="of the soft targets (default 1; a regression has none)")
    room = "what the teacher says of each text is kept on disk up to this size, else computed anew each epoch (default 3)"
    sub.add_argument("--cache-gb", type=options.amount, default=None, metavar="GB", help=room)
    kept = "how it is kept (default float16; int8: half the room)"
    sub.add_argument("--cache-dtype", choices=CACHE_DTYPES, default=None, help=kept)
    _run_options(sub)
    _precision_option(sub)
    _logs_option(sub)
    _resume_option(sub)


def _prune_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", type=_named, required=True, metavar="DIR")
    _data_and_out(sub)
    sub.add_argument("--sparsity", type=options.share, default=0.5, help="share to remove, 0 ≤ s < 1 (default 0.5)")
    method = (
        "what is removed: magnitude, the smallest single weights (default; zeros stay in their place); heads, neurons or layers, "
        "which makes the model smaller"
    )
    sub.add_argument("--method", choices=("magnitude", "heads", "neurons", "layers"), default="magnitude", help=method)
    teacher = "recover on this teacher's soft targets instead of the labels"
    sub.add_argument("--teacher", type=_named, metavar="MODEL", help=teacher)
    sub.add_argument("--epochs", type=options.count_from_0, default=2, help="passes in which it recovers (default 2)")
    sub.add_argument("--lr", type=options.rate, default=1e-4, help="learning rate of these (default 1e-4)")
    _run_options(sub)


def _data_and_out(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", type=_named, required=True, help=DATA)
    sub.add_argument("--out", type=_path, required=True, metavar="DIR")


def _run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch-size", type=options.count, default=32, help="texts a step (default 32)")
    sub.add_argument("--max-length", type=options.count, default=None, help=CUT)
    seed = "of dropout, order and new weights, and of the 80/10/10 split of a single file (default 0)"
    sub.add_argument("--seed", type=options.seed, default=0, help=seed)


def _precision_option(sub: argparse.ArgumentParser) -> None:
    text = (
        "how far training may round: bfloat16 computes in it, faster on processors that can; high and medium round "
        "the factors of products only (default: the launcher's, else highest)"
    )
    sub.add_argument("--precision", choices=PRECISIONS, default=None, help=text)


def _logs_option(sub: argparse.ArgumentParser) -> None:
    text = "write losses and figures for TensorBoard there when the run is done (needs the package tensorboard)"
    sub.add_argument("--tensorboard", type=_path, metavar="DIR", help=text)


def _resume_option(sub: argparse.ArgumentParser) -> None:
    text = "go on with an interrupted run into the same --out"
    sub.add_argument("--resume", action="store_true", help=text)


def _named(text: str) -> str:
    """Return what an option names, a file, folder or model; refuse what can name none, before any work is done on it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("its value is empty; name something, or look at the variable that it came from")
    shown, remedy = repr(text), "name another place"
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown} holds a NUL character, which no name can; {remedy}")
    try:
        text.encode("utf-8")  # what is read and written is told in files of UTF-8
        os.stat(os.path.expanduser(text))
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{shown} is not UTF-8 text; rename the file or folder, or {remedy}") from None
    except OSError as error:  # what is not there yet is no mistake: an --out, or a model's name
        if error.errno == errno.ELOOP:
            raise argparse.ArgumentTypeError(f"{shown} is a symbolic link that leads in a circle; {remedy}") from None
    return text


def _path(text: str) -> Path:
    return Path(_named(text))


def _layers(text: str) -> tuple[int, ...]:
    with contextlib.suppress(ValueError):
        return tuple(int(n) for n in text.split(","))
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 2,3,5,6")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one sentence on stderr for a user's mistake."""
    name, args = "tinylib", argparse.Namespace()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        with contextlib.suppress(AttributeError, ValueError):  # a notebook's has no such method; one may be closed, or None
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are not about this program
    try:
        args = build_parser().parse_args(argv)
        name = f"tinylib {args.command}"
        with _notes(name), _as_one(), interrupt.listening():
            code = _run(args)
            if sys.stdout:
                sys.stdout.flush()  # what cannot be said is noticed here, not while Python ends
            return code
    except BrokenPipeError:  # whoever read along has enough (| head): no fault, and nobody to tell
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt as stop:
        print(f"{name}: stopped; teach, general and distill go on with --resume", file=sys.stderr)
        return interrupt.EXIT_CODE if isinstance(stop, interrupt.Stopped) else 130
    except Exception as error:
        sentence = _sentence(error, args)
        if sentence is None:  # a fault of ours: the traceback is what we want to be sent
            raise
        if not processes.is_main():
            time.sleep(3)  # the main process says the same, and its launcher ends this one; if not, the fault is here alone
        print(f"{name}: {plain(' '.join(sentence.split()))}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _as_one() -> Iterator[None]:
    """Let the main one of several processes speak for all."""
    if processes.count() == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if not processes.is_main():
            os.environ["TQDM_DISABLE"] = "1"
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield
        processes.stop()  # after a failure the launcher ends the others, who would wait in vain


def _run(args: argparse.Namespace) -> int:
    if args.command == "doctor":  # must work where the other commands cannot even be imported
        from tinylib.doctor import examine

        return examine()
    from tinylib import commands

    return getattr(commands, args.command)(args)


def _sentence(error: Exception, args: argparse.Namespace) -> str | None:
    """Return what to tell the user of a command with these arguments, or None for an error that no user can have caused."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "tinylib").startswith("tinylib"):
        return f"the package {error.name} is missing; tinylib doctor says what is needed and how to get it"
    if is_full_memory(error):
        known = [f"--{option.replace('_', '-')}" for option in ("batch_size", "max_length") if hasattr(args, option)]
        smaller = f"try a smaller {' or '.join(known)}, or " if known else ""
        return f"the memory is full; {smaller}close other programs"
    if isinstance(error, OSError):
        why = error.strerror or error
        return f"{error.filename or 'a file or the output'}: {why}; check that it may be used and that the disk has room"
    return None


@contextlib.contextmanager
def _notes(name: str) -> Iterator[None]:
    """Show the package's own warnings as one line each, and nobody else's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # several processes read the same data and would say the same of it
        warnings.simplefilter("always" if processes.is_main() else "ignore", category=UserNote)
        warnings.showwarning = lambda message, *_, **__: print(f"{name}: note: {plain(str(message))}", file=sys.stderr)
        yield


if __name__ == "__main__":
    sys.exit(main())
