"""Finds a backbone in a file: its tensors have names under a prefix, beside those of heads, optimizers, other models.

Training adds the prefixes: `teacher.backbone.` (Meta's), `state_dict.model.` (Lightning), `module._orig_mod.`
(DataParallel, torch.compile), `base_model.model.` (PEFT). Nothing but names and shapes is looked at here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dinov3_server.families.registry import VARIANTS
from dinov3_server.models.variant import FileTensor, KeyMap, Shape, Variant
from dinov3_server.models.weight_files import enumerate_some

# Names that wrappers of modules put in front of those of the wrapped module, at any depth.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
# The first part of a name that is not the backbone's: its features do not depend on it.
_HEAD = re.compile(r"(\w+_)?heads?(_\w+)?|fc|(\w+_)?classifiers?|(\w+_)?linear|(\w+_)?projector|(\w+_)?loss")
# A part of the name of weights that PEFT adds to a layer.
_ADAPTER = re.compile(r"(lora|hada|lokr|oft|boft|ia3|vera|adalora)_\w+|modules_to_save|original_module")


@dataclass(frozen=True)
class Backbone:
    """The tensors under one prefix of a file, as those of a variant in one format."""

    prefix: str  # with its final dot, or empty
    variant: Variant  # with the registers and key biases that the file has
    key_map: KeyMap
    keys: Mapping[str, str]  # the file's key by the key map's, for everything under the prefix that is no head
    problems: tuple[str, ...]  # differences from the key map; none if the backbone is whole

    def left_out(self, keys: Iterable[str]) -> str:
        """List the modules whose tensors are not taken, with their number of tensors."""
        taken, own = set(self.keys.values()), self.prefix.split(".")
        counted: Counter[str] = Counter()
        for key in keys:
            if key not in taken:
                parts = key.split(".")
                common = next((i for i, pair in enumerate(zip(parts, own, strict=False)) if pair[0] != pair[1]), 0)
                counted[".".join(parts[: common + 1])] += 1
        return enumerate_some(f"{module} ({count})" for module, count in sorted(counted.items()))


def find_backbones(variant: Variant, shapes: Mapping[str, Shape]) -> list[Backbone]:
    """Return every place in which the file may hold `variant`, those with the most of its tensors first.

    A few names that are the same, such as `norm.weight`, do not make a place.
    """
    key_maps = variant.key_maps()
    votes: Counter[tuple[str, int]] = Counter()
    for key in shapes:
        parts = key.split(".")
        for start, part in enumerate(parts):
            if part in _WRAPPERS:
                continue
            name = _unwrapped(parts[start:])
            prefix = "".join(f"{each}." for each in parts[:start])
            for position, key_map in enumerate(key_maps):
                if key_map.normalize_key(name) in key_map.entries:
                    votes[prefix, position] += 1
    least = min(len(key_map.entries) for key_map in key_maps) // 10
    best: dict[str, int] = {}
    for (prefix, position), count in sorted(votes.items(), key=lambda item: (-item[1], item[0][1])):
        if prefix not in best and count > least and 2 * count >= max(votes.values()):
            best[prefix] = position
    return [_backbone(prefix, variant, key_maps[position].name, shapes) for prefix, position in best.items()]


def preferred(backbones: Collection[Backbone]) -> list[Backbone]:
    """Return those of a file's whole backbones that are served: an average's, then a teacher's, then a student's."""
    first = min(map(_rank, backbones), default=0)
    return [each for each in backbones if _rank(each) == first]


def adapters(keys: Iterable[str]) -> list[str]:
    """List the names of weights that PEFT added, but for those of heads."""
    parts = {key: key.split(".") for key in keys}
    return [
        key
        for key, names in parts.items()
        if any(map(_ADAPTER.fullmatch, names)) and not any(map(_HEAD.fullmatch, names))
    ]


def looks_like(shapes: Mapping[str, Shape]) -> Variant | None:
    """Return a variant that the file holds whole, if there is one."""
    for variant in VARIANTS.values():
        if any(not each.problems for each in find_backbones(variant, shapes)):
            return variant
    return None


def _backbone(prefix: str, variant: Variant, layout: str, shapes: Mapping[str, Shape]) -> Backbone:
    names: dict[str, list[str]] = {}
    normalize = _key_map(variant, layout).normalize_key
    for key in shapes:
        if key.startswith(prefix):
            names.setdefault(normalize(_unwrapped(key.removeprefix(prefix).split("."))), []).append(key)
    if layout == "official":
        variant = variant.as_trained(names)
    key_map = _key_map(variant, layout)
    own = {name: keys for name, keys in names.items() if name in key_map.entries or not _is_head(name)}
    twice = [f"{name!r}" for name, keys in own.items() if len(keys) > 1]
    keys = {name: each[0] for name, each in own.items()}
    problems = _problems({name: shapes[key] for name, key in keys.items()}, key_map.entries)
    if twice:
        problems.append(f"{len(twice)} present under two spellings: {enumerate_some(twice)}")
    return Backbone(prefix, variant, key_map, keys, tuple(problems))


def _problems(found: Mapping[str, Shape], entries: Mapping[str, FileTensor]) -> list[str]:
    """Return how `found` differs from `entries`: one phrase for each kind of difference."""
    has_masks = any(entry.is_bias_mask and key in found for key, entry in entries.items())
    missing = [
        f"{key} {_show(entry.shape)}"
        for key, entry in entries.items()
        if key not in found and (entry.required or (entry.is_bias_mask and has_masks))
    ]
    extra = [f"{key} {_show(shape)}" for key, shape in found.items() if key not in entries]
    misshapen = [
        f"{key} {_show(shape)} instead of {_show(entries[key].shape)}"
        for key, shape in found.items()
        if key in entries and shape != entries[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", misshapen))
    return [f"{len(each)} {kind}: {enumerate_some(each)}" for kind, each in kinds if each]


def _key_map(variant: Variant, layout: str) -> KeyMap:
    return next(each for each in variant.key_maps() if each.name == layout)


def _unwrapped(parts: Iterable[str]) -> str:
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _is_head(name: str) -> bool:
    return bool(_HEAD.fullmatch(name.partition(".")[0]))


def _rank(backbone: Backbone) -> int:
    words = set(re.split(r"[._]", backbone.prefix.lower()))
    for rank, word in ((4, "gram"), (0, "ema"), (1, "teacher"), (3, "student")):
        if word in words:
            return rank
    return 2


def _show(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
