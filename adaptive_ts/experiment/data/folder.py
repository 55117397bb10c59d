"""A folder of images as a data set: PNG, JPEG and WebP, cropped to squares of one size.

``DIR/train`` beside ``DIR/test`` (or ``val``, ``valid``, ``validation``) are the two splits; of any
other DIR, or a ``train`` alone, every 50th image in order of the path is held out as ``test``.
Below that, subfolders are classes, in alphabetical order, as torchvision's ImageFolder has it;
images that lie in no subfolder have no labels.
"""

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from adaptive_ts.experiment.data.built_in import Download, Recipe, Record
from adaptive_ts.experiment.errors import UserError, one_line

if TYPE_CHECKING:
    import PIL.Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_TEST = ("test", "val", "valid", "validation")
_LITTER = ("thumbs.db", "desktop.ini")
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF
_HELD_OUT = 50
_AT_ONCE = 256

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Listing(NamedTuple):
    """The images of a folder.

    Attributes:
        splits: split -> (file, label) in order of the path; the label None without classes.
        classes: their names, or None.
        mark: 16 hex digits over the paths, below the folder, and the sizes of the files.
    """

    splits: Mapping[str, list[tuple[Path, int | None]]]
    classes: list[str] | None
    mark: str


def list_images(folder: Path) -> Listing:
    """Finds the images of a folder, without opening them.

    Args:
        folder: see the module's docstring. Hidden files are passed over.

    Returns:
        The listing.

    Raises:
        UserError: no images, files that are none, images both in classes and beside them, or a
            class of the test images that the others lack.
    """
    try:
        roots = _splits(folder)
        found = {split: _files(root) for split, root in roots.items()}
    except OSError as error:
        raise UserError(f"cannot read {folder} ({one_line(error)})") from error
    for split, files in found.items():
        if not files:
            raise UserError(f"{roots[split]} holds no images ({', '.join(_SUFFIXES)})")
    classes = _classes(roots["train"], found["train"])
    splits = {}
    for split, files in found.items():
        labels = {name: number for number, name in enumerate(classes or ())}
        own = _classes(roots[split], files)
        if (own is None) != (classes is None) or not {*(own or ())} <= {*labels}:
            wanted = f"the classes of {roots['train']}" if classes else "no classes"
            raise UserError(f"{roots[split]} has subfolders {own or 'none'}: wanted {wanted}")
        top = len(roots[split].parts)
        splits[split] = [(p, labels[p.parts[top]] if classes else None) for p, _ in files]
    if "test" not in splits:
        splits = _hold_out(splits["train"], folder)
    digest = hashlib.sha256()
    for path, size in itertools.chain.from_iterable(found.values()):
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
    return Listing(splits, classes, digest.hexdigest()[:16])


def recipe(name: str, folder: Path, image_size: int | None) -> Recipe:
    """How a folder of images becomes a data set.

    Its images stay as they are if ``image_size`` is None; else they become squares of that side,
    by `square`. They are grey if all files are, and else RGB; transparency is dropped.

    Args:
        name: the recipe's.
        folder: of the images.
        image_size: the side in pixels.

    Returns:
        The recipe; its images are read one by one when it is carried out.

    Raises:
        UserError: as by `list_images`; a file that is no image; images of different sizes without
            an ``image_size``.
    """
    listing = list_images(folder)
    sizes, grey = _look(listing)
    if image_size is not None:
        sides = (image_size, image_size)
    elif len(sizes) == 1:
        (sides,) = sizes
    else:
        some = ", ".join(f"{width}x{height} ({path})" for (height, width), path in sizes.items())
        raise UserError(
            f"the images in {folder} differ in size: {some}: give --data.image_size, the side of "
            "the squares that they are to become"
        )

    def encode(item: tuple[Path, int | None]) -> Record:
        path, label = item
        pixels, file = read_image(path, image_size, grey=grey), io.BytesIO()
        _pil().fromarray(pixels[..., 0] if grey else pixels).save(file, "PNG", compress_level=3)
        return file.getvalue(), label

    def read(_download: Download) -> dict[str, Iterable[Record]]:
        return {split: in_threads(encode, files) for split, files in listing.splits.items()}

    counts = (f"{len(files):,} in {split}" for split, files in listing.splits.items())
    labels = "without classes" if listing.classes is None else f"of {len(listing.classes)} classes"
    about = f"images {labels}, {' and '.join(counts)}"
    return Recipe(name, (*sides, 1 if grey else 3), listing.classes, read, about=about)


def read_image(path: Path, image_size: int | None, *, grey: bool = False) -> np.ndarray:
    """The pixels of an image file, turned as its EXIF orientation says.

    Args:
        path: the file.
        image_size: as for `square`; None: all pixels.
        grey: one channel in place of RGB.

    Returns:
        uint8 (H, W, C).

    Raises:
        UserError: the file is no image, or damaged.
    """
    from PIL import ImageOps

    try:
        with _pil().open(path) as file:
            image: Any = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
                levels = np.rint(np.asarray(image, np.float64) / 257).clip(0, 255)
                image = _pil().fromarray(levels.astype(np.uint8))
            image = image.convert("L" if grey else "RGB")
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path} is no image, or damaged ({one_line(error)})") from error
    pixels = np.asarray(image if image_size is None else square(image, image_size))
    return pixels[..., None] if grey else pixels


def square(image: "PIL.Image.Image", side: int) -> "PIL.Image.Image":
    """The largest square in the middle, at another size.

    Halved by a box filter as long as both sides remain at least ``side``, then resized by Pillow's
    antialiased bicubic filter so that the shorter side is ``side``, then cropped.

    Args:
        image: grey or RGB.
        side: in pixels.

    Returns:
        An image of ``side`` x ``side``.

    Source: as ADM and DiT prepare ImageNet, so that statistics of theirs are comparable: Dhariwal
        & Nichol 2021, arXiv 2105.05233, guided_diffusion/image_datasets.py, center_crop_arr.
    """
    resampling = _pil().Resampling
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    image = image.resize((width, height), resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def in_threads(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """``map(function, items)`` by all cores, in order, with few results at a time in memory."""
    rest = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while part := list(itertools.islice(rest, _AT_ONCE)):
            yield from pool.map(function, part)


def _pil() -> Any:
    import PIL.Image

    return PIL.Image


def _splits(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"source_dir {folder} is not a folder")
    below = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    test = [name for name in _TEST if name in below]
    if "train" in below and test:
        return {"train": folder / "train", "test": folder / test[0]}
    return {"train": folder / "train" if below == {"train"} else folder}


def _hold_out(
    files: list[tuple[Path, int | None]], folder: Path
) -> dict[str, list[tuple[Path, int | None]]]:
    if len(files) < 2:
        raise UserError(f"{folder} holds one image: too few to hold out some of them")
    train = [item for number, item in enumerate(files) if number % _HELD_OUT]
    return {"train": train, "test": files[::_HELD_OUT]}


def _files(folder: Path) -> list[tuple[Path, int]]:
    """(image, bytes), in order of the path."""
    found, others = [], []
    for parent, below, names in os.walk(folder, followlinks=True, onerror=_fail):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            if name.startswith(".") or name.lower() in _LITTER:
                continue
            path = Path(parent, name)
            if path.suffix.lower() in _SUFFIXES:
                found.append((path, path.stat().st_size))
            else:
                others.append(path)
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise UserError(
            f"{min(others)}{more}: no image ({', '.join(_SUFFIXES)}): move what is none elsewhere"
        )
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error


def _classes(folder: Path, files: list[tuple[Path, int]]) -> list[str] | None:
    top = len(folder.parts)
    beside = [path for path, _ in files if len(path.parts) == top + 1]
    if not beside:
        return sorted({path.parts[top] for path, _ in files})
    if len(beside) < len(files):
        raise UserError(
            f"{beside[0]} lies beside subfolders with images: give all images a class, each in a "
            "subfolder, or none"
        )
    return None


def _look(listing: Listing) -> tuple[dict[tuple[int, int], Path], bool]:
    """From the heads of all files: up to two of their (height, width), and whether all are grey."""

    def head(item: tuple[Path, int | None]) -> tuple[tuple[int, int], bool, Path]:
        path = item[0]
        try:
            with _pil().open(path) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION) in _SIDEWAYS
                grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        except Exception as error:
            raise UserError(f"{path} is no image, or damaged ({one_line(error)})") from error
        return ((width, height) if turned else (height, width)), grey, path

    sizes, all_grey = {}, True
    for size, grey, path in in_threads(head, itertools.chain(*listing.splits.values())):
        all_grey &= grey
        if len(sizes) < 2:
            sizes.setdefault(size, path)
    return sizes, all_grey
