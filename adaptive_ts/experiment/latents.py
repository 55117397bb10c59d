"""Latents of images for training, and images of latents for evaluation, by an autoencoder.

``python -m adaptive_ts.experiment.latents encode DIR DATA_DIR [--name NAME] [--image_size N]
[--flip] [--seed S] [--vae VAE] [--batch_size B] [--device DEVICE]``

DIR is a folder of images (see ``image_folder``), each cropped to a square of N pixels. Leaves in
DATA_DIR/NAME a data set of float16 latents (N/8, N/8, 4), to be trained on by ``train.py
--data.name NAME --data.dir DATA_DIR``; for Stable Diffusion's autoencoder, 8 kB for an image of
256x256. The same command goes on after a kill, and does nothing when the set is there.

``python -m adaptive_ts.experiment.latents decode FILE OUT [--vae VAE] [--batch_size B]
[--device DEVICE]``

FILE is an ``.npz`` with ``latents`` (N, h, w, C), as ``generate`` writes it for a run on latents.
Leaves in OUT: ``images.npz`` (``images``, uint8, and ``labels`` if FILE has them), for ``evaluate
--images``, ``grid.png`` and ``info.json``.

A latent is one draw from the encoder's posterior, times the autoencoder's scaling factor: what
DiT trains on (Peebles & Xie 2023, arXiv 2212.09748, train.py), which draws anew in every epoch;
here a record has one draw, made from the seed and its number, whatever the batch size. DiT also
mirrors images at random: with ``--flip``, each training image has a second record for its mirror
image, for a mirrored latent is not that of the mirrored image.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.cli import Parser, check_empty, run_cli, usable
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.files import atomic, read_arrays, read_json, write_json
from adaptive_ts.experiment.image_folder import Listing, in_threads, list_images, read_image
from adaptive_ts.experiment.pictures import save_image_grid
from adaptive_ts.experiment.recipes import Download, Recipe, Record
from adaptive_ts.experiment.record_files import OWN_NAME, build, read_metadata, versions
from adaptive_ts.experiment.vae import STABLE_DIFFUSION, Vae, load_vae

Log = Callable[[str], None]

_IN_PART = 1024
_IN_GRID = 100


class _Item(NamedTuple):
    split: str
    path: Path
    label: int | None
    mirrored: bool


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="latents", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|decode")
    encode = commands.add_parser("encode", help="a folder of images into a data set of latents")
    encode.add_argument("folder", type=Path, metavar="DIR", help="of images")
    encode.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="folder of data sets")
    encode.add_argument("--name", default="latents", help="of the data set; default: latents")
    encode.add_argument("--image_size", type=int, default=256, help="in pixels; default: 256")
    encode.add_argument("--flip", action="store_true", help="mirrored training images as well")
    encode.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    decode = commands.add_parser("decode", help="latents into images")
    decode.add_argument("file", type=Path, metavar="FILE", help=".npz with latents")
    decode.add_argument("out", type=Path, metavar="OUT", help="folder, new or empty")
    for command in (encode, decode):
        add = command.add_argument
        add("--vae", default=STABLE_DIFFUSION, help=f"hub or folder; default: {STABLE_DIFFUSION}")
        add("--batch_size", type=int, default=32, help="images at once; default: 32")
        add("--device", help="cpu, cuda, cuda:1, ..; default: cuda where there is one")
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    args = _parser().parse_args(argv)
    for name, least in (("batch_size", 1), ("image_size", 1), ("seed", 0)):
        if getattr(args, name, least) < least:
            raise UserError(
                f"--{name}: {getattr(args, name)} is out of range: must be at least {least}"
            )

    def vae() -> Vae:
        return load_vae(args.vae, args.device)

    if args.command == "decode":
        decode_file(args.file.expanduser(), args.out.expanduser(), vae, batch_size=args.batch_size)
        return 0
    encode_folder(
        args.folder.expanduser(),
        args.data_dir.expanduser(),
        vae,
        name=args.name,
        vae_name=args.vae,
        image_size=args.image_size,
        flip=args.flip,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return 0


def encode_folder(
    folder: Path,
    data_dir: Path,
    vae: Callable[[], Vae],
    *,
    name: str = "latents",
    vae_name: str = STABLE_DIFFUSION,
    image_size: int = 256,
    flip: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    log: Log = print,
) -> Path:
    """Makes a data set of latents, or what is left of it.

    Args:
        folder: of images.
        data_dir: of data sets.
        vae: loads the autoencoder, if there is anything to do.
        name: of the data set.
        vae_name: what it is known by: a set made by another is another set.
        image_size: side of the square images.
        flip: the mirror image of each training image as well.
        seed: of the draws from the posterior.
        batch_size: images at once.
        log: receives a line for each slow thing.

    Returns:
        The data set's folder.

    Raises:
        UserError: images that are none, a name that is taken, or a folder that cannot be written.
    """
    if not OWN_NAME.fullmatch(name):
        raise UserError(f"--name: {name!r}: give small letters, digits and _, a letter first")
    listing = list_images(folder)
    options = {"image_size": image_size, "flip": flip, "seed": seed, "vae": vae_name}
    made_of = {"source": listing.mark, **options}
    found = list(versions(data_dir, name))
    if found:
        there = read_metadata(found[-1])
        differing = [f"{k}: {there.get(k)!r}" for k, v in made_of.items() if there.get(k) != v]
        if differing:
            raise UserError(
                f"--name: {found[-1]} is of other images or options ({', '.join(differing)} "
                "there): choose another name, or remove that folder"
            )
        log(f"{found[-1]} is complete: nothing to do")
        return found[-1]
    items = _items(listing, flip)
    marked = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    parts = data_dir / f".{name}-{marked}"
    loaded = vae()
    if image_size % loaded.factor:
        raise UserError(
            f"--image_size: {image_size} is not divisible by {loaded.factor}, the pixels of a "
            "latent of this autoencoder"
        )
    try:
        files = _encode_parts(items, parts, loaded, image_size, seed, batch_size, log)
    except OSError as error:
        raise UserError(f"cannot write to {parts}: {one_line(error)}") from error
    metadata = {**made_of, "scale": loaded.scale}
    made = build(_recipe(name, items, listing.classes, files, metadata), data_dir, log)
    shutil.rmtree(parts, ignore_errors=True)
    return made


def _items(listing: Listing, flip: bool) -> list[_Item]:
    return [
        _Item(split, path, label, mirrored)
        for split, files in listing.splits.items()
        for path, label in files
        for mirrored in ((False, True) if flip and split == "train" else (False,))
    ]


def _encode_parts(
    items: list[_Item],
    folder: Path,
    vae: Vae,
    image_size: int,
    seed: int,
    batch_size: int,
    log: Log,
) -> list[Path]:
    """The latents in files of ``_IN_PART`` each; those that are there are not made again."""
    from tqdm import tqdm

    def pixels(item: _Item) -> np.ndarray:
        image = read_image(item.path, image_size)
        return image[:, ::-1] if item.mirrored else image

    starts = range(0, len(items), _IN_PART)
    files = [folder / f"{start:09d}.npy" for start in starts]
    left = [(start, file) for start, file in zip(starts, files, strict=True) if not file.is_file()]
    if len(left) < len(files):
        log(f"going on after {len(files) - len(left)} of {len(files)} parts in {folder}")
    missing = sum(len(items[start : start + _IN_PART]) for start, _ in left)
    with tqdm(total=len(items), initial=len(items) - missing, unit=" image") as bar:
        for start, file in left:
            part, done = items[start : start + _IN_PART], []
            for images in _ahead(_batches(in_threads(pixels, part), batch_size)):
                first = start + sum(map(len, done))
                done.append(_draw(*vae.encode(images), seed, first))
                bar.update(len(images))
            with atomic(file) as opened:
                np.save(opened, np.concatenate(done))
    return files


def _draw(mean: np.ndarray, deviation: np.ndarray, seed: int, first: int) -> np.ndarray:
    """One draw each from N(mean, deviation^2), the noise by the record's number."""
    shape = mean.shape[1:]
    noise = [
        np.random.Generator(np.random.Philox([seed, first + i])).standard_normal(shape, np.float32)
        for i in range(len(mean))
    ]
    return (mean + deviation * np.stack(noise)).astype(np.float16)


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    batch = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _ahead(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same, each made while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _recipe(
    name: str,
    items: list[_Item],
    classes: list[str] | None,
    files: list[Path],
    metadata: dict[str, Any],
) -> Recipe:
    splits = list(dict.fromkeys(item.split for item in items))

    def records(split: str) -> Iterator[Record]:
        for number, file in enumerate(files):
            part = items[number * _IN_PART : (number + 1) * _IN_PART]
            if any(item.split == split for item in part):
                for item, latent in zip(part, np.load(file, allow_pickle=False), strict=True):
                    if item.split == split:
                        yield latent, item.label

    def read(_download: Download) -> dict[str, Iterator[Record]]:
        return {split: records(split) for split in splits}

    shape = np.load(files[0], mmap_mode="r", allow_pickle=False).shape[1:]
    counts = (f"{sum(item.split == split for item in items):,} in {split}" for split in splits)
    about = f"latents {'x'.join(map(str, shape))}, {' and '.join(counts)}"
    return Recipe(name, shape, classes, read, dtype=np.float16, metadata=metadata, about=about)


def decode_file(
    path: Path, out: Path, vae: Callable[[], Vae], *, batch_size: int = 32, log: Log = print
) -> None:
    """Decodes a file of latents.

    Args:
        path: an ``.npz`` with ``latents``.
        out: folder of the images, new or empty.
        vae: loads the autoencoder.
        batch_size: latents at once.
        log: receives a line at the end.

    Raises:
        UserError: no such file, one without latents, or a folder that cannot be used.
    """
    from tqdm import tqdm

    check_empty(out, "OUT")
    latents, labels = _read_latents(path)
    loaded = vae()
    count, *sides, _ = latents.shape
    shape = (count, *(side * loaded.factor for side in sides), 3)
    head = {"descr": "|u1", "fortran_order": False, "shape": shape}
    grid = []
    with (
        usable(out, "OUT"),
        tqdm(total=count, unit=" image") as bar,
        atomic(out / "images.npz") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        with archive.open("images.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, head)
            for start in range(0, count, batch_size):
                images = loaded.decode(latents[start : start + batch_size].astype(np.float32))
                array.write(np.ascontiguousarray(images))
                grid += list(images) if len(grid) < _IN_GRID else []
                bar.update(len(images))
        if labels is not None:
            with archive.open("labels.npy", "w") as array:
                np.lib.format.write_array(array, labels)
    with usable(out, "OUT"):
        save_image_grid(out / "grid.png", np.stack(grid[:_IN_GRID]))
        known = read_json(path.parent / "info.json")
        write_json(
            out / "info.json",
            {
                **(known if isinstance(known, dict) else {}),
                "num_images": count,
                "image_shape": shape[1:],
                "decoded_from": str(path),
                "latents": False,
                "vae": loaded.name,
                "scale": loaded.scale,
            },
        )
    log(f"{count:,} images of {path}: {out}")


def _read_latents(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if not path.is_file():
        raise UserError(f"no file {path}: give an .npz with latents, as generate writes it")
    try:
        arrays = read_arrays(path)
        latents, labels = arrays["latents"], arrays.get("labels")
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{path} is no .npz file with latents ({one_line(error)})") from error
    if latents.ndim != 4 or latents.dtype.kind != "f" or 0 in latents.shape:
        raise UserError(
            f"{path}: latents must be floats (N, h, w, C); got {latents.dtype} {latents.shape}"
        )
    if not np.isfinite(latents).all():
        raise UserError(f"{path}: there are latents that are not finite numbers")
    return latents, labels


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.argv[0] = "latents"
    run_cli(main)
