"""What a person sees while something takes long, and that nobody sees it who does not want to."""

import pytest

from evdit_opt.progress import counting, track


@pytest.mark.parametrize("shown", [True, False])
def test_bars_count(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "reading", shown)) == ["a", "b", "c"]
    with counting("refining", 50, shown) as done:
        for _ in range(7):
            done()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("reading" in printed.err and "3/3" in printed.err) is shown
    assert ("refining" in printed.err and "7/7" in printed.err) is shown
    assert ("at most" in printed.err) is shown
