"""Placement rules (`--optimize-config-path`): a YAML list in which a regex names a device.

    - match: {name: 'blk\\.(3|4|5)\\.ffn_.*_exps'}
      replace: {device: 'cuda:0'}

KTransformers' own files serve as they are: `name` is searched in a tensor's name in the GGUF and in that of
its module at Hugging Face (model.layers.3.mlp.experts), `class` asks for a kind of module, and
`kwargs.generate_device` says what `device` says here. Of the rules that match a tensor or its module the
first one counts, and these before rules for a module above. Ops and `prefill_device` say how KTransformers
computes, which is decided here by measuring. Of several GPUs `cuda:1` names one, which then has all weights
of the layer but routed experts that are kept in memory; `cuda` is any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import yaml

from ktd.errors import SettingsError
from ktd.files import read_text
from ktd.gguf import GgufFile
from ktd.model.config import ModelConfig
from ktd.model.hf_convert import hf_module
from ktd.model.placement import ROUTED
from ktd.split import Pins

_BLOCK = re.compile(r"blk\.(\d+)\.")
_EMBEDDING = "token_embd.weight"
_CUDA = re.compile(r"cuda(:\d+)?")
# What the names of classes end in, by the last part of a module's name (of several the longest).
_KINDS = {
    "model": "Model",
    "embed_tokens": "Embedding",
    "self_attn": "Attention",
    "rotary_emb": "RotaryEmbedding",
    "gate": "MoEGate",
    "shared_experts": "MLP",
    "experts": "ModuleList",
    "layers": "ModuleList",
    "norm": "RMSNorm",
}
_ALL_KINDS = {*_KINDS.values(), "Linear", "MoE", "DecoderLayer"}
_KEYS = {
    "rule": {"match", "replace", "recursive"},
    "match": {"name", "class"},
    "replace": {"device", "class", "kwargs"},
}


@dataclass(frozen=True, slots=True)
class _Named:
    """A tensor (no `kind`) or a module."""

    name: str
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    """`where` it stands, what it asks of names and of kinds (None: nothing), the `device` of weights if it
    gives one, and each device that it names anywhere."""

    where: str
    name: re.Pattern[str] | None
    kind: str | None
    device: str | None
    devices: tuple[str, ...]

    def matches(self, named: _Named) -> bool:
        return (self.kind is None or self.kind == named.kind) and (
            self.name is None or self.name.search(named.name) is not None
        )


def read_rules(path: Path, gguf: GgufFile, config: ModelConfig, gpus: Sequence[str]) -> Pins:
    """What the rules at `path` ask for on `gpus`, the names of those in use.

    Raises SettingsError for a file that is no list of rules, a rule that matches nothing, a device that is
    not there, and weights that cannot be where a rule wants them.
    """
    rules = _read(path)
    for rule in rules:
        _check_devices(rule, gpus)
    levels = {name: _levels(name, config) for name in gguf.tensors if _is_loaded(name, config)}
    everything = {named for tensor in levels.values() for level in tensor for named in level}
    for rule in rules:
        if not any(map(rule.matches, everything)):
            raise SettingsError(
                f"{rule.where} matches nothing in {gguf.name}: names are such as blk.3.ffn_up_exps.weight or"
                " model.layers.3.mlp.experts."
            )
    layers: dict[int, dict[str, _Rule | None]] = {}
    homes = _Homes(gpus, config.layers)
    for tensor, names in levels.items():
        decisive = _decisive(rules, names)
        if routed := ROUTED.match(tensor):
            layers.setdefault(int(routed[1]), {})[tensor] = decisive
        elif decisive is not None and gpus:
            _check_dense(decisive, tensor)
        if decisive is not None:
            homes.add(tensor, decisive)
    pinned = {layer: _pinned(layer, parts) for layer, parts in layers.items()}
    experts = {layer: on_gpu for layer, on_gpu in pinned.items() if on_gpu is not None}
    return Pins(experts, homes.in_order())


class _Homes:
    """The GPUs that rules give to layers, with the first tensor and rule that does."""

    def __init__(self, gpus: Sequence[str], layers: int) -> None:
        self._gpus, self._last = gpus, layers - 1
        self._found: dict[int, tuple[str, str, _Rule]] = {}

    def add(self, tensor: str, rule: _Rule) -> None:
        if rule.device is None or rule.device not in self._gpus:
            return
        block = _BLOCK.match(tensor)
        layer = int(block[1]) if block else self._last  # the head has none of its own
        device, other, _ = self._found.setdefault(layer, (rule.device, tensor, rule))
        if device != rule.device:
            raise SettingsError(
                f"{rule.where} puts {tensor} on {rule.device}, but {other} is to be on {device}: the weights"
                " of a layer lie on one GPU, and the output's with those of the last layer."
            )

    def in_order(self) -> dict[int, str]:
        """The GPU of each layer that has one. Raises SettingsError where the layers go back to a GPU."""
        latest = 0
        for layer in sorted(self._found):
            device, tensor, rule = self._found[layer]
            if self._gpus.index(device) < latest:
                raise SettingsError(
                    f"{rule.where} puts {tensor} on {device}, behind layers on {self._gpus[latest]}: GPUs"
                    " have layers in a row, in the order of their numbers."
                )
            latest = self._gpus.index(device)
        return {layer: device for layer, (device, _, _) in self._found.items()}


def _is_loaded(tensor: str, config: ModelConfig) -> bool:
    """Whether it is no draft head's."""
    block = _BLOCK.match(tensor)
    return block is None or int(block[1]) < config.layers


def _levels(tensor: str, config: ModelConfig) -> list[list[_Named]]:
    """The tensor and its module, then the modules above, nearest first."""
    module = hf_module(tensor)
    if module is None:
        return [[_Named(tensor)]]
    path = list(accumulate(module.split("."), lambda above, part: f"{above}.{part}"))
    modules = [[_Named(name, _kind(name, config))] for name in reversed(path)]
    modules[0].append(_Named(tensor))
    if "self_attn" in module:  # a module without weights, which files name
        modules[-1].append(_Named(f"{path[3]}.rotary_emb", "RotaryEmbedding"))
    return modules


def _kind(module: str, config: ModelConfig) -> str:
    *above, last = module.split(".")
    if last.isdecimal():
        return "DecoderLayer"
    if last == "mlp":
        return "MoE" if config.moe and int(above[-1]) >= config.dense_layers else "MLP"
    return _KINDS.get("norm" if last.endswith("norm") else last, "Linear")


def _decisive(rules: Sequence[_Rule], levels: Sequence[Sequence[_Named]]) -> _Rule | None:
    for level in levels:
        first = next((rule for rule in rules if any(map(rule.matches, level))), None)
        if first is not None and first.device is not None:
            return first
    return None


def _check_devices(rule: _Rule, gpus: Sequence[str]) -> None:
    for device in rule.devices:
        if not gpus and _CUDA.fullmatch(device):
            raise SettingsError(
                f"{rule.where} asks for {device}, but no GPU is used: give ktd GPU memory with --vram, or"
                " leave the rules out."
            )
        if device not in ("cpu", "cuda", *gpus):
            raise SettingsError(
                f"{rule.where} names the device {device}, but ktd computes on {', '.join(['cpu', *gpus])}."
            )


def _check_dense(rule: _Rule, tensor: str) -> None:
    if tensor == _EMBEDDING and rule.device != "cpu":
        raise SettingsError(
            f"{rule.where} puts {tensor} on the GPU: it stays in memory, a token reads but one row of it."
        )
    if tensor != _EMBEDDING and rule.device == "cpu":
        raise SettingsError(
            f"{rule.where} puts {tensor} into memory: with a GPU, only routed experts and the token embedding"
            " can lie there. Name those alone, or use no GPU."
        )


def _pinned(layer: int, parts: Mapping[str, _Rule | None]) -> bool | None:
    """Whether the experts of a layer are to be on the GPU; None where no rule says."""
    given = {tensor: rule for tensor, rule in parts.items() if rule is not None}
    if not given:
        return None
    tensor, rule = next(iter(given.items()))
    if len({None if part is None else part.device == "cpu" for part in parts.values()}) > 1:
        raise SettingsError(
            f"{rule.where} parts {tensor} from the other routed experts of layer {layer}: gate, up and down"
            " of a layer lie on one device."
        )
    return rule.device != "cpu"


def _read(path: Path) -> list[_Rule]:
    try:
        root = yaml.compose(read_text(path), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The rules {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        line, problem = (mark.line + 1, error.problem) if mark else (1, error)  # type: ignore[attr-defined]
        raise SettingsError(f"The rules {path} are not YAML: line {line}, {problem}.") from error
    if not isinstance(root, yaml.SequenceNode):
        raise SettingsError(f"The rules {path} are no list of match and replace.")
    return [_rule(node, path) for node in root.value]


def _rule(node: yaml.Node, path: Path) -> _Rule:
    where = _where(node, path)
    parts = _mapping(node, "rule", path)
    if not {"match", "replace"} <= set(parts):
        raise SettingsError(f"{where} begins no rule of match and replace.")
    match = _mapping(parts["match"], "match", path)
    _mapping(parts["replace"], "replace", path)
    if not match:
        raise SettingsError(f"{where} begins a rule that matches neither a name nor a class.")
    devices = list(_devices(parts["replace"]))
    given = {key: device for key, device in devices if key in ("device", "generate_device")}
    return _Rule(
        where,
        _pattern(match["name"], path) if "name" in match else None,
        _class_kind(match["class"], path) if "class" in match else None,
        next(iter(given.values()), None),
        tuple(device for _, device in devices),
    )


def _where(node: yaml.Node, path: Path) -> str:
    return f"Line {node.start_mark.line + 1} of the rules {path}"


def _mapping(node: yaml.Node, what: str, path: Path) -> dict[str, yaml.Node]:
    """The entries of a mapping whose keys are those of a `what`."""
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{_where(node, path)} begins no {what}.")
    for key, _ in node.value:
        if key.value not in _KEYS[what]:
            known = ", ".join(sorted(_KEYS[what]))
            raise SettingsError(f"{_where(key, path)}: a {what} has {known}, but no {key.value}.")
    return {key.value: value for key, value in node.value}


def _text(node: yaml.Node, path: Path) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise SettingsError(f"{_where(node, path)}: a text belongs here.")
    return str(node.value)


def _pattern(node: yaml.Node, path: Path) -> re.Pattern[str]:
    try:
        return re.compile(_text(node, path))
    except re.error as error:
        raise SettingsError(f"{_where(node, path)}: no regular expression, {error}.") from error


def _class_kind(node: yaml.Node, path: Path) -> str:
    name = _text(node, path)
    ends = [kind for kind in _ALL_KINDS if name.endswith(kind)]
    if not ends:
        raise SettingsError(f"{_where(node, path)}: no module of DeepSeek's models is a {name}.")
    return max(ends, key=len)


def _devices(node: yaml.Node) -> Iterator[tuple[str, str]]:
    """Every device that a rule's `replace` names, with its key; those of a `transfer_map` are by layer."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if isinstance(value, yaml.ScalarNode) and str(key.value).endswith("device"):
            yield key.value, value.value
        elif isinstance(value, yaml.MappingNode) and key.value == "transfer_map":
            yield from ((key.value, device.value) for _, device in value.value)
        else:
            yield from _devices(value)
