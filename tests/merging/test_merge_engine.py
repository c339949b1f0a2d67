import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput
from emomerge.merging import check_params, merge, merge_method, registry
from emomerge.merging.registry import provides


class Watched(MemoryCheckpoint):
    """Remembers which tensors were read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


def moved(tensors, by=0.5):
    return {n: t + by if t.is_floating_point() and t.dtype.itemsize > 1 else t for n, t in tensors.items()}


@pytest.fixture
def tensors():
    return {
        "b": torch.arange(6.0).view(2, 3),
        "a": torch.tensor(2.0),
        "n": torch.tensor([1, 2]),
        "e": torch.empty(0, 3),
    }


def test_nothing_is_read_until_a_tensor_is_asked_for(tensors):
    base, runs = Watched(tensors), [Watched(moved(tensors)), Watched(moved(tensors, 1.5))]
    merged = merge(base, runs, method="mean")
    assert merged.names() == base.names() == ("a", "b", "e", "n")
    assert all(merged.info(name) == base.info(name) for name in merged)
    assert not base.read and not runs[0].read
    assert torch.equal(merged["b"], tensors["b"] + 1)
    assert set(base.read) == set(runs[0].read) == {"b"}


def test_mixed_dtypes_are_rounded_once_on_writing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = MemoryCheckpoint({"h": torch.randn(50, generator=generator).bfloat16(), "d": torch.randn(3).double()})
    runs = [
        MemoryCheckpoint({"h": (base["h"].float() + 0.1 * torch.randn(50, generator=generator)), "d": base["d"] + i})
        for i in range(3)
    ]
    merged = merge(base, runs, method="mean")
    assert (merged["h"].dtype, merged["d"].dtype) == (torch.float32, torch.float64)
    write_checkpoint(merged, tmp_path / "out.safetensors")
    written = open_checkpoint(tmp_path / "out.safetensors")
    s = sum(run["h"] - base["h"].float() for run in runs)
    assert torch.equal(written["h"], (base["h"].float() + s / 3).bfloat16())
    assert written["d"].dtype == torch.float64
    torch.testing.assert_close(written["d"], base["d"] + 1)


def test_paths_are_opened(tmp_path, tensors):
    write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "base.safetensors")
    for i in (1, 2):
        write_checkpoint(MemoryCheckpoint(moved(tensors, i)), tmp_path / f"run{i}.safetensors")
    runs = [tmp_path / "run1.safetensors", str(tmp_path / "run2.safetensors")]
    merged = merge(str(tmp_path / "base.safetensors"), runs, method="mean")
    assert torch.equal(merged["b"], tensors["b"] + 1.5)
    assert merged.diagnostics()["runs"] == [str(run) for run in runs]
    assert merged.folder == tmp_path


def test_delta_is_exact_over_the_same_base(exact_run):
    base = MemoryCheckpoint({"w": torch.tensor([1.0, -2.0]), "v": torch.ones(2)})
    tau = torch.tensor([1e-9, 3e-9])
    merged = merge(base, [exact_run(base, {"w": tau, "v": None})], method="mean", scale=0.5)
    assert torch.equal(merged.delta("w", base), 0.5 * tau)
    assert merged.delta("v", base) is None
    assert merged["v"] is base["v"]
    assert torch.equal(merged["w"], base["w"])
    other = MemoryCheckpoint({"w": torch.zeros(2), "v": torch.zeros(2)})
    assert torch.equal(merged.delta("w", other), base["w"])


def test_tensors_that_do_not_merge_must_be_the_same(tensors):
    base = MemoryCheckpoint({**tensors, "f8": torch.ones(2).to(torch.float8_e4m3fn), "flag": torch.tensor(True)})
    same = MemoryCheckpoint(moved(dict(base)))
    lacking = MemoryCheckpoint({n: t for n, t in moved(dict(base)).items() if n != "n"})
    merged = merge(base, [same, lacking], method="mean")
    assert all(merged[name] is base[name] for name in ("n", "f8", "flag"))
    other = MemoryCheckpoint({**moved(dict(base)), "n": torch.tensor([1, 3])})
    merged = merge(base, [same, other], method="mean", names=["x", "y"])
    assert torch.equal(merged["b"], tensors["b"] + 0.5)
    with pytest.raises(BadInput, match="n of run y"):
        merged["n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(3, 2)}, r"b of run y; expected float32 \[2, 3\]; found float32 \[3, 2\]"),
        ({"b": torch.ones(2, 3).long()}, r"b of run y; expected float32 \[2, 3\]; found int64 \[2, 3\]"),
        ({"b": None}, r"lacks a tensor: b of run y; expected float32 \[2, 3\]"),
        ({"extra": torch.ones(4)}, r"base lacks: extra of run y; found float32 \[4\]"),
        ({"n": torch.ones(2)}, r"base lacks: n of run y; found float32 \[2\]"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_read(tensors, change, message):
    base = Watched(tensors)
    wrong = {n: t for n, t in {**moved(tensors), **change}.items() if t is not None}
    with pytest.raises(BadInput, match=message):
        merge(base, [MemoryCheckpoint(moved(tensors)), MemoryCheckpoint(wrong)], method="ties", names=["x", "y"])
    assert not base.read


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["mean", "ties", "tall-mask"])
def test_a_value_that_is_not_finite_is_named(tensors, bad, method):
    broken = moved(tensors)
    broken["b"][1, 2] = bad
    with pytest.raises(BadInput, match="non-finite task vector: b of run y"):
        merge(
            MemoryCheckpoint(tensors),
            [MemoryCheckpoint(moved(tensors)), MemoryCheckpoint(broken)],
            method=method,
            names=["x", "y"],
        )["b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, "`weights` does not fit the runs; expected 2.*found 1"),
        ({"weights": [1.0, -1.0]}, "weights must have a positive sum"),
        ({"run_losses": [1.0, 2.0, 3.0]}, "`run_losses` does not fit the runs"),
        ({"names": ["x"]}, "`names` does not fit the runs"),
        ({"names": ["x", "x"]}, "two runs have the same name in `names`"),
        ({"method": "tall-mask", "k": 3}, "more votes than runs: `k` of tall-mask; expected 0 to 2; found 3"),
    ],
)
def test_arguments_that_do_not_fit_the_runs(tensors, arguments, message):
    runs = [MemoryCheckpoint(moved(tensors))] * 2
    with pytest.raises(BadInput, match=message):
        merge(MemoryCheckpoint(tensors), runs, **{"method": "mean", **arguments})


def test_no_runs_is_refused(tensors):
    with pytest.raises(BadInput, match="no runs"):
        merge(MemoryCheckpoint(tensors), [])


@pytest.mark.parametrize("method", ["mean", "ties", "tall-mask", "task-arithmetic"])
def test_runs_that_moved_nothing_give_the_base(exact_run, method):
    base = MemoryCheckpoint({"w": torch.tensor([1.0, -0.0])})
    merged = merge(base, [exact_run(base, {"w": None})] * 3, method=method)
    assert merged["w"] is base["w"]
    assert merged.diagnostics()["cosine_to_mean"] is None


def test_a_single_run_survives_tall_mask(tensors):
    base, run = MemoryCheckpoint(tensors), MemoryCheckpoint(moved(tensors))
    assert torch.equal(merge(base, [run])["b"], run["b"])


# The configuration of methods.


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("tall-mask", {"lamda": 0.3}, "unknown merge parameter: `lamda` of tall-mask; did you mean `lambda`?"),
        ("ties", {"densty": 0.3}, "`densty` of ties; did you mean `density`?"),
        ("greedy-soup", {"weights": [1.0]}, "unknown merge parameter: `weights` of greedy-soup"),
        ("mean", {"chosen": (0,)}, "`chosen` of mean"),
        ("ties", {"majority": 1}, "unknown merge parameter: `majority` of ties"),
        ("ties", {"density": 0}, "`density` of ties; expected greater than 0; found 0"),
        ("ties", {"density": 1.1}, "`density` of ties"),
        ("ties", {"trim": "tesnor"}, "`trim` of ties; expected 'global', 'tensor' or 'touched'; found 'tesnor'"),
        ("ties", {"preset": "arcee"}, "`preset` of ties; expected 'paper', 'mergekit' or 'peft'; found 'arcee'"),
        ("tall-mask", {"lambda": -1}, "`lambda` of tall-mask"),
        ("tall-mask", {"k": 1.5}, "`k` of tall-mask"),
        ("mean", {"scale": "big"}, "`scale` of mean"),
        ("mean", {"weights": [float("nan")]}, "`weights` of mean"),
        ("tall-masks", {}, "unknown merge method: tall-masks; did you mean `tall-mask`?"),
    ],
)
def test_wrong_configuration_names_method_and_parameter(method, params, message):
    with pytest.raises(BadInput) as error:
        check_params(method, params)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_checked_parameters_have_defaults_and_the_keywords_of_merge(tensors):
    checked = check_params("tall-mask", {"lambda": 0.3, "scale": 1})
    assert checked == {"lambda_": 0.3, "scale": 1.0, "k": 2, "reference": "mean", "weights": None}
    assert check_params("tall-mask", checked) == checked
    base, runs = MemoryCheckpoint(tensors), [MemoryCheckpoint(moved(tensors))] * 2
    report = merge(base, runs, method="tall-mask", **checked).diagnostics()
    assert report["params"]["lambda"] == 0.3
    assert torch.equal(merge(base, runs, **{"lambda": 0.3})["b"], merge(base, runs, lambda_=0.3)["b"])


def test_every_method_and_parameter_is_described():
    for method in registry.METHODS.values():
        assert method.formula.endswith(".")
        assert method.source
        for parameter in method.parameters:
            assert parameter.type, (method.name, parameter)
            assert parameter.description, (method.name, parameter)


def test_the_types_of_parameters_in_words():
    types = {parameter.name: parameter.type for parameter in registry.METHODS["tall-mask"].parameters}
    assert types == {
        "lambda": "number ≥ 0 | auto",
        "reference": "mean | sum | ties",
        "k": "integer ≥ 0",
        "scale": "number | auto | list",
        "weights": "list | equal | auto",
    }
    assert registry.METHODS["ties"].parameters[-3].type == "number > 0, ≤ 1 | list"


@provides("found")
def find(vectors, *, number: float = 1.0):
    return {"found": number}


def first(vectors, unknown):
    return {}


def tensor(rows, offset):
    return {}


def compiled(stored, weights, figures, surprise):
    return None


@pytest.mark.parametrize(
    ("options", "argument", "kind"),
    [
        ({}, "found", "function"),
        ({"first_pass": provides("found")(first)}, "unknown", "first pass"),
        ({"first_pass": find, "tensor_pass": provides()(tensor)}, "offset", "tensor pass"),
        ({"first_pass": find, "native": compiled}, "surprise", "native"),
    ],
)
def test_an_argument_that_nobody_provides_is_refused_at_registration(options, argument, kind):
    def function(deltas, name, *, found, factor=2.0):
        return deltas[0]

    with pytest.raises(TypeError, match=f"merge method 'wrong': the argument `{argument}` of its {kind} is not an input"):
        merge_method("wrong", source="nobody", **options)(function)
    assert "wrong" not in registry.METHODS


def test_a_pass_returns_what_it_declares(monkeypatch, tensors):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @provides("found", "more")
    def forgetful(vectors):
        return {"found": 1}

    @merge_method("forgetful", source="nobody", first_pass=forgetful)
    def function(deltas, *, found):
        """One run."""
        return deltas[0]

    with pytest.raises(TypeError, match="forgetful provides found, but declares found, more"):
        merge(MemoryCheckpoint(tensors), [MemoryCheckpoint(moved(tensors))], method="forgetful")


def test_a_new_method_is_one_function(monkeypatch, tensors):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @merge_method("first-row", source="nobody")
    def first_row(deltas: torch.Tensor, name: str, *, factor: float = 2.0) -> torch.Tensor:
        """The first row of the first run's matrices."""
        if name == "a":
            return torch.zeros_like(deltas[0])
        assert deltas.shape == (2, 2, 3)
        return torch.cat([factor * deltas[0, :1], torch.zeros(1, 3)])

    base, runs = MemoryCheckpoint(tensors), [MemoryCheckpoint(moved(tensors, by)) for by in (1.0, 7.0)]
    merged = merge(base, runs, method="first-row", factor=3)
    assert torch.equal(merged["b"] - tensors["b"], torch.tensor([[3.0] * 3, [0.0] * 3]))
    assert torch.equal(merged["a"], tensors["a"])
    assert merged.diagnostics()["params"] == {"factor": 3.0, "scale": 1.0}
    with pytest.raises(BadInput, match="did you mean `factor`"):
        merge(base, runs, method="first-row", facto=3)
