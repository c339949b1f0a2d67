"""EmoPulse: the tables of the published README, the guarantees of the paper (4.2), the stop signals."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.errors import BadInput, NonFiniteLossError
from emomerge.optim.pulse import FLOATS, PRESETS, EmoPulse, snr

CONSTANT, WANDERING, FALLING, RISING, SIGNED = KINDS = range(5)
SEQUENCES = st.tuples(
    st.integers(0, 2**32), st.sampled_from(KINDS), st.integers(1, 60), st.floats(-8, 8), st.sampled_from([0.0, 0.1, 0.5])
)


def losses_of(seed: int, kind: int, length: int, exponent: float, spikes: float) -> list[float]:
    """Losses around 10^exponent of one kind, some of them multiplied by up to 10^±16."""
    draw = random.Random(seed)
    losses = []
    for step in range(length):
        shape = {CONSTANT: 1.0, WANDERING: draw.uniform(0.5, 1.5), FALLING: 0.8**step, RISING: 1.25**step}
        loss = 10**exponent * shape.get(kind, draw.choice([-1.0, 0.0, 1.0]))
        losses.append(loss * 10 ** draw.uniform(-16, 16) if draw.random() < spikes else loss)
    return losses


@pytest.mark.parametrize(
    ("d_base", "row"),
    [(0.1, (1.00, 0.04, 0.0204)), (0.5, (25.00, 1.00, 0.5102)), (0.7, (49.00, 1.96, 1.00))],
)
def test_readme_table_of_the_ratio(d_base: float, row: tuple[float, ...]) -> None:
    assert [snr(d_base, noise_base) for noise_base in (0.1, 0.5, 0.7)] == pytest.approx(row, abs=5e-5)


@pytest.mark.parametrize(
    ("scalar", "trust", "noise_base", "dnr_now", "after"),
    [
        (0.50, 0.50, 0.10, 25.00, 1.5),  # maximum acceleration
        (0.45, 0.55, 0.20, 6.25, 1.5),  # acceleration
        (0.20, 0.80, 0.70, 0.51, 1.0),  # maintain
        (-0.20, -0.80, 0.70, 0.51, 1.0),  # maintain
        # The README says "deceleration" here, but its own rule leaves −0.55 outside the band: the history stays.
        (-0.45, -0.55, 0.20, 6.25, 1.0),
        (-0.50, -0.50, 0.10, 25.00, 25 * 0.8),  # "maximum deceleration", but the rule assigns dNR_now · 0.8
    ],
)
def test_readme_table_of_trust(scalar: float, trust: float, noise_base: float, dnr_now: float, after: float) -> None:
    assert math.copysign(1 - abs(scalar), scalar) == pytest.approx(trust)
    assert abs(scalar - trust) + 0.1 == pytest.approx(noise_base)
    assert snr(0.7 - 0.3 + 0.1, noise_base) == pytest.approx(dnr_now, abs=5e-3)
    assert PRESETS["v3.8"].next_dnr(1.0, dnr_now, trust, FLOATS) == pytest.approx(after)


@pytest.mark.parametrize(
    ("goal", "trust", "after"),
    [
        (10.0, 0.55, 1.1),
        (10.0, -0.55, 1.1),  # one bad loss in a long fall
        (1.05, 0.80, 1.05),
        (0.95, -0.80, 0.95),
        (0.10, 0.80, 0.8),
        (10.0, 0.50, 1.0),  # a steep fall: hold
        (0.90, 0.50, 0.9),
        (10.0, -0.50, 0.8),  # a steep rise: brake
        (10.0, -0.00, 0.8),
    ],
)
def test_guarded_follows_its_goal_within_limits(goal: float, trust: float, after: float) -> None:
    assert PRESETS["guarded"].next_dnr(1.0, goal, trust, FLOATS) == pytest.approx(after)


def test_first_step_of_v37_keeps_the_history() -> None:
    twin = replace(PRESETS["v3.7"], hold_first=False)
    assert twin.next_dnr(1.0, 1.2, 1.0, FLOATS) > 1.0
    pulse = EmoPulse("v3.7")
    pulse.noise, pulse.distance = 0.0, 2.0  # dNR_now > 1 at once
    pulse.update(1.0)
    assert pulse.dnr == 1.0
    pulse.update(1.0)
    assert pulse.dnr == 1.05


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=2000, deadline=None)
@given(sequence=SEQUENCES, scope=st.sampled_from([1.0, 1e-2, 30.0]), cautious=st.booleans())
def test_bounds_for_any_finite_losses(
    preset: str, sequence: tuple[int, int, int, float, float], scope: float, cautious: bool
) -> None:
    pulse, constants = EmoPulse(preset, scope, cautious, size=0.005), PRESETS[preset]
    largest = constants.max_rate * scope if preset == "v3.9" else constants.max_rate
    for loss in losses_of(*sequence):
        before = pulse.dnr
        rate_before = pulse.rate
        rate = pulse.update(loss)
        assert constants.min_rate <= rate <= max(largest, constants.min_rate)
        assert 0.1 <= abs(pulse.sigma - pulse.trust) + 0.1 < 2.1
        hesitant = abs(pulse.trust) <= 0.5
        if span := constants.span:
            assert 1 / span - 1e-12 <= pulse.dnr <= min(before * constants.grow, span + 1e-12, constants.top)
            assert not hesitant or rate <= rate_before
        else:
            assert pulse.dnr <= before * constants.grow or hesitant
    assert all(math.isfinite(value) for value in pulse.state_dict().values() if isinstance(value, float))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("largest", [1e308, -1e308, 5e-324])
def test_state_stays_finite_at_the_ends_of_double_precision(preset: str, largest: float) -> None:
    pulse = EmoPulse(preset, size=0.005)
    for loss in (largest, -largest, 0.0, largest, largest):
        pulse.update(loss)
        assert all(math.isfinite(value) for value in pulse.state_dict().values() if isinstance(value, float))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_guarded_rate_tells_a_fall_from_wandering_and_from_a_rise(scale: float) -> None:
    noise = random.Random(0)
    rates = {}
    for name, trend in {"fall": 0.999, "none": 1.0, "rise": 1.001}.items():
        pulse = EmoPulse("guarded")
        for step in range(3000):
            pulse.update(scale * trend**step * noise.uniform(0.9, 1.1))
        rates[name] = pulse.rate
    assert rates["fall"] == pytest.approx(1e-3, rel=0.05)
    assert rates["none"] == pytest.approx(1e-4, rel=0.5)
    assert rates["rise"] == pytest.approx(1e-5, rel=0.05)


def test_auto_takes_its_scale_from_the_weights_and_its_changes_from_the_loss() -> None:
    noise, rates = random.Random(0), {}
    for name, trend in {"fall": 0.999, "flat": 1.0, "rise": 1.001}.items():
        pulse = EmoPulse("auto", size=0.005)
        for step in range(3000):
            pulse.update(trend**step * noise.uniform(0.95, 1.05))
        rates[name] = pulse.rate / (0.12 * 0.005)
    assert rates["fall"] == pytest.approx(1)
    assert 0.7 <= rates["flat"] <= 1
    assert rates["rise"] == pytest.approx(1 / 3, rel=0.2)


def test_auto_does_not_starve_on_a_loss_that_starts_flat() -> None:
    """A reason for w's initial value: `guarded` takes the first few fluctuations for a rise."""
    rates = {}
    for preset in ("guarded", "auto"):
        pulse, noise = EmoPulse(preset, size=1.0), random.Random(3)
        start = pulse.rate
        rates[preset] = min(pulse.update(0.69 + noise.uniform(-0.01, 0.01)) / start for _ in range(60))
    assert rates["guarded"] < 0.3
    assert rates["auto"] > 0.9


def test_auto_needs_the_size_of_the_weights() -> None:
    with pytest.raises(BadInput, match=r"size=weight_size\(parameters\)"):
        EmoPulse("auto").update(1.0)
    with pytest.raises(BadInput, match="size of the weights out of range"):
        EmoPulse("auto", size=-1.0)


def test_state_without_a_size_is_one_of_an_earlier_version() -> None:
    state = EmoPulse("guarded").state_dict()
    del state["size"]
    pulse = EmoPulse()
    pulse.load_state_dict(state)
    assert pulse.preset == "guarded" and pulse.size == 0


def test_guarded_comes_down_after_a_steep_start_where_v38_stays_up() -> None:
    rates = {}
    for preset in ("v3.8", "guarded"):
        pulse, noise = EmoPulse(preset), random.Random(0)
        highest = max(pulse.update((1 + 20 * 0.97**step) * noise.uniform(0.9, 1.1)) for step in range(3000))
        rates[preset] = pulse.rate / highest
    assert rates["v3.8"] > 0.5
    assert rates["guarded"] < 0.3


def test_published_brake_may_speed_up() -> None:
    """A reason for `guarded`: a spike puts v3.8 into the band with a high momentary ratio."""
    rates = {}
    for preset in ("v3.8", "guarded"):
        pulse = EmoPulse(preset)
        for loss in [1.0] * 300 + [1.0, 3.0]:
            pulse.update(loss)
        rates[preset] = pulse.dnr
    assert abs(pulse.trust) <= 0.5
    assert rates["v3.8"] > 2 * rates["guarded"]


@pytest.mark.parametrize("preset", ["v3.8", "v3.8-fft"])
def test_rest_turns_the_signal_on_and_slows_the_next_step(preset: str) -> None:
    pulse = EmoPulse(preset)
    while not pulse.should_stop:
        rate = pulse.update(0.7)
        assert pulse.steps < 2000
    assert rate == pulse.rate_at(1.0) and pulse.gain == 1.0
    dnr = pulse.dnr
    slowed = pulse.update(0.7)
    assert pulse.should_stop and pulse.stop_steps == 2
    assert slowed == pytest.approx(0.1 * pulse.dnr * PRESETS[preset].base_scale)
    pulse.update(0.6)
    assert not pulse.should_stop and pulse.gain == 0.1  # judged after the rate of its own step
    assert pulse.update(0.6) == pytest.approx(pulse.dnr * PRESETS[preset].base_scale) and pulse.gain == 1.0
    assert dnr > 0 and pulse.scope == 1.0


def test_rest_leaves_the_rate_of_guarded_alone() -> None:
    pulse = EmoPulse("guarded")
    while not pulse.should_stop:
        assert pulse.update(0.7) == pytest.approx(1e-4, rel=1e-4)
        assert pulse.steps < 2000
    assert pulse.update(0.7) == pytest.approx(1e-4, rel=1e-4) and pulse.stop_steps == 2
    rate = pulse.rate
    for _ in range(5):
        rate, before = pulse.update(0.6), rate
        assert rate <= 1.1 * before
    assert not pulse.should_stop and pulse.gain == 1.0


def test_stop_of_v37_takes_sigma_by_the_long_average() -> None:
    pulse = EmoPulse("v3.7")
    while not pulse.should_stop and pulse.steps < 5000:
        pulse.update(0.7)
    # The floor of N keeps d_base at 1.099 under a constant loss, so the balance is never exact enough.
    assert not pulse.should_stop
    pulse.distance = (1.001 - 0.03) / 0.97  # balances the floor
    pulse.update(0.7)
    assert pulse.should_stop and pulse.gain == 1.0


def test_stop_of_v39_is_a_low_loss_with_progress() -> None:
    pulse = EmoPulse("v3.9")
    for _ in range(200):
        pulse.update(0.05)
    assert pulse.distance - pulse.noise >= 0.3 and not pulse.should_stop
    while pulse.medium > 0.04:
        assert not pulse.should_stop
        pulse.update(0.039)
    assert pulse.should_stop


def test_v39_follows_the_trend() -> None:
    falling, rising = EmoPulse("v3.9"), EmoPulse("v3.9")
    for t in range(10):
        falling.update(1.0 - 0.09 * t)
        rising.update(1.0 + 0.5 * t)
    assert falling.gain > 1 > rising.gain >= 1e-2
    assert falling.gain == 100**falling.chain


def test_largest_rate_follows_the_scope_in_v39_only() -> None:
    for preset, largest in (("v3.8", 3e-3), ("v3.8-fft", 3e-4), ("v3.9", 1.5e-3), ("guarded", 3e-3)):
        pulse = EmoPulse(preset, scope=0.5)
        pulse.dnr = 1e6
        assert pulse.rate_at(0.5) == largest
        pulse.dnr = 0.0
        assert pulse.rate_at(0.5) == PRESETS[preset].min_rate


def test_cautious_start() -> None:
    for preset in PRESETS:
        pulse = EmoPulse(preset, cautious=True, size=0.005)
        assert (pulse.noise, pulse.distance) == (0.2, 0.2)
        eager = EmoPulse(preset, size=0.005)
        for _ in range(20):
            pulse.update(1.0)
            eager.update(1.0)
        assert pulse.distance > eager.distance and pulse.noise < eager.noise


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_leaves_the_state(loss: float, preset: str) -> None:
    pulse = EmoPulse(preset, size=0.005)
    for _ in range(3):
        before = pulse.state_dict()
        with pytest.raises(NonFiniteLossError, match="loss is"):
            pulse.update(loss)
        assert pulse.state_dict() == before
        pulse.update(1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_state_continues_bit_identically(preset: str) -> None:
    losses = [1 + 0.5 * math.sin(0.3 * t) + (3 if t % 17 == 0 else 0) for t in range(60)]
    whole = EmoPulse(preset, size=0.005)
    rates = [whole.update(loss) for loss in losses]
    for cut in (0, 1, 30):
        first, second = EmoPulse(preset, cautious=True, size=0.005), EmoPulse()
        first.load_state_dict(EmoPulse(preset, size=0.005).state_dict())
        assert [first.update(loss) for loss in losses[:cut]] == rates[:cut]
        second.load_state_dict(first.state_dict())
        assert [second.update(loss) for loss in losses[cut:]] == rates[cut:]
        assert second == whole


def test_bad_arguments() -> None:
    with pytest.raises(BadInput, match=r"unknown preset; expected v3.7 \|.*found 'v4'"):
        EmoPulse("v4")
    for scope in (-1.0, math.nan, math.inf):
        with pytest.raises(BadInput, match="emoScope"):
            EmoPulse(scope=scope)
    pulse = EmoPulse()
    with pytest.raises(BadInput, match="no short"):
        pulse.load_state_dict({key: value for key, value in pulse.state_dict().items() if key != "short"})
    with pytest.raises(BadInput, match="unknown preset"):
        pulse.load_state_dict({**pulse.state_dict(), "preset": "v4", "steps": 7})
    assert pulse == EmoPulse()
