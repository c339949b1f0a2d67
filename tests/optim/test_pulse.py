"""EmoPulse: the tables of the published README, the guarantees of the paper (4.2), the stop signals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.errors import BadInput, NonFiniteLossError
from emomerge.optim.pulse import FLOATS, PRESETS, EmoPulse, snr

SIGNED = st.builds(lambda sign, exponent: sign * 10.0**exponent, st.sampled_from([-1, 1]), st.floats(-8, 8))
LOSSES = st.lists(st.one_of(SIGNED, st.just(0.0), st.floats(-1e308, 1e308)), min_size=1, max_size=60)
JUMPS = st.lists(st.sampled_from([0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 30.0]), min_size=20, max_size=200)


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
        (-0.50, -0.50, 0.10, 25.00, 0.8),  # maximum deceleration, which only `guarded` carries out
    ],
)
def test_readme_table_of_trust(scalar: float, trust: float, noise_base: float, dnr_now: float, after: float) -> None:
    assert math.copysign(1 - abs(scalar), scalar) == pytest.approx(trust)
    assert abs(scalar - trust) + 0.1 == pytest.approx(noise_base)
    assert snr(0.7 - 0.3 + 0.1, noise_base) == pytest.approx(dnr_now, abs=5e-3)
    assert PRESETS["guarded"].next_dnr(1.0, dnr_now, trust, FLOATS) == pytest.approx(after)
    published = dnr_now * 0.8 if trust == -0.5 else after
    assert PRESETS["v3.8"].next_dnr(1.0, dnr_now, trust, FLOATS) == pytest.approx(published)


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
@settings(max_examples=60, deadline=None)
@given(losses=LOSSES, scope=st.sampled_from([1.0, 1e-2, 30.0]), cautious=st.booleans())
def test_bounds_for_any_finite_losses(preset: str, losses: list[float], scope: float, cautious: bool) -> None:
    pulse, constants = EmoPulse(preset, scope, cautious), PRESETS[preset]
    largest = constants.max_rate * scope if preset == "v3.9" else constants.max_rate
    for loss in losses:
        before = pulse.dnr
        rate = pulse.update(loss)
        assert constants.min_rate <= rate <= max(largest, constants.min_rate)
        assert 0.1 <= abs(pulse.sigma - pulse.trust) + 0.1 < 2.1
        assert pulse.dnr <= before * constants.grow or abs(pulse.trust) <= 0.5
        figures = [value for value in pulse.state_dict().values() if isinstance(value, float)]
        assert all(map(math.isfinite, figures))


@settings(max_examples=200, deadline=None)
@given(losses=JUMPS)
def test_guarded_only_slows_down_while_it_hesitates(losses: list[float]) -> None:
    pulse = EmoPulse("guarded")
    for loss in losses:
        before = pulse.dnr
        rate = pulse.rate
        pulse.update(loss)
        assert pulse.dnr <= before * 1.5
        if abs(pulse.trust) <= 0.5:
            assert pulse.dnr <= 0.8 * before
            assert pulse.rate <= rate


def test_published_brake_may_speed_up() -> None:
    """The reason for `guarded`: a spike puts v3.8 into the band with a high momentary ratio."""
    rates = {}
    for preset in ("v3.8", "guarded"):
        pulse = EmoPulse(preset)
        for loss in [1.0] * 300 + [1.0, 3.0]:
            pulse.update(loss)
        rates[preset] = pulse.dnr
    assert abs(pulse.trust) <= 0.5
    assert rates["v3.8"] > 2 * rates["guarded"]


@pytest.mark.parametrize("preset", ["v3.8", "v3.8-fft", "guarded"])
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
        pulse = EmoPulse(preset, cautious=True)
        assert (pulse.noise, pulse.distance) == (0.2, 0.2)
        eager = EmoPulse(preset)
        for _ in range(20):
            pulse.update(1.0)
            eager.update(1.0)
        assert pulse.distance > eager.distance and pulse.noise < eager.noise


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_leaves_the_state(loss: float) -> None:
    pulse = EmoPulse()
    for _ in range(3):
        before = pulse.state_dict()
        with pytest.raises(NonFiniteLossError, match="loss is"):
            pulse.update(loss)
        assert pulse.state_dict() == before
        pulse.update(1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_state_continues_bit_identically(preset: str) -> None:
    losses = [1 + 0.5 * math.sin(0.3 * t) + (3 if t % 17 == 0 else 0) for t in range(60)]
    whole = EmoPulse(preset)
    rates = [whole.update(loss) for loss in losses]
    for cut in (0, 1, 30):
        first, second = EmoPulse(preset, cautious=True), EmoPulse()
        first.load_state_dict(EmoPulse(preset).state_dict())
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
