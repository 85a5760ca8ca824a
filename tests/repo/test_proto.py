"""The committed gRPC code is what the proto file gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_code_is_current(tmp_path: Path) -> None:
    bin_dir = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}",
            f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}",
            f"--mypy_out={tmp_path}", f"--mypy_grpc_out={tmp_path}",
            f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
            "ktd_proto/v1/engine.proto",
        ],
        check=True,
    )  # fmt: skip
    made = sorted((tmp_path / "ktd_proto/v1").iterdir())
    assert len(made) == 4
    for path in made:
        committed = ROOT / "proto/ktd_proto/v1" / path.name
        assert path.read_text() == committed.read_text(), f"run `make proto`: {path.name} is out of date"
