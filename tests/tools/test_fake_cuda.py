"""Forwards on fake tensors: no wait for the GPU, and with a CUDA build of torch no mix of devices."""

from collections.abc import Iterator

import pytest
import torch

from megakd.data import batches
from tests.tools.examples import tool

fake_cuda = tool("fake_cuda")

NAMES = list(fake_cuda.cases())


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_does_not_wait_for_the_gpu(name: str) -> None:
    assert fake_cuda.check(fake_cuda.cases()[name]) is None


@pytest.fixture
def without_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches come to the device without the places of their labels."""
    for module in (batches, fake_cuda):
        monkeypatch.setattr(module, "with_rows", lambda batch: batch)
    yield


@pytest.mark.usefixtures("without_rows")
@pytest.mark.parametrize("name", ["cached, ghost", "online, one tokenizer", "sar, two tokenizers"])
def test_a_mask_of_labels_is_found(name: str) -> None:
    problem = str(fake_cuda.check(fake_cuda.cases()[name]))
    assert "DynamicOutputShapeException" in problem or "DataDependentOutputException" in problem, problem


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: its fakes cannot be on a GPU")
def test_a_mix_of_devices_is_found() -> None:
    def mixed(mode: object) -> None:
        torch.zeros(3, device=fake_cuda.DEVICE) + torch.zeros(3)

    assert "FakeTensorDeviceMismatchError" in str(fake_cuda.check(mixed))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: its fakes cannot be on a GPU")
def test_a_copy_between_devices_is_found() -> None:
    def copied(mode: object) -> None:
        with fake_cuda.NoCopies():
            torch.zeros(3, device=fake_cuda.DEVICE).cpu()

    assert "Waits" in str(fake_cuda.check(copied))
