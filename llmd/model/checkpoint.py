"""From a model folder to a decoder: everything is checked first, then each rank reads exactly the bytes that it needs,
straight to where they will live. Knows no memory limits and no requests."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmd.errors import StartupFailed, UnsupportedModel
from llmd.model.decoder import Decoder
from llmd.model.dummy import dummy_parameters, dummy_quantized
from llmd.model.expert_views import viewed
from llmd.model.parallel import Parameter, Piece, Rank, Shard
from llmd.model.parameters import parameters
from llmd.model.quantization import QuantizationSpec
from llmd.model.quantized_checkpoint import (
    check_extra_biases,
    check_quantized,
    copy_dequantized,
    load_quantized,
    unread_tensors,
)
from llmd.model.quantized_layouts import has_quantized_kernels, kept_bytes, kept_parameters, piece_scheme
from llmd.model.registry import FAMILIES
from llmd.model.safetensors_folder import FLOAT_DTYPES, StoredTensor, open_tensors, read_headers
from llmd.model.spec import load_spec
from llmd.model.staged_reads import StagedRead, run_reads

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
    wanted, rank = parameters(spec), Rank()
    has_kernels = has_quantized_kernels(on_cpu=device.type == "cpu", dtype_bytes=dtype.itemsize)
    kept = kept_parameters(wanted, spec.quantization) if has_kernels else {}
    plain = [parameter for parameter in wanted if parameter.name not in kept]
    if dummy:
        quantized = dummy_quantized(kept.values(), dtype=dtype, device=device, rank=rank)
        offset = spec.norm_weight_offset
        weights = dummy_parameters(
            plain, norm_weight_offset=offset, dtype=dtype, device=device, rank=rank, progress=progress
        )
        return Decoder(spec, weights, quantized, max_model_len=max_model_len)
    family = FAMILIES[spec.architecture]
    ignored_prefixes = tuple(prefix.format(num_layers=len(spec.layers)) for prefix in family.ignored_prefixes)
    stored = read_headers(model_dir, prefixes=family.prefixes, ignored_prefixes=ignored_prefixes)
    harmless = frozenset({f"{family.names.head}.weight"}) if spec.tied_embeddings else frozenset[str]()
    check_tensors(stored, wanted, harmless=harmless, quantization=spec.quantization)
    tensors = open_tensors(stored)
    check_extra_biases(tensors, wanted, spec.quantization)
    weights = load_parameters(
        stored,
        plain,
        dtype=dtype,
        device=device,
        rank=rank,
        progress=progress,
        quantization=spec.quantization,
        bytes_to_follow=sum(kept_bytes(*pair, rank, dtype_bytes=dtype.itemsize) for pair in kept.values()),
    )
    quantized = load_quantized(
        kept.values(),
        dtype=dtype,
        device=device,
        rank=rank,
        tensors=tensors,
        progress=progress,
        bytes_before=sum(weight.nbytes for weight in weights.values()),
    )
    return Decoder(spec, weights, quantized, max_model_len=max_model_len)


def load_without_memory(model_dir: Path, *, dtype: torch.dtype, max_model_len: int) -> Decoder:
    """The folder's model as it is on a GPU, its tensors without memory: to see which kernels it launches."""
    nowhere = torch.device("meta")
    # what is computed on the way, too
    with nowhere:
        return load_decoder(model_dir, dtype=dtype, device=nowhere, max_model_len=max_model_len, dummy=True)


def check_tensors(
    stored: Mapping[str, StoredTensor],
    parameters: Iterable[Parameter],
    *,
    harmless: frozenset[str] = frozenset(),
    quantization: QuantizationSpec | None = None,
) -> None:
    """Raise UnsupportedModel, naming the tensor, unless the checkpoint has just what the parameters need.

    harmless: names that may be there without being needed. quantization: how linear layers are kept.
    """
    wanted = list(parameters)
    harmless |= unread_tensors(stored, wanted, quantization)
    needed: set[str] = set()
    for parameter, piece in ((owner, piece) for owner in wanted for piece in owner.pieces):
        scheme = piece_scheme(parameter, piece, quantization)
        if scheme is not None and not piece.is_mxfp4:
            needed |= check_quantized(stored, piece, scheme)
            continue
        for name, shape in piece.tensors.items():
            # the experts of one tensor ask for it again and again
            if name not in needed:
                needed.add(name)
                _check_tensor(stored, name, shape, dtypes=("U8",) if piece.is_mxfp4 else tuple(FLOAT_DTYPES))
    extra = [name for name in stored if name not in needed | harmless and not name.endswith(HARMLESS_SUFFIXES)]
    if extra:
        raise UnsupportedModel(
            f"The checkpoint has a tensor {min(extra)} that this architecture does not use"
            + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else "")
        )


def _check_tensor(
    stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], *, dtypes: tuple[str, ...]
) -> None:
    tensor = stored.get(name)
    if tensor is None:
        raise UnsupportedModel(f"The checkpoint has no tensor {name}")
    if tensor.shape != shape:
        raise UnsupportedModel(
            f"The tensor {name} has the shape {list(tensor.shape)}; config.json implies {list(shape)}"
        )
    if tensor.dtype not in dtypes:
        raise UnsupportedModel(f"The tensor {name} has the dtype {tensor.dtype}; supported: {', '.join(dtypes)}")


def load_parameters(
    stored: Mapping[str, StoredTensor],
    parameters: Iterable[Parameter],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank,
    progress: Progress,
    quantization: QuantizationSpec | None = None,
    bytes_to_follow: int = 0,
    staged: bool | None = None,
) -> dict[str, Tensor]:
    """This rank's part of each parameter, by name; checked by `check_tensors` before.

    Every byte goes from its file to its final place, converted on the way; quantised ones are dequantised.
    `progress` hears (bytes of weights in place, bytes in all with `bytes_to_follow`), with growing first number,
    (0, all) and (all, all) included. staged: what lies in its file as it is wanted is read by the threads of
    staged_reads.py instead of from mapped files; None = where the device does not share the host's memory.
    """
    if staged is None:
        staged = device.type != "cpu"
    parameters = list(parameters)
    total = bytes_to_follow + sum(parameter.num_bytes(rank, dtype.itemsize) for parameter in parameters)
    tensors = open_tensors(stored)
    done = 0
    progress(done, total)

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    reads: list[StagedRead] = []
    weights: dict[str, Tensor] = {}
    for parameter in parameters:
        kept_dtype = torch.float32 if parameter.in_float32 else dtype
        weight = torch.empty(parameter.shape(rank), dtype=kept_dtype, device=device)
        rows = weight if parameter.num_experts is None else weight.flatten(0, 1)
        row = 0
        for piece in parameter.pieces:
            target = rows[row : row + piece.shape(rank)[0]]
            row += len(target)
            scheme = piece_scheme(parameter, piece, quantization)
            if scheme is None and staged and piece.view is None:
                reads += _staged_reads(target, piece, stored[piece.tensor], rank)
                continue
            if scheme is not None:
                copy_dequantized(target, piece, scheme, tensors=tensors, rank=rank)
            else:
                _copy_piece(target, piece, tensors[piece.tensor], rank)
            report(target.nbytes)
        weights[parameter.name] = weight
    if reads:
        run_reads(reads, device=device, done=report)
    return weights


def _staged_reads(target: Tensor, piece: Piece, source: StoredTensor, rank: Rank) -> Iterator[StagedRead]:
    """This rank's slices of a stored tensor, and where they go."""
    dim = piece.sharding.dim if isinstance(piece.sharding, Shard) else 0
    dtype, row_elements = FLOAT_DTYPES[source.dtype], prod(source.shape[1:])
    start = 0
    for part in piece.slices(rank):
        length = part.stop - part.start
        first_row = part.start if dim == 0 else 0
        yield StagedRead(
            source.file,
            source.offset + first_row * row_elements * dtype.itemsize,
            dtype,
            row_elements,
            target.narrow(dim, start, length),
            columns=None if dim == 0 or part == slice(0, row_elements) else part,
        )
        start += length


def _copy_piece(target: Tensor, piece: Piece, source: Tensor, rank: Rank) -> None:
    """Copy this rank's slices of the source to the target."""
    dim = piece.sharding.dim if isinstance(piece.sharding, Shard) else 0
    matrix = viewed(source, piece.view)
    start = 0
    for part in piece.slices(rank):
        length = part.stop - part.start
        _copy(target.narrow(dim, start, length), matrix.narrow(dim, part.start, length))
        start += length


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy and convert. On a CPU in this thread alone: the time goes into first touches of memory, which more threads
    hardly speed up, and where cores are busy torch's threads wait for one another at the end of every copy."""
    num_rows = target.shape[0]
    if target.device.type == "cpu":
        num_rows = max(1, SERIAL_ELEMENTS * num_rows // target.numel())
    for row in range(0, target.shape[0], num_rows):
        target[row : row + num_rows].copy_(source[row : row + num_rows])
