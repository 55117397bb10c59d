"""Parameters of the models from the checkpoints of their authors' PyTorch code."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from adaptive_ts.experiment.errors import nearest
from adaptive_ts.experiment.models.dit import position_embedding
from adaptive_ts.types import Params

_SHOWN = 5  # of each kind of mistake


def _unet_modules() -> dict[str, str]:
    in_block = {name: name for name in ("conv1", "fc", "conv2", "skip")}
    in_block |= {"norm1": "norm1/group", "norm2": "norm2/group"}
    in_attention = {name: name for name in ("project_in", "project_out")} | {"norm": "norm/group"}
    modules = {
        "embed.0": "embed_0",
        "embed.2": "embed_1",
        "in_conv": "in_conv",
        "out_conv.0": "out_norm/group",
        "out_conv.2": "out_conv",
    }
    modules |= {f"middle.{{}}.{k}": f"middle_{{}}/{v}" for k, v in in_block.items()}
    modules |= {f"middle.{{}}.{k}": f"middle_{{}}/{v}" for k, v in in_attention.items()}
    for way in ("down", "up"):
        torch, ours = f"{way}samples.level_{{}}.{{}}", f"{way}_{{}}_{{}}"
        modules |= {f"{torch}.{k}": f"{ours}/{v}" for k, v in in_block.items()}
        # Where a level has attention, each of its blocks is a pair.
        modules |= {f"{torch}.0.{k}": f"{ours}/{v}" for k, v in in_block.items()}
        modules |= {f"{torch}.1.{k}": f"{ours}_attention/{v}" for k, v in in_attention.items()}
        modules[f"{torch}.1"] = f"{way}_{{}}_conv"
    return modules


_IN_TRANSFORMER_BLOCK = {
    "attn.qkv": "attention/project_in",
    "attn.proj": "attention/project_out",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
}


def _dit_modules() -> dict[str, str]:
    in_block = {**_IN_TRANSFORMER_BLOCK, "adaLN_modulation.1": "modulation"}
    return {
        "x_embedder.proj": "patch_embed",
        "t_embedder.mlp.0": "time_0",
        "t_embedder.mlp.2": "time_1",
        **{f"blocks.{{}}.{k}": f"block_{{}}/{v}" for k, v in in_block.items()},
        "final_layer.adaLN_modulation.1": "modulation",
        "final_layer.linear": "out",
    }


def _uvit_modules() -> dict[str, str]:
    in_block = {**_IN_TRANSFORMER_BLOCK, "norm1": "norm1", "norm2": "norm2", "skip_linear": "skip"}
    blocks = {"in_blocks.{}": "in_{}", "mid_block": "middle", "out_blocks.{}": "out_{}"}
    return {
        "patch_embed.proj": "patch_embed",
        "time_embed.0": "time_0",
        "time_embed.2": "time_1",
        **{f"{b}.{k}": f"{ours}/{v}" for b, ours in blocks.items() for k, v in in_block.items()},
        "norm": "norm",
        "decoder_pred": "out",
        "final_layer": "out_conv",
    }


# The modules that have a weight and perhaps a bias, theirs -> ours; {} stands for a number.
_MODULES = {"unet": _unet_modules(), "dit": _dit_modules(), "uvit": _uvit_modules()}
# What is one tensor, of the same layout in both.
_TENSORS = {
    "unet": {},
    "dit": {"y_embedder.embedding_table.weight": "class_embed/embedding"},
    "uvit": {"label_emb.weight": "class_embed/embedding", "pos_embed": "position"},
}


def from_torch(
    name: str, state_dict: Mapping[str, np.ndarray], *, like: Params | None = None
) -> Params:
    """A PyTorch state dict as the parameters of our model.

    Of the U-Net of the paper's code, of the authors' DiT and of the authors' U-ViT, of any size.
    DiT's ``pos_embed`` is no parameter here: it is checked and left out. In an averaged
    checkpoint it has drifted by the average's rounding, which ours has not.

    Args:
      name: "unet", "dit" or "uvit".
      state_dict: name -> array, ``{k: v.numpy() for k, v in module.state_dict().items()}``.
      like: the parameters that are expected, as arrays or ``jax.ShapeDtypeStruct``, such as
        ``jax.eval_shape(model.init, key, x, t)["params"]``. Without them only names unlike any
        of the authors' are found out.

    Returns:
      Nested dicts of float32 NumPy arrays in Flax's layouts.

    Raises:
      ValueError: another model's name; tensors that are missing, unexpected or wrongly shaped.

    Example:
      >>> import numpy as np
      >>> from adaptive_ts.experiment.models.convert import from_torch
      >>> weight = np.zeros((48, 4, 2, 2))  # (out, in, height, width)
      >>> from_torch("dit", {"x_embedder.proj.weight": weight})["patch_embed"]["kernel"].shape
      (2, 2, 4, 48)
    """
    if name not in _MODULES:
        raise ValueError(f"no checkpoints of a model {name!r}: {nearest(name, _MODULES)}")
    found: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    unexpected = []
    for key, value in state_dict.items():
        if (name, key) == ("dit", "pos_embed"):
            _check_fixed_positions(np.asarray(value))
            continue
        path = _path(name, key)
        if path is None or path in found:
            unexpected.append(f"{key!r}{_suggestion(name, key)}")
        else:
            found[path] = _in_our_layout(np.asarray(value, np.float32), path)
            origin[path] = key
    mistakes = {"unexpected": unexpected}
    if like is not None:
        wanted: Any = flatten_dict(like, sep="/")
        mistakes = _differences(found, origin, wanted, unexpected)
    told = [
        f"{len(items)} {kind}: {', '.join(items[:_SHOWN])}{', ...' if items[_SHOWN:] else ''}"
        for kind, items in mistakes.items()
        if items
    ]
    if told:
        raise ValueError(
            f"the state dict is not of this {name}: {'; '.join(told)}; "
            "give the model the fields that the checkpoint was trained with"
        )
    return unflatten_dict(found, sep="/")


def _path(name: str, key: str) -> str | None:
    """Their name of a tensor -> ours, None if it is none of theirs."""
    if key in _TENSORS[name]:
        return _TENSORS[name][key]
    module, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    for theirs, ours in _MODULES[name].items():
        match = re.fullmatch(re.escape(theirs).replace(r"\{\}", r"(\d+)"), module)
        if match:
            path = ours.format(*match.groups())
            kernel = "scale" if "norm" in path else "kernel"
            return f"{path}/{kernel if leaf == 'weight' else 'bias'}"
    return None


def _in_our_layout(value: np.ndarray, path: str) -> np.ndarray:
    if not path.endswith("/kernel"):
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _suggestion(name: str, key: str) -> str:
    """ " (did you mean ...?)" with the most similar of their names, if one is similar."""
    numbers = re.findall(r"\d+", key)
    modules = [m.format(*numbers) for m in _MODULES[name] if m.count("{}") <= len(numbers)]
    known = [f"{m}.{leaf}" for m in modules for leaf in ("weight", "bias")] + [*_TENSORS[name]]
    close = [k for k in difflib.get_close_matches(key, known, n=1) if k != key]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _differences(
    found: Mapping[str, np.ndarray],
    origin: Mapping[str, str],
    like: Mapping[str, jax.ShapeDtypeStruct],
    unexpected: list[str],
) -> dict[str, list[str]]:
    """Kind of mistake -> what is told of each."""
    extra = [f"{origin[path]!r} ({path})" for path in found if path not in like]
    shapes = [
        f"{origin[path]!r} ({path}) has {value.shape}, needs {like[path].shape} in our layout"
        for path, value in found.items()
        if path in like and value.shape != like[path].shape
    ]
    return {
        "missing": [path for path in like if path not in found],
        "unexpected": unexpected + extra,
        "wrongly shaped": shapes,
    }


def _check_fixed_positions(value: np.ndarray) -> None:
    side = int(np.sqrt(value.shape[1])) if value.ndim == 3 else 0
    fits = value.ndim == 3 and value.shape[:2] == (1, side * side) and value.shape[2] % 4 == 0
    # Averaging rounds at each step: with decay 0.9999 the error may grow 10,000-fold.
    if not fits or np.abs(value[0] - position_embedding(side, side, value.shape[2])).max() > 0.01:
        raise ValueError(
            "pos_embed is not DiT's fixed embedding of a square grid, got an array of shape "
            f"{value.shape}; a DiT that learned its positions cannot be converted"
        )
