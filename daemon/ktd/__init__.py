"""ktd: DeepSeek-R1 and its kin from one GGUF on one machine."""

__version__ = "0.1.0"
