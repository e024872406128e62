"""FAST strings: which token may follow, and the numbers that a complete string stands for.

Needs only NumPy, so that a deployed policy (`deployment/runtime.py`) shares it with the processor and `generate()`.
"""

import numpy as np

# A fitted tokenizer writes coefficient c as the character FIRST_SYMBOL + c - min_coefficient, in Unicode's private
# plane 15, which normalizers and pre-tokenizers leave unchanged.
FIRST_SYMBOL = 0xF0000
MAX_SYMBOLS = 0xFFFE
# The official FAST+ tokenizer writes it as chr(c - min_coefficient); UTF-8 cannot encode the surrogates from 0xD800.
MAX_CODE_POINT = 0xD7FF
MAX_SYMBOL_BYTES = 3  # of these code points in UTF-8

# Per state, the bytes that may follow, as (first, last, next state); in state 0 a new character begins. From the
# Unicode standard, table 3-7, limited to code points up to MAX_CODE_POINT.
UTF8_STATES = (
    ((0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 3), (0xE1, 0xEC, 2), (0xED, 0xED, 4)),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
)
INVALID = -1


def grammar_tables(
    num_coefficients: int, token_lengths: list[int] | None, token_bytes: list[str | None] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """The automaton that accepts the strings of one chunk.

    Args:
        num_coefficients: Coefficients in a chunk, `chunk_size * action_dim`.
        token_lengths: `fast_token_lengths` of the configuration, or None.
        token_bytes: `fast_token_bytes` of the configuration, used if there are no lengths. A token may begin or end
            inside a character, so the states are those of a UTF-8 decoder.

    Returns:
        `started` `(num_action_tokens,)`, the coefficients that begin inside each token; `next_state`
        `(num_states, num_action_tokens)`, the state after a token, -1 where it must not follow; and the length of the
        longest string.

    Raises:
        ValueError: Some chunk cannot be written with these tokens.
    """
    if token_lengths is not None:
        started = np.array(token_lengths, dtype=np.int64)
        next_state, max_new_tokens = np.zeros((1, len(started)), dtype=np.int64), num_coefficients
    else:
        too_long = b"\0" * (num_coefficients + 1)
        tokens = [too_long if token is None else bytes.fromhex(token) for token in token_bytes]
        if not {bytes([byte]) for byte in range(256)} <= set(tokens):
            raise ValueError("fast_token_bytes lacks single bytes, so not every chunk can be written.")
        started = np.array([sum(byte & 0xC0 != 0x80 for byte in token) for token in tokens], dtype=np.int64)
        next_state = np.array([[_read_bytes(state, token) for token in tokens] for state in range(len(UTF8_STATES))])
        max_new_tokens = MAX_SYMBOL_BYTES * num_coefficients
    if not (started == 1).any():
        raise ValueError("No action token stands for a single coefficient, so not every chunk can be written.")
    return started, next_state, max_new_tokens


def _read_bytes(state: int, token: bytes) -> int:
    for byte in token:
        state = next((after for first, last, after in UTF8_STATES[state] if first <= byte <= last), INVALID)
        if state == INVALID:
            break
    return state


def read_coefficients(string: bytes, first_symbol: int, min_coefficient: int, errors: str = "strict") -> np.ndarray:
    """The coefficients `(n,)` that the bytes of a string stand for; raises `UnicodeDecodeError`."""
    symbols = np.frombuffer(string.decode(errors=errors).encode("utf-32-le"), dtype="<u4").astype(np.int64)
    return symbols - first_symbol + min_coefficient


def inverse_dct(coefficients: np.ndarray) -> np.ndarray:
    """The orthonormal DCT-III over time: `(B, H, D) -> (B, H, D)` float64.

    It sums over the frequencies in order, so the bits do not depend on the batch or on a BLAS library.
    """
    horizon = coefficients.shape[1]
    times = (2 * np.arange(horizon) + 1) * np.pi / (2 * horizon)
    actions = np.repeat(coefficients[:, :1] * np.sqrt(1 / horizon), horizon, axis=1)
    for frequency in range(1, horizon):
        wave = np.sqrt(2 / horizon) * np.cos(frequency * times)
        actions += coefficients[:, frequency, None] * wave[:, None]
    return actions
