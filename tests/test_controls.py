from emomerge.controls import CONTROLS, PLAIN_MEAN, SINGLE_RUN


def test_labels_in_the_evidence_are_distinct():
    labels = [SINGLE_RUN, PLAIN_MEAN, *(control.label for control in CONTROLS.values())]
    assert len(set(labels)) == len(labels)
