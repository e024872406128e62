"""Decode single images of videos and parquet files, and keep small ones in a cache on disk.

A video can be decoded only from a keyframe on, so a frame costs the decoding of all frames since the keyframe before
it, unless reading continues where it stopped. Where images are small, each is therefore kept once it is decoded, at
the size that is returned.
"""

import hashlib
import io
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from transformers.utils import logging

from ..checks_smolandfast import MAX_SIDE, as_rgb_images, as_value_error

logger = logging.get_logger(__name__)

AGAIN = "Download or convert the data set again."
INFO = "meta/info.json"
OTHER_CACHE = "Free some, choose another cache_dir (XDG_CACHE_HOME), or decode frames each time with cache_dir=False."
MAX_CACHED_BYTES = 100_000  # a frame, of all cameras; larger ones are decoded each time
MAX_OPEN_VIDEOS = 8  # in each thread
MAX_ENCODED_BYTES = 2**27  # of images in parquet that are in memory, in each thread
CHECKSUM_BYTES = 4
# PyAV 17 and later would start threads that do not survive a fork, and compete with other workers.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

Resizer = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) -> uint8 (side, side, 3); its repr says which


class _Recent(threading.local):
    """The most recently used values, up to a total size. Each thread and each forked process makes its own."""

    def __init__(self, limit: int, size: Callable[[Any], int]):
        self.limit, self.size, self.process, self.values = limit, size, None, {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if self.process != os.getpid():
            self.process, self.values = os.getpid(), {}
        value = self.values.pop(key, None)
        value = self.values[key] = make() if value is None else value
        while len(self.values) > 1 and sum(map(self.size, self.values.values())) > self.limit:
            del self.values[next(iter(self.values))]
        return value


_videos = _Recent(MAX_OPEN_VIDEOS, lambda video: 1)
_row_groups = _Recent(MAX_ENCODED_BYTES, lambda column: column.nbytes)


class ImageFile:
    """The images of one camera in one file, decoded one by one: a video, or the column `key` of a parquet file.

    Opening it reads no frame of a video and the first image of a parquet file. It holds nothing open, so it can be
    pickled and used in many processes and threads.

    Args:
        fps: The video's frame rate, as in `meta/info.json`; None for a parquet file.

    Raises:
        ValueError: The file holds other images than expected.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, key: str, n_frames: int, fps: float | None):
        self.path, self.key, self.n_frames, self.fps = path, key, n_frames, fps
        stat = path.stat()
        self.fingerprint = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{key}|{fps}"
        with as_value_error(path, AGAIN):
            self.size = self._check_video() if fps is not None else self._check_rows()  # (height, width)

    def decode(self, i: int, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        """Decode up to frame `i`, and yield the wanted ones of the frames on the way: index, uint8 `(H, W, 3)`."""
        with as_value_error(f"Frame {i} of {self.path}", AGAIN):
            for j, to_rgb in self._decode_video(i) if self.fps is not None else self._decode_rows(i):
                if is_wanted(j):
                    image = to_rgb()
                    if image.shape[:2] != self.size:
                        raise ValueError(f"frame {j} is {image.shape[:2]} (height, width), expected {self.size}")
                    yield j, image

    def _check_video(self) -> tuple[int, int]:
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            if stream.frames not in (0, self.n_frames):  # 0 where the container does not say
                raise ValueError(f"it has {stream.frames} frames, expected {self.n_frames} as in meta/episodes")
            context, last = stream.codec_context, self.n_frames - 1
            _check_format(context.format)
            if not 0 < max(context.height, context.width) <= MAX_SIDE:
                raise ValueError(f"its frames are {(context.height, context.width)}, expected up to {MAX_SIDE} pixels")
            _seek(container, stream, last, self.fps)
            times = [packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None]
            if not times or not abs(max(times) * self.fps - last) < 0.5:
                found = f"{float(max(times))} s" if times else "no time"
                expected = f"{last / self.fps} s, frame {last} at the fps {self.fps} in {INFO}"
                raise ValueError(f"its last frame is at {found}, expected {expected}")
            return context.height, context.width

    def _check_rows(self) -> tuple[int, int]:
        with pq.ParquetFile(self.path) as file:
            if file.metadata.num_rows != self.n_frames:
                raise ValueError(f"it has {file.metadata.num_rows} rows, expected {self.n_frames} as in meta/episodes")
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._group_starts = np.cumsum([0, *rows])
            first = next(file.iter_batches(1, columns=[self.key], use_threads=False)).column(self.key)
            return self._image(first, 0).shape[:2]

    def _decode_video(self, i: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        video = _videos.get(self.fingerprint, partial(_OpenVideo, self.path, self.fps))
        for j, frame in video.decode(i):
            yield j, partial(video.to_rgb, frame)

    def _decode_rows(self, i: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        """From the start of its row group, which is in memory."""
        group = int(np.searchsorted(self._group_starts, i, side="right")) - 1
        images = _row_groups.get((self.fingerprint, group), partial(self._read_group, group))
        for j in range(self._group_starts[group], i + 1):
            yield j, partial(self._image, images, j - self._group_starts[group])

    def _read_group(self, group: int) -> pa.ChunkedArray:
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(group, columns=[self.key], use_threads=False)[self.key]

    def _image(self, column: pa.Array | pa.ChunkedArray, row: int) -> np.ndarray:
        return np.array(as_rgb_images(Image.open(io.BytesIO(column[row].as_py()["bytes"])), self.key)[0])


class _OpenVideo:
    """A decoder and its position. It reads on from there, or from the keyframe before a frame."""

    def __init__(self, path: Path, fps: float):
        self.fps, self.container = fps, av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.frames = self.container.decode(self.stream)
        self.reformatter = VideoReformatter()
        self.next = 0  # index of the next frame; None where only that frame's time will tell
        self.keyframe = 0
        self.largest_group = 1  # frames from one keyframe to the next, as far as seen

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        return np.array(self.reformatter.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray())

    def decode(self, i: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield the frames up to `i`, from the current position where a keyframe is not likely to be nearer."""
        if self.next is not None and 0 <= i - self.next <= self.largest_group // 2:
            try:
                for j, frame in self._read():
                    yield j, frame
                    if j >= i:
                        return
            except (ValueError, av.FFmpegError):
                pass  # the damage may be before the keyframe that this frame needs
        back = 0
        while True:
            _seek(self.container, self.stream, max(0, i - back), self.fps)
            self.frames, self.next = self.container.decode(self.stream), None
            for count, (j, frame) in enumerate(self._read()):
                # The keyframe may be later in time than this frame, or none from which decoding is exact.
                if j > i or (count == 0 and not frame.key_frame and back < i):
                    break
                yield j, frame
                if j == i:
                    return
            if back >= i:
                raise ValueError(f"no frame is at {i / self.fps} s")
            back = 2 * back + 4

    def _read(self) -> Iterator[tuple[int, av.VideoFrame]]:
        while True:
            i, self.next = self.next, None  # stays None if this fails
            frame = next(self.frames, None)
            if frame is None:
                return
            is_first = i is None
            if is_first:
                i = round((frame.time or 0) * self.fps)
            _check_frame(frame, i, self.fps)
            if frame.key_frame or is_first:
                self.keyframe = i
            self.largest_group = max(self.largest_group, i - self.keyframe + 1)
            self.next = i + 1
            yield i, frame


def _seek(container: av.container.InputContainer, stream: av.VideoStream, i: int, fps: float) -> None:
    """Go to the last keyframe that is not after frame `i`, whose time is rounded to the stream's unit."""
    container.seek(int((i + 0.49) / fps / stream.time_base), stream=stream)


def _check_frame(frame: av.VideoFrame, i: int, fps: float) -> None:
    """Refuse a frame that is not the camera's `i`-th RGB image."""
    if frame.is_corrupt:
        raise ValueError(f"the frame at {frame.time} s is damaged")
    if frame.time is None or not abs(frame.time * fps - i) < 0.5:
        raise ValueError(f"frame {i} is at {frame.time} s, expected {i / fps} s at the fps {fps} in {INFO}")
    _check_format(frame.format)


def _check_format(pixels: av.VideoFormat) -> None:
    if len(pixels.components) == 1 and pixels.components[0].bits > 8:
        raise ValueError(f"its pixels are {pixels.name}, a depth map's, expected RGB images of 8 bits")


class FrameReader:
    """Images of a data set at the size that is returned, from the cache where they are small enough for it.

    A cache file has a slot for each frame of an image file: the image and its checksum. Empty, damaged and
    half-written slots have another checksum; their frames are decoded and written again. So several processes may use
    the cache at once, and it may be deleted at any time.

    Args:
        spans: The frames that may be asked for: image files, the index of the first frame and the number of frames.
        folder: Of the cache; None for none.
        resize: None returns images as recorded.
        cache_every: Of each span, the cache keeps every so many frames, from the first on.
    """

    def __init__(
        self,
        spans: list[tuple[ImageFile, int, int]],
        folder: Path | None,
        resize: Resizer | None,
        cache_every: int = 1,
    ):
        self.folder, self.resize, self.has_room = folder, resize, False
        files = dict.fromkeys(file for file, _, _ in spans)
        shapes = {file.key: (*file.size, 3) for file in files}  # files of one camera have one size
        if resize is not None:
            shapes = {key: self._resized(np.zeros(shape, np.uint8)).shape for key, shape in shapes.items()}
        if folder is None or sum(map(math.prod, shapes.values())) > MAX_CACHED_BYTES:
            files = ()
        self.targets = {file: (str(folder / self._name(file)), shapes[file.key]) for file in files}
        self.is_kept = {file: np.zeros(file.n_frames, dtype=bool) for file in self.targets}
        for file, start, length in spans if self.targets else ():
            self.is_kept[file][start : start + length : cache_every] = True

    def read(self, file: ImageFile, i: int) -> np.ndarray:
        """Frame `i` of a file: uint8 `(H, W, 3)`, the caller's own."""
        if file not in self.targets or not self.is_kept[file][i]:
            ((_, image),) = file.decode(i, lambda j: j == i)
            return self._resized(image)
        image = _load(*self.targets[file], i)
        if image is None:
            for j, frame in file.decode(i, lambda j: j == i or self._is_missing(file, j)):
                image = self._resized(frame)
                self._store(file, j, image)
        return image

    def _name(self, file: ImageFile) -> str:
        digest = hashlib.sha256(f"{file.fingerprint}|{self.resize!r}".encode()).hexdigest()[:16]
        return f"{file.key.replace('/', '_')}-{digest}.frames"

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if self.resize is None:
            return image
        resized = np.array(self.resize(image))
        if resized.dtype != np.uint8 or resized.ndim != 3 or resized.shape[2] != 3:
            found = f"{resized.dtype} {resized.shape} of an image of {image.shape}"
            raise ValueError(f"resizer {self.resize!r} made {found}, expected uint8 (height, width, 3). Correct it.")
        return resized

    def _is_missing(self, file: ImageFile, i: int) -> bool:
        return self.is_kept[file][i] and not any(self._are_filled(file, [i]))

    def _are_filled(self, file: ImageFile, frames: Iterable[int]) -> Iterator[bool]:
        """Whether something was written for each of these frames."""
        path, shape = self.targets[file]
        size = math.prod(shape)
        try:
            with io.FileIO(path) as slots:
                for i in frames:
                    slots.seek(i * (size + CHECKSUM_BYTES) + size)
                    yield any(slots.read(CHECKSUM_BYTES))
        except FileNotFoundError:
            yield from (False for _ in frames)

    def _store(self, file: ImageFile, i: int, image: np.ndarray) -> None:
        path, _ = self.targets[file]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_room()
            Path(path).touch()
            with open(path, "r+b") as slots:
                slots.seek(i * (image.nbytes + CHECKSUM_BYTES))
                slots.write(image.tobytes() + _checksum(image))
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                f"cache_dir is {self.folder}, where {Path(path).name} cannot be written: {error}. {OTHER_CACHE}"
            ) from error

    def _check_room(self) -> None:
        """Compare what is still to be written with the free space, before the first write."""
        if self.has_room:
            return
        needed = 0
        for file, (_, shape) in self.targets.items():
            frames = np.flatnonzero(self.is_kept[file]).tolist()
            needed += (math.prod(shape) + CHECKSUM_BYTES) * (len(frames) - sum(self._are_filled(file, frames)))
        free = shutil.disk_usage(self.folder).free
        need = f"Decoded frames need up to {needed / 1e9:.3g} GB in {self.folder}, which has {free / 1e9:.3g} GB free."
        if needed > free:
            raise OSError(f"{need} {OTHER_CACHE}")
        self.has_room = True
        worker = torch.utils.data.get_worker_info()
        if worker is None or worker.id == 0:
            logger.log(logging.WARNING if needed > 1e9 else logging.INFO, need)


def _load(path: str, shape: tuple[int, int, int], i: int) -> np.ndarray | None:
    slot = np.empty(math.prod(shape) + CHECKSUM_BYTES, np.uint8)
    try:
        with io.FileIO(path) as slots:
            slots.seek(i * slot.size)
            is_read = slots.readinto(slot) == slot.size
    except OSError:
        return None
    image = slot[:-CHECKSUM_BYTES]
    is_whole = is_read and slot[-CHECKSUM_BYTES:].tobytes() == _checksum(image)
    return image.reshape(shape) if is_whole else None


def _checksum(image: np.ndarray) -> bytes:
    """Never four zeros, as in an empty slot."""
    return (zlib.crc32(image) or 1).to_bytes(CHECKSUM_BYTES, "little")
