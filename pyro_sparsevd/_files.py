"""Files that are complete or absent at any moment."""

__all__ = ["replacing"]

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path in the folder of a file, to write to; it replaces the file, or is removed after an error.

    Links are followed. Whenever the process ends, the file has all of its old content or all of the new.
    """
    target = Path(os.path.realpath(path))
    new = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
