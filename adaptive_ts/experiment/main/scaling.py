"""How the cost of a step grows with the number of devices, by the compiler's own count.

``adaptive-ts scaling [ROW] [--devices N ...] [--out FILE]
[--configs DIR] [--field.path VALUE ...]``

ROW is one of ``configs/`` (default: overhead). Nothing is trained: the steps that ``train``
would take on N devices, with the uniform sampler and with the row's own, without a probe and with
one, are compiled and looked at. Strong scaling: the global batch is the row's whatever N is.

Printed of each step, for one device: FLOPs, bytes read and written, memory besides the state and
the batch, and the messages between devices with what they carry. The compiler puts up to 256
arrays into one. Then the probe's share of the FLOPs, ((probe - plain) / f_S) / plain, and the
messages that the sampler adds to uniform's. ``--mesh.fsdp F`` splits the model's state over F of
the devices.

Without accelerators, or with ``JAX_PLATFORMS=cpu``, the devices are virtual ones on the CPU, as
many as it takes.
"""

import argparse
import os
from pathlib import Path

from adaptive_ts.experiment.commands import Parser, usable, usable_file
from adaptive_ts.experiment.config.command_line import parse, split_row
from adaptive_ts.experiment.config.groups import to_dict
from adaptive_ts.experiment.errors import UserError

DEVICES = (1, 2, 4, 8)


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="adaptive-ts scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", nargs="+", type=int, help="how many; default: 1 2 4 8, what fsdp divides")
    add("--out", type=Path, help="file of the results, JSON")
    add("--configs", help="folder of rows; default: ./configs and the built-in ones")
    return parser


def main(argv: list[str], *, virtual: bool = True) -> int:
    """The command.

    Args:
      argv: its arguments.
      virtual: make as many devices of the CPU as it takes; JAX must not have looked for any yet.
    """
    row, rest = split_row(argv, "overhead")
    args, overrides = make_parser().parse_known_args(rest)
    row, config = parse([row, *overrides], configs_dir=args.configs)
    fsdp = config.mesh.fsdp
    counts = args.devices or [n for n in DEVICES if n % fsdp == 0] or [fsdp]
    for count in counts:
        if count < 1:
            raise UserError(f"--devices: {count} is out of range: must be at least 1")
    if virtual:
        _make_virtual(max(counts))
    if args.out is not None:
        usable_file(args.out)
    import jax

    from adaptive_ts.experiment.costs.counts import rows, text
    from adaptive_ts.experiment.costs.scaling import measure
    from adaptive_ts.experiment.files import write_json

    found = measure(config, list(dict.fromkeys(counts)))
    about = {
        "row": row,
        "model": f"{config.model.name} on images of {config.data.name}",
        "sampler": config.sampler.name,
        "every": config.sampler.every,
        "batch_size": config.train.batch_size,
    }
    platform = jax.default_backend()
    if args.out is not None:
        report = {**about, "platform": platform, "jax": jax.__version__}
        report |= {"rows": rows(found, about["every"]), "config": to_dict(config)}
        with usable(args.out):
            write_json(args.out, report)
    print(text(about, found, platform))
    return 0


def _make_virtual(count: int) -> None:
    import jax

    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = flags.strip()
    # Of machine code alone: what is counted is the same, in half the time.
    jax.config.update("jax_disable_most_optimizations", True)
