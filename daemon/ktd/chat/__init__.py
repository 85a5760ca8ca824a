"""From a client's messages to events of thought and answer: checking, prompting, splitting."""

from ktd.chat.served import ServedModel
from ktd.chat.service import ChatService

__all__ = ["ChatService", "ServedModel"]
