"""The loss's inner machinery; `ki_ds.loss` is the door.

| module | what is in it |
|---|---|
| `backend` | which implementation runs: Triton or plain PyTorch |
| `rows` | what both implementations agree on: `RowTask`, `RowTerms`, how a sum is made of rows |
| `reference` | the plain PyTorch rows: the CPU's default and the kernels' yardstick |
| `triton_dense`, `triton_topk` | the same rows as Triton kernels |
| `linear` | hidden states to loss and gradients, chunk by chunk: GEMMs around the rows |
| `ops` | custom operators with fakes and gradients, so that autograd and torch.compile see one node |
"""
