#!/usr/bin/env python3
"""The inheritance loss in your own loop: any two Hugging Face models, plain PyTorch, no DeepSpeed."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ki_ds.loss import linear_inheritance_loss

torch.manual_seed(0)
text = torch.tensor(list(b"what a small model knows, a larger one need not find out again. " * 40)).reshape(-1, 64)
teacher = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
).eval()
student = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
num_steps, inherit_steps = 60, 40  # the teacher's weight falls to 0 at step 40

optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(num_steps):
    hidden = student.transformer(text).last_hidden_state[:, :-1]
    with torch.no_grad():
        taught = teacher.transformer(text).last_hidden_state[:, :-1]
    out = linear_inheritance_loss(
        hidden,
        student.lm_head.weight,
        text[:, 1:],
        teacher_hidden=taught,
        teacher_weight=teacher.lm_head.weight,
        alpha=max(0.0, 1.0 - step / inherit_steps),  # equation 2
        tau=2.0,
    )
    (out.loss_sum / out.num_rows).backward()  # sums come back: divide once, by all rows of the step
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: cross-entropy {out.ce_sum / out.num_rows:.3f}, KL {out.kl_sum / out.num_rows:.3f}")
