"""What one server process has counted, as it leaves it for the others and for the process that replaces it."""

from msgspec import Struct

from llmd.protocol.generation import EngineReady, EngineStatistics


class Sample(Struct, frozen=True, array_like=True):
    """One number, as Prometheus knows it."""

    name: str  # of its family, and what the kind adds: _total, _bucket, _sum, _count
    labels: dict[str, str]
    value: float


class Family(Struct, frozen=True, array_like=True):
    """The samples of one metric."""

    name: str  # without `_total`
    kind: str  # counter, gauge or histogram
    help: str
    samples: list[Sample]


class EngineHistory(Struct, frozen=True, kw_only=True):
    """What the engines have counted. Each begins at 0: those that are gone are added up, the last one goes on."""

    ended: EngineStatistics | None = None  # only its counters mean something
    latest: EngineStatistics | None = None


class ServerFigures(Struct, frozen=True, kw_only=True):
    """All that one server process knows and another does not."""

    counted: list[Family]  # all processes together: the sum
    process: list[Family]  # of the process itself; each sample says of which
    engine: EngineHistory  # every server hears the same of the engine, but not from the same moment on
    ready: EngineReady | None = None  # of the engine that it is connected to
    num_open: int = 0  # sequences that have not ended
    queue_age: float = 0.0  # seconds since the oldest sequence without a first token came; 0 = there is none
