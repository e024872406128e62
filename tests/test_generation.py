"""Constrained decoding: whatever the logits, every string decodes to exactly one chunk."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    SmolVLMForConditionalGeneration,
    StoppingCriteriaList,
)

from smolandfast import FastActionTokenizer, SmolAndFastConfig, SmolAndFastForActionPrediction
from smolandfast.generation_smolandfast import ActionGrammar, ActionLogitsProcessor, ActionReader, ChunkIsComplete

FAST_PLUS = Path(__file__).parents[2] / "shared" / "assets" / "fast_plus"
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
NUM_TEXT_TOKENS, SKIPPED = 40, 3  # the vocabulary: text, action tokens, ids that these leave alone
# Horizon, action dimension, size of the fitted vocabulary (None: FAST+).
POLICIES = {
    "10x2": (10, 2, 300),
    "10x2_without_merges": (10, 2, 41),
    "3x7": (3, 7, 512),
    "1x1": (1, 1, 30),
    "fast_plus_10x2": (10, 2, None),
    "fast_plus_1x3": (1, 3, None),
    "fast_plus_1x1": (1, 1, None),
}


def make_config(chunk_size, action_dim, **grammar):
    vocab_size = NUM_TEXT_TOKENS + len(next(iter(grammar.values()))) + SKIPPED
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special_ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return SmolAndFastConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 16},
        text_config={**text, **special_ids, "model_type": "llama", "num_key_value_heads": 1, "vocab_size": vocab_size},
        image_token_id=IMAGE,
        chunk_size=chunk_size,
        n_action_steps=1,
        action_dim=action_dim,
        action_token_base_id=vocab_size - 1 - SKIPPED,
        **grammar,
    )


class Policy:
    def __init__(self, horizon, action_dim, vocab_size):
        if vocab_size is None:
            self.tokenizer = FastActionTokenizer.from_pretrained(FAST_PLUS)
        else:
            self.tokenizer = FastActionTokenizer.fit(self.chunks(200, horizon, action_dim), 10.0, vocab_size)
        self.shape = horizon, action_dim
        self.config = make_config(horizon, action_dim, **self.tokenizer.token_grammar(horizon * action_dim))
        self.grammar = ActionGrammar(self.config)
        self.base_id = self.config.action_token_base_id
        self.band = slice(self.base_id - len(self.tokenizer) + 1, self.base_id + 1)

    @staticmethod
    def chunks(n, horizon, action_dim):
        steps = np.random.default_rng(0).normal(0, 0.1, (n, horizon, action_dim))
        return np.cumsum(steps, axis=1).clip(-1, 1)

    def make_model(self, seed=0):
        torch.manual_seed(seed)
        model = SmolAndFastForActionPrediction(self.config).eval()
        model.lm_head.weight.data *= 50  # strong preferences
        return model

    def assert_one_chunk_each(self, new_ids):
        """Each row is action tokens that decode to one chunk, then only EOS and padding."""
        rows = []
        for row in new_ids.tolist():
            length = next((i for i, token in enumerate(row) if token < self.band.start), len(row))
            assert max(row[:length]) < self.band.stop and set(row[length:]) <= {EOS, PAD}
            rows.append([self.base_id - token for token in row[:length]])
        assert self.tokenizer.decode_actions(rows, *self.shape).shape == (len(rows), *self.shape)


@pytest.fixture(scope="module", params=POLICIES)
def policy(request):
    if "fast_plus" in request.param and not FAST_PLUS.exists():
        pytest.skip(f"the official FAST+ files are not at {FAST_PLUS}")
    return Policy(*POLICIES[request.param])


def token_likings(config, kind):
    """What an adversarial model likes: logits over the FAST ids."""
    if config.fast_token_lengths is not None:
        sizes, ends = torch.tensor(config.fast_token_lengths), 0
    else:
        tokens = [bytes.fromhex(token or "") for token in config.fast_token_bytes]
        sizes = torch.tensor([len(token) for token in tokens])
        ends = torch.tensor([max(token, default=0) for token in tokens])  # large bytes open long characters
    return {"nothing": 0.0 * sizes, "long": 100.0 * sizes, "short": ends - 1000.0 * sizes}[kind]


def write_strings(policy, kind, do_sample, batch_size=64):
    """Decode as `generate()` does, with random logits where it has a model."""
    grammar, band = policy.grammar, policy.band
    reader = ActionReader(grammar, 1, has_beams=False)
    processor, is_whole = ActionLogitsProcessor(reader, EOS), ChunkIsComplete(reader)
    likings = token_likings(policy.config, kind).flip(0)
    ids = torch.full((batch_size, 1), BOS)
    finished = is_whole(ids, None)
    while not finished.all():
        logits = torch.full((batch_size, policy.config.text_config.vocab_size), 1e4)  # text and EOS liked the best
        logits[:, band] = likings + torch.randn(batch_size, len(likings))
        scores = processor(ids, logits)
        allowed = scores > -torch.inf
        assert torch.equal(allowed[:, EOS], finished)  # EOS exactly when nothing is left
        assert torch.equal(allowed.sum(1), allowed[:, band].sum(1) + finished)  # and never any text
        assert not allowed[finished, band].any()
        chosen = scores.softmax(1).multinomial(1) if do_sample else scores.argmax(1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
        finished = is_whole(ids, None)
        assert ids.shape[1] - 1 <= grammar.max_new_tokens
    return ids[:, 1:]


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["nothing", "long", "short"]), do_sample=st.booleans())
def test_whatever_the_logits_every_string_decodes_to_one_chunk(policy, seed, kind, do_sample):
    torch.manual_seed(seed)
    policy.assert_one_chunk_each(write_strings(policy, kind, do_sample))


def test_the_longest_string_just_fits(policy):
    new_ids = write_strings(policy, "short", do_sample=False, batch_size=8)
    assert new_ids.shape[1] == policy.grammar.max_new_tokens
    policy.assert_one_chunk_each(new_ids)


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.1, 1.0, 30.0, 4000.0]), offset=st.sampled_from([0, 4000])
)
def test_no_encoding_is_ever_masked(policy, seed, size, offset):
    actions = np.random.default_rng(seed).normal(offset, size, (16, *policy.shape))
    rows = policy.tokenizer.encode_actions(actions)
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [0] * (lengths.max() - len(row)) for row in rows])
    ids = policy.base_id - tokens
    for i in range(tokens.shape[1]):
        allowed = policy.grammar.allowed(*policy.grammar.read(ids[:, :i]))
        assert torch.equal(allowed.any(1), i < lengths)
        assert allowed[torch.arange(16), tokens[:, i]][i < lengths].all()
    left, state = policy.grammar.read(ids)
    assert not left.any() and not state.any()


def accepts(grammar, ids):
    """Whether each of these strings, all of one length, ends just where the grammar says that it is whole."""
    is_whole = ChunkIsComplete(ActionReader(grammar, 0))
    left, state = grammar.read(ids)
    return ((left == 0) & (state == 0) & ~is_whole(ids[:, :-1], None)).tolist()


def test_the_grammar_accepts_exactly_what_the_tokenizer_decodes():
    tokenizer = FastActionTokenizer.fit([[[0.0], [0.1], [0.2]], [[0.0], [0.0], [0.2]]], scale=10.0, vocab_size=9)
    config = make_config(3, 1, **tokenizer.token_grammar(3))
    for length in (1, 2, 3, 4):
        strings = list(product(range(len(tokenizer)), repeat=length))
        accepted = accepts(ActionGrammar(config), config.action_token_base_id - torch.tensor(strings))
        for string, is_accepted in zip(strings, accepted, strict=True):
            assert (sum(config.fast_token_lengths[token] for token in string) == 3) == is_accepted
            if is_accepted:
                tokenizer.decode_actions([string])


def test_the_grammar_of_bytes_is_utf8():
    config = make_config(1, 1, fast_token_bytes=[f"{byte:02x}" for byte in range(256)])
    leads, ends = (0x7F, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xF0, 0xFF), (0x7F, 0x80, 0xBF, 0xC0)
    for strings in (product(range(256)), product(range(256), repeat=2), product(leads, range(256), ends)):
        strings = [bytes(string) for string in strings]
        ids = config.action_token_base_id - torch.tensor([list(string) for string in strings])
        for string, is_accepted in zip(strings, accepts(ActionGrammar(config), ids), strict=True):
            text = string.decode("utf-8", errors="replace")
            is_character = len(text) == 1 and text.encode() == string and text <= "\ud7ff"
            assert is_character == is_accepted, string


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_name_no_token_end_that_string_and_are_refused(policy, bad):
    processor = ActionLogitsProcessor(ActionReader(policy.grammar, 1), EOS)
    logits = torch.zeros(3, policy.config.text_config.vocab_size)
    expected = processor(torch.full((3, 1), BOS), logits)
    processor.check()
    logits[1, policy.band] = bad
    scores = processor(torch.full((3, 1), BOS), logits)
    assert torch.equal(scores[::2], expected[::2])
    # Neither `argmax` nor `multinomial`, which would stop a GPU, meets what is not finite.
    assert scores[1, EOS] == 0 and scores[1].softmax(0)[EOS] == 1
    processor(torch.full((3, 1), BOS), logits * 0)
    with pytest.raises(ValueError, match=f"scores for the action tokens are {bad}"):
        processor.check()


def test_one_nan_among_the_allowed_tokens_is_refused(policy):
    logits = torch.zeros(3, policy.config.text_config.vocab_size)
    first_allowed = policy.grammar.allowed(*policy.grammar.read(torch.empty(1, 0)))[0].nonzero()[0]
    logits[2, policy.base_id - first_allowed] = torch.nan
    processor = ActionLogitsProcessor(ActionReader(policy.grammar, 1), EOS)
    processor(torch.full((3, 1), BOS), logits)
    with pytest.raises(ValueError, match="nan"):
        processor.check()


PROMPTS = torch.randint(4, NUM_TEXT_TOKENS, (5, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], *[[1] * 7] * 4])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 3.0},
        {"do_sample": True, "top_k": 3, "num_return_sequences": 3},
        {"do_sample": True, "top_p": 0.5},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3, "length_penalty": -2.0},
        {"use_cache": False, "repetition_penalty": 1.5},
    ],
)
def test_a_model_with_random_weights_writes_one_chunk_each(policy, options):
    model = policy.make_model()
    for batch_size in (1, 5) if options == {} else (5,):
        ids = model.generate(input_ids=PROMPTS[:batch_size], attention_mask=MASK[:batch_size], **options)
        assert len(ids) == batch_size * options.get("num_return_sequences", 1)
        policy.assert_one_chunk_each(ids[:, 7:])


def test_relaxed_generation_writes_any_action_tokens_until_eos(model, processor, batch):
    """What constrained decoding forbids: a string that ends early still becomes a finite chunk."""
    inputs = processor(images=batch["images"], text=batch["text"], state=batch["state"])
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens alike: strings of chance
    torch.manual_seed(0)
    ids = model.generate(**inputs, relaxed=True, do_sample=True)
    with pytest.raises(ValueError, match="expected horizon"):
        processor.post_process_actions(ids)
    actions = processor.post_process_actions(ids, relaxed=True)
    assert actions.shape == (4, processor.chunk_size, 2) and np.isfinite(actions).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_limit_cuts_the_string_that_would_have_been_written(policy, options):
    model = policy.make_model()
    written = []
    for limits in ({"max_new_tokens": 2}, {"max_time": 1e-9}, {"max_new_tokens": 10**6, "max_time": 3600.0}, {}):
        torch.manual_seed(0)
        written.append(model.generate(input_ids=PROMPTS, attention_mask=MASK, **limits, **options)[:, 7:])
    two, one, *whole = written
    assert two.shape[1] <= 2 and one.shape[1] == 1 and torch.equal(*whole)
    policy.assert_one_chunk_each(whole[0])
    if "num_beams" not in options:  # the best beam of a few tokens need not be the best of all
        assert torch.equal(two, whole[0][:, :2]) and torch.equal(one, whole[0][:, :1])


@pytest.mark.parametrize(
    "limits", [{"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"max_time": 0}, {"max_time": "1"}]
)
def test_a_limit_that_is_none_is_refused(policy, limits):
    with pytest.raises(ValueError, match=f"{next(iter(limits))} is"):
        policy.make_model().generate(input_ids=PROMPTS, attention_mask=MASK, **limits)


def test_a_chunk_that_is_cut_short_is_decoded_only_when_relaxed(model, processor, batch):
    inputs = processor(images=batch["images"], text=batch["text"], state=batch["state"])
    ids = model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(ValueError, match="expected horizon"):
        processor.post_process_actions(ids)
    actions = processor.post_process_actions(ids, relaxed=True)
    assert actions.shape == (4, processor.chunk_size, 2) and np.isfinite(actions).all()


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_model_runs_once_for_each_token_of_the_longest_string(policy, do_sample):
    model, runs = policy.make_model(), []
    model.model.text_model.register_forward_hook(lambda *_: runs.append(1))
    ids = model.generate(input_ids=PROMPTS, attention_mask=MASK, do_sample=do_sample)
    lengths = (ids[:, 7:] >= policy.band.start).sum(1)
    assert len(runs) == lengths.max() == ids.shape[1] - 7


def test_greedy_and_sampled_strings_are_those_of_stock_generate(policy):
    model = policy.make_model()
    for options in ({}, {"do_sample": True, "temperature": 2.0}, {"do_sample": True, "top_k": 3}, {"num_beams": 3}):
        torch.manual_seed(0)
        ours = model.generate(input_ids=PROMPTS, attention_mask=MASK, **options)
        reader = ActionReader(policy.grammar, PROMPTS.shape[1])
        torch.manual_seed(0)
        stock = SmolVLMForConditionalGeneration.generate(
            model,
            input_ids=PROMPTS,
            attention_mask=MASK,
            logits_processor=LogitsProcessorList([ActionLogitsProcessor(reader, EOS)]),
            stopping_criteria=StoppingCriteriaList([ChunkIsComplete(reader)]),
            max_new_tokens=policy.grammar.max_new_tokens,
            pad_token_id=PAD,
            **({"top_k": 0} if "do_sample" in options else {}) | options,
        )
        assert torch.equal(ours, stock), options


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True}])
def test_each_written_id_is_read_once_unless_beams_change_places(policy, options, monkeypatch):
    model, lengths, steps = policy.make_model(), [], []
    read, step = ActionGrammar.read, ActionGrammar.step
    monkeypatch.setattr(ActionGrammar, "read", lambda self, ids: lengths.append(ids.shape[1]) or read(self, ids))
    monkeypatch.setattr(ActionGrammar, "step", lambda *args: steps.append(1) or step(*args))
    ids = model.generate(input_ids=PROMPTS, attention_mask=MASK, **options)
    policy.assert_one_chunk_each(ids[:, 7:])
    if "num_beams" not in options:
        new = ids.shape[1] - 7
        assert lengths == [0] and len(steps) == new


@pytest.mark.parametrize("name", ["max_length", "min_new_tokens", "min_length", "stop_strings"])
def test_options_that_would_cut_or_stretch_a_chunk_are_refused(name):
    model = Policy(10, 2, 300).make_model()
    for options in ({name: 4}, {"generation_config": GenerationConfig(**{name: 4})}):
        with pytest.raises(ValueError, match=f"{name}=4.*Drop {name}"):
            model.generate(input_ids=PROMPTS, **options)


@pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_assisted_generation_which_knows_no_grammar_is_refused(policy, name):
    model = policy.make_model()
    with pytest.raises(ValueError, match=f"{name}=.*Drop {name}"):
        model.generate(input_ids=PROMPTS, **{name: model if name == "assistant_model" else 3})


@pytest.mark.parametrize("where", ["argument", "model"])
def test_limits_of_a_generation_config_hold(where):
    model = Policy(10, 2, 300).make_model()
    whole = model.generate(input_ids=PROMPTS, attention_mask=MASK)[:, 7:]
    limited = GenerationConfig(max_new_tokens=2)
    if where == "model":
        model.generation_config.max_new_tokens, limited = 2, None
    two = model.generate(PROMPTS, limited, attention_mask=MASK)[:, 7:]
    assert torch.equal(two, whole[:, :2]) and whole.shape[1] > 2
    one = model.generate(PROMPTS, limited, attention_mask=MASK, max_new_tokens=1)[:, 7:]
    assert torch.equal(one, whole[:, :1])
    if limited is not None:
        assert limited.max_new_tokens == 2  # a caller's object stays as it is
    with pytest.raises(ValueError, match="generation_config is 3, expected a GenerationConfig"):
        model.generate(PROMPTS, 3)


def test_samples_are_of_all_tokens_unless_top_k_says_otherwise():
    """As `log_probability` has it, and not of the 50 best, Transformers' default."""
    policy = Policy(10, 2, 300)
    model, options = policy.make_model(), {"do_sample": True, "output_scores": True, "return_dict_in_generate": True}
    given = {"argument": {"top_k": 2}, "config": {"generation_config": GenerationConfig(top_k=2, **options)}}
    first = model.generate(input_ids=PROMPTS, attention_mask=MASK, **options).scores[0]
    left = torch.full((len(PROMPTS),), policy.grammar.num_coefficients)
    allowed = policy.grammar.allowed(left, torch.zeros_like(left)).sum(1)
    assert torch.equal(torch.isfinite(first).sum(1), allowed) and allowed.max() > 50
    for extra in given.values():
        scores = model.generate(input_ids=PROMPTS, attention_mask=MASK, **options | extra).scores[0]
        assert torch.isfinite(scores).sum(1).tolist() == [2] * len(PROMPTS)


@pytest.mark.parametrize(
    "grammar, message",
    [
        ({"fast_token_lengths": [2, 3, 2]}, "No action token stands for a single coefficient"),
        ({"fast_token_bytes": [f"{byte:02x}" for byte in range(255)]}, "fast_token_bytes lacks single bytes"),
    ],
)
def test_a_vocabulary_that_cannot_write_every_chunk_is_refused(grammar, message):
    with pytest.raises(ValueError, match=message):
        ActionGrammar(make_config(4, 1, **grammar))


def test_strings_are_written_under_autocast_too(model, processor, batch):
    inputs = processor(images=batch["images"], text=batch["text"], state=batch["state"])
    with torch.autocast("cpu", torch.bfloat16):
        actions = processor.post_process_actions(model.generate(**inputs))
    assert actions.shape == (4, 8, 2)
