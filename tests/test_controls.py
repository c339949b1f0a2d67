from typing import get_args

from emomerge.controls import CONTROLS
from emomerge.recipe import Control


def test_a_recipe_may_name_every_control_of_the_table_and_the_best_single_run():
    assert set(get_args(Control)) == {"best-single", *CONTROLS}


def test_labels_in_the_evidence_are_distinct():
    labels = [control.label for control in CONTROLS.values()]
    assert len(set(labels)) == len(labels)
