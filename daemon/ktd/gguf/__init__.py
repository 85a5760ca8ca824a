"""Models in GGUF files, read without copying."""

from ktd.gguf.cursor import StringArray
from ktd.gguf.formats import WEIGHT_TYPES, GgmlType
from ktd.gguf.locate import model_name
from ktd.gguf.reader import GgufFile
from ktd.gguf.shard import TensorInfo

__all__ = ["WEIGHT_TYPES", "GgmlType", "GgufFile", "StringArray", "TensorInfo", "model_name"]
