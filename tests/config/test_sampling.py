"""Arguments of rules, for pages."""

from conftest import make_cfg

from atss.config import rule_arguments


def test_predictions_of_a_wrapped_rule_depend_on_it():
    needs = {name: about["predictions"] for name, about in rule_arguments(make_cfg()).items()}
    assert (needs["TAL"], needs["ATSS"], needs["Sampled"]) == (True, False, False)
