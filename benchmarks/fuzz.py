"""The tests of `tests/service/test_fuzz.py`, led by what code they reach instead of by chance.

    python -m benchmarks.fuzz TEST [--seconds 180]

TEST is the end of a test's name, `answered` say. Needs atheris (`pip install atheris`), which is no dependency. What it
finds fails like the test itself; the bytes that led there are written to `crash-*`, and hypothesis shows the example.
"""

from __future__ import annotations

import argparse
import sys

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["service.rpc"]):
    from tests.service import test_fuzz


def main() -> None:
    tests = {name: test for name, test in vars(test_fuzz).items() if name.startswith("test_")}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("test", help=f"the end of one of {', '.join(tests)}")
    parser.add_argument("--seconds", type=int, default=180)
    chosen = parser.parse_args()
    (test,) = (test for name, test in tests.items() if name.endswith(chosen.test))
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={chosen.seconds}", "-max_len=4096", "-len_control=0"],
        test.hypothesis.fuzz_one_input,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
