"""Publish a PushT policy on the hub as a whole model repository, with a card written from what was measured.

    python examples/push_to_hub.py --checkpoint checkpoints/pusht-tiny --repo_id user/name \\
        --metrics benchmarks/results/pusht_tiny_200_episodes.json --contact_sheet assets/rollouts.png

Log in with `hf auth login` first. With `--output_dir`, the repository is written there, to be looked at, and nothing
is uploaded. Everything goes into one commit: a broken connection leaves the hub's repository as it was, and the same
command again completes it, without sending what has arrived.
"""

import argparse
import shutil
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from eval_pusht import check_checkpoint, first_line, load_policy
from export_checkpoint import imported_modules
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, validate_repo_id  # httpx: httpx2 since release 2.0
from model_card import read_metrics, read_trainer_state, write_card

from smolandfast.trainer_smolandfast import find_checkpoints

ROOT = Path(__file__).resolve().parents[1]
# What a checkpoint folder holds of the model. The optimizer, the random state and pickled arguments stay at home.
MODEL_FILES = ["SHA256SUMS", "*.safetensors", "*.json", "*.jinja", "*.py"]
TRAINING_FILES = ["trainer_state.json"]
# Files of an earlier upload that would be read in place of the new ones. Whatever else is there stays.
REPLACED_FILES = ["SHA256SUMS", "*.safetensors", "*.safetensors.index.json"]


def collect_repository(checkpoint: Path, folder: Path) -> None:
    """Copy the model's files into a new folder; links become files, since the hub has none.

    Raises:
        OSError: a code file is missing.
    """
    folder.mkdir(parents=True)
    for source in sorted([*checkpoint.glob("*"), *checkpoint.glob("action_tokenizer/*")]):
        name = source.relative_to(checkpoint).as_posix()
        if source.is_file() and _matches(name, MODEL_FILES) and name not in TRAINING_FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    # Loading would not notice: Transformers keeps copies of the code that it has seen before.
    for path in folder.glob("*.py"):
        for needed in imported_modules(path):
            if not (folder / f"{needed}.py").is_file():
                raise FileNotFoundError(
                    f"{path.name} in {checkpoint} needs {needed}.py, which is not there. Save the checkpoint again "
                    "with save_pretrained, or copy the file from the project's root."
                )


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Put the folder's files into the hub's repository, in one commit, and take weights away that are not among them.

    `HfApi.upload_folder` may cut an upload into several commits; one commit means that nobody ever loads a half.

    Returns:
        The URL of the commit.

    Raises:
        OSError: no right to write there, or the connection broke; the message says the mend.
        ValueError: the hub refuses the card.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        old = [name for name in api.list_repo_files(repo_id) if _matches(name, REPLACED_FILES)]
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        operations += [CommitOperationDelete(name) for name in old if name not in names and "/" not in name]
        return api.create_commit(repo_id, operations, commit_message="Upload policy").commit_url
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise OSError(
                f"The hub does not let you write to {repo_id}: {first_line(error)} Log in with `hf auth login` and a "
                "token that may write there, or name another --repo_id."
            ) from error
        raise OSError(f"{_broken(repo_id)} The hub said: {first_line(error)}") from error
    except (httpx.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of one file's upload; its cause says why
        raise OSError(f"{_broken(repo_id)} The reason: {first_line(error)} {error.__cause__ or ''}") from error


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _broken(repo_id: str) -> str:
    return (
        f"The upload to {repo_id} broke off. Nothing there is half: it holds what it held before, or, if only the "
        "hub's answer was lost, all of the new. Run the same command again: files that have arrived are not sent "
        "again."
    )


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Publish a PushT policy on the hub, with a measured model card.")
    parser.add_argument("--checkpoint", required=True, help="folder that train_pusht.py or export_checkpoint.py wrote")
    parser.add_argument("--repo_id", required=True, help="user/name on the hub; made if it is not there")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json that eval_pusht.py wrote")
    parser.add_argument(
        "--contact_sheet", type=Path, help="picture of the rollouts (rollouts.png beside the metrics, if there)"
    )
    parser.add_argument(
        "--trainer_state", type=Path, help="trainer_state.json for the training curve (the checkpoint's, if there)"
    )
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--datasets", nargs="+", default=["lerobot/pusht"], help="hub ids of the demonstrations")
    parser.add_argument("--base_model", help="hub id of the model that training started from, if from one")
    parser.add_argument("--private", action="store_true", help="whether a new repository is private")
    parser.add_argument("--output_dir", type=Path, help="new folder for the repository, instead of an upload")
    args = parser.parse_args(argv)
    check_checkpoint(parser, args)
    if not Path(args.checkpoint).is_dir():
        parser.error(f"--checkpoint {args.checkpoint} is not a folder. Download it first: `hf download`.")
    try:
        validate_repo_id(args.repo_id)
        is_whole = args.repo_id.count("/") == 1
    except ValueError:
        is_whole = False
    if not is_whole:
        parser.error(f"--repo_id is {args.repo_id!r}, expected user/name in letters, digits, '-', '_' and '.'.")
    if args.output_dir is not None and args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} is there already, and is not overwritten. Name another folder.")
    return parser, args


def find_training(checkpoint: Path, given: Path | None) -> tuple[dict | None, int | None]:
    """The trainer's state and the step whose weights the checkpoint holds.

    A `checkpoint-*` folder has the state of its own step. The folder around them holds the weights that played best.
    """
    own = checkpoint / "trainer_state.json"
    if given is None and own.is_file():
        state = read_trainer_state(own)
        return state, state["global_step"]
    if given is None:
        checkpoints = find_checkpoints(checkpoint)
        if not checkpoints:
            return None, None
        given = checkpoints[-1] / "trainer_state.json"
    state = read_trainer_state(given)
    return state, state.get("best_global_step") or state["global_step"]


def write_repository(args: argparse.Namespace, folder: Path) -> None:
    """Put up the whole repository in a new folder, and say what its card lacks."""
    checkpoint = Path(args.checkpoint)
    metrics = read_metrics(args.metrics)
    trainer_state, kept_step = find_training(checkpoint, args.trainer_state)
    beside = args.metrics.with_name("rollouts.png")
    contact_sheet = args.contact_sheet or (beside if beside.is_file() else None)
    collect_repository(checkpoint, folder)
    # What is published is what loads: the copy, with its own code.
    model, processor = load_policy(folder)
    write_card(
        folder,
        args.repo_id,
        model,
        processor,
        metrics=metrics,
        trainer_state=trainer_state,
        kept_step=kept_step,
        contact_sheet=contact_sheet,
        license=args.license,
        datasets=args.datasets,
        base_model=args.base_model,
    )
    if trainer_state is None:
        print("The card has no training curve: give --trainer_state.")
    if contact_sheet is None:
        print("The card has no picture of the rollouts: give --contact_sheet.")


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    try:
        if args.output_dir is not None:
            write_repository(args, args.output_dir)
            print(f"The repository is in {args.output_dir}; nothing was uploaded.")
            return
        with tempfile.TemporaryDirectory() as folder:
            write_repository(args, Path(folder) / "repository")
            print(f"Published: {upload(Path(folder) / 'repository', args.repo_id, args.private)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
