"""What people read is true: generated pages are current, links lead somewhere, the README's code and examples run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llava_lens import HookedLlava
from llava_lens.tiny import render_scene

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW = ("compare_maps.py",)


def test_generated_pages_are_current():
    run = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    """With the embedded model, its words, and layers that it has, in the place of the 7B model's."""
    monkeypatch.chdir(tmp_path)
    scene = render_scene(1_000_003)
    scene.image.save("dog.jpg")
    scene.recolored(scene.find(shape="circle")[0], "red").image.save("other_dog.jpg")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    swaps = {
        'HookedLlava.from_pretrained("llava-hf/llava-1.5-7b-hf")': "HookedLlava.tiny()",
        "the dog": "the circle",
        '"dog")': '"circle")',
        "blocks.12": "blocks.1",
    }
    for given, embedded in swaps.items():
        assert given in block, f"the README no longer says {given!r}"
        block = block.replace(given, embedded)
    exec(compile(block, "README.md", "exec"), {})


def test_the_interventions_pages_code_runs():
    scene = next(s for s in map(render_scene, range(2_000_000, 2_000_100)) if s.find(shape="circle") == (0,))
    scene = scene.recolored(0, "red")
    given = {"model": HookedLlava.tiny(), "scene": scene.image, "recolored": scene.recolored(0, "blue").image}
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/interventions.md").read_text(encoding="utf-8"), re.DOTALL
    )
    exec(compile(block, "interventions.md", "exec"), {**given, "mask": scene.objects[0].mask})


@pytest.mark.parametrize("page", ["attribution.md", "maps.md"])
def test_a_pages_code_runs(page):
    model, scene = HookedLlava.tiny(), render_scene(1_000_003)
    inputs = model.prepare("What is the color of the circle?", scene.image)
    given = {"inputs": inputs, "picture": scene.image, "mask": scene.objects[scene.find(shape="circle")[0]].mask}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, page, "exec"), {"model": model, **given})


def test_the_guide_to_another_model_runs_and_is_the_example():
    page, example = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/extending.md", "examples/own_model.py")
    )
    given: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "extending.md", "exec"), given)
    classes = re.findall(r"^(?:@dataclass.*\n)?class .*(?:\n+(?:    .*))+", page, re.MULTILINE)
    assert len(classes) == 4 and all(
        each in example for each in classes if "HookedDeepseek(" not in each or "Fold" in each
    )


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, id=path.name, marks=pytest.mark.slow if path.name in SLOW else ()) for path in EXAMPLES],
)
def test_an_example_runs_and_stays_short(example, tmp_path, monkeypatch):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 70
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
