from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emomerge.tasks.padding import CALLS, narrow, partition, passes_of


def cost(lengths, sizes, fixed):
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return sum(size * lengths[end - 1] + fixed for size, end in zip(sizes, ends, strict=True))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9), fixed=st.sampled_from([0.5, 20, 70, 1e6]))
def test_no_other_partition_is_cheaper(lengths, fixed):
    lengths = tuple(sorted(lengths))
    found = partition(lengths, fixed)
    assert sum(found) == len(lengths) and all(found)
    for count in range(len(lengths)):
        for cuts in combinations(range(1, len(lengths)), count):
            edges = (0, *cuts, len(lengths))
            sizes = [right - left for left, right in pairwise(edges)]
            assert cost(lengths, found, fixed) <= cost(lengths, sizes, fixed) + 1e-9


def padded(lengths):
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(mask.numel()).view(mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths))}


def wide(parameters):
    return nn.Linear(parameters, 1, bias=False, device="meta").eval()


def test_rows_of_similar_length_share_a_pass_and_each_is_as_wide_as_its_longest_row():
    batch = padded([40, 5, 41, 6] * 8)
    passes = passes_of(wide(2 * 10**7), batch)
    assert sorted(torch.cat(passes).tolist()) == list(range(32)) and [len(rows) for rows in passes] == [16, 16]
    short = narrow(batch, passes[0])
    assert short["input_ids"].shape == short["attention_mask"].shape == (16, 6)
    assert short["input_ids"].equal(batch["input_ids"][passes[0], :6]) and short["labels"].equal(passes[0])


@pytest.mark.parametrize("parameters", [int(CALLS / 1e4), 2**27])
def test_models_that_are_tiny_or_remade_for_each_pass_take_a_few_rows_at_once(parameters):
    assert len(passes_of(wide(parameters), padded([20, 5, 21, 6]))) == 1


def test_training_takes_all_rows_at_once():
    assert len(passes_of(wide(2 * 10**7).train(), padded([40, 5, 41, 6] * 8))) == 1
