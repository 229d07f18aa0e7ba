from collections import Counter

from diffusers_fvg.training.batches import BatchOrder


def test_batch_order_goes_through_every_clip_in_batches_of_one_shape():
    shapes = [(16, 3, 4, 4)] * 5 + [(16, 5, 4, 4)] * 2 + [(16, 2, 4, 4)]
    order = BatchOrder(shapes, batch_size=2, seed=0)
    # 5 clips need three batches, 2 and 1 one each.
    assert order.batches_per_epoch == 5
    epochs = [[order[epoch * 5 + index] for index in range(5)] for epoch in range(2)]
    for batches in epochs:
        assert {len({shapes[index] for index in batch}) for batch in batches} == {1}
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts) == set(range(8)) and sum(counts.values()) == 10
    assert epochs[0] != epochs[1]
    # Any batch, asked for alone, is the same.
    assert BatchOrder(shapes, 2, 0)[7] == epochs[1][2] and BatchOrder(shapes, 2, 1)[7] != epochs[1][2]
