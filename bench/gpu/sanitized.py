"""`python -m bench.gpu.sanitized cuda|cpu`: a few small launches of every kernel, for compute-sanitizer to watch."""

import argparse
from collections.abc import Sequence

import torch

from bench.gpu.correctness import MOVABLE
from bench.gpu.launching import launched_on
from tests.kernels.proof.checks import check_numbers
from tests.kernels.proof.interpreter import interpreted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args(arguments).device)
    for proof in MOVABLE[: None if device.type == "cuda" else 1]:
        with launched_on(device) if device.type == "cuda" else interpreted():
            check_numbers(proof, proof.cases[1])


if __name__ == "__main__":
    main()
