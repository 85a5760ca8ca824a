"""Which instruction set runs: best first, forced by name, refused when the CPU lacks it; kept apart."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktd_kernels import Cpu, amx_refusal, cpu_features, isa_list

X86 = ["amx", "avx512vbmi", "avx512", "avx512bw", "avx2", "scalar"]  # best first
KNOWN = X86 if platform.machine() == "x86_64" else ["i8mm", "neon", "scalar"]
on_x86 = pytest.mark.skipif(KNOWN is not X86, reason="about x86; test_arm.py looks at ARM")


def test_list_is_best_first_and_ends_in_scalar() -> None:
    names = isa_list()
    assert names == [name for name in KNOWN if name in names]
    assert names[-1] == "scalar"


def test_list_agrees_with_the_features() -> None:
    features, names = set(cpu_features()), set(isa_list())
    assert ("avx2" in names) == ({"avx2", "fma", "f16c", "bmi2"} <= features)
    assert ("avx512" in names) == ("avx2" in names and {"avx512", "avx512_vnni"} <= features)
    assert ("avx512vbmi" in names) == ("avx512" in names and "avx512_vbmi" in features)
    amx = "avx512vbmi" in names and {"avx512_bf16", "amx_int8", "amx_bf16"} <= features
    assert ("amx" in names) == (amx and not amx_refusal())


def test_features_agree_with_the_kernel() -> None:
    """What the system reports in /proc/cpuinfo is CPUID as the system has enabled it."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None or _emulated():
        pytest.skip("an emulated CPU does not show in /proc/cpuinfo")
    present = set(flags[1].split())
    for feature, flag in [
        ("avx2", "avx2"),
        ("fma", "fma"),
        ("avx512_vnni", "avx512_vnni"),
        ("amx_int8", "amx_int8"),
    ]:
        assert (feature in cpu_features()) == (flag in present), feature


def _emulated() -> bool:
    """User-mode qemu answers for /proc/self, but not for /proc/thread-self."""
    return "qemu" in Path("/proc/thread-self/exe").resolve().name


def test_default_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTD_ISA", raising=False)
    assert Cpu(1).isa == isa_list()[0]


def test_every_supported_one_can_be_forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cpu(1, isa).isa == isa
    monkeypatch.setenv("KTD_ISA", isa)
    assert Cpu(1).isa == isa


@pytest.mark.parametrize("floats", [False, True])
def test_registers_are_multiplied_as_often_as_asked(isa: str, floats: bool) -> None:
    """A loop that the compiler dropped would take no time: no thread does 100 TOPS."""
    cpu = Cpu(2, isa)
    once = cpu.multiply_registers(1, floats)
    assert (once == 0) == (isa == "scalar")
    start = time.perf_counter()
    assert cpu.multiply_registers(10_000, floats) == 10_000 * once
    assert time.perf_counter() - start >= 10_000 * once / cpu.threads / 1e14
    with pytest.raises(ValueError, match="loops is 0"):
        cpu.multiply_registers(0)


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTD_ISA", "nonsense")
    assert Cpu(1, "scalar").isa == "scalar"


def test_unknown_names_are_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = re.escape(", ".join(isa_list()))
    with pytest.raises(ValueError, match=f"Unknown instruction set 'sse9'; choose one of: {choices}"):
        Cpu(1, "sse9")
    monkeypatch.setenv("KTD_ISA", "sse9")
    with pytest.raises(ValueError, match="Unknown instruction set 'sse9'"):
        Cpu(1)


@pytest.mark.parametrize("name", KNOWN)
def test_unsupported_names_are_refused(name: str) -> None:
    if name in isa_list():
        pytest.skip(f"this CPU has {name}; the runs under qemu cover the refusal")
    with pytest.raises(ValueError, match=f"does not support the instruction set '{name}'; choose one of:"):
        Cpu(1, name)


@on_x86
@pytest.mark.slow
@pytest.mark.parametrize(("model", "best"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_smaller_cpus_take_what_they_have(model: str, best: str) -> None:
    qemu = shutil.which("qemu-x86_64-static")
    if qemu is None or _emulated():
        pytest.skip("needs qemu-x86_64-static (apt install qemu-user-static), not itself emulated")
    code = "import ktd_kernels as k; print(k.Cpu(1).isa); k.Cpu(1, 'avx512')"
    done = subprocess.run(
        [qemu, "-cpu", model, sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [best]
    assert "does not support the instruction set 'avx512'" in done.stderr


@on_x86
def test_wide_registers_stay_inside_their_instruction_set() -> None:
    """A shared inline function compiled for AVX-512 would crash an older CPU, depending on link order."""
    objects = _objects()
    wide = re.compile(r"%[yz]mm|%k[0-7]|\bv[a-z0-9]+ .*%xmm")
    seen = set()
    for path in objects:
        isa = re.search(r"isa_(\w+)\.dir", str(path))
        text = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
        ).stdout
        name = isa[1] if isa else "baseline"
        if name in ("baseline", "scalar"):
            assert not wide.search(text), f"{path.name} holds wide instructions"
        elif name == "avx2":
            assert "%ymm" in text
            assert not re.search(r"%zmm|%k[0-7]", text), f"{path.name} holds AVX-512 instructions"
        else:
            assert "%zmm" in text
            vbmi = name in ("avx512vbmi", "amx")
            assert ("vpdpbusd" in text) == (name != "avx512bw"), f"VNNI in the wrong table: {path.name}"
            assert ("vpermb" in text) == vbmi, f"VBMI in the wrong table: {path.name}"
            assert ("tdpbssd" in text) == (name == "amx"), f"AMX in the wrong table: {path.name}"
        seen.add(name)
    assert seen == {"baseline", *KNOWN}


@on_x86
@pytest.mark.parametrize("name", X86[:-1])
@pytest.mark.parametrize("loop", ["peak_integers", "peak_floats"])
def test_peaks_are_those_of_registers(name: str, loop: str) -> None:
    """Sums that the compiler keeps in memory are a third as fast: a wall that products would run through."""
    (path,) = [p for p in _objects() if f"isa_{name}.dir" in str(p)]
    symbol = f"_ZN3ktd{len(name)}{name}12_GLOBAL__N_1{len(loop)}{loop}El"
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={symbol}", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "__asan" in code:
        pytest.skip("a build with sanitizers is not optimised")
    assert re.search(r"vpdpbusd|vpmaddubsw|tdpbusd|vfmadd", code)
    assert not re.search(r"mm\d+,.*\(%r[sb]p|\(%r[sb]p.*mm\d+", code)


@on_x86
@pytest.mark.parametrize("name", X86[:-1])
def test_wide_objects_export_nothing_but_their_table(name: str) -> None:
    """Weak (shared inline) symbols in a wide object could be picked by the linker for everybody."""
    (path,) = [p for p in _objects() if f"isa_{name}.dir" in str(p)]
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    shared = [line for line in symbols.stdout.splitlines() if line.split()[1] in "TWVBDRu"]
    assert [line.split(maxsplit=2)[2] for line in shared] == [f"ktd::{name}::table()"]


def _objects() -> list[Path]:
    if _emulated():
        pytest.skip("the objects are the same under qemu: looked at once")
    if shutil.which("objdump") is None or shutil.which("nm") is None:
        pytest.skip("needs objdump and nm (apt install binutils)")
    build = Path(__file__).parents[2] / "build"
    objects = [
        p
        for p in build.glob("*/kernels/csrc/CMakeFiles/**/*.o")
        if not any("nanobind" in part for part in p.relative_to(build).parts)
    ]
    if not objects:
        pytest.skip("the module was not built in this checkout (make up), so there are no objects to look at")
    return objects
