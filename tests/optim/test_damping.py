import pytest
import torch

from emomerge.optim import OPTIMIZERS


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_damping_scales_the_step_and_nothing_else(name, capturable):
    start = torch.linspace(-1, 1, 12).reshape(3, 4)
    gradient = torch.linspace(2, -1, 12).reshape(3, 4).sin()
    ends, pulses = {}, {}
    for damping in (1.0, 0.25, 0.0):
        p = torch.nn.Parameter(start.clone())
        optimizer = OPTIMIZERS[name].load()([p], lr=10.0, weight_decay=0.1, capturable=capturable)
        for _ in range(60):  # beyond the warm-up of EmoVoid, which moves weights without a rate
            optimizer.damping = 0.0
            p.grad = gradient.clone()
            optimizer.observe(torch.tensor(1.0))
            optimizer.step()
        before = p.detach().clone()
        optimizer.damping = damping
        p.grad = gradient.clone()
        optimizer.observe(torch.tensor(1.0))
        optimizer.step()
        ends[damping], pulses[damping] = p.detach() - before, optimizer.pulse.state_dict()
    assert ends[1.0].any()
    assert not ends[0.0].any()
    torch.testing.assert_close(ends[0.25], 0.25 * ends[1.0], rtol=1e-3, atol=1e-7)
    assert pulses[1.0] == pulses[0.25] == pulses[0.0]
