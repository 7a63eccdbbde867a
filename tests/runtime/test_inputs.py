import numpy as np
import torch

from tests.runtime.demo import DEVICE
from tlk.models.batch import PagedKV
from tlk.runtime.inputs import Expanded, Inputs, to_device, upload

PLACE = torch.device(DEVICE)


def test_one_copy_sends_all_fields_and_as_many_ids_as_there_are():
    inputs = Inputs(5, 9, PLACE)
    for i, values in enumerate(inputs.host.values()):
        values[:] = np.arange(len(values)) + 10 * i
    addresses = {name: getattr(inputs, name).data_ptr() for name in inputs.host}
    inputs.send(4)
    for name, values in inputs.host.items():
        got = getattr(inputs, name).cpu().numpy()
        assert got.dtype == values.dtype and len(got) == len(values)
        n = 4 if name == "ids" else len(values)
        assert (got[:n] == values[:n]).all() and not got[n:].any()
        assert getattr(inputs, name).data_ptr() == addresses[name]
        assert addresses[name] % 16 == 0
    assert len(inputs.cu_seqlens_q) == 6 and len(inputs.rows) == 5 and len(inputs.ids) == 9


def test_the_image_may_change_at_once():
    inputs = Inputs(2, 2, PLACE)
    inputs.host["seeds"][:] = 7
    inputs.send(2)
    inputs.host["seeds"][:] = 8
    assert inputs.seeds.tolist() == [7, 7]


def test_uploads():
    array = np.array([3, 1], np.int64)
    sent = upload(array, PLACE)
    array[:] = 0
    assert sent.tolist() == [3, 1] and sent.is_pinned() == (DEVICE == "cuda")
    assert to_device([2**40], PLACE).tolist() == [2**40]


def test_room_for_what_the_device_makes():
    groups = [PagedKV(1, 8, 8, torch.float32), PagedKV(2, 8, 8, torch.float32)]
    e = Expanded(groups, 3, 7, 4, PLACE)
    assert e.ids.shape == e.positions.shape == (7,)
    assert [x.shape for x in e.slots] == [(7,)] * 2 and [x.shape for x in e.tables] == [(3, 4)] * 2
