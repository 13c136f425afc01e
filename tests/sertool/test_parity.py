"""Parity: logits without end are refused in one line, and numpy says nothing before it."""

from __future__ import annotations

import numpy as np
import pytest

from sertool.export.parity import ExportError, check_parity, measure_parity


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("expected", "computed"), [(np.inf, 1), (np.inf, np.inf), (np.nan, 1), (1, np.inf), (3e38, 1)])
def test_logits_without_end_are_refused_without_a_warning(precision: str, expected: float, computed: float) -> None:
    logits = [np.full((2, 3), value, np.float32) for value in (expected, computed)]
    with pytest.raises(ExportError, match=r"^run: .*nothing was written"):
        check_parity(measure_parity(*logits), precision, "run")
