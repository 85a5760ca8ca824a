"""From the path a person gives (a file, one shard of a split, a folder) to the files of one model."""

from __future__ import annotations

import re
from pathlib import Path

from ktd.errors import GgufError

# llama.cpp's name for shard n of m: NAME-00001-of-00003.gguf
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def model_name(file: Path) -> str:
    """The name of a file of a model without .gguf and without the number of a shard."""
    match = _SHARD_NAME.fullmatch(file.name)
    return match["stem"] if match else file.name.removesuffix(".gguf")


def entry_file(path: Path) -> Path:
    """The first file of the model at `path`.

    Raises GgufError when there is none, or when a folder leaves a choice.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise GgufError(f"{path} does not exist: give the path of a .gguf file or of its folder")
    if not path.is_dir():
        raise GgufError(f"{path} is neither a file nor a folder: give the path of a .gguf file")
    try:
        files = sorted(file for file in path.iterdir() if file.suffix == ".gguf" and file.is_file())
        if not files:
            raise _no_file(path)
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror or error}") from None
    models: dict[str, Path] = {}
    for file in files:
        match = _SHARD_NAME.fullmatch(file.name)
        models.setdefault(match["stem"] if match else file.stem, file)
    if len(models) > 1:
        names = ", ".join(file.name for file in models.values())
        raise GgufError(f"{path} holds {len(models)} models: give the path of one of them ({names})")
    return next(iter(models.values()))


def shard_files(file: Path, count: int) -> list[Path]:
    """The `count` files of the split model that `file` belongs to, in order.

    Raises GgufError when the name is not that of a shard or when files are missing.
    """
    match = _SHARD_NAME.fullmatch(file.name)
    if match is None or int(match["count"]) != count:
        raise GgufError(
            f"{file} is one of {count} shards but is not named so: give all of them their original names,"
            f" NAME-00001-of-{count:05}.gguf and so on"
        )
    files = [file.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [shard.name for shard in files if not shard.is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        plural = "s" if len(missing) > 1 else ""
        raise GgufError(
            f"{file.parent} lacks {len(missing)} of {count} shards: download the file{plural} {listed}"
        )
    return files


def _no_file(folder: Path) -> GgufError:
    below = sorted({file.parent.name for file in folder.glob("*/*.gguf")})
    if below:
        return GgufError(f"{folder} holds no .gguf file itself: give one of its folders ({', '.join(below)})")
    return GgufError(f"{folder} holds no .gguf file: give the folder that the model was downloaded to")
