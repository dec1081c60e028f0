"""The rule about what an answer may not use: it meets what it names, under every name, and nothing else."""

import ast

import pytest

from chapters.screening import FORBIDDEN, objection, reached

NOTHING = b"import numpy as np\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os, gc", "line 1 uses gc"),
        ("\n\ndef f():\n    from pytest import skip", "line 4 uses pytest"),
        ("import tests.conftest as c", "line 1 uses tests"),
        ("from unittest.mock import patch", "line 1 uses unittest"),
        ("import numpy.testing as t", "line 1 uses numpy.testing"),
        ("from torch import testing", "line 1 uses torch.testing"),
        ("from torch.testing._comparison import assert_close", "line 1 uses torch.testing"),
        ("import torch\nok = 1\ntorch.testing.assert_close = ok", "line 3 uses torch.testing"),
        ("import torch.nn\nx = torch.testing", "line 2 uses torch.testing"),
        ("import numpy as n\nsetattr(n.testing, 'assert_equal', print)", "line 2 uses numpy.testing"),
        ("import sys\nsys.modules['tests'] = None", "line 2 uses sys.modules"),
        ("import sys as s\ns.modules.clear()", "line 2 uses sys.modules"),
        ("from sys import modules as m", "line 1 uses sys.modules"),
    ],
)
def test_what_is_forbidden_is_met_under_any_name(source, reason):
    assert objection(source.encode(), NOTHING) == reason


@pytest.mark.parametrize(
    "source",
    [
        "tests, gc, inspect, conftest = 1, 2, 3, 4\nprint(tests, gc, inspect.x, conftest.testing)",
        "def pytest(importlib, *, hypothesis): return importlib.util(hypothesis)",
        "class Model:\n    def modules(self): return self.gc.testing",
        "import torch\ntorch.zeros(3).testing\nfor m in torch.nn.Module().modules(): m.eval()",
        "import sys\nsys.stdout.write('import pytest')",
        "import testsuite, gcd\nfrom numpy.random import testing_data\nfrom .tests import x",
        "def broken(:\nimport pytest",
        "\x00",
        "(" * 5000,
    ],
)
def test_nothing_else_is(source):
    assert objection(source.encode(), NOTHING) is None


def test_what_the_book_s_own_file_uses_is_allowed():
    answer = b"import inspect\nimport gc\n"
    assert objection(answer, b"def f():\n    import inspect\n") == "line 2 uses gc"
    assert objection(answer, b"from gc import collect\nimport inspect\n") is None


def test_more_can_be_forbidden():
    assert objection(b"from chapters.demo import mean", NOTHING) is None
    assert objection(b"from chapters.demo import mean", NOTHING, (*FORBIDDEN, "chapters")) == "line 1 uses chapters"


def test_the_reader_of_sources_follows_names_to_what_they_stand_for():
    tree = ast.parse("import a.b as c, d.e\nfrom f import g\nc.h, d.e.i, g.j.k, l.m\n")
    assert reached(tree) == [
        (1, "a.b"),
        (1, "d.e"),
        (2, "f.g"),
        (3, "a.b.h"),
        (3, "d.e"),
        (3, "d.e.i"),
        (3, "f.g.j"),
        (3, "f.g.j.k"),
    ]
