from __future__ import annotations

import pytest
from kit_text import ModelOf, maker


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """A function from a template's name (or its source) to a text model."""
    return maker(tmp_path_factory.mktemp("text"))
