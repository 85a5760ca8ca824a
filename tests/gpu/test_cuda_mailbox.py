"""Exchange with a thread of the host that watches flags, as one captured graph."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", [1, 1000, 7184, 16 * 7184])
def test_words_arrive_before_their_flag_and_come_back(words: int) -> None:
    """A thousand layers in one graph, each sending on what came back: a word read too early would stay."""
    from ktd_kernels.gpu import Gpu

    gpu, layers = Gpu("cuda:0"), 1000
    with gpu.work():
        x = gpu.upload(torch.arange(words, dtype=torch.float32).numpy())
        sent, sums = gpu.pinned((words,)), gpu.pinned((words,))
        flags = gpu.pinned((layers, 2, 16), torch.int32)

        def body() -> None:
            for asked, done in flags[:, :, :1]:
                gpu.post(x, sent, asked)
                gpu.collect(sums, done, x)

        flags.fill_(1)
        gpu.post(x, sent, flags[0, 0, :1])
        gpu.collect(sums, flags[0, 1, :1], x)
        gpu.synchronize()
        replay = gpu.capture(body)
        flags.fill_(0)
        replay()
        for asked, done in flags.numpy()[:, :, 0:1]:
            while not asked[0]:
                assert gpu.busy()
            torch.add(sent % 3, 1, out=sums)
            done[0] = 1
        gpu.synchronize()
        expected = torch.arange(words, dtype=torch.float32)
        for _ in range(layers):
            expected += expected % 3 + 1
        assert torch.equal(x.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("words", "start"), [(3, 0), (7168 * 600, 0), (7168 * 600 + 3, 0), (7168, 1)])
def test_what_is_on_the_host_is_added_without_a_flag(words: int, start: int) -> None:
    """In pieces of 16 bytes where they are aligned."""
    from ktd_kernels.gpu import Gpu

    gpu = Gpu("cuda:0")
    with gpu.work():
        sums = gpu.pinned((start + words + 1,))
        sums.copy_(torch.arange(len(sums)) % 1000)
        x = torch.ones(start + words + 1, device="cuda")
        gpu.collect(sums[start : start + words], None, x[start : start + words])
        gpu.synchronize()
        expected = torch.ones(len(sums))
        expected[start : start + words] += sums[start : start + words]
        assert torch.equal(x.cpu(), expected)
