"""One rank of tests/planning/test_communication.py: bytes given to each collective in one step, case after case.

usage: count_traffic.py CORPUS OUT.json PRECISION CASE...    a case is DS_CONFIG:MICRO_STEPS
"""

import collections
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ki_ds.data.batches import TrainBatches
from ki_ds.ranks.world import leave, rank, world_size

COUNTED = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
FOREIGN = ("broadcast", "reduce_scatter", "all_gather", "gather", "scatter", "all_to_all", "all_to_all_single")
found: collections.Counter = collections.Counter()


def count(name: str) -> None:
    """Have torch's collective add the bytes of its largest tensor, the whole one, to `found`."""
    original = getattr(dist, name)

    def counting(*args, **options):
        given = [*args, *options.values()]
        tensors = [t for each in given for t in (each if isinstance(each, list) else [each]) if torch.is_tensor(t)]
        found[name] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return original(*args, **options)

    setattr(dist, name, counting)


def measure(corpus: str, precision: str, ds_config: str, micro_steps: int) -> dict:
    """{collective: bytes} of the third step, and the student's parameters."""
    from ki_ds.engine.student import StudentEngine, start
    from ki_ds.models.presets import InheritanceModel, build_lm
    from ki_ds.training.setup import load_data
    from tests.workers.matrix import configured

    size = 8 // (micro_steps * int(os.environ["WORLD_SIZE"]))
    run = configured(corpus, precision, "mlm", "1", "plain", size)
    run = dataclasses.replace(run, engine=dataclasses.replace(run.engine, ds_config=ds_config))
    device, data = start(run.engine), load_data(run)
    special_ids = data.vocabulary.special_ids
    lm = build_lm(run.model, "mlm", num_classes=data.vocabulary.size, special_ids=special_ids, seed=1)
    parameters = sum(parameter.numel() for parameter in lm.parameters())  # ZeRO-3 empties them
    engine = StudentEngine(InheritanceModel(lm, num_classes=data.vocabulary.size, loss=run.loss, tau=2.0), run,
                           device=device)  # fmt: skip
    world = {"rank": rank(), "world_size": world_size(), "num_steps": 3}
    for batches in TrainBatches(data.train, seed=5, micro_batch_size=size, global_batch_size=8, **world):
        found.clear()
        for batch in batches:
            engine.backward(engine.loss(batch, None, 0.0)[0].loss_sum, torch.tensor(100.0))
            engine.step(1e-3)
    engine.close()
    return dict(found) | {"parameters": parameters}


if __name__ == "__main__":
    for name in (*COUNTED, *FOREIGN):
        count(name)  # before DeepSpeed takes hold of them
    corpus, out, precision, *cases = sys.argv[1:]
    measured = [measure(corpus, precision, *(case.rsplit(":", 1)[0], int(case.rsplit(":", 1)[1]))) for case in cases]
    if rank() == 0:
        Path(out).write_text(json.dumps(measured))
    leave(0)
