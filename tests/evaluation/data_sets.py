"""Small downstream sets that a tiny model can learn, and models to be fine-tuned."""

import dataclasses
import importlib.util
import random

import transformers as hf

from ki_ds.data.tokenize import load_tokenizer
from ki_ds.evaluation.tasks import Example, TaskData
from tests.tiny import ROOT

SUBJECTS = ("the cat", "a dog", "one old man", "her sister", "every child", "some student")


def animals(num_train=48, *, test=True):
    """Whether an animal is meant: the words say it."""
    draw = random.Random(3)

    def examples(number):
        found = []
        for _ in range(number):
            subject = draw.choice(SUBJECTS)
            text = f"{subject} sleeps in the garden at night" + draw.choice((" again.", "."))
            found.append(Example(text, None, int(subject in SUBJECTS[:2])))
        return found

    parts = {"train": examples(num_train), "valid": examples(16)} | ({"test": examples(20)} if test else {})
    return TaskData("animals", ("person", "animal"), ("accuracy", "macro_f1"), parts, seeds=2)


def graded(num=24):
    """Pairs with grades."""
    draw = random.Random(4)
    pairs = [(draw.choice(SUBJECTS), draw.choice(SUBJECTS)) for _ in range(num)]
    examples = [Example(f"{a} sleeps.", f"{b} sleeps.", 5.0 if a == b else draw.random()) for a, b in pairs]
    return TaskData("pairs", None, ("pearson", "spearman"), {"train": examples, "valid": examples[:8]}, seeds=2)


def shortened(data, number):
    """A set with so many training examples."""
    return dataclasses.replace(data, parts={**data.parts, "train": data.parts["train"][:number]})


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert_folder(folder, tokenizer):
    """A BERT with random weights, which has segments, a pooler and another limit of positions than RoBERTa."""
    size = len(load_tokenizer(tokenizer))
    config = hf.BertConfig(vocab_size=size, max_position_embeddings=24, pad_token_id=1, **SIZES)
    hf.BertForMaskedLM(config).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def gpt2_folder(folder):
    """A GPT-2 whose tokenizer, like the released one, has neither padding nor ids around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "th", "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)
    tokenizer.save_pretrained(folder)
    config = hf.GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tool():
    """The module of tools/evaluate.py."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
