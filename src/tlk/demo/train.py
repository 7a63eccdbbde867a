"""Train the embedded model: `python -m tlk.demo.train --out DIR --minutes 4 --device cuda`.

A Llama of 1 967 872 parameters over 1920 byte-level tokens, every projection a multiple of 128 on
both sides, so that group-wise weight formats fit it as they fit a real model. The text is a few
megabytes and is read many times: dropout and weight decay keep the model from learning it by heart,
and held-out text is measured along the way. Matrices learn with Muon
(https://kellerjordan.github.io/posts/muon/), embeddings and norms with AdamW; the rate rises for 2 %
of the time and then falls linearly to zero. Writes a transformers checkpoint in bfloat16, its
tokenizer and `card.json`, which says what was measured on which files.
"""

import argparse
import json
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tlk.demo import corpus

END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Options:
    """How to train. The defaults made the model in this package."""

    minutes: float = 4.0
    device: str = "cpu"
    batch: int = 16
    length: int = 1024
    rate: float = 4e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    vocab: int = 1920
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocab: int) -> Any:
    """A byte-level BPE of `vocab` tokens, the first of which ends a text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=2048
    )


def build(vocab: int) -> Any:
    """The untrained model, in float32."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.generation_config.pad_token_id = 0  # in the config it would keep token 0 from learning
    return model


def train(
    out: Path, options: Options, names: Sequence[str] = corpus.TRAINING, quick: bool = False
) -> dict[str, Any]:
    """Train on the modules `names`, write everything to `out` and return what `card.json` holds.

    `quick` measures only the start of each held-out module, and only at the end.
    """
    torch.manual_seed(options.seed)
    texts = list(corpus.texts(names).values())
    tokenizer = train_tokenizer(texts, options.vocab)
    stream = [i for ids in tokenizer(texts, verbose=False)["input_ids"] for i in (*ids, 0)]
    model = build(options.vocab).to(options.device)
    part = 2000 if quick else None
    learnt = _learn(model, tokenizer, torch.tensor(stream, device=options.device), options, quick)
    _save(model, tokenizer, out)
    saved = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    saved = saved.float().to(options.device).eval()  # the weights as saved, float32 arithmetic
    card = {
        "held_out_bits_per_byte": corpus.held_out_bits_per_byte(
            saved, tokenizer, bytes_per_module=part
        ),
        "held_out_sha256": {p: corpus.sha256(t) for p, t in corpus.texts(corpus.HELD_OUT).items()},
        "parameters": sum(p.numel() for p in saved.parameters()),
        "training_bytes": sum(len(t.encode()) for t in texts),
        "training_tokens": len(stream),
        "training_sha256": corpus.sha256("\0".join(texts)),
        **learnt,
        "options": asdict(options),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _learn(
    model: Any, tokenizer: Any, stream: Tensor, options: Options, quick: bool
) -> dict[str, Any]:
    dropouts = _add_dropout(model, options.dropout)
    optimizers = _optimizers(model, options)
    losses, evaluations, step = deque[Tensor](maxlen=50), 0, 0
    started, progress = time.monotonic(), tqdm(_clock(60 * options.minutes), mininterval=1)
    for done in progress:
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = options.rate * min(1.0, done / 0.02) * (1 - done)
        losses.append(_step(model, optimizers, stream, options))
        if step == 0:
            first = losses[0].item()
        if done * 10 >= evaluations + 1 and not quick:
            evaluations = int(done * 10)
            bits = corpus.held_out_bits_per_byte(model.eval(), tokenizer, bytes_per_module=8000)
            model.train()
            loss = torch.stack([*losses]).mean()
            tqdm.write(f"{done:4.0%} step {step} loss {loss:.3f} held-out bits/byte {bits:.4f}")
        step += 1
    for hook in dropouts:
        hook.remove()
    return {
        "steps": step,
        "tokens_seen": step * options.batch * options.length,
        "seconds": round(time.monotonic() - started, 1),
        "first_loss": first,
        "last_loss": torch.stack([*losses]).mean().item(),  # of the last 50 steps
    }


def _clock(seconds: float) -> Iterator[float]:
    """The fraction of `seconds` that has passed, at least once, until all of it has."""
    start, done = time.monotonic(), 0.0
    while done < 1:
        yield done
        done = (time.monotonic() - start) / seconds


def _step(
    model: Any, optimizers: list[torch.optim.Optimizer], stream: Tensor, options: Options
) -> Tensor:
    begins = torch.randint(len(stream) - options.length, (options.batch, 1), device=stream.device)
    crops = stream[begins + torch.arange(options.length + 1, device=stream.device)]
    inputs, targets = crops[:, :-1], crops[:, 1:]
    with torch.autocast("cuda", torch.bfloat16, enabled=stream.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _add_dropout(model: Any, p: float) -> list[Any]:
    """Dropout on what enters the residual stream, which transformers' Llama does not have."""

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    model.train()
    blocks = [b for layer in model.model.layers for b in (layer.self_attn.o_proj, layer.mlp)]
    return [m.register_forward_hook(drop) for m in (model.model.embed_tokens, *blocks)]


def _optimizers(model: Any, options: Options) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    embedding = {"params": [model.model.embed_tokens.weight], "weight_decay": options.weight_decay}
    return [
        torch.optim.Muon(
            matrices, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([embedding, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)),
    ]


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)  # half the bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="train the embedded model of tlk")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args(argv))
    card = train(arguments.pop("out"), Options(**arguments))
    print(json.dumps(card, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
