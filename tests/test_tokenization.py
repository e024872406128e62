"""FAST tokens: parity with the official code, and what a fitted tokenizer promises."""

import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.fft import idct
from transformers import PreTrainedTokenizerFast

from smolandfast import (
    FastActionTokenizer,
    Normalizer,
    checks_smolandfast,
    compute_statistics,
    tokenization_fast_action,
)

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
needs_fast_plus = pytest.mark.skipif(not ASSETS.exists(), reason=f"the official FAST+ files are not in {ASSETS}")
POSITIONS = np.arange(60).reshape(3, 10, 2)
MEMORY_OF_A_FIT = """
import numpy as np, resource
from smolandfast import FastActionTokenizer, Normalizer, compute_statistics
actions = np.sin(np.cumsum(np.random.default_rng(0).normal(size=(12_050, 14)), axis=0) * 0.02).astype(np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
states, chunks = actions[:12_000], actions[np.arange(12_000)[:, None] + np.arange(50)]
normalizer = Normalizer(compute_statistics(states, chunks))
FastActionTokenizer.fit(normalizer.normalize_actions(chunks, normalizer.state_bins(states)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / chunks.size)
"""


def smooth_chunks(n, horizon, action_dim, seed=0):
    steps = np.random.default_rng(seed).normal(0, 0.1, (n, horizon, action_dim))
    return np.cumsum(steps, axis=1).clip(-1, 1)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def fitted():
    return FastActionTokenizer.fit(smooth_chunks(200, 10, 2), scale=10.0, vocab_size=300)


@pytest.fixture(scope="module")
def one_coefficient():
    return FastActionTokenizer.fit([[[-2.0]], [[1.5]]], scale=10.0, vocab_size=100)


@pytest.fixture(scope="module")
def fast_plus():
    return FastActionTokenizer.from_pretrained(ASSETS / "fast_plus")


@needs_fast_plus
def test_fast_plus_gives_the_official_ids_and_actions(fast_plus):
    official = np.load(ASSETS / "fast_parity.npz")
    for name, expected in json.loads((ASSETS / "fast_parity.json").read_text()).items():
        actions = official[f"{name}_actions"]
        assert fast_plus.encode_actions(actions) == expected, name
        assert_close(fast_plus.decode_actions(expected, *actions.shape[1:]), official[f"{name}_decoded"])


@needs_fast_plus
def test_a_shape_that_no_memory_holds_is_refused_before_any_is_taken(fast_plus):
    with pytest.raises(ValueError, match="holds 8 coefficients, expected horizon"):
        fast_plus.decode_actions(fast_plus.encode_actions(np.zeros((1, 4, 2))), 2**20, 2**20)


@needs_fast_plus
def test_fast_plus_writes_every_symbol_that_utf8_can_hold_and_saturates_beyond(fast_plus):
    low, high = fast_plus.min_coefficient, fast_plus.max_coefficient
    assert (low, high) == (-354, -354 + 0xD7FF)
    actions = np.arange(low - 3, high + 4).reshape(-1, 1, 1) / 10
    decoded = fast_plus.decode_actions(fast_plus.encode_actions(actions), 1, 1)
    assert_close(decoded, actions.clip(low / 10, high / 10))
    assert fast_plus.count_saturated(actions).tolist() == [1] * 3 + [0] * 0xD800 + [1] * 3


def test_a_panic_inside_the_tokenizers_library_is_a_clear_error(fitted, tmp_path):
    """A merge that is longer than its token panics; a panic is no Exception."""
    fitted.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "a prefix that no token has"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="action tokenizer in .* cannot be used: PanicException.*again"):
        FastActionTokenizer.from_pretrained(tmp_path)


@needs_fast_plus
def test_fast_plus_refuses_symbols_that_it_never_writes(fast_plus):
    """As constrained decoding does: code points above 0xD7FF."""
    byte_ids = {fast_plus.token_bytes[i]: i for i in range(len(fast_plus)) if len(fast_plus.token_bytes[i]) == 1}
    for symbol in ("\ue000", "\uffff", "\U0010ffff"):
        ids = [[byte_ids[bytes([byte])] for byte in symbol.encode()]]
        with pytest.raises(ValueError, match=rf"ids\[0\] holds the coefficient {ord(symbol) - 354}, expected -354 to"):
            fast_plus.decode_actions(ids, 1, 1)
    last = [[byte_ids[bytes([byte])] for byte in "\ud7ff".encode()]]
    assert_close(fast_plus.decode_actions(last, 1, 1), (0xD7FF - 354) / 10)


@needs_fast_plus
def test_fast_plus_refuses_what_it_cannot_decode(fast_plus):
    with pytest.raises(ValueError, match="horizon=..., action_dim=..."):
        fast_plus.decode_actions([[300]], horizon=1)
    spelled = fast_plus.token_grammar(1)["fast_token_bytes"].index
    for text in (["c3"], ["80"], ["ed", "a0", "80"]):  # half a character, the other half, a surrogate
        with pytest.raises(ValueError, match=r"ids\[1\].*not UTF-8"):
            fast_plus.decode_actions([[spelled("00")], [spelled(byte) for byte in text]], 1, 1)


def test_the_same_chunks_give_the_same_tokenizer(fitted):
    again = FastActionTokenizer.fit(smooth_chunks(200, 10, 2), scale=10.0, vocab_size=300)
    assert again.backend_tokenizer.to_str() == fitted.backend_tokenizer.to_str()


def test_every_coefficient_between_the_extremes_can_be_written(one_coefficient):
    assert (one_coefficient.min_coefficient, one_coefficient.max_coefficient) == (-20, 15)
    actions = np.arange(-20, 16).reshape(-1, 1, 1) / 10
    ids = one_coefficient.encode_actions(actions)
    for batch in (ids, np.array(ids), torch.tensor(ids), list(np.array(ids))):
        assert_close(one_coefficient.decode_actions(batch), actions)


@settings(deadline=None)
@given(data=st.data())
def test_chunks_of_integer_coefficients_come_back_exactly(fitted, data):
    in_range = st.integers(fitted.min_coefficient, fitted.max_coefficient)
    coefficients = data.draw(arrays(np.int64, (3, 10, 2), elements=in_range, fill=st.nothing()))
    chunks = idct(coefficients / 10, axis=1, norm="ortho")
    assert not fitted.count_saturated(chunks).any()
    assert_close(fitted.decode_actions(fitted.encode_actions(chunks)), chunks)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), horizon=st.integers(1, 16), action_dim=st.integers(1, 4), scale=st.floats(1, 100))
def test_the_round_trip_is_off_by_half_a_unit_of_each_coefficient_at_most(data, horizon, action_dim, scale):
    chunks = data.draw(arrays(np.float64, (4, horizon, action_dim), elements=st.floats(-1, 1), fill=st.nothing()))
    tokenizer = FastActionTokenizer.fit(chunks, scale, vocab_size=1024)
    errors = tokenizer.decode_actions(tokenizer.encode_actions(chunks)) - chunks
    # The transform is orthonormal, so in each dimension the error's norm is that of the rounding.
    assert np.linalg.norm(errors, axis=1).max() <= np.sqrt(horizon) * 0.5 / scale + 1e-9


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "bfloat16"])
def test_arrays_tensors_and_lists_of_any_real_dtype_are_encoded_alike(fitted, dtype):
    values = np.random.default_rng(0).integers(-1, 2, (6, 10, 2)) / (1 if "int" in dtype else 8)  # exact in them all
    expected = fitted.encode_actions(values)
    tensor = torch.tensor(values).to(getattr(torch, dtype)).requires_grad_("float" in dtype)
    assert fitted.encode_actions(tensor) == expected
    assert fitted.encode_actions(tensor.tolist()) == expected
    if dtype != "bfloat16":  # NumPy has none
        assert fitted.encode_actions(values.astype(dtype)) == expected


def test_saturation_keeps_the_extremes_and_is_counted(one_coefficient):
    actions = np.array([-50.0, -2.04, -2.06, 0.3, 1.54, 1.56, 1e30]).reshape(-1, 1, 1)
    decoded = one_coefficient.decode_actions(one_coefficient.encode_actions(actions))
    assert_close(decoded.ravel(), [-2.0, -2.0, -2.0, 0.3, 1.5, 1.5, 1.5])
    assert one_coefficient.count_saturated(actions).tolist() == [1, 0, 1, 0, 0, 1, 1]
    assert one_coefficient.report(actions)["clip_rate"] == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    "actions, message",
    [
        (np.where(POSITIONS == 27, np.nan, 0.0), r"actions\[1, 3, 1\] is nan"),
        (np.where(POSITIONS == 40, -np.inf, 0.0), r"actions\[2, 0, 0\] is -inf"),
        (torch.where(torch.tensor(POSITIONS) == 19, torch.inf, 0.0), r"actions\[0, 9, 1\] is inf"),
        (np.full((1, 10, 2), 1e308), "overflow"),
        (np.zeros((10, 2)), r"shape \(10, 2\), expected \(batch"),
        (np.zeros((2, 9, 2)), r"shape \(2, 9, 2\), expected \(batch, 10, 2\)"),
        (np.zeros((2, 10, 3)), r"shape \(2, 10, 3\), expected \(batch, 10, 2\)"),
        (np.full((2, 10, 2), "0.5"), "dtype is <U3"),
        ([], r"shape \(0,\)"),
    ],
)
def test_actions_that_are_not_whole_finite_chunks_are_refused(fitted, actions, message):
    for method in (fitted.encode_actions, fitted.count_saturated, fitted.report):
        with pytest.raises(ValueError, match=message):
            method(actions)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[0] * 20, [0] * 19 + [300]], r"ids\[1\] holds 300, expected FAST ids in \[0, 300\)"),
        ([[-1] * 20], r"ids\[0\] holds -1"),
        ([[0] * 19], r"ids\[0\] holds 19 coefficients, expected horizon \* action_dim = 10 \* 2 = 20"),
        ([[0] * 20, [0] * 21], r"ids\[1\] holds 21 coefficients"),
        ([0] * 20, "takes a batch of lists of ids"),
        ([[0] * 20, [0.0] * 20], r"ids\[1\] has .*expected a list: decode"),
    ],
)
def test_ids_that_do_not_hold_one_chunk_each_are_refused(fitted, ids, message):
    with pytest.raises(ValueError, match=message):
        fitted.decode_actions(ids)


def test_no_strings_are_no_chunks(fitted):
    assert fitted.decode_actions([]).shape == (0, 10, 2)


def test_relaxed_decoding_cuts_and_fills_what_holds_no_whole_chunk(fitted, fast_plus):
    actions = np.zeros((1, fitted.horizon, fitted.action_dim))
    (ids,) = fitted.encode_actions(actions + 0.3)
    whole = fitted.decode_actions([ids])
    relaxed = fitted.decode_actions([ids, ids + ids, []], relaxed=True)
    np.testing.assert_array_equal(relaxed[:2], np.concatenate([whole, whole]))
    np.testing.assert_array_equal(relaxed[2:], actions)
    broken = [i for i, token in enumerate(fast_plus.token_bytes) if token == b"\xc4"]  # half of a character
    assert (fast_plus.decode_actions([broken], 2, 1, relaxed=True) == 0).all()


@pytest.mark.parametrize(
    "chunks, scale, vocab_size, message",
    [
        ([[[-2.0]], [[1.5]]], 10.0, 35, "from -20 to 15: 36 symbols, more than the vocabulary of 35"),
        ([[[0.5]]], float("nan"), 100, "scale is nan"),
        (np.zeros((0, 10, 2)), 10.0, 100, r"chunks has shape \(0, 10, 2\): pass at least one"),
    ],
)
def test_a_fit_that_cannot_work_is_refused(chunks, scale, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        FastActionTokenizer.fit(chunks, scale, vocab_size)


def test_many_threads_get_the_serial_result(fitted):
    batches = [smooth_chunks(16, 10, 2, seed) for seed in range(64)]
    ids = [fitted.encode_actions(batch) for batch in batches]
    decoded = [fitted.decode_actions(batch) for batch in ids]
    with ThreadPoolExecutor(8) as pool:
        encoding, decoding = pool.map(fitted.encode_actions, batches), pool.map(fitted.decode_actions, ids)
        assert list(encoding) == ids
        np.testing.assert_array_equal(list(decoding), decoded)


@pytest.mark.parametrize("name", ["fitted", pytest.param("fast_plus", marks=needs_fast_plus)])
def test_saved_and_pickled_tokenizers_are_the_same(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    chunks = smooth_chunks(20, 10, 2, seed=1) * 3  # some of them saturate
    ids = tokenizer.encode_actions(chunks)
    for copy in (FastActionTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        for field in ("horizon", "action_dim", "scale", "min_coefficient", "max_coefficient"):
            assert getattr(copy, field) == getattr(tokenizer, field)
        assert copy._fit_report == tokenizer._fit_report
        assert copy.encode_actions(chunks) == ids
        assert_close(copy.decode_actions(ids, 10, 2), tokenizer.decode_actions(ids, 10, 2))


def test_a_folder_of_another_tokenizer_is_refused(fitted, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=fitted.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not belong to an action tokenizer"):
        FastActionTokenizer.from_pretrained(tmp_path)


def test_the_report_measures_errors_in_robot_units():
    chunks, action_scale = smooth_chunks(100, 10, 2), np.array([256.0, 0.5])
    tokenizer = FastActionTokenizer.fit(chunks, scale=10.0, vocab_size=300, action_scale=action_scale)
    ids, report = tokenizer.encode_actions(chunks), tokenizer.fit_report
    lengths = [len(row) for row in ids]
    errors = (tokenizer.decode_actions(ids) - chunks) * action_scale
    assert (report["num_chunks"], report["vocab_size"], report["clip_rate"]) == (100, len(tokenizer), 0)
    tokens = [report[f"tokens_{name}"] for name in ("mean", "p99", "max")]
    assert tokens == pytest.approx([np.mean(lengths), np.percentile(lengths, 99), max(lengths)])
    assert report["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert report["max_error"] == pytest.approx(np.abs(errors).max())
    assert report["rmse_by_dim"] == pytest.approx(np.sqrt(np.mean(errors**2, axis=(0, 1))))
    assert report["clipped_values_by_dim"] == [0, 0]
    assert report["vocab_used"] == pytest.approx(len({token for row in ids for token in row}) / len(tokenizer))


def test_a_resampled_tokenizer_writes_a_motion_with_the_same_tokens(tmp_path):
    phases = np.random.default_rng(0).uniform(-1, 1, (50, 3, 2))

    def motion(horizon: int) -> np.ndarray:  # three cosines of the DCT itself, sampled at the middle of each step
        waves = np.cos(np.pi * np.arange(3)[:, None] * (np.arange(horizon) + 0.5) / horizon)  # (3, H)
        return np.einsum("nkd,kh->nhd", phases, waves) / 3

    tokenizer = FastActionTokenizer.fit(motion(16), scale=30.0, vocab_size=300)
    resampled = tokenizer.resample(motion(8), action_scale=2.0)
    assert (resampled.horizon, resampled.action_dim, resampled.get_vocab()) == (8, 2, tokenizer.get_vocab())
    assert resampled.fit_report == resampled.report(motion(8), 2.0)
    long, short = tokenizer.encode_actions(motion(16)), resampled.encode_actions(motion(8))
    for i in range(50):
        coefficients = [np.concatenate([tokenizer.token_coefficients(k) for k in ids]) for ids in (long[i], short[i])]
        assert len(coefficients[1]) == 16
        np.testing.assert_array_equal(coefficients[1], coefficients[0][:16])
    resampled.save_pretrained(tmp_path)
    assert FastActionTokenizer.from_pretrained(tmp_path).encode_actions(motion(8)) == short


def test_only_chunks_of_the_same_action_are_resampled(fitted):
    with pytest.raises(ValueError, match=r"chunks .*\(5, 8, 3\).* 2"):
        fitted.resample(np.zeros((5, 8, 3)))
    with pytest.raises(ValueError, match=r"chunks .*\(0, 8, 2\)"):
        fitted.resample(np.zeros((0, 8, 2)))
    with pytest.raises(ValueError, match=r"FAST\+"):
        FastActionTokenizer(tokenizer_object=fitted.backend_tokenizer, min_coefficient=0).resample(np.zeros((5, 8, 2)))


def test_an_action_scale_of_another_robot_is_refused(fitted):
    chunks = smooth_chunks(5, 10, 2)
    for action_scale, message in [
        (np.ones(3), r"shape \(3,\)"),
        (np.ones((1, 2)), r"shape \(1, 2\)"),
        ("m", "numbers"),
    ]:
        for method in (
            lambda scale: fitted.report(chunks, scale),
            lambda scale: FastActionTokenizer.fit(chunks, 10.0, 300, scale),
        ):
            with pytest.raises(ValueError, match=f"action_scale .*{message}"):
                method(action_scale)


@needs_fast_plus
def test_a_tokenizer_that_was_not_fitted_says_how_to_measure_it(fast_plus, tmp_path):
    fast_plus.save_pretrained(tmp_path)
    assert "fit_report" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    for tokenizer in (fast_plus, FastActionTokenizer.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"not fitted .*tokenizer.report\(chunks, action_scale\)"):
            print(tokenizer.fit_report)
        assert tokenizer.report(smooth_chunks(5, 10, 2))["num_chunks"] == 5
        tokenizer.save_pretrained(tmp_path)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), horizon=st.integers(1, 8), action_dim=st.integers(1, 3))
def test_fitting_in_batches_changes_nothing(data, horizon, action_dim):
    elements = st.floats(-1, 1, width=32)
    chunks = data.draw(arrays(np.float32, (9, horizon, action_dim), elements=elements, fill=st.nothing()))
    at_once = FastActionTokenizer.fit(chunks, vocab_size=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks_smolandfast, "BATCH_NUMBERS", data.draw(st.integers(1, 60)))
        for same in (chunks, chunks.astype(np.float64), torch.from_numpy(chunks), chunks.tolist()):
            batched = FastActionTokenizer.fit(same, vocab_size=512)
            assert batched.backend_tokenizer.to_str() == at_once.backend_tokenizer.to_str()
            assert (batched.min_coefficient, batched.max_coefficient) == (
                at_once.min_coefficient,
                at_once.max_coefficient,
            )
            for name, value in at_once.fit_report.items():
                np.testing.assert_allclose(batched.fit_report[name], value, rtol=1e-9, atol=1e-15)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), bound=st.integers(1, 30))
def test_a_large_data_set_is_fitted_on_evenly_spaced_chunks_and_every_chunk_can_be_written(data, bound):
    chunks = data.draw(arrays(np.float32, (30, 4, 2), elements=st.floats(-1, 1, width=32), fill=st.nothing()))
    name, limit = data.draw(
        st.sampled_from([("MAX_FITTED_CHUNKS", bound), ("MAX_FITTED_COEFFICIENTS", 8 * bound + 7)])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization_fast_action, name, limit)
        tokenizer = FastActionTokenizer.fit(chunks, vocab_size=256)
    assert not tokenizer.count_saturated(chunks).any()
    rows = np.linspace(0, 29, bound).round().astype(int)
    assert len(set(rows)) == bound == tokenizer.fit_report["num_chunks"]
    assert tokenizer.report(chunks[rows]) == tokenizer.fit_report
    if bound == 30:
        same = FastActionTokenizer.fit(chunks, vocab_size=256)
        assert tokenizer.backend_tokenizer.to_str() == same.backend_tokenizer.to_str()


@pytest.mark.slow
def test_a_large_data_set_is_measured_normalised_and_fitted_in_little_memory():
    """The demonstrations of an ALOHA: bytes for each coefficient, the chunks and their normalised copy included."""
    done = subprocess.run([sys.executable, "-c", MEMORY_OF_A_FIT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 42


def demonstrations_with(fault):
    rng, time = np.random.default_rng(0), np.arange(610)
    actions = np.stack([np.sin(time / (20 + 3 * i) + i) for i in range(7)], axis=1) + rng.normal(0, 0.01, (610, 7))
    if fault == "a joint that hardly moves":
        actions[:, 3] = 1.5686 + 2.0 * (rng.random(610) < 0.004) + rng.normal(0, 1e-4, 610)
    elif fault == "an outlier":
        actions[100, 3] = 1e4
    return actions[:600], actions[np.arange(600)[:, None] + np.arange(10)]


@pytest.mark.parametrize("use_relative_actions", [False, True])
@pytest.mark.parametrize("fault", ["a joint that hardly moves", "an outlier", "nothing"])
def test_quantiles_fit_whatever_the_outliers_and_the_report_says_what_was_clipped(fault, use_relative_actions):
    states, chunks = demonstrations_with(fault)
    normalizer = Normalizer(compute_statistics(states, chunks), "quantiles", 256, use_relative_actions)
    normalized = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
    report = FastActionTokenizer.fit(normalized, action_scale=normalizer.action_scale).fit_report
    clipped = report["clipped_values_by_dim"]
    assert len(clipped) == 7 and all(share < 0.02 for share in clipped)
    assert (clipped[3] > 0) == (fault != "nothing")


@settings(deadline=None, max_examples=30)
@given(data=st.data(), horizon=st.sampled_from([1, 10, 100]), action_dim=st.integers(1, 3))
def test_quantiles_never_need_more_symbols_than_twice_the_range(data, horizon, action_dim):
    """So any demonstrations fit a vocabulary of 1,024, with room for merges."""
    values = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1e-6, 1e4, -1e30])
    actions = data.draw(arrays(np.float64, (20, horizon, action_dim), elements=values))
    normalizer = Normalizer(compute_statistics(actions[:, 0], actions), "quantiles", 256, data.draw(st.booleans()))
    tokenizer = FastActionTokenizer.fit(normalizer.normalize_actions(actions, normalizer.state_bins(actions[:, 0])))
    largest = max(-tokenizer.min_coefficient, tokenizer.max_coefficient)
    assert largest <= 2 * np.sqrt(horizon) * tokenizer.scale + 0.5


@pytest.mark.parametrize(
    "value, scale, vocab_size, fix",
    [
        (1e4, 10.0, 1024, r"Normalise it to about \[-1, 1\] with Normalizer.normalize_actions"),
        (2.0, 100.0, 64, "Use a scale below 100.0, or a vocab_size of 633 and more"),
        (2.0, 1e6, 100_000, "Use a scale below 1000000.0"),
    ],
)
def test_too_many_symbols_are_refused_with_the_dimension_that_needs_them(value, scale, vocab_size, fix):
    chunks = np.zeros((3, 10, 4))
    chunks[1, :, 2] = value
    with pytest.raises(ValueError, match=rf"dimension 2, .* run from 0 to {re.escape(f'{value:.4g}')}\. {fix}\.$"):
        FastActionTokenizer.fit(chunks, scale, vocab_size)


def test_long_chunks_of_many_dimensions_work_in_their_own_shape_alone():
    chunks = smooth_chunks(40, 50, 14)
    tokenizer = FastActionTokenizer.fit(chunks, scale=10.0, vocab_size=1024)
    ids = tokenizer.encode_actions(chunks)
    assert len(tokenizer) == 1024 and max(map(len, ids)) < 50 * 14 / 2  # it compresses
    assert np.abs(tokenizer.decode_actions(ids, horizon=50, action_dim=14) - chunks).max() <= np.sqrt(50) * 0.5 / 10
    with pytest.raises(ValueError, match=r"\(100, 7\).*fitted for \(50, 14\)"):
        tokenizer.decode_actions(ids, horizon=100, action_dim=7)
