"""Layouts of blocks in packed rows, against their definition in plain Python."""

import itertools

import numpy as np
import pytest

from sparse_pretrain.attention import blocks


def packed(rng, rows, length):
    """Segments and positions of rows of documents, some rows ending in padding."""
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        end = length - int(rng.integers(0, 2) * rng.integers(1, 9))
        cuts = np.sort(rng.integers(0, end, 3))
        for n, (first, stop) in enumerate(itertools.pairwise([0, *cuts.tolist(), end])):
            segments[row, first:stop] = n + 1
            positions[row, first:stop] = np.arange(stop - first)
    return segments, positions


def entries(segments, span, stride):
    """(start, end, segment) of one row's entries, document by document."""
    found = []
    for document in range(1, segments.max() + 1):
        where = np.nonzero(segments == document)[0]
        for start in range(0, len(where) - span + 1, stride):
            found.append((where[start], where[start + span - 1], document))
    return found


@pytest.mark.parametrize(("span", "stride"), [(4, 4), (6, 2), (5, 3), (1, 1), (16, 16)])
def test_a_layout_holds_every_whole_entry_in_row_order(rng, span, stride):
    segments, positions = packed(rng, 8, 50)
    got = blocks.layout(segments, positions, span=span, stride=stride)
    starts, ends, of = (np.asarray(x) for x in got)
    assert starts.shape == ends.shape == of.shape == (8, 50 // stride)
    for row in range(8):
        want = entries(segments[row], span, stride)
        used = len(want)
        assert list(zip(starts[row], ends[row], of[row], strict=True))[:used] == want
        assert not of[row, used:].any()
        assert (ends[row, used:] >= 50).all()
    # what a query block may skip
    assert (ends >= np.arange(50 // stride)[None] * stride + span - 1).all()


def test_a_row_full_of_short_documents_has_no_entry():
    segments = np.repeat(np.arange(1, 9), 3)[None].astype(np.int32)
    positions = np.tile(np.arange(3), 8)[None].astype(np.int32)
    got = blocks.layout(segments, positions, span=4, stride=2)
    assert got.starts.shape == (1, 12)
    assert not np.asarray(got.segments).any()
    assert (np.asarray(got.ends) >= 24).all()


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_block_ids_are_equal_exactly_within_a_block_of_a_document(rng, size):
    segments, positions = packed(rng, 6, 40)
    ids = np.asarray(blocks.block_ids(segments, positions, size))
    np.testing.assert_array_equal(ids == 0, segments == 0)
    for row in range(6):
        block = positions[row] // size
        own = (segments[row][:, None] == segments[row]) & (block[:, None] == block)
        real = segments[row] != 0
        np.testing.assert_array_equal(
            (ids[row][:, None] == ids[row])[real][:, real], own[real][:, real]
        )


def test_mistakes_are_named():
    one = np.ones((1, 8), np.int32)
    with pytest.raises(ValueError, match="span: 2 must be at least stride 4"):
        blocks.layout(one, one, span=2, stride=4)
    with pytest.raises(ValueError, match="size: must be at least 1, got 0"):
        blocks.block_ids(one, one, 0)
