"""What differs between devices."""

import logging

import pytest
import torch

from flatllmcore.errors import InputError
from flatllmcore.utils import devices
from flatllmcore.utils.devices import best_device, computed_in, float32_product, peak_memory_gib
from python_process import run_python_anew

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_are_accumulated_in_at_least_float32(device, dtype, batch):
    """Oracle: the product in float64. A sum in bf16 would be wrong by 1e-2, one in fp16 by 1e-3."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(*batch, *shape, generator=generator).to(device, dtype) for shape in ((5, 2000), (2000, 7)))
    product = float32_product(a, b)
    assert product.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-4, atol=0)  # matrix units: 1.6e-5


@pytest.mark.parametrize(
    ("instructions", "halves"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, []),
        ({"amx_bf16": True}, [torch.bfloat16]),
        ({"bf16": True, "fp16_arith": True}, [torch.bfloat16, torch.float16]),
        (None, []),  # torch before 2.11 says nothing
    ],
)
def test_halves_are_computed_in_float32_on_cpus_without_instructions_for_them(
    instructions, halves, monkeypatch, caplog, request
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    if instructions is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    devices.has_instructions_for.cache_clear()
    request.addfinalizer(devices.has_instructions_for.cache_clear)
    for dtype in 2 * DTYPES:
        is_slow = dtype in (torch.bfloat16, torch.float16) and dtype not in halves
        assert computed_in(dtype, torch.device("cpu")) == (torch.float32 if is_slow else dtype)
        assert computed_in(dtype, torch.device("cuda")) == dtype
        assert caplog.text.count(f"no instructions of this CPU for {dtype}:") == is_slow


@pytest.mark.parametrize("rank", ["", "first", "-1", "1.0"])
def test_a_local_rank_that_is_no_number_is_refused(rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(InputError, match=f"LOCAL_RANK is '{rank}', not 0 to"):
        best_device()


@pytest.mark.slow
def test_peak_memory_is_this_process_s_and_not_that_of_the_one_that_started_it():
    """A child takes less for its imports than the block of its parent."""
    block = torch.ones(2**28)  # 1 GiB
    code = "import torch; from flatllmcore.utils.devices import peak_memory_gib; "
    printed = run_python_anew(code + "print(peak_memory_gib(torch.device('cpu'))['host'])")
    assert block.sum() == 2**28
    assert 0.1 < float(printed) < 0.9
    assert peak_memory_gib(torch.device("cpu"))["host"] > 1
