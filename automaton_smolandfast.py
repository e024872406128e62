"""Byte-pair encoding of many strings at once, by a finite automaton.

A string's encoding is the one sequence of tokens in which every two neighbours are what byte-pair encoding makes of
the two alone. So one can read a string from left to right and know after each symbol the last token of what has been
read so far. All one has to keep in mind is which tokens may still be under way, and whether the token before them goes
with them. For the vocabulary of a fitted FAST tokenizer there are some thousands of such memories: the states of an
automaton. NumPy then reads all strings of a batch together, one table look-up a symbol, and collects the tokens from
the strings' ends.

The test for neighbours is that of the Rust crate `bpe` (Antoniadis and Neubeck 2024, "So many tokens, so little time",
github.blog): undo the merges across the seam, latest first, and look for an earlier one that joins the two sides.
"""

import numpy as np

NONE = -1


class BpeAutomaton:
    """The automaton of one vocabulary. Building it takes half a second for 1,024 tokens, and memory with their square.

    Args:
        num_symbols: Tokens `[0, num_symbols)` are single symbols.
        merges: `(left, right)`: merge r makes token `num_symbols + r`, and lower r goes first.

    Raises:
        ValueError: Some string has not exactly one such sequence of tokens, so the vocabulary is no plain one.
    """

    def __init__(self, num_symbols: int, merges: list[tuple[int, int]]):
        self._spelled = [[symbol] for symbol in range(num_symbols)]
        for left, right in merges:
            self._spelled.append(self._spelled[left] + self._spelled[right])
        self._lengths = np.array([len(symbols) for symbols in self._spelled])
        self._num_symbols = num_symbols
        # The last row is the start of a string, where any token may stand.
        self._may_follow = np.pad(_find_neighbours(num_symbols, merges), ((0, 1), (0, 0)), constant_values=True)
        self._grow_tree()
        self._next_state, self._last_token = self._find_states()

    def encode(self, symbols: np.ndarray) -> list[list[int]]:
        """Encode strings of one length: `(batch, length)` symbols -> a list of tokens for each."""
        batch_size, length = symbols.shape
        states, state = np.empty((length, batch_size), np.int32), np.zeros(batch_size, np.int64)
        for i, column in enumerate(np.ascontiguousarray(symbols.T)):
            state = states[i] = self._next_state[state, column]
        last_tokens, rows = self._last_token[states], np.arange(batch_size)
        tokens, end = [], np.full(batch_size, length - 1)
        while (end >= 0).any():
            tokens.append(np.where(end >= 0, last_tokens[end, rows], NONE))
            end -= self._lengths[tokens[-1]] * (end >= 0)
        tokens = np.stack(tokens[::-1], axis=1)  # (batch, most tokens), padded on the left
        ends = np.cumsum((tokens != NONE).sum(axis=1)).tolist()
        flat = tokens[tokens != NONE].tolist()
        return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _grow_tree(self) -> None:
        """The prefixes of all tokens as a tree, and for each what may become of it after which token."""
        self._children, self._token_at, parents = [{}], [NONE], [NONE]
        for token, spelled in enumerate(self._spelled):
            node = 0
            for symbol in spelled:
                if symbol not in self._children[node]:
                    self._children[node][symbol] = len(self._children)
                    self._children.append({})
                    self._token_at.append(NONE)
                    parents.append(node)
                node = self._children[node][symbol]
            self._token_at[node] = token
        # A set of tokens is known by the sum of its members' random numbers: `_outlook[node, token]` stands for the
        # tokens that go on from this node and may follow this token. 0 is the empty set.
        marks = np.random.default_rng(0).integers(1, 2**63, len(self._spelled), dtype=np.uint64)
        self._outlook = np.zeros((len(parents), len(self._spelled) + 1), np.uint64)
        for node in range(len(parents) - 1, 0, -1):  # children have larger numbers than their parents
            self._outlook[parents[node]] += self._outlook[node]
            if (token := self._token_at[node]) != NONE:
                self._outlook[parents[node]] += self._may_follow[:, token] * marks[token]

    def _find_states(self) -> tuple[np.ndarray, np.ndarray]:
        """Walk through all states that some string leads to, from the start of a string.

        Returns:
            The next state after each state and symbol, `(states, symbols)`, and the last token of what was read,
            `(states,)`.
        """
        # A state: the nodes of tokens that may be under way, each with the token before it; and the last token.
        states, numbers, rows = [], {}, []

        def number(under_way: tuple[tuple[int, int], ...], last: int) -> int:
            outlooks = tuple((node, int(self._outlook[node, before])) for node, before in under_way)
            if (outlooks, last) not in numbers:
                numbers[outlooks, last] = len(states)
                states.append((under_way, last))
            return numbers[outlooks, last]

        number((), len(self._spelled))
        after_token_alone = {}
        while len(rows) < len(states):
            under_way, last = states[len(rows)]
            going_on = set().union(*(self._children[node] for node, _ in under_way))
            row = []
            for symbol in range(self._num_symbols):
                if symbol in going_on:
                    row.append(number(*self._read(symbol, (*under_way, (0, last)))))
                    continue
                if (last, symbol) not in after_token_alone:  # most states are alike here
                    after_token_alone[last, symbol] = number(*self._read(symbol, ((0, last),)))
                row.append(after_token_alone[last, symbol])
            rows.append(row)
        return np.array(rows, np.int32), np.array([last for _, last in states], np.int32)

    def _read(self, symbol: int, under_way: tuple[tuple[int, int], ...]) -> tuple[tuple[tuple[int, int], ...], int]:
        nodes = [(self._children[node].get(symbol), before) for node, before in under_way]
        nodes = [(node, before) for node, before in nodes if node is not None]
        tokens = [(self._token_at[node], before) for node, before in nodes]
        ended = [token for token, before in tokens if token != NONE and self._may_follow[before, token]]
        if len(ended) != 1:
            raise ValueError(f"A string has {len(ended)} encodings. Fit the vocabulary with FastActionTokenizer.fit.")
        return tuple((node, before) for node, before in nodes if self._outlook[node, before]), ended[0]


def _find_neighbours(num_symbols: int, merges: list[tuple[int, int]]) -> np.ndarray:
    """Whether the encoding of tokens u and v, one after the other, is u and v: `(tokens, tokens)`."""
    size = num_symbols + len(merges)
    left_part, right_part = np.arange(size), np.arange(size)
    merged = np.full((size, size), size)
    for token, (left, right) in enumerate(merges, start=num_symbols):
        left_part[token], right_part[token], merged[left, right] = left, right, token
    may_follow = np.ones(size * size, bool)
    pairs = np.arange(size * size)
    left, right = np.divmod(pairs, size)
    limit = np.full(size * size, size)  # tokens from here on would be merged too late
    while len(pairs):
        is_joined = merged[left, right] < limit
        may_follow[pairs[is_joined]] = False
        # Undo the later of the two tokens; of the same two, the right one, since merges go from left to right. Where
        # it is a symbol, the other.
        is_left = (left > right) & (left >= num_symbols) | (right < num_symbols)
        limit = np.where(is_left, left, right + 1)
        is_over = is_joined | (is_left & (left < num_symbols))
        left, right = np.where(is_left, right_part[left], left), np.where(is_left, right, left_part[right])
        pairs, left, right, limit = (values[~is_over] for values in (pairs, left, right, limit))
    return may_follow.reshape(size, size)
