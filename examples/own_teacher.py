#!/usr/bin/env python3
"""A teacher of your own: anything that can name a few likely next tokens, here counts of pairs of bytes."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ki_ds.loss import linear_topk_inheritance_loss

torch.manual_seed(0)
text = torch.tensor(list(b"what a small model knows, a larger one need not find out again. " * 40)).reshape(-1, 64)


class BigramTeacher:
    """After each byte the K bytes that followed it most often, with their shares."""

    def __init__(self, text: torch.Tensor, num_entries: int = 4) -> None:
        counts = torch.zeros(256, 256)
        counts.index_put_((text[:, :-1].flatten(), text[:, 1:].flatten()), torch.ones(1), accumulate=True)
        largest = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).topk(num_entries)
        self.ids, self.probs = largest.indices, largest.values  # a probability of 0 is an entry that is not there

    def signal(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """K entries for each position."""
        return {"topk_ids": self.ids[inputs], "topk_probs": self.probs[inputs]}


teacher = BigramTeacher(text)
student = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(40):
    hidden = student.transformer(text).last_hidden_state[:, :-1]
    signal = teacher.signal(text[:, :-1])
    out = linear_topk_inheritance_loss(hidden, student.lm_head.weight, text[:, 1:], alpha=0.5, tau=1.0, **signal)
    (out.loss_sum / out.num_rows).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: cross-entropy {out.ce_sum / out.num_rows:.3f}, KL {out.kl_sum / out.num_rows:.3f}")
