"""Sequences into bins of so many tokens, and a batch over ranks. Both are deterministic."""


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of sequences in bins of at most `capacity` tokens: first fit, longest first (at most 11/9 of the fewest
    bins, plus one). A sequence longer than that gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        length = lengths[index]
        place = next((place for place, left in enumerate(room) if length <= left), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= length
    return [sorted(indices) for indices in bins]


def split_by_tokens(lengths: list[int], num_ranks: int) -> list[list[int]]:
    """Indices of sequences for each rank with about equally many tokens: each sequence, longest first, goes to the
    rank with the fewest.

    Raises ValueError when there are fewer sequences than ranks, which would leave a rank without work.
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
