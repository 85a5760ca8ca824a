"""Which files of a repository are one model: its quants, and the one that is wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ktd.errors import UserError
from ktd.pull.hub import RemoteFile

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
# At the end of the name: UD-IQ1_S, Q4_K_M, UD-Q2_K_XL, TQ1_0, BF16, MXFP4_MOE.
_QUANT = re.compile(r"(?:^|[-.])((?:UD-)?(?:I?Q\d|TQ\d|BF16|F16|F32|MXFP4)\w*)$", re.IGNORECASE)
# Parts of other models' repositories that are no models.
_NO_MODEL = ("mmproj", "imatrix")


@dataclass(frozen=True, slots=True)
class Quant:
    """One model of a repository: its name for --quant, and its files, the first shard first."""

    name: str
    files: Sequence[RemoteFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def quants_of(files: Sequence[RemoteFile]) -> list[Quant]:
    """The models among `files`, the smallest first. Names are unique. Raises UserError for a split that lacks
    shards.
    """
    groups: dict[tuple[str, int], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: str(file.path)):
        if file.path.name.lower().startswith(_NO_MODEL):
            continue
        stem = str(file.path).removesuffix(".gguf")
        shard = _SHARD.fullmatch(stem)
        key = (shard["stem"], int(shard["count"])) if shard else (stem, 1)
        groups.setdefault(key, []).append(file)
    for (stem, count), shards in groups.items():
        if len(shards) != count:
            raise UserError(f"The repository holds {len(shards)} of the {count} shards of {stem}.")
    short = [found[1] if (found := _QUANT.search(stem)) else stem for stem, _ in groups]
    quants = [
        Quant(name if short.count(name) == 1 else stem, shards)
        for name, (stem, _), shards in zip(short, groups, groups.values(), strict=True)
    ]
    return sorted(quants, key=lambda quant: quant.size)


def choose(quants: Sequence[Quant], wanted: str | None, repo: str) -> Quant:
    """The quant that is wanted, or the only one. Raises UserError that lists what there is."""
    if not quants:
        raise UserError(f"{repo} holds no GGUF: look for a repository whose name ends with -GGUF.")
    if wanted is None:
        fitting = list(quants)
    else:
        fitting = [quant for quant in quants if quant.name.lower() == wanted.lower()]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{quant.name} ({size_text(quant.size)})" for quant in quants)
    asked = f"no {wanted}" if wanted is not None and not fitting else f"{len(quants)} quants"
    raise UserError(f"{repo} has {asked}: choose one with --quant: {listed}.")


def size_text(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
