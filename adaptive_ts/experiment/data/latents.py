"""Latents of images for training, and images of latents for evaluation, by an autoencoder.

A latent is one draw from the encoder's posterior, times the autoencoder's scaling factor: what
DiT trains on (Peebles & Xie 2023, arXiv 2212.09748, train.py), which draws anew in every epoch;
here a record has one draw, made from the seed and its number, whatever the batch size.
"""

import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.commands import check_empty, usable
from adaptive_ts.experiment.data.built_in import Download, Recipe, Record
from adaptive_ts.experiment.data.folder import Listing, in_threads, list_images, read_image
from adaptive_ts.experiment.data.records import OWN_NAME, build, read_metadata, versions
from adaptive_ts.experiment.data.vae import STABLE_DIFFUSION, Vae
from adaptive_ts.experiment.errors import Log, UserError, one_line
from adaptive_ts.experiment.files import atomic, json_digest, read_arrays, read_json, write_json
from adaptive_ts.experiment.pictures import save_image_grid

_IN_PART = 1024
_IN_GRID = 100


class _Item(NamedTuple):
    split: str
    path: Path
    label: int | None
    mirrored: bool


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
    marked = json_digest(made_of, 12)
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
                array.write(np.ascontiguousarray(images).data)
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
