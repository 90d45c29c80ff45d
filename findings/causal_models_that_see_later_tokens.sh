#!/usr/bin/env bash
# Guess, before it was run: whatever AutoModelForCausalLM makes is causal, so that the logits at a position do not depend
# on the tokens behind it, and a loss over shifted labels means something. (Encoders among its classes, such as BERT,
# say in a warning that they want is_decoder=True.)
# Seen: XLNetLMHeadModel and CpmAntForCausalLM with their default configurations see later tokens, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers

print("transformers", transformers.__version__, "torch", torch.__version__)
configs = {
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
    "xlnet": transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64),
    "cpmant": transformers.CpmAntConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=64, num_hidden_layers=2
    ),
}
seen = dict.fromkeys(configs, 0.0)
for name, config in configs.items():
    for size in (1, 5):  # of weights as they are drawn, and as training makes them
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data *= size
        ids = torch.randint(5, 60, (1, 12))
        later = ids.clone()
        later[0, 6:] = ids[0, 6:].flip(0)
        with torch.no_grad():
            first, second = (model(input_ids=i).logits[0, :6] for i in (ids, later))
        seen[name] = max(seen[name], float((first - second).abs().max() / first.abs().max()))
    print(f"{type(model).__name__}: logits of 6 tokens change by {seen[name]:.1e} with the tokens behind them")
assert seen["gpt2"] < 1e-6, "the check itself is wrong"
assert seen["xlnet"] > 1e-3 and seen["cpmant"] > 1e-3, "they are causal now"
PY
