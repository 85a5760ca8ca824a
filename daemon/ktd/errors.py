"""Every error a person can meet.

KtdError
├── UserError               the user's input is wrong; the message says what and what to do
│   ├── SettingsError       a flag, variable or ktd.toml key
│   ├── GgufError           a file that is damaged, foreign or unsupported
│   └── RequestError        a chat request
│       ├── ContextExceeded the prompt is longer than the context
│       └── UnknownModel    a model name this daemon does not serve
├── Busy                    the queue is full: try again
├── Unavailable             loading, draining or stopped
├── Stalled                 the client does not read its answer
├── Unreachable             another machine does not answer, or not as it should
└── EngineFailure           a fault of ours; the daemon's log has the trace
    ├── DeviceLost          a GPU gives no more results until the process starts anew
    └── FileLost            the model's file was cut short or overwritten while in use
"""

from __future__ import annotations

__all__ = [
    "Busy",
    "ContextExceeded",
    "DeviceLost",
    "EngineFailure",
    "FileLost",
    "GgufError",
    "KtdError",
    "RequestError",
    "SettingsError",
    "Stalled",
    "Unavailable",
    "UnknownModel",
    "Unreachable",
    "UserError",
]


class KtdError(Exception):
    """Base of all errors that ktd raises on purpose. `str()` is one sentence for a person."""


class UserError(KtdError):
    """The user's input is wrong. Commands print it and exit with status 2; it is never retried."""


class SettingsError(UserError):
    """A flag, an environment variable or a key of ktd.toml is unknown or out of range."""


class GgufError(UserError):
    """A GGUF file is missing, damaged, foreign or holds something unsupported."""


class RequestError(UserError):
    """A chat request is wrong."""


class ContextExceeded(RequestError):
    """The prompt does not fit in the context."""


class UnknownModel(RequestError):
    """The request names a model that this daemon does not serve."""


class Busy(KtdError):
    """The queue is full."""


class Unavailable(KtdError):
    """The daemon is loading, draining or stopped."""


class Stalled(KtdError):
    """The client does not read its answer."""


class Unreachable(KtdError):
    """Another machine, such as a hub of models, does not answer, or not as it should."""


class EngineFailure(KtdError):
    """The engine failed while it worked on the request."""


class DeviceLost(EngineFailure):
    """A GPU fails at everything from now on: only a new process can use it."""


class FileLost(EngineFailure):
    """The model's file was cut short, overwritten or cannot be read: only a new process can map it again."""
