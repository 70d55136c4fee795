"""Files that are either whole or not there.

A run that is killed while it writes must not leave half a file under a good name: everything is written beside its
place first and then moved there in one step. What is read is JSON or safetensors, never a pickle.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UnreadableFile(ValueError):
    """A file that is missing, cut off, or not what it should be; the message names it and says what was expected."""


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Read a JSON object; UnreadableFile says what the file is for if it cannot be."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnreadableFile(f"{path} is missing: it says {purpose}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnreadableFile(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UnreadableFile(f"{path} holds {type(content).__name__}, expected a JSON object that says {purpose}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
