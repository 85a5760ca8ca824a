"""Files that people write."""

from __future__ import annotations

from pathlib import Path

from ktd.errors import SettingsError

_LONGEST = 1 << 20


def read_text(path: Path) -> str:
    """The text of a settings file. Raises SettingsError where it is too long to be one (/dev/zero never
    ends), OSError, UnicodeDecodeError.
    """
    with path.open("rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise SettingsError(f"{path} is longer than {_LONGEST >> 20} MiB, so it is another kind of file.")
    return data.decode()
