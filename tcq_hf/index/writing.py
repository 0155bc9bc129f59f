"""Files that are replaced only when their successor is whole."""

import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well and vanishes otherwise.

    Raises:
        OSError: If a write fails, naming `path`; what was there before is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    aside.touch(exist_ok=False)
    rights = stat.S_IMODE(aside.stat().st_mode)  # those of any new file; safetensors gives its own
    try:
        yield aside
        aside.chmod(rights)
        aside.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file
    finally:
        aside.unlink(missing_ok=True)
