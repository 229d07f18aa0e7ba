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
    # A batch does not depend on which batches were asked for before.
    assert BatchOrder(shapes, 2, 0)[7] == epochs[1][2] and BatchOrder(shapes, 2, 1)[7] != epochs[1][2]


def test_repeats_are_how_often_an_epoch_takes_a_clip():
    """Two clips twice, four of which every epoch takes half, one that is hardly wanted; all of one shape but the last two."""
    shapes = [(1, 3, 4, 4)] * 6 + [(1, 1, 4, 4)] * 2
    repeats = [2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 1.5, 1.5]
    order = BatchOrder(shapes, 1, seed=0, repeats=repeats)
    epoch = order.batches_per_epoch
    assert epoch == 2 * 2 + 2 + 3
    for first in range(0, 4 * epoch, 2 * epoch):
        counts = Counter(index for number in range(first, first + 2 * epoch) for index in order[number])
        # Over two epochs the fractions are whole.
        assert counts == {0: 4, 1: 4, 2: 1, 3: 1, 4: 1, 5: 1, 6: 3, 7: 3}
    assert [order[number] for number in range(epoch)] == [
        BatchOrder(shapes, 1, seed=0, repeats=repeats)[number] for number in range(epoch)
    ]


def test_once_each_is_the_order_without_repeats():
    shapes = [(1, 3, 4, 4)] * 5 + [(1, 3, 8, 8)] * 3
    with_repeats, without = BatchOrder(shapes, 2, 7, [1.0] * 8), BatchOrder(shapes, 2, 7)
    assert [with_repeats[number] for number in range(12)] == [without[number] for number in range(12)]
