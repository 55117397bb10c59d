"""Images of latents, by an autoencoder.

``adaptive-ts decode FILE OUT [--vae VAE] [--batch_size B] [--device DEVICE]``

FILE is an ``.npz`` with ``latents`` (N, h, w, C), as ``generate`` writes it for a run on latents.
Leaves in OUT: ``images.npz`` (``images``, uint8, and ``labels`` if FILE has them), for ``evaluate
--images``, ``grid.png`` and ``info.json``.
"""

import argparse
from pathlib import Path

from adaptive_ts.experiment.commands import Parser, check_least
from adaptive_ts.experiment.data.vae import add_options, load_vae


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="adaptive-ts decode", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help=".npz with latents")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder, new or empty")
    add_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    args = make_parser().parse_args(argv)
    check_least(args, batch_size=1)
    from adaptive_ts.experiment.data.latents import decode_file

    file, out = args.file.expanduser(), args.out.expanduser()
    decode_file(file, out, lambda: load_vae(args.vae, args.device), batch_size=args.batch_size)
    return 0
