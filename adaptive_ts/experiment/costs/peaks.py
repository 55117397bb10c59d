"""What a device computes at best, and what of it is used."""

import math
import os
import re
from typing import NamedTuple

from adaptive_ts.experiment.errors import UserError

# What jax_default_matmul_precision may be, as far as float32's products on a GPU go.
_REDUCED = (None, "default", "fastest", "high", "tensorfloat32")
_FULL = ("highest", "float32")


class Peak(NamedTuple):
    """Dense products, TFLOP/s per device (nothing for sparsity), by what they are computed in.

    Attributes:
      bfloat16: with sums in float32.
      tf32: float32 with the products' factors rounded to 10 bits; None: the device has none.
      float32: in full; None: not published.
    """

    bfloat16: float
    tf32: float | None
    float32: float | None


# Of the makers' data sheets; the first pattern that is found in the device's kind counts.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bH[12]00 NVL\b", Peak(835.5, 417.5, 60.0)),
    (r"\bH100 PCIe\b", Peak(756.5, 378.0, 51.0)),
    (r"\bH200\b", Peak(989.4, 494.7, 66.9)),
    (r"\bH100\b", Peak(989.4, 494.7, 66.9)),
    (r"\bA100\b", Peak(312.0, 156.0, 19.5)),
    (r"^TPU v4$", Peak(275.0, None, None)),
    (r"^TPU v5 ?(lite|e)$", Peak(197.0, None, None)),
    (r"^TPU v5p?$", Peak(459.0, None, None)),
)


def known_peak(device_kind: str) -> Peak | None:
    """The peaks of a device by JAX's ``device_kind``; None: not in the table.

    A slice of a GPU (MIG) is a part of one that its name does not tell, and is not in the table.

    >>> from adaptive_ts.experiment.costs.peaks import known_peak
    >>> known_peak("NVIDIA A100-SXM4-80GB").tf32
    156.0
    """
    if re.search(r"\bMIG\b", device_kind):
        return None
    found = (peak for pattern, peak in _PEAKS if re.search(pattern, device_kind, re.IGNORECASE))
    return next(found, None)


def arithmetic(
    dtype: str, platform: str, *, precision: str | None = None, capability: str | None = None
) -> str:
    """What the products of a network of this dtype are computed in.

    Args:
      dtype: "float32" or "bfloat16", the config's ``model.dtype``.
      platform: "cpu", "gpu" or "tpu".
      precision: ``jax_default_matmul_precision``.
      capability: a GPU's compute capability, such as "9.0".

    Returns:
      "float32", "tf32" or "bfloat16", or a ``precision`` that says more than that.
    """
    if dtype != "float32" or platform == "cpu":
        return dtype
    if precision in _FULL:
        return "float32"
    if precision is not None and precision not in _REDUCED:
        return precision
    if platform == "tpu":
        return "bfloat16" if precision in (None, "default", "fastest") else precision
    number = re.fullmatch(r"(\d+)\.\d+", capability or "9.0")  # AMD's are no numbers
    has_tf32 = number is not None and int(number[1]) >= 8
    return "tf32" if has_tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0" else "float32"


def explained(dtype: str, computed_in: str) -> str:
    """A line of what `arithmetic` found, for a reader."""
    if computed_in == dtype:
        return f"{dtype}: products in {dtype}"
    name = {"tf32": "TF32"}.get(computed_in, computed_in)
    return f"{dtype}: products in {name}, JAX's precision on this device unless told otherwise"


def peaks_of(
    computed_in: dict[str, str], device_kind: str, given: list[float] | None
) -> dict[str, float | None]:
    """dtype -> TFLOP/s per device at best, None where it is not known.

    Args:
      computed_in: dtype -> what `arithmetic` says of it.
      device_kind: JAX's.
      given: ``--peak_tflops``, one for all dtypes or one for each; None: from the table.

    Raises:
      UserError: neither one nor one for each, or not a positive number.
    """
    if given is None:
        table = known_peak(device_kind)
        return {d: getattr(table, kind, None) if table else None for d, kind in computed_in.items()}
    for value in given:
        if not 0 < value < math.inf:
            raise UserError(f"--peak_tflops: {value:g} is out of range: must be above 0 and finite")
    if len(given) not in (1, len(computed_in)):
        raise UserError(
            f"--peak_tflops: {len(given)} numbers for {len(computed_in)} of --dtypes "
            f"({' '.join(computed_in)}): give one, or one for each"
        )
    given = given * len(computed_in) if len(given) == 1 else given
    return dict(zip(computed_in, given, strict=True))


def utilisation(
    images_per_s: float, flops_per_image: float, peak_tflops: float | None, devices: int
) -> float | None:
    """The share of the devices' best that goes into the model, None if that is not known.

    >>> from adaptive_ts.experiment.costs.peaks import utilisation
    >>> utilisation(1000.0, 2e9, 4.0, 1)
    0.5
    """
    if peak_tflops is None:
        return None
    return images_per_s * flops_per_image / (1e12 * peak_tflops * devices)
