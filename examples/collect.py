"""Collect demonstrations of a benchmark's scripted expert as a LeRobot v3.0 data set.

    python examples/collect.py --benchmark metaworld --output_dir outputs/metaworld --episodes 50
    python examples/collect.py --benchmark so101 --output_dir outputs/so101 --scenes 10000

What is demonstrated, and its options, is in `envs/<benchmark>/demonstrations.py`. Finished parts are kept in
`<output_dir>.parts`, which may be deleted once the data set is complete. The same command continues after an
interruption, and more `--episodes` or `--scenes` add to the demonstrations. An existing data set is never overwritten:
rename it first.

Rendering takes most of the time. With `--draw_every 4`, every fourth step is rendered and its image is repeated in the
steps between; train on it with `--sample_every 4`.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import interrupt  # noqa: F401 - before the slow imports
import numpy as np
from evaluate import (
    check_counts,
    error_line,
    find_backend,
    find_checkpoint,
    load_checked,
    map_in_processes,
    parse_with_part,
    write_json,
)
from lerobot_writer import write_dataset
from tqdm import tqdm

from smolandfast.files_smolandfast import atomic_write, check_new_folder, check_output_dir, read_json

BENCHMARKS = ("metaworld", "so101")  # that have an expert


def write_part(name: str, demonstrations: Any, folder: Path) -> None:
    """Play one part, and write its episodes to a file."""
    arrays = {
        f"{i}/{key}": values for i, episode in enumerate(demonstrations.play(name)) for key, values in episode.items()
    }
    with atomic_write(folder / f"{name}.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_part(path: Path, image_keys: tuple[str, ...], draw_every: int) -> Iterator[dict]:
    """The episodes of a file, with images that are repeated up to the next one."""
    episodes: dict[str, dict] = {}
    with np.load(path) as arrays:
        for name, values in arrays.items():
            number, _, key = name.partition("/")
            episodes.setdefault(number, {})[key] = values
    for episode in episodes.values():
        shown = np.arange(len(episode["action"])) // draw_every
        yield episode | {"task": str(episode["task"])} | {key: episode[key][shown] for key in image_keys}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True, help="whose expert plays")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--draw_every", type=int, help="steps from one image to the next (metaworld: 1, so101: 8)")
    parser.add_argument("--policy", help="checkpoint of a policy that plays until the expert takes over")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count(), help="(all cores)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args, benchmark, demonstrations_class = parse_with_part(parser, argv, BENCHMARKS, "Demonstrations")
    check_counts(parser, args, draw_every=1, num_processes=1, **demonstrations_class.counts)
    if args.policy is not None:
        find_checkpoint(parser, args, "policy")
        load_checked(parser, benchmark, args.policy, "policy", backend=find_backend(args.policy))
    demonstrations = demonstrations_class(args)
    folder = args.output_dir.with_name(args.output_dir.name + ".parts")
    with error_line(parser, "--output_dir: "):
        check_new_folder(args.output_dir)
        check_output_dir(folder, ["options.json", "*.npz", ".*"])  # the last are unfinished files
        folder.mkdir(parents=True, exist_ok=True)
    options = {"benchmark": args.benchmark, "draw_every": args.draw_every, **demonstrations.options}
    path = folder / "options.json"
    if not path.exists():
        write_json(path, options)
    elif read_json(path) != options:
        parser.error(f"{folder} was begun with {read_json(path)}, now it is {options}. Name another --output_dir.")
    paths = {name: folder / f"{name}.npz" for name in demonstrations.parts}
    missing = sorted(name for name in paths if not paths[name].exists())  # by task: loading a scene takes seconds
    read = partial(read_part, image_keys=benchmark.image_keys, draw_every=args.draw_every)
    bar = partial(tqdm, total=len(paths), unit="part")
    try:
        with error_line(parser):
            write = partial(write_part, demonstrations=demonstrations, folder=folder)
            for _ in bar(map_in_processes(args.num_processes, write, missing), initial=len(paths) - len(missing)):
                pass
            episodes = (episode for path in bar(paths.values()) for episode in read(path))
            info = write_dataset(args.output_dir, episodes, **demonstrations.dataset)
    except KeyboardInterrupt:
        parser.exit(130, f"\nInterrupted. {folder} keeps what is finished: run the same command again.\n")
    print(f"{info['total_episodes']} demonstrations, {info['total_frames']} frames in {args.output_dir}")


if __name__ == "__main__":
    main()
