"""From settings to a model that answers: first everything is checked, then the model is loaded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path

from ktd.budget import budget_of
from ktd.chat import ChatService, ServedModel
from ktd.engine import Engine, EngineConfig
from ktd.errors import SettingsError
from ktd.gguf import GgufFile, model_name
from ktd.gpu import Gpu, gpus_for
from ktd.model import ModelConfig, load_model
from ktd.model.sidecar import sidecar_path
from ktd.placement_rules import read_rules
from ktd.plan import GIB, PAGE_SIZE, Plan, make_plan
from ktd.server.host import Loaded
from ktd.settings import Settings
from ktd.text import TextModel
from ktd_kernels import Cpu

log = logging.getLogger(__name__)

EMBEDDED = "ktd-demo-Q8_0.gguf"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that was checked and not loaded. Holds the mapped file, which is guarded."""

    settings: Settings
    gguf: GgufFile
    text: TextModel
    cpu: Cpu
    plan: Plan
    served: ServedModel


def prepare(settings: Settings) -> Prepared:
    """Checks what can be checked without loading: the file's headers, tokenizer, memory, instruction set,
    rules.

    Raises GgufError or SettingsError with what is wrong and what to do.
    """
    try:
        cpu = Cpu(threads=settings.cpu_infer, isa=settings.isa)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    gguf = GgufFile.open(settings.gguf_path or embedded_model())
    gguf.guard()
    gpus = gpus_for(settings.vram, gguf.nbytes)
    plan = plan_for(settings, gguf, cpu, gpus)
    if gpus and not plan.placement.devices:
        names = ", ".join(gpu.name for gpu in gpus)
        log.warning("%s: not used, too small for this model beside --context", names)
    text = TextModel.from_gguf(gguf, settings.model_path)
    return Prepared(settings, gguf, text, cpu, plan, _served(settings, gguf, plan, text))


def plan_for(settings: Settings, gguf: GgufFile, cpu: Cpu, gpus: Sequence[Gpu]) -> Plan:
    """What `settings` make of a file on this machine. Raises GgufError or SettingsError."""
    config, rules = ModelConfig.from_gguf(gguf), settings.optimize_config_path
    return make_plan(
        gguf,
        config,
        budget=budget_of(settings.ram, settings.vram, gpus),
        packer=cpu if settings.repack else None,
        context=settings.context,
        sequences=settings.max_sequences,
        chunk_tokens=settings.chunk_tokens,
        cache_type=settings.cache_type,
        pins=read_rules(rules, gguf, config, [gpu.device for gpu in gpus]) if rules else None,
    )


def load(prepared: Prepared, progress: Callable[[float], None]) -> Loaded:
    """Loads the model and starts its engine; minutes for a large file. `progress` is told fractions from 0
    to 1.

    Raises GgufError for what only the tensors themselves show, FileLost.
    """
    settings, plan = prepared.settings, prepared.plan
    check, folder = prepared.gguf.check, settings.repack_cache

    def tell(fraction: float) -> None:
        check()
        progress(fraction)

    model = load_model(
        prepared.gguf,
        prepared.cpu,
        context=plan.context,
        progress=tell,
        repack=plan.repacked > 0,
        repack_cache=sidecar_path(folder, prepared.gguf) if folder else None,
        placement=plan.placement,
    )
    engine = Engine(
        model,
        EngineConfig(
            context=plan.context,
            max_sequences=settings.max_sequences,
            page_size=PAGE_SIZE,
            pages=plan.pages,
            chunk_tokens=plan.chunk_tokens,
            queue_limit=settings.queue_limit,
            cache_type=settings.cache_type,
        ),
        check,
    )
    check()
    engine.start()
    most = settings.max_sequences + settings.queue_limit
    chat = ChatService(engine, prepared.text, prepared.served, most_prepared=most)
    return Loaded(chat, engine, prepared.cpu.isa, prepared.cpu.threads)


def embedded_model() -> Path:
    """The model that comes with ktd. Raises SettingsError where the package was built without it."""
    path = Path(str(resources.files("ktd") / "data" / EMBEDDED))
    if not path.is_file():
        raise SettingsError("This build of ktd has no embedded model: name a file with --gguf-path.")
    return path


def describe(prepared: Prepared) -> str:
    """One line about the model and what it gets of this machine."""
    served, plan, settings = prepared.served, prepared.plan, prepared.settings
    weights = plan.routed + plan.dense + plan.vram.experts + plan.vram.dense
    disk = f", {plan.from_disk / GIB:.1f} GiB read from disk as needed" if plan.from_disk else ""
    placed = zip(plan.placement.devices, plan.gpus, strict=True)
    gpus = "".join(f", {gpu.total / GIB:.1f} GiB on {device}" for device, gpu in placed)
    return (
        f"{served.name}: {served.parameters / 1e9:.3g} B parameters, mostly {served.quantisation}; "
        f"weights {weights / GIB:.2f} GiB{disk}{gpus}, cache {plan.cache / GIB:.2f} GiB for "
        f"{plan.cache_tokens} tokens; context {plan.context}, {settings.max_sequences} sequences; "
        f"{prepared.cpu.isa} on {prepared.cpu.threads} threads"
    )


def _served(settings: Settings, gguf: GgufFile, plan: Plan, text: TextModel) -> ServedModel:
    path = gguf.paths[0]
    bytes_of = Counter[str]()
    for tensor in gguf.tensors.values():
        bytes_of[tensor.ggml_type.name] += tensor.nbytes
    return ServedModel(
        name=settings.model_name or model_name(path),
        file_name=path.name,
        architecture=gguf.require("general.architecture", str),
        parameters=sum(prod(tensor.shape) for tensor in gguf.tensors.values()),
        context=plan.context,
        quantisation=bytes_of.most_common(1)[0][0],
        created=int(path.stat().st_mtime),
        size=gguf.nbytes,
        size_vram=plan.vram.dense + plan.vram.experts,
        thinks=text.thinks,
        takes_tools=text.takes_tools,
    )


class Progress:
    """Tells a log how far a load is, every ten percent and at most once in two seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told = 0
        self._at = time.monotonic()

    def __call__(self, fraction: float) -> None:
        tenth = int(fraction * 10)
        if tenth > self._told and time.monotonic() - self._at > 2:
            self._told, self._at = tenth, time.monotonic()
            log.info("%s: %.0f %%", self._what, fraction * 100)
