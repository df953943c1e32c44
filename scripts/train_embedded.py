"""Train the embedded model: a small Llama with grouped heads on the `pydocs` text.

    python scripts/train_embedded.py --minutes 60            # or go on with an interrupted training
    python scripts/train_embedded.py --minutes 60 --device cuda

The text lies beside the model (models/pydocs-llama/text), and the tokenizer is trained on it. The state is saved every
few minutes in `--work_dir`; starting the same command again goes on from there. The learning rate follows the share of
the time budget that is spent, so a run ends when its minutes are up. The model is written to `--out` as an ordinary
Hugging Face folder in bf16, with the log of its training beside it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flatllmcore.utils.files import replacing
from flatllmcore.utils.text_sources import load_text

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096
CONTEXT = 512
SEED = 42
SAVE_EVERY_S = 180
WARM_UP_SHARE = 0.02


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(SEED)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_or_train_tokenizer(args.work_dir / "tokenizer")
    tokens = load_or_tokenize(args.work_dir / "train.npy", tokenizer, "train")
    model = LlamaForCausalLM(embedded_config(tokenizer)).to(args.device)
    history = train(model, tokens, args)
    measured = test_perplexity(model.to(torch.bfloat16), tokenizer, args)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    log = {
        "text": "pydocs",
        "train_tokens": len(tokens),
        "parameters": model.num_parameters(),
        "optimizer": {"name": "AdamW", "lr": args.lr, "batch_size": args.batch_size, "seqlen": args.seqlen},
        "test_perplexity": {"dtype": "bfloat16", "seqlen": args.seqlen} | measured,
        **history,
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"test perplexity {measured['value']:.3f} over {measured['windows']} windows -> {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time in all, over all restarts")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "models" / "training")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "pydocs-llama")
    return parser.parse_args()


def embedded_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the architecture: 3.6 million parameters, six query heads on two key/value heads."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_or_train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts one `<s>` at the start of a text."""
    if not folder.is_dir():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(load_text("pydocs", "train").documents, trainer)
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            model_max_length=CONTEXT,
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_or_tokenize(path: Path, tokenizer: PreTrainedTokenizerFast, split: str) -> np.ndarray:
    """Return the ids of one split as one sequence, each document begun with `<s>`, int16."""
    if not path.is_file():
        encoded = tokenizer.backend_tokenizer.encode_batch(load_text("pydocs", split).documents)
        np.save(path, np.concatenate([np.array(e.ids, dtype=np.int16) for e in encoded]))
    return np.load(path)


def train(model: LlamaForCausalLM, tokens: np.ndarray, args: argparse.Namespace) -> dict:
    """Train until `args.minutes` are spent, from the saved state if there is one; return the history."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    state_file = args.work_dir / "state.pt"
    elapsed_s, step, losses = 0.0, 0, []
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        elapsed_s, step, losses = state["elapsed_s"], state["step"], state["losses"]

    model.train()
    budget_s = args.minutes * 60
    started, saved, earlier_s, running = time.monotonic(), time.monotonic(), elapsed_s, None
    with tqdm(total=round(budget_s), initial=round(elapsed_s), unit="s", desc="training", disable=None) as bar:
        while elapsed_s < budget_s:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate_share(elapsed_s / budget_s)
            loss = training_step(model, optimizer, batch_of_windows(tokens, step, args))
            running = loss if running is None else 0.98 * running + 0.02 * loss
            step += 1
            elapsed_s = earlier_s + time.monotonic() - started
            bar.update(round(elapsed_s) - bar.n)
            bar.set_postfix(step=step, loss=f"{running:.3f}")
            if step % 250 == 0:
                losses.append([step, round(elapsed_s), round(running, 4)])
            if time.monotonic() - saved > SAVE_EVERY_S or elapsed_s >= budget_s:
                save_state(state_file, model, optimizer, elapsed_s, step, losses)
                saved = time.monotonic()
    tokens_seen = step * args.batch_size * args.seqlen
    return {
        "steps": step,
        "tokens_seen": tokens_seen,
        "epochs": round(tokens_seen / len(tokens), 3),
        "minutes": round(elapsed_s / 60, 1),
        "threads": torch.get_num_threads(),
        "device": args.device,
        "loss_by_step_second": losses,
    }


def learning_rate_share(spent: float) -> float:
    """Return the share of the peak learning rate: linear warm-up, cosine to a twentieth."""
    if spent < WARM_UP_SHARE:
        return max(spent / WARM_UP_SHARE, 0.01)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))


def batch_of_windows(tokens: np.ndarray, step: int, args: argparse.Namespace) -> torch.Tensor:
    """Return the windows of one step, a function of the step alone, (batch, seqlen)."""
    starts = np.random.default_rng((SEED, step)).integers(len(tokens) - args.seqlen, size=args.batch_size)
    windows = np.stack([tokens[s : s + args.seqlen] for s in starts])
    return torch.from_numpy(windows.astype(np.int64)).to(args.device)


def training_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    logits = model(ids, use_cache=False).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save_state(path: Path, model, optimizer, elapsed_s: float, step: int, losses: list) -> None:
    """Write the state to a temporary file and rename it, so that a kill leaves the earlier one whole."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(path) as temporary:
        torch.save(state | {"elapsed_s": elapsed_s, "step": step, "losses": losses}, temporary)


@torch.inference_mode()
def test_perplexity(model, tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity of the test split over whole windows, how many these are, and that of the first 32."""
    model.eval()
    ids = torch.tensor(tokenizer("\n\n".join(load_text("pydocs", "test").documents)).input_ids)
    windows = ids[: len(ids) // args.seqlen * args.seqlen].view(-1, args.seqlen)
    nll = []
    for batch in tqdm(windows.split(8), desc="test perplexity", disable=None):
        logits = model(batch.to(args.device), use_cache=False).logits[:, :-1].cpu()
        nll.append(cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").item())
    value = math.exp(sum(nll) / len(windows) / (args.seqlen - 1))
    first = math.exp(sum(nll[:4]) / 32 / (args.seqlen - 1))
    return {"windows": len(windows), "value": value, "value_of_first_32": first}


if __name__ == "__main__":
    main()
