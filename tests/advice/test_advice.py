"""Every text that the package gives as `fix` has a scenario beside this file that follows it and ends in success."""

import importlib
from pathlib import Path

import advising

ELSEWHERE = {
    "load it in diffusers or ComfyUI instead: a model with it has other inputs than its base",
    "use it through PEFT",
}
"""What is not to be done with this package."""


def test_all_advice_has_a_scenario() -> None:
    pages = [importlib.import_module(file.stem) for file in sorted(Path(__file__).parent.glob("test_advice_*.py"))]
    followed = {advice for page in pages for advice in page.SCENARIOS}
    given = advising.all_advice()
    assert not followed - given, "a scenario follows advice that nothing gives"
    assert given - followed == ELSEWHERE, "advice without a scenario"


def test_advice_is_found_wherever_it_is_written() -> None:
    """In a constant of another module, a variable, a table of tuples, a named tuple, a function's result, a condition."""
    assert {
        "give the model in safetensors that it was quantized from",
        "choose another -o, or delete what is there with `emomerge run --restart`",
        "choose a smaller --max-shard-size",
        "give the adapter's folder, with its {}",
        "known keys: {}",
        "use torch.view_as_real",
    } <= advising.all_advice()
