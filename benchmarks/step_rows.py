"""The rows of step.py: each trains in a process of its own, step by step as it is told.

A row is a function of a job (the configuration as JSON) and a `Pace`: it builds its models, then trains, and calls
`pace.step_done` after every step until that says no.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ki_ds.training.profiling import each, part, profiler, seconds_by_part

ALPHA, TAU, SEED = 0.5, 2.0, 1
NUM_WARM_STEPS, GEMM_WIDTH = 3, 2048
MAX_STEPS = 10**6

Job = dict[str, Any]


class Pace:
    """Tells a row when to go on; times its steps and says what they cost. One JSON line each way."""

    def __init__(self, commands: TextIO, answers: TextIO, *, num_warm_steps: int):
        self._commands, self._answers = commands, answers
        self._left, self._what, self._trace = num_warm_steps, "warm", ""
        self._losses: list[float] = []
        self._tokens = self._base_bytes = 0
        self._profile: torch.profiler.profile | None = None
        self._clock = self._cpu_clock = 0.0

    def imported(self) -> None:
        """Everything is imported: memory counts from here on."""
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        self._base_bytes = _status_bytes("VmRSS")

    def step_done(self, num_tokens: int, loss: Callable[[], float]) -> bool:
        """Count a step; whether to go on. `loss` is asked in the first steps only, which are not timed."""
        self._left -= 1
        self._tokens += num_tokens
        if self._what == "warm":
            self._losses.append(loss())
        return self._left > 0 or self._turn()

    def _turn(self) -> bool:
        """Answer the last command and wait for the next one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._clock, time.process_time() - self._cpu_clock
        answer: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": self._tokens}
        if self._what == "warm":
            answer = {"losses": self._losses}
        elif self._profile is not None:
            self._profile.stop()
            answer["parts"] = seconds_by_part(self._profile, seconds)
            if self._trace:
                self._profile.export_chrome_trace(self._trace)
            self._profile = None
        self._say(answer)
        command = json.loads(self._commands.readline() or '{"do": "end"}')
        if command["do"] == "end":
            self._say({"peak_mib": self._peak_bytes() / 2**20})
            return False
        self._what, self._left, self._trace, self._tokens = command["do"], command["steps"], command.get("trace", ""), 0
        if self._what == "profile":
            self._profile = profiler()
            self._profile.start()
        self._clock, self._cpu_clock = time.perf_counter(), time.process_time()
        return True

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def _peak_bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM") - self._base_bytes


def _status_bytes(name: str) -> int:
    """A figure of /proc/self/status; elsewhere the peak of resident memory, which never falls."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ------------------------------------------------------------------------------------------------------ ours


def arguments(job: Job, *, taught: bool) -> list[str]:
    """The command line of a run of ours; the job's own `fields` come last."""
    fields = {
        "run_dir": f"{job['folder']}/{'inherit' if taught else 'self'}_{os.getpid()}",
        "task": job["task"],
        "seed": SEED,
        "data.corpus": f"{job['folder']}/text",
        "data.seq_len": job["seq_len"],
        "data.break_mode": "none",
        "data.num_workers": job["num_workers"],
        **{f"model.{name}": value for name, value in job["student"].items()},
        "engine.precision": job["precision"],
        "engine.num_threads": job["num_threads"],
        "engine.ds_config": job["ds_config"],
        "train.num_steps": MAX_STEPS,
        "train.micro_batch_size": job["micro_batch_size"],
        "train.global_batch_size": job["micro_batch_size"],
    }
    if taught:
        fields |= {"teacher.path": f"{job['folder']}/teacher", "inherit.schedule": "constant", "inherit.tau": TAU}
        fields |= {"inherit.constant_alpha": ALPHA}
    fields |= job.get("fields", {})
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def ours(job: Job, pace: Pace, *, taught: bool) -> None:
    """This project's step, as its loop takes it; with `give_back` in the job freed memory is not kept."""
    from ki_ds import config as configuration
    from ki_ds.engine import student as engine
    from ki_ds.ranks.preemption import Preemption
    from ki_ds.ranks.stragglers import Pace as RankPace
    from ki_ds.training.loop import train_step
    from ki_ds.training.setup import prepare

    if job.get("give_back"):
        engine.keep_freed_memory = lambda: False
    pace.imported()
    config = configuration.parse(arguments(job, taught=taught))
    Path(config.run_dir).mkdir(exist_ok=True)
    device, _ = engine.connect(config.engine)
    run = prepare(config, device)
    preemption, rank_pace = Preemption(), RankPace(device)

    def loss() -> float:
        done, run.window = run.window, run.new_window()
        done.settle()
        return done.figures(0.0).means["loss"]

    for micro_batches in rank_pace.loading(each("data", run.batches(MAX_STEPS))):
        train_step(run, micro_batches, preemption, rank_pace)
        run.totals.step += 1
        if not pace.step_done(micro_batches[0].num_tokens, loss):
            break
    run.engine.close()


# ------------------------------------------------------------------------------------------------------ peers


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The objective on rows of logits as one writes it in PyTorch; a mean over the rows."""
    ce = F.cross_entropy(student.float(), labels)
    log_prob, prob = F.log_softmax(student.float() / TAU, -1), F.softmax(teacher.float() / TAU, -1)
    return (1 - ALPHA) * ce + ALPHA * TAU**2 * F.kl_div(log_prob, prob, reduction="batchmean")


def models(job: Job, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Student (float32) and teacher (float32 on a CPU, half precision on a GPU), the same weights as ours."""
    from ki_ds.config import ModelConfig
    from ki_ds.models.presets import build_lm, load_lm

    specials, num_classes = _special_ids(job)
    student = build_lm(
        ModelConfig(**job["student"]), job["task"], num_classes=num_classes, special_ids=specials, seed=SEED
    )
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    teacher = load_lm(f"{job['folder']}/teacher", job["task"], dtype, what="teacher")
    return student.train().to(device), teacher.eval().to(device).requires_grad_(False)


def _special_ids(job: Job) -> tuple[Any, int]:
    from ki_ds.data.store import SpecialIds

    return SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=job["vocab_size"] - 1), job["vocab_size"]


def batches(job: Job) -> Iterator[Any]:
    """Our batches, which the peers get for nothing but the time to make them."""
    from ki_ds.data.batches import TrainBatches

    size = job["micro_batch_size"]
    workers = job["num_workers"]
    steps = TrainBatches(_dataset(job), seed=SEED, micro_batch_size=size, global_batch_size=size, num_workers=workers)
    return (batch for (batch,) in steps)


def _dataset(job: Job) -> Any:
    from ki_ds.config import DataConfig
    from ki_ds.data.datasets import open_datasets

    folder = Path(job["folder"])
    data = DataConfig(corpus=str(folder / "text"), seq_len=job["seq_len"], break_mode="none")
    return open_datasets(data, job["task"], other_index_dir=folder / "index").train


def _autocast(device: torch.device, job: Job) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=job["precision"] == "bf16")


def plain_loop(job: Job, pace: Pace, *, selected: bool) -> None:
    """A loop as PyTorch's tutorials write it: HF models, AdamW with torch's defaults, the eager loss.

    With `selected` both models' heads see the labelled rows alone, else all positions.
    """
    import ki_ds.models.presets  # noqa: F401

    pace.imported()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = models(job, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-9, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)

    def logits_of(model: Any, batch: Any) -> Tensor:
        if not selected:
            return model(input_ids=batch.input_ids_BL).logits.flatten(0, 1)[batch.rows_N]
        return model.lm_head(
            model.base_model(input_ids=batch.input_ids_BL).last_hidden_state.flatten(0, 1)[batch.rows_N]
        )

    for batch in each("data", batches(job)):
        batch = batch.to(device, non_blocking=True)
        with part("teacher"), torch.no_grad():
            taught = logits_of(teacher, batch)
        with _autocast(device, job):
            with part("student forward"):
                logits = logits_of(student, batch)
            with part("loss"):
                loss = eager_loss(logits, taught, batch.row_labels_N)
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        if not pace.step_done(batch.num_tokens, loss.item):
            break


def hf_trainer(job: Job, pace: Pace) -> None:
    """Hugging Face's Trainer with `compute_loss` replaced, and its own sampler and loader over our samples."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ki_ds.data.batches import collate

    pace.imported()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = models(job, device)
    mixture = _dataset(job)
    losses: list[Tensor] = []

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(mixture)

        def __getitem__(self, index: int) -> Any:
            return mixture.sample(index, seed=SEED, epoch=0)

    def as_inputs(samples: list[Any]) -> dict[str, Tensor]:
        batch = collate(samples, pad_id=mixture.pad_id, seq_len=mixture.seq_len)
        return {"input_ids": batch.input_ids_BL, "labels": batch.labels_BL}

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            rows = inputs["labels"] != -100
            with torch.no_grad():
                taught = teacher(input_ids=inputs["input_ids"]).logits[rows]
            logits = model(input_ids=inputs["input_ids"]).logits[rows]
            loss = eager_loss(logits, taught, inputs["labels"][rows])
            losses.append(loss.detach())
            return loss

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            going_on = pace.step_done(job["micro_batch_size"] * job["seq_len"], lambda: float(losses[-1]))
            control.should_training_stop = not going_on
            losses.clear()

    options = TrainingArguments(
        output_dir=f"{job['folder']}/trainer",
        per_device_train_batch_size=job["micro_batch_size"],
        max_steps=MAX_STEPS,
        learning_rate=1e-9,
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        bf16=job["precision"] == "bf16",
    )
    trainer = Distilling(student, options, train_dataset=Samples(), data_collator=as_inputs, callbacks=[Watch()])
    trainer.train()


def released(job: Job, pace: Pace) -> None:
    """The trainer, task, criterion, optimizer and iterator of the paper's code, from a checkout of it."""
    sys.path[:0] = [job["released"]]
    from benchmarks.data import give_numpy_its_old_names

    give_numpy_its_old_names()
    from fairseq import options, tasks
    from fairseq.trainer import Trainer

    pace.imported()
    seq_len = str(job["seq_len"])
    words = [f"{job['folder']}/text", "--task", "back_distil", "--criterion", "masked_lm_distil", "--cpu"]
    words += ["--arch", "roberta_base", "--arch_distil_from", "roberta_base", "--sample-break-mode", "none"]
    words += [
        "--tokens-per-sample",
        seq_len,
        "--max-positions",
        seq_len,
        "--max-sentences",
        str(job["micro_batch_size"]),
    ]
    words += ["--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--adam-eps", "1e-6", "--clip-norm", "0.0"]
    words += ["--lr-scheduler", "polynomial_decay", "--lr", "1e-9", "--warmup-updates", "1", "--weight-decay", "0.01"]
    words += ["--total-num-update", str(MAX_STEPS), "--max-update-distil", str(MAX_STEPS), "--restrict_ce_to_mask"]
    words += ["--temperature_distil", str(TAU), "--num-workers", str(job["num_workers"]), "--seed", str(SEED)]

    def parse(shape: dict[str, Any]) -> Any:
        sizes = ["--encoder-layers", shape["num_layers"], "--encoder-embed-dim", shape["hidden_size"]]
        sizes += ["--encoder-ffn-embed-dim", shape["ffn_size"], "--encoder-attention-heads", shape["num_heads"]]
        sizes += ["--dropout", shape["dropout"], "--attention-dropout", shape["attention_dropout"]]
        return options.parse_args_and_arch(options.get_training_parser(), [*words, *map(str, sizes)])

    args = parse(job["student"])
    task = tasks.setup_task(args)
    teacher = nn.Module()  # the trainer asks its `model`, as it does of a hub interface
    teacher.model = task.build_model(parse(job["teacher"]))
    trainer = Trainer(args, task, task.build_model(args), teacher.eval(), task.build_criterion(args))
    epochs = trainer.get_train_iterator(epoch=0)
    while True:
        for batch in each("data", epochs.next_epoch_itr(shuffle=True)):
            log = trainer.train_step([batch])
            if not pace.step_done(int(batch["ntokens"]), lambda log=log: log["loss"] * 0.6931471805599453):  # type: ignore[misc]
                return


def bare_gemm(job: Job, pace: Pace) -> None:
    """Square products in the training precision, one a step: what this machine can do at the time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    left, right, out = (torch.randn(GEMM_WIDTH, GEMM_WIDTH, device=device, dtype=dtype) for _ in range(3))
    pace.imported()
    while pace.step_done(0, lambda: 0.0):
        torch.mm(left, right, out=out)


ROWS: dict[str, Callable[[Job, Pace], None]] = {
    "ours, inheriting": lambda job, pace: ours(job, pace, taught=True),
    "ours, self-learning": lambda job, pace: ours(job, pace, taught=False),
    "PyTorch loop, masked rows": lambda job, pace: plain_loop(job, pace, selected=True),
    "PyTorch loop, all logits": lambda job, pace: plain_loop(job, pace, selected=False),
    "HF Trainer": hf_trainer,
    "released trainer": released,
    "bare GEMM": bare_gemm,
}


def work(name: str, job: Job) -> None:
    """Run a row in this process; commands come on standard input, answers go to what standard output was."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    torch.set_num_threads(job["num_threads"])
    ROWS[name](job, Pace(sys.stdin, answers, num_warm_steps=job.get("num_warm_steps", NUM_WARM_STEPS)))
    answers.flush()
    os._exit(0)
