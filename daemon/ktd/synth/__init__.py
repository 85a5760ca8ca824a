"""Synthetic GGUF files: the names, shapes, types and metadata of a real model around random weights."""

from ktd.synth.shapes import SHAPES, Shape
from ktd.synth.writer import SynthPlan, file_in_memory, plan_file, write_file

__all__ = ["SHAPES", "Shape", "SynthPlan", "file_in_memory", "plan_file", "write_file"]
