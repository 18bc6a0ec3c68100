"""Writing several files so that all of them appear, or none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llava_lens.errors import LensError


def open_folder(folder: str | Path) -> list[Path]:
    """Make a folder that can be written to; returns the folders that were made, innermost first.

    Raises `LensError` for a file in the way, and where nothing can be written.
    """
    path = Path(folder)
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise LensError(f"cannot write to {str(path)!r}: a file is in the way, expected a folder") from None
    except OSError as error:
        close_folder([p for p in missing if p.is_dir()])
        raise LensError(f"cannot write to {str(path)!r}: {error.strerror or error}") from None
    return missing


def close_folder(made: list[Path]) -> None:
    """Remove the folders that `open_folder` made and that are still empty."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()


def write_together(folder: str | Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, each name with its contents, replacing earlier ones; returns their paths.

    Everything is written beside its place first and then renamed, so a full disk or an interruption leaves no half
    file, and the earlier files as they were. Raises `LensError` where that cannot be done, saying why.
    """
    folder = Path(folder)
    made = open_folder(folder)
    drafts: dict[Path, Path] = {}
    try:
        for name, data in contents.items():
            if (folder / name).is_dir():
                raise LensError(f"cannot write {str(folder / name)!r}: a folder is in the way")
            handle, draft = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            drafts[Path(draft)] = folder / name
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, 0o666 & ~_umask())
        for draft, place in drafts.items():
            os.replace(draft, place)
    except OSError as error:
        raise LensError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        close_folder(made)
    return list(drafts.values())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
