"""The command line: `llava-lens explain` answers a question about a picture and shows why.

Unusual: everything heavy is imported after the arguments are read, and bad input ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

EXAMPLE = """\
examples:
  llava-lens explain                                   a scene and a question that ship with the package
  llava-lens explain dog.jpg "What is the color of the dog?" --model llava-hf/llava-1.5-7b-hf
  llava-lens explain dog.jpg "What is the color of the dog?" --stem "The color of the dog is" --model ...
"""


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
        "that carry it, and mean attention beside them. Writes explanation.png and explanation.json.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("image", nargs="?", metavar="IMAGE", help="a picture file (default: a bundled scene)")
    explain.add_argument("question", nargs="?", metavar="QUESTION", help="what to ask about it")
    explain.add_argument("--model", metavar="DIR_OR_ID", help="a checkpoint's folder or hub id (default: the embedded)")
    explain.add_argument("--answer", metavar="WORD", help="explain this token instead of the model's own choice")
    explain.add_argument("--stem", default="", metavar="TEXT", help="start of the answer; explains the token after it")
    explain.add_argument("--top-k", type=positive, default=4096, metavar="K", help="cells to compute exactly (4096)")
    explain.add_argument("--out", default="llava-lens-out", metavar="DIR", help="where to write (default: %(default)s)")
    explain.add_argument("--no-picture", action="store_true", help="write the scores, draw nothing")
    explain.add_argument("--device", metavar="DEVICE", help="cpu, cuda … (default: cuda where there is one)")
    explain.set_defaults(run=run_explain)
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
    given = parser().parse_args(arguments)
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


def explained(given: argparse.Namespace) -> tuple[Any, list[Path]]:
    """The explanation and the files it was written to; cheap checks come before the model is loaded."""
    from llava_lens.analysis.explanation import explain
    from llava_lens.analysis.files import close_folder, open_folder
    from llava_lens.errors import LensError
    from llava_lens.images import load_image

    image, question = scene_and_question(given.image, given.question)
    if not question.strip():
        raise LensError("an empty question; expected some text")
    picture = load_image(image)
    close_folder(open_folder(given.out))
    model = load(given.model, given.device)
    inputs = model.prepare(question, picture, answer=given.stem)
    explanation = explain(model, inputs, given.answer, top_k=given.top_k)
    return explanation, explanation.save(given.out, None if given.no_picture else draw(explanation, picture))


def draw(explanation: Any, picture: Any) -> bytes:
    """The page as PNG bytes."""
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
