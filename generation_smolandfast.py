"""Constrained decoding: every generated string decodes to exactly one action chunk.

A FAST token stands for a known number of DCT coefficients, and a chunk has `chunk_size * action_dim` of them. At each
step, the logits of tokens that exceed the rest are set to -inf; when nothing is left, the string ends.
"""

import copy

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessor, StoppingCriteria

from .configuration_smolandfast import SmolAndFastConfig, action_token_map
from .grammar_smolandfast import INVALID, grammar_tables


class ActionGrammar:
    """The automaton that accepts the FAST strings of one chunk.

    Args:
        config: A configuration with its action side filled.

    Attributes:
        band: Slice of the action tokens in the vocabulary, last token first.
        num_coefficients: Coefficients in a chunk, `chunk_size * action_dim`.
        max_new_tokens: The length of the longest string.
        started: `(num_action_tokens + 1,)`, the coefficients that begin inside each token.
        next_state: `(num_states + 1, num_action_tokens + 1)`, the state after a token, -1 where it must not follow.
            The last row and column of both tables stand for the state -1 and for ids that are not action tokens.
            Both are on the CPU, and read ids that are there too; [`to`] is for ids on another device.
    """

    def __init__(self, config: SmolAndFastConfig):
        if config.num_action_tokens == 0:
            raise ValueError(
                "The configuration has no action tokens, so this model cannot generate actions yet. Load it with "
                "SmolAndFastForActionPrediction.from_pretrained(folder, **processor.model_kwargs())."
            )
        self.base_id = config.action_token_base_id
        self.band = slice(action_token_map(config.num_action_tokens - 1, self.base_id), self.base_id + 1)
        self.num_coefficients = config.num_coefficients
        started, next_state, self.max_new_tokens = grammar_tables(
            self.num_coefficients, config.fast_token_lengths, config.fast_token_bytes
        )
        started, next_state = torch.from_numpy(started), torch.from_numpy(next_state)
        self.started, self.next_state = pad(started, (0, 1)), pad(next_state, (0, 1, 0, 1), value=INVALID)

    def to(self, device: torch.device) -> "ActionGrammar":
        """The same grammar for ids on a device: one copy of its tables, and none at each token."""
        grammar = copy.copy(self)
        grammar.started, grammar.next_state = self.started.to(device), self.next_state.to(device)
        return grammar

    def read(self, action_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Run the automaton over the generated ids.

        Args:
            action_ids: `(batch, length)` vocabulary ids after the prompt; padding after a complete string is ignored.

        Returns:
            The number of coefficients left and the state, each `(batch,)`. Invalid strings have state -1.
        """
        left, state = self._start(action_ids)
        for ids in action_ids.T:
            left, state = self.step(left, state, ids)
        return left, state

    def step(
        self, left: torch.LongTensor, state: torch.LongTensor, ids: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The result of [`read`] after one more id of each string; all `(batch,)`."""
        tokens = action_token_map(ids, self.base_id).clamp(-1, len(self.started) - 1)  # -1 is the last column too
        started = self.started[tokens]
        after = self.next_state[state, tokens].masked_fill(started > left, INVALID)
        complete = is_complete(left, state)
        left = torch.where(complete | (after == INVALID), left, left - started)
        return left, torch.where(complete, state, after)

    def is_action(self, token_id: int) -> bool:
        return 0 <= action_token_map(token_id, self.base_id) < len(self.started) - 1

    def allowed(self, left: torch.LongTensor, state: torch.LongTensor) -> torch.BoolTensor:
        """The tokens that may follow: `(batch,)`, `(batch,) -> (batch, num_action_tokens)`."""
        return (self.next_state[state, :-1] != INVALID) & (self.started[:-1] <= left[:, None])

    def log_probabilities(self, scores: torch.FloatTensor, action_ids: torch.LongTensor) -> torch.FloatTensor:
        """Log-probability of each id among those that the grammar allows there.

        Args:
            scores: `(batch, length, vocab_size)`, the logits for each id.
            action_ids: `(batch, length)` vocabulary ids of complete strings; ids after the end are ignored.

        Returns:
            `(batch, length)` float32, 0 after a string's end.

        Raises:
            ValueError: Ids that are not a complete string of the grammar.
        """
        (left, state), columns = self._start(action_ids), []
        for step, ids in enumerate(action_ids.T):
            complete = is_complete(left, state)
            allowed = self.allowed(left, state) | complete[:, None]  # keeps the softmax finite after the end
            tokens = action_token_map(ids, self.base_id).clamp(0, len(self.started) - 2)
            # `band` holds the last token first
            logits = scores[:, step, self.band].flip(1).float().masked_fill(~allowed, -torch.inf)
            chosen = logits.log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
            columns.append(chosen.masked_fill(complete, 0.0))
            left, state = self.step(left, state, ids)
        complete = is_complete(left, state)
        if not complete.all():
            raise ValueError(
                f"action_ids holds {action_ids[~complete][0].tolist()}, expected strings of exactly "
                f"{self.num_coefficients} coefficients. Take the labels from the processor."
            )
        return torch.stack(columns, dim=1)

    def _start(self, action_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        left = torch.full(action_ids.shape[:1], self.num_coefficients, device=action_ids.device)
        return left, torch.zeros_like(left)


class ActionReader:
    """Reads growing strings without waiting for the device.

    Args:
        grammar: On the device of the ids.
        prompt_length: Ids before the action tokens.
        has_beams: Beams change places, so each call reads its strings from the start. If False, they must extend
            those of the last call, and each id is read once.
    """

    def __init__(self, grammar: ActionGrammar, prompt_length: int, has_beams: bool = True):
        self.grammar = grammar
        self.prompt_length = prompt_length
        self.has_beams = has_beams
        self._length: int | None = None

    def read(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """[`ActionGrammar.read`] of the ids after the prompt: `(batch, length)` ids -> two of `(batch,)`."""
        action_ids = input_ids[:, self.prompt_length :]
        if self.has_beams or self._length is None:
            self._result = self.grammar.read(action_ids)
        else:
            for ids in action_ids[:, self._length :].T:
                self._result = self.grammar.step(*self._result, ids)
        self._length = action_ids.shape[1]
        return self._result


class ActionLogitsProcessor(LogitsProcessor):
    """Leaves only the tokens that the grammar allows, and EOS at the end of the chunk.

    If `relaxed`, every action token and EOS remain allowed at any step. A string whose scores are not finite ends
    with EOS; call [`check`] after the last token, since to raise at once would wait for the device at every token.
    """

    def __init__(self, reader: ActionReader, eos_token_id: int, relaxed: bool = False):
        self.reader = reader
        self.eos_token_id = eos_token_id
        self.relaxed = relaxed
        self._best: list[torch.FloatTensor] = []  # the best scores at each token, (batch,)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        grammar = self.reader.grammar
        allowed = grammar.allowed(*self.reader.read(input_ids)) | self.relaxed
        masked = torch.full_like(scores, -torch.inf)
        masked[:, grammar.band] = torch.where(allowed.flip(1), scores[:, grammar.band], -torch.inf)
        if self.relaxed:
            masked[:, self.eos_token_id] = scores[:, self.eos_token_id]
        else:
            masked[:, self.eos_token_id] = torch.where(allowed.any(1), masked[:, self.eos_token_id], 0.0)
        self._best.append(masked.amax(dim=1))
        broken = ~torch.isfinite(self._best[-1])
        masked = masked.masked_fill(broken[:, None], -torch.inf)
        masked[:, self.eos_token_id] = masked[:, self.eos_token_id].masked_fill(broken, 0.0)
        return masked

    def check(self) -> None:
        """Raise `ValueError` if no token could be chosen at some step, as the scores were not finite."""
        best = torch.cat(self._best)
        if not torch.isfinite(best).all():
            raise ValueError(
                f"The model's scores for the action tokens are {best[~torch.isfinite(best)][0].item()}: no action can "
                "be chosen. Look for NaN in the weights or the inputs, or for generation options that ban tokens."
            )


class ChunkIsComplete(StoppingCriteria):
    """Ends each string at its last coefficient, without a forward pass for EOS."""

    def __init__(self, reader: ActionReader):
        self.reader = reader

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return is_complete(*self.reader.read(input_ids))


def is_complete(left: torch.LongTensor, state: torch.LongTensor) -> torch.BoolTensor:
    """Whether a string holds its whole chunk: no coefficients are left, and no character is open."""
    return (left == 0) & (state == 0)
