"""What a piece means of a tensor that has all experts' matrices. Knows no file."""

from torch import Tensor

from llmd.model.parallel import ExpertView


def viewed(source: Tensor, view: ExpertView | None) -> Tensor:
    """The view's matrix or bias, or the tensor itself where there is no view. Nothing is copied."""
    if view is None:
        return source
    matrix = source[view.expert]
    return (matrix.T if view.transposed else matrix)[view.first_row :: view.row_step]
