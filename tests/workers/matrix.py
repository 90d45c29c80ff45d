"""One rank of tests/test_engine_matrix.py: losses of three updates and the first gradient, case after case.

usage: matrix.py CORPUS OUT.pt PRECISION CASE...    a case is TASK/TEACHER/ZERO[/VARIANT], e.g. mlm/ki/2_offload/clipped
"""

import dataclasses
import os
import sys

import torch
from deepspeed.utils import safe_get_full_grad

from ki_ds.config import RunConfig, parse
from ki_ds.data.batches import TrainBatches
from ki_ds.engine.student import StudentEngine, start
from ki_ds.models.presets import InheritanceModel, RowLM, build_lm
from ki_ds.ranks.preemption import Preemption
from ki_ds.ranks.world import all_sum, leave, rank, world_size
from ki_ds.training.setup import load_data
from tests.workers.split_gradients import run_config

STEPS = 3
VARIANTS = {
    "plain": [],
    "clipped": ["--optim.max_grad_norm", "0.05"],
    "recomputed": ["--engine.activation_checkpointing", "true"],
    "compiled": ["--engine.compile", "true"],
}


def main(corpus: str, out: str, precision: str, cases: list[str]) -> None:
    found = {case: measure(corpus, precision, *case.split("/")) for case in cases}
    if rank() == 0:
        torch.save(found, out)


def configured(corpus: str, precision: str, task: str, zero: str, variant: str, micro_batch_size: int) -> RunConfig:
    base = run_config(corpus, zero, micro_batch_size)
    arguments = ["--run_dir", "unused", "--task", task, "--engine.precision", precision, *VARIANTS.get(variant, [])]
    changed = parse([*arguments, "--data.corpus", corpus, "--optim.lr", "3e-3"])
    name = "roberta_base" if task == "mlm" else "gpt_124m"
    engine = dataclasses.replace(changed.engine, ds_config=base.engine.ds_config, num_threads=1)
    model = dataclasses.replace(base.model, name=name)
    return dataclasses.replace(base, task=task, model=model, engine=engine, optim=changed.optim)


def measure(corpus: str, precision: str, task: str, teacher: str, zero: str, variant: str = "plain") -> dict:
    """{losses: of each step, gradients: of the first, before any clipping}."""
    accumulation = 2 if variant == "accumulated" else 1
    micro_batch_size = 8 // (accumulation * int(os.environ["WORLD_SIZE"]))
    run = configured(corpus, precision, task, zero, variant, micro_batch_size)
    device = start(run.engine)
    data = load_data(run)
    special = {"num_classes": data.vocabulary.size, "special_ids": data.vocabulary.special_ids}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    lm = build_lm(run.model, task, **special, seed=1)
    narrow = dataclasses.replace(run.model, hidden_size=16)
    taught = RowLM(build_lm(narrow, task, **special, seed=2)).eval().to(dtype) if teacher == "ki" else None
    model = InheritanceModel(lm, num_classes=data.vocabulary.size, loss=run.loss, tau=2.0)
    engine = StudentEngine(model, run, device=device)
    batches = TrainBatches(
        data.train,
        seed=5,
        micro_batch_size=micro_batch_size,
        global_batch_size=8,
        rank=rank(),
        world_size=world_size(),
        num_steps=STEPS,
    )
    losses, gradients = [], {}
    for micro_batches in batches:
        assert len(micro_batches) == accumulation
        rows = Preemption().global_rows(sum(batch.num_rows for batch in micro_batches), device)
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(micro_batches):
            with torch.no_grad():
                signal = taught.signal(batch) if taught is not None else None
            out, _ = engine.loss(batch, signal, 0.6 if taught is not None else 0.0)
            engine.backward(out.loss_sum, rows)
            total += out.loss_sum.detach().double()
            if number == accumulation - 1 and not gradients:
                gradients = {n: safe_get_full_grad(p).float().clone() for n, p in model.named_parameters()}
            engine.step(3e-3)
        losses.append((all_sum(total) / rows).item())
    engine.close()
    return {"losses": losses, "gradients": gradients}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
    leave(0)
