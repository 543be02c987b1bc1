"""Hugging Face `deepseek_v3` configurations and weights, to and from ours, as plain dicts.

Neither torch nor transformers is imported: a checkpoint is a mapping of names to numpy arrays.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sparse_pretrain import spec
from sparse_pretrain.interop.huggingface_config import from_hf_config, to_hf_config
from sparse_pretrain.model import block, lm

__all__ = ["from_hf", "from_hf_config", "to_hf", "to_hf_config"]


class _Row(NamedTuple):
    """One array of theirs: our arrays, joined along their last dim, in another layout.

    `contract` is how many leading dims of ours are summed over; 0 for vectors, stored alike. With
    `swap` the halves of the dim summed over change places.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    contract: int = 1
    experts: bool = False
    swap: bool = False


def to_hf(
    config: lm.Config, params: Mapping, prices: Mapping, *, fused: bool = False
) -> dict[str, np.ndarray]:
    """Our weights under Hugging Face's names, float32, every routing bias included.

    `fused=False` is the layout of checkpoints, an array per expert; `fused=True` that of
    transformers 5's modules in memory, for `load_state_dict`.
    """
    to_hf_config(config)
    out = {}
    for layer, group, index, section in _places(config):
        for row in _rows(config, section, group):
            ours = [_leaf(params, prices, (*group, *path), index) for path in row.paths]
            joined = np.concatenate(ours, axis=-1) if len(ours) > 1 else ours[0]
            out[layer + row.name] = np.ascontiguousarray(_to_theirs(joined, row))
    out |= {copy: out[name] for copy, name in _copies(config)}
    return out if fused else _split_experts(out)


def from_hf(config: lm.Config, weights: Mapping[str, Any]) -> tuple[dict, dict]:
    """(params, prices) as nested dicts of float32 numpy arrays, shaped as `lm.define` wants them.

    Takes experts fused or one by one; ignores rotary buffers, and MTP layers past `mtp.depth`.
    Errors: ValueError naming a weight that is absent, left over or of the wrong shape.
    """
    weights = _fuse_experts(dict(weights))
    definition = lm.define(config)
    shapes = {"params": definition.shapes, "prices": definition.price_shapes}
    found: dict[tuple[str, ...], list[np.ndarray]] = {}
    used = set()
    for layer, group, index, section in _places(config):
        for row in _rows(config, section, group):
            name = layer + row.name
            spec.require(name in weights, f"{name}: the checkpoint does not hold it")
            used.add(name)
            paths = [(*group, *path) for path in row.paths]
            wanted = [_shape(shapes, path, index) for path in paths]
            theirs = np.asarray(weights[name], dtype=np.float32)
            sizes = [shape[-1] for shape in wanted]
            shape = (*wanted[0][:-1], sum(sizes))
            expected = _to_theirs(np.empty(shape, np.bool_), row).shape
            spec.require(
                theirs.shape == expected,
                f"{name}: the model wants shape {expected}, the checkpoint holds {theirs.shape}",
            )
            parts = np.split(_to_ours(theirs, row, shape), np.cumsum(sizes)[:-1], axis=-1)
            for path, part in zip(paths, parts, strict=True):
                found.setdefault(path, []).append(np.ascontiguousarray(part))
    for copy, name in _copies(config):
        used.add(copy)
        same = copy not in weights or np.array_equal(weights[copy], weights[name])
        spec.require(same, f"{copy}: differs from {name}, and the model shares them")
    extra = sorted(k for k in set(weights) - used if not _ignorable(k, config))
    spec.require(
        not extra, f"{', '.join(extra[:3])}: {len(extra)} weights the model has no place for"
    )
    params: dict = {}
    prices: dict = {}
    for path, parts in found.items():
        stacked = path[0].startswith("stack_")
        value = np.stack(parts) if stacked else parts[0]
        node = prices if _is_price(path) else params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return params, prices


def _places(config: lm.Config) -> Iterator[tuple[str, tuple[str, ...], int | None, Any]]:
    """(their prefix, our group, index in its stack or None, section), the trunk's section None."""
    yield "", (), None, None
    sections = config.layer_list
    for i in range(len(config.prefix)):
        yield f"model.layers.{i}.", (f"prefix_{i}",), None, sections[i]
    for n in range(len(config.prefix), len(sections)):
        repeat, member = divmod(n - len(config.prefix), len(config.pattern))
        yield f"model.layers.{n}.", (f"stack_{member}",), repeat, sections[n]
    for k, section in enumerate(config.mtp_list):
        yield f"model.layers.{config.layers + k}.", (f"mtp_{k}",), None, section


def _copies(config: lm.Config) -> Iterator[tuple[str, str]]:
    """(name in an MTP layer, name in the trunk) of what a checkpoint holds again and we share."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    for k in range(config.mtp.depth):
        layer = f"model.layers.{config.layers + k}."
        yield layer + "embed_tokens.weight", "model.embed_tokens.weight"
        yield layer + "shared_head.head.weight", head


def _rows(
    config: lm.Config, section: block.Config | None, group: tuple[str, ...] = ()
) -> list[_Row]:
    if group and group[0].startswith("mtp_"):
        return _MTP + _rows(config, section)
    if section is None:
        rows = [
            _Row("model.embed_tokens.weight", (("embedding",),), 0),
            _Row("model.norm.weight", (("norm", "scale"),), 0),
        ]
        return rows if config.tied else [*rows, _Row("lm_head.weight", (("head",),))]
    rows = [
        _Row("input_layernorm.weight", (("norm_attention", "scale"),), 0),
        _Row("post_attention_layernorm.weight", (("norm_ffn", "scale"),), 0),
        _attention("kv_a_proj_with_mqa", "w_dkv"),
        _Row("self_attn.kv_a_layernorm.weight", (("attention", "kv_norm", "scale"),), 0),
        _attention("kv_b_proj", "w_uk", "w_uv"),
        _attention("o_proj", "w_o", contract=2),
    ]
    if section.attention.q_rank:
        rows += [
            _attention("q_a_proj", "w_dq"),
            _Row("self_attn.q_a_layernorm.weight", (("attention", "q_norm", "scale"),), 0),
            _attention("q_b_proj", "w_uq"),
        ]
    else:
        rows.append(_attention("q_proj", "w_q"))
    if section.ffn.KIND == "dense":
        return rows + _swiglu("mlp.", ("ffn", "mlp"))
    rows += [
        _Row("mlp.gate.weight", (("ffn", "router", "w"),)),
        _Row("mlp.gate.e_score_correction_bias", (("ffn", "router", "bias"),), 0),
        _Row("mlp.experts.gate_up_proj", (("ffn", "w_gate"), ("ffn", "w_up")), experts=True),
        _Row("mlp.experts.down_proj", (("ffn", "w_down"),), experts=True),
    ]
    return rows + (_swiglu("mlp.shared_experts.", ("ffn", "shared")) if section.ffn.shared else [])


def _attention(name: str, *ours: str, contract: int = 1) -> _Row:
    return _Row(f"self_attn.{name}.weight", tuple(("attention", o) for o in ours), contract)


def _swiglu(name: str, path: tuple[str, ...]) -> list[_Row]:
    parts = ("gate", "up", "down")
    return [_Row(f"{name}{p}_proj.weight", ((*path, f"w_{p}"),)) for p in parts]


def _to_theirs(x: np.ndarray, row: _Row) -> np.ndarray:
    if row.experts:
        return x.swapaxes(1, 2)
    if not row.contract:
        return x
    x = np.roll(x, len(x) // 2, axis=0) if row.swap else x
    return x.reshape(math.prod(x.shape[: row.contract]), -1).T


def _to_ours(x: np.ndarray, row: _Row, shape: tuple[int, ...]) -> np.ndarray:
    if row.experts:
        return x.swapaxes(1, 2)
    if not row.contract:
        return x
    ours = x.T.reshape(shape)
    return np.roll(ours, len(ours) // 2, axis=0) if row.swap else ours


def _is_price(path: tuple[str, ...]) -> bool:
    return path[-2:] == ("router", "bias")


def _leaf(params: Mapping, prices: Mapping, path: tuple[str, ...], index: int | None) -> np.ndarray:
    node: Any = prices if _is_price(path) else params
    for key in path:
        node = node[key]
    return np.asarray(node if index is None else node[index], dtype=np.float32)


def _shape(shapes: Mapping, path: tuple[str, ...], index: int | None) -> tuple[int, ...]:
    node: Any = shapes["prices" if _is_price(path) else "params"]
    for key in path:
        node = node[key]
    return tuple(node.shape if index is None else node.shape[1:])


# Theirs multiplies [embedding; hidden], ours [hidden; embedding] as the paper writes it.
_MTP = [
    _Row("hnorm.weight", (("norm_hidden", "scale"),), 0),
    _Row("enorm.weight", (("norm_embedding", "scale"),), 0),
    _Row("eh_proj.weight", (("w_join",),), swap=True),
    _Row("shared_head.norm.weight", (("norm", "scale"),), 0),
]
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _split_experts(fused: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, value in fused.items():
        if name.endswith(".experts.gate_up_proj"):
            parts = dict(zip(("gate", "up"), np.split(value, 2, axis=1), strict=True))
        elif name.endswith(".experts.down_proj"):
            parts = {"down": value}
        else:
            out[name] = value
            continue
        for part, stacked in parts.items():
            for e, one in enumerate(stacked):
                key = f"{name.rpartition('.')[0]}.{e}.{part}_proj.weight"
                out[key] = np.ascontiguousarray(one)
    return out


def _fuse_experts(weights: dict[str, Any]) -> dict[str, Any]:
    single: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    out = {}
    for name, value in weights.items():
        match = _EXPERT.fullmatch(name)
        if match:
            layer, expert, part = match.groups()
            single.setdefault(layer, {}).setdefault(part, {})[int(expert)] = np.asarray(value)
        else:
            out[name] = value
    for layer, parts in single.items():
        count = max(map(len, parts.values()))
        for part in ("gate", "up", "down"):
            held = parts.get(part, {})
            absent = next((e for e in range(count) if e not in held), None)
            name = f"{layer}.{absent}.{part}_proj.weight"
            spec.require(absent is None, f"{name}: the checkpoint does not hold it")
        gate, up, down = (
            np.stack([parts[p][e] for e in range(count)]) for p in ("gate", "up", "down")
        )
        out[f"{layer}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        out[f"{layer}.down_proj"] = down
    return out


def _ignorable(name: str, config: lm.Config) -> bool:
    """Rotary buffers, the tied head stored twice, and MTP layers that the model does not have."""
    if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
        return True
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match.group(1)) >= config.layers + config.mtp.depth
