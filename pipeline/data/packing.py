"""Pack sequences into rows, and split a batch over ranks, deterministically."""


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the indices of sequences in bins of at most `capacity` tokens; a longer sequence gets its own bin.

    First fit, longest first, needs at most 11/9 of the fewest bins, plus one.

    Example: `pack([5, 3, 2], capacity=5)` is `[[0], [1, 2]]`.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        length = lengths[index]
        bin_index = next((i for i, free in enumerate(room) if length <= free), None)
        if bin_index is None:
            bins.append([])
            room.append(capacity)
            bin_index = len(bins) - 1
        bins[bin_index].append(index)
        room[bin_index] -= length
    return [sorted(indices) for indices in bins]


def split_by_tokens(lengths: list[int], num_ranks: int) -> list[list[int]]:
    """Return the indices of sequences for each rank, with about equally many tokens.

    Each sequence, longest first, goes to the rank with the fewest tokens. Raises ValueError for fewer sequences than
    ranks.
    """
    if len(lengths) < num_ranks:
        raise ValueError(f"{len(lengths)} sequences can't be split over {num_ranks} ranks; raise the batch")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in _longest_first(lengths):
        rank = min(range(num_ranks), key=lambda rank: (tokens[rank], len(ranks[rank])))
        ranks[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(indices) for indices in ranks]


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])
