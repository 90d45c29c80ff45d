"""One rank of the tests of the engine: gradients of one global batch, split into accumulation steps, by ZeRO stage.

usage: split_gradients.py CORPUS OUT.pt STAGE...
"""

import dataclasses
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from ki_ds import config as configuration
from ki_ds.data.batches import TrainBatches
from ki_ds.engine.student import StudentEngine, start
from ki_ds.models.presets import InheritanceModel, RowLM, build_lm
from ki_ds.ranks.preemption import Preemption
from ki_ds.ranks.world import leave, rank, world_size
from ki_ds.training.setup import load_data

ROOT = Path(__file__).resolve().parent.parent.parent


def main(corpus_dir: str, out: str, stages: list[str]) -> None:
    gradients = {}
    for stage in stages:
        for accumulation in (1, 2, 4):
            if 8 % (accumulation * world_size_of_env()) == 0:
                gradients[stage, accumulation] = gradients_of(corpus_dir, stage, accumulation)
    if rank() == 0:
        torch.save(gradients, out)


def world_size_of_env() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


def run_config(corpus_dir: str, stage: str, micro_batch_size: int) -> configuration.RunConfig:
    small = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 64, "num_positions": 32}
    arguments = ["--run_dir", "unused", "--data.corpus", corpus_dir, "--data.seq_len", "32", "--model.dropout", "0"]
    arguments += ["--model.attention_dropout", "0", "--engine.ds_config", str(ROOT / f"ds_configs/zero{stage}.json")]
    arguments += ["--train.global_batch_size", "8", "--train.micro_batch_size", str(micro_batch_size)]
    arguments += [part for name, value in small.items() for part in (f"--model.{name}", str(value))]
    return configuration.parse(arguments)


def gradients_of(corpus_dir: str, stage: str, accumulation: int) -> dict[str, torch.Tensor]:
    run = run_config(corpus_dir, stage, 8 // (accumulation * world_size_of_env()))
    device = start(run.engine)
    data = load_data(run)
    special = {"num_classes": data.vocabulary.size, "special_ids": data.vocabulary.special_ids}
    lm = build_lm(run.model, run.task, **special, seed=1)
    narrow = dataclasses.replace(run.model, hidden_size=16)
    teacher = RowLM(build_lm(narrow, run.task, **special, seed=2)).eval()
    model = InheritanceModel(lm, num_classes=data.vocabulary.size, loss=run.loss, tau=2.0)
    engine = StudentEngine(model, run, device=device)
    train = run.train
    batches = TrainBatches(
        data.train,
        seed=5,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        rank=rank(),
        world_size=world_size(),
        num_steps=1,
    )
    (micro_batches,) = list(batches)
    assert len(micro_batches) == accumulation
    rows = Preemption().global_rows(sum(batch.num_rows for batch in micro_batches), device)
    for i, batch in enumerate(micro_batches):
        with torch.no_grad():
            signal = teacher.signal(batch)
        engine.backward(engine.loss(batch, signal, 0.6)[0].loss_sum, rows)
        if i < accumulation - 1:
            engine.step(0.0)
    found = {name: safe_get_full_grad(p).float().clone() for name, p in model.named_parameters()}
    engine.close()
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    leave(0)
