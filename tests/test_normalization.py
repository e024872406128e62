"""Robot units to [-1, 1] and back, and states to bins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from smolandfast import FastActionTokenizer, Normalizer, checks_smolandfast, compute_statistics, match_joints
from smolandfast.training import make_tiny_processor

PUSHT_STATS = Path(__file__).parents[2] / "shared" / "data" / "pusht" / "meta" / "stats.json"
VALUES = st.floats(-1000, 1000, width=32)
NORMALIZATIONS = pytest.mark.parametrize("normalization", ["min_max", "quantiles"])


def demonstrations(n=500, chunk_size=4, dim=2, seed=0):
    """States that walk through [0, 512], and as actions the states that follow, with a little noise."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(0, 8, (n + chunk_size, dim)), axis=0)
    walk = 512 * (walk - walk.min(axis=0)) / np.ptp(walk, axis=0)
    chunks = np.stack([walk[i + 1 : i + 1 + chunk_size] for i in range(n)])
    return walk[:n], chunks + rng.normal(0, 2, chunks.shape)


@pytest.fixture
def statistics():
    return compute_statistics(*demonstrations())


def plain_statistics(low, high):
    """The same bounds for everything."""
    bounds = {"min": low, "q01": low, "max": high, "q99": high}
    return {"observation.state": bounds, "action": bounds, "relative_action": bounds}


@pytest.mark.parametrize("use_relative_actions", [False, True])
@NORMALIZATIONS
def test_demonstrated_actions_survive_the_round_trip(statistics, normalization, use_relative_actions):
    states, actions = demonstrations()
    normalizer = Normalizer(statistics, normalization, use_relative_actions=use_relative_actions)
    bins = normalizer.state_bins(states)
    normalized = normalizer.normalize_actions(actions, bins)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalizer.unnormalize_actions(normalized, bins), actions, atol=1e-3)


@settings(deadline=None)
@given(
    actions=arrays(np.float64, (3, 4, 2), elements=VALUES, fill=st.nothing()),
    states=arrays(np.float64, (3, 2), elements=VALUES, fill=st.nothing()),
    use_relative_actions=st.booleans(),
    n_state_bins=st.integers(1, 1000),
)
def test_any_action_within_the_limits_survives_the_round_trip(actions, states, use_relative_actions, n_state_bins):
    statistics = plain_statistics([-1000.0, -1500.0], [1000.0, 1500.0])
    normalizer = Normalizer(statistics, "min_max", n_state_bins, use_relative_actions)
    bins = normalizer.state_bins(states)
    back = normalizer.unnormalize_actions(normalizer.normalize_actions(actions, bins), bins)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, actions, atol=2e-3)  # float32 at up to 4000


@pytest.mark.parametrize("normalization, low, high", [("min_max", "min", "max"), ("quantiles", "q01", "q99")])
def test_the_bounds_become_minus_one_and_one(statistics, normalization, low, high):
    normalizer = Normalizer(statistics, normalization)
    bounds = np.array([[statistics["action"][low], statistics["action"][high]]])  # (1, 2, D)
    np.testing.assert_allclose(normalizer.normalize_actions(bounds, np.zeros((1, 2))), [[[-1, -1], [1, 1]]])
    np.testing.assert_allclose(normalizer.action_scale, (bounds[0, 1] - bounds[0, 0]) / 2)


def test_quantiles_clip_outliers_at_two_in_both_directions():
    statistics = plain_statistics([-1.0], [1.0])
    statistics["action"] = {"min": [-10.0], "q01": [-1.0], "q99": [1.0], "max": [1e30]}
    normalizer = Normalizer(statistics, "quantiles")
    normalized = normalizer.normalize_actions([[[-10.0], [1.5], [2.0], [1e30]]], np.zeros((1, 1)))
    assert normalized.tolist() == [[[-2.0], [1.5], [2.0], [2.0]]]
    assert normalizer.unnormalize_actions(normalized, None).tolist() == normalized.tolist()
    written = np.array([[[-2.0], [-2.1], [1e6], [0.5]]])  # whatever a policy writes
    assert normalizer.unnormalize_actions(written, None).tolist() == [[[-2.0], [-2.0], [2.0], [0.5]]]
    assert normalizer.count_clipped_actions(written, None).tolist() == [2]


@settings(deadline=None)
@given(data=st.data(), use_relative_actions=st.booleans())
def test_quantiles_bound_what_is_learnt_and_what_the_robot_is_sent(data, use_relative_actions):
    """Whatever the outliers, and however little a dimension moves."""
    values = st.floats(-1, 1) | st.sampled_from([1e-6, 5e3, -1e6])
    states = data.draw(arrays(np.float64, (30, 2), elements=values))
    actions = data.draw(arrays(np.float64, (30, 2, 2), elements=values))
    normalizer = Normalizer(compute_statistics(states, actions), "quantiles", 256, use_relative_actions)
    bins = normalizer.state_bins(states)
    normalized = normalizer.normalize_actions(actions, bins)
    assert np.abs(normalized).max() <= 2
    (low, high), (first, last) = normalizer.action_bounds, normalizer.state_bounds
    reference = ((bins + 0.5) / 256 * (last - first) + first)[:, None] if use_relative_actions else 0.0
    nearest, furthest = (low + high) / 2 + reference - (high - low), (low + high) / 2 + reference + (high - low)
    limits = normalizer.action_limits
    expected = actions.clip(nearest, furthest).clip(*limits)
    size = np.abs([low, high, *limits]).max() + np.abs(reference).max()
    size = max(size, 1e6 * float(np.finfo(np.float32).tiny))  # actions are float32, which has nothing smaller
    np.testing.assert_allclose(normalizer.unnormalize_actions(normalized, bins), expected, rtol=1e-6, atol=1e-6 * size)
    written = data.draw(arrays(np.float64, (30, 2, 2), elements=st.floats(-1e9, 1e9)))  # by an untrained policy
    sent = normalizer.unnormalize_actions(written, bins)
    bounds = np.broadcast_to(nearest, sent.shape).clip(*limits), np.broadcast_to(furthest, sent.shape).clip(*limits)
    assert (sent >= bounds[0] - 1e-6 * size).all() and (sent <= bounds[1] + 1e-6 * size).all()


def test_relative_actions_are_relative_to_the_centre_of_the_states_bin():
    normalizer = Normalizer(plain_statistics([0.0], [8.0]), n_state_bins=4, use_relative_actions=True)
    bins = normalizer.state_bins([[2.5]])  # bins are 2 wide, so the centre of this one is 3
    assert bins.tolist() == [[1]]
    assert normalizer.normalize_actions([[[7.0], [3.0]]], bins).tolist() == [[[0.0], [-1.0]]]
    assert normalizer.unnormalize_actions(np.array([[[0.0], [-1.0]]]), bins).tolist() == [[[7.0], [3.0]]]


@NORMALIZATIONS
@pytest.mark.parametrize("constant", [0.0, 0.1, -37.25])
def test_a_dimension_that_never_moves_comes_back_exactly(normalization, constant):
    normalizer = Normalizer(plain_statistics([constant, -1.0], [constant, 1.0]), normalization)
    bins = normalizer.state_bins([[constant, 0.5], [constant + 9, 0.5]])
    actions = np.full((2, 3, 2), [constant, 0.5])
    normalized = normalizer.normalize_actions(actions, bins)
    assert np.isfinite(normalized).all() and not normalized[..., 0].any()
    for written in (normalized, normalized + 0.7, normalized - 3):  # whatever the model writes there
        assert (normalizer.unnormalize_actions(written, bins)[..., 0] == np.float32(constant)).all()


@pytest.mark.parametrize("use_relative_actions", [False, True])
def test_actions_are_clipped_to_the_smallest_and_largest_seen(statistics, use_relative_actions):
    normalizer = Normalizer(statistics, use_relative_actions=use_relative_actions)
    bins = normalizer.state_bins(demonstrations()[0][:2])
    for written, limit in ((50.0, "max"), (-50.0, "min")):
        actions = normalizer.unnormalize_actions(np.full((2, 4, 2), written), bins)
        expected = np.array(statistics["action"][limit], dtype=np.float32)
        np.testing.assert_array_equal(actions, np.broadcast_to(expected, actions.shape))


def test_bins_are_equal_parts_closed_below():
    normalizer = Normalizer(plain_statistics([-1.0], [1.0]), n_state_bins=4)
    states = np.array([-1.0, np.nextafter(-0.5, -1), -0.5, -0.01, 0.0, 0.5, np.nextafter(1.0, 0), 1.0])
    assert normalizer.state_bins(states[:, None]).ravel().tolist() == [0, 0, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("n_state_bins", [1, 2, 256])
def test_states_beyond_the_demonstrations_fall_into_the_outer_bins(n_state_bins):
    normalizer = Normalizer(plain_statistics([0.0, 5.0], [512.0, 5.0]), n_state_bins=n_state_bins)
    bins = normalizer.state_bins([[-0.1, -9.0], [-1e30, 5.0], [512.1, 9.0], [1e30, 5.0]])
    constant = n_state_bins // 2  # a state that never moves stands in the middle
    assert bins.tolist() == [[0, constant]] * 2 + [[n_state_bins - 1, constant]] * 2
    assert bins.dtype == np.int64


@settings(deadline=None)
@given(states=arrays(np.float64, (5, 2), elements=st.floats(-1e6, 1e6)), n_state_bins=st.integers(1, 1000))
def test_every_state_has_a_bin_and_its_centre_is_half_a_bin_away_at_most(states, n_state_bins):
    normalizer = Normalizer(plain_statistics([-10.0, 0.0], [10.0, 512.0]), n_state_bins=n_state_bins)
    bins = normalizer.state_bins(states)
    assert (bins >= 0).all() and (bins < n_state_bins).all()
    width = np.array([20.0, 512.0]) / n_state_bins
    centres = [-10.0, 0.0] + (bins + 0.5) * width
    assert (np.abs(centres - states.clip([-10.0, 0.0], [10.0, 512.0])) <= width / 2 + 1e-9).all()


def test_tensors_and_lists_are_taken_like_arrays(statistics):
    states, actions = (array[:3] for array in demonstrations())
    normalizer = Normalizer(statistics)
    bins = normalizer.state_bins(states)
    normalized = normalizer.normalize_actions(actions, bins)
    for convert in (torch.tensor, np.ndarray.tolist):
        np.testing.assert_array_equal(normalizer.state_bins(convert(states)), bins)
        np.testing.assert_array_equal(normalizer.normalize_actions(convert(actions), bins), normalized)
    assert normalizer.state_bins(torch.tensor(states).to(torch.bfloat16)).shape == (3, 2)


def test_statistics_are_those_of_the_demonstrations():
    states, actions = demonstrations(n=50)
    statistics = compute_statistics(states, actions)
    expected = {
        "observation.state": states,
        "action": actions.reshape(-1, 2),
        "relative_action": (actions - states[:, None]).reshape(-1, 2),
    }
    assert statistics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(statistics[name]["min"], values.min(axis=0))
        np.testing.assert_array_equal(statistics[name]["max"], values.max(axis=0))
        np.testing.assert_allclose(statistics[name]["q01"], np.quantile(values, 0.01, axis=0))
        np.testing.assert_allclose(statistics[name]["q99"], np.quantile(values, 0.99, axis=0))
    assert json.loads(json.dumps(statistics)) == statistics
    assert "relative_action" not in compute_statistics(np.zeros((5, 3)), np.zeros((5, 4, 2)))


@settings(deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from([np.float32, np.float64, np.int16]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3)),
)
def test_measuring_and_normalising_in_batches_changes_no_bit(data, dtype, shape):
    elements = st.integers(-999, 999) if dtype == np.int16 else VALUES
    actions = data.draw(arrays(dtype, shape, elements=elements))
    states = data.draw(arrays(dtype, (shape[0], shape[2]), elements=elements))
    statistics = compute_statistics(states, actions)
    relative = actions.astype(np.float64) - states.astype(np.float64)[:, None]
    for name, values in {"observation.state": states, "action": actions, "relative_action": relative}.items():
        flat = values.astype(np.float64).reshape(-1, shape[2])
        quantiles = np.quantile(flat, [0.01, 0.99], axis=0).tolist()
        expected = dict(
            zip(("min", "max", "q01", "q99"), [flat.min(0).tolist(), flat.max(0).tolist(), *quantiles], strict=True)
        )
        assert statistics[name] == expected
    normalizer = Normalizer(statistics, use_relative_actions=data.draw(st.booleans()))
    bins = normalizer.state_bins(states)
    at_once = normalizer.normalize_actions(actions, bins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks_smolandfast, "BATCH_NUMBERS", data.draw(st.integers(1, 20)))
        np.testing.assert_array_equal(normalizer.normalize_actions(actions, bins), at_once)
    low, high = normalizer.action_bounds
    if not normalizer.use_relative_actions and (low < high).all():
        expected = ((actions.astype(np.float64) - low) / (high - low) * 2 - 1).astype(np.float32)
        np.testing.assert_array_equal(at_once, expected)


def test_clipping_at_two_is_part_of_a_policys_meaning(demonstrations):
    """Bounds may be equal under both normalisations; what is read from the same tokens is not."""
    statistics = compute_statistics(*demonstrations)
    for numbers in statistics.values():
        numbers |= {"q01": numbers["min"], "q99": numbers["max"]}
    tokenizer = FastActionTokenizer.fit(np.zeros((1, 8, 2)))
    fingerprints = {
        make_tiny_processor(tokenizer, statistics, TASK, normalization=normalization).fingerprint
        for normalization in ("min_max", "quantiles")
    }
    assert len(fingerprints) == 2


def test_statistics_of_no_numbers_are_refused():
    for states, actions in ((np.zeros((0, 2)), np.zeros((0, 4, 2))), (np.zeros((3, 2)), np.zeros((3, 0, 2)))):
        with pytest.raises(ValueError, match=r"(states|actions) is empty, of shape \("):
            compute_statistics(states, actions)


def test_relative_actions_of_other_dimensions_are_refused_with_both(statistics):
    """Whether or not the statistics hold relative actions, which compute_statistics leaves out then."""
    measured = compute_statistics(np.zeros((5, 7)), np.zeros((5, 4, 6)))
    with pytest.raises(ValueError, match="use_relative_actions .*'observation.state' has 7 and 'action' has 6"):
        Normalizer(measured, use_relative_actions=True)
    statistics["relative_action"] = {name: [0.0] * 3 for name in ("min", "max", "q01", "q99")}
    with pytest.raises(ValueError, match=r"statistics\['relative_action'\] has 3 dimensions.* have 2"):
        Normalizer(statistics, use_relative_actions=True)


@NORMALIZATIONS
def test_joints_are_relative_while_a_gripper_stays_absolute(normalization):
    states, actions = demonstrations(dim=3)
    actions[..., 2] /= 5
    dims = [1, 0, None]
    statistics = compute_statistics(states, actions, dims)
    assert statistics["relative_action"]["max"][0] == (actions[..., 0] - states[:, None, 1]).max()
    assert statistics["relative_action"]["q01"][2] == statistics["action"]["q01"][2]
    normalizer = Normalizer(statistics, normalization, use_relative_actions=True, reference_dims=dims)
    absolute = Normalizer(statistics, normalization)
    bins = normalizer.state_bins(states)
    normalized = normalizer.normalize_actions(actions, bins)
    np.testing.assert_array_equal(normalized[..., 2], absolute.normalize_actions(actions, bins)[..., 2])
    other_state = normalizer.normalize_actions(actions, bins + [1, 0, 1])
    np.testing.assert_array_equal((other_state != normalized).any(axis=(0, 1)), [False, True, False])
    is_kept = np.abs(normalized) < normalizer.normalized_limit
    difference = np.abs(normalizer.unnormalize_actions(normalized, bins) - actions)
    assert difference[is_kept].max() < 1e-3 and is_kept.mean() > 0.95
    assert not normalizer.count_clipped_actions(normalized[is_kept.all(axis=(1, 2))][:3], bins[:3]).any()


def test_a_state_longer_than_the_action_gives_the_references_by_dimension():
    states, actions = demonstrations(dim=4)
    actions = actions[..., [2, 0]]
    statistics = compute_statistics(states, actions, [2, 0])
    normalizer = Normalizer(statistics, use_relative_actions=True, reference_dims=[2, 0])
    bins = normalizer.state_bins(states)
    normalized = normalizer.normalize_actions(actions, bins)
    assert normalized.shape == actions.shape
    np.testing.assert_allclose(normalizer.unnormalize_actions(normalized, bins), actions, atol=1e-3)
    width = normalizer.action_scale[0]
    states[:, 2] += 0.4  # within a bin of two units or at its edge: the reference moves by the whole bin or not at all
    assert np.abs(normalizer.normalize_actions(actions, normalizer.state_bins(states)) - normalized).max() < 4 / width


JOINTS = ["pan.pos", "lift.pos", "Gripper.pos"]


@pytest.mark.parametrize(
    "state_names, action_names, exclude, expected",
    [
        (None, None, [], None),
        (JOINTS, JOINTS, [], None),
        (JOINTS, JOINTS, ["gripper"], [0, 1, None]),
        (JOINTS, JOINTS, ["gripper.pos", "LIFT"], [0, None, None]),
        (JOINTS[::-1], JOINTS, [], [2, 1, 0]),
        (["temperature", *JOINTS], JOINTS, ["gripper"], [1, 2, None]),
        (["a", "b", "c"], JOINTS, ["gripper"], [0, 1, None]),
        (["a", "b", "c"], JOINTS, [], None),
        (JOINTS[:2], JOINTS, ["gripper"], [0, 1, None]),
    ],
)
def test_actions_are_relative_to_the_state_of_the_same_name(state_names, action_names, exclude, expected):
    assert match_joints(state_names, action_names, exclude) == expected


@pytest.mark.parametrize(
    "state_names, action_names, exclude, message",
    [
        (None, None, ["gripper"], "relative_exclude_joints is .'gripper'., .*no action_names"),
        (None, JOINTS, ["gripper"], "relative_exclude_joints is .'gripper'., .*no state_names"),
        (JOINTS, JOINTS, ["griper"], "relative_exclude_joints has 'griper'.*Gripper.pos"),
        (JOINTS, JOINTS, [2], "relative_exclude_joints has 2"),
        (JOINTS[:2], JOINTS, [], "'Gripper.pos'.*relative_exclude_joints=.'Gripper.pos'."),
        (["x", "y", "Gripper.pos"], ["Gripper.pos", "x", "z"], [], "'z'.*relative_exclude_joints=.'z'."),
    ],
)
def test_joints_that_cannot_be_matched_are_refused(state_names, action_names, exclude, message):
    with pytest.raises(ValueError, match=message):
        match_joints(state_names, action_names, exclude)


@pytest.mark.parametrize("dims", [[0], [0, 2], [0, -1], [None, None], [0, "y"], [0, True], 1, [0, 1.0]])
def test_references_outside_the_state_are_refused(statistics, dims):
    with pytest.raises(ValueError, match="reference_dims is"):
        Normalizer(statistics, use_relative_actions=True, reference_dims=dims)
    with pytest.raises(ValueError, match="reference_dims is"):
        compute_statistics(*demonstrations(), dims)


@pytest.mark.skipif(not PUSHT_STATS.exists(), reason=f"the PushT data set is not at {PUSHT_STATS}")
@NORMALIZATIONS
def test_the_statistics_file_of_a_lerobot_data_set_serves_as_it_is(normalization):
    statistics = json.loads(PUSHT_STATS.read_text())
    normalizer = Normalizer(statistics, normalization)
    assert (normalizer.state_dim, normalizer.action_dim) == (2, 2)
    actions = np.array([[[12.0, 25.0], [511.0, 511.0], [200.0, 300.0]]])
    normalized = normalizer.normalize_actions(actions, np.zeros((1, 2)))
    np.testing.assert_allclose(normalizer.unnormalize_actions(normalized, None), actions, atol=1e-3)
    with pytest.raises(ValueError, match="relative_action"):
        Normalizer(statistics, normalization, use_relative_actions=True)


@pytest.mark.parametrize("field", ["observation.state", "action", "relative_action"])
def test_bad_statistics_are_refused_by_the_name_of_their_field(statistics, field):
    def refused(change, message):
        broken = json.loads(json.dumps(statistics))
        change(broken)
        with pytest.raises(ValueError, match=rf"{field}.*{message}"):
            Normalizer(broken, use_relative_actions=True)

    refused(lambda broken: broken.pop(field), "compute_statistics")
    refused(lambda broken: broken[field].pop("max"), "'max'")
    for wrong in ([0.0, float("nan")], [0.0, float("inf")], [0.0, None], [], 0.0, [[0.0, 0.0]], None):
        refused(lambda broken, wrong=wrong: broken[field].update(min=wrong), "(expected|not an array)")
    refused(lambda broken: broken[field].update(min=[0.0, 1e9]), "min is .* max is")
    refused(lambda broken: broken[field].update(min=[0.0]), "min is .* max is")


@pytest.mark.parametrize("statistics, name", [(None, "statistics"), ([], "statistics"), ({}, "observation.state")])
def test_missing_statistics_are_refused(statistics, name):
    with pytest.raises(ValueError, match=name):
        Normalizer(statistics)


def test_options_that_cannot_work_are_refused(statistics):
    with pytest.raises(ValueError, match="normalization is 'mean_std', expected one of min_max, quantiles"):
        Normalizer(statistics, "mean_std")
    statistics["observation.state"] = {"min": [0.0] * 3, "max": [1.0] * 3}
    with pytest.raises(ValueError, match="use_relative_actions .*'observation.state' has 3 and 'action' has 2"):
        Normalizer(statistics, use_relative_actions=True)


@pytest.mark.parametrize(
    "state, message",
    [
        ([0.0, 0.0], r"state has shape \(2,\), expected \(batch, 2\)"),
        ([[0.0, 0.0, 0.0]], r"state has shape \(1, 3\)"),
        ([[0.0, 0.0], [float("nan"), 0.0]], r"state\[1, 0\] is nan"),
        ([["left", "right"]], "state is not an array of numbers"),
        ([[0.0], [0.0, 1.0]], "state is not an array of numbers"),
        (None, "state has shape"),
    ],
)
def test_states_that_are_not_finite_vectors_are_refused(statistics, state, message):
    with pytest.raises(ValueError, match=message):
        Normalizer(statistics).state_bins(state)


@pytest.mark.parametrize(
    "actions, message",
    [
        (np.zeros((1, 4)), r"actions has shape \(1, 4\), expected \(batch, chunk_size, 2\)"),
        (np.zeros((1, 4, 3)), r"actions has shape \(1, 4, 3\)"),
        (np.full((1, 4, 2), np.inf), r"actions\[0, 0, 0\] is inf"),
        (np.zeros((2, 4, 2)), "2 chunks for 1 states"),
    ],
)
def test_actions_that_are_not_finite_chunks_are_refused(statistics, actions, message):
    with pytest.raises(ValueError, match=message):
        Normalizer(statistics).normalize_actions(actions, np.zeros((1, 2), dtype=int))
