"""A kernel's module with a fault planted in its source. Knows no particular kernel."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType


def with_fault(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """A copy of the module, loaded from `folder`, that says `wrong` where it says `right`."""
    source = inspect.getsource(module)
    assert right in source, f"{module.__name__} does not say {right!r} any more"
    path = folder / f"{module.__name__.split('.')[-1]}_with_a_fault.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty
