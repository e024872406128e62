"""Input validation: whole numbers, arrays, images, and content that a library cannot read.

Each check raises a ValueError with the value, what is expected and how to fix it. Tensors are detected by duck typing
(`detach`), so PyTorch stays optional.
"""

import contextlib
import os
from collections.abc import Iterator
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

SHORTEN = "Use a shorter text, fewer cameras, or a larger scale_factor."
MAX_SIDE = 2**13  # pixels; larger images take too long to resize
MAX_SIZE = 2**20  # of a model, an image or a chunk
MAX_NORMALIZED = 2.0  # quantile normalisation clips actions here, at most doubling the symbols that [-1, 1] needs
BATCH_NUMBERS = 2**18  # numbers per conversion, so that a data set is never in memory as float64

# Modes with 8-bit channels. Pillow would clip the others ("I;16", "I", "F") at 255.
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
HALF_A_LEVEL = 0.5 / 255  # floats this far outside [0, 1] still round to 0 or 255


def check_whole(value: object, name: str, low: int = 1, high: int = MAX_SIZE) -> int:
    """Return `value` as an `int`; raise unless it is a whole number from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {low} to {high}.")
    return int(value)


def check_length(num_prompt_tokens: int, num_new_tokens: int, limit: int) -> None:
    """Raise if the model has too few positions for the prompt and the chunk after it."""
    if num_prompt_tokens + num_new_tokens > limit:
        raise ValueError(
            f"The prompt has {num_prompt_tokens} tokens and a chunk up to {num_new_tokens}, more than the model's "
            f"{limit} positions (max_position_embeddings). {SHORTEN}"
        )


def check_fps(fps: object, name: str = "fps") -> float:
    """Return a control rate as a number; raise unless it is above 0 and finite."""
    check_positive(fps, name, "control steps per second")
    return int(fps) if fps == int(fps) else float(fps)  # 10 and 10.0 have the same fingerprint


def check_positive(value: object, name: str, meaning: str) -> None:
    """Raise unless `value` is a finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}, expected a number above 0: {meaning}.")


def as_numbers(values: ArrayLike, name: str, shape: tuple | None = None, keep_floats: bool = False) -> np.ndarray:
    """A float64 array of this shape (a string stands for any size); raises unless all numbers are finite.

    With `keep_floats`, floats keep their precision and are not copied, so that data sets convert in batches.
    """
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            is_kept = keep_floats and values.is_floating_point() and values.element_size() >= 4
            values = (values if is_kept else values.double()).numpy()
        values = np.asarray(values)
        if values.dtype.kind not in "fiubO":  # NumPy would read strings, and drop imaginary parts
            raise TypeError(f"its dtype is {values.dtype}")
        if not (keep_floats and values.dtype in (np.float32, np.float64)):
            values = values.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name} is not an array of numbers: {error}. Pass real numbers.") from error
    fits = shape is None or (
        values.ndim == len(shape)
        and all(isinstance(size, str) or size == found for size, found in zip(shape, values.shape, strict=True))
    )
    if not fits:
        raise ValueError(f"{name} has shape {values.shape}, expected ({', '.join(map(str, shape))}).")
    if not np.isfinite(values).all():
        first = tuple(np.argwhere(~np.isfinite(values))[0].tolist())
        raise ValueError(
            f"{name}{list(first)} is {values[first]}, expected finite numbers. Check the sensor or the data."
        )
    return values


def in_batches(num_rows: int, row_size: int) -> Iterator[slice]:
    """Slices over the rows of an array, each of at most [`BATCH_NUMBERS`] numbers or one row."""
    step = max(1, BATCH_NUMBERS // max(1, row_size))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def as_rgb_images(sample, name: str) -> list[np.ndarray]:
    """The images of one sample, one per camera, as uint8 arrays `(H, W, 3)`."""
    is_many = isinstance(sample, (list, tuple)) or getattr(sample, "ndim", 0) == 4
    images = [_as_rgb(image, f"{name}[{i}]") for i, image in enumerate(sample)] if is_many else [_as_rgb(sample, name)]
    if not images:
        raise ValueError(f"{name} is empty, expected at least one camera's image.")
    return images


def _as_rgb(image, name: str) -> np.ndarray:
    if isinstance(image, (str, bytes, os.PathLike)):
        raise ValueError(f"{name} is {image!r:.200}, expected an RGB image. Open the file with PIL.Image.open(path).")
    if isinstance(image, Image.Image):
        if image.mode not in EIGHT_BIT_MODES:
            raise ValueError(
                f"{name} is a PIL image of mode {image.mode!r}, expected 8-bit RGB. Depth and 16-bit images have no "
                "colours: leave that camera out, or scale it to uint8 yourself, as in training."
            )
        with as_value_error(name, "Pass an image that PIL can convert to RGB."):
            image = np.asarray(image.convert("RGB"))
    elif hasattr(image, "detach"):
        with as_value_error(name, "Pass a PIL image, a NumPy array or a tensor."):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} is a {type(image).__name__}, expected an RGB image: PIL, NumPy array or tensor.")
    if image.ndim == 3 and image.shape[-1] != 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {image.shape}, expected (height, width, 3) or (3, height, width), RGB.")
    if max(image.shape) > MAX_SIDE:
        raise ValueError(f"{name} has shape {image.shape}, expected at most {MAX_SIDE} pixels a side. Resize it.")
    if image.dtype.kind == "f":
        # NaN fails this comparison too.
        if not (image.min() >= -HALF_A_LEVEL and image.max() <= 1 + HALF_A_LEVEL):
            raise ValueError(
                f"{name} has floats from {image.min()} to {image.max()}, expected [0, 1] (off by {HALF_A_LEVEL:.4f} "
                "at most, as resizing leaves them), or uint8 in [0, 255]. Divide by 255, and do not normalise: the "
                "processor does."
            )
        image = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {image.dtype}, expected uint8, or floats in [0, 1].")
    return image


@contextlib.contextmanager
def as_value_error(
    content: object, fix: str = "Download or save it again.", passing: tuple[type, ...] = ()
) -> Iterator[None]:
    """Turn what a library raises on malformed content into a ValueError that names the content and the fix.

    `ImportError` and exceptions of exactly the types in `passing` pass. An `OSError` stays one, and gets the content's
    name if it names no file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{content} cannot be used: {error}. {fix}") from error
    except BaseException as error:
        # A panic in the Rust code of tokenizers is a BaseException whose class cannot be imported.
        is_content = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_content or isinstance(error, ImportError) or type(error) in passing:
            raise
        raise ValueError(f"{content} cannot be used: {type(error).__name__}: {error}. {fix}") from error
