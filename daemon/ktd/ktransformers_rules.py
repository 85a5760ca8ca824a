"""KTransformers' placement rules (`--optimize_config_path`): a YAML list of match/replace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from ktd.errors import SettingsError

_DEVICES = ("generate_device", "prefill_device")


def first_not_honoured(path: Path) -> str | None:
    """Where the first rule stands that asks for another device than the CPU; None where there is none.

    Raises SettingsError when the file cannot be read or is no list of rules, naming the line.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The rules {path} cannot be read: {error}.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(f"The rules {path} are not YAML: line {line}, {error.problem}.") from error
    if not isinstance(root, yaml.SequenceNode):
        raise SettingsError(f"The rules {path} are no list of match and replace.")
    for rule in root.value:
        line = rule.start_mark.line + 1
        keys = {key.value for key, _ in rule.value} if isinstance(rule, yaml.MappingNode) else set()
        if not {"match", "replace"} <= keys:
            raise SettingsError(f"Line {line} of the rules {path} begins no rule of match and replace.")
        for key, value in _pairs(rule):
            if key.value in _DEVICES and value.value != "cpu":
                return f"{path}, line {key.start_mark.line + 1}, {key.value}: {value.value}"
    return None


def _pairs(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, yaml.ScalarNode]]:
    """Every key with a plain value below `node`."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
                yield key, value
            else:
                yield from _pairs(value)
