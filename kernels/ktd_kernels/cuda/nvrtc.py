"""CUDA C++ to a cubin with NVRTC, the compiler library that torch ships; cubins are cached on disk.

Needs no GPU and no CUDA toolkit. The library is looked for in the `nvidia` packages beside torch, then where
the system's loader finds it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

#: Architectures that the sources support, as compute capability times ten.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

_OPTIONS = ("--std=c++17", "--fmad=false")


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refused a source; the message holds the compiler's log."""


def _candidates() -> list[str]:
    """File names of libnvrtc to try: that of torch's CUDA first, as the driver may take no newer one."""
    own = int((torch.version.cuda or "0").partition(".")[0])
    found: list[tuple[bool, int, str]] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for path in Path(root).glob("*/lib/libnvrtc.so.*"):
            version = re.search(r"\.so\.(\d+)", path.name)
            if version and "alt" not in path.name:
                found.append((int(version[1]) == own, int(version[1]), str(path)))
    names = [path for _, _, path in sorted(found, reverse=True)]
    return [*names, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


@functools.cache
def library() -> ctypes.CDLL:
    """libnvrtc; raises NvrtcError where there is none."""
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NvrtcError(
        "The CUDA run-time compiler (libnvrtc) is missing; it comes with the CUDA build of torch, "
        "or with `pip install nvidia-cuda-nvrtc`."
    )


@functools.cache
def version() -> tuple[int, int]:
    """(major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def supported() -> frozenset[int]:
    """Architectures that this NVRTC can compile for."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    archs = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
    return frozenset(archs)


def compile_cubin(
    name: str, source: str, headers: Mapping[str, str], arch: int, defines: Sequence[str] = ()
) -> bytes:
    """The cubin of `source` for sm_`arch`, from the cache if it was compiled before.

    headers: include name → text; defines: NAME or NAME=VALUE. Raises NvrtcError with the compiler's log.
    """
    path = _cache_folder() / f"{name}-{_key(source, headers, arch, defines)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin = _compile(name, source, headers, arch, defines)
    _write_atomically(path, cubin)
    return cubin


def _key(source: str, headers: Mapping[str, str], arch: int, defines: Sequence[str]) -> str:
    parts = [source, *(f"{k}\0{headers[k]}" for k in sorted(headers)), str(arch), *defines, *_OPTIONS]
    return hashlib.sha256("\0".join([*parts, str(version())]).encode()).hexdigest()[:32]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ktd" / "cubin"


def _write_atomically(path: Path, data: bytes) -> None:
    """Another process sees all of the file or none; a cache that cannot be written costs time only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:
        return


def _compile(name: str, source: str, headers: Mapping[str, str], arch: int, defines: Sequence[str]) -> bytes:
    if arch not in supported():
        raise NvrtcError(
            f"NVRTC {version()[0]}.{version()[1]} cannot compile for sm_{arch}; "
            "install a torch whose CUDA version supports this GPU."
        )
    nvrtc = library()
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), f"{name}.cu".encode(), len(headers), texts, names
        ),
        "nvrtcCreateProgram",
    )
    try:
        # Tensor-core products over shared memory (wgmma) are features of 9.0 alone.
        target = "90a" if arch == 90 else str(arch)
        options = [f"--gpu-architecture=sm_{target}", *_OPTIONS, *(f"-D{define}" for define in defines)]
        packed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), packed):
            raise NvrtcError(f"The kernel {name} does not compile for sm_{arch}:\n{_log(program)}")
        size = ctypes.c_size_t()
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _log(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library().nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def _check(result: int, call: str) -> None:
    if result:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NvrtcError(f"{call} failed: {library().nvrtcGetErrorString(result).decode()}.")
