"""A small token store of random ids."""

import numpy as np

from ki_ds.data.store import SpecialIds, StoreWriter, TokenStore, open_store

VOCAB = 300
SPECIALS = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)


def write_store(folder, *, name="s", num_items=120, vocab_size=VOCAB, specials=SPECIALS, seed=0) -> TokenStore:
    """Lines of 2 to 40 tokens that end with eos, in documents of nine lines."""
    rng = np.random.default_rng(seed)
    with StoreWriter(folder / name, vocab_size=vocab_size, special_ids=specials) as writer:
        for i in range(num_items):
            item = np.append(rng.integers(5, VOCAB, rng.integers(1, 40)), specials.eos)
            writer.add_items(item, np.array([len(item)]))
            if i % 9 == 0:
                writer.end_document()
    return open_store(folder / name)
