"""The one model a daemon serves, and the names it answers to."""

from __future__ import annotations

from dataclasses import dataclass

from ktd.errors import UnknownModel

# What the tutorials' clients are told to write as the model, whatever model is loaded.
TUTORIAL_NAME = "ktransformers"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`context` in tokens is what this daemon allows; `created` in seconds since 1970.

    `size` is the weights' in bytes, `size_vram` of those that lie on a GPU.
    """

    name: str
    file_name: str
    architecture: str
    parameters: int
    context: int
    quantisation: str
    created: int
    size: int
    size_vram: int
    thinks: bool
    takes_tools: bool

    def check_name(self, asked: str) -> None:
        """Accepts the served name, the file's name with or without `.gguf`, the tutorials' name, and none at
        all.

        Raises UnknownModel for any other: an answer by another model than the one asked for would look right.
        """
        known = {self.name, self.file_name, self.file_name.removesuffix(".gguf"), TUTORIAL_NAME, ""}
        if asked not in known:
            raise UnknownModel(
                f'The model "{asked}" is not served here: ask for "{self.name}", or leave the model out.'
            )
