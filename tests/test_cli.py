"""The command line: what a run writes and says, and one clear line with nothing left behind for bad input."""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from random_checkpoint import write_checkpoint

from llava_lens import cli
from llava_lens.analysis.files import write_together
from llava_lens.errors import LensError
from llava_lens.tiny import CHECKPOINT, render_scene

QUESTION = "What is the color of the circle?"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    render_scene(3).image.save(path)
    return path


class Ran:
    """What a run returned, printed, and left in its folder for outputs."""

    def __init__(self, code: int, out: str, err: str, folder: Path):
        self.code, self.out, self.err = code, out, err
        self.left = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path) -> Iterator[Any]:
    def ran(*arguments: Any, out: Path = tmp_path / "out", model: Any = checkpoint) -> Ran:
        try:
            chosen = [] if model is None else ["--model", str(model)]
            code = cli.main(["explain", *map(str, arguments), "--out", str(out), *chosen])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        said = capsys.readouterr()
        return Ran(code, said.out, said.err, out)

    yield ran


def test_it_answers_says_why_and_writes_both_files(run: Any, picture: Path, tmp_path: Path) -> None:
    ran = run(picture, QUESTION, "--top-k", 30)
    assert (ran.code, ran.err) == (0, "")
    assert ran.left == ["explanation.json", "explanation.png"]
    facts = json.loads((tmp_path / "out" / "explanation.json").read_text(), parse_constant=pytest.fail)
    assert facts["question"] == QUESTION and facts["likeliest"][0] == [facts["answer"], facts["probability"]]
    assert len(facts["top_heads"]) == 5 and facts["closure"] < 1e-5
    assert [len(facts["patches"]["values"]), len(facts["patches"]["values"][0])] == [8, 8]
    assert facts["patches"]["method"]["exact"] == 30
    assert facts["patches"]["method"]["of"] == 16 * len(facts["positions"]["values"])
    assert facts["picture"]["size"] == [256, 256]
    assert f"Explained '{facts['answer']}', probability" in ran.out and "explanation.png" in ran.out
    drawn = Image.open(tmp_path / "out" / "explanation.png")
    colours = drawn.convert("RGB").getcolors(drawn.width * drawn.height)
    assert drawn.width > 800 and drawn.height > 500 and colours and len(colours) > 1000


def test_without_arguments_the_embedded_model_explains_the_bundled_scene(capsys: Any, tmp_path: Path) -> None:
    bundled = json.loads(CHECKPOINT.with_name("example.json").read_text())
    assert cli.main(["explain", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "explanation.json").read_text())
    assert (facts["question"], facts["answer"]) == (bundled["question"], bundled["answer"])
    assert facts["probability"] > 0.9 and f"Answer    {bundled['answer']}\n" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["explanation.json", "explanation.png"]


def test_a_given_answer_a_stem_and_no_picture(run: Any, picture: Path, tmp_path: Path) -> None:
    ran = run(picture, QUESTION, "--answer", "blue", "--stem", "The color of the circle is", "--no-picture")
    assert ran.code == 0 and ran.left == ["explanation.json"]
    facts = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert facts["answer"] == "blue" and facts["prompt"].endswith("ASSISTANT: The color of the circle is")


def test_a_second_run_replaces_the_first(run: Any, picture: Path, tmp_path: Path) -> None:
    assert run(picture, QUESTION, "--no-picture").code == 0
    first = (tmp_path / "out" / "explanation.json").read_bytes()
    assert run(picture, "What is the color of the star?", "--no-picture").code == 0
    assert (tmp_path / "out" / "explanation.json").read_bytes() != first


def test_every_option_reaches_the_explanation_and_the_page(run: Any, picture: Path, tmp_path: Path) -> None:
    options = (
        "--answer",
        "blue",
        "--versus",
        "red",
        "--method",
        "dla",
        "--by",
        "head,neuron",
        "--by",
        "source",
        "--html",
    )
    ran = run(picture, QUESTION, *options)
    assert (ran.code, ran.err) == (0, "")
    assert ran.left == ["explanation.html", "explanation.json", "explanation.png"]
    facts = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert (facts["answer"], facts["versus"], facts["map"]["method"]["score"]) == ("blue", "red", "dla")
    assert list(facts["direct"]) == ["head", "neuron", "source"] and facts["neurons"]["axes"] == ["layer", "neuron"]
    page = (tmp_path / "out" / "explanation.html").read_text()
    assert "--versus red --method dla" in page and "llava-lens explain" in page
    assert "logit('blue') − logit('red')" in ran.out and "MLP neurons" in ran.out


def test_all_tokens_of_an_answer_are_put_into_the_prompt(run: Any, picture: Path, tmp_path: Path) -> None:
    stem = "The color of the circle is"
    assert run(picture, QUESTION, "--answer", "red blue", "--several", "all", "--stem", stem, "--no-picture").code == 0
    facts = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert facts["prompt"].endswith(f"{stem} red") and len(facts["answer_id"]) == 2
    assert run(picture, QUESTION, "--answer", "red blue", "--several", "first", "--no-picture").code == 0
    assert json.loads((tmp_path / "out" / "explanation.json").read_text())["answer"] == "red"


def test_the_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from llava_lens.maps import METHODS

    assert cli.main(["methods"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(METHODS)


# ---- bad input


def gigantic(path: Path) -> Path:
    """A PNG that claims 60,000 × 60,000 pixels and holds none."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def bad_pictures(folder: Path) -> dict[str, tuple[Path, str]]:
    text, cut, huge = folder / "notes.png", folder / "cut.png", gigantic(folder / "huge.png")
    text.write_text("not a picture")
    render_scene(3).image.save(cut)
    cut.write_bytes(cut.read_bytes()[:9000])
    return {
        "missing": (folder / "nothing.png", "no image file"),
        "folder": (folder, "is a folder"),
        "not an image": (text, "is not an image"),
        "truncated": (cut, "cannot decode image"),
        "gigantic": (huge, "60000×60000 = 3,600,000,000 pixels|too large"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "not an image", "truncated", "gigantic"])
def test_a_bad_picture(run: Any, tmp_path: Path, kind: str) -> None:
    path, message = bad_pictures(tmp_path)[kind]
    refused(run(path, QUESTION), message)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "an empty question"),
        (["  "], "an empty question"),
        ([], "no question about"),
        (["<image> <image> What is it?"], "2 <image> in .* but 1 image given"),
        (["What is the kolor of the circle?"], "'kolor'; nearest: 'color'"),
        (["what " * 600], r"question 0 takes \d+ tokens, \d+ of text and 64 of images; the context holds 512"),
        ([QUESTION, "--stem", "what " * 500], "the context holds 512"),
        ([QUESTION, "--answer", "dark red"], r"'dark red' is 2 tokens \['<unk>', 'red'\]"),
        (
            [QUESTION, "--answer", "red blue"],
            r"'blue'\], expected one: --several first scores .*--several all",
        ),
        ([QUESTION, "--versus", "red blue"], r"versus 'red blue' is 2 tokens .*--several first"),
        ([QUESTION, "--several", "some"], "argument --several: invalid choice: 'some'"),
        ([QUESTION, "--method", "relevance"], "method 'relevance'; nearest: 'relevancy'"),
        ([QUESTION, "--by", "layer,haed"], "by='haed'; nearest: 'head'; expected some of 'layer'"),
        ([QUESTION, "--answer", "mauve"], r"'mauve' is 1 token \['<unk>'\]"),
        ([QUESTION, "--top-k", "0"], "argument --top-k: '0': expected a whole number"),
        ([QUESTION, "--device", "warp"], "cannot load .*warp"),
        (["What \udcff?"], r"'What \\udcff\?' is not UTF-8"),
        ([QUESTION, "--answer", "\udcff"], r"'\\udcff' is not UTF-8"),
        ([QUESTION, "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_bad_question_or_option(run: Any, picture: Path, arguments: list[str], message: str) -> None:
    refused(run(picture, *arguments), message)


def bad_checkpoints(folder: Path, good: Path) -> dict[str, tuple[Any, str]]:
    def copy(name: str, **changed: bytes | None) -> Path:
        new = folder / name
        new.mkdir()
        for path in good.iterdir():
            data = changed.get(path.stem, path.read_bytes())
            if data is not None:
                (new / path.name).write_bytes(data)
        return new

    weights = (good / "model.safetensors").read_bytes()
    config = json.loads((good / "config.json").read_text())
    plain = {**config["text_config"], "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {
        "another family": (copy("bert", config=b'{"model_type": "bert"}'), "'bert' checkpoint"),
        "no model": (folder / "nowhere", "nowhere"),
        "empty folder": (copy("empty", **{p.stem: None for p in good.iterdir()}), "config.json"),
        "no weights": (copy("bare", model=None), "weights|safetensors"),
        "damaged weights": (copy("cut", model=weights[:5000]), "damaged or cut|not a safetensors|header|bytes"),
        "damaged configuration": (copy("json", config=b"{"), "config.json"),
        "damaged tokenizer": (copy("words", tokenizer=b"{}"), "cannot load|tokenizer"),
        "no tower": (copy("llama", config=json.dumps(plain).encode()), "the model has no vision"),
    }


BAD = ["another family", "no model", "empty folder", "no weights", "damaged weights", "damaged configuration"]


@pytest.mark.parametrize("kind", [*BAD, "damaged tokenizer", "no tower"])
def test_a_bad_checkpoint(run: Any, picture: Path, tmp_path: Path, checkpoint: Path, kind: str) -> None:
    model, message = bad_checkpoints(tmp_path, checkpoint)[kind]
    refused(run(picture, QUESTION, model=model), message)


def test_a_file_in_the_way_of_the_output(run: Any, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(run(picture, QUESTION, out=out), "cannot write to .*: a file is in the way")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "explanation.png").mkdir(parents=True)
    ran = run(picture, QUESTION)
    assert ran.code == 2 and "a folder is in the way" in ran.err and ran.left == ["explanation.png"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_place_that_cannot_be_written(run: Any, picture: Path) -> None:
    refused(run(picture, QUESTION, out=Path("/proc/out")), "cannot write to '/proc/out'")


def test_a_full_disk_leaves_what_was_there(run: Any, picture: Path, tmp_path: Path) -> None:
    assert run(picture, QUESTION, "--no-picture").code == 0
    before = (tmp_path / "out" / "explanation.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the scores fit, the picture does not
    try:
        ran, fresh = run(picture, "Where is the star?", "--html"), run(picture, QUESTION, out=tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (ran.code, ran.out, ran.left) == (2, "", ["explanation.json"]) and "cannot write to" in ran.err
    assert (tmp_path / "out" / "explanation.json").read_bytes() == before
    refused(fresh, "cannot write to")
    assert not (tmp_path / "new").exists()


def refused(ran: Ran, message: str) -> None:
    """Exit code 2, one line that says it, nothing printed and nothing left behind."""
    assert ran.code == 2 and ran.out == ""
    assert ran.err.count("\n") == 1 and re.fullmatch(f"llava-lens: error: .*({message}).*\n", ran.err), ran.err
    assert not ran.left


# ---- around it


def test_files_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_together(tmp_path / "a" / "b", {"one": b"1", "two": b"2"})
    assert [p.read_bytes() for p in paths] == [b"1", b"2"] and oct(paths[0].stat().st_mode)[-3:] == "644"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LensError, match=r"cannot write to .*: No space left on device"):
        write_together(tmp_path / "a" / "b", {"one": b"new", "three": b"3"})
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["one", "two"]
    assert paths[0].read_bytes() == b"1"


def test_help_and_version_load_nothing_heavy() -> None:
    code = "import sys; from llava_lens.cli import main\n"
    code += "try:\n    main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    for arguments, said in (
        (["--version"], "llava-lens 0.1.0"),
        (["explain", "--help"], "--versus black --by"),
        (["methods", "-h"], "maps"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert said in done.stdout and done.stderr.strip() == "False"


def test_python_m_runs_it_and_reports_errors_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llava_lens", "explain", "nothing.png", QUESTION], capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "llava-lens: error: no image file 'nothing.png'\n"
    assert list(tmp_path.iterdir()) == []


def test_names_and_terminals_that_are_not_utf_8(picture: Path, tmp_path: Path) -> None:
    odd = picture.rename(picture.with_name("scene\udcff.png"))
    done = subprocess.run(
        [sys.executable, "-m", "llava_lens", "explain", odd, QUESTION, "--html", "--no-picture", "--out", tmp_path],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert rb"\xd7 position cells" in done.stdout  # the sign of multiplication
    assert "scene?.png" in (tmp_path / "explanation.html").read_text(encoding="utf-8")


def test_the_example_runs_and_finds_both_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[1] / "examples" / "explain_a_picture.py"
    runpy.run_path(str(example))["main"](str(tmp_path))
    assert capsys.readouterr().out.count("Right: True; on the object: True") == 2
    assert len(list(tmp_path.glob("*/explanation.png"))) == 2
