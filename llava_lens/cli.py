"""The command line: `llava-lens explain` answers a question about a picture and shows why.

Unusual: everything heavy is imported after the arguments are read, and bad input ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

EXAMPLE = """\
examples:
  llava-lens explain                                   a scene and a question that ship with the package
  llava-lens explain dog.jpg "What is the color of the dog?" --model llava-hf/llava-1.5-7b-hf
  llava-lens explain dog.jpg "What is the color of the dog?" --stem "The color of the dog is" --model ...
  llava-lens explain dog.jpg "What is the color of the dog?" --answer brown --versus black --by layer,head,neuron
  llava-lens explain dog.jpg "What is the color of the dog?" --method relevancy --html

`llava-lens methods` lists the maps.
"""

SEVERAL = ("first", "all")
BY = "split the logit by layer, head, neuron or source; several with commas or repeated (layer,head)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(f"{message} (see {self.prog} --help)"))


def complain(message: object) -> int:
    """Say what is wrong in one line on stderr; returns the exit code."""
    print(f"llava-lens: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def parser() -> Parser:
    """The arguments of every command."""
    top = Parser(prog="llava-lens", description="Opens up LLaVA: which patches and heads produced the answer.")
    top.add_argument("--version", action="version", version=f"llava-lens {version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    explain = commands.add_parser(
        "explain",
        help="answer a question about a picture and show what the answer came from",
        description="Answers, then shows why: the heads with the highest log-probability increase, the image patches "
        "that carry it, and mean attention beside them. Writes explanation.json, explanation.png and, with --html, "
        "explanation.html, one page that needs no network.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("image", nargs="?", metavar="IMAGE", help="a picture file (default: a bundled scene)")
    explain.add_argument("question", nargs="?", metavar="QUESTION", help="what to ask about it")
    explain.add_argument("--model", metavar="DIR_OR_ID", help="a checkpoint's folder or hub id (default: the embedded)")
    explain.add_argument("--answer", metavar="WORD", help="explain this token instead of the model's own choice")
    explain.add_argument("--versus", metavar="WORD", help="explain the answer's lead over this token")
    explain.add_argument("--several", choices=SEVERAL, help="of an answer of several tokens: its first, or all")
    explain.add_argument("--stem", default="", metavar="TEXT", help="start of the answer; explains the token after it")
    explain.add_argument("--method", default="lpi", metavar="NAME", help="the map (lpi); see llava-lens methods")
    explain.add_argument("--by", action="append", metavar="SPLIT", help=BY)
    explain.add_argument("--top-k", type=positive, metavar="K", help="cells to compute exactly (what 1e-4 nats take)")
    explain.add_argument("--out", default="llava-lens-out", metavar="DIR", help="where to write (default: %(default)s)")
    explain.add_argument("--no-picture", action="store_true", help="write the scores, draw no explanation.png")
    explain.add_argument("--html", action="store_true", help="write explanation.html too, one page with everything")
    explain.add_argument("--device", metavar="DEVICE", help="cpu, cuda … (default: cuda where there is one)")
    explain.set_defaults(run=run_explain)
    methods = commands.add_parser("methods", help="list the maps that --method takes", description="Lists the maps.")
    methods.set_defaults(run=run_methods)
    return top


def positive(text: str) -> int:
    """A whole number from 1, as argparse wants it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("llava-lens")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is spelled out
            stream.reconfigure(errors="backslashreplace")
    given = parser().parse_args(arguments)
    said = shlex.join(["llava-lens", *(sys.argv[1:] if arguments is None else arguments)])
    given.command = said.encode(errors="replace").decode()
    quieten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return given.run(given)


def quieten() -> None:
    """Keep the libraries below from talking."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_explain(given: argparse.Namespace) -> int:
    """`llava-lens explain`."""
    import torch

    from llava_lens.errors import LensError

    try:
        explanation, paths = explained(given)
    except (LensError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return complain(error or type(error).__name__)
    except KeyboardInterrupt:
        return complain("interrupted")
    print(explanation.summary())
    print("\nWrote " + ", ".join(map(str, paths)))
    return 0


def run_methods(given: argparse.Namespace) -> int:
    """`llava-lens methods`."""
    from llava_lens.maps import METHODS

    for name, method in METHODS.items():
        print(f"{name:<22}{method.about}" + (f" ({method.source})" if method.source else ""))
    return 0


def explained(given: argparse.Namespace) -> tuple[Any, list[Path]]:
    """The explanation and the files it was written to; cheap checks come before the model is loaded."""
    from llava_lens.analysis.files import close_folder, open_folder
    from llava_lens.errors import LensError
    from llava_lens.explanation import explain
    from llava_lens.explanation.explain import splits_of
    from llava_lens.images import load_image
    from llava_lens.maps.importance import method_of

    image, question = scene_and_question(given.image, given.question)
    if not question.strip():
        raise LensError("an empty question; expected some text")
    for text in (question, given.answer, given.versus, given.stem, given.model):
        if text and text != text.encode(errors="replace").decode():
            raise LensError(f"{text!r} is not UTF-8; expected text")
    method_of(given.method)
    by = splits_of([each.strip() for part in given.by or ("layer,head",) for each in part.split(",")])
    picture = load_image(image)
    close_folder(open_folder(given.out))
    model = load(given.model, given.device)
    with hinting():
        inputs = model.prepare(question, picture, answer=start_of(model, given))
        explanation = explain(
            model, inputs, given.answer, given.versus,
            method=given.method, by=by, several=given.several, top_k=given.top_k, progress=sys.stderr.isatty(),
        )  # fmt: skip
    drawn = None if given.no_picture else draw(explanation, picture)
    return explanation, explanation.save(given.out, drawn, page(explanation, picture, given) if given.html else None)


def start_of(model: Any, given: argparse.Namespace) -> str:
    """The start of the answer that stands in the prompt: the stem, and with `--several all` all tokens but the last."""
    if given.several != "all" or given.answer is None:
        return given.stem
    from llava_lens.analysis.attribution.answers import tokens_of

    before = tokens_of(model, given.answer, "all")[:-1]
    return " ".join(part for part in (given.stem, model.tokenizer.decode(before)) if part)


@contextlib.contextmanager
def hinting() -> Iterator[None]:
    """Name options as the shell does where an error names them as Python does."""
    from llava_lens.errors import LensError

    try:
        yield
    except LensError as error:
        said = str(error).replace("several='first'", "--several first").replace("several='all'", "--several all")
        raise LensError(said) from error


def page(explanation: Any, picture: Any, given: argparse.Namespace) -> str:
    """The page as HTML, with the command that makes it again."""
    from llava_lens.page import explanation_page

    return explanation_page(explanation, picture, given.command)


def draw(explanation: Any, picture: Any) -> bytes:
    """The findings as PNG bytes."""
    from llava_lens.plots import explanation_png

    return explanation_png(explanation, picture)


def scene_and_question(image: str | None, question: str | None) -> tuple[str, str]:
    """What was given, or the bundled scene and its question."""
    from llava_lens.errors import LensError

    if image is None:
        from llava_lens.tiny import CHECKPOINT

        example = CHECKPOINT.with_name("example.png")
        facts = json.loads(example.with_suffix(".json").read_text(encoding="utf-8"))
        return str(example), facts["question"]
    if question is None:
        raise LensError(f"no question about {image!r}: llava-lens explain IMAGE QUESTION")
    return image, question


def load(name: str | None, device: str | None) -> Any:
    """The model to ask; raises `LensError` saying what is wrong with the checkpoint."""
    import torch

    from llava_lens.errors import LensError
    from llava_lens.model import HookedLlava

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not torch.zeros(1, device=place).add(1).item():  # a device that is not there, or that holds no numbers
            raise LensError(f"device {device!r} cannot compute")
        return HookedLlava.tiny(place) if name is None else HookedLlava.from_pretrained(name, device=place)
    except LensError:
        raise
    except (ValueError, OSError, RuntimeError, KeyError, AssertionError) as error:
        raise LensError(f"cannot load {name or 'the embedded model'!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
