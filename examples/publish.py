"""Publish a policy on the Hub as a complete model repository, with a card of measured results.

    python examples/publish.py --checkpoint checkpoints/pusht-tiny --repo_id user/name \\
        --metrics benchmarks/results/pusht_tiny_500_episodes.json --contact_sheet assets/rollouts.png

Log in with `hf auth login` first. `--output_dir` writes the repository to a folder instead of uploading it. If the
upload breaks off, run the same command again.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
from envs import BENCHMARKS, Benchmark
from evaluate import check_checkpoint, first_line, load_benchmark, load_policy
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects, httpx, validate_repo_id  # httpx: httpx2 since release 2.0
from model_card import CardFacts, read_metrics, read_trainer_state, write_card
from transformers.dynamic_module_utils import custom_object_save

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.files_smolandfast import atomic_write, check_new_folder
from smolandfast.training import find_checkpoints

ROOT = Path(__file__).resolve().parents[1]
STATE = "trainer_state.json"
# The optimizer, the random state and pickled arguments are not published.
MODEL_FILES = ("SHA256SUMS", "*.safetensors", "*.json", "*.jinja")
# Files of an earlier upload that would be loaded instead of the new ones. All other files on the Hub stay.
REPLACED_FILES = ["SHA256SUMS", "model*.safetensors", "model*.safetensors.index.json"]


def collect_repository(checkpoint: Path, folder: Path) -> tuple[SmolAndFastForActionPrediction, SmolAndFastProcessor]:
    """Copy the model's files into a new folder, add the code that `trust_remote_code` loads, and load the policy.

    Raises:
        OSError, ValueError: See [`load_policy`].
    """
    (folder / "action_tokenizer").mkdir(parents=True)
    for pattern in MODEL_FILES:
        for path in (*checkpoint.glob(pattern), *checkpoint.glob(f"action_tokenizer/{pattern}")):
            if path.name != STATE:
                shutil.copyfile(path, folder / path.relative_to(checkpoint))
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    model, processor = load_policy(folder)  # the copy, so that what is published is known to load
    custom_object_save(model, folder)
    custom_object_save(processor, folder)
    custom_object_save(processor.action_tokenizer, folder / "action_tokenizer")
    return model, processor


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload the folder to a repository on the Hub, which is created if needed. Returns the URL of the commit.

    One commit, so that nobody loads half an upload; `HfApi.upload_folder` may split it into several.

    Raises:
        OSError: No right to write there, or the connection broke; the message says what to do next.
        ValueError: The Hub refuses the card.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        others = [name for name in api.list_repo_files(repo_id) if "/" not in name and name not in names]
        replaced = filter_repo_objects(others, allow_patterns=REPLACED_FILES)
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        operations += [CommitOperationDelete(name) for name in replaced]
        return api.create_commit(repo_id, operations, commit_message="Upload policy").commit_url
    except (httpx.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of one file; its cause says why
        raise OSError(
            f"The upload to {repo_id} failed: {first_line(error)} {error.__cause__ or ''} If you may not write "
            "there, log in with `hf auth login` or choose another --repo_id. Run the same command again: files that "
            "have arrived are not sent again."
        ) from error


def find_training(checkpoint: Path, state_path: Path | None) -> tuple[dict | None, int | None]:
    """The trainer's state, and the training step of the checkpoint's weights.

    A `checkpoint-*` folder has its own state. The folder around several of them holds the weights that scored best.
    """
    own = checkpoint / STATE
    if state_path is None and own.is_file():
        state = read_trainer_state(own)
        return state, state["global_step"]
    checkpoints = find_checkpoints(checkpoint)
    if state_path is None and not checkpoints:
        return None, None
    state = read_trainer_state(state_path or checkpoints[-1] / STATE)
    return state, state.get("best_global_step") or state["global_step"]


def write_repository(args: argparse.Namespace, benchmark: Benchmark, folder: Path) -> None:
    """Write the complete repository into a new folder, and print what its card lacks."""
    metrics = read_metrics(args.metrics, benchmark)
    trainer_state, kept_step = find_training(Path(args.checkpoint), args.trainer_state)
    rollouts = args.metrics.with_name("rollouts.png")
    contact_sheet = args.contact_sheet or (rollouts if rollouts.is_file() else None)
    model, processor = collect_repository(Path(args.checkpoint), folder)
    options = {name: getattr(args, name) for name in ("license", "datasets", "base_model")}
    facts = CardFacts(metrics, trainer_state, kept_step, contact_sheet, **options)
    write_card(folder, args.repo_id, benchmark, model, processor, facts)
    if trainer_state is None:
        print("The card has no training curve: give --trainer_state.")
    if contact_sheet is None:
        print("The card has no image of the rollouts: give --contact_sheet.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Publish a policy on the Hub, with a measured model card.")
    parser.add_argument("--checkpoint", required=True, help="folder that train.py or export_checkpoint.py wrote")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="pusht", help="the benchmark it plays (pusht)")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json that evaluate.py wrote")
    parser.add_argument("--contact_sheet", type=Path, help="image of the rollouts (rollouts.png next to the metrics)")
    parser.add_argument("--trainer_state", type=Path, help="trainer_state.json for the curve (the checkpoint's)")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--datasets", nargs="+", default=[], help="Hub ids of the demonstrations")
    parser.add_argument("--base_model", help="Hub id of the model that training started from, if any")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--output_dir", type=Path, help="new folder for the repository, instead of an upload")
    args = parser.parse_args(argv)
    benchmark = load_benchmark(parser, args.benchmark)
    check_checkpoint(parser, args, benchmark)
    if not Path(args.checkpoint).is_dir():
        parser.error(f"--checkpoint {args.checkpoint} is not a folder. Download it first: `hf download`.")
    if args.repo_id.count("/") != 1:
        parser.error(f"--repo_id is {args.repo_id!r}, expected user/name.")
    try:
        validate_repo_id(args.repo_id)
        if args.output_dir is not None:
            check_new_folder(args.output_dir)
            with atomic_write(args.output_dir) as folder:
                write_repository(args, benchmark, folder)
            print(f"The repository is in {args.output_dir}; nothing was uploaded.")
            return
        with tempfile.TemporaryDirectory() as folder:
            write_repository(args, benchmark, Path(folder) / "repository")
            print(f"Published: {upload(Path(folder) / 'repository', args.repo_id, args.private)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
