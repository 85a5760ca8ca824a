"""The engine: requests in, tokens out, on one thread."""

from ktd.engine.config import EngineConfig
from ktd.engine.engine import Engine
from ktd.engine.live import Listener

__all__ = ["Engine", "EngineConfig", "Listener"]
