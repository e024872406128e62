"""Time reading a LeRobot data set: samples a second by number of workers, and random access by keyframe interval.

    python benchmarks/speed/reading.py path/to/dataset --side 96

Samples are drawn in random order, as in training. The first pass fills a new cache; all others find the videos in
memory. Nothing else should run on the machine. Writes `benchmarks/results/reading.json` and `reading.md`.
"""

import argparse
import tempfile
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from bench import RESULTS, describe_machine, write_table
from PIL.Image import Resampling
from torch.utils.data import DataLoader

from smolandfast.prompt_smolandfast import ImageResizer
from smolandfast.training import LeRobotChunkDataset
from smolandfast.training.frames import ImageFile

BATCH, WORKERS = 16, (0, 1, 2)
GROUPS = (2, 50, 250)  # frames from one keyframe to the next; LeRobot encodes 2, other tools often 250
GROUP_FRAMES = 500


def collate(samples: list[dict]) -> list[torch.Tensor]:
    """Each camera's images: uint8 `(B, H, W, 3)`."""
    return [
        torch.from_numpy(np.stack(images)) for images in zip(*(sample["images"] for sample in samples), strict=True)
    ]


def samples_a_second(dataset: LeRobotChunkDataset, indices: list[int], workers: int) -> float:
    """From the first batch on, so without the start of the workers."""
    batches = iter(DataLoader(dataset, BATCH, sampler=indices, num_workers=workers, collate_fn=collate))
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch[0]) for batch in batches)
    return count / (time.perf_counter() - start)


def time_reading(root: Path, resizer: ImageResizer, num_samples: int) -> dict[str, float]:
    figures = {}
    dataset = LeRobotChunkDataset(root, 1, cache_dir=False)
    indices = np.random.default_rng(0).permutation(len(dataset))[:num_samples].tolist()
    for workers in WORKERS:
        figures[f"full images, samples a second, {workers} workers"] = samples_a_second(dataset, indices, workers)
    dataset.resize_images(resizer)
    for workers in WORKERS:
        name = f"{resizer.side} pixels without cache, samples a second, {workers} workers"
        figures[name] = samples_a_second(dataset, indices, workers)
    for workers in WORKERS:
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            dataset = LeRobotChunkDataset(root, 1, cache_dir=cache)
            dataset.resize_images(resizer)
            dataset[indices[0]]
            figures["first sample, seconds"] = time.perf_counter() - start
            for name in ("cache being filled", "cache filled"):
                name = f"{resizer.side} pixels, {name}, samples a second, {workers} workers"
                figures[name] = samples_a_second(dataset, indices, workers)
            stats = [path.stat() for path in Path(cache).iterdir()]
            if num_samples >= len(dataset):
                figures["bytes on disk a frame"] = sum(stat.st_blocks * 512 for stat in stats) / len(dataset)
    return figures


def encode(path: Path, images: list[np.ndarray], fps: float, group: int) -> None:
    """As LeRobot does by default, but for the group."""
    with av.open(str(path), "w") as container:
        options = {"g": str(group), "crf": "30", "preset": "12"}
        stream = container.add_stream("libsvtav1", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def time_groups(root: Path) -> dict[str, float]:
    """Milliseconds to decode a frame of the first camera, in order and at random positions."""
    dataset, figures = LeRobotChunkDataset(root, 1, cache_dir=False), {}
    images = [dataset.image(i) for i in range(min(GROUP_FRAMES, len(dataset)))]
    orders = {"in order": range(len(images)), "at random": np.random.default_rng(0).permutation(len(images)).tolist()}
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUPS:
            path = Path(folder) / f"{group}.mp4"
            encode(path, images, dataset.fps, group)
            file = ImageFile(path, dataset.image_keys[0], len(images), dataset.fps)
            for name, order in orders.items():
                start = time.perf_counter()
                for i in order[:100]:
                    list(file.decode(i, partial(int.__eq__, i)))
                milliseconds = (time.perf_counter() - start) / len(order[:100]) * 1e3
                figures[f"a keyframe every {group} frames, {name}, ms a frame"] = milliseconds
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset_root", type=Path)
    parser.add_argument("--side", type=int, default=96, help="pixels of the resized images (96)")
    parser.add_argument("--samples", type=int, default=1000, help="at most so many are read for each figure (1000)")
    args = parser.parse_args()
    dataset = LeRobotChunkDataset(args.dataset_root, 1, cache_dir=False)
    machine = describe_machine() | {"av": av.__version__, "frames": len(dataset), "fps": dataset.fps}
    machine["cameras"] = ", ".join(f"{width}x{height}" for height, width in dataset.image_sizes.values())
    figures = time_reading(args.dataset_root, ImageResizer(args.side, Resampling.BILINEAR), args.samples)
    write_table(RESULTS / "reading", machine, figures | time_groups(args.dataset_root))


if __name__ == "__main__":
    main()
