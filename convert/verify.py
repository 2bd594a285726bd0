"""Compare the tensor names, shapes, dtypes and values of two models: PyTorch directories, checkpoints or runs.

    python convert/verify.py A B

Prints the differences. The exit code is 0 if all values are equal (dtypes may differ), else 1.
"""

import argparse
import sys

from wallx_jax.checkpoints import command
from wallx_jax.checkpoints.compare import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="directory, checkpoint, run or hub repo id")
    parser.add_argument("b", help="directory, checkpoint, run or hub repo id")
    arguments = parser.parse_args()
    found = compare(arguments.a, arguments.b)
    print(found)
    print("identical" if found.identical else "same values" if found.same_values else "A and B differ")
    sys.exit(0 if found.same_values else 1)


if __name__ == "__main__":
    command.run(main)
