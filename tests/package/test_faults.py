"""Test quickly that the faults of `make mutants` still fit the code, so that an outdated fault is noticed at once."""

import pytest

from tests import mutants

OPS = mutants.ops_with_faults()


@pytest.mark.parametrize("op", OPS)
def test_each_fault_changes_one_place(op):
    faults = mutants.faults_of(op)
    for fault in faults:
        text = (mutants.ROOT / fault.file).read_text("utf-8")
        assert text.count(fault.old) == 1, f"{fault.file}: {fault.name}: occurs {text.count(fault.old)} times"
        assert fault.new != fault.old, f"{fault.file}: {fault.name}: changes nothing"
    assert len({(fault.file, fault.name) for fault in faults}) == len(faults)


def test_every_kernel_has_faults():
    """Every kernel has faults. Without faults nothing shows that its tests notice errors."""
    files = {fault.file for op in OPS for fault in mutants.faults_of(op)}
    kernels = [*mutants.ROOT.glob("kernels/*.py"), *mutants.ROOT.glob("csrc/cpu/**/*.cpp")]
    marks = "@triton.jit", "TORCH_LIBRARY_IMPL", "const Binding binding("
    registered = [path for path in kernels if any(mark in path.read_text("utf-8") for mark in marks)]
    assert {str(path.relative_to(mutants.ROOT)) for path in registered} <= files
