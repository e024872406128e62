"""FAST: robot action chunks as short strings of tokens.

A DCT-II over time, scaled and rounded to integers, written frequency by frequency with one symbol per coefficient, and
compressed by byte-pair encoding (Pertsch et al. 2025, "FAST: Efficient Action Tokenization for Vision-Language-Action
Models", arXiv 2501.09747, section V). Works on normalised actions.
"""

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .checks_smolandfast import MAX_NORMALIZED, as_numbers, as_value_error, check_positive, check_whole, in_batches
from .files_smolandfast import HUB_KWARGS, find_file
from .grammar_smolandfast import FIRST_SYMBOL, MAX_CODE_POINT, MAX_SYMBOLS, inverse_dct, read_coefficients

MAX_COEFFICIENT = 2**31
# Merges are learnt from at most so many, evenly spaced chunks: training needs about 100 bytes per coefficient.
MAX_FITTED_CHUNKS = 100_000
MAX_FITTED_COEFFICIENTS = 2**21


class FastActionTokenizer(PreTrainedTokenizerFast):
    """Encodes chunks of continuous actions as FAST tokens and decodes them again. Thread-safe.

    Make one with [`FastActionTokenizer.fit`], or load the official FAST+ with
    `from_pretrained("physical-intelligence/fast")`.

    Args:
        horizon: Actions in a chunk, H. `None` (FAST+): an argument of `decode_actions`.
        action_dim: Dimensions of an action, D. `None` (FAST+): an argument of `decode_actions`.
        scale: Factor on the DCT coefficients before rounding: larger is finer and needs more tokens.
        min_coefficient: Smallest integer coefficient; smaller ones saturate.
        max_coefficient: Largest integer coefficient; larger ones saturate. `None`: the largest with a symbol.
        fit_report: [`FastActionTokenizer.report`] of the chunks it was fitted on. `None`: not fitted (FAST+).

    Raises:
        ValueError: Invalid values, or files of another tokenizer, without `min_coefficient`.
    """

    def __init__(
        self,
        *args,
        horizon: int | None = None,
        action_dim: int | None = None,
        scale: float = 10.0,
        min_coefficient: int | None = None,
        max_coefficient: int | None = None,
        fit_report: dict | None = None,
        **kwargs,
    ):
        if min_coefficient is None:
            raise ValueError(
                "These tokenizer files have no `min_coefficient` (`min_token` in FAST+), so they do not belong to an "
                "action tokenizer. Fit one with FastActionTokenizer.fit(...), or load 'physical-intelligence/fast'."
            )
        check_positive(scale, "scale", "the FAST paper uses 10")
        check_whole(min_coefficient, "min_coefficient", -MAX_COEFFICIENT, MAX_COEFFICIENT)
        for name, value in {"horizon": horizon, "action_dim": action_dim}.items():
            if value is not None:
                check_whole(value, name)
        if (horizon is None) != (action_dim is None):
            raise ValueError(f"horizon is {horizon} and action_dim is {action_dim}: give both, or neither (FAST+).")
        # FAST+ names classes of another repository; `tokenizer_object` holds the vocabulary.
        for name in ("auto_map", "processor_class", "vocab", "merges"):
            kwargs.pop(name, None)
        super().__init__(
            *args,
            horizon=horizon,
            action_dim=action_dim,
            scale=scale,
            min_coefficient=min_coefficient,
            max_coefficient=max_coefficient,
            **kwargs,
        )
        self._set_fit_report(fit_report)
        self.horizon = horizon
        self.action_dim = action_dim
        self.scale = scale
        self.min_coefficient = min_coefficient
        self.is_byte_level = isinstance(self.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        self.first_symbol = 0 if self.is_byte_level else FIRST_SYMBOL
        largest = min_coefficient + (MAX_CODE_POINT if self.is_byte_level else MAX_SYMBOLS - 1)
        max_coefficient = largest if max_coefficient is None else max_coefficient
        if not min_coefficient <= max_coefficient <= largest:
            raise ValueError(
                f"max_coefficient is {max_coefficient}, expected {min_coefficient} (min_coefficient) to {largest} "
                "(the largest with a symbol). Load the tokenizer's saved files again."
            )
        self.max_coefficient = max_coefficient
        tokens = self.convert_ids_to_tokens(list(range(len(self))))
        if self.is_byte_level:
            to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
            self.token_bytes = [bytes(to_byte[character] for character in token) for token in tokens]
        else:
            self.token_bytes = [token.encode("utf-8") for token in tokens]

    @property
    def fit_report(self) -> dict:
        """[`FastActionTokenizer.report`] of the chunks it was fitted on. Raises `ValueError` if it was not fitted."""
        if self._fit_report is None:
            raise ValueError("It was not fitted on your chunks: call tokenizer.report(chunks, action_scale).")
        return self._fit_report

    def _set_fit_report(self, report: dict | None) -> None:
        self._fit_report = report
        if report is not None:
            self.init_kwargs["fit_report"] = report  # saved by Transformers

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "FastActionTokenizer":
        """Load a saved tokenizer, or FAST+, whose options are in its `processor_config.json`.

        Raises:
            ValueError: Damaged files, or those of another tokenizer.
            OSError: No such files, or a Hub that cannot be reached.
        """
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        official_file, vocabulary_file = (
            find_file(pretrained_model_name_or_path, name, **hub_kwargs)
            for name in ("processor_config.json", "tokenizer.json")
        )
        if vocabulary_file is None:
            raise OSError(
                f"{pretrained_model_name_or_path} has no tokenizer.json (offline: none in the cache). Name the folder "
                "of a FastActionTokenizer, or connect."
            )
        with as_value_error(f"The action tokenizer in {pretrained_model_name_or_path}", passing=(ValueError,)):
            official = {} if official_file is None else json.loads(official_file.read_bytes())
            if "min_token" in official:
                kwargs.setdefault("scale", official["scale"])
                kwargs.setdefault("min_coefficient", official["min_token"])
                kwargs.setdefault("horizon", official.get("time_horizon"))
                kwargs.setdefault("action_dim", official.get("action_dim"))
            # Transformers would rebuild the vocabulary for a class with an `__init__`.
            kwargs["tokenizer_object"] = Tokenizer.from_str(vocabulary_file.read_text(encoding="utf-8"))
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def fit(
        cls, chunks: ArrayLike, scale: float = 10.0, vocab_size: int = 1024, action_scale: ArrayLike = 1.0
    ) -> "FastActionTokenizer":
        """Train a tokenizer on normalised action chunks; deterministic.

        Every integer between the smallest and the largest coefficient of all chunks has a symbol; the rest of the
        vocabulary is byte-pair merges, learnt from at most [`MAX_FITTED_CHUNKS`] and [`MAX_FITTED_COEFFICIENTS`].

        Args:
            chunks: `(N, H, D)`, normalised to about [-1, 1], finite.
            scale: See the class.
            vocab_size: Maximum size of the vocabulary, symbols and merges together.
            action_scale: Robot units in one normalised unit, a number or `(D,)`: the unit of the report's errors.

        Returns:
            The tokenizer; its `fit_report` is [`FastActionTokenizer.report`] of the chunks used for the merges.

        Raises:
            ValueError: Wrong shape, values that are not finite, or fewer tokens than symbols.
        """
        chunks = _check_chunks(chunks, "chunks", ("N", "H", "D"))
        check_positive(scale, "scale", "the FAST paper uses 10")
        check_whole(vocab_size, "vocab_size")
        low, high = coefficient_range(chunks, scale, vocab_size)
        num_fitted = max(1, min(len(chunks), MAX_FITTED_CHUNKS, MAX_FITTED_COEFFICIENTS // chunks[0].size))
        chunks = chunks[np.linspace(0, len(chunks) - 1, num_fitted).round().astype(int)]
        backend = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=int(vocab_size),
            initial_alphabet=[chr(FIRST_SYMBOL + k) for k in range(high - low + 1)],
            show_progress=False,
        )
        backend.train_from_iterator(_write_strings(chunks, scale, low), trainer, length=num_fitted)
        options = {"scale": float(scale), "min_coefficient": low, "max_coefficient": high}
        return cls._make(backend, chunks, action_scale, **options)

    def resample(self, chunks: ArrayLike, action_scale: ArrayLike = 1.0) -> "FastActionTokenizer":
        """The same tokens for chunks of the same duration at another control rate.

        An orthonormal DCT of half as many samples has coefficients smaller by a factor of sqrt(2). `scale` compensates
        for it, so that a motion keeps its tokens, and a model what it has learnt of them.

        Args:
            chunks: `(N, H, D)`, normalised: H is the new horizon, and `fit_report` measures these chunks.
            action_scale: See [`FastActionTokenizer.fit`].

        Raises:
            ValueError: Wrong shape, or a tokenizer without a horizon (FAST+).
        """
        if self.horizon is None:
            raise ValueError("This tokenizer serves any horizon (FAST+), so there is nothing to resample. Use it.")
        chunks = _check_chunks(chunks, "chunks", ("N", "H", self.action_dim))
        scale = self.scale * math.sqrt(self.horizon / chunks.shape[1])
        options = {"min_coefficient": self.min_coefficient, "max_coefficient": self.max_coefficient}
        return self._make(self.backend_tokenizer, chunks, action_scale, scale=scale, **options)

    @classmethod
    def _make(cls, backend: Tokenizer, chunks: np.ndarray, action_scale, **options) -> "FastActionTokenizer":
        """A tokenizer of these chunks' shape, with a report on them."""
        horizon, action_dim = chunks.shape[1:]
        tokenizer = cls(tokenizer_object=backend, horizon=int(horizon), action_dim=int(action_dim), **options)
        tokenizer._set_fit_report(tokenizer.report(chunks, action_scale))
        return tokenizer

    def encode_actions(self, actions: ArrayLike) -> list[list[int]]:
        """Encode action chunks as FAST token ids.

        DCT-II over time (orthonormal), times `scale`, rounded half to even, frequency by frequency, then BPE.
        Coefficients outside `[min_coefficient, max_coefficient]` saturate ([`count_saturated`] counts them).

        Args:
            actions: `(batch, horizon, action_dim)`, normalised to about [-1, 1], finite.

        Returns:
            One list of ids in `[0, vocab_size)` for each chunk, of different lengths.

        Raises:
            ValueError: Wrong shape, or a value that is not finite; the message names the first such index.
        """
        return self.encode_coefficients(self._dct_coefficients(actions))

    def encode_coefficients(self, coefficients: Sequence[np.ndarray]) -> list[list[int]]:
        """Encode integer coefficients, one array `(n,)` per string, as FAST token ids; they saturate out of range."""
        symbols = [np.clip(row, self.min_coefficient, self.max_coefficient).astype(np.int64) for row in coefficients]
        texts = [_write_symbols(row - self.min_coefficient + self.first_symbol) for row in symbols]
        return [encoding.ids for encoding in self.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token_coefficients(self, token_id: int) -> np.ndarray:
        """The integer coefficients `(n,)` that one token of a fitted tokenizer stands for."""
        return read_coefficients(self.token_bytes[token_id], self.first_symbol, self.min_coefficient)

    def decode_actions(
        self,
        ids: Sequence[Sequence[int]],
        horizon: int | None = None,
        action_dim: int | None = None,
        relaxed: bool = False,
    ) -> np.ndarray:
        """Decode FAST token ids to action chunks.

        Args:
            ids: For each chunk, ids in `[0, vocab_size)`: lists, or rows of an array or tensor.
            horizon: Actions in a chunk; by default the tokenizer's own.
            action_dim: Dimensions of an action; by default the tokenizer's own.
            relaxed: Accept any string: extra coefficients are dropped, missing ones are zero, invalid UTF-8 is
                skipped, and coefficients out of range saturate.

        Returns:
            `(batch, horizon, action_dim)` float64, normalised.

        Raises:
            ValueError: An id outside the vocabulary, or, unless `relaxed`, a coefficient out of range, or a string
                that does not hold exactly `horizon * action_dim` coefficients.
        """
        horizon = self.horizon if horizon is None else horizon
        action_dim = self.action_dim if action_dim is None else action_dim
        if horizon is None or action_dim is None:
            raise ValueError("FAST+ has no chunk shape: call decode_actions(ids, horizon=..., action_dim=...).")
        if (self.horizon, self.action_dim) not in ((None, None), (horizon, action_dim)):
            raise ValueError(
                f"Asked for chunks of shape ({horizon}, {action_dim}), but this tokenizer was fitted for "
                f"({self.horizon}, {self.action_dim}). Fit a tokenizer for the other shape."
            )
        chunks, size = [], horizon * action_dim
        for i, row in enumerate(ids):
            values = self._read_coefficients(row, i, relaxed)
            if values.size != size and not relaxed:
                raise ValueError(
                    f"ids[{i}] holds {values.size} coefficients, expected horizon * action_dim = {horizon} * "
                    f"{action_dim} = {size}. The model's own generate() writes only whole chunks."
                )
            chunks.append(np.zeros(size))
            chunks[i][: values.size] = values[:size]
        return inverse_dct((np.array(chunks) / self.scale).reshape(-1, horizon, action_dim))

    def _read_coefficients(self, ids: Sequence[int], index: int, relaxed: bool) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            kind = f"shape {ids.shape} and dtype {ids.dtype}"
            raise ValueError(
                f"ids[{index}] has {kind}, expected a list: decode_actions takes a batch of lists of ids."
            )
        outside = ids[(ids < 0) | (ids >= len(self.token_bytes))]
        if outside.size:
            raise ValueError(f"ids[{index}] holds {outside[0]}, expected FAST ids in [0, {len(self.token_bytes)}).")
        try:
            string, errors = b"".join([self.token_bytes[i] for i in ids]), "ignore" if relaxed else "strict"
            coefficients = read_coefficients(string, self.first_symbol, self.min_coefficient, errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"ids[{index}] is not a valid FAST string: its bytes are not UTF-8 ({error.reason} at byte "
                f"{error.start}). Pass strings of encode_actions or of the model's own generate()."
            ) from error
        if relaxed:
            return np.clip(coefficients, self.min_coefficient, self.max_coefficient)
        outside = coefficients[(coefficients < self.min_coefficient) | (coefficients > self.max_coefficient)]
        if outside.size:
            raise ValueError(
                f"ids[{index}] holds the coefficient {outside[0]}, expected {self.min_coefficient} to "
                f"{self.max_coefficient}. Pass strings of encode_actions or of the model's own generate()."
            )
        return coefficients

    def count_saturated(self, actions: ArrayLike) -> np.ndarray:
        """The number of coefficients in each chunk that `encode_actions` saturates: `(batch,)`."""
        coefficients = self._dct_coefficients(actions)
        return ((coefficients < self.min_coefficient) | (coefficients > self.max_coefficient)).sum(axis=1)

    def report(self, actions: ArrayLike, action_scale: ArrayLike = 1.0) -> dict:
        """Measure how well the tokenizer represents these chunks, in robot units.

        Args:
            actions: `(batch, horizon, action_dim)`, normalised.
            action_scale: Robot units in one normalised unit, a number or `(action_dim,)`.

        Returns:
            `num_chunks`, `vocab_size`; `tokens_mean`, `tokens_p99`, `tokens_max` per chunk; `rmse`, `rmse_by_dim` and
            `max_error` between actions and their decoded tokens; `clip_rate`, the share of saturated coefficients;
            `clipped_values_by_dim`, the share of values outside (-2, 2), where quantile normalisation clips;
            `vocab_used`, the share of the vocabulary that occurs.
        """
        actions = _check_chunks(actions, "actions", self._chunk_shape())
        action_scale = as_numbers(action_scale, "action_scale")
        if action_scale.shape not in ((), actions.shape[2:]):
            raise ValueError(
                f"action_scale has shape {action_scale.shape}, expected a number or {actions.shape[2:]}, one for each "
                "dimension of the action. Pass Normalizer.action_scale."
            )
        lengths, used, max_error, num_saturated = [], set(), 0.0, 0
        squares, num_clipped = np.zeros(actions.shape[2]), np.zeros(actions.shape[2])
        for rows in in_batches(len(actions), actions[0].size):
            batch = actions[rows].astype(np.float64)
            ids = self.encode_actions(batch)
            errors = (self.decode_actions(ids, *batch.shape[1:]) - batch) * action_scale
            lengths += map(len, ids)
            used.update(*ids)
            squares += (errors**2).sum(axis=(0, 1))
            max_error = max(max_error, np.abs(errors).max())
            num_saturated += self.count_saturated(batch).sum()
            num_clipped += (np.abs(batch) >= MAX_NORMALIZED).sum(axis=(0, 1))
        num_values = len(actions) * actions.shape[1]  # per dimension
        return {
            "num_chunks": len(lengths),
            "vocab_size": len(self),
            "tokens_mean": float(np.mean(lengths)),
            "tokens_p99": float(np.percentile(lengths, 99)),
            "tokens_max": max(lengths),
            "rmse": float(np.sqrt((squares / num_values).mean())),
            "rmse_by_dim": np.sqrt(squares / num_values).tolist(),
            "max_error": float(max_error),
            "clip_rate": float(num_saturated / actions.size),
            "clipped_values_by_dim": (num_clipped / num_values).tolist(),
            "vocab_used": float(len(used) / len(self)),
        }

    def token_grammar(self, num_coefficients: int) -> dict[str, list]:
        """The field of `SmolAndFastConfig` that describes the tokens to constrained decoding.

        Fitted: `fast_token_lengths`, the coefficients of each token. Byte-level (FAST+): `fast_token_bytes`, the UTF-8
        bytes of each token in hexadecimal, since a token may begin or end inside a character.

        Args:
            num_coefficients: Coefficients in a chunk, H * D. Longer byte-level tokens are `None`: FAST+ has tokens of
                over 1,500 coefficients.
        """
        if not self.is_byte_level:
            return {"fast_token_lengths": [len(token.decode("utf-8")) for token in self.token_bytes]}
        fits = [len(token.decode("utf-8", errors="ignore")) <= num_coefficients for token in self.token_bytes]
        pairs = zip(self.token_bytes, fits, strict=True)
        return {"fast_token_bytes": [token.hex() if fit else None for token, fit in pairs]}

    def _dct_coefficients(self, actions: ArrayLike) -> np.ndarray:
        return _dct_coefficients(as_numbers(actions, "actions", self._chunk_shape(), keep_floats=True), self.scale)

    def _chunk_shape(self) -> tuple:
        return "batch", self.horizon or "horizon", self.action_dim or "action_dim"


def _check_chunks(chunks: ArrayLike, name: str, shape: tuple) -> np.ndarray:
    chunks = as_numbers(chunks, name, shape, keep_floats=True)
    if chunks.size == 0:
        raise ValueError(f"{name} has shape {chunks.shape}: pass at least one (H, D) chunk.")
    return chunks


def coefficient_range(chunks: np.ndarray, scale: float, vocab_size: int) -> tuple[int, int]:
    """The smallest and the largest coefficient of chunks `(N, H, D)`, normalised.

    Raises:
        ValueError: They need more symbols than the vocabulary has.
    """
    extremes = []
    for rows in in_batches(len(chunks), chunks[0].size):
        coefficients = _dct_coefficients(chunks[rows], scale).reshape(-1, chunks.shape[2])  # (B, H*D) -> (B*H, D)
        extremes.append((coefficients.min(axis=0), coefficients.max(axis=0)))
    lows, highs = np.min([low for low, _ in extremes], axis=0), np.max([high for _, high in extremes], axis=0)
    low, high = int(lows.min()), int(highs.max())
    num_symbols = high - low + 1
    if num_symbols > min(vocab_size, MAX_SYMBOLS):
        widest = int(np.argmax(np.maximum(-lows, highs)))
        smallest, largest = chunks[..., widest].min(), chunks[..., widest].max()
        if max(-smallest, largest) > MAX_NORMALIZED:
            fix = "Normalise it to about [-1, 1] with Normalizer.normalize_actions."
        elif num_symbols > MAX_SYMBOLS:
            fix = f"Use a scale below {scale}."
        else:
            fix = f"Use a scale below {scale}, or a vocab_size of {num_symbols} and more."
        raise ValueError(
            f"The coefficients run from {low} to {high}: {num_symbols} symbols, more than the vocabulary of "
            f"{min(vocab_size, MAX_SYMBOLS)}. The largest is in the action's dimension {widest}, whose normalised "
            f"values run from {smallest:.4g} to {largest:.4g}. {fix}"
        )
    return low, high


def _write_strings(chunks: np.ndarray, scale: float, min_coefficient: int) -> Iterator[str]:
    """The string of symbols of each chunk."""
    for rows in in_batches(len(chunks), chunks[0].size):
        coefficients = _dct_coefficients(chunks[rows], scale).astype(np.int64)
        yield from map(_write_symbols, coefficients - min_coefficient + FIRST_SYMBOL)


def _dct_coefficients(actions: np.ndarray, scale: float) -> np.ndarray:
    """Rounded, unclipped coefficients, low frequencies first: `(B, H, D) -> (B, H*D)`."""
    coefficients = np.around(dct(actions.astype(np.float64), axis=1, norm="ortho") * scale)
    if not np.isfinite(coefficients).all():
        raise ValueError(
            f"actions go up to {np.abs(actions).max():.3g} and overflow the DCT. Normalise them to about [-1, 1]."
        )
    return coefficients.reshape(len(actions), actions.shape[1] * actions.shape[2])


def _write_symbols(code_points: np.ndarray) -> str:
    """`(N,)` code points -> a string of N characters."""
    return code_points.astype("<u4").tobytes().decode("utf-32-le")


FastActionTokenizer.register_for_auto_class("AutoTokenizer")
