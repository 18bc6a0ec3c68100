"""Importing the package and loading a checkpoint, each time in a process of its own.

Unusual: llava_lens imports lazily, so the names that work with a model needs are asked for. Loading lasts until a
first answer to eight words, for weights that are only mapped into memory are not there yet; what a library imports
only then is part of a first load, and not of a second one in the same process ("again"). An import and a first load
share out differently what a script waits for, so a third case has everything from the import to an answer on the clock.
"""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor

import llava_lens
from benchmarks.bridge import word_tokenizer
from benchmarks.cases import Case
from benchmarks.cases.sweeps import Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.measure import Own
from benchmarks.models import SIZES, Size, Study, make_study
from benchmarks.truth import in_float64

IMPORTS = {
    "transformer_lens": "import transformer_lens",
    "transformer_lens bridge": "from transformer_lens.model_bridge import TransformerBridge",
    "llava_lens": "from llava_lens import HookedLlava, Inputs, LlavaCache, analysis",
}
WORDS = list(range(1, 9))
PREPARE = f"""import sys, torch
torch.set_num_threads({{threads}})
words = torch.tensor([{WORDS}], device="{{device}}")
folder = sys.argv[1]
"""
LOADS = {
    "hf": (
        "from transformers import AutoProcessor, LlavaForConditionalGeneration",
        "AutoProcessor.from_pretrained(folder)\n"
        'model = LlavaForConditionalGeneration.from_pretrained(folder).to("{device}").eval()\n'
        "with torch.inference_mode():\n    result = model(words, logits_to_keep=1).logits[0, -1].tolist()\n",
    ),
    "llava_lens": (
        "from llava_lens import HookedLlava, Inputs",
        'model = HookedLlava.from_pretrained(folder, device="{device}")\n'
        "with torch.inference_mode():\n    result = model(words, logits_to_keep=1)[0, -1].tolist()\n",
    ),
}
"""Variant → what is imported before the clock starts, and what is timed.

Hugging Face reads the whole processor; llava_lens makes the part for pictures at the first one, as `ANSWERS` does.
"""
QUESTION = "<image>w5"
ANSWERS = {
    "hf": "import torch\n"
    "from PIL import Image\n"
    "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
    "processor = AutoProcessor.from_pretrained(folder)\n"
    'model = LlavaForConditionalGeneration.from_pretrained(folder).to("{device}").eval()\n'
    f'asked = processor(images=Image.open(picture), text="{QUESTION}", return_tensors="pt").to("{{device}}")\n'
    "with torch.inference_mode():\n    result = model(**asked, logits_to_keep=1).logits[0, -1].tolist()\n",
    "llava_lens": "import torch\n"
    "from llava_lens import HookedLlava\n"
    'model = HookedLlava.from_pretrained(folder, device="{device}")\n'
    f'asked = model.prepare("{QUESTION}", picture, template=False)\n'
    "with torch.inference_mode():\n    result = model(asked, logits_to_keep=1)[0, -1].tolist()\n",
}
"""Variant → a whole script: the import, the load, and the answer to a question about a picture."""
TIMED = """
import json, time
from pathlib import Path
def field(name):
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
try:
    Path("/proc/self/clear_refs").write_text("5")
except OSError:
    pass
before, result = field("VmRSS"), []
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
print(json.dumps([seconds, max(0, field("VmHWM") - before), result]))
"""


def in_fresh_process(before: str, body: str, *arguments: str) -> Own:
    """Run `before`, then `body` on the clock, in a new interpreter; the body may set a list `result`."""
    compile_package()
    script = before + TIMED.format(body=body)
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured process failed: {done.stderr.strip().splitlines()[-1]}")
    seconds, peak, result = json.loads(done.stdout.splitlines()[-1])
    return Own(torch.tensor(result, dtype=torch.float64), seconds, peak or None)


@cache
def compile_package() -> None:
    """Write the package's bytecode, which an installed one has too."""
    compileall.compile_dir(Path(llava_lens.__file__).parent, quiet=2)


def rounds(settings: Settings) -> tuple[Settings, int]:
    """One round without a warm-up for a quick check: a process takes seconds to start."""
    return (Settings(True, settings.device, 1), 0) if settings.quick else (settings, 1)


def processor_for(size: Size) -> LlavaProcessor:
    """What a checkpoint has beside its weights."""
    side = 8 * size.grid
    pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(pictures, word_tokenizer(size.vocab), patch_size=8)


def imports(settings: Settings) -> Found:
    """Seconds inside the interpreter, its own start left out."""
    settings, warmup = rounds(settings)
    left_out = {"transformer_lens bridge"} if settings.quick else set()
    chosen = {name: code for name, code in IMPORTS.items() if name not in left_out}
    variants = [Variant(name, partial(in_fresh_process, "", code)) for name, code in chosen.items()]
    against = "nothing: an import has no numbers"
    return [*compare("startup/import", SIZES["toy"], {}, 1, variants, None, settings, against, warmup)]


@dataclass(frozen=True)
class Saved:
    """A random checkpoint on disk, read before, so in the system's cache."""

    study: Study
    folder: str

    @property
    def params(self) -> dict[str, Any]:
        bytes_held = sum(file.stat().st_size for file in Path(self.folder).glob("*.safetensors"))
        return {"checkpoint": f"{bytes_held / 2**20:.0f}MiB"}

    def exact(self, input: Any) -> Float[Tensor, " d_vocab"]:
        """The last logits of what was saved, in float64."""
        with in_float64(self.study.reference) as model, torch.no_grad():
            return model(input, logits_to_keep=1)[0, -1]


@contextmanager
def saved(settings: Settings) -> Iterator[Saved]:
    """A checkpoint in safetensors with its processor, in a folder for the time of a case."""
    size = SIZES["toy" if settings.quick else "gemm"]
    study = make_study(size, device=settings.device)
    with tempfile.TemporaryDirectory() as folder:
        study.hf.save_pretrained(folder)
        processor_for(size).save_pretrained(folder)
        yield Saved(study, folder)


def load(settings: Settings) -> Found:
    """To the first answer, what is imported beforehand left out."""
    short, warmup = rounds(settings)
    facts = {"threads": torch.get_num_threads(), "device": settings.device}
    with saved(settings) as on_disk:
        size, params = on_disk.study.size, on_disk.params
        exact = on_disk.exact(torch.tensor([WORDS], device=settings.device))
        first, again = [], []
        for name, (imported, body) in LOADS.items():
            before, body = PREPARE.format(**facts) + imported + "\n", body.format(**facts)
            first.append(Variant(name, partial(in_fresh_process, before, body, on_disk.folder)))
            again.append(Variant(f"{name} again", partial(in_fresh_process, before + body, body, on_disk.folder)))
        against = "the model that was saved, in float64 (logits behind eight words)"
        rows = compare("startup/load", size, params, 1, first, exact, short, against, warmup)
        if settings.quick:
            return [*rows]
        second = compare("startup/load", size, params, 1, again, exact, short, against, warmup)
        return [*rows, *(replace(row, peak_bytes=None) for row in second)]  # it takes over what the first one freed


def answer(settings: Settings) -> Found:
    """A whole script: import, load, picture and question through the processor, logits."""
    short, warmup = rounds(settings)
    before = "import os, sys\nos.environ['OMP_NUM_THREADS'] = '{threads}'\nfolder, picture = sys.argv[1:]\n"
    before = before.format(threads=torch.get_num_threads())
    with saved(settings) as on_disk:
        size, path = on_disk.study.size, str(Path(on_disk.folder) / "picture.png")
        pixels = np.random.default_rng(0).integers(0, 256, (8 * size.grid, 8 * size.grid, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        processor: Any = processor_for(size)
        asked = processor(images=Image.fromarray(pixels), text=QUESTION, return_tensors="pt")
        exact = on_disk.exact(dict(asked))
        variants = [
            Variant(name, partial(in_fresh_process, before, body.format(device=settings.device), on_disk.folder, path))
            for name, body in ANSWERS.items()
        ]
        against = "the model that was saved, in float64 (logits behind a picture and a word)"
        return [*compare("startup/answer", size, on_disk.params, 1, variants, exact, short, against, warmup)]


CASES = [
    Case("startup/import", "the import, in fresh processes", imports),
    Case("startup/load", "a checkpoint from safetensors to its first answer, in fresh processes", load),
    Case("startup/answer", "import, load and an answer about a picture, in fresh processes", answer),
]
