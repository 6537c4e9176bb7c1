"""From a model folder to a decoder: everything is checked first, then each rank reads exactly the bytes that it needs,
straight to where they will live. Knows no memory limits and no requests."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmd.errors import StartupFailed, UnsupportedModel
from llmd.model.decoder import Decoder
from llmd.model.dummy import dummy_parameters
from llmd.model.parallel import Parameter, Piece, Rank, Shard
from llmd.model.parameters import parameters
from llmd.model.registry import FAMILIES
from llmd.model.safetensors_folder import DTYPES, StoredTensor, map_file, read_headers, tensor_view
from llmd.model.spec import load_spec

# Tensors that old checkpoints carry although they are computed
HARMLESS_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".attention.rope.inv_freq",
)

SERIAL_ELEMENTS = 32767  # torch copies so many in the calling thread

Progress = Callable[[int, int], None]


def load_decoder(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None = None,
    dummy: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Decoder:
    """The folder's model on `device` in `dtype`.

    max_model_len: the longest context to serve; None = the model's own. Everything is checked from the files' headers
    before anything is allocated: raises UnsupportedModel, naming what is wrong with the model, or StartupFailed where
    the model cannot serve that context. dummy: random weights; the folder needs none. progress: see `load_parameters`.
    """
    spec = load_spec(model_dir)
    if max_model_len is None:
        max_model_len = spec.max_positions
    if not 1 <= max_model_len <= spec.max_stretched_positions:
        raise StartupFailed(
            f"The model cannot serve a context of {max_model_len} tokens: it has {spec.max_stretched_positions} "
            "positions. Choose a smaller --max-model-len"
        )
    wanted = parameters(spec)
    if dummy:
        offset = spec.norm_weight_offset
        weights = dummy_parameters(
            wanted, norm_weight_offset=offset, dtype=dtype, device=device, rank=Rank(), progress=progress
        )
        return Decoder(spec, weights, max_model_len=max_model_len)
    family = FAMILIES[spec.architecture]
    stored = read_headers(model_dir, prefixes=family.prefixes, ignored_prefixes=family.ignored_prefixes)
    harmless = frozenset({f"{family.names.head}.weight"}) if spec.tied_embeddings else frozenset[str]()
    check_tensors(stored, wanted, harmless=harmless)
    weights = load_parameters(stored, wanted, dtype=dtype, device=device, rank=Rank(), progress=progress)
    return Decoder(spec, weights, max_model_len=max_model_len)


def check_tensors(
    stored: Mapping[str, StoredTensor], parameters: Iterable[Parameter], *, harmless: frozenset[str] = frozenset()
) -> None:
    """Raise UnsupportedModel, naming the tensor, unless the checkpoint has just what the parameters need.

    harmless: names that may be there without being needed.
    """
    needed: set[str] = set()
    for piece in (piece for parameter in parameters for piece in parameter.pieces):
        needed.add(piece.tensor)
        tensor = stored.get(piece.tensor)
        if tensor is None:
            raise UnsupportedModel(f"The checkpoint has no tensor {piece.tensor}")
        if tensor.shape != piece.tensor_shape:
            raise UnsupportedModel(
                f"The tensor {piece.tensor} has the shape {list(tensor.shape)}; config.json implies "
                f"{list(piece.tensor_shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise UnsupportedModel(
                f"The tensor {piece.tensor} has the dtype {tensor.dtype}; supported: {', '.join(DTYPES)}"
            )
    extra = [name for name in stored if name not in needed | harmless and not name.endswith(HARMLESS_SUFFIXES)]
    if extra:
        raise UnsupportedModel(
            f"The checkpoint has a tensor {min(extra)} that this architecture does not use"
            + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else "")
        )


def load_parameters(
    stored: Mapping[str, StoredTensor],
    parameters: Iterable[Parameter],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank,
    progress: Progress,
) -> dict[str, Tensor]:
    """This rank's part of each parameter, by name; checked by `check_tensors` before.

    Every byte goes from the mapped file to its final place, converted on the way. `progress` hears (bytes of weights
    in place, bytes in all), with growing first number, (0, all) and (all, all) included.
    """
    parameters = list(parameters)
    total = dtype.itemsize * sum(parameter.num_elements(rank) for parameter in parameters)
    files = {file: map_file(file) for file in {tensor.file for tensor in stored.values()}}
    done = 0
    progress(done, total)
    weights: dict[str, Tensor] = {}
    for parameter in parameters:
        weight = torch.empty(parameter.shape(rank), dtype=dtype, device=device)
        row = 0
        for piece in parameter.pieces:
            tensor = stored[piece.tensor]
            row += _copy_piece(weight[row:], piece, tensor_view(files[tensor.file], tensor), rank)
        weights[parameter.name] = weight
        done += weight.nbytes
        progress(done, total)
    return weights


def _copy_piece(target: Tensor, piece: Piece, source: Tensor, rank: Rank) -> int:
    """Copy this rank's slices of the source to the first rows of the target → how many rows."""
    dim = piece.sharding.dim if isinstance(piece.sharding, Shard) else 0
    target = target[: piece.shape(rank)[0]]
    start = 0
    for part in piece.slices(rank):
        length = part.stop - part.start
        _copy(target.narrow(dim, start, length), source.narrow(dim, part.start, length))
        start += length
    return target.shape[0]


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy and convert. On a CPU in this thread alone: the time goes into first touches of memory, which more threads
    hardly speed up, and where cores are busy torch's threads wait for one another at the end of every copy."""
    num_rows = target.shape[0]
    if target.device.type == "cpu":
        num_rows = max(1, SERIAL_ELEMENTS * num_rows // target.numel())
    for row in range(0, target.shape[0], num_rows):
        target[row : row + num_rows].copy_(source[row : row + num_rows])
