"""Importing the package and loading a checkpoint, each time in a process of its own.

Unusual: llava_lens imports lazily, so the names that work with a model needs are asked for. Loading lasts until a
first answer to eight words, for weights that are only mapped into memory are not there yet; what a library imports
only then is part of a first load, and not of a second one in the same process ("again").
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, LlavaProcessor

from benchmarks.bridge import word_tokenizer
from benchmarks.cases import Case
from benchmarks.cases.sweeps import Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.measure import Own
from benchmarks.models import SIZES, Size, make_study
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
"""Variant → what is imported before the clock starts, and what is timed. Both read the processor too."""
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
    script = before + TIMED.format(body=body)
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured process failed: {done.stderr.strip().splitlines()[-1]}")
    seconds, peak, result = json.loads(done.stdout.splitlines()[-1])
    return Own(torch.tensor(result, dtype=torch.float64), seconds, peak or None)


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


def load(settings: Settings) -> Found:
    """From safetensors on disk, read before, so in the system's cache."""
    size = SIZES["toy" if settings.quick else "gemm"]
    study = make_study(size, device=settings.device)
    settings, warmup = rounds(settings)
    facts = {"threads": torch.get_num_threads(), "device": settings.device}
    with in_float64(study.model) as model, torch.no_grad():
        exact = model(torch.tensor([WORDS], device=settings.device), logits_to_keep=1)[0, -1]
    with tempfile.TemporaryDirectory() as folder:
        study.hf.save_pretrained(folder)
        processor_for(size).save_pretrained(folder)
        size_on_disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        first, again = [], []
        for name, (imported, body) in LOADS.items():
            before, body = PREPARE.format(**facts) + imported + "\n", body.format(**facts)
            first.append(Variant(name, partial(in_fresh_process, before, body, folder)))
            again.append(Variant(f"{name} again", partial(in_fresh_process, before + body, body, folder)))
        params = {"checkpoint": f"{size_on_disk / 2**20:.0f}MiB"}
        against = "the model that was saved, in float64 (logits behind eight words)"
        rows = compare("startup/load", size, params, 1, first, exact, settings, against, warmup)
        if settings.quick:
            return [*rows]
        second = compare("startup/load", size, params, 1, again, exact, settings, against, warmup)
        return [*rows, *(replace(row, peak_bytes=None) for row in second)]  # it takes over what the first one freed


CASES = [
    Case("startup/import", "the import, in fresh processes", imports),
    Case("startup/load", "a checkpoint from safetensors to its first answer, in fresh processes", load),
]
