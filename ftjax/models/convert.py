"""The command that makes a model folder of a file of tensors that has no config.

python -m ftjax.models.convert resnet20_cifar10.safetensors resnet20
"""

from __future__ import annotations

import argparse
import sys

from ftjax.errors import FtjaxError


def main() -> int:
    """Runs the command."""
    from ftjax.models.resnet_cifar import convert

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="safetensors file of a CIFAR ResNet")
    parser.add_argument("folder", help="where the model folder goes")
    parser.add_argument("--labels", nargs="*", default=(), help="names of the outputs, in order")
    args = parser.parse_args()
    try:
        print(convert(args.source, args.folder, labels=args.labels))
    except FtjaxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
