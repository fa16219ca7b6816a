"""The numbers in docs/few_steps.md are those of the committed result."""

import json

from benchmarks import few_steps


def test_the_table_is_what_the_benchmark_measured():
    page = few_steps.PAGE.read_text()
    assert few_steps.BLOCK.search(page) is not None
    assert few_steps.quote(page, json.loads(few_steps.OUTPUT.read_text())) == page
