"""A random model with the shape of the embedded one, and a real tokenizer."""

from pathlib import Path

import torch

from tlk.demo import corpus, train


def save_tiny(folder: Path) -> str:
    torch.manual_seed(3)
    texts = list(corpus.texts(["json", "string"]).values())
    train._save(train.build(512), train.train_tokenizer(texts, 512), folder)
    return str(folder)
