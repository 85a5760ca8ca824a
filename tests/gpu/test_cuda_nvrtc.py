"""The CUDA sources compile for every architecture without a GPU; cubins are cached; errors are readable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kit_compile import keep_cubins

from ktd_kernels.cuda import kernels, nvrtc

try:
    nvrtc.library()
except nvrtc.NvrtcError as error:
    pytest.skip(str(error), allow_module_level=True)

TYPES = {f.name: f.ggml_type for f in kernels.FORMATS.values()}
#: Every type once, spread over the architectures: all for all would take half an hour.
SPREAD = [(name, nvrtc.ARCHITECTURES[i % len(nvrtc.ARCHITECTURES)]) for i, name in enumerate(sorted(TYPES))]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_cubins(monkeypatch, tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ktd" / "cubin"


def known(arch: int) -> int:
    if arch not in nvrtc.supported():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    return arch


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("name", "arch"), SPREAD)
def test_products_compile(name: str, arch: int) -> None:
    assert kernels.product_cubin(TYPES[name], known(arch)).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_activations_compile(arch: int) -> None:
    assert kernels.activation_cubin(known(arch)).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("name", "arch"), [("IQ1_S", 80), ("Q4_K", 90), ("Q8_0", 120)])
def test_grouped_products_compile(name: str, arch: int) -> None:
    assert kernels.grouped_cubin(TYPES[name], known(arch)).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("cols", "terms", "arch"), [(7168, 1, 75), (2048, 8, 90)])
def test_experts_compile(cols: int, terms: int, arch: int) -> None:
    assert kernels.experts_cubin(TYPES["IQ1_S"], cols, terms, 28, known(arch)).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("arch", [75, 90, 120])
@pytest.mark.parametrize("cubin", [kernels.mailbox_cubin, kernels.fetch_cubin])
def test_the_ways_to_the_host_compile(cubin: Callable[[int], bytes], arch: int) -> None:
    assert cubin(known(arch)).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_attention_compiles() -> None:
    known(90)
    assert kernels.mla_cubin(64).startswith(b"\x7fELF")


def test_a_cubin_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" __global__ void nothing() {}'
    first = nvrtc.compile_cubin("nothing", source, {}, 80)
    assert [path.read_bytes() for path in cache.iterdir()] == [first]
    monkeypatch.setattr(nvrtc, "_compile", None)  # not called again
    assert nvrtc.compile_cubin("nothing", source, {}, 80) == first
    with pytest.raises(TypeError):  # other source, architecture, header or definition: another cubin
        nvrtc.compile_cubin("nothing", source, {}, 86)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert nvrtc.compile_cubin("nothing", 'extern "C" __global__ void nothing() {}', {}, 80)


@pytest.mark.usefixtures("cache")
def test_an_error_holds_the_log() -> None:
    with pytest.raises(nvrtc.NvrtcError, match=r"(?s)broken does not compile for sm_80.*unknown_name"):
        nvrtc.compile_cubin("broken", "__global__ void f() { unknown_name; }", {}, 80)


@pytest.mark.usefixtures("cache")
def test_an_architecture_that_nvrtc_does_not_know() -> None:
    with pytest.raises(nvrtc.NvrtcError, match="cannot compile for sm_20"):
        nvrtc.compile_cubin("nothing", "", {}, 20)
