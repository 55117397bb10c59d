"""A data set of latents, made of a folder of images by an autoencoder.

``adaptive-ts encode DIR DATA_DIR [--name NAME] [--image_size N] [--flip] [--seed S] [--vae VAE]
[--batch_size B] [--device DEVICE]``

DIR is a folder of images, each cropped to a square of N pixels. Leaves in DATA_DIR/NAME a data set
of float16 latents (N/8, N/8, 4), to be trained on by ``train --data.name NAME --data.dir
DATA_DIR``; for Stable Diffusion's autoencoder, 8 kB for an image of 256x256. The same command goes
on after a kill, and does nothing when the set is there.

DiT draws a latent anew in every epoch; here a record has one draw, made from the seed and its
number. DiT also mirrors images at random: with ``--flip``, each training image has a second record
for its mirror image, for a mirrored latent is not that of the mirrored image.
"""

import argparse
from pathlib import Path

from adaptive_ts.experiment.commands import Parser, check_least
from adaptive_ts.experiment.data.vae import add_options, load_vae


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="adaptive-ts encode", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="of images")
    add("data_dir", type=Path, metavar="DATA_DIR", help="folder of data sets")
    add("--name", default="latents", help="of the data set; default: latents")
    add("--image_size", type=int, default=256, help="in pixels; default: 256")
    add("--flip", action="store_true", help="mirrored training images as well")
    add("--seed", type=int, default=0, help="of the draws; default: 0")
    add_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    args = make_parser().parse_args(argv)
    check_least(args, batch_size=1, image_size=1, seed=0)
    from adaptive_ts.experiment.data.latents import encode_folder

    encode_folder(
        args.folder.expanduser(),
        args.data_dir.expanduser(),
        lambda: load_vae(args.vae, args.device),
        name=args.name,
        vae_name=args.vae,
        image_size=args.image_size,
        flip=args.flip,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return 0
