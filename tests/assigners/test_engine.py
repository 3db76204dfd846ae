from threading import Thread

import pytest
import torch

from atss.assigners import use_engine
from atss.assigners.engine import LIMIT, table_limit, uses_tables

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_gpus_have_tables_and_cpus_lists_by_default():
    assert (uses_tables(CPU), uses_tables(GPU)) == (False, True)
    with use_engine("tables", limit=7):
        assert uses_tables(CPU)
        assert table_limit() == 7
        with use_engine("lists"):
            assert not uses_tables(GPU)
        assert uses_tables(CPU)
    assert table_limit() == LIMIT
    with pytest.raises(ValueError, match="never"), use_engine("lists"):
        raise ValueError("never")
    assert uses_tables(GPU)


def test_engine_is_chosen_per_thread():
    with use_engine("tables", limit=5):
        thread = Thread(target=lambda: found.append((uses_tables(CPU), table_limit())))
        found: list = []
        thread.start()
        thread.join()
    assert found == [(False, LIMIT)]


def test_unknown_engines_are_refused():
    with (
        pytest.raises(
            ValueError, match=r"name is 'lsits': choose from \['auto', 'lists', 'tables'\]"
        ),
        use_engine("lsits"),
    ):
        pass
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"), use_engine("auto", 0):
        pass
