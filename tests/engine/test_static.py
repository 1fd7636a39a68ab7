"""Memory that inputs of recordings are copied into."""

import torch
from hotpath_pack.hotpath.static import StaticInputs, layout
from hypothesis import given
from hypothesis import strategies as st


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=3),
    st.booleans(),
)
def test_static_inputs_keep_what_overlaps(storages, views, inference):
    with torch.inference_mode(inference):
        memory = [torch.arange(24.0) + 100 * number for number in range(storages)]
        tensors = [
            memory[which % storages].as_strided((size, 2), (2 * step + 1, step), offset)
            for which, offset, size in views
            for step in (1,)
        ]
        inputs = {"all": tensors, "kind": "x"}
        found = layout(inputs)
        static = StaticInputs(inputs, found)
        assert not static.held(found)
        static.bring(found)
        for twin, tensor in zip(static.twins, tensors, strict=True):
            assert torch.equal(twin, tensor) and twin.is_inference() == tensor.is_inference()
            assert twin.stride() == tensor.stride()
        static.twins[0].mul_(-1)
        tensors[0].mul_(-1)
        for twin, tensor in zip(static.twins, tensors, strict=True):
            assert torch.equal(twin, tensor)
        assert layout(static.nest).key == found.key and static.bring(layout(static.nest)) == []
