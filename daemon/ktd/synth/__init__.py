"""Synthetic GGUF files: the names, shapes, types and metadata of a real model around random weights."""

from ktd.synth.shapes import SHAPES, Shape
from ktd.synth.writer import SynthPlan, plan_file, write_file

__all__ = ["SHAPES", "Shape", "SynthPlan", "plan_file", "write_file"]
