"""The test suite's own options.

They stand here and not in tests/, because pytest takes the `my` of `pytest --submission my` for a test path until it
knows the option, and then looks for options in this folder only. (A folder elsewhere: `--submission=../my`.)
"""


def pytest_addoption(parser):
    group = parser.getgroup("minitfm")
    group.addoption("--submission", metavar="DIR", help="test the chapters/ and kernels/ files in DIR, not the book's")
    group.addoption("--exercise", metavar="FUNCTION", help="only the tests that grade this function, such as gptq")
    group.addoption(
        "--profile",
        help="examples that Hypothesis draws: default (30), thorough (200), or verdict (30, "
        "and no search for a smaller one that fails; what --submission takes)",
    )
